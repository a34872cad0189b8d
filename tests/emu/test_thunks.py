"""The machine code, disassembled: what it does is what its listing says."""

import capstone
import pytest

from emu import thunks

MD = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)


def listing(code: bytes) -> list[str]:
    instructions = list(MD.disasm(code, 0))
    assert sum(i.size for i in instructions) == len(code), "trailing bytes are no instruction"
    return [f"{i.mnemonic} {i.op_str}".strip() for i in instructions]


def test_block_charges_or_refuses():
    assert listing(thunks.block(0x1122334455667788)) == [
        "mov eax, edx",
        "add rax, qword ptr [rcx]",
        "cmp rax, qword ptr [rcx + 8]",
        "ja 0x11",
        "mov qword ptr [rcx], rax",
        "ret",
        "mov dword ptr [rcx + 0x18], edx",
        "movabs rax, 0x1122334455667788",
        "jmp rax",
    ]


def test_interrupt_delivers_or_asks():
    assert listing(thunks.interrupt(0x1000, 0x2000, 0x3000, 0x5000, 0x4000)) == [
        "cmp esi, 0x100",
        "jae 0x58",
        "movabs rax, 0x3000",
        "cmp dword ptr [rax], 0",
        "jne 0x58",
        "cmp esi, 1",
        "je 0x2c",
        "movabs rax, 0x5000",
        "or dword ptr [rax], 0x10000",
        "movabs rax, 0x1000",
        "inc qword ptr [rax]",
        "push rdx",
        "mov rdi, rdx",
        "movabs rax, 0x2000",
        "call rax",
        "pop rdx",
        "movabs rax, 0x3000",
        "and dword ptr [rax], 0",
        "ret",
        "push rdx",
        "movabs rax, 0x4000",
        "call rax",
        "pop rdx",
        "test eax, eax",
        "jne 0x2c",
        "ret",
    ]


def test_invalid_opcode_keeps_the_stack_aligned():
    assert listing(thunks.invalid_opcode(0x1000, 0x2000, 0x5000)) == [
        "push rax",
        "movabs rax, 0x5000",
        "or dword ptr [rax], 0x10000",
        "movabs rax, 0x1000",
        "inc qword ptr [rax]",
        "mov rdi, rsi",
        "movabs rax, 0x2000",
        "call rax",
        "mov eax, 1",
        "pop rcx",
        "ret",
    ]


@pytest.mark.parametrize("aux", [None, 0x9000])
def test_rdtsc_declines_only_under_tsd(aux):
    code = listing(thunks.rdtsc(0x1000, 0x2000, 0x3000, aux))
    assert code[:7] == [
        "movabs rax, 0x2000",
        "test byte ptr [rax], 4",
        "je 0x21",
        "movabs rax, 0x3000",
        "test byte ptr [rax], 3",
        "je 0x21",
        "xor eax, eax",
    ]
    assert code[7] == "ret"
    assert code[8:16] == [
        "mov rax, qword ptr [rsi]",
        "mul qword ptr [rsi + 0x30]",
        "shrd rax, rdx, 0x20",
        "add rax, qword ptr [rsi + 0x28]",
        "movabs rcx, 0x1000",
        "mov edx, eax",
        "mov qword ptr [rcx], rdx",
        "shr rax, 0x20",
    ]
    tail = ["mov qword ptr [rcx + 0x10], rax"]
    if aux is not None:
        tail += ["movabs rax, 0x9000", "mov eax, dword ptr [rax]", "mov qword ptr [rcx + 8], rax"]
    assert code[16:] == [*tail, "mov eax, 1", "ret"]
