"""System instructions, done in the engine's place: MOV to control registers and from CR8, MOV to and from debug
registers, CLTS, LMSW, LGDT, LIDT, LLDT, LTR (SDM vol. 2; vol. 3, 2.5 and 17.2).

The engine takes any value; here what no CPU can be made to hold is #GP, as on hardware. The rules are those of
vmm.cpu.validity, so that whatever this CPU comes to can be saved and loaded anywhere. The engine has checked the
privilege level, and RIP is at the instruction.
"""

from __future__ import annotations

from emu.descriptors import base_of, limit_of
from emu.engine import (
    EXIT_GDTR,
    EXIT_IDTR,
    EXIT_LDTR,
    EXIT_READ_CR,
    EXIT_READ_DR,
    EXIT_TR,
    EXIT_WRITE_CR,
    EXIT_WRITE_DR,
    Engine,
)
from emu.instruction import Instruction
from emu.linear import DB, GP, NP, UD, FaultError, read, write
from vmm.cpu import validity
from vmm.cpu.protocol import Apic

_TS, _DE = 1 << 3, 1 << 3  # of CR0, of CR4
_GD, _BD = 1 << 13, 1 << 13  # of DR7, of DR6
_PRESENT = 1 << 47  # of a descriptor
_BUSY = 1 << 41
_DIRECTORY_RESERVED = 0xFFFF_FF00_0000_01E6  # of a PDPTE that PAE loads, beside the physical address


def perform(engine: Engine, number: int, apic: Apic | None) -> None:
    """Do what HOOK_INTR reports as `number`; RIP is then behind it. Raises FaultError, having changed nothing."""
    instruction = Instruction(engine)
    if number == EXIT_READ_CR + 8:
        instruction.set_register(engine.cr8() if apic is None else apic.task_priority())
    elif apic is not None and number == EXIT_WRITE_CR + 8:
        if (priority := instruction.register()) > 15:
            raise FaultError(GP)
        apic.set_task_priority(priority)
    elif EXIT_WRITE_CR <= number < EXIT_READ_DR:
        _write_control(engine, instruction, number - EXIT_WRITE_CR)
    elif EXIT_READ_DR <= number < EXIT_WRITE_DR:
        instruction.set_register(engine.dr[_debug_register(engine, number - EXIT_READ_DR)])
    elif EXIT_WRITE_DR <= number < EXIT_WRITE_DR + 8:
        _write_debug(engine, _debug_register(engine, number - EXIT_WRITE_DR), instruction.register())
    elif number in (EXIT_GDTR, EXIT_IDTR):
        _load_table(engine, instruction, "gdtr" if number == EXIT_GDTR else "idtr")
    elif number == EXIT_LDTR:
        _load_ldtr(engine, instruction.word())
    elif number == EXIT_TR:
        _load_tr(engine, instruction.word())
    else:
        raise AssertionError(f"the engine reports an intercept {number:#x} nobody asked for")
    instruction.retire()


def _write_control(engine: Engine, instruction: Instruction, number: int) -> None:
    if number == 0 and instruction.opcode != 0x22:
        if instruction.opcode == 0x06:
            engine.set_cr0(engine.cr[0] & ~_TS)
        else:  # LMSW: PE, MP, EM and TS, and PE is not cleared
            word = instruction.word() & 15
            _write_cr0(engine, engine.cr[0] & ~0xE | word)
        return
    value = instruction.register()
    match number:
        case 0:
            _write_cr0(engine, value)
        case 3:
            _demand(engine, engine.cr[0], value, engine.cr[4])
            engine.set_cr3(value)
        case 4:
            _demand(engine, engine.cr[0], engine.cr[3], value)
            engine.set_cr4(value)
        case 8:
            if value > 15:
                raise FaultError(GP)
            engine.set_cr8(value)


def _write_cr0(engine: Engine, value: int) -> None:
    if value >> 32:
        raise FaultError(GP)
    value = value & validity.CR0_BITS | validity.ET  # what is reserved in the low half is ignored
    switched = (value ^ engine.cr[0]) & validity.PG
    long = engine.segment("cs").flags >> 21 & 1
    if switched and long and engine.u64("efer").value & validity.LME:
        raise FaultError(GP)  # to or from long mode in a 64-bit code segment
    _demand(engine, value, engine.cr[3], engine.cr[4])
    engine.set_cr0(value)


