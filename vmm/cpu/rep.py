"""String instructions that are repeated (SDM vol. 2, REP/REPE/REPNE), as far as single-stepping has to know of them."""

from __future__ import annotations

from vmm.cpu.paging import code_bits
from vmm.cpu.protocol import CpuState

_PREFIXES = bytes((0xF0, 0xF2, 0xF3, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67))
_STRING = {*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)}  # INS to OUTSD, MOVS and CMPS, STOS to SCAS


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
