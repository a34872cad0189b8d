"""System instructions, done in the engine's place: MOV to control registers, MOV to and from debug registers, CLTS,
LMSW, LGDT, LIDT, LLDT, LTR (SDM vol. 2; vol. 3, 2.5 and 17.2).

The engine takes any value; here what no CPU can be made to hold is #GP, as on hardware. The rules are those of
vmm.cpu.validity, so that whatever this CPU comes to can be saved and loaded anywhere. The engine has checked the
privilege level, and RIP is at the instruction.
"""

from __future__ import annotations

import capstone
from capstone import x86

from emu.descriptors import base_of, limit_of
from emu.engine import (
    EXIT_GDTR,
    EXIT_IDTR,
    EXIT_LDTR,
    EXIT_READ_DR,
    EXIT_TR,
    EXIT_WRITE_CR,
    EXIT_WRITE_DR,
    Engine,
)
from emu.linear import DB, GP, MASK64, NP, UD, FaultError, physical, read, write
from vmm.cpu import validity
from vmm.cpu.paging import PAGE

_TS, _DE = 1 << 3, 1 << 3  # of CR0, of CR4
_GD, _BD = 1 << 13, 1 << 13  # of DR7, of DR6
_LONGEST = 15
_WITHOUT_MODRM = frozenset((0x06, 0x30, 0x32))  # CLTS, WRMSR, RDMSR
_GENERAL = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_PRESENT = 1 << 47  # of a descriptor
_BUSY = 1 << 41
_DIRECTORY_RESERVED = 0xFFFF_FF00_0000_01E6  # of a PDPTE that PAE loads, beside the physical address


class Instruction:
    """The instruction at RIP: its opcode behind 0F, ModRM, length, and operand."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.code64 = bool(engine.segment("cs").flags >> 21 & 1 and engine.u64("efer").value & validity.LMA)
        self._code = code = _fetch(engine)
        at = 0
        while code[at] in _PREFIXES:
            at += 1
        self.rex = code[at] if self.code64 and code[at] >> 4 == 4 else 0
        at += bool(self.rex)
        self.opcode, self.modrm = code[at + 1], code[at + 2]
        self.rm = self.modrm & 7 | (self.rex & 1) << 3
        self.size_prefix = 0x66 in code[:at]
        self.length = at + (2 if self.opcode in _WITHOUT_MODRM else 3)

    def retire(self) -> None:
        """Move RIP behind it."""
        rip = self._engine.eip
        rip.value = rip.value + self.length & (MASK64 if self.code64 else 0xFFFFFFFF)

    def register(self) -> int:
        """The general register of ModRM's r/m: all of it in 64-bit mode, else 32 bits."""
        value = self._engine.regs[self.rm]
        return value if self.code64 else value & 0xFFFFFFFF

    def set_register(self, value: int) -> None:
        self._engine.regs[self.rm] = value

    def word(self) -> int:
        """An operand of 16 bits. Raises FaultError."""
        if self.modrm >> 6 == 3:
            return self._engine.regs[self.rm] & 0xFFFF
        return read(self._engine, self.address(), 2)

    def address(self) -> int:
        """The linear address of the operand in memory."""
        engine = self._engine
        mode = capstone.CS_MODE_64 if self.code64 else capstone.CS_MODE_32 if _code32(engine) else capstone.CS_MODE_16
        decoder = capstone.Cs(capstone.CS_ARCH_X86, mode)
        decoder.detail = True
        found = next(decoder.disasm(bytes(self._code), 0, 1), None)
        if found is None or not any(operand.type == x86.X86_OP_MEM for operand in found.operands):
            raise FaultError(UD)
        self.length = found.size
        memory = next(operand.mem for operand in found.operands if operand.type == x86.X86_OP_MEM)
        base, index = (self._part(found, register) for register in (memory.base, memory.index))
        offset = base + index * memory.scale + memory.disp & (1 << 8 * found.addr_size) - 1
        segment = found.reg_name(memory.segment) if memory.segment else None
        if segment is None:
            segment = "ss" if found.reg_name(memory.base) in ("rsp", "esp", "sp", "rbp", "ebp", "bp") else "ds"
        if self.code64 and segment not in ("fs", "gs"):
            return int(offset & MASK64)
        return int(engine.segment(segment).base + offset & (MASK64 if self.code64 else 0xFFFFFFFF))

    def _part(self, found: capstone.CsInsn, register: int) -> int:
        if not register:
            return 0
        name = found.reg_name(register)
        if name in ("rip", "eip"):
            return int(self._engine.eip.value + found.size)
        if name in ("eiz", "riz"):
            return 0
        short = name.lstrip("re")
        number = _GENERAL.index(short) if short in _GENERAL else int(name[1:].rstrip("dwb"))
        return int(self._engine.regs[number])


def perform(engine: Engine, number: int) -> None:
    """Do what HOOK_INTR reports as `number`; RIP is then behind it. Raises FaultError, having changed nothing."""
    instruction = Instruction(engine)
    if EXIT_WRITE_CR <= number < EXIT_READ_DR:
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
    if not instruction.code64 and instruction.size_prefix == _code32(engine):
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


def _code32(engine: Engine) -> bool:
    return bool(engine.segment("cs").flags >> 22 & 1)


def _fetch(engine: Engine) -> bytes:
    """Up to 15 bytes at RIP, zeros where nothing is mapped: it was fetched a moment ago."""
    start = engine.eip.value
    if not (engine.segment("cs").flags >> 21 & 1 and engine.u64("efer").value & validity.LMA):
        start = start + engine.segment("cs").base & 0xFFFFFFFF
    code = b""
    try:
        while len(code) < _LONGEST:
            at = start + len(code)
            code += engine.read_physical(physical(engine, at), min(_LONGEST - len(code), PAGE - at % PAGE))
    except FaultError:
        pass
    return code.ljust(_LONGEST, b"\0")
