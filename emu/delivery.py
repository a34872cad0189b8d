"""Delivery of interrupts and exceptions through the guest's tables (SDM vol. 3, 6.10 to 6.15), in Python.

The engine has its own, and machine code calls it (emu.native). From Python that would leave by longjmp when it faults,
across Python's frames. So this one does the same, access by access, where Python delivers: on hosts without machine
code, for a breakpoint that was met, and for the event of a CPU that was woken.
"""

from __future__ import annotations

from typing import Any

from emu import tasks
from emu.descriptors import base_of, descriptor_of, limit_of
from emu.engine import CONTRIBUTORY, HF2_NMI, MOST_DELIVERIES, NT, RF, TF, Engine
from emu.instruction import length_behind
from emu.linear import GP, MASK64, NP, PAGE_FAULT, TS, FaultError, read, read_pieces, write
from vmm.clock import Word
from vmm.cpu.validity import IF, LMA, VM, WITH_ERROR_CODE

_TIME = Word.TIME.value
_EXCEPTIONS, _DELIVERED_AT, _DELIVERIES = Word.EXCEPTIONS.value, Word.DELIVERED_AT.value, Word.DELIVERIES.value
_NMI, _DOUBLE_FAULT = 2, 8
_TASK_GATE, _GATES_32, _GATES_64 = 5, (6, 7, 14, 15), (14, 15)
_VM86_SAVED = ("gs", "fs", "ds", "es")
_AC = 1 << 18


class Delivery:
    """Into one engine; `words` are the clock's, where deliveries are counted."""

    def __init__(self, engine: Engine, words: Any) -> None:
        self._engine, self._words = engine, words

    def exception(self, vector: int, error_code: int = 0) -> bool:
        """Deliver an exception, and what a fault in that leads to (table 6-5). False: to shutdown, a triple fault."""
        return self._deliver(vector, error_code, "exception")

    def software(self, vector: int, block: int = 0) -> bool:
        """The same for INT n, INT3 and INTO. RIP is behind the instruction, which ended a block of so many bytes."""
        rip = self._engine.eip
        behind = rip.value
        rip.value = behind - length_behind(self._engine, block) & MASK64  # where a fault of the delivery is
        return self._deliver(vector, 0, "software", behind)

    def hardware(self, vector: int) -> bool:
        """The same for an interrupt that was acknowledged, or an NMI."""
        if vector == _NMI:
            self._engine.hflags2.value |= HF2_NMI
        return self._deliver(vector, 0, "hardware")

    def _deliver(self, vector: int, error_code: int, source: str, behind: int | None = None) -> bool:
        engine = self._engine
        first = vector if source == "exception" else None
        while True:
            if source == "exception" and vector != 1:
                engine.eflags.value |= RF  # a fault's pushed RFLAGS have it, a trap's do not (17.3.1.1)
            if not self._counted():
                break
            try:
                _enter(engine, vector, error_code, source, engine.eip.value if behind is None else behind)
                break
            except FaultError as fault:
                vector, error_code = fault.vector, fault.error_code
            if first == _DOUBLE_FAULT:
                return False
            if (first == PAGE_FAULT or first in CONTRIBUTORY) and (
                vector in CONTRIBUTORY or first == vector == PAGE_FAULT
            ):
                vector, error_code = _DOUBLE_FAULT, 0
            first, source, behind = vector, "exception", None
        engine.settle_exception()
        return True

    def _counted(self) -> bool:
        """False where deliveries come to nothing for ever: a handler that cannot be fetched, which raises another."""
        words = self._words
        if words[_DELIVERED_AT] != words[_TIME]:
            words[_DELIVERED_AT], words[_DELIVERIES] = words[_TIME], 0
        words[_EXCEPTIONS] += 1
        words[_DELIVERIES] += 1
        if words[_DELIVERIES] > MOST_DELIVERIES:
            self._engine.uc.emu_stop()
            return False
        return True


