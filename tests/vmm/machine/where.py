"""Where a machine stands, told from its saved state alone: user mode, REP, a handler, the shadow of STI, halted."""

from __future__ import annotations

from collections.abc import Callable

import capstone

from vmm.cpu.paging import read_virtual
from vmm.machine.machine import Machine, Stopped, StopReason


def instruction(machine: Machine) -> capstone.CsInsn:
    """The one at RIP."""
    state = machine.cpu.save()
    code = read_virtual(state, lambda address, size: bytes(machine.ram.slice(address, size)), state.rip, 15)
    return next(capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(code, 0))


def user(machine: Machine) -> bool:
    return machine.cpu.save().cs.selector & 3 == 3


def rep(machine: Machine) -> bool:
    """Within a REP instruction: one step on, RIP has not moved and there is more to do. Moves the machine."""
    before = machine.cpu.save().rip
    step(machine, 1)
    return machine.cpu.save().rip == before and instruction(machine).mnemonic.startswith("rep")


def handler(machine: Machine) -> bool:
    """The timer's interrupt is in service: before its EOI."""
    return bool(machine.board.devices["pic0"].state.isr)


def shadow(machine: Machine) -> bool:
    return machine.cpu.save().interrupt_shadow


def halted(machine: Machine) -> bool:
    return machine.cpu.save().halted


Where = Callable[[Machine], bool]


def step(machine: Machine, code_bytes: int) -> None:
    assert machine.run(position=machine.position + code_bytes) == Stopped(StopReason.POSITION)


def find(machine: Machine, where: Where, count: int, stride: int, most: int = 100_000) -> list[int]:
    """Walk on, `stride` bytes of code at a time, until `count` positions satisfy `where`."""
    found: list[int] = []
    for _ in range(most):
        if len(found) == count:
            return found
        step(machine, stride)
        if where(machine):
            found.append(machine.position)
    raise AssertionError(f"{where.__name__}: {len(found)} of {count} found by position {machine.position}")


def find_handlers(machine: Machine, count: int, each: int) -> list[int]:
    """Positions within the timer's next handlers, at most `each` per interrupt."""
    found: list[int] = []
    while len(found) < count:
        due = machine.board.devices["pit"].deadline()
        while due is not None and (ahead := due - machine.clock.now_ns()) > 250:
            step(machine, ahead * 2)  # half of the way: port accesses take time in which no code runs
        inside: list[int] = []
        for _ in range(2_000):
            step(machine, 1)
            if handler(machine):
                inside.append(machine.position)
            elif inside:
                break
        found += inside[:: max(1, len(inside) // each)]
    return found[:count]


def find_halts(boot: Callable[[], Machine], start: int, count: int) -> list[int]:
    """For each of the next halts: the boundary in the shadow of STI before it, and the one at which the CPU halted."""
    found: list[int] = []
    coarse, fine = boot(), boot()
    coarse.run(position=start)
    while len(found) < 2 * count:
        before, halts = coarse.position, coarse.exits()["halt"]
        step(coarse, 2000)
        if coarse.exits()["halt"] > halts:
            fine.run(position=before)
            found += find(fine, shadow, 1, 1) + find(fine, halted, 1, 1)
    coarse.close()
    fine.close()
    return found
