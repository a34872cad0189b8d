"""Standard streams that are closed, full, or read by nobody: said in a line where that can be, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import OWN
from tests.vmm.conftest import MAIN, eventually
from vmm.machine.machine import Machine

FULL = "anyhyve: standard output: No space left on device"
GONE = "anyhyve: standard output: its reader has gone"


@pytest.fixture(scope="module")
def saved(boot_own, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "own"
    with boot_own() as machine:
        machine.run(position=1_000_000)
        machine.save(file)
    return file


@pytest.fixture
def commands(saved):
    end = ("--at", "4000000", "--backend", "emu")
    run = ("run", "--kernel", OWN, "--flat", "--memory", "16M", *end)
    restore = ("restore", saved, *end)
    return {"run": run, "restore": restore, "run --json": (*run, "--json"), "restore --json": (*restore, "--json"),
            "devices": ("devices",), "--version": ("--version",), "--help": ("--help",)}  # fmt: skip


@pytest.fixture
def environment(environment):
    """What is written may wait in a buffer, to the end."""
    return {**environment, "PYTHONUNBUFFERED": ""}


def shell(environment, words, redirections="", stdout=subprocess.PIPE):
    """One command of ours, as a shell starts it with such redirections."""
    line = f'exec "$@" {redirections}'
    command = ["sh", "-c", line, "sh", sys.executable, "-c", MAIN, *map(str, words)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
                          timeout=60, env=environment)  # fmt: skip


NAMES = ["run", "restore", "run --json", "restore --json", "devices", "--version", "--help"]


@pytest.mark.parametrize("name", ["run", "restore", "run --json", "--help"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_is_closed_is_as_dev_null(environment, commands, name, closed):
    done = shell(environment, commands[name], closed)
    other = shell(environment, commands[name], closed.replace("&-", "/dev/null"))
    assert done.returncode == other.returncode == 0
    assert done.stderr == other.stderr and b"Traceback" not in done.stderr
    assert len(done.stdout) > 0 or ">&-" in closed.split()
    if "--json" not in name:  # that has a time in it
        assert done.stdout == other.stdout


@pytest.mark.parametrize("name", NAMES)
def test_standard_output_is_full(environment, commands, name):
    done = shell(environment, commands[name], ">/dev/full")
    assert (done.stderr.decode().splitlines(), done.returncode) == ([FULL], 1)
    done = shell(environment, commands[name], ">/dev/full 2>&1")
    assert done.returncode == 1


@pytest.mark.parametrize("name", ["run", "restore --json", "devices"])
def test_standard_error_is_full(environment, commands, name):
    """What is said there changes nothing."""
    done = shell(environment, commands[name], "2>/dev/full")
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_who_reads_standard_output_has_gone(environment, commands, name):
    """A console's end is said, as it ends the machine; of a list somebody has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    done = shell(environment, commands[name], stdout=writer)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == ([GONE] if name in ("run", "restore") else [])


def test_a_file_is_not_taken_for_a_stream(environment, tmp_path):
    """Where a standard stream is closed, what is opened next would get its number."""
    words = ("run", "--kernel", OWN, "--flat", "--memory", "16M", "--at", 2_000_000, "--save", tmp_path / "cut")
    assert shell(environment, words, "<&- >&- 2>&-").returncode == 0
    Machine.restore(tmp_path / "cut", verify=True).close()


@pytest.mark.parametrize(
    ("redirections", "status", "said"),
    [(">/dev/full", 1, [FULL]), (">/dev/full 2>/dev/full", 1, []), (">/dev/full 2>&-", 1, [])],
)
def test_attach_where_nothing_can_be_shown(environment, boxes, redirections, status, said):
    box = boxes(paused=True)
    for byte in b"hello\n":
        box.machine.board.console.transmit(byte)
    done = shell(environment, ("attach", "--rundir", box.folder, "box"), redirections)
    assert (done.stderr.decode().splitlines(), done.returncode) == (said, status)
    assert box.call("status")["state"] == "paused"


def test_attach_whose_reader_has_gone(environment, boxes):
    box = boxes(paused=True)
    console = box.machine.board.console
    words = [sys.executable, "-c", MAIN, "attach", "--rundir", str(box.folder), "box"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as attached:
        assert attached.stdout is not None and attached.stderr is not None
        console.transmit(65)
        assert attached.stdout.read(1) == b"A"
        attached.stdout.close()
        console.transmit(66)
        assert attached.wait(20) == 1
        assert attached.stderr.read().decode().splitlines() == [GONE]


def test_a_named_machine_whose_reader_has_gone_leaves_its_place(environment, named):
    reader, writer = os.pipe()
    box = named("box", stdout=writer)
    os.close(writer)
    os.close(reader)
    assert box.wait(20) == 1
    assert box.stderr.read().decode().splitlines() == [GONE]
    eventually(lambda: not os.listdir(os.path.join(environment["XDG_RUNTIME_DIR"], "anyhyve")))
