"""Posted writes: later than the guest wrote them, never behind another access, never lost."""

from __future__ import annotations

from tests.vmm.cpu.program import Program

LETTERS = "".join(f"mov ${ord(letter)}, %al; out %al, (%dx);" for letter in "hello")


def test_they_are_in_their_order_and_before_the_next_access(kvm):
    program = Program(f"mov $0x3f8, %edx; {LETTERS} pause; {LETTERS} jmp done", kvm).pause()
    assert program.machine.board.console.output == b"hello"
    assert program.machine.exits()["posted"] == 5
    program.finish()
    assert program.machine.board.console.output == b"hellohello"


def test_a_full_ring_loses_nothing(kvm):
    program = Program("mov $0x3f8, %edx; mov $1000, %ecx; 1: out %al, (%dx); dec %ecx; jnz 1b; jmp done", kvm).finish()
    assert program.machine.board.console.total == 1000


def test_they_end_when_a_write_has_an_effect(kvm):
    """With DLAB on the port is the divisor latch: it is written at once, and not sent."""
    setup = "mov $0x3fb, %edx; mov $0x83, %al; out %al, (%dx);"
    program = Program(f"{setup} mov $0x3f8, %edx; mov $7, %al; out %al, (%dx); pause; jmp done", kvm).pause()
    assert program.machine.exits()["posted"] == 0
    assert program.machine.board.devices["com1"].state.divisor == 7
    assert not program.machine.board.console.output


def test_a_snapshot_has_them(kvm, tmp_path):
    from vmm.machine.machine import Machine

    program = Program(f"mov $0x3f8, %edx; {LETTERS} 1: jmp 1b", kvm)
    program.machine.post(lambda machine: None)
    program.machine.board.console.watch("hello")
    program.machine.run(until="hello")
    program.machine.save(tmp_path / "posted")
    with Machine.restore(tmp_path / "posted", "emu") as woken:
        woken.run(position=woken.position + 100)
        assert not woken.board.console.output
