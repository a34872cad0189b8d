"""Several CPUs, seen by a program on them: who each is, what reaches it, and what it shares with the others."""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from emu.core import Core
from emu.cpu import EmuCpu
from snapshot.errors import SnapshotError
from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program
from tests.vmm.cpu.several import COUNTS, SEVERAL, TABLE
from tests.vmm.machine.each_instruction import cut_at_each
from vmm.cpu.turns import PATIENCE
from vmm.errors import RequestError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
SLEEP = """
ap:     sti
1:      hlt
        jmp     1b
"""


def program(source, cpus=4, **options):
    return Program(SEVERAL + source, board="pc", cpus=cpus, **options)


def finished(source, cpus=4, **options):
    return program(source, cpus, **options).finish()


def words(program, count, at=TABLE):
    return [program.word(at + 8 * n) for n in range(count)]


@each_backend
def test_each_has_its_number(backend):
    """In CPUID and in its local APIC; the bit in IA32_APIC_BASE is the first one's."""
    done = finished(
        """
        start   4
        call    tell
1:      rep nop
        cmpl    $4, TABLE + 0x100
        jb      1b
        jmp     done
tell:   push    %rbx
        mov     $1, %eax
        cpuid
        shr     $16, %ebx
        movzwl  %bx, %esi
        mov     $0x80000008, %eax
        cpuid
        mov     %ecx, %r8d
        mov     $0x1b, %ecx
        rdmsr
        pop     %rbx
        shl     $4, %eax                        # bit 8: the first
        and     $0x1000, %eax
        or      %eax, %r8d
        shl     $16, %r8
        or      %rsi, %r8
        mov     %edi, %eax
        mov     %r8, TABLE(, %rax, 8)
        lock incl TABLE + 0x100
        ret
ap:     call    tell
        cli
        hlt
""",
        backend=backend,
    )
    told = words(done, 4)
    assert [value & 0xFFFF for value in told] == [n << 8 | 4 for n in range(4)], "CPUID.1.EBX: id, and four cores"
    assert [value >> 16 & 0xFFF for value in told] == [3] * 4, "8000_0008.ECX: one less than there are"
    assert [value >> 28 & 1 for value in told] == [1, 0, 0, 0], "the boot CPU's bit"


DESTINATIONS = {
    "one of them": ("$2 << 24, $0x38", [0, 0, 1, 0]),
    "itself, by number": ("$0, $0x38", [1, 0, 0, 0]),
    "itself": ("$0, $0x40038", [1, 0, 0, 0]),
    "all": ("$0, $0x80038", [1, 1, 1, 1]),
    "all but itself": ("$0, $0xc0038", [0, 1, 1, 1]),
    "everyone": ("$0xff << 24, $0x38", [1, 1, 1, 1]),
    "nobody": ("$9 << 24, $0x38", [0, 0, 0, 0]),
    "flat": ("$0xa << 24, $0x838", [0, 1, 0, 1]),
    "flat, the least busy": ("$0xe << 24, $0x938", [0, 1, 0, 0]),
}


def taken(count):
    """So many interrupts are taken by all together, and no more."""
    return f"""
1:      rep nop
        mov     COUNTS, %eax
        add     COUNTS + 8, %eax
        add     COUNTS + 16, %eax
        add     COUNTS + 24, %eax
        cmp     ${count}, %eax
        jb      1b
        mov     $4000, %ecx
1:      rep nop
        loop    1b
"""


@each_backend
@pytest.mark.parametrize("name", DESTINATIONS)
def test_whom_a_message_reaches(name, backend):
    message, reached = DESTINATIONS[name]
    done = finished(
        f"""
        start   4
        movl    $1 << 24, 0xd0(%rbx)
1:      rep nop
        cmpl    $3, TABLE
        jb      1b
        sti
        ipi     {message}
        {taken(sum(reached))}
        jmp     done
ap:     mov     $1 << 24, %eax                  # a logical id of its own
        mov     %edi, %ecx
        shl     %cl, %eax
        mov     %eax, 0xd0(%rbx)
        lock incl TABLE
        sti
1:      hlt
        jmp     1b
""",
        backend=backend,
    )
    assert words(done, 4, COUNTS) == reached


