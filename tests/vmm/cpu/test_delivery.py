"""Faults of delivery itself, once per backend: what is delivered in an exception's place (SDM vol. 3, 6.13, 6.15)."""

from __future__ import annotations

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program
from vmm.cpu.protocol import EventState
from vmm.machine.machine import Stopped, StopReason

RF = 1 << 16
_IDT = 0x301000

each_backend = pytest.mark.parametrize("backend", [*BACKENDS, "emu portable"], indirect=True)


def no_gate(vector: int) -> str:
    return f"movb $0, {_IDT + 16 * vector + 5:#x}; "


def not_present(vector: int) -> str:
    return f"movb $0x0e, {_IDT + 16 * vector + 5:#x}; "


FAULTS = {
    "gate: none for an exception": (no_gate(6) + "at: ud2", 13, 6 * 8 + 2),
    "gate: not present for an exception": (not_present(6) + "at: ud2", 11, 6 * 8 + 2),
    "gate: none for INT n": (no_gate(0x21) + "at: int $0x21", 13, 0x21 * 8 + 2),
    "gate: not present for INT n": (not_present(0x21) + "at: int $0x21", 11, 0x21 * 8 + 2),
    "gate: none for INT 14, which is no page fault": (no_gate(14) + "at: int $14", 13, 14 * 8 + 2),
    "gate: none for INT 11, which is not contributory": (no_gate(11) + "at: int $11", 13, 11 * 8 + 2),
    "gate: none for INT 6": (no_gate(6) + "at: int $6", 13, 6 * 8 + 2),
    "gate: none for INT3": (no_gate(3) + "at: int3", 13, 3 * 8 + 2),
    "double: a page fault without a gate": (no_gate(14) + "movabs $0x80000000000, %rax; at: mov (%rax), %rbx", 8, 0),
    "double: contributory": (no_gate(13) + "mov $0x1230, %eax; at: mov %eax, %ds", 8, 0),
    "double: contributory, intercepted": (no_gate(13) + "mov $16, %eax; at: mov %rax, %cr8", 8, 0),
}


@each_backend
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_delivery(backend, name):
    code, vector, error = FAULTS[name]
    program = Program(f"lea next(%rip), %r15; {code}; next: jmp done", backend).finish()
    assert [trap[:3] for trap in program.traps] == [(vector, error, program.labels["at"])]
    assert vector == 8 or program.traps[0].rflags & RF


@each_backend
@pytest.mark.parametrize(("limit", "present"), [("0xf", False), ("0", False), ("0", True)])
def test_a_code_segment_that_is_not_present(backend, limit, present):
    """Selector 0x38 of a GDT of its own: the old one's, and one more."""
    source = f"""
        sgdt    0x200000
        mov     0x200002, %rsi
        mov     $0x201000, %edi
        mov     $7, %ecx
        rep movsq
        movabs  $0x0020{"9" if present else "1"}b000000ffff + ({limit} << 48), %rax
        mov     %rax, 0x201038
        movw    $0x3f, 0x200000
        movq    $0x201000, 0x200002
        lgdt    0x200000
        movw    $0x38, {_IDT + 16 * 0x21 + 2:#x}
        lea     next(%rip), %r15
at:     int     $0x21
next:   jmp     done
"""
    program = Program(source, backend).finish()
    right = (0x21, 0, program.labels["next"]) if present else (11, 0x38, program.labels["at"])
    assert [trap[:3] for trap in program.traps] == [right]


@each_backend
def test_a_software_interrupt_that_was_accepted_is_run_again(backend):
    """RIP is still at the INT n: it is delivered once, as that."""
    program = Program("pause; lea next(%rip), %r15; at: int $0x31; next: jmp done", backend).pause()
    state = program.machine.cpus[0].save()
    state.rip, state.r15 = program.labels["at"], program.labels["next"]
    state.event = EventState(kind="software", vector=0x31)
    program.machine.cpus[0].load(state)
    program.finish()
    assert [(trap.vector, trap.rip) for trap in program.traps] == [(0x31, program.labels["next"])]


@each_backend
@pytest.mark.parametrize("vector", [0, 6, 7, 0x21])
def test_int_n_is_a_trap_whatever_its_vector(backend, vector):
    program = Program(f"lea next(%rip), %r15; int ${vector}; next: jmp done", backend).finish()
    assert [trap[:3] for trap in program.traps] == [(vector, 0, program.labels["next"])]
    assert not program.traps[0].rflags & RF


@each_backend
@pytest.mark.parametrize("code", ["ud2", "int $0x21", "mov $16, %eax; mov %rax, %cr8"])
def test_without_any_gates_it_is_a_triple_fault(backend, code):
    program = Program(f"movw $7, 0x200000; movabs $0x400000, %rax; mov %rax, 0x200002; lidt 0x200000; {code}", backend)
    assert program.machine.run() == Stopped(StopReason.TRIPLE_FAULT)
