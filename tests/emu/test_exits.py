"""How often the guest's code was left, by reason: exact, whether machine code or Python takes what the engine calls."""

from __future__ import annotations

import pytest

from tests.vmm.cpu.program import Program
from tests.vmm.cpu.test_conformance import ONE_SHOT, PIC

# Of each: code, and what it counts.
LEAVE = {
    "port_in": ("in $0x80, %al", {"port_in": 1}),
    "port_out": ("out %al, $0x80", {"port_out": 1}),
    "mmio": ("mov $0xd0000000, %ebx; mov (%rbx), %eax; mov %eax, (%rbx)", {"mmio": 2}),
    "msr": ("mov $0x277, %ecx; rdmsr; wrmsr", {"msr": 2}),
    "system": ("mov %cr4, %rax; mov %rax, %cr4", {"system": 1}),
    "exception": ("lea 1f(%rip), %r15; ud2; 1:", {"exception": 1}),
    "interrupt": (f"{ONE_SHOT} sti; hlt; cli", {"port_out": 4, "interrupt": 1, "halt": 1}),  # one ends the interrupt
    "syscall": (
        "mov $0xc0000082, %ecx; lea 1f(%rip), %rax; xor %edx, %edx; wrmsr; syscall; 1:",
        {"syscall": 1, "msr": 1},
    ),
}
SETUP = f"""
        {PIC}
        mov $0xc0000080, %ecx; rdmsr; or $1, %eax; wrmsr
        mov $0xc0000081, %ecx; mov $0x10, %edx; xor %eax, %eax; wrmsr
"""
OF_SETUP = {"port_out": 5, "msr": 3}
OF_ALL = {"system": 1, "port_out": 1, "halt": 1}  # LIDT, and what ends a program


@pytest.mark.parametrize("backend", ["emu", "emu portable"], indirect=True)
@pytest.mark.parametrize("name", LEAVE)
def test_each_is_counted(backend, name):
    code, counted = LEAVE[name]
    program = Program(f"{SETUP} .rept 3; {code}; .endr; jmp done", backend)
    assert set(program.machine.exits().values()) == {0}
    program.finish()
    found = {kind: count for kind, count in program.machine.exits().items() if kind != "stop"}
    kinds = dict.fromkeys(found, 0)
    for counts, times in ((OF_ALL, 1), (OF_SETUP, 1), (counted, 3)):
        for kind, count in counts.items():
            kinds[kind] += count * times
    assert found == kinds
