"""What delivering an exception leads to, found without delivering it (SDM vol. 3, 6.12 to 6.15).

Needed three times. From Python the engine's delivery must not fault: it would leave by longjmp, across Python's
frames. For INT n the engine has moved RIP behind the instruction by then, so a fault of its delivery would name the
wrong one. And an event that came with a saved state is delivered from Python.
"""

from __future__ import annotations

from emu.engine import HF2_NMI, Engine
from vmm.cpu.protocol import EventState

_MASK64 = (1 << 64) - 1
_CONTRIBUTORY = {0, 10, 11, 12, 13}
_DOUBLE_FAULT, _PAGE_FAULT, _GP, _NP, _TS = 8, 14, 13, 11, 10
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
        if (first in _CONTRIBUTORY or first == _PAGE_FAULT) and (
            second in _CONTRIBUTORY or (first == _PAGE_FAULT and second == _PAGE_FAULT)
        ):
            second, error = _DOUBLE_FAULT, 0
        vector = second
        engine.raise_exception(vector, error)
    return True


def deliver(engine: Engine, event: EventState) -> bool:
    """Deliver an event that another CPU had accepted. False for a triple fault."""
    if event.kind == "software":
        return True  # RIP is still at the INT n: it runs again
    if event.kind == "exception":
        engine.raise_exception(event.vector, event.error_code or 0)
    else:
        if event.kind == "nmi":
            engine.hflags2.value |= HF2_NMI
        engine.u32("exception_is_int").value = 0
        if (fault := fault_of(engine, event.vector)) is None:
            engine.do_hardware_interrupt(event.vector)
            return True
        engine.raise_exception(*fault)
    if not settle(engine):
        return False
    engine.do_interrupt()
    return True


def _step_back(engine: Engine) -> None:
    """From behind INT3, INTO or INT n to the instruction itself. Prefixes, which mean nothing here, are left out."""
    behind = engine.segment("cs").base + engine.eip.value
    short = _read(engine, behind - 1, 1) in (_INT3, _INTO) and engine.exception_index.value in (3, 4)
    engine.eip.value = engine.eip.value - (1 if short else 2) & _MASK64


def fault_of(engine: Engine, vector: int) -> Fault | None:
    """The fault that delivering `vector` would raise now; None when it can be delivered."""
    software = bool(engine.u32("exception_is_int").value)
    idt = engine.segment("idtr")
    if not engine.cr[0] & 1:
        return (_GP, vector * 8 + 2) if vector * 4 + 3 > idt.limit else None
    try:
        if engine.u64("efer").value & 0x400:
            _look_through_64(engine, vector, software)
        else:
            _look_through_32(engine, vector, software)
    except _WouldFaultError as would:
        return would.vector, would.error
    return None


class _WouldFaultError(Exception):
    def __init__(self, vector: int, error: int) -> None:
        self.vector, self.error = vector, error


def _look_through_64(engine: Engine, vector: int, software: bool) -> None:
    idt, cpl = engine.segment("idtr"), engine.hflags.value & 3
    entry_error = vector * 8 + 2
    if vector * 16 + 15 > idt.limit:
        raise _WouldFaultError(_GP, entry_error)
    gate = _read(engine, idt.base + vector * 16, 8)
    if gate >> 40 & 0x1F not in (14, 15) or (software and (gate >> 45 & 3) < cpl):
        raise _WouldFaultError(_GP, entry_error)
    if not gate >> 47 & 1:
        raise _WouldFaultError(_NP, entry_error)
    ist = gate >> 32 & 7
    dpl = _code_segment(engine, gate >> 16 & 0xFFFF, cpl, long=True)
    if dpl < cpl or ist:
        tr = engine.segment("tr")
        offset = 4 + 8 * dpl if not ist else 0x1C + 8 * ist
        if offset + 7 > tr.limit:
            raise _WouldFaultError(_TS, tr.selector & 0xFFFC)
        stack = _read(engine, tr.base + offset, 8)
    else:
        stack = engine.regs[4]
    _writable(engine, (stack & ~15) - 48, 48)


