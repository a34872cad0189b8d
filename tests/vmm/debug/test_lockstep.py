"""Lockstep: two CPUs that agree are found to agree, and a planted fault is found at its very instruction."""

from __future__ import annotations

import dataclasses

import pytest

from tests.conftest import BACKENDS, OWN
from tests.vmm.cpu.hosts import host
from tests.vmm.cpu.program import Program
from tests.vmm.cpu.several import SEVERAL, TABLE
from vmm.debug.lockstep import Lockstep
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason

START, COUNT = 4_477_000, 6_000  # system calls, a fault, port I/O, a halt and a tick lie ahead
QUIET = 300_000  # a user program with nothing of the sort
each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def save_own(file, position):
    with Machine.boot(MachineConfig(memory_bytes=8 << 20), Image.from_files(OWN, flat=True)) as machine:
        assert machine.run(position=position) == Stopped(StopReason.POSITION)
        machine.save(file)
    return file


@pytest.fixture
def snapshot(backend, tmp_path):
    """The own guest, from where the two CPUs of this host are known to agree."""
    quiet = backend == "kvm" and host() == "qemu-svm"
    return save_own(tmp_path / "own", QUIET if quiet else START)


def far(backend):
    """A step on emulated KVM takes milliseconds."""
    return 900 if backend == "kvm" and host() == "qemu-svm" else COUNT


def change_cpu(machine, **fields):
    machine.cpu.load(dataclasses.replace(machine.cpu.save(), **fields))


def wrong_flag(machine, _):
    change_cpu(machine, rflags=machine.cpu.save().rflags ^ 0x400)  # DF: no instruction leaves it undefined


def wrong_msr(machine, _):
    change_cpu(machine, cstar=machine.cpu.save().cstar ^ 0x1000)


def corrupted_byte(machine, _):
    machine.ram.slice(0x7F_F123, 1)[0] ^= 0x5A


FAULTS = {
    "a wrong flag": (wrong_flag, "cpu.rflags"),
    "a wrong MSR": (wrong_msr, "cpu.cstar"),
    "a corrupted byte of RAM": (corrupted_byte, None),
}


@pytest.fixture(autouse=True)
def able(request):
    if "kvm" in request.node.name:
        request.getfixturevalue("crossing")


@each_backend
def test_two_cpus_agree(backend, snapshot):
    """The leader takes interrupts, faults and system calls on the way: the test would be empty without."""
    with Lockstep(snapshot, "emu", backend) as lockstep:
        before = lockstep.leader.exits()
        found = lockstep.run(far(backend))
        after = lockstep.leader.exits()
    assert found is None
    assert lockstep.count == far(backend)
    if backend == "kvm" and host() == "qemu-svm":
        return
    for reason in ("exception", "interrupt", "halt", "port_out"):
        assert after[reason] > before[reason], reason


@each_backend
def test_two_cpus_agree_about_their_apics(backend, tmp_path):
    """Its MSRs, its memory read and written, and CR8, by step: each leaves a guest on KVM in a way of its own."""
    source = """
        mov     $0xfee00000, %ebx
        movl    $0x1ff, 0xf0(%rbx)
        movl    $0x40034, 0x320(%rbx)
        pause
        mov     $0x1b, %ecx
        rdmsr
        wrmsr
        mov     $0x6e0, %ecx
        xor     %eax, %eax
        xor     %edx, %edx
        wrmsr
        rdmsr
        mov     $3, %esi
        mov     %rsi, %cr8
        mov     0x80(%rbx), %edi
        movl    $0x50, 0x80(%rbx)
        mov     %cr8, %rsi
1:      inc     %r8
        jmp     1b
"""
    program = Program(source, "emu", board="pc").pause()
    program.machine.save(tmp_path / "apic")
    program.machine.close()
    with Lockstep(tmp_path / "apic", "emu", backend) as lockstep:
        assert lockstep.run(30) is None
        seen = lockstep.leader.cpu.save()
    assert seen.rdi == 0x30 and seen.rsi == 5


