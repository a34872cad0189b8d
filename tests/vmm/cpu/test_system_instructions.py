"""What a CPU cannot be made to hold is #GP, and what was loaded acts: once per backend (SDM vol. 3, 2.5, 17.2)."""

from __future__ import annotations

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program
from vmm.cpu import validity
from vmm.machine.machine import Machine, Stopped, StopReason

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

REFUSED = {
    "cr0: reserved in the high half": "mov %cr0, %rax; bts $33, %rax; at: mov %rax, %cr0",
    "cr0: PG without PE": "mov %cr0, %rax; and $~1, %rax; at: mov %rax, %cr0",
    "cr0: NW without CD": "mov %cr0, %rax; or $0x20000000, %rax; and $~0x40000000, %rax; at: mov %rax, %cr0",
    "cr0: PG cleared in 64-bit mode": "mov %cr0, %rax; btr $31, %rax; at: mov %rax, %cr0",
    "cr3: beyond the physical address": "mov %cr3, %rax; bts $45, %rax; at: mov %rax, %cr3",
    "cr4: reserved": "mov %cr4, %rax; or $0x2000000, %rax; at: mov %rax, %cr4",
    "cr4: PAE cleared in long mode": "mov %cr4, %rax; and $~0x20, %rax; at: mov %rax, %cr4",
    "cr8: more than four bits": "mov $16, %eax; at: mov %rax, %cr8",
    "dr7: reserved in the high half": "movabs $0x100000400, %rax; at: mov %rax, %dr7",
    "dr6: reserved in the high half": "movabs $0x1ffff0ff0, %rax; at: mov %rax, %dr6",
    "efer: reserved": "mov $0xc0000080, %ecx; rdmsr; or $0x1000, %eax; at: wrmsr",
    "lstar: not canonical": "mov $0xc0000082, %ecx; mov $0x80000000, %edx; xor %eax, %eax; at: wrmsr",
    "fs.base: not canonical": "mov $0xc0000100, %ecx; mov $0x1000000, %edx; xor %eax, %eax; at: wrmsr",
    "gs.base: not canonical": "mov $0xc0000101, %ecx; mov $0x7fffffff, %edx; mov $-1, %eax; at: wrmsr",
    "kernel_gs_base: not canonical": "mov $0xc0000102, %ecx; mov $0xfeffffff, %edx; xor %eax, %eax; at: wrmsr",
    "lstar: not canonical in 48 bits": "mov $0xc0000082, %ecx; mov $0x800000, %edx; xor %eax, %eax; at: wrmsr",
    "gs.base: not canonical in 48 bits": "mov $0xc0000101, %ecx; mov $0x8000, %edx; xor %eax, %eax; at: wrmsr",
    "kernel_gs_base: not canonical in 48 bits":
        "mov $0xc0000102, %ecx; mov $0xfffe8000, %edx; xor %eax, %eax; at: wrmsr",
    "pat: no such type": "mov $0x277, %ecx; mov $2, %eax; xor %edx, %edx; at: wrmsr",
    "mxcsr: reserved, LDMXCSR": "movl $0x11f80, 0x200000; at: ldmxcsr 0x200000",
    "mxcsr: reserved, FXRSTOR": "fxsave 0x200000; orl $0x40000, 0x200018; at: fxrstor 0x200000",
    "gdtr.base: not canonical": "movabs $0x8000000000000000, %rax; mov %rax, 0x200002; at: lgdt 0x200000",
    "gdtr.base: not canonical in 48 bits": "movabs $0x800000000000, %rax; mov %rax, 0x200002; at: lgdt 0x200000",
    **{
        f"beside an MSR there is: {number:#x}": f"mov ${number:#x}, %ecx; at: rdmsr"
        for number in (0x11, 0x173, 0x177, 0x276, 0x278, 0xC000007F, 0xC0000085, 0xC00000FF, 0xC0000104)
    },
    "tr: a null selector": "xor %eax, %eax; at: ltr %ax",
}  # fmt: skip
_SSE = "mov %cr4, %rax; or $0x600, %rax; mov %rax, %cr4; "


