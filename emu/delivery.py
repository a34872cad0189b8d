"""What delivering an exception leads to, found without delivering it (SDM vol. 3, 6.12 to 6.15).

Needed twice. From Python the engine's delivery must not fault: it would leave by longjmp, across Python's frames. And
for INT n the engine has moved RIP behind the instruction by then, so a fault of its delivery would name the wrong one.
"""

from __future__ import annotations

import contextlib

from emu.engine import CONTRIBUTORY, Engine
from emu.linear import GP, MASK64, NP, PAGE_FAULT, TS, FaultError, physical, read
from vmm.cpu.validity import LMA, VM, WITH_ERROR_CODE

_DOUBLE_FAULT = 8
_INT3, _INTO = 0xCC, 0xCE

Fault = tuple[int, int]  # vector, error code


def settle(engine: Engine) -> bool:
    """Replace the exception that is set up by the one that can be delivered in its place (table 6-5). False when there
    is none: a triple fault."""
    vector = engine.exception_index.value
    while (fault := fault_of(engine, vector)) is not None:
        if engine.u32("exception_is_int").value:
            _step_back(engine)
        first, (second, error) = vector, fault
        if first == _DOUBLE_FAULT:
            return False
        if (first in CONTRIBUTORY or first == PAGE_FAULT) and (
            second in CONTRIBUTORY or (first == PAGE_FAULT and second == PAGE_FAULT)
        ):
            second, error = _DOUBLE_FAULT, 0
        vector = second
        engine.raise_exception(vector, error)
    return True


def _step_back(engine: Engine) -> None:
    """From behind INT3, INTO or INT n to the instruction itself. Prefixes, which mean nothing here, are left out."""
    short = False
    if engine.exception_index.value in (3, 4):
        with contextlib.suppress(FaultError):  # it ran a moment ago; now nothing may be mapped there
            short = read(engine, engine.segment("cs").base + engine.eip.value - 1, 1) in (_INT3, _INTO)
    engine.eip.value = engine.eip.value - (1 if short else 2) & MASK64


def fault_of(engine: Engine, vector: int) -> Fault | None:
    """The fault that delivering `vector` would raise now; None when it can be delivered."""
    software = bool(engine.u32("exception_is_int").value)
    idt = engine.segment("idtr")
    if not engine.cr[0] & 1:
        return (GP, vector * 8 + 2) if vector * 4 + 3 > idt.limit else None
    try:
        if engine.u64("efer").value & LMA:
            _look_through_64(engine, vector, software)
        else:
            _look_through_32(engine, vector, software)
    except FaultError as would:
        return would.vector, would.error_code
    return None


def _look_through_64(engine: Engine, vector: int, software: bool) -> None:
    idt, cpl = engine.segment("idtr"), engine.hflags.value & 3
    entry_error = vector * 8 + 2
    if vector * 16 + 15 > idt.limit:
        raise FaultError(GP, entry_error)
    gate = read(engine, idt.base + vector * 16, 8)
    if gate >> 40 & 0x1F not in (14, 15) or (software and (gate >> 45 & 3) < cpl):
        raise FaultError(GP, entry_error)
    if not gate >> 47 & 1:
        raise FaultError(NP, entry_error)
    ist = gate >> 32 & 7
    dpl = _code_segment(engine, gate >> 16 & 0xFFFF, cpl, long=True)
    if dpl < cpl or ist:
        tr = engine.segment("tr")
        offset = 4 + 8 * dpl if not ist else 0x1C + 8 * ist
        if offset + 7 > tr.limit:
            raise FaultError(TS, tr.selector & 0xFFFC)
        stack = read(engine, tr.base + offset, 8)
    else:
        stack = engine.regs[4]
    _writable(engine, (stack & ~15) - 48, 48)


