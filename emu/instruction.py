"""The instruction that the engine has come to: what it does not say of it, read from memory."""

from __future__ import annotations

import capstone
from capstone import x86

from emu.engine import Engine
from emu.linear import MASK64, UD, FaultError, physical, read
from vmm.cpu import validity
from vmm.cpu.paging import PAGE

_LONGEST = 15
_WITHOUT_MODRM = frozenset((0x06, 0x30, 0x32))  # CLTS, WRMSR, RDMSR
_GENERAL = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_REX = frozenset(range(0x40, 0x50))
_INT3, _INT, _INTO = 0xCC, 0xCD, 0xCE
_NOP, _PAUSE = 0x90, 0x90F3  # PAUSE is a NOP with a prefix


class Instruction:
    """The instruction at RIP, PAUSE or one of 0F: its opcode behind that, ModRM, length, and operand."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.code64 = _code64(engine)
        self._code = code = _fetch(engine)
        at = 0
        while code[at] in _PREFIXES:
            at += 1
        self.rex = code[at] if self.code64 and code[at] >> 4 == 4 else 0
        at += bool(self.rex)
        self.opcode, self.modrm = code[at + 1], code[at + 2]
        self.rm = self.modrm & 7 | (self.rex & 1) << 3
        self.size_prefix = 0x66 in code[:at]
        self.length = at + (1 if code[at] == _NOP else 2 if self.opcode in _WITHOUT_MODRM else 3)

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
        decoder = _decoder(engine)
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

    @property
    def short_operand(self) -> bool:
        """Of 16 bits, outside 64-bit mode."""
        return self.size_prefix == code32(self._engine)


def retire_pause(engine: Engine) -> None:
    """Move RIP behind the PAUSE it is at, in haste where it has no more prefixes than it needs."""
    rip = engine.eip.value
    if engine.two_bytes(_linear(engine, rip)) == _PAUSE and rip + 2 & 0xFFFF_FFFF > 1:
        engine.eip.value = rip + 2
    else:
        Instruction(engine).retire()


def length_behind(engine: Engine, block: int) -> int:
    """The length of the INT n, INT3 or INTO that RIP is behind. It ended a block of so many bytes; 0 where that is not
    known, and then prefixes, which mean nothing to it, are left out."""
    end = engine.eip.value
    try:
        if block:
            code = read(engine, _linear(engine, end - block), block).to_bytes(block, "little")
            sizes = [found.size for found in _decoder(engine).disasm(code, 0)]
            last = int(block - sum(sizes) or sizes[-1])  # what is left is of a LOCK INT n, which the engine takes
            prefixes = _PREFIXES | _REX if _code64(engine) else _PREFIXES
            bare = code[-last:].lstrip(bytes(prefixes))
            if bare in (b"\xcc", b"\xce") or (len(bare) == 2 and bare[0] == _INT):
                return last  # else something before it is longer to the decoder than to the engine
        # A block of one byte is one of these, whatever a push of its own delivery wrote over it.
        return 1 if block == 1 or read(engine, _linear(engine, end - 1), 1) in (_INT3, _INTO) else 2
    except FaultError:  # it ran a moment ago; now nothing may be mapped there
        return 2


def _decoder(engine: Engine) -> capstone.Cs:
    mode = capstone.CS_MODE_64 if _code64(engine) else capstone.CS_MODE_32 if code32(engine) else capstone.CS_MODE_16
    return capstone.Cs(capstone.CS_ARCH_X86, mode)


def _code64(engine: Engine) -> bool:
    return bool(engine.segment("cs").flags >> 21 & 1 and engine.u64("efer").value & validity.LMA)


def _linear(engine: Engine, rip: int) -> int:
    return rip & MASK64 if _code64(engine) else rip + engine.segment("cs").base & 0xFFFFFFFF


def code32(engine: Engine) -> bool:
    return bool(engine.segment("cs").flags >> 22 & 1)


def _fetch(engine: Engine) -> bytes:
    """Up to 15 bytes at RIP, zeros where nothing is mapped: it was fetched a moment ago."""
    start = _linear(engine, engine.eip.value)
    code = b""
    try:
        while len(code) < _LONGEST:
            at = start + len(code)
            code += engine.read_physical(physical(engine, at), min(_LONGEST - len(code), PAGE - at % PAGE))
    except FaultError:
        pass
    return code.ljust(_LONGEST, b"\0")
