"""A guest that is started again: by itself, by ctl, and after it was woken from a snapshot."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.vmm.cli.test_control import answer, catalog, refusal, sockets
from tests.vmm.conftest import OnTerminal, eventually
from tests.vmm.cpu.program import PRELUDE, assemble
from tests.vmm.machine.test_lost import saying
from vmm.control.client import Client

# It says `up`, and starts again for any character.
REBOOTS = saying(
    "up\r\n",
    then="""
        mov     $0x3fc, %edx                    # RTS
        mov     $2, %al
        out     %al, (%dx)
1:      mov     $0x3fd, %edx
        in      (%dx), %al
        test    $1, %al
        jz      1b
        mov     $0x3f8, %edx
        in      (%dx), %al
        mov     $0xfe, %al
        out     %al, $0x64
2:      jmp     2b
""",
)


@pytest.fixture
def kernel(tmp_path):
    kernel = tmp_path / "boot" / "reboots.bin"
    kernel.parent.mkdir()
    kernel.write_bytes(assemble(PRELUDE + REBOOTS)[0])
    return kernel


def ups(environment) -> int:
    """How often it has come up."""
    with Client(sockets(environment), "box", timeout_s=30) as client:
        return str(client.call("console.read", offset=0)["data"]).count("up\r\n")


def boot(kernel):
    return ("run", "--kernel", kernel, "--flat", "--memory", "4M")


def test_a_reboot_under_a_name(named, anyhyve, environment, kernel):
    named("box", command=boot(kernel))
    for count in (1, 2, 3):
        eventually(lambda count=count: ups(environment) == count)
        anyhyve("ctl", "box", "console.write", "x", check=True)
    eventually(lambda: ups(environment) == 4)


def test_a_reboot_at_a_terminal(environment, kernel):
    terminal = OnTerminal(environment, *boot(kernel))
    terminal.until(b"up\r\n")
    terminal.seen = b""
    terminal.type(b"x")
    terminal.until(b"up\r\n")
    terminal.type(b"\x1dq")
    assert terminal.wait() == 0


@pytest.mark.parametrize("goal", [("--until", "never"), ()])
def test_with_nobody_there_it_is_the_end(anyhyve, kernel, goal):
    done = anyhyve(*boot(kernel), *goal, input=b"x")
    assert b"the guest asked to be started again" in done.stderr and done.returncode == (3 if goal else 0)


@pytest.fixture
def suspended(named, anyhyve, environment, kernel) -> Path:
    """Of a machine that is up."""
    box = named("box", command=boot(kernel))
    eventually(lambda: ups(environment) == 1)
    file = catalog(environment) / "up.snapshot"
    file.parent.mkdir(parents=True, exist_ok=True)
    anyhyve("ctl", "box", "suspend", file, check=True)
    assert box.wait(20) == 0
    return file


def test_the_snapshot_says_what_it_was_booted_from(suspended, anyhyve, kernel):
    assert answer(anyhyve("snapshot", "show", suspended, "--json"))["meta"]["boot"] == {
        "kernel": {"name": "reboots.bin", "size": kernel.stat().st_size, "blake3": _digest(kernel)},
        "initrd": None, "append": "", "flat": True,
    }  # fmt: skip


def _digest(path: Path) -> str:
    from blake3 import blake3

    return blake3(path.read_bytes()).hexdigest()


def test_a_woken_machine_without_its_kernel_says_which(suspended, named, anyhyve, kernel):
    named("box", command=("restore", suspended))
    said = refusal(anyhyve("ctl", "box", "reset"))
    assert re.search(r"to start again it needs reboots.bin \(\d+ bytes, BLAKE3 [0-9a-f]{16}\.\.\.\), which is neither",
                     said)  # fmt: skip
    assert answer(anyhyve("ctl", "box", "status", "--json"))["state"] == "running"


@pytest.mark.parametrize("how", ["given", "beside", "another of its name beside"])
def test_a_woken_machine_starts_again(suspended, named, anyhyve, environment, kernel, how):
    given = ("--kernel", kernel) if how == "given" else ()
    beside = suspended.with_name("reboots.bin")
    if how != "given":
        beside.write_bytes(kernel.read_bytes())
    if how == "another of its name beside":
        beside.write_bytes(kernel.read_bytes()[:-1] + b"x")
    named("box", command=("restore", suspended, *given))
    anyhyve("ctl", "box", "console.write", "x", check=True)
    if how == "another of its name beside":
        eventually(lambda: not sockets(environment).joinpath("box.sock").exists())
    else:
        eventually(lambda: ups(environment) == 1)


def test_kept_beside_it(named, anyhyve, environment, kernel, tmp_path):
    """And what was kept is found by digest: the kernel itself is gone."""
    box = named("box", "--keep-boot", command=boot(kernel))
    eventually(lambda: ups(environment) == 1)
    kept = f"boot-{_digest(kernel)[:16]}"
    assert [file.name for file in catalog(environment).iterdir()] == [kept]
    assert (catalog(environment) / kept).stat().st_mode & 0o777 == 0o600
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    anyhyve("ctl", "box", "checkpoint", elsewhere / "cut", check=True)
    eventually((elsewhere / kept).exists)
    anyhyve("suspend-all", check=True)
    assert box.wait(20) == 0
    kernel.unlink()
    for file in (catalog(environment) / "suspended.snapshot", elsewhere / "cut"):
        again = named("box", command=("restore", file))
        anyhyve("ctl", "box", "reset", check=True)
        eventually(lambda: ups(environment) == 1)
        anyhyve("ctl", "box", "stop", check=True)
        assert again.wait(20) == 0


def test_another_kernel_is_given(suspended, named, anyhyve, environment, kernel, tmp_path):
    other = tmp_path / "other.bin"
    other.write_bytes(kernel.read_bytes() + b"x")
    box = named("box", command=("run", "-r", suspended, "--kernel", other, "--flat"))
    anyhyve("ctl", "box", "reset", check=True)
    eventually(lambda: ups(environment) == 1)
    anyhyve("ctl", "box", "stop", check=True)
    assert b"which is not what the machine was booted from" in box.communicate(timeout=20)[1]


def test_a_save_that_fails_at_the_end_costs_nothing(named, anyhyve, tmp_path):
    """The folder it was to go to is gone by then, as room on a disk may be."""
    folder = tmp_path / "soon gone"
    folder.mkdir()
    box = named("box", "--memory", "16M", "--until", r"\[x\]", "--save", folder / "cut")
    os.rmdir(folder)
    anyhyve("ctl", "box", "console.write", "xx", check=True)
    assert box.stderr is not None
    said = b""
    while b"can be saved again" not in said:
        said += os.read(box.stderr.fileno(), 1 << 12)
    assert answer(anyhyve("ctl", "box", "status", "--json"))["state"] == "running"
    folder.mkdir()
    anyhyve("ctl", "box", "suspend", folder / "cut", check=True)
    last = box.communicate(timeout=20)[1].decode().splitlines()[-1]
    assert last.startswith("anyhyve: suspended, at position") and box.returncode == 1
    anyhyve("snapshot", "verify", folder / "cut", check=True)
