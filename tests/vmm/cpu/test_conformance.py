"""What every CPU backend must do, once per backend: exceptions, interrupts and their shadows, MSRs, memory, time."""

from __future__ import annotations

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program
from vmm.clock import BYTES_PER_NS, RDTSC_NS
from vmm.cpu import model as cpu_model
from vmm.machine.machine import Machine, Stopped, StopReason


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", (*BACKENDS, "emu portable"), indirect=True)


RF = 1 << 16

# --- exceptions: vector, error code, RIP of the instruction (or after it, for traps), CR2

FAULTS = {
    "ud2": ("ud2", 6, 0, None),
    "lock": (".byte 0xf0, 0x90", 6, 0, None),  # LOCK NOP
    "divide by zero": ("xor %ecx, %ecx; mov $1, %eax; xor %edx, %edx; at: div %ecx", 0, 0, None),
    "read of an unmapped page": ("movabs $0x80000000000, %rax; at: mov (%rax), %rbx", 14, 0, 0x80000000000),
    "write to an unmapped page": ("movabs $0x80000000008, %rax; at: mov %rbx, (%rax)", 14, 2, 0x80000000008),
    "jump to an unmapped page": ("movabs $0x80000000000, %rax; jmp *%rax", 14, 0, 0x80000000000),
    "non-canonical address": ("movabs $0x800000000000, %rax; at: mov (%rax), %rbx", 13, 0, None),
    "rdmsr of nothing": ("mov $0x12345, %ecx; at: rdmsr", 13, 0, None),
    "wrmsr of nothing": ("mov $0x12345, %ecx; at: wrmsr", 13, 0, None),
    "wrmsr of a bad value": ("mov $0x277, %ecx; mov $2, %eax; xor %edx, %edx; at: wrmsr", 13, 0, None),
    "a gate beyond the IDT": ("at: int $0x80", 13, 0x402, None),
    "load of a segment beyond the GDT": ("mov $0x1230, %eax; at: mov %eax, %ds", 13, 0x1230, None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(backend, name):
    code, vector, error, cr2 = FAULTS[name]
    label = "" if "at:" in code else "at: "
    program = Program(f"lea next(%rip), %r15; {label}{code}; next: jmp done", backend).finish()
    (trap,) = program.traps
    assert (trap.vector, trap.error) == (vector, error)
    if not code.endswith("jmp *%rax"):
        assert trap.rip == program.labels["at"]
    if cr2 is not None:
        assert trap.cr2 == cr2


@pytest.mark.parametrize("name", ["ud2", "divide by zero", "write to an unmapped page", "rdmsr of nothing"])
def test_a_fault_pushes_rf(backend, name):
    """SDM vol. 3, 17.3.1.1: so that an instruction breakpoint does not stop it twice."""
    program = Program(f"lea next(%rip), %r15; {FAULTS[name][0]}; next: jmp done", backend).finish()
    assert program.traps[0].rflags & RF


@pytest.mark.parametrize(
    ("code", "vector"),
    [("int3", 3), ("int $0x21", 0x21), ("pushf; orl $0x100, (%rsp); popf; nop", 1)],
    ids=["breakpoint", "software interrupt", "single step"],
)
def test_trap_names_the_next_instruction(backend, code, vector):
    program = Program(f"lea next(%rip), %r15; {code}; next: jmp done", backend).finish()
    (trap,) = program.traps
    assert trap[:3] == (vector, 0, program.labels["next"]) and not trap.rflags & RF


def test_a_fault_in_the_middle_of_rep_resumes(backend):
    """The page after the last mapped one: RCX, RSI and RDI say how far it came."""
    program = Program(
        """
        lea     next(%rip), %r15
        mov     $0x200000, %esi
        movabs  $0x100000000 - 24, %rdi         # the identity map ends at 4 GiB; no RAM is there, writes are lost
        mov     $100, %ecx
        cld
        rep movsq
next:   mov     %rcx, %rax
        jmp     done
        """,
        backend,
    ).finish()
    (trap,) = program.traps
    assert (trap.vector, trap.error, trap.cr2) == (14, 2, 0x100000000) and program.result == 97


def test_a_triple_fault_ends_the_run(backend):
    program = Program("lidt 0x2f0000; ud2", backend)
    assert program.machine.run() == Stopped(StopReason.TRIPLE_FAULT)


# --- interrupts

PIC = "pic 0x30;"
ONE_SHOT = """
        mov     $0x30, %al; out %al, $0x43      # counter 0, mode 0: one rise of OUT
        mov     $20, %al; out %al, $0x40
        xor     %eax, %eax; out %al, $0x40
"""
PENDING = PIC + ONE_SHOT + "wait: mov $0x0a, %al; out %al, $0x20; in $0x20, %al; test $1, %al; jz wait;"


def test_sti_holds_interrupts_back_for_one_instruction(backend):
    program = Program(PENDING + "sti; nop; next: nop; cli; jmp done", backend).finish()
    assert [(t.vector, t.rip) for t in program.traps] == [(0x30, program.labels["next"])]


def test_sti_then_cli_lets_nothing_in(backend):
    program = Program(PENDING + "sti; cli; nop; nop; jmp done", backend).finish()
    assert program.traps == []


def test_mov_ss_holds_interrupts_back_for_one_instruction(backend):
    program = Program(
        PIC + "mov %ss, %ebx; sti; nop;" + ONE_SHOT + "again: mov %ebx, %ss; next: nop; cmp $0, %r14b; je again; cli;"
        "jmp done",
        backend,
    ).finish()
    (trap,) = program.traps
    assert trap.vector == 0x30 and trap.rip != program.labels["next"]


def test_hlt_wakes_behind_itself(backend):
    program = Program(PIC + ONE_SHOT + "sti; hlt; next: cli; jmp done", backend).finish()
    assert [(t.vector, t.rip) for t in program.traps] == [(0x30, program.labels["next"])]
    assert program.machine.exits()["halt"] >= 1


def test_hlt_without_interrupts_is_the_end(backend):
    assert Program("cli; hlt", backend).machine.run() == Stopped(StopReason.HALTED)


def test_an_interrupt_ends_a_tight_loop(backend):
    program = Program(PIC + ONE_SHOT + "sti; again: cmp $0, %r14b; je again; cli; jmp done", backend).finish()
    assert [t.vector for t in program.traps] == [0x30]


# --- registers

MSRS = {
    "efer": (0xC0000080, 0x501),
    "star": (0xC0000081, 0x0023001000000000),
    "lstar": (0xC0000082, 0xFFFFFFFF81000000),
    "cstar": (0xC0000083, 0xFFFFFFFF81000100),
    "sfmask": (0xC0000084, 0x47700),
    "fs": (0xC0000100, 0x7F0012345678),
    "gs": (0xC0000101, 0xFFFF888000000000),
    "kernel_gs_base": (0xC0000102, 0x00007F00DEADBEEF),
    "tsc_aux": (0xC0000103, 0x00000005),
    "sysenter_cs": (0x174, 0x10),
    "sysenter_esp": (0x175, 0x00001000),
    "sysenter_eip": (0x176, 0x81000200),
    "pat": (0x277, 0x0407050600070106),
}


@pytest.mark.parametrize("name", MSRS)
def test_msr_keeps_its_value_and_is_saved(backend, name, tmp_path):
    number, value = MSRS[name]
    write = f"mov ${value & 0xFFFFFFFF:#x}, %eax; mov ${value >> 32:#x}, %edx; wrmsr;"
    read = "rdmsr; shl $32, %rdx; mov %eax, %eax; or %rdx, %rax;"
    program = Program(f"mov ${number:#x}, %ecx; {write} {read} pause; {read} jmp done", backend).pause()
    machine = program.machine
    saved = machine.cpu.save()
    assert (getattr(saved, name).base if name in ("fs", "gs") else getattr(saved, name)) == value
    machine.save(tmp_path / "cut")
    with Machine.restore(tmp_path / "cut", backend) as woken:
        program.machine = woken
        assert program.finish().result == value


def test_syscall_and_sysret(backend):
    """To ring 3 by SYSRET and back by SYSCALL (AMD APM vol. 3): RCX, R11, masks, selectors."""
    program = Program(
        """
        syscalls
        orl     $4, 0x9000                      # user access to everything
        orl     $4, 0xa000
        orl     $4, 0xb000
        mov     %cr3, %rax
        mov     %rax, %cr3
        lea     user(%rip), %rcx
        mov     $0x402, %r11d
        sysretq
user:   mov     %cs, %ebx
        mov     %ss, %ebp
        syscall
after:  ud2
entry:  pushf
        pop     %rdi
        mov     %cs, %esi
        mov     %ss, %eax
        shl     $16, %rbp
        or      %rbp, %rbx                      # user SS:CS
        shl     $32, %rax
        or      %rbx, %rax
        shl     $48, %rsi
        or      %rsi, %rax                      # kernel CS, SS, user SS, CS
        mov     %rcx, 0x2f0000
        mov     %r11, 0x2f0008
        mov     %rdi, 0x2f0010
        jmp     done
        """,
        backend,
    ).finish()
    assert program.result == 0x10 << 48 | 0x18 << 32 | 0x2B << 16 | 0x33
    assert program.word(0x2F0000) == program.labels["after"]
    assert program.word(0x2F0008) & 0x400 and not program.word(0x2F0010) & 0x400


@pytest.mark.parametrize("leaf", [*cpu_model.CPUID, 2, 7, 0xD, 0x40000000, 0x8000000A])
def test_cpuid_is_the_model(backend, leaf):
    """Every leaf, and none besides: a host's own bits would break a snapshot elsewhere."""
    keep = "".join(f"mov %e{register}x, 0x2f0000 + {4 * i};" for i, register in enumerate("abcd"))
    program = Program(f"mov ${leaf:#x}, %eax; xor %ecx, %ecx; cpuid; {keep} jmp done", backend).finish()
    found = tuple(program.word(0x2F0000 + 4 * i) & 0xFFFFFFFF for i in range(4))
    assert found == cpu_model.cpuid(leaf, 0)


# --- memory and ports


def test_what_nobody_claims_floats_high(backend):
    program = Program(
        """
        mov     $0x1234, %edx
        in      (%dx), %eax
        mov     %eax, %ebx
        mov     $0xd0000000, %edi
        movl    $1, (%rdi)
        mov     (%rdi), %eax
        and     %rbx, %rax
        shl     $32, %rbx
        or      %rbx, %rax
        jmp     done
        """,
        backend,
    ).finish()
    assert program.result == (1 << 64) - 1


def test_ram_above_4_gib(backend, tmp_path):
    """Its own region, mapped through a page directory pointer of its own; kept by a snapshot."""
    program = Program(
        """
        movq    $0x310003, 0xa000 + 4 * 8
        movabs  $0x100000083, %rax
        mov     %rax, 0x310000
        movabs  $0x100001000, %rdi
        movabs  $0x1122334455667788, %rax
        mov     %rax, (%rdi)
        mov     (%rdi), %rax
        jmp     done
        """,
        backend,
        memory=(3 << 30) + (64 << 20),
    ).finish()
    assert program.result == program.word(0x1_0000_1000) == 0x1122334455667788
    program.machine.save(tmp_path / "high")
    with Machine.restore(tmp_path / "high", backend, verify=True, max_memory=4 << 30) as woken:
        assert bytes(woken.ram.slice(0x1_0000_1000, 8)) == bytes.fromhex("8877665544332211")


def test_a20(backend):
    """With both gates closed bit 20 of an address is not seen: 1 MiB up is the same memory."""
    program = Program(
        """
        movq    $0x210003, 0xb000 + 0x1000      # at 1 GiB a small page at physical 0x104000
        movq    $0x104003, 0x210000
        mov     %cr3, %rax
        mov     %rax, %cr3
        lea     body(%rip), %rsi
        mov     $0x50000, %edi
        mov     $end - body, %ecx
        rep movsb
        mov     $0x50000, %eax
        jmp     *%rax
body:   mov     $0xd1, %al
        out     %al, $0x64
        mov     $0xdd, %al
        out     %al, $0x60
        xor     %eax, %eax
        out     %al, $0x92
        movq    $0x55, 0x4000
        mov     0x40000000, %rbx
        mov     $2, %al
        out     %al, $0x92
        mov     0x40000000, %rax
        shl     $8, %rax
        or      %rbx, %rax
        mov     $done, %ebx
        jmp     *%rbx
end:
        """,
        backend,
    ).finish()
    assert program.result == 0x55


def test_code_that_rewrites_itself(backend):
    """The immediate of an instruction in the same page changes a thousand times; data shares the page."""
    program = Program(
        """
        xor     %eax, %eax
        mov     $1000, %ecx
again:  mov     %ecx, patch + 1(%rip)
        incl    count(%rip)
        jmp     patch
        .balign 64
patch:  mov     $0, %ebx
        add     %rbx, %rax
        dec     %ecx
        jnz     again
        add     count(%rip), %eax
        jmp     done
count:  .long   0
        """,
        backend,
    ).finish()
    assert program.result == 1000 * 1001 // 2 + 1000


def test_code_written_through_another_mapping(backend):
    """Physical pages count, not addresses: the copy at 1 GiB is the same memory."""
    program = Program(
        """
        movq    $0x83, 0xb000 + 0x1000          # 1 GiB maps physical 0
        mov     %cr3, %rax
        mov     %rax, %cr3
        call    target
        mov     %rax, %rbx
        movl    $7, target + 0x40000001
        call    target
        shl     $8, %rax
        or      %rbx, %rax
        jmp     done
        .balign 64
target: mov     $5, %eax
        ret
        """,
        backend,
    ).finish()
    assert program.result == 0x705


# --- time


def test_tsc_is_guest_time_and_can_be_set(backend):
    source = """
        rdtscp
        shl     $32, %rdx
        lea     (%rax, %rdx), %rbx
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        sub     %rbx, %rax
        mov     %rax, 0x2f0000
        mov     $0x10, %ecx
        xor     %eax, %eax
        mov     $1, %edx
        wrmsr
        rdtsc
        shl     $32, %rdx
        or      %rdx, %rax
        jmp     done
        """
    moment = 1000 if backend == "emu" else 1 << 31  # on KVM time passes while the host has other things to do
    # A KVM whose host has come to hold its TSC unstable loses the guest's write when it is preempted between the exit
    # and the next entry: kvm_arch_vcpu_load() goes on from where the TSC was at the exit. In the lane, booted with
    # tsc=unstable, that is 12 of 5,000 writes, else none; so not three times over.
    for _ in range(1 if backend == "emu" else 3):
        program = Program(source, backend).finish()
        assert 0 <= program.word(0x2F0000) < moment
        if program.result >= 1 << 32:
            break
    assert 1 << 32 <= program.result < (1 << 32) + moment


@pytest.mark.parametrize("portable", ["", "1"])
@pytest.mark.parametrize("read", ["rdtsc", "rdtscp"])
def test_reading_the_tsc_costs_guest_time(read, portable, monkeypatch):
    monkeypatch.setenv("ANYHYVE_PORTABLE", portable)
    program = Program(f"{read}; mov %eax, %ebx; {read}; sub %ebx, %eax; jmp done").finish()
    assert program.result == RDTSC_NS * BYTES_PER_NS, "a tick is a quarter of a ns, and both are in one block"


def test_native_and_portable_callbacks_run_alike(monkeypatch):
    """All the conformance there is, in one digest: position, time and state agree."""
    ends = []
    for portable in ("", "1"):
        monkeypatch.setenv("ANYHYVE_PORTABLE", portable)
        for name, (code, *_) in FAULTS.items():
            label = "" if "at:" in code else "at: "
            program = Program(f"lea next(%rip), %r15; {label}{code}; next: jmp done").finish()
            ends.append((name, program.machine.position, program.machine.digests()))
    assert ends[: len(FAULTS)] == ends[len(FAULTS) :]
