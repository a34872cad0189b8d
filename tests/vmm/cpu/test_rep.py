"""Which of an instruction's bytes say that it is repeated, and by how many bits of RCX: capstone knows it, too."""

from __future__ import annotations

import capstone
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.cpu.program import Program
from vmm.cpu.protocol import CpuState
from vmm.cpu.rep import count_bits, is_done

CODE = {
    64: CpuState(efer=0x500),
    32: CpuState(efer=0),
    16: CpuState(efer=0),
}
CODE[64].cs.long, CODE[64].cs.db = True, False
CODE[32].cs.long, CODE[32].cs.db = False, True
CODE[16].cs.long, CODE[16].cs.db = False, False
MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
STRING = ("movs", "cmps", "stos", "lods", "scas", "ins", "outs")


@pytest.mark.parametrize("bits", MODES)
@given(
    prefixes=st.lists(st.sampled_from([0xF2, 0xF3, 0x66, 0x67, 0x2E, 0x64]), max_size=3),
    rex=st.integers(0x40, 0x4F) | st.none(),
    opcode=st.integers(0, 0xFF),
)
def test_what_is_repeated(bits, prefixes, rex, opcode):
    code = bytes([*prefixes, *([rex] if rex is not None and bits == 64 else []), opcode, *bytes(8)])
    found = next(capstone.Cs(capstone.CS_ARCH_X86, MODES[bits]).disasm(code, 0), None)
    if found is None:
        return
    words = found.mnemonic.split()
    repeated = (
        len(words) > 1 and words[0].startswith("rep") and words[1].startswith(STRING) and "xmm" not in found.op_str
    )
    counts = {64: 32, 32: 16, 16: 32}[bits] if 0x67 in prefixes else bits
    assert count_bits(CODE[bits], code) == ((1 << counts) - 1 if repeated else 0), found


def test_the_emulated_cpu_takes_a_step_to_find_rcx_zero():
    """Which is not one of the instruction's: a lockstep with a processor passes over it."""
    program = Program("mov $2, %ecx\nmov $0x200000, %edi\nat: rep stosb\nnop\njmp done")
    seen = []
    with program.machine as machine:
        while machine.cpu.registers()[16] != program.labels["at"]:
            machine.run(position=machine.position + 1)
        while machine.cpu.registers()[16] == program.labels["at"]:
            seen.append((machine.cpu.registers()[1], is_done(machine.cpu, machine.ram.read, program.labels["at"])))
            machine.run(position=machine.position + 1)
    assert seen == [(2, False), (1, False), (0, True)]