@each_backend
def test_clusters(backend):
    done = finished(
        """
        start   4
        movl    $0x0fffffff, 0xe0(%rbx)
        movl    $0x11 << 24, 0xd0(%rbx)
1:      rep nop
        cmpl    $3, TABLE
        jb      1b
        sti
        ipi     $0x13 << 24, $0x838             # cluster 1, members 0 and 1
        ipi     $0x21 << 24, $0x838
"""
        + taken(3)
        + """
        jmp     done
ap:     movl    $0x0fffffff, 0xe0(%rbx)
        mov     clusters(, %rdi, 4), %eax
        mov     %eax, 0xd0(%rbx)
        lock incl TABLE
        sti
1:      hlt
        jmp     1b
        .balign 4
clusters:
        .long   0, 0x12 << 24, 0x14 << 24, 0x21 << 24
""",
        backend=backend,
    )
    assert words(done, 4, COUNTS) == [1, 1, 0, 1]


@each_backend
def test_an_nmi_wakes_a_cpu_that_listens_to_nothing_else(backend):
    done = finished(
        """
        gate    2, nmi
        start   2
        ipi     $1 << 24, $0x400
1:      rep nop
        cmpl    $1, TABLE
        jb      1b
        mov     TABLE, %rax
        jmp     done
nmi:    lock incl TABLE
        iretq
ap:     cli
        hlt
        jmp     ap
""",
        cpus=2,
        backend=backend,
    )
    assert done.result == 1


@each_backend
def test_init_stops_a_running_cpu_and_a_start_up_message_begins_it_anew(backend):
    """What it was about is gone; its registers are as INIT leaves them, its FPU and its MSRs are not touched."""
    done = finished(
        """
        start   2
1:      rep nop
        cmpl    $1000, TABLE                    # it runs
        jb      1b
        ipi     $1 << 24, $0x608                # a start-up message does nothing to a CPU that runs
        mov     TABLE, %ecx
1:      rep nop
        cmp     %ecx, TABLE
        je      1b
        ipi     $1 << 24, $0x4500
        mov     TABLE, %r8d
        mov     $0x20000, %ecx
1:      rep nop
        loop    1b
        sub     TABLE, %r8d                     # it has stopped
        movl    $1, TABLE + 8
        ipi     $1 << 24, $0x4600 | (AT >> 12)
1:      rep nop
        cmpl    $2, TABLE + 8
        jne     1b
        mov     %r8, %rax
        jmp     done
ap:     cmpl    $1, TABLE + 8
        je      again
        mov     $0xc0000103, %ecx               # TSC_AUX
        mov     $0x77, %eax
        xor     %edx, %edx
        wrmsr
        mov     $0x55, %r15d
        sti
1:      lock incl TABLE
        jmp     1b
again:  rdtscp
        mov     %ecx, TABLE + 16
        mov     %r15, TABLE + 24
        movl    $2, TABLE + 8
        hlt
""",
        cpus=2,
        backend=backend,
    )
    assert done.result == 0
    assert words(done, 2, TABLE + 16) == [0x77, 0]


@each_backend
def test_each_has_a_time_stamp_counter_of_its_own(backend):
    done = finished(
        """
        start   2
        movl    $1, TABLE
1:      rep nop
        cmpl    $2, TABLE
        jne     1b
        rdtsc
        mov     %edx, %eax                      # nothing of the other's
1:      rep nop
        cmpl    $0, TABLE + 8
        je      1b
        jmp     done
ap:     rep nop
        cmpl    $1, TABLE
        jne     ap
        mov     $0x10, %ecx
        xor     %eax, %eax
        mov     $0x777, %edx
        wrmsr
        movl    $2, TABLE
        rdtsc
        mov     %rdx, TABLE + 8
        hlt
""",
        cpus=2,
        backend=backend,
    )
    assert done.result < 0x100 and done.word(TABLE + 8) == 0x777