@each_backend
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_cpu_can_hold_is_a_general_protection_fault(backend, name):
    program = Program(f"{_SSE} lea next(%rip), %r15; {REFUSED[name]}; next: jmp done", backend).finish()
    assert [(trap.vector, trap.error, trap.rip) for trap in program.traps] == [(13, 0, program.labels["at"])]
    assert validity.refusal(program.machine.cpus[0].save()) is None


TAKEN = {
    "cr0": ("mov %cr0, %rax; xor $0x40002, %rax; mov %rax, %rbx; mov %rax, %cr0", "mov %cr0, %rax; sub %rbx, %rax", 0),
    "cr3": ("mov %cr3, %rax; or $0x18, %rax; mov %rax, %cr3", "mov %cr3, %rax; and $0x18, %rax", 0x18),
    "cr4": ("mov %cr4, %rax; or $0x84, %rax; mov %rax, %cr4", "mov %cr4, %rax; and $0x84, %rax", 0x84),
    "cr8": ("mov $5, %eax; mov %rax, %cr8", "mov $-1, %rax; mov %cr8, %rax", 5),
    "dr6": ("mov $0x4003, %eax; mov %rax, %dr6", "mov %dr6, %rax", 0xFFFF4FF3),
    "dr7": ("mov $0x300, %eax; mov %rax, %dr7", "mov %dr7, %rax", 0x700),
    "fs.base": ("mov $0xc0000100, %ecx; mov $0x7fff, %edx; mov $7, %eax; wrmsr", "rdmsr; mov %edx, %eax", 0x7FFF),
    "gdtr": ("sgdt 0x200000; movw $0x77, 0x200000; lgdt 0x200000", "sgdt 0x200010; movzwl 0x200010, %eax", 0x77),
    "idtr": ("sidt 0x200000; movw $0x2ff, 0x200000; lidt 0x200000", "sidt 0x200010; movzwl 0x200010, %eax", 0x2FF),
    "mxcsr": ("movl $0x9f80, 0x200000; ldmxcsr 0x200000", "stmxcsr 0x200000; mov 0x200000, %eax", 0x9F80),
    "lmsw": ("smsw %ax; or $2, %al; movw %ax, 0x200000; lmsw 0x200000", "smsw %ax; and $3, %eax", 3),
    "clts": ("mov %cr0, %rax; or $8, %rax; mov %rax, %cr0; clts", "mov %cr0, %rax; and $8, %eax", 0),
}


@each_backend
@pytest.mark.parametrize("name", TAKEN)
def test_what_it_can_hold_is_taken(backend, name):
    code, read, wanted = TAKEN[name]
    program = Program(f"{_SSE} {code}; {read}; jmp done", backend).finish()
    assert (program.traps, program.result) == ([], wanted)


@each_backend
def test_single_step_over_what_is_done_in_the_engines_place(backend):
    """#DB behind the instruction, not behind the next."""
    source = """
        lea     after(%rip), %r15
        mov     %cr4, %rax
        pushf
        orl     $0x100, (%rsp)
        popf
        mov     %rax, %cr4
at:     nop
after:  jmp     done"""
    program = Program(source, backend).finish()
    assert [(trap.vector, trap.rip) for trap in program.traps] == [(1, program.labels["at"])]


@each_backend
def test_access_to_debug_registers_can_be_watched(backend):
    source = """
        lea     next(%rip), %r15
        mov     $0x2400, %eax
        mov     %rax, %dr7
at:     mov     %dr0, %rax
next:   mov     %dr6, %rbx
        mov     %dr7, %rax
        jmp     done"""
    program = Program(source, backend).finish()
    assert [(trap.vector, trap.rip) for trap in program.traps] == [(1, program.labels["at"])]
    assert program.result == 0x400
    assert program.machine.cpus[0].save().rbx & 0x2000


