"""Instructions as text."""

from __future__ import annotations

from collections.abc import Iterator

import capstone

from vmm.cpu.paging import ReadPhysical, code_bits, read_virtual
from vmm.cpu.protocol import CpuState

LONGEST = 15  # bytes of an instruction
_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}


def decode(state: CpuState, code: bytes, count: int) -> Iterator[tuple[int, str]]:
    """(RIP, text) of up to `count` instructions of `code`, which lies where the CPU is."""
    engine = capstone.Cs(capstone.CS_ARCH_X86, _MODES[code_bits(state)])
    for instruction in engine.disasm(code, state.rip, count):
        yield instruction.address, f"{instruction.mnemonic} {instruction.op_str}".rstrip()


def ahead(state: CpuState, read: ReadPhysical, count: int) -> list[str]:
    """The next instructions: fewer where the code is not in RAM, or none."""
    start = state.rip if code_bits(state) == 64 else state.cs.base + state.rip
    code = read_virtual(state, read, start, LONGEST * count)
    return [f"{address:#x}: {text}" for address, text in decode(state, code, count)]