@each_backend
def test_a_breakpoint_is_of_one_cpu(backend):
    """Armed on the second, it is met there and passed by on the first, which runs the same code in between."""
    done = finished(
        """
        start   2
        lea     traps(%rip), %r15
1:      call    both
        cmpl    $50, TABLE
        jb      1b
        mov     %r14, %rax
        jmp     done
both:   rep nop
here:   nop
        ret
ap:     mov     $here, %eax
        mov     %rax, %dr0
        mov     $0x402, %eax
        mov     %rax, %dr7
        mov     $0x2f0000, %r14d                # a log of its own
        lea     skip(%rip), %r15
1:      call    both
skip:   lock incl TABLE
        pop     %rax
        jmp     1b
traps:  ud2
""",
        cpus=2,
        backend=backend,
    )
    assert done.result == 0x300000, "no trap on the first"
    assert done.word(0x2F0000) == 1 and done.word(0x2F0010) == done.labels["here"]


# --- what they share

CHANGED_CODE = """
        start   2
        xor     %r8, %r8
        mov     $1, %ecx
2:      mov     %ecx, patched + 1               # code that the other runs, and this CPU too
        call    patched
        cmp     %eax, %ecx
        jne     1f
1:      rep nop
        cmp     %ecx, TABLE
        jne     1b
        inc     %ecx
        cmp     $200, %ecx
        jne     2b
        mov     %rcx, %rax
        jmp     done
ap:     call    patched
        mov     %eax, TABLE
        rep nop
        jmp     ap
        .balign 64
patched:
        mov     $0, %eax
        ret
"""


@each_backend
def test_what_one_cpu_writes_into_code_the_other_runs(backend):
    assert finished(CHANGED_CODE, cpus=2, backend=backend).result == 200


def test_a_planted_engine_for_each_cpu_runs_stale_code():
    """Why there is one: translations of another engine are dropped by nobody."""

    def alone(ram, bus, intr, clock, first=None, /):
        return EmuCpu(ram, bus, intr, clock)

    with closing(program(CHANGED_CODE, cpus=2, make_cpu=alone).machine) as machine:
        assert machine.run(until_ns=2_000_000) == Stopped(StopReason.TIME)


OWN_PAGES = """
        start   2
        mov     $0x2d0000, %edi                 # one page, 0x40000000, of its own
        call    own
        mov     $0x1111, %esi
        jmp     use
own:    mov     %cr3, %rsi                      # copies of the tables above it
        mov     %rdi, %r8
        call    copy
        mov     %r8, %rax
        or      $3, %eax
        lea     0x1000(%r8), %rdi
        mov     (%r8), %rsi
        and     $-4096, %rsi
        call    copy
        lea     0x1003(%r8), %rax
        mov     %rax, (%r8)
        lea     0x2003(%r8), %rax
        mov     %rax, 0x1008(%r8)
        lea     0x3003(%r8), %rax
        mov     %rax, 0x2000(%r8)
        lea     0x4003(%r8), %rax
        mov     %rax, 0x3000(%r8)
        mov     %r8, %cr3
        ret
copy:   mov     $512, %ecx
        cld
        rep movsq
        ret
use:    mov     %rsi, 0x40000000
        lock incl TABLE
        mov     $2000, %ecx
1:      rep nop
        cmp     %rsi, 0x40000000
        jne     wrong
        loop    1b
        lock incl TABLE + 8
2:      rep nop
        cmpl    $2, TABLE + 8
        jb      2b
        xor     %eax, %eax
        jmp     done
wrong:  mov     $1, %eax
        jmp     done
ap:     mov     $0x2c0000, %edi
        call    own
        mov     $0x2222, %esi
        jmp     use
"""


