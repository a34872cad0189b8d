"""How a run ends: in words on its last line, in the exit status, and at once when the guest is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cli.test_main import MAIN, OWN_GUEST, anyhyve
from tests.vmm.cpu.program import PRELUDE, assemble
from tests.vmm.machine.test_lost import ENDS, PANIC, saying


@pytest.fixture
def run(tmp_path: Path):
    """`run(source, *options)`: a guest of assembly."""

    def run(source: str, *options: object):
        kernel = tmp_path / "kernel"
        kernel.write_bytes(assemble(PRELUDE + source)[0])
        return anyhyve("run", "--kernel", kernel, "--flat", "--memory", "4M", "--backend", "emu", *options)

    return run


def last_line(done):
    return done.stderr.decode().splitlines()[-1].rpartition(", at position")[0]


LOST = saying("booting\r\n", f"{PANIC}\r\n", "trace\r\n", then="")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("goal", [("--until", "ready"), ("--at", 10**12), ("--timeout", 60), ("--until-time", 1e6), ()])
def test_a_guest_that_is_lost(run, goal, end):
    done = run(saying("booting\r\n", f"{PANIC}\r\n", "trace\r\n", then=ENDS[end]), *goal)
    missed = f"; {goal[0]} not reached" if goal[:1] in (("--until",), ("--at",)) else ""
    assert last_line(done) == f"anyhyve: the guest is lost: {PANIC}{missed}"
    assert done.returncode == 1 and done.stdout.endswith(b"trace\r\n")


def test_what_is_lost_can_be_said(run):
    done = run(saying("Hello\r\n", "all is lost, again\r\n", then=""), "--lost", "all .* lost", "--until", "ready")
    assert last_line(done) == "anyhyve: the guest is lost: all is lost; --until not reached" and done.returncode == 1
    assert run(saying(f"{PANIC}\r\n", then="cli; hlt"), "--lost", "").returncode == 0


def test_json_says_it_too(run):
    done = run(LOST, "--until", "ready", "--json")
    assert json.loads(done.stdout)["stopped"] == "panic" and done.returncode == 1


WORDS = {
    ("cli; hlt",): ("the guest halted with interrupts off", 0),
    ("cli; hlt", "--until", "ready"): ("the guest halted with interrupts off; --until not reached", 3),
    ("sti; hlt",): ("the guest halted and nothing is to come that would wake it", 0),
    ("mov $7, %al; mov $0x501, %edx; out %al, (%dx)",): ("the guest ended with status 15", 15),
    ("mov $0xfe, %al; out %al, $0x64",): ("the guest asked to be started again", 0),
    ("lidt 0x200000; ud2",): ("the guest's CPU shut down: a triple fault", 1),
    ("1: jmp 1b", "--at", 1000): ("the run has come as far as --at", 0),
    ("1: jmp 1b", "--until-time", 0.001): ("0.001 s of guest time have passed", 0),
    ("1: jmp 1b", "--until-time", 0.001, "--until", "x"): (
        "0.001 s of guest time have passed; --until not reached", 3),
    ("1: jmp 1b", "--silence", 0.01): ("the console has shown nothing for 0.01 s of guest time", 0),
    ("1: jmp 1b", "--silence", 0.01, "--until", "x"): (
        "the console has shown nothing for 0.01 s of guest time; --until not reached", 3),
    ("1: jmp 1b", "--timeout", 0.2): ("0.2 s have passed on the clock on the wall", 0),
    ("1: jmp 1b", "--timeout", 0.2, "--at", 10**15): (
        "0.2 s have passed on the clock on the wall; --at not reached", 3),
}  # fmt: skip


@pytest.mark.parametrize("given", WORDS, ids=str)
def test_the_last_line_says_what_happened(run, given):
    words, status = WORDS[given]
    done = run(*given)
    assert (last_line(done), done.returncode) == (f"anyhyve: {words}", status)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_named(number):
    """As `timeout 60 anyhyve run ...` sends it."""
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *OWN_GUEST],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout and running.stdout.read(7) == b"anyhyve"
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert f"anyhyve: ended by {number.name}, at position " in said.decode()


LAST = {
    "halts": "cli; hlt",
    "ends": "mov $7, %al; mov $0x501, %edx; out %al, (%dx)",
    "starts again": "mov $1, %al; out %al, $0x92",
    "shuts down": "lidt 0x200000; ud2",
}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("how", LAST)
def test_what_is_shown_just_before_the_guest_ends(run, backend, how):
    """On KVM what is written comes a little later than it was."""
    done = run(saying("AB", "", then=LAST[how]), "--backend", backend, "--until", "AB")
    assert b"anyhyve: the console shows AB, " in done.stderr and done.returncode == 0


@pytest.mark.kvm
def test_where_nothing_counts_code_the_last_line_has_guest_time(run):
    done = run("1: jmp 1b", "--backend", "kvm", "--timeout", 0.5)
    assert b"0.5 s have passed on the clock on the wall, after 0." in done.stderr and b"position" not in done.stderr


def test_a_guest_that_is_idle_is_not_awaited_for_ever(run):
    """Its timer goes on for ever, and nobody will type."""
    idle = """
        pic     0x30
        mov     $0x34, %al
        out     %al, $0x43
        xor     %al, %al
        out     %al, $0x40
        out     %al, $0x40
        sti
1:      hlt
        mov     $0x300000, %r14d                # the traps' log begins anew
        jmp     1b
"""
    done = run(idle, "--until", "never")
    assert last_line(done) == "anyhyve: the console has shown nothing for 600 s of guest time; --until not reached"
    assert done.returncode == 3


def test_silence_is_counted_anew_with_each_byte(run):
    says = """
2:      mov     $0x3f8, %edx
        mov     $'x', %al
        out     %al, (%dx)
        mov     $1000000, %ecx                  # 4 MB of code, or 1 ms
1:      dec     %ecx
        jnz     1b
        jmp     2b
"""
    done = run(says, "--silence", 0.005, "--until-time", 0.05)
    assert last_line(done) == "anyhyve: 0.05 s of guest time have passed"


@pytest.mark.parametrize("option", ["--timeout", "--until-time", "--silence"])
@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan"])
def test_times_that_are_none(run, option, value):
    done = run("1: jmp 1b", option, value)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
