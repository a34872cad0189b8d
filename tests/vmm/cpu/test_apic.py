"""A CPU and its local APIC, on each backend: what reaches the one from the other without memory (SDM vol. 3, 11)."""

from __future__ import annotations

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program
from vmm.machine.machine import Machine

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

# The local APIC's registers, and a program's first lines: it is enabled, RBX is its base.
APIC = """
        .equ    TPR, 0x80
        .equ    EOI, 0xb0
        .equ    SVR, 0xf0
        .equ    IRR, 0x210                      # vectors 0x20 to 0x3f
        .equ    ICR, 0x300
        .equ    TIMER, 0x320
        .equ    LINT0, 0x350
        .equ    INITIAL, 0x380
        .equ    CURRENT, 0x390
        .equ    DIVIDE, 0x3e0
        .equ    SELF, 0x40000
        .equ    NMI, 0x400
        mov     $0xfee00000, %ebx
        movl    $0x1ff, SVR(%rbx)
        movl    $0x10000, LINT0(%rbx)
        lea     over(%rip), %r15
"""


def ran(source: str, backend: str) -> Program:
    return Program(APIC + source, backend, board="pc").finish()


@each_backend
def test_cr8_is_the_upper_half_of_the_task_priority(backend):
    source = """
        movl    $0x35, TPR(%rbx)
        mov     %cr8, %rax
        mov     $7, %ecx
        mov     %rcx, %cr8
        mov     TPR(%rbx), %edx
        shl     $8, %rdx
        or      %rdx, %rax
over:   jmp     done
"""
    assert ran(source, backend).result == 0x7003


@each_backend
@pytest.mark.parametrize("lower", ["xor %eax, %eax; mov %rax, %cr8", "movl $0, TPR(%rbx)"], ids=["cr8", "memory"])
def test_an_interrupt_waits_for_the_task_priority(backend, lower):
    source = f"""
        mov     $4, %eax
        mov     %rax, %cr8
        sti
        movl    $SELF + 0x31, ICR(%rbx)
        nop
        mov     IRR(%rbx), %ebp
        {lower}
1:      cmp     $0x300000, %r14d
        je      1b
over:   mov     IRR(%rbx), %eax
        shl     $32, %rax
        or      %rbp, %rax
        jmp     done
"""
    program = ran(source, backend)
    assert [trap.vector for trap in program.traps] == [0x31]
    assert program.result == 1 << 0x11, "it was requested, and is no more"


@each_backend
def test_the_timer_and_the_end_of_its_interrupt(backend):
    source = """
        movl    $0xb, DIVIDE(%rbx)              # by one: a tick is a nanosecond
        movl    $0x20033, TIMER(%rbx)           # periodic
        movl    $20000, INITIAL(%rbx)
1:      cmp     $0x300000 + 5 * 40, %r14d
        jae     over
        movl    $0, EOI(%rbx)
        sti
        hlt
        cli
        jmp     1b
over:   movl    $0x10000, TIMER(%rbx)
        jmp     done
"""
    program = ran(source, backend)
    assert [trap.vector for trap in program.traps] == [0x33] * 5
    assert program.machine.clock.now_ns() >= 100_000


DEADLINE = """
        movl    $0x40034, TIMER(%rbx)           # TSC-deadline
        mfence
        rdtsc
        shl     $32, %rdx
        lea     ({ahead})(%rdx,%rax), %rax
        mov     %rax, %rdx
        shr     $32, %rdx
        mov     $0x6e0, %ecx
        wrmsr
"""


@each_backend
def test_the_timer_waits_for_the_tsc(backend):
    source = f"""
        {DEADLINE.format(ahead=200_000)}
        mov     %eax, %ebp
        sti
        hlt
        rdtsc
        sub     %ebp, %eax                      # past it
        mov     %rax, %rbp
        mov     $0x6e0, %ecx
        rdmsr                                   # and armed no more
        shl     $32, %rax
        or      %rbp, %rax
over:   jmp     done
"""
    program = ran(source, backend)
    assert [trap.vector for trap in program.traps] == [0x34]
    assert program.result < 1 << 31
    assert program.machine.clock.now_ns() >= 50_000


@each_backend
def test_a_tsc_that_is_written_moves_the_deadline(backend):
    """What lies a day ahead comes when the counter is put there."""
    source = f"""
        mov     $1000000000, %r12               # of TSC
        imul    $345600, %r12
        {DEADLINE.format(ahead="0")}
        add     %r12, %rax
        mov     %rax, %rdx
        shr     $32, %rdx
        wrmsr
        mov     $0x10, %ecx
        wrmsr
        sti
        mov     $3000, %ecx
        mov     $0x61, %edx
1:      in      (%dx), %al
        cmp     $0x300000, %r14d
        loope   1b
over:   jmp     done
"""
    program = ran(source.replace("lea     (0)", "lea     1000000000"), backend)
    assert [trap.vector for trap in program.traps] == [0x34]
    assert program.machine.clock.now_ns() < 10_000_000_000


@each_backend
def test_an_nmi_is_taken_whatever_the_interrupt_flag_says(backend):
    source = """
        movl    $SELF + NMI, ICR(%rbx)
        nop
        nop
        ud2                                     # it did not come
over:   jmp     done
"""
    assert [trap.vector for trap in ran(source, backend).traps] == [2]


