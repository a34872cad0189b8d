"""What this backend counts, how it carries events, and what a step of it does to R11."""

from __future__ import annotations

import pytest

from kvmbackend import abi, state
from kvmbackend.alarm import Alarm
from kvmbackend.step import Stepper
from kvmbackend.vm import Vcpu, Vm
from tests.vmm.cpu.program import Program
from vmm.cpu.protocol import CpuState, EventState
from vmm.dirty_pages import PAGE
from vmm.ram import Ram

TF = 1 << 8


def test_exits_are_counted(kvm):
    source = """
        mov     $0x61, %edx
        in      (%dx), %al
        in      (%dx), %al
        out     %al, (%dx)
        mov     $0xd0000000, %ebx
        mov     (%rbx), %eax
        mov     (%rbx), %eax
        mov     (%rbx), %eax
        pic     0x30
        mov     $0x30, %al                      # counter 0, once, in a millisecond
        out     %al, $0x43
        mov     $0xa9, %al
        out     %al, $0x40
        mov     $4, %al
        out     %al, $0x40
        sti
        hlt
        jmp     done
"""
    program = Program(source, kvm)
    assert not any(program.machine.cpu.exits().values())
    exits = program.finish().machine.cpu.exits()
    assert (exits["port_in"], exits["mmio"], exits["interrupt"], exits["emulated"], exits["msr"]) == (2, 3, 1, 0, 0)
    assert exits["port_out"] + exits["posted"] == 1 + 5 + 3 + 1 + 1  # and the EOI, and the end
    assert exits["halt"] == 1 and exits["window"] >= 0 and exits["signal"] >= 0


def test_a_run_that_is_cut_by_time_is_a_signal(kvm):
    program = Program("1: jmp 1b", kvm)
    program.machine.run(until_ns=20_000_000)
    assert program.machine.cpu.exits()["signal"] >= 1


def test_a_window_is_waited_for_where_interrupts_are_off(kvm):
    """The pin is high all the while; the interrupt comes behind STI."""
    source = """
        pic     0x30
        mov     $0x30, %al
        out     %al, $0x43
        mov     $10, %al
        out     %al, $0x40
        xor     %eax, %eax
        out     %al, $0x40
        mov     $200, %ecx
        mov     $0x61, %edx
1:      in      (%dx), %al
        loop    1b
        sti
2:      in      (%dx), %al
        cmp     $0x300000, %r14d
        je      2b
        jmp     done
"""
    program = Program(source, kvm).finish()
    assert [trap.vector for trap in program.traps] == [0x30]
    assert program.machine.cpu.exits()["window"] in (0, 1)


@pytest.fixture
def vcpu(kvm):
    vm = Vm(Ram.fresh(PAGE))
    vcpu = Vcpu(vm)
    yield vcpu
    vcpu.close()
    vm.close()


@pytest.mark.parametrize("kind", ["interrupt", "nmi", "exception"])
def test_an_event_is_carried(vcpu, kind):
    error = 0x18 if kind == "exception" else None
    event = EventState(kind=kind, vector=2 if kind == "nmi" else 13, error_code=error)
    state.load(vcpu.fd, CpuState(event=event, rflags=0x202))
    assert state.save(vcpu.fd, False, 0).event == event


def test_sysret_steps_with_a_trap_flag_and_leaves_none(vcpu, monkeypatch):
    seen = []
    alarm = Alarm(vcpu.fd)
    stepper = Stepper(vcpu, Ram.fresh(PAGE), alarm, lambda reason: None, lambda: CpuState())

    def r11() -> int:
        regs = abi.Regs()
        abi.call("KVM_GET_REGS", vcpu.fd, abi.GET_REGS, regs)
        return int(regs.r11)

    monkeypatch.setattr(stepper, "_until", lambda wanted: seen.append(r11()))
    state.load(vcpu.fd, CpuState(r11=0x202))
    stepper.instruction(True)
    stepper.instruction(False)
    assert seen == [0x202 | TF, 0x202] and r11() == 0x202
    stepper.close()
    alarm.close()