def _demand(engine: Engine, cr0: int, cr3: int, cr4: int) -> None:
    """Raises FaultError for control registers that cannot be together."""
    efer = engine.u64("efer").value & ~validity.LMA
    if efer & validity.LME and cr0 & validity.PG:
        efer |= validity.LMA
    if validity.control_refusal(cr0, cr3, cr4, efer) is not None:
        raise FaultError(GP)
    if cr0 & validity.PG and cr4 & validity.PAE and not efer & validity.LMA:
        table = engine.read_physical(cr3 & 0xFFFFFFE0, 32)
        for at in range(0, 32, 8):
            entry = int.from_bytes(table[at : at + 8], "little")
            if entry & 1 and entry & _DIRECTORY_RESERVED:
                raise FaultError(GP)


def _debug_register(engine: Engine, number: int) -> int:
    """Which it is: DR4 and DR5 are others' names, or none. Raises FaultError, also where access is watched (GD)."""
    if number in (4, 5):
        if engine.cr[4] & _DE:
            raise FaultError(UD)
        number += 2
    if engine.dr[7] & _GD:
        engine.dr[6] |= _BD
        engine.set_debug_registers((engine.dr[0], engine.dr[1], engine.dr[2], engine.dr[3]), engine.dr[7] & ~_GD)
        raise FaultError(DB)
    return number


def _write_debug(engine: Engine, number: int, value: int) -> None:
    if number >= 6 and value >> 32:
        raise FaultError(GP)
    if number == 6:
        engine.dr[6] = value & validity.DR6_BITS | validity.DR6_ONES
        return
    dr7 = value & validity.DR7_BITS | validity.DR7_ONES if number == 7 else engine.dr[7]
    addresses = [value if i == number else engine.dr[i] for i in range(4)]
    engine.set_debug_registers((addresses[0], addresses[1], addresses[2], addresses[3]), dr7)


def _load_table(engine: Engine, instruction: Instruction, name: str) -> None:
    address = instruction.address()
    limit = read(engine, address, 2)
    base = read(engine, address + 2, 8 if instruction.code64 else 4)
    if instruction.code64 and not validity.canonical(base):
        raise FaultError(GP)
    if not instruction.code64 and instruction.short_operand:
        base &= 0xFFFFFF  # a 16-bit operand
    segment = engine.segment(name)
    segment.base, segment.limit = base, limit


def _load_ldtr(engine: Engine, selector: int) -> None:
    if not selector & 0xFFFC:
        engine.set_segment("ldtr", selector, 0, 0, 0)
        return
    descriptor, base = _system_descriptor(engine, selector, (2,))
    engine.set_segment("ldtr", selector, base, limit_of(descriptor), descriptor >> 32)


def _load_tr(engine: Engine, selector: int) -> None:
    if not selector & 0xFFFC:
        raise FaultError(GP)
    long = bool(engine.u64("efer").value & validity.LMA)
    descriptor, base = _system_descriptor(engine, selector, (9,) if long else (1, 9))
    write(engine, engine.segment("gdtr").base + (selector & ~7) + 5, bytes([(descriptor | _BUSY) >> 40 & 0xFF]))
    # In the engine's hidden part the task is never busy.
    engine.set_segment("tr", selector, base, limit_of(descriptor), descriptor >> 32)


def _system_descriptor(engine: Engine, selector: int, types: tuple[int, ...]) -> tuple[int, int]:
    """A descriptor of the GDT, and the base in it."""
    table = engine.segment("gdtr")
    long = bool(engine.u64("efer").value & validity.LMA)
    if selector & 4 or (selector & ~7) + (15 if long else 7) > table.limit:
        raise FaultError(GP, selector & 0xFFFC)
    at = table.base + (selector & ~7)
    descriptor = read(engine, at, 8)
    if descriptor >> 44 & 1 or descriptor >> 40 & 15 not in types:
        raise FaultError(GP, selector & 0xFFFC)
    if not descriptor & _PRESENT:
        raise FaultError(NP, selector & 0xFFFC)
    base = base_of(descriptor)
    if long:
        high = read(engine, at + 8, 8)
        base |= (high & 0xFFFFFFFF) << 32
        if high >> 40 & 0x1F or not validity.canonical(base):
            raise FaultError(GP, selector & 0xFFFC)
    return descriptor, base