@each_backend
def test_each_has_its_own_translations(backend):
    done = finished(OWN_PAGES, cpus=2, backend=backend)
    assert done.result == 0 and (done.word(0x2D4000), done.word(0x2C4000)) == (0x1111, 0x2222)


def test_a_planted_turn_that_keeps_translations_is_found(monkeypatch):
    def put_on(self, cpu):
        if cpu is not self.on:
            self._swap(cpu)
            self.engine.settle_down()

    monkeypatch.setattr(Core, "put_on", put_on)
    assert finished(OWN_PAGES, cpus=2).result == 1


@each_backend
def test_a_triple_fault_of_one_is_the_machines(backend):
    with closing(program("""
        start   2
1:      rep nop
        jmp     1b
ap:     lidt    none(%rip)
        ud2
none:   .word   0
        .quad   0
""", cpus=2, backend=backend).machine) as machine:  # fmt: skip
        assert machine.run() == Stopped(StopReason.TRIPLE_FAULT)


# --- turns

SPINS = """
        start   2
        movl    $1, TABLE
1:      {wait}
        cmpl    $2, TABLE
        jne     1b
        jmp     done
ap:     cmpl    $1, TABLE
        jne     ap
        movl    $2, TABLE
        hlt
"""


def test_who_spins_with_pause_gives_its_turn_up():
    times = []
    for wait in ("rep nop", "nop"):
        done = finished(SPINS.format(wait=wait), cpus=2)
        times.append(done.machine.clock.now_ns())
    assert times[1] - times[0] > EmuCpu.turn_ns // 2, "without it, at its turn's end"


def test_two_that_compute_share_the_time():
    with closing(program("""
        start   2
        xor     %edi, %edi
ap:     incq    TABLE(, %rdi, 8)
        jmp     ap
""", cpus=2).machine) as machine:  # fmt: skip
        machine.run(until_ns=10_000_000)
        counts = [int.from_bytes(machine.ram.slice(TABLE + 8 * n, 8), "little") for n in range(2)]
        assert abs(counts[0] - counts[1]) < sum(counts) // 10 and machine.turns.state.pauses < PATIENCE


BUSY = """
        start   4
        movl    $0x20000, 0x320(%rbx)           # its timer, masked, for the time it takes
        sti
        jmp     work
ap:     sti
work:   mov     $1, %ecx                        # a lock, spun for with PAUSE
1:      xor     %eax, %eax
        lock cmpxchg %ecx, TABLE
        je      2f
        rep nop
        jmp     1b
2:      incq    TABLE + 8
        mov     TABLE + 8, %r8
        imul    $31, TABLE + 16, %r9
        add     %rdi, %r9
        mov     %r9, TABLE + 16                 # who had it when
        mov     %r8d, patch + 1
        call    patch
        add     %rax, TABLE + 24
        movl    $0, TABLE
        lea     1(%rdi), %eax                   # wakes the next
        and     $3, %eax
        shl     $24, %eax
        mov     %eax, 0x310(%rbx)
        movl    $0x38, 0x300(%rbx)
        test    $3, %r8b
        jnz     work
        cmp     $3, %edi                        # the last one stops another now and then
        jne     3f
        test    $31, %r8b
        jnz     3f
        ipi     $2 << 24, $0x4500
        ipi     $2 << 24, $0x4600 | (AT >> 12)
3:      hlt
        jmp     work
        .balign 64
patch:  mov     $0, %eax
        ret
"""


@pytest.mark.no_roundtrip("it cuts by itself")
@pytest.mark.parametrize(("count", "every"), [(1200, 17), pytest.param(12_000, 12, marks=pytest.mark.slow)])
def test_a_cut_anywhere_leaves_no_trace(count, every, tmp_path):
    """Locks, messages to CPUs that halt, code that is changed, INIT of one that runs."""

    def boot():
        return program(BUSY).machine

    with closing(boot()) as machine:
        machine.run(until_ns=100_000)
        first = machine.position
    with closing(cut_at_each(boot, first, count, every, tmp_path)) as machine:
        ran = [int.from_bytes(machine.ram.slice(COUNTS + 8 * n, 8), "little") for n in range(4)]
    assert sum(ran) >= 20