@each_backend
def test_an_nmi_wakes(backend):
    """From HLT with interrupts off: what comes from the 8259As is an NMI here."""
    source = """
        movl    $0xb, DIVIDE(%rbx)
        movl    $0x400, LINT0(%rbx)
        pic     0x38
        mov     $0x30, %al                      # the 8254's counter 0, once
        out     %al, $0x43
        mov     $200, %al
        out     %al, $0x40
        xor     %eax, %eax
        out     %al, $0x40
        hlt
        ud2                                     # woken, and not by an NMI
over:   jmp     done
"""
    assert [trap.vector for trap in ran(source, backend).traps] == [2]


@each_backend
def test_an_nmi_waits_for_the_end_of_the_one_before(backend):
    """The second comes in the handler of the first: at its IRET, not before."""
    source = """
        gate    2, handler
        xor     %ebp, %ebp
        movl    $SELF + NMI, ICR(%rbx)
        nop
1:      cmp     $2, %ebp
        jb      1b
over:   mov     %rsi, %rax
        jmp     done
handler:
        inc     %ebp
        cmp     $2, %ebp
        je      3f
        movl    $SELF + NMI, ICR(%rbx)
        mov     $1000, %ecx
2:      loop    2b
        mov     %rbp, %rsi                      # still one
3:      iretq
"""
    program = ran(source, backend)
    assert program.result == 1 and not program.machine.board.devices["lapic.0"].state.nmi


@each_backend
def test_cpuid_shows_an_apic_that_is_enabled(backend):
    source = """
        mov     $1, %eax
        cpuid
        mov     %edx, %ebp
        mov     $0x1b, %ecx
        rdmsr
        btr     $11, %eax
        wrmsr
        mov     $1, %eax
        cpuid
        shl     $32, %rdx
        or      %rbp, %rdx
        shr     $9, %rdx
        mov     %rdx, %rbp
        mov     $0x1b, %ecx
        rdmsr
        bts     $11, %eax
        wrmsr
        mov     %rbp, %rax
over:   jmp     done
"""
    assert ran(source, backend).result & 0x1_0000_0001 == 1


MSRS = {
    "APIC_BASE": ("mov $0x1b, %ecx; rdmsr", 0xFEE00900),
    "MCG_CAP": ("mov $0x179, %ecx; rdmsr", 0),
    "MCG_STATUS": ("mov $0x17a, %ecx; xor %eax, %eax; cdq; wrmsr; rdmsr", 0),
    "what waits": ("mov $0xc0010055, %ecx; rdmsr", 0),
    "a counter": ("mov $0xc0010004, %ecx; mov $7, %eax; cdq; wrmsr; rdmsr", 0),
}
REFUSED = {
    "APIC_BASE: reserved": "mov $0x1b, %ecx; rdmsr; or $0x200, %eax; at: wrmsr",
    "APIC_BASE: x2APIC": "mov $0x1b, %ecx; rdmsr; or $0x400, %eax; at: wrmsr",
    "APIC_BASE: beyond the physical address": "mov $0x1b, %ecx; rdmsr; or $0x100, %edx; at: wrmsr",
    "MCG_CAP cannot be written": "mov $0x179, %ecx; xor %eax, %eax; cdq; at: wrmsr",
    "MCG_STATUS: what is not": "mov $0x17a, %ecx; mov $1, %eax; cdq; at: wrmsr",
    "what waits cannot be written": "mov $0xc0010055, %ecx; xor %eax, %eax; cdq; at: wrmsr",
    "no such register": "mov $0xc0010020, %ecx; at: rdmsr",
    "x2APIC's": "mov $0x802, %ecx; at: rdmsr",
}


@each_backend
@pytest.mark.parametrize("name", MSRS)
def test_msrs(backend, name):
    code, value = MSRS[name]
    assert ran(f"{code}\nover: jmp done", backend).result == value


@each_backend
@pytest.mark.parametrize("name", REFUSED)
def test_msrs_that_refuse(backend, name):
    program = ran(f"{REFUSED[name]}; ud2; over: jmp done", backend)
    assert [(trap.vector, trap.error, trap.rip) for trap in program.traps] == [(13, 0, program.labels["at"])]


@each_backend
@pytest.mark.parametrize("other", BACKENDS)
def test_what_waits_at_the_apic_is_carried_over(backend, other, tmp_path, request):
    """An NMI that waits for the end of another, an interrupt that the task priority holds back, an armed timer."""
    if other != "emu":
        request.getfixturevalue("kvm")
    source = f"""
        gate    2, handler
        mov     $4, %eax
        mov     %rax, %cr8
        movl    $SELF + 0x31, ICR(%rbx)
        {DEADLINE.format(ahead=2_000_000)}
        movl    $SELF + NMI, ICR(%rbx)
        nop
1:      cmp     $2, %ebp
        jb      1b
        mov     %cr8, %rsi
        xor     %eax, %eax
        mov     %rax, %cr8
2:      movl    $0, EOI(%rbx)
        cmp     $0x300000 + 2 * 40, %r14d
        jae     over
        sti
        hlt
        cli
        jmp     2b
over:   mov     %rsi, %rax
        jmp     done
handler:
        inc     %ebp
        cmp     $2, %ebp
        je      3f
        movl    $SELF + NMI, ICR(%rbx)
        pause
3:      iretq
"""
    program = Program(APIC + source, backend, board="pc").pause()
    state = program.machine.board.devices["lapic.0"].state
    assert state.nmi and state.irr[0x31 >> 3] & 2 and program.machine.cpus[0].save().cr8 == 4
    assert state.deadline_tsc or state.irr[0x34 >> 3] & 0x10  # on KVM time does not stand
    program.machine.save(tmp_path / "s")
    program.machine.close()
    program.machine = Machine.restore(tmp_path / "s", other)
    program.finish()
    assert sorted(trap.vector for trap in program.traps) == [0x31, 0x34] and program.result == 4