def _look_through_32(engine: Engine, vector: int, software: bool) -> None:
    idt, cpl = engine.segment("idtr"), engine.hflags.value & 3
    entry_error = vector * 8 + 2
    if vector * 8 + 7 > idt.limit:
        raise FaultError(GP, entry_error)
    gate = read(engine, idt.base + vector * 8, 8)
    kind = gate >> 40 & 0x1F
    if kind not in (5, 6, 7, 14, 15) or (software and (gate >> 45 & 3) < cpl):
        raise FaultError(GP, entry_error)
    if not gate >> 47 & 1:
        raise FaultError(NP, entry_error)
    if kind == 5:
        return  # a task gate: its faults are those of the switch, and it is the engine's to make it
    selector = gate >> 16 & 0xFFFF
    dpl = _code_segment(engine, selector, cpl, long=False)
    width = 4 if kind & 8 else 2
    words = 3 + (not software and vector in WITH_ERROR_CODE)
    if dpl < cpl:
        virtual = bool(engine.eflags.value & VM)
        if virtual and dpl:
            raise FaultError(GP, selector & 0xFFFC)
        base, stack, mask = _inner_stack(engine, dpl)
        words += 6 if virtual else 2
    else:
        segment = engine.segment("ss")
        base, stack, mask = segment.base, engine.regs[4], _stack_mask(segment.flags)
    _writable(engine, base + (stack - words * width & mask) & 0xFFFFFFFF, words * width)


def _inner_stack(engine: Engine, dpl: int) -> tuple[int, int, int]:
    """Base, pointer and mask of the stack that the TSS has for a level."""
    tr = engine.segment("tr")
    wide = tr.flags >> 11 & 1
    offset = 4 + 8 * dpl if wide else 2 + 4 * dpl
    if offset + (7 if wide else 3) > tr.limit:
        raise FaultError(TS, tr.selector & 0xFFFC)
    pointer = read(engine, tr.base + offset, 4 if wide else 2)
    selector = read(engine, tr.base + offset + (4 if wide else 2), 2)
    if not selector & 0xFFFC or selector & 3 != dpl:
        raise FaultError(TS, selector & 0xFFFC)
    table = engine.segment("ldtr" if selector & 4 else "gdtr")
    if (selector | 7) > table.limit:
        raise FaultError(TS, selector & 0xFFFC)
    descriptor = read(engine, table.base + (selector & ~7), 8)
    data = descriptor >> 44 & 1 and not descriptor >> 43 & 1 and descriptor >> 41 & 1
    if descriptor >> 45 & 3 != dpl or not data or not descriptor >> 47 & 1:
        raise FaultError(TS, selector & 0xFFFC)
    base = descriptor >> 16 & 0xFFFFFF | descriptor >> 32 & 0xFF000000
    return base, pointer, _stack_mask(descriptor >> 32)


def _stack_mask(flags: int) -> int:
    return 0xFFFFFFFF if flags >> 22 & 1 else 0xFFFF


def _code_segment(engine: Engine, selector: int, cpl: int, long: bool) -> int:
    """The privilege level a gate's code segment runs at."""
    table = engine.segment("ldtr" if selector & 4 else "gdtr")
    if not selector & 0xFFFC:
        raise FaultError(GP, 0)
    if (selector | 7) > table.limit:
        raise FaultError(GP, selector & 0xFFFC)
    descriptor = read(engine, table.base + (selector & ~7), 8)
    dpl = descriptor >> 45 & 3
    if descriptor >> 43 & 3 != 3 or dpl > cpl:
        raise FaultError(GP, selector & 0xFFFC)
    if not descriptor >> 47 & 1:
        raise FaultError(NP, selector & 0xFFFC)
    if long and descriptor >> 53 & 3 != 1:
        raise FaultError(GP, selector & 0xFFFC)
    return cpl if descriptor >> 42 & 1 else dpl  # a conforming segment keeps the level


def _writable(engine: Engine, linear: int, size: int) -> None:
    physical(engine, linear + size - 1, write=True)  # pushes go down: the top faults first
    physical(engine, linear, write=True)
