"""Every way an interrupt goes on board "pc", from a guest's point of view: a card's line through the PIIX3 and the I/O
APIC, its messages, HPET's messages, the local APIC's timer; while the card's registers are moved about."""

from __future__ import annotations

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cpu.program import PRELUDE, assemble
from tests.vmm.devices.pci.card import Card
from tests.vmm.machine.each_instruction import cut_at_each
from vmm.board import kinds
from vmm.board.config import DeviceConfig, MachineConfig
from vmm.guest.image import Image
from vmm.machine.machine import Machine

pytestmark = pytest.mark.no_roundtrip("it cuts by itself")

KIND = kinds.Kind("card", Card, space="pci")
BUSY = """
        .equ    EOI, 0xb0
        .equ    COUNTS, 0x2fff00                # eight bytes a vector, from 0x30 on
        .macro  config  register, value         # of the card
        mov     $0x80001800 + \\register, %eax
        mov     $0xcf8, %edx
        out     %eax, %dx
        mov     \\value, %eax
        mov     $0xcfc, %edx
        out     %eax, %dx
        .endm
        .macro  ends    vector
        incq    COUNTS + 8 * (\\vector - 0x30)
        imul    $31, %r13, %r13                 # which came when is never forgotten
        add     %r8, %r13
        add     (%rsp), %r13
        movl    $0, EOI(%rbx)
        iretq
        .endm
        gate    0x31, line
        gate    0x32, message
        gate    0x33, vector1
        gate    0x34, counter
        gate    0x35, timer
        mov     $0xfee00000, %ebx
        mov     $0xfec00000, %esi
        mov     $0xfed00000, %edi
        mov     $0xd0000000, %ebp
        movl    $0x1ff, 0xf0(%rbx)              # the local APIC is on,
        movl    $0x10000, 0x350(%rbx)           # and the 8259As are not heard
        movl    $0x10 + 2 * 11, (%rsi)          # PIRQ C is input 11: a level, low
        movl    $0xa031, 0x10(%rsi)
        config  0x10, %ebp
        config  0x14, $0xd0400000
        config  0x44, $0xfee00000
        config  0x4c, $0x32
        config  0x04, $0x6                      # memory, master
        mov     $0xd0400010, %eax               # MSI-X: vector 1
        movl    $0xfee00000, (%rax)
        movl    $0, 4(%rax)
        movl    $0x33, 8(%rax)
        movl    $0, 12(%rax)
        movl    $0x34, 0x130(%rdi)              # HPET's timer 1: by message
        movl    $0xfee00000, 0x134(%rdi)
        movl    $0x4104, 0x120(%rdi)            # and of 32 bits
        movl    $HPET, 0x128(%rdi)
        movl    $1, 0x10(%rdi)
        movl    $0xb, 0x3e0(%rbx)               # the local APIC's timer
        movl    $0x20035, 0x320(%rbx)
        movl    $TIMER, 0x380(%rbx)
        sti
again:  inc     %r8
        mov     %r8d, (%rbp)                    # scratch,
        movl    $0x2fff80, 4(%rbp)              # written to RAM
        mov     %r8d, 8(%rbp)
        add     0x2fff80, %r9
        movl    $1, 12(%rbp)                    # by its line, unless messages are on
        lea     (%r8, %r8, 2), %r10
        movl    $0, 12(%rbp)
        mov     %r8, %rcx
        and     $3, %ecx
        cmp     $1, %ecx
        jb      1f                              # every fourth time by nothing but the line
        je      2f
        config  0x58, $0x80000000               # MSI-X
        movl    $1, 16(%rbp)
        xor     %r9, %r10
        config  0x58, $0
        jmp     1f
2:      config  0x40, $0x10000                  # MSI
        movl    $1, 16(%rbp)
        add     %r9, %r10
        config  0x40, $0
1:      xor     $0x1000, %ebp                   # elsewhere
        cli                                     # whose handlers look there
        config  0x10, %ebp
        sti
        add     (%rbp), %r10
        xor     %r10, %r12
        cmp     $ROUNDS, %r8
        jb      again
        test    $3, %r8b
        jnz     again
        cmpq    $0, COUNTS + 8 * 4
        je      again
        cmpq    $0, COUNTS + 8 * 5
        je      again
        mov     %r8, %rax
        jmp     done
line:   movl    $0, 12(%rbp)
        ends    0x31
message:
        ends    0x32
vector1:
        ends    0x33
counter:
        push    %rax
        mov     0x128(%rdi), %eax
        add     $HPET, %eax
        mov     %eax, 0x128(%rdi)
        pop     %rax
        ends    0x34
timer:  ends    0x35
"""


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(kinds, "OURS", (*kinds.OURS, KIND))
    kinds.kind.cache_clear()
    yield
    kinds.kind.cache_clear()


# Guest ns between two of the local APIC's timer, tens of ns between two of HPET's. A KVM that is itself emulated takes
# milliseconds for one, and would see nothing else.
INTERVALS = {"emu": (47_000, 3_100), "kvm": (50_000_000, 3_000_000)}


def boot(backend: str = "emu", rounds: int = (1 << 31) - 1) -> Machine:
    timer, hpet = INTERVALS[backend]
    code, _ = assemble(f".equ ROUNDS, {rounds}\n.equ TIMER, {timer}\n.equ HPET, {hpet}\n{PRELUDE}{BUSY}")
    card = DeviceConfig.of("card", [("id", "card"), ("slot", 3)])
    return Machine.boot(
        MachineConfig(memory_bytes=4 << 20, board="pc", devices=(card,)), Image(code, flat=True), backend
    )


def counts(machine: Machine) -> list[int]:
    """How often each came: line, MSI, MSI-X, HPET, the local APIC's timer."""
    return [int.from_bytes(machine.ram.read(0x2FFF08 + 8 * i, 8), "little") for i in range(5)]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_each_way_arrives(backend):
    with boot(backend, 40) as machine:
        machine.run()
        line, message, vector, counter, timer = counts(machine)
        rounds = machine.cpus[0].save().r8
        assert line >= rounds // 2 and message == rounds // 4 and vector == rounds // 2
        assert counter and timer
        assert not any(machine.board.devices["lapic.0"].state.isr), "each was ended"
        assert machine.cpus[0].save().r9 == sum(range(1, rounds + 1)), "what was written to memory is there"


def cuts(count, every, folder):
    with cut_at_each(boot, 6000, count, every, folder) as machine:
        assert all(counts(machine)), "one of them never came"


def test_a_cut_around_each_kind_leaves_no_trace(tmp_path):
    cuts(1000, 29, tmp_path)


@pytest.mark.slow
def test_a_cut_at_each_of_a_thousand_instructions_leaves_no_trace(tmp_path):
    cuts(1000, 1, tmp_path)
