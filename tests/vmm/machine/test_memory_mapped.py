"""What a device in memory does to a machine: its accesses cost time, its interrupts are taken where an undisturbed run
takes them, its writes of RAM are code that is run."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.conftest import BACKENDS
from tests.vmm import doorbell
from tests.vmm.cpu.program import PRELUDE, Program, assemble
from tests.vmm.machine.each_instruction import cut_at_each
from vmm.board import kinds
from vmm.board.config import DeviceConfig, MachineConfig
from vmm.device import Device
from vmm.errors import BackendError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, Stopped, StopReason
from vmm.ram import RamWindow
from vmm.registers import reads, writes
from vmm.testing.devices import check_device

pytestmark = pytest.mark.no_roundtrip("it cuts by itself")

BASE = doorbell.BASE
BELL = DeviceConfig.of("doorbell", [("id", "bell"), ("memory", hex(BASE)), ("irq", 5)])
OTHER = DeviceConfig.of("doorbell", [("id", "other"), ("memory", hex(BASE + 0x1000)), ("irq", 6)])

# Two bells, rung at once, after a while, and both at a time, in blocks of every shape. The controller ends interrupts
# by itself and the gates leave IF set, so that the second of two is taken at the first one's handler, before its first
# instruction: the one place where an interrupt rises and no time passes.
RINGING = """
        mov     $0x11, %al                      # both controllers: vectors from 0x30 and 0x38
        out     %al, $0x20
        out     %al, $0xa0
        mov     $0x30, %al
        out     %al, $0x21
        mov     $0x38, %al
        out     %al, $0xa1
        mov     $4, %al
        out     %al, $0x21
        mov     $2, %al
        out     %al, $0xa1
        mov     $3, %al                         # automatic EOI
        out     %al, $0x21
        mov     $1, %al
        out     %al, $0xa1
        mov     $0x9f, %al                      # only IRQ 5 and 6
        out     %al, $0x21
        mov     $0xff, %al
        out     %al, $0xa1
        mov     $0xd0000000, %ebx
        lea     quiet(%rip), %rax               # vector 0x35 goes here
        mov     %ax, 0x301000 + 16 * 0x35
        shr     $16, %rax
        mov     %ax, 0x301000 + 16 * 0x35 + 6
        movb    $0x8f, 0x301000 + 16 * 0x35 + 5
        lea     hush(%rip), %rax                # and 0x36 there
        mov     %ax, 0x301000 + 16 * 0x36
        shr     $16, %rax
        mov     %ax, 0x301000 + 16 * 0x36 + 6
        movb    $0x8f, 0x301000 + 16 * 0x36 + 5
        sti
again:  inc     %r8
        mov     %r8, (%rbx)                     # rings: the rest of the block runs first, then the handler
        lea     (%r8, %r8, 2), %r9
        xor     %r9, %r10
        add     $7, %r10
        cmp     $3, %r10
        ja      1f
        nop
1:      mov     %r8, %r11
        and     $0x3f, %r11
        add     $20, %r11
        mov     %r11, 8(%rbx)                   # rings in a while
        mov     (%rbx), %r12
        mov     $9, %ecx
2:      imul    $3, %r12, %r12
        add     %r8, %r12
        dec     %ecx
        jnz     2b
        cli
        mov     %r8, (%rbx)
        mov     %r8, 0x1000(%rbx)
        sti
        nop
        xor     %r12, %r10
        jmp     again
quiet:  incq    0x2fff00
        mov     %r12, 0x2fff08
        imul    $31, %r13, %r13                 # which came first is never forgotten
        add     %rsp, %r13
        mov     %rax, 32(%rbx)
        iretq
hush:   incq    0x2fff00
        add     %r12, 0x2fff08
        imul    $37, %r13, %r13
        add     %rsp, %r13
        mov     %rax, 0x1020(%rbx)
        iretq