def _look_through_32(engine: Engine, vector: int, software: bool) -> None:
    idt, cpl = engine.segment("idtr"), engine.hflags.value & 3
    entry_error = vector * 8 + 2
    if vector * 8 + 7 > idt.limit:
        raise _WouldFaultError(_GP, entry_error)
    gate = _read(engine, idt.base + vector * 8, 8)
    kind = gate >> 40 & 0x1F
    if kind not in (5, 6, 7, 14, 15) or (software and (gate >> 45 & 3) < cpl):
        raise _WouldFaultError(_GP, entry_error)
    if not gate >> 47 & 1:
        raise _WouldFaultError(_NP, entry_error)
    if kind == 5:
        return  # a task gate: its faults are those of the switch, and it is the engine's to make it
    dpl = _code_segment(engine, gate >> 16 & 0xFFFF, cpl, long=False)
    if dpl < cpl:
        tr = engine.segment("tr")
        wide = tr.flags >> 11 & 1
        offset = 4 + 8 * dpl if wide else 2 + 4 * dpl
        if offset + (7 if wide else 3) > tr.limit:
            raise _WouldFaultError(_TS, tr.selector & 0xFFFC)
        stack = _read(engine, tr.base + offset, 4 if wide else 2)
        base = 0
    else:
        stack, base = engine.regs[4] & 0xFFFFFFFF, engine.segment("ss").base
    _writable(engine, base + stack - 40 & 0xFFFFFFFF, 40)


def _code_segment(engine: Engine, selector: int, cpl: int, long: bool) -> int:
    """The privilege level a gate's code segment runs at."""
    table = engine.segment("ldtr" if selector & 4 else "gdtr")
    if not selector & 0xFFFC:
        raise _WouldFaultError(_GP, 0)
    if (selector | 7) > table.limit:
        raise _WouldFaultError(_GP, selector & 0xFFFC)
    descriptor = _read(engine, table.base + (selector & ~7), 8)
    dpl = descriptor >> 45 & 3
    if descriptor >> 43 & 3 != 3 or dpl > cpl:
        raise _WouldFaultError(_GP, selector & 0xFFFC)
    if not descriptor >> 47 & 1:
        raise _WouldFaultError(_NP, selector & 0xFFFC)
    if long and descriptor >> 53 & 3 != 1:
        raise _WouldFaultError(_GP, selector & 0xFFFC)
    return cpl if descriptor >> 42 & 1 else dpl  # a conforming segment keeps the level


def _read(engine: Engine, linear: int, size: int) -> int:
    value = 0
    for i in range(size):
        value |= engine.uc.mem_read(_walk(engine, linear + i, write=False), 1)[0] << 8 * i
    return value


def _writable(engine: Engine, linear: int, size: int) -> None:
    _walk(engine, linear + size - 1, write=True)  # pushes go down: the top faults first
    _walk(engine, linear, write=True)


def _walk(engine: Engine, linear: int, write: bool) -> int:
    """Guest-physical address of a supervisor access (SDM vol. 3, 4.3 to 4.5), or the page fault it would raise."""
    cr0, cr3, cr4 = engine.cr[0], engine.cr[3], engine.cr[4]
    if not cr0 >> 31 & 1:
        return linear & 0xFFFFFFFF
    if engine.u64("efer").value & 0x400:
        linear &= _MASK64
        if linear >> 47 not in (0, 0x1FFFF):
            raise _WouldFaultError(_GP, 0)
        shifts: tuple[int, ...] = (39, 30, 21, 12)
        width, table = 8, cr3 & 0xFFFFFFFFFF000
    elif cr4 & 0x20:
        linear &= 0xFFFFFFFF
        shifts, width, table = (30, 21, 12), 8, cr3 & 0xFFFFFFE0
    else:
        linear &= 0xFFFFFFFF
        shifts, width, table = (22, 12), 4, cr3 & 0xFFFFF000
    writable = True
    for shift in shifts:
        index = linear >> shift & (3 if shift == 30 and len(shifts) == 3 else 0x1FF if width == 8 else 0x3FF)
        entry = int.from_bytes(engine.uc.mem_read(table + index * width, width), "little")
        if not entry & 1:
            _page_fault(engine, linear, write, present=False)
        writable = writable and bool(entry & 2 or (shift == 30 and len(shifts) == 3))
        large = shift in (30, 21) if width == 8 else shift == 22 and bool(cr4 & 0x10)
        if shift == 12 or (large and entry & 0x80 and len(shifts) != 3) or (entry & 0x80 and shift == 21):
            if write and not writable and cr0 >> 16 & 1:
                _page_fault(engine, linear, write, present=True)
            return (entry & 0xFFFFFFFFFF000 & ~((1 << shift) - 1)) | (linear & (1 << shift) - 1)
        table = entry & 0xFFFFFFFFFF000
    raise AssertionError("a page walk ends at its last level")


def _page_fault(engine: Engine, linear: int, write: bool, present: bool) -> None:
    engine.cr[2] = linear
    raise _WouldFaultError(_PAGE_FAULT, present | write << 1)