def test_a_fault_nobody_planted(crossing, tmp_path):
    """SYSCALL of QEMU 7.2's processor loses the arithmetic flags: R11 has them, RFLAGS has not."""
    if host() != "qemu-svm":
        pytest.skip("this host's processor is not QEMU's")
    with Lockstep(save_own(tmp_path / "own", START), "emu", crossing) as lockstep:
        found = lockstep.run(COUNT)
    assert found is not None and found.disassembly == "syscall" and list(found.fields) == ["cpu.rflags"]


@each_backend
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_at_its_instruction(backend, name, snapshot, tmp_path):
    fault, field = FAULTS[name]
    at = far(backend) * 5 // 9

    def plant(machine, count):
        if count == at:
            fault(machine, count)

    with Lockstep(snapshot, "emu", backend, plant) as lockstep:
        found = lockstep.run(far(backend))
        assert found is not None and found.instruction == at - 1
        if field is None:
            assert [(address, bytes(a ^ b for a, b in zip(x, y, strict=True))) for address, x, y in found.memory] == [
                (0x7F_F120, bytes((0, 0, 0, 0x5A, 0, 0, 0, 0)))
            ]
        else:
            assert list(found.fields) == [field]
        lockstep.save_pair(found, tmp_path / "pair")
        assert found.disassembly and found.rip == lockstep.leader.cpu.save().rip
    for path in found.pair:
        Machine.check(path)


def test_an_interrupt_that_came_while_they_were_off(tmp_path):
    """It is taken behind the instruction after STI, which has several bytes."""
    program = Program("""
        pic     0x30
        mov     $0x34, %al                      # a tick in 4 of 1,193,182 to the second
        out     %al, $0x43
        mov     $4, %al
        out     %al, $0x40
        xor     %al, %al
        out     %al, $0x40
1:      cli
        mov     $5000, %ecx
2:      loop    2b
        mov     $0x300000, %r14d                # the traps' log begins anew
        sti
        nopl    0(%rax, %rax)
        jmp     1b
    """)
    with program.machine as machine:
        machine.run(position=200_000)
        machine.save(tmp_path / "s")
    with Lockstep(tmp_path / "s", "emu", "emu") as lockstep:
        assert lockstep.run(30_000) is None
        assert lockstep.leader.exits()["interrupt"] > 0


AT_WORK = """
        start   3
        pause
        jmp     ap
"""
SEVERAL_AT_WORK = {  # and for how many instructions
    "spinning": (COUNT, f"""{AT_WORK}
ap:     sti
1:      lock incq TABLE(, %rdi, 8)
        rep nop
        test    $7, %dil
        jnz     1b
        ipi     $0, $0xc0038
        jmp     1b
"""),
    "asleep": (2000, f"""{AT_WORK}
ap:     sti
1:      lock incq TABLE(, %rdi, 8)
        ipi     $0, $0xc0038
        hlt
        jmp     1b
"""),
}  # fmt: skip


@each_backend
@pytest.mark.parametrize("name", SEVERAL_AT_WORK)
def test_two_machines_with_three_cpus(backend, name, tmp_path):
    """In lockstep they agree; a fault in one CPU is found at its instruction, and which CPU's it is."""
    most, source = SEVERAL_AT_WORK[name]
    count = min(far(backend), most)
    program = Program(SEVERAL + source, board="pc", cpus=3).pause()
    program.machine.save(tmp_path / "three")
    program.machine.close()
    with Lockstep(tmp_path / "three", "emu", backend) as lockstep:
        assert lockstep.run(count) is None
        assert all(lockstep.leader.ram.read(TABLE + 8 * cpu, 1) != b"\0" for cpu in range(3)), "each had its turn"

    def plant(machine, done):
        if done == count - 321:
            cpu = machine.cpus[2]
            cpu.load(dataclasses.replace(cpu.save(), r9=7))

    with Lockstep(tmp_path / "three", "emu", backend, plant) as lockstep:
        found = lockstep.run(count)
        assert found is not None and found.fields["cpu.2.r9"] == (0, 7)