"""


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(kinds, "OURS", (*kinds.OURS, doorbell.KIND))
    kinds.kind.cache_clear()
    yield
    kinds.kind.cache_clear()


def boot(source: str, backend: str = "emu") -> Machine:
    code, _ = assemble(PRELUDE + source)
    return Machine.boot(MachineConfig(memory_bytes=4 << 20, devices=(BELL, OTHER)), Image(code, flat=True), backend)


def test_it_is_a_device_as_others_are():
    check_device(doorbell.Doorbell)


def cuts(count: int, every: int, folder: Path) -> None:
    """Cut at each of `count` instructions of a run that rings, and run on to the same end."""
    with cut_at_each(lambda: boot(RINGING), 3000, count, every, folder) as machine:
        rung = int.from_bytes(machine.ram.read(0x2FFF00, 8), "little")
        assert rung > count // 40, "too few interrupts came"


def test_a_cut_around_an_interrupt_of_memory_leaves_no_trace(tmp_path):
    cuts(2000, 19, tmp_path)


@pytest.mark.slow
def test_a_cut_at_each_of_two_thousand_instructions_leaves_no_trace(tmp_path):
    cuts(2000, 1, tmp_path)


def test_an_access_costs_time_as_that_of_a_port_does():
    source = """
        mov     $0xd0000000, %ebx
        mov     $100, %ecx
1:      mov     (%ebx), %eax
        dec     %ecx
        jnz     1b
        jmp     done
    """
    with boot(source) as machine:
        machine.run()
        assert machine.clock.save().skipped_ns == (100 + 1) * 1000, "a hundred reads, and the OUT that ends it"


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_code_that_a_device_writes_is_run(backend):
    """mov $1, %eax; ret becomes mov $2, %eax; ret, by DMA, after the old code was run and translated."""
    source = """
        movl    $0x000001b8, 0x200000
        movl    $0x0000c300, 0x200004
        movb    $2, 0x210000
        mov     $0x200000, %edx
        call    *%rdx
        mov     %eax, %ebp
        mov     $0x0020000100210000, %rcx
        mov     $0xd0000010, %edi
        mov     %rcx, (%rdi)
        call    *%rdx
        shl     $8, %ebp
        or      %ebp, %eax
        jmp     done
    """
    with boot(source, backend) as machine:
        assert machine.run() == Stopped(StopReason.EXIT, 0x0102 << 1 & 0x1FF | 1)
        assert machine.ram.read(0x2FFFF0, 8) == (0x0102).to_bytes(8, "little")


@pytest.mark.parametrize("target", [0x200000, 0x1_0000_2000, 0x1_03FF_F000])
def test_code_anywhere_in_ram_is_dropped_when_the_host_changes_it(target):
    """Call it, change it, call it again: below 4 GiB and above, where the engine counts RAM by its own offsets."""
    code = b"\x48\xb8" + struct.pack("<Q", target) + b"\xff\xd0\xf4\xeb\xf1"  # mov rax, target; call rax; hlt; again
    with Machine.boot(MachineConfig(memory_bytes=(3 << 30) + (64 << 20)), Image(code, flat=True)) as machine:
        machine.ram.write(0xA000 + 8 * 4, struct.pack("<Q", (4 << 30) | 0x83))  # one more GiB is mapped
        for value in (1, 2, 3):
            machine.ram.write(target, b"\xbb" + struct.pack("<I", value) + b"\xc3")  # mov ebx, value; ret
            machine.cpu.discard_code(target, target + 6)
            state = machine.cpu.save()
            state.halted, state.rip = False, 0x100000
            machine.cpu.load(state)
            machine.run()
            assert machine.cpu.save().rbx == value


# --- a limit is absolute


def test_a_stop_does_not_move_what_happens_at_a_time():
    """nop; jmp: blocks of three bytes, and four bytes a ns."""
    with Machine.boot(MachineConfig(memory_bytes=4 << 20), Image(bytes.fromhex("90ebfd"), flat=True)) as machine:
        begin = machine.moment()
        machine.run(until_ns=1000)
        end = machine.position
        assert end == 4002
        for stop in (*range(2990, 3010), 3999, 4000, 4001):
            machine.rewind(begin)
            machine.run(position=stop)
            machine.run(until_ns=1000)
            assert machine.position == end, f"after a stop at {stop}"


def test_stops_at_any_times_do_not_move_a_timers_interrupt():
    draw, source = random.Random("times"), PIT
    with boot(source) as machine:
        machine.run(position=10_000)
        begin = machine.moment()
        machine.run(position=200_000)
        right = machine.digests()
        for _ in range(20):
            machine.rewind(begin)
            while machine.position < 200_000:
                if draw.random() < 0.5:
                    machine.run(position=min(200_000, machine.position + draw.randrange(1, 3000)))
                else:
                    machine.run(position=200_000, until_ns=machine.clock.now_ns() + draw.randrange(1, 1000))
            assert machine.digests() == right


PIT = """
        pic     0x30
        mov     $0x34, %al                      # counter 0, mode 2, every 30 clocks: 25 us
        out     %al, $0x43
        mov     $30, %al
        out     %al, $0x40
        xor     %al, %al
        out     %al, $0x40
        lea     tick(%rip), %rax
        mov     %ax, 0x301000 + 16 * 0x30
        shr     $16, %rax
        mov     %ax, 0x301000 + 16 * 0x30 + 6
        sti
