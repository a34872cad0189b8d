"""What does a field of the CPU's state do? It is left out of what is loaded, and such a machine runs beside one that
was not: the second table of docs/scoreboard.md.

Random guests show most of it (tests.vmm.cpu.random_guests), small programs what those do not come to.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from tests.fields import forget, paths
from tests.vmm.cpu import random_guests
from tests.vmm.cpu.campaign import Bench
from tests.vmm.cpu.program import Program
from vmm.cpu import validity
from vmm.cpu.protocol import CpuState, EventState
from vmm.machine.machine import Machine
from vmm.machine.stop import Stopped, StopReason

HEAD = """## What acts

A field that is saved and loaded can still do nothing. Each field of the CPU is left out of what is *loaded*, once a
random guest or a small program has come to have something in it; what is seen beside the field itself, and after how
long. Without some there is no such state, and it is refused by name. The rest does nothing on the emulated CPU: it
looks at no segment's type once that is loaded, none of its instructions stores an opcode, and these guests' board has
no NMI, as that of `tests/vmm/cpu/test_apic.py` has.

| field | seen by | seconds |
|---|---|---|"""

GUESTS = 200  # at most, for a field
ALONE, REFUSED = "nothing but itself", "refused without it"
_SSE = "mov %cr4, %rax; or $0x200, %rax; mov %rax, %cr4; "

PROGRAMS = {
    "fs.base": """
        movq    $7, 0x200000
        mov     $0xc0000100, %ecx
        mov     $0x200000, %eax
        xor     %edx, %edx
        wrmsr
        pause
        mov     %fs:0, %rax""",
    "gs.base": """
        movq    $7, 0x200000
        mov     $0xc0000101, %ecx
        mov     $0x200000, %eax
        xor     %edx, %edx
        wrmsr
        pause
        mov     %gs:0, %rax""",
    "cr8": "mov $5, %eax; mov %rax, %cr8; pause; mov %cr8, %rax",
    "sfmask": """
        syscalls
        pause
        std
        syscall
entry:  pushf
        pop     %rax""",
    "pat": "mov $0x277, %ecx; xor %edx, %edx; mov $6, %eax; wrmsr; pause; mov $0x277, %ecx; rdmsr",
    "tsc_aux": "mov $0xc0000103, %ecx; xor %edx, %edx; mov $6, %eax; wrmsr; pause; rdtscp; mov %ecx, %eax",
    "fpu.fcw": "movw $0x27f, 0x200000; fldcw 0x200000; pause; fnstcw 0x200000; mov 0x200000, %rax",
    "fpu.ftw": "fld1; pause; fnstenv 0x200000; mov 0x200008, %eax",
    "fpu.xmm": _SSE + "mov $7, %eax; movq %rax, %xmm3; pause; movq %xmm3, %rax",
    "halted": "pause",
    "event": "lea after(%rip), %r15; pause; after:",
}
GIVEN: dict[str, Any] = {"halted": True, "event": EventState(kind="exception", vector=6)}  # no pause comes with them


def acting() -> Iterator[tuple[str, str, float]]:
    """For each field: its path, what is seen, seconds."""
    with closing(Bench()) as never, closing(Bench()) as woken:
        for path in paths(CpuState):
            began = time.monotonic()
            yield ".".join(path), acted(never, woken, path), time.monotonic() - began


def acted(never: Bench, woken: Bench, path: tuple[str, ...]) -> str:
    if ".".join(path) in PROGRAMS:
        return _in_a_program(path)
    seen = set()
    for seed in range(GUESTS):
        found = _in_a_guest(never, woken, path, seed)
        if found not in (None, ALONE, REFUSED):
            return found
        seen.add(found)
    return REFUSED if REFUSED in seen and ALONE not in seen else ALONE


def _in_a_guest(never: Bench, woken: Bench, path: tuple[str, ...], seed: int) -> str | None:
    """None where the guest has nothing in the field, or ends."""
    guest = random_guests.draw(seed, spoil=0)
    machine = never.put(guest)
    begin, end = machine.position + 100 + seed % 400, machine.position + 1500
    if machine.run(position=begin) != Stopped(StopReason.POSITION) or machine.clock.prepaid:
        return None
    at = machine.cpus[0].save()
    forgotten = forget(CpuState, path)(at)
    if forgotten == at:
        return None
    if validity.refusal(forgotten) is not None:
        return REFUSED
    other = woken.put(guest)
    other.run(position=begin)
    other.cpus[0].load(forgotten)
    return _compare(machine, other, path, machine.run(position=end), other.run(position=end))


def _in_a_program(path: tuple[str, ...]) -> str:
    field = ".".join(path)
    machine, other = (Program(PROGRAMS[field] + "; jmp done").pause().machine for _ in range(2))
    state = machine.cpus[0].save()
    if field in GIVEN:
        state = dataclasses.replace(state, **{field: GIVEN[field]})
    machine.cpus[0].load(state)
    other.cpus[0].load(forget(CpuState, path)(state))
    return _compare(machine, other, path, machine.run(until_ns=10**9), other.run(until_ns=10**9))


def _compare(machine: Machine, other: Machine, path: tuple[str, ...], *stops: Any) -> str:
    if stops[0] != stops[1]:
        return "another end of the run"
    if (machine.position, machine.clock.now_ns()) != (other.position, other.clock.now_ns()):
        return "another path through the code"
    if machine.digests()["ram"] != other.digests()["ram"]:
        return "other memory"
    ours, theirs = (forget(CpuState, path)(each.cpus[0].save()) for each in (machine, other))
    return ALONE if ours == theirs else "other registers"


def table() -> int:
    """Print it."""
    print(HEAD)
    for field, seen, seconds in acting():
        print(f"| {field} | {seen} | {seconds:.2f} |", flush=True)
    print()
    return 0
