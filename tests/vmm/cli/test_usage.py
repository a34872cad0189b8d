"""An option is obeyed or refused, never passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import OWN
from tests.vmm.conftest import OnTerminal, eventually

BOOT = ("run", "--kernel", OWN, "--flat", "--memory", "16M")
WITHOUT = {
    ("--paused",): "--paused does nothing without --name",
    ("--autosave", "5"): "--autosave does nothing without --name",
    ("--suspend-on-term",): "--suspend-on-term does nothing without --name",
    ("--rundir", "here"): "--rundir does nothing without --name",
    ("--detach",): "--detach does nothing without --name",
    ("--keep-boot",): "--keep-boot does nothing without --name or --save",
    ("--pack",): "--pack does nothing without --save",
    ("--force",): "--force does nothing without --save",
    ("--parent", OWN): "--parent does nothing without --save",
    ("--for-version", "0.1.0"): "--for-version does nothing without --save",
    ("--detach", "--name", "box", "--json"): "--json has nowhere to write to with --detach",
}


@pytest.mark.parametrize("options", WITHOUT, ids=str)
@pytest.mark.parametrize("command", ["run", "restore"])
def test_an_option_that_would_do_nothing(anyhyve, options, command):
    done = anyhyve(*(BOOT if command == "run" else ("restore", "nowhere")), *options)
    assert done.returncode == 2 and WITHOUT[options] in done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*BOOT, "--initrd", OWN), "--flat code is given no --initrd and no --append"),
        ((*BOOT, "--append", "quiet"), "--flat code is given no --initrd and no --append"),
        (("run", "-r", "nowhere", "--append", "quiet"), "do nothing without --kernel"),
        (("run", "-r", "nowhere", "--flat"), "do nothing without --kernel"),
        (("restore", "nowhere", "--initrd", OWN), "do nothing without --kernel"),
        (("wake", "nobody", "--append", ""), "do nothing without --kernel"),
        ((*BOOT, "box", "--name", "other"), "two names are given, box and --name other"),
        ((*BOOT[:-1], "256"), "256 is a number of bytes; is 256M meant?"),
        ((*BOOT, "--at", 1 << 64), "--at"),
    ],
)
def test_wrong_usage(anyhyve, arguments, said):
    done = anyhyve(*arguments)
    assert done.returncode == 2 and said in done.stderr.decode(), done.stderr


def test_a_position_that_was_passed(anyhyve, tmp_path):
    anyhyve(*BOOT, "--at", 2_000_000, "--save", tmp_path / "s", check=True)
    done = anyhyve("restore", tmp_path / "s", "--at", 1_999_999)
    assert done.returncode == 1 and b"--at 1999999: the machine is at position 2000" in done.stderr


def test_the_last_line_says_where_it_was_saved(anyhyve, tmp_path):
    done = anyhyve(*BOOT, "--at", 2_000_000, "--save", tmp_path / "s")
    assert done.stderr.decode().splitlines()[-1].endswith(f"; saved to {tmp_path / 's'}")
    done = anyhyve("restore", tmp_path / "s", "--at", 2_100_000, "--save", tmp_path / "t", "--json")
    assert json.loads(done.stdout)["saved"] == str(tmp_path / "t")
    # The guest ends itself: what was to be saved at the end is.
    done = anyhyve("restore", tmp_path / "s", "--at", 10**12, "--save", tmp_path / "u", input=b"qq")
    assert done.stderr.decode().splitlines()[-1].endswith(f"; saved to {tmp_path / 'u'}")


# --- in the background


def test_detach(anyhyve, environment):
    done = anyhyve(*BOOT, "box", "--detach", check=True)
    assert done.stdout.decode().startswith("box runs; what it has to say goes to ")
    log = done.stdout.decode().split()[-1]
    try:
        assert json.loads(anyhyve("ctl", "box", "status", "--json").stdout)["state"] == "running"
        again = anyhyve(*BOOT, "--name", "box", "--detach")
        assert again.returncode == 1 and b"a machine named box runs already" in again.stderr
    finally:
        anyhyve("ctl", "box", "stop")
    eventually(lambda: "stopped by ctl" in Path(log).read_text())


def test_detach_of_a_machine_that_cannot_be(anyhyve, tmp_path):
    done = anyhyve("restore", tmp_path / "nothing", "--name", "box", "--detach")
    assert done.returncode == 1 and b"No such file" in done.stderr
    assert anyhyve("list", "--json").stdout.strip() == b"[]"


@pytest.mark.parametrize(
    ("typed", "meant"), [("--memroy", "--memory"), ("--utnil", "--until"), ("--drive", None), ("--smp", None)]
)
def test_what_was_mistyped_is_guessed(anyhyve, typed, meant):
    said = anyhyve("run", typed, "1").stderr.decode()
    assert f"No such option: {typed}" in said or f"No such option '{typed}'" in said
    assert ("Did you mean" in said) == (meant is not None) and (meant or "") in said


def test_lists_of_nothing(anyhyve):
    assert anyhyve("list", check=True).stdout == b"no machine with a name runs here\n"
    assert anyhyve("catalog", check=True).stdout == b"no snapshot was saved into the catalog\n"


def test_a_small_file_is_no_snapshot(anyhyve, tmp_path):
    (tmp_path / "note").write_text("hello\n")
    assert b"not an anyhyve snapshot" in anyhyve("snapshot", "show", tmp_path / "note").stderr


def test_ctrl_c(environment):
    """Of a run that shows nothing at a terminal: it is up when the guest has been told what was typed."""
    terminal = OnTerminal(environment, *BOOT, "--json", "--until", "never", "--bind", "com2=pty")
    terminal.until(b"com2 is at ")
    terminal.type(b"\x03")
    terminal.until(b"interrupted")
    assert terminal.wait() == 130


@pytest.mark.parametrize("words", [(), ("snapshot",), ("guest",)], ids=str)
def test_without_a_command_there_is_help(anyhyve, words):
    done = anyhyve(*words)
    lines = (done.stdout + done.stderr).decode().splitlines()
    assert lines[0].startswith("Usage: ") and len(lines) > 8 and not any("\\n" in line for line in lines)


@pytest.mark.parametrize(("typed", "meant"), [("rnu", "run"), ("hepl", "help"), ("restor", "restore")])
def test_a_command_that_is_mistyped(anyhyve, typed, meant):
    done = anyhyve(typed)
    assert done.returncode == 2 and f"No such command '{typed}'. Did you mean {meant}?" in done.stderr.decode()
    assert b"Did you mean" not in anyhyve("xyzzy").stderr


def test_help_is_a_command_too(anyhyve):
    assert anyhyve("help").stdout == anyhyve("--help").stdout
    assert anyhyve("help", "ctl").stdout == anyhyve("ctl", "--help").stdout


def test_nothing_to_do_is_said(anyhyve):
    done = anyhyve("suspend-all")
    assert (done.returncode, done.stdout) == (0, b"no machine with a name runs here\n")
    assert anyhyve("suspend-all", "--json").stdout == b"{}\n"


@pytest.mark.parametrize("data", [b"", b"no kernel" * 99, b"\x7fELF" + b"\xff" * 200], ids=len)
def test_a_wrong_kernel_is_named(anyhyve, tmp_path, data):
    (tmp_path / "bzimage").write_bytes(data)
    done = anyhyve("run", "--kernel", tmp_path / "bzimage")
    assert done.returncode == 1 and done.stderr.startswith(b"anyhyve: bzimage: the ")
    assert (b"an empty file" in done.stderr) == (data == b"")


def test_boards(anyhyve, tmp_path):
    done = anyhyve(*BOOT, "--board", "pc", "--at", 1_000_000, "--save", tmp_path / "pc", check=True)
    assert done.returncode == 0
    assert b"apic.local version 1" in anyhyve("snapshot", "show", tmp_path / "pc").stdout
    other = anyhyve("run", "-r", tmp_path / "pc", "--board", "isapc")
    assert other.returncode == 1 and b"board: the snapshot has pc, not isapc" in other.stderr
    assert anyhyve(*BOOT, "--board", "q35").returncode == 2


def test_a_pc_needs_room_for_its_tables(anyhyve):
    done = anyhyve("run", "--kernel", OWN, "--flat", "--memory", "512K")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(b"anyhyve: a pc has at least 1M of memory")
