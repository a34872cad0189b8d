"""String instructions that are repeated (SDM vol. 2, REP/REPE/REPNE), as far as single-stepping has to know of them."""

from __future__ import annotations

from vmm.cpu.paging import ReadPhysical, code_bits, read_virtual
from vmm.cpu.protocol import REGISTERS, Cpu, CpuState

_PREFIXES = bytes((0xF0, 0xF2, 0xF3, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67))
_STRING = {*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)}  # INS to OUTSD, MOVS and CMPS, STOS to SCAS
_RIP, _RCX = REGISTERS.index("rip"), REGISTERS.index("rcx")


def is_done(cpu: Cpu, read: ReadPhysical, start: int) -> bool:
    """Whether a CPU stands at `start`, at a repeated instruction that has done all its passes: some engines and hosts
    take a step to find RCX zero, which no processor does."""
    registers = cpu.registers()
    if registers[_RIP] != start:
        return False
    state = cpu.save()
    mask = count_bits(state, read_virtual(state, read, state.cs.base + start & (1 << 64) - 1, 15))
    return mask != 0 and not registers[_RCX] & mask


def count_bits(state: CpuState, code: bytes) -> int:
    """A mask: the bits of RCX that count the passes of the instruction `code` begins with; 0 where it has no passes."""
    rest = code.lstrip(_PREFIXES)
    prefixes = code[: len(code) - len(rest)]
    bits = code_bits(state)
    if bits == 64 and rest[:1] and 0x40 <= rest[0] <= 0x4F:  # REX
        rest = rest[1:]
    if not rest or rest[0] not in _STRING or not {0xF2, 0xF3} & set(prefixes):
        return 0
    if 0x67 in prefixes:
        bits = 16 if bits == 32 else 32
    return (1 << bits) - 1