1:      inc     %r8
        imul    $5, %r8, %r9
        test    $3, %r9b
        jz      1b
        xor     %r9, %r10
        jmp     1b
tick:   push    %rax
        incq    0x2fff00
        mov     %r8, 0x2fff08
        mov     $0x20, %al
        out     %al, $0x20
        pop     %rax
        iretq
"""


# --- a device's own RAM


def window_program(where: int) -> str:
    """Add one to a word at `where`, and tell it."""
    return f"""
        mov     ${where:#x}, %ebx
        incl    (%rbx)
        mov     (%rbx), %eax
        jmp     done
    """


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_ram_of_a_device_is_seen_where_it_is_mapped_and_nowhere_else(backend):
    where = 0xE100_3000
    program = Program(window_program(where), backend)
    window = program.machine.ram.window(64 << 10)
    window.view[0x3000:0x3004] = (41).to_bytes(4, "little")
    window.map(0xE100_0000)
    assert program.finish().result == 42
    assert int.from_bytes(window.view[0x3000:0x3004], "little") == 42


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_what_is_taken_away_floats_again(backend):
    where = 0xE100_3000
    program = Program(window_program(where), backend)
    window = program.machine.ram.window(64 << 10)
    window.map(0xE100_0000)
    window.unmap()
    assert program.finish().result == 0xFFFFFFFF


class Beside(Device[doorbell.DoorbellState]):
    """A register of eight bytes, read so often."""

    State = doorbell.DoorbellState
    read = 0

    @reads(0, size=8)
    def read_it(self) -> int:
        self.read += 1
        return 0


def test_a_hundred_moves_and_the_holes_around_them():
    """Addresses beside the window still come to the bus as themselves."""
    draw = random.Random("moves")
    for _ in range(4):
        where = draw.randrange(0xC800_0000, 0xF000_0000) & ~0xFFF
        program = Program(
            f"""
            mov     ${where:#x}, %ebx
            movl    $0x11223344, (%rbx)
            mov     -4(%rbx), %eax
            mov     0x10000(%rbx), %ecx
            jmp     done
            """
        )
        beside = Beside()
        program.machine.board.bus.memory.window(beside, width=8).map(where - 8)
        window = program.machine.ram.window(64 << 10)
        for _ in range(25):
            window.map(draw.randrange(0xC800_0000, 0xF000_0000) & ~0xFFF)
            program.machine.run(position=program.machine.position + 1)
        window.map(where)
        program.finish()
        assert int.from_bytes(window.view[:4], "little") == 0x11223344
        assert program.machine.cpu.save().rcx == 0xFFFFFFFF
        assert beside.read == 1, "the dword below the window is the upper half of the register there"


class Mover(Device[doorbell.DoorbellState]):
    """Its register is where a window of RAM is mapped."""

    State = doorbell.DoorbellState

    def __init__(self, window: RamWindow) -> None:
        super().__init__()
        self._window = window

    @writes(0, size=4)
    def move(self, value: int) -> None:
        self._window.map(value)


def test_a_stop_in_the_block_that_moves_memory_leaves_no_trace():
    """What the rest of that block sees is the old place. That is in no state, so the machine does not stop there."""
    source = """
        mov     $0xd0000000, %ebx
        mov     $0xe1000000, %esi
        mov     %esi, %edi
        mov     $20, %ecx
1:      mov     %esi, (%rbx)
        incl    (%rdi)                          # seen at the old place yet
        add     0x1000(%rdi), %r8d
        xor     $0x1000, %esi
        dec     %ecx
        jnz     1b
        mov     %r8d, %eax
        jmp     done
    """

    def run(stops: range) -> tuple[int, int]:
        program = Program(source)
        window = program.machine.ram.window(0x1000)
        program.machine.board.bus.memory.window(Mover(window), width=4).map(0xD000_0000)
        for stop in stops:
            program.machine.run(position=stop)
            changed = program.machine.cpu._core.ram_changed()  # type: ignore[attr-defined]
            assert not changed or not program.machine.clock.prepaid
        return program.finish().result, int.from_bytes(window.view[:4], "little")

    looking = Program(source)
    while looking.machine.cpu.save().rip != looking.labels["program"]:
        looking.machine.run(position=looking.machine.position + 1)
    begin = looking.machine.position
    right = run(range(0))
    assert right[1] > 5
    for first in range(1, 40, 7):
        assert run(range(begin + first, begin + 400, 3)) == right


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_rom_is_read_and_run_and_not_written(backend):
    """It holds a function that adds 1; the guest tries to make that 2, and calls it before and after."""
    program = Program(
        """
        mov     $0xe1000000, %ebx
        xor     %eax, %eax
        call    *%rbx
        movb    $2, 2(%rbx)
        lock orb $0xff, 2(%rbx)
        call    *%rbx
        mov     (%rbx), %ecx
        shl     $32, %rcx
        or      %rcx, %rax
        jmp     done
        """,
        backend,
    )
    rom = program.machine.ram.window(64 << 10, writable=False)
    rom.view[:4] = bytes.fromhex("83c001c3")  # add eax, 1; ret
    try:
        rom.map(0xE100_0000)
        program.finish()
    except BackendError as error:
        pytest.skip(str(error))
    assert program.result == 0xC301C083 << 32 | 2 and bytes(rom.view[:4]) == bytes.fromhex("83c001c3")


def test_machines_ram_and_an_earlier_window_are_on_top():
    with Machine.boot(MachineConfig(memory_bytes=4 << 20), Image(b"\xf4", flat=True)) as machine:
        first, second = machine.ram.window(0x4000), machine.ram.window(0x10000)
        first.map(0xE000_4000)
        second.map(0xE000_0000)
        assert machine.ram.shown() == [
            (0xE000_4000, 0x4000, first.address, True),
            (0xE000_0000, 0x4000, second.address, True),
            (0xE000_8000, 0x8000, second.address + 0x8000, True),
        ]
        second.map(0x3F_8000)
        assert machine.ram.shown()[1:] == [(0x40_0000, 0x8000, second.address + 0x8000, True)]
        second.map(0x1_0000_0000)
        assert len(machine.ram.shown()) == 1, "above 4 GiB nothing is shown"
        with pytest.raises(ValueError, match="whole pages"):
            machine.ram.window(100)