def _enter(engine: Engine, vector: int, error_code: int, source: str, rip: int) -> None:
    """`rip` is where the guest is to go on. Raises FaultError; what was written until then stays written."""
    pushed = [error_code] if source == "exception" and vector in WITH_ERROR_CODE else []
    if not engine.cr[0] & 1:
        _enter_real(engine, vector, rip)
    elif engine.u64("efer").value & LMA:
        _enter_64(engine, vector, [rip, *pushed], source == "software")
    else:
        _enter_32(engine, vector, [rip, *pushed], source == "software")


def _enter_real(engine: Engine, vector: int, rip: int) -> None:
    idt, code, stack = engine.segment("idtr"), engine.segment("cs"), engine.segment("ss")
    if vector * 4 + 3 > idt.limit:
        raise FaultError(GP, vector * 8 + 2)
    target = read_pieces(engine, idt.base + vector * 4, 4, 2)
    words = [engine.rflags() & 0xFFFF, code.selector & 0xFFFF, rip & 0xFFFF]
    _set_rsp(engine, _push(engine, stack.base, engine.regs[4], 0xFFFF, 2, words), 0xFFFF)
    engine.eip.value = target & 0xFFFF
    code.selector, code.base = target >> 16, target >> 16 << 4
    engine.eflags.value &= ~(IF | TF | _AC | RF)


def _gate(engine: Engine, vector: int, size: int, types: tuple[int, ...], software: bool) -> int:
    """A gate of the IDT."""
    idt, error = engine.segment("idtr"), vector * 8 + 2
    if vector * size + size - 1 > idt.limit:
        raise FaultError(GP, error)
    gate = read_pieces(engine, idt.base + vector * size, min(size, 12))  # the last is reserved, and not read
    kind = gate >> 40 & 0x1F
    if kind not in types:
        raise FaultError(GP, error)
    if software and kind != _TASK_GATE and (gate >> 45 & 3) < engine.cpl:
        raise FaultError(GP, error)
    if not gate >> 47 & 1:
        raise FaultError(NP, error)
    return gate


def _enter_64(engine: Engine, vector: int, pushed: list[int], software: bool) -> None:
    gate = _gate(engine, vector, 16, _GATES_64, software)
    selector, ist = gate >> 16 & 0xFFFF, gate >> 32 & 7
    descriptor, level = _code_segment(engine, selector, long=True)
    inner = level < engine.cpl or ist > 0
    stack = _inner_rsp(engine, ist + 3 if ist else level) if inner else engine.regs[4]
    words = [engine.segment("ss").selector, engine.regs[4], engine.rflags(), engine.segment("cs").selector,
             *pushed]  # fmt: skip
    engine.regs[4] = _push(engine, 0, stack & ~15, MASK64, 8, words)
    if inner:
        engine.set_segment("ss", level, 0, 0, level << 13)
    _begin(engine, gate, selector & ~3 | level, descriptor)
    engine.eip.value = gate >> 32 & 0xFFFFFFFF00000000 | gate >> 32 & 0xFFFF0000 | gate & 0xFFFF


def _enter_32(engine: Engine, vector: int, pushed: list[int], software: bool) -> None:
    gate = _gate(engine, vector, 8, (_TASK_GATE, *_GATES_32), software)
    selector = gate >> 16 & 0xFFFF
    if gate >> 40 & 0x1F == _TASK_GATE:
        tasks.switch(engine, selector, pushed[0])
        if pushed[1:]:
            stack, width = engine.segment("ss"), tasks.width(engine.segment("tr").flags)
            mask = 0xFFFFFFFF if stack.flags >> 22 & 1 else 0xFFFF
            _set_rsp(engine, _push(engine, stack.base, engine.regs[4], mask, width, pushed[1:]), mask)
        return
    descriptor, level = _code_segment(engine, selector, long=False)
    virtual = bool(engine.eflags.value & VM)
    words = [engine.rflags(), engine.segment("cs").selector, *pushed]
    width = 4 if gate >> 43 & 1 else 2
    if level < engine.cpl:
        inner, pointer, outer = _inner_stack(engine, level)
        mask, base = _stack_mask(inner >> 32), base_of(inner)
        words = [engine.segment("ss").selector, engine.regs[4], *words]
        if virtual:
            words = [*(engine.segment(name).selector for name in _VM86_SAVED), *words]
        pointer = _push(engine, base, pointer, mask, width, words)
        if virtual:
            for name in _VM86_SAVED:
                engine.set_segment(name, 0, 0, 0, 0)
        engine.set_segment("ss", outer & ~3 | level, base, limit_of(inner), inner >> 32)
    else:
        if virtual:
            raise FaultError(GP, selector & 0xFFFC)
        stack = engine.segment("ss")
        mask = _stack_mask(stack.flags)
        pointer = _push(engine, stack.base, engine.regs[4], mask, width, words)
    _set_rsp(engine, pointer, mask)
    _begin(engine, gate, selector & ~3 | level, descriptor)
    engine.eip.value = gate >> 32 & 0xFFFF0000 | gate & 0xFFFF