_BREAKPOINT = """
        lea     at(%rip), %rax
        mov     %rax, %dr0
        mov     ${dr7}, %eax
        mov     %rax, %dr7
        pause
        lea     next(%rip), %r15
        jmp     1f
1:      nop
at:     nop
next:   jmp     done"""
_SINGLE_STEP = """
        lea     next(%rip), %r15
        pushf
        orl     $0x100, (%rsp)
        pause
        popf
        nop
        nop
next:   jmp     done"""
ACTS = {
    "single step": (_SINGLE_STEP, [1]),
    "breakpoint": (_BREAKPOINT.format(dr7="0x402"), [1]),
    "no breakpoint": (_BREAKPOINT.format(dr7="0x400"), []),
    "a breakpoint of writes": (_BREAKPOINT.format(dr7="0x10402"), []),
    "a breakpoint of reads and writes": (_BREAKPOINT.format(dr7="0x30402"), []),
}


@each_backend
@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("way", ["woken", "rewound"])
def test_what_was_loaded_acts(backend, name, way, tmp_path):
    source, vectors = ACTS[name]
    program = Program(source, backend).pause()
    if way == "woken":
        program.machine.save(tmp_path / "s")
        program.machine.close()
        program.machine = Machine.restore(tmp_path / "s", backend)
    else:
        moment = program.machine.moment()
        program.finish()
        assert [trap.vector for trap in program.traps] == vectors
        program.machine.rewind(moment)
    program.finish()
    assert [trap.vector for trap in program.traps] == vectors


_RING3 = """
 mov $0xc0000081, %ecx; xor %eax, %eax; mov $0x00230010, %edx; wrmsr; inc %ecx; lea entry(%rip), %rax; xor %edx, %edx
 wrmsr; mov $0xc0000084, %ecx; xor %eax, %eax; wrmsr; mov $0xc0000080, %ecx; rdmsr; or $1, %eax; wrmsr
 orl $4, 0x9000; orl $4, 0xa000; orl $4, 0xb000; mov %cr3, %rax; mov %rax, %cr3
"""


@pytest.mark.parametrize("saved", [False, True])
def test_iopl_that_was_taken_back_is_gone(saved, tmp_path):
    """CLI at level 3 with IOPL 0 is #GP; there is no TSS to take it by, which ends it."""
    program = Program(f"""{_RING3}
 pushq $0x3002; popf; pause
 lea user(%rip), %rcx; mov $0x2, %r11d; sysretq
user: mov $5, %eax; cli; mov $6, %eax; syscall
entry: jmp done""").pause()
    if saved:
        program.machine.save(tmp_path / "s")
        program.machine = Machine.restore(tmp_path / "s")
    assert program.machine.run(until_ns=10**9) == Stopped(StopReason.TRIPLE_FAULT)


def test_sysret_does_not_load_vm():
    program = Program(f"""{_RING3}
 lea user(%rip), %rcx; mov $0x20002, %r11d; sysretq
user: mov $5, %eax; pushf; pop %rbx; syscall
entry: jmp done""").finish()
    assert program.result == 5
    assert validity.refusal(program.machine.cpus[0].save()) is None


@each_backend
@pytest.mark.parametrize("code", ["rdmsr", "wrmsr", "clts", "mov %rax, %cr0"])
def test_prefixes_are_a_part_of_the_instruction(backend, code):
    program = Program(
        f"""
        mov     %cr0, %rax
        mov     $0xc0000082, %ecx
        xor     %edx, %edx
        .byte   0x3e, 0x67
        {code}
        mov     $7, %eax
        jmp     done""",
        backend,
    ).finish()
    assert program.result == 7 and not program.traps
    if backend == "emu":  # once: without them it would be an instruction too
        assert sum(program.machine.cpus[0].exits()[name] for name in ("msr", "system")) == 1 + 1  # the prelude's LIDT
