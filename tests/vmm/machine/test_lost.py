"""A guest that is lost ends what waits for it, with the line that says why."""

from __future__ import annotations

import re
import time

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program
from vmm.errors import GuestError
from vmm.guest.lost import LOST
from vmm.machine.stop import Stopped, StopReason
from vmm.testing.expect import Expect

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

PANIC = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009"
LINES = [
    f"[    1.078673] {PANIC}",
    f"<0>[    1.078673][    T1] {PANIC}",
    PANIC,
    "[    2.1] BUG: unable to handle page fault for address: ffffffffdeadbeef",
    "[    2.1] Oops: 0002 [#1] PREEMPT SMP NOPTI",
    "[    2.1] general protection fault, probably for non-canonical address 0xdead000000000000: 0000 [#1] SMP",
    "[    2.1] invalid opcode: 0000 [#1] PREEMPT SMP NOPTI",
    "[    2.1] kernel BUG at fs/inode.c:611!",
    "[  48.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [swapper/0:1]",
    "panic: ffs_valloc: dup alloc",
    "panic[cpu0]/thread=fffffffffbc28040: BAD TRAP",
    "Panic on CPU 0:",
    "No bootable device.",
    "ALERT!  /dev/vda1 does not exist.  Dropping to a shell!",
    "ran out of input\r\n\r\n -- System halted",
]
NOT_LOST = [
    "[    0.000000] Command line: console=ttyS0 panic=1",
    "[    0.1] Kernel command line: panic: no",
    "a test of a panic: it says so",
    "[    1.0] sysrq: Trigger a crash",
    "debug: 0000 [1]",
    "~ # echo Kernel panic",
]


def saying(*texts: str, then: str) -> str:
    """A program that writes to the console and goes on with `then`."""
    data = "".join(f"message{i}: .ascii {escaped(text)}\n.byte 0\n" for i, text in enumerate(texts))
    code = "".join(f"lea message{i}(%rip), %rsi; call say\n" for i in range(len(texts)))
    return f"""
        {code}
        {then}
1:      jmp     1b
say:    lodsb
        test    %al, %al
        jz      2f
        mov     $0x3f8, %edx
        out     %al, (%dx)
        jmp     say
2:      ret
        {data}"""


def escaped(text: str) -> str:
    return '"' + "".join(f"\\{byte:03o}" for byte in text.encode()) + '"'


@pytest.mark.parametrize("line", LINES)
def test_lines_of_guests_that_are_lost(line):
    assert re.search(LOST, line, re.MULTILINE)


@pytest.mark.parametrize("line", NOT_LOST)
def test_lines_of_guests_that_are_not(line):
    assert not re.search(LOST, line, re.MULTILINE)


ENDS = {
    "runs on": "",
    "halts": "cli; hlt",
    "asks for a reset": "mov $0xfe, %al; out %al, $0x64",
    "shuts down": "movw $0, 0x200000; lidt 0x200000; ud2",
}


@each_backend
@pytest.mark.parametrize("end", ENDS)
def test_the_run_ends_with_all_it_says(backend, end):
    source = saying("booting\r\n", f"{PANIC}\r\n", "Call Trace:\r\n ---[ end ]---\r\n", then=ENDS[end])
    machine = Program(source, backend).machine
    stop = machine.run(until="ready", lost=LOST)
    assert stop == Stopped(StopReason.PANIC) and stop.why == PANIC
    assert machine.board.console.read(0)[1].endswith(b"---[ end ]---\r\n")


@each_backend
def test_one_that_goes_on_and_on_ends_too(backend):
    source = saying(f"{PANIC}\r\n", then="2: lea message0(%rip), %rsi; call say; jmp 2b")
    stop = Program(source, backend).machine.run(until="ready", lost=LOST)
    assert stop == Stopped(StopReason.PANIC) and stop.why == PANIC


@each_backend
def test_what_is_waited_for_comes_first(backend):
    machine = Program(saying(f"{PANIC}\r\n", then=""), backend).machine
    assert machine.run(until="not syncing", lost=LOST) == Stopped(StopReason.PATTERN)


@each_backend
def test_without_the_pattern_nobody_looks(backend):
    machine = Program(saying(f"{PANIC}\r\n", then="cli; hlt"), backend).machine
    assert machine.run() == Stopped(StopReason.HALTED)


@each_backend
def test_time_on_the_clock_on_the_wall(backend):
    machine = Program(saying(then=""), backend).machine
    began = time.monotonic()
    assert machine.run(seconds=0.2) == Stopped(StopReason.TIMEOUT)
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize(
    ("then", "why"),
    [
        ("", f"it is lost: {PANIC}"),
        ("cli; hlt", f"it is lost: {PANIC}"),
    ],
)
def test_expect_names_the_line(then, why):
    console = Expect(Program(saying("one\r\n", f"{PANIC}\r\n", "trace\r\n", then=then)).machine)
    with pytest.raises(GuestError, match=re.escape(why)) as caught:
        console.expect("ready")
    assert str(caught.value).endswith(f"its last lines:\none\n{PANIC}\ntrace")


def test_expect_of_a_guest_that_halts_says_how():
    with pytest.raises(GuestError, match="it halted with interrupts off"):
        Expect(Program("cli; hlt").machine).expect("ready")


def test_expect_waits_no_longer_than_the_wall_allows():
    console = Expect(Program(saying("working\r\n", then="")).machine, seconds=1e6, wall_seconds=0.3)
    with pytest.raises(GuestError, match=r"waited 0\.3 s on the clock on the wall; its last lines:\nworking"):
        console.expect("ready")
