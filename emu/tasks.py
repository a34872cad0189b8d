"""The task switch of a task gate (SDM vol. 3, 7.3), as the engine makes it.

In two things that is not as hardware does: the form of the old task's state is taken from the new one's TSS, and the
selectors of a 16-bit TSS are taken to be four bytes apart.
"""

from __future__ import annotations

from emu.descriptors import base_of, descriptor_of, limit_of
from emu.engine import NT, RF, TF, Engine
from emu.linear import GP, NP, TS, FaultError, read, write
from vmm.cpu.validity import IF, PG, VM

_STATUS = 0xCD5  # RFLAGS: OF DF SF ZF AF PF CF
_IOPL, _AC, _ID = 3 << 12, 1 << 18, 1 << 21
_LOADED = _STATUS | TF | IF | _IOPL | NT | RF | VM | _AC | _ID
_TASK_SWITCHED = 1 << 3  # CR0
_LOCAL = 0x55  # DR7: breakpoints of this task alone
_BUSY = 1 << 9  # of the descriptor's high half
_VM86 = 0xF300  # flags of a segment: present, of level 3, data, written to and accessed
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_LOAD_ORDER = ("cs", "ss", "es", "ds", "fs", "gs")
_READABLE, _CODE, _CONFORMING = 1 << 9, 1 << 11, 3 << 10
_LDT = 2


def width(flags: int) -> int:
    """Of a TSS's registers, in bytes, by the flags of its descriptor."""
    return 4 if flags >> 11 & 1 else 2


def switch(engine: Engine, selector: int, behind: int) -> None:
    """`behind` is where the old task is to go on. Raises FaultError: before the switch in the old task, then in the new
    one."""
    descriptor = _tss(engine, selector)
    new, size = base_of(descriptor), width(descriptor >> 32)
    tr = engine.segment("tr")
    old, old_selector = tr.base, tr.selector
    if size == 4:
        cr3, rip, rflags = (read(engine, new + at, 4) for at in (0x1C, 0x20, 0x24))
        registers = [read(engine, new + 0x28 + 4 * i, 4) for i in range(8)]
        selectors = [read(engine, new + 0x48 + 4 * i, 2) for i in range(6)]
        ldt = read(engine, new + 0x60, 2)
        read(engine, new + 0x64, 4)
    else:
        cr3 = 0
        rip, rflags = (read(engine, new + at, 2) for at in (0x0E, 0x10))
        registers = [read(engine, new + 0x12 + 2 * i, 2) | 0xFFFF0000 for i in range(8)]
        selectors = [*(read(engine, new + 0x22 + 4 * i, 2) for i in range(4)), 0, 0]
        ldt = read(engine, new + 0x2A, 2)
    last = _LAST[width(tr.flags)]
    ends = [(at, read(engine, old + at, 1)) for at in (0, last)]
    for at, byte in ends:  # what cannot be written is found before anything is
        write(engine, old + at, bytes([byte]))
    _keep(engine, old, size, behind)
    write(engine, new, old_selector.to_bytes(2, "little"))
    entry = engine.segment("gdtr").base + (selector & ~7) + 4
    write(engine, entry, (read(engine, entry, 4) | _BUSY).to_bytes(4, "little"))
    engine.set_segment("tr", selector, new, limit_of(descriptor), descriptor >> 32)  # never busy in the hidden part
    if size == 4 and engine.cr[0] & PG:
        engine.set_cr3(cr3)
    engine.cr[0] |= _TASK_SWITCHED
    mask = _LOADED if size == 4 else _LOADED & 0xFFFF
    rflags |= NT
    engine.set_rflags(engine.rflags() & ~mask | rflags & mask)
    engine.eip.value = rip
    for i, value in enumerate(registers):
        engine.regs[i] = value
    try:
        _load_segments(engine, dict(zip(_SEGMENTS, selectors, strict=True)), ldt, virtual=bool(rflags & VM))
        if rip > engine.segment("cs").limit:
            raise FaultError(GP)
        if engine.dr[7] & _LOCAL:
            dr = engine.dr
            engine.set_debug_registers((dr[0], dr[1], dr[2], dr[3]), dr[7] & ~_LOCAL)
    finally:
        engine.update_hflags()


_LAST = {4: 103, 2: 43}  # offset of a TSS's last byte, by the width of its registers


def _tss(engine: Engine, selector: int) -> int:
    """The descriptor of a task that can be switched to."""
    if selector & 4:
        raise FaultError(TS, selector & 0xFFFC)
    descriptor = descriptor_of(engine, selector, GP)
    if descriptor >> 44 & 1 or descriptor >> 40 & 7 != 1:
        raise FaultError(GP, selector & 0xFFFC)
    if not descriptor >> 47 & 1:
        raise FaultError(NP, selector & 0xFFFC)
    if limit_of(descriptor) < _LAST[width(descriptor >> 32)]:
        raise FaultError(TS, selector & 0xFFFC)
    return descriptor


def _keep(engine: Engine, tss: int, size: int, rip: int) -> None:
    """Write the registers to a TSS."""
    first, selectors, count = (0x20, 0x48, 6) if size == 4 else (0x0E, 0x22, 4)
    values = [rip, engine.rflags(), *engine.regs[:8]]
    for i, value in enumerate(values):
        write(engine, tss + first + size * i, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
    for i, name in enumerate(_SEGMENTS[:count]):
        write(engine, tss + selectors + 4 * i, (engine.segment(name).selector & 0xFFFF).to_bytes(2, "little"))


def _load_segments(engine: Engine, selectors: dict[str, int], ldt: int, virtual: bool) -> None:
    for name, selector in selectors.items():  # their own faults come later, in the new task
        engine.set_segment(name, selector, *((selector << 4, 0xFFFF, _VM86) if virtual else (0, 0, 0)))
    engine.set_segment("ldtr", ldt & ~4, 0, 0, 0)
    if ldt & 4:
        raise FaultError(TS, ldt & 0xFFFC)
    if ldt & 0xFFFC:
        descriptor = descriptor_of(engine, ldt, TS)
        if descriptor >> 40 & 0x1F != _LDT or not descriptor >> 47 & 1:
            raise FaultError(TS, ldt & 0xFFFC)
        engine.set_segment("ldtr", ldt, base_of(descriptor), limit_of(descriptor), descriptor >> 32)
    if not virtual:
        level = selectors["cs"] & 3
        for name in _LOAD_ORDER:
            _load(engine, name, selectors[name], level)


def _load(engine: Engine, name: str, selector: int, level: int) -> None:
    wrong = FaultError(TS, selector & 0xFFFC)
    if not selector & 0xFFFC:
        if name in ("cs", "ss"):
            raise wrong
        return
    descriptor = descriptor_of(engine, selector, TS)
    flags, requested = descriptor >> 32, selector & 3
    dpl = flags >> 13 & 3
    if not flags >> 12 & 1:
        raise wrong
    if name == "cs":
        refused = not flags & _CODE or dpl != requested
    elif name == "ss":
        refused = bool(flags & _CODE or not flags & _READABLE) or dpl != level or dpl != requested  # here: writable
    else:
        refused = bool(flags & _CODE and not flags & _READABLE) or (
            flags & _CONFORMING != _CONFORMING and (dpl < level or dpl < requested)
        )
    if refused:
        raise wrong
    if not flags >> 15 & 1:
        raise FaultError(NP, selector & 0xFFFC)
    engine.set_segment(name, selector, base_of(descriptor), limit_of(descriptor), flags)