def _begin(engine: Engine, gate: int, selector: int, descriptor: int) -> None:
    """The handler's code segment and flags."""
    interrupt_gate = not gate >> 40 & 1
    engine.eflags.value &= ~(TF | VM | RF | NT | (IF if interrupt_gate else 0))
    engine.set_segment("cs", selector, base_of(descriptor), limit_of(descriptor), descriptor >> 32)
    engine.update_hflags()


def _code_segment(engine: Engine, selector: int, long: bool) -> tuple[int, int]:
    """The descriptor of a gate's code segment, and the privilege level it runs at."""
    if not selector & 0xFFFC:
        raise FaultError(GP, 0)
    descriptor = descriptor_of(engine, selector, GP)
    level = descriptor >> 45 & 3
    if descriptor >> 43 & 3 != 3 or level > engine.cpl:
        raise FaultError(GP, selector & 0xFFFC)
    if not descriptor >> 47 & 1:
        raise FaultError(NP, selector & 0xFFFC)
    if long and descriptor >> 53 & 3 != 1:
        raise FaultError(GP, selector & 0xFFFC)
    return descriptor, engine.cpl if descriptor >> 42 & 1 else level  # a conforming segment keeps the level


def _inner_rsp(engine: Engine, index: int) -> int:
    """A stack pointer of the 64-bit TSS: 0 to 2 for the levels, 4 to 10 for the IST."""
    tr, offset = engine.segment("tr"), 4 + 8 * index
    if offset + 7 > tr.limit:
        raise FaultError(TS, tr.selector & 0xFFFC)
    return read(engine, tr.base + offset, 8)


def _inner_stack(engine: Engine, level: int) -> tuple[int, int, int]:
    """Descriptor, pointer and selector of the stack that the TSS has for a level."""
    tr = engine.segment("tr")
    width = tasks.width(tr.flags)
    offset = width * (1 + 2 * level)
    if offset + 2 * width - 1 > tr.limit:
        raise FaultError(TS, tr.selector & 0xFFFC)
    pointer = read(engine, tr.base + offset, width)
    selector = read(engine, tr.base + offset + width, 2)
    wrong = FaultError(TS, selector & 0xFFFC)
    if not selector & 0xFFFC or selector & 3 != level:
        raise wrong
    descriptor = descriptor_of(engine, selector, TS)
    writable = descriptor >> 44 & 1 and not descriptor >> 43 & 1 and descriptor >> 41 & 1
    if descriptor >> 45 & 3 != level or not writable or not descriptor >> 47 & 1:
        raise wrong
    return descriptor, pointer, selector


def _stack_mask(flags: int) -> int:
    if flags >> 21 & 1:
        return 0  # the engine's own: a bit that means nothing in a stack's descriptor
    return 0xFFFFFFFF if flags >> 22 & 1 else 0xFFFF


def _push(engine: Engine, base: int, pointer: int, mask: int, width: int, words: list[int]) -> int:
    """Push the words, the first one highest; the stack pointer after that."""
    for word in words:
        pointer = pointer - width & MASK64
        linear = base + (pointer & mask) & (MASK64 if width == 8 else 0xFFFFFFFF)
        write(engine, linear, (word & (1 << 8 * width) - 1).to_bytes(width, "little"))
    return pointer


def _set_rsp(engine: Engine, pointer: int, mask: int) -> None:
    kept = engine.regs[4] & ~0xFFFF if mask == 0xFFFF else 0
    engine.regs[4] = kept | pointer & (mask or 0xFFFFFFFF)