@pytest.mark.no_roundtrip("it cuts by itself")
def test_a_rewound_machine_runs_as_the_first_time():
    with closing(program(BUSY).machine) as machine:
        machine.run(until_ns=300_000)
        moment = machine.moment()
        ends = []
        for _ in range(3):
            machine.run(until_ns=900_000)
            ends.append(machine.digests())
            machine.rewind(moment, verify=True)
        assert ends[0] == ends[1] == ends[2]


@pytest.mark.slow
@pytest.mark.no_roundtrip("it rewinds by itself")
def test_ten_thousand_verified():
    draw = random.Random("verified")
    with closing(program(BUSY).machine) as machine:
        machine.run(until_ns=300_000)
        moment = machine.moment()
        for _ in range(10_000):
            machine.run(position=machine.position + draw.randrange(1, 20_000))
            machine.rewind(moment, verify=True)


# --- a file


def test_a_turn_of_nobodys_is_refused(tmp_path):
    with closing(program(SLEEP, cpus=2).machine) as machine:
        machine.turns.state.current = 1
        machine.save(tmp_path / "two")
        machine.turns.state.current = 2
        machine.cpus = (*machine.cpus, machine.cpus[0])  # or it could not be saved
        machine.turns.replace(machine.cpus)
        machine.save(tmp_path / "none")
    with Machine.restore(tmp_path / "two") as woken:
        assert woken.turns.state.current == 1
    with pytest.raises(SnapshotError, match=r"smp\.current: there is no CPU 2$"):
        Machine.restore(tmp_path / "none")


def test_where_there_is_one_cpu():
    with pytest.raises(RequestError, match="board isapc has one CPU, not 2"):
        Machine.boot(MachineConfig(cpus=2), Image(b"\xf4", flat=True))
    with pytest.raises(RequestError, match="board pc has 1 to 64 CPUs, not 65"):
        Machine.boot(MachineConfig(cpus=65, board="pc"), Image(b"\xf4", flat=True))


def test_sixty_four(tmp_path):
    done = finished("start 64; mov $64, %eax; jmp done" + SLEEP, cpus=64)
    assert done.result == 64
    done.machine.save(tmp_path / "many")
    with Machine.restore(tmp_path / "many") as woken:
        assert woken.digests() == done.machine.digests()


SUMS = """
        start   2
        jmp     sum
ap:     sti
sum:    incq    TABLE(, %rdi, 8)                # its own,
        mov     TABLE(, %rdi, 8), %rax
        add     %rax, TABLE + 16(, %rdi, 8)     # and the sum of all it has had
        mov     %rdi, %rcx
        xor     $1, %ecx
        shl     $24, %ecx
        mov     %ecx, 0x310(%rbx)
        test    $1023, %eax
        jnz     1f
        movl    $0x38, 0x300(%rbx)
1:      cmp     $20000, %rax
        jb      sum
        lock incl TABLE + 32
2:      rep nop
        cmpl    $2, TABLE + 32
        jb      2b
        test    %edi, %edi
        jz      done
        hlt
"""


def test_two_cpus_go_on_where_they_were_on_the_other_backend(kvm, tmp_path):
    """From one to the other and back, several times; what each has summed up is as if it had stayed."""
    done, there = program(SUMS, cpus=2), ("emu", kvm)
    machine = done.machine
    for life in range(6):
        machine.run(until_ns=machine.clock.now_ns() + 100_000)
        machine.save(tmp_path / f"{life}")
        machine.close()
        machine = Machine.restore(tmp_path / f"{life}", there[(life + 1) % 2], allow=("tsc-rate",))
    done.machine = machine
    done.finish()
    count = 20_000
    assert words(done, 4) == [count, count, count * (count + 1) // 2, count * (count + 1) // 2]
    machine.close()
