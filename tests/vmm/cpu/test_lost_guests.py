"""What a guest does to itself ends its own run, by name: never the process, never the wait for it."""

from __future__ import annotations

import dataclasses

import pytest

from tests.vmm.cpu.program import Program
from vmm.cpu.protocol import EventState
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig
from vmm.machine.stop import Fault, Stopped, StopReason

_LOST_HANDLER = """
        movl    $0xffffdead, 0x3010e8           # #PF's handler: canonical, and not mapped
        {ist}
        movabs  $0xffffdeadbeef0000, %rax
        mov     (%rax), %rbx
        jmp     done"""


def run_to_its_end(source: str) -> object:
    return Program(source).machine.run(until_ns=10**9)


def test_a_handler_that_cannot_be_fetched():
    """On a stack of its own it is delivered for ever: there is nothing that would end it."""
    stop = run_to_its_end(_LOST_HANDLER.format(ist="movb $1, 0x3010e4; movq $0x90000, 0x24"))
    assert isinstance(stop, Fault) and "cannot be fetched" in stop.why


def test_the_same_on_a_stack_that_comes_to_its_end():
    stop = run_to_its_end(_LOST_HANDLER.format(ist=""))
    assert isinstance(stop, Fault) or stop == Stopped(StopReason.TRIPLE_FAULT)


def test_the_next_run_says_the_same_again():
    machine = Program(_LOST_HANDLER.format(ist="movb $1, 0x3010e4; movq $0x90000, 0x24")).machine
    assert machine.run(until_ns=10**9) == machine.run(until_ns=10**9)


def test_reserved_bits_of_a_page_table_in_the_way_of_an_int():
    assert run_to_its_end("""
        mov     %cr3, %rax
        movabs  $0x0000200000000003, %rbx       # a page directory at 2**45
        mov     %rbx, 8(%rax)
        movw    $0xfff, 0x200000
        movabs  $0x8000000000, %rbx
        mov     %rbx, 0x200002
        lidt    0x200000
        int     $0x80""") == Stopped(StopReason.TRIPLE_FAULT)


def test_code_at_address_zero_is_code():
    program = Program("""
        lea     code(%rip), %rsi
        xor     %edi, %edi
        mov     $end - code, %ecx
        rep     movsb
        xor     %eax, %eax
        jmp     *%rax
code:   mov     $5, %eax
        mov     $done, %ebx
        jmp     *%rbx
end:""").finish()
    assert program.result == 5


@pytest.mark.parametrize("address", [0, 0x10])
@pytest.mark.parametrize("prepaid", [0, 3])
def test_code_at_address_zero_in_the_middle_of_a_block(address, prepaid):
    """Two HLTs behind INC: what is prepaid and comes to nothing does not hold the run."""
    machine = Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xf4", flat=True))
    machine.ram.write(address, bytes.fromhex("ffc0f4f4"))
    state = machine.cpus[0].save()
    machine.cpus[0].load(dataclasses.replace(state, rip=address, rax=0))
    machine.clock.skip(1000)
    machine.clock.load(dataclasses.replace(machine.clock.save(), position=100, prepaid=prepaid))
    assert machine.run() == Stopped(StopReason.HALTED)
    assert machine.cpus[0].save().rax == 1
    assert machine.clock.prepaid == 0


@pytest.mark.parametrize("kind", ["interrupt", "exception", "nmi"])
def test_an_event_whose_tables_are_not_mapped(kind):
    """It is delivered within the engine's own run, whatever it leads to."""
    program = Program("pause; jmp done").pause()
    machine = program.machine
    vector = {"interrupt": 0x40, "exception": 14, "nmi": 2}[kind]
    event = EventState(kind=kind, vector=vector, error_code=0 if kind == "exception" else None)
    state = machine.cpus[0].save()
    tables = dataclasses.replace(state.idtr, base=0xFFFF_DEAD_0000_0000)
    machine.cpus[0].load(dataclasses.replace(state, event=event, idtr=tables, rflags=0x202))
    assert machine.run(until_ns=10**9) == Stopped(StopReason.TRIPLE_FAULT)


def test_an_interrupt_whose_delivery_faults_is_acknowledged_once():
    """#GP's handler goes on with interrupts on; the timer's request was taken off the PIC by the first INTA."""
    program = Program("""
        pic     0x50                            # vectors beyond the IDT
        mov     $0x30, %al                      # the timer, once
        out     %al, $0x43
        mov     $10, %al
        out     %al, $0x40
        xor     %al, %al
        out     %al, $0x40
        lea     after(%rip), %r15
        sti
1:      jmp     1b
after:  sti
        mov     $100000, %ecx
1:      loop    1b
        jmp     done""").finish()
    assert [trap.vector for trap in program.traps] == [13]
