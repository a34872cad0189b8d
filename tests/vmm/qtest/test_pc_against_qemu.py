"""The chips that board "pc" has more than a PC/AT, against QEMU's of `-machine pc`, at random accesses and times.

Its HPET, I/O APIC and card are told to be of ours' kind where they can be: capabilities, version. The rest that differs
by choice has rows in docs/against-qemu.md.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import field
from typing import Annotated

import pytest

from snapshot.field_types import u32
from snapshot.schema import state
from tests.vmm.devices.pci.test_chipset import SPACES
from tests.vmm.qtest.test_against_qemu import PC_ROWS, Stream, play, text
from vmm.board import kinds
from vmm.board.config import DeviceConfig, MachineConfig
from vmm.devices.hpet import TICK_NS
from vmm.devices.pci.function import Bar, Function, FunctionState
from vmm.qtest.board import Command, OurBoard
from vmm.qtest.qemu import Qemu
from vmm.registers import reads

ADDRESS, DATA = 0xCF8, 0xCFC
IO_APIC, HPET, PM = 0xFEC0_0000, 0xFED0_0000, 0x600
FUNCTIONS = {"I440fx": 0, "Piix3": 1 << 3, "Piix4Pm": 1 << 3 | 3}
CARD = 3 << 3
EVERY = 0xFFFF_FFFF
ALIKE = (
    "-global", "hpet.msi=on", "-global", "hpet.hpet-intcap=0xf00000", "-global", "ioapic.version=0x11",
    "-device", "edu,addr=3",
)  # fmt: skip


@state("test.qtest.edu", version=1)
class EduState:
    """Nothing but where it is."""

    pci: Annotated[FunctionState, "configuration header"] = field(default_factory=FunctionState)
    unused: u32 = 0


class Edu(Function[EduState]):
    """What QEMU's educational device is at its first register."""

    State = EduState
    vendor, device, class_code, revision, pin = 0x1234, 0x11E8, 0x00FF00, 0x10, 1
    subsystem = 0x1AF4, 0x1100
    bars = {0: Bar(1 << 20, {"registers": 0})}

    @reads(0, bank="registers", size=4)
    def read_id(self) -> int:
        return 0x0100_00ED


@pytest.fixture
def both(monkeypatch) -> Iterator[tuple[OurBoard, Qemu]]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no qemu-system-x86_64 here (Debian: qemu-system-x86)")
    monkeypatch.setattr(kinds, "OURS", (*kinds.OURS, kinds.Kind("edu", Edu, space="pci")))
    kinds.kind.cache_clear()
    edu = DeviceConfig.of("edu", [("id", "edu"), ("slot", CARD >> 3)])
    with Qemu(options=ALIKE) as qemu:
        ours = OurBoard(MachineConfig(board="pc", devices=(edu,)))
        ours.play(Command("write", 4, HPET + 0x10, 1))  # as theirs, which keeps the time there
        yield ours, qemu
    kinds.kind.cache_clear()


@pytest.mark.parametrize(
    ("device", "accesses", "here", "there", "why"), PC_ROWS, ids=[f"{r[0]} {r[4][:40]}" for r in PC_ROWS]
)
def test_row(both, device, accesses, here, there, why):
    for command in text(accesses):
        answers = tuple(each.play(command) for each in both)
    assert answers == (int(here, 16), int(there, 16))


def step(ns: int) -> tuple[Command, int]:
    return Command("clock_step", value=-(-ns // Qemu.tick_ns) * Qemu.tick_ns), EVERY


def put(address: int, value: int, size: int = 4) -> tuple[Command, int]:
    return Command("write", size, address, value), EVERY


def get(address: int, size: int = 4, bits: int = EVERY) -> tuple[Command, int]:
    return Command("read", size, address), bits


def config(function: int, offset: int, size: int, value: int | None = None, bits: int = EVERY) -> Stream:
    """Read or write configuration space."""
    yield Command("out", 4, ADDRESS, 1 << 31 | function << 8 | offset & 0xFC), EVERY
    op = Command("in", size, DATA + (offset & 3)) if value is None else Command("out", size, DATA + (offset & 3), value)
    yield op, bits


def writable(name: str) -> bytes:
    """The bits of a configuration space that a guest can write, by the datasheet."""
    rows = next(rows for cls, rows in SPACES.items() if cls.__name__ == name)
    empty = f"| {bytes(16).hex()}"
    return b"".join(bytes.fromhex(rows.get(at, empty).split("|")[1]) for at in range(0, 256, 16))


def space(draw: random.Random, count: int, name: str) -> Stream:
    """Any access of a chipset's space. Theirs keeps reserved bits, and has other values at reset (rows): every byte is
    written first, and bits that the datasheet has are looked at. SMRAM's lock is a row."""
    function, kept = FUNCTIONS[name], bytearray(writable(name))
    if name == "I440fx":
        kept[0x72] = 0
    kept[4:6] = bytes(2)  # what these decode cannot be chosen (rows)
    for offset in range(0x40, 256):
        yield from config(function, offset, 1, 0)
    for _ in range(count):
        size = draw.choice((1, 2, 4))
        offset = draw.randrange(0, 256, size)
        if draw.random() < 0.5 and offset >= 0x40 and not (name == "I440fx" and offset <= 0x72 < offset + size):
            yield from config(function, offset, size, draw.getrandbits(8 * size))
        else:
            bits = int.from_bytes(kept[offset : offset + size], "little")
            fixed = EVERY if offset in (0, 8) and size == 4 else 0
            yield from config(function, offset, size, bits=bits | fixed)


def card(draw: random.Random, count: int) -> Stream:
    """A card's header: all of it but its capabilities. Its registers are where its BAR says, and nowhere else."""
    for _ in range(count):
        size = draw.choice((1, 2, 4))
        offset = draw.randrange(0, 0x40, size)
        match draw.randrange(6):
            case 0:
                yield from config(CARD, offset, size, draw.getrandbits(8 * size))
            case 1:
                yield from config(CARD, 0x10, 4, draw.choice((EVERY, 0xE000_0000 | draw.getrandbits(28), 0)))
            case 2:
                yield from config(CARD, 4, 2, draw.getrandbits(16) & ~4)
            case 3:
                yield from config(CARD, 0x10, 4, where := 0xE000_0000 | draw.randrange(16) << 20)
                yield from config(CARD, 4, 2, mapped := draw.choice((0, 2, 3, 7)))
                yield get(where, bits=0 if mapped == 0 else EVERY)
                beside = yield get(where ^ 1 << 20, bits=0)  # what nobody answers is a row
                assert beside == EVERY
            case _:
                bits = 0xFF_FFFF_FFFF & ~(0x10 << 16)  # whether there is a list of capabilities
                shown = bits >> 8 * (offset - 4) if 4 <= offset < 8 else EVERY
                yield from config(CARD, offset, size, bits=0 if offset <= 0x34 < offset + size else shown & EVERY)


def ioapic(draw: random.Random, count: int) -> Stream:
    """Registers by index. No line moves. The id has four bits of its eight in ours and theirs."""
    for _ in range(count):
        index = draw.choice((0, 1, 2, draw.randrange(0x10, 0x40), draw.randrange(0x10, 0x40), draw.randrange(256)))
        yield put(IO_APIC, index)
        if draw.random() < 0.5:
            value = draw.getrandbits(32)
            if index >= 0x10 and not index & 1:
                value &= 0x1AFFF  # delivery status and remote IRR cannot be written; what is reserved, a row
            if index >= 0x10 and index & 1:
                value &= 0xFF00_0000
            yield put(IO_APIC + 0x10, value)
        yield put(IO_APIC, index)
        yield get(IO_APIC + 0x10)
        yield get(IO_APIC)


def hpet(draw: random.Random, count: int) -> Stream:
    """Timers 1 and 2: the first keeps the time. Routes that there are, and comparators that are still to come (rows);
    their high half is 0."""
    periodic = {1: False, 2: False}
    for number in (1, 2):
        yield put(HPET + 0x10C + 32 * number, 0)
    for _ in range(count):
        number = draw.choice((1, 2))
        timer = HPET + 0x100 + 32 * number
        match draw.randrange(7):
            case 0:
                value = draw.getrandbits(16) & 0x4106 | draw.choice((0, 20, 21, 22, 23)) << 9
                value |= (value & 2) << 1  # a level shows whether it is enabled or not (row)
                periodic[number] = draw.random() < 0.5
                now = yield get(HPET + 0xF0)
                later = (now or 0) + draw.randrange(1, 1 << draw.choice((8, 20)))
                yield put(timer, value | (0x48 if periodic[number] else 0))  # VAL_SET is of periodic timers (row)
                yield put(timer + 8, later)
                if periodic[number]:
                    yield put(timer + 8, draw.randrange(1, 1 << draw.choice((8, 20))))
            case 1 if not periodic[number]:
                now = yield get(HPET + 0xF0)
                yield put(timer + 8, (now or 0) + draw.randrange(1, 1 << 20))
            case 2:
                yield put(timer + 0x10 + draw.choice((0, 4)), draw.getrandbits(32))
            case 3:
                yield put(HPET + 0x20, draw.choice((2, 4, 6)))
            case 4:
                yield step(draw.randrange(draw.choice((100, 10_000, 10_000_000))))
            case _:
                yield get(HPET + draw.choice((0, 4, 0x10, 0x14, 0x20, 0xF0, 0xF4)))
                for register in (0, 8, 12, 16, 20):
                    yield get(timer + register)


def pm(draw: random.Random, count: int) -> Stream:
    """PM1 and the timer, where the function puts them; nothing that ends the machine."""
    yield from config(FUNCTIONS["Piix4Pm"], 0x40, 4, PM | 1)
    yield from config(FUNCTIONS["Piix4Pm"], 0x80, 1, 1)
    for _ in range(count):
        match draw.randrange(6):
            case 0:
                yield Command("out", 2, PM, draw.getrandbits(16)), EVERY
            case 1:
                yield Command("out", 2, PM + 2, draw.getrandbits(16)), EVERY
            case 2:
                yield Command("out", 2, PM + 4, draw.getrandbits(16) & ~0x2000), EVERY
            case 3:
                yield step(draw.randrange(draw.choice((1000, 10**6, 3 * 10**9))))
            case _:
                register = draw.choice((0, 2, 4))
                yield Command("in", 2, PM + register), {0: EVERY, 2: 0x0521, 4: 0x1803}[register]  # reserved bits: rows
                yield Command("in", 4, PM + 8), EVERY


STREAMS: dict[str, Callable[[random.Random, int], Stream]] = {
    "I440fx": lambda draw, size: space(draw, 2000 * size, "I440fx"),
    "Piix3": lambda draw, size: space(draw, 2000 * size, "Piix3"),
    "Piix4Pm": lambda draw, size: space(draw, 2000 * size, "Piix4Pm"),
    "card": lambda draw, size: card(draw, 2000 * size),
    "ioapic": lambda draw, size: ioapic(draw, 1000 * size),
    "hpet": lambda draw, size: hpet(draw, 1500 * size),
    "pm": lambda draw, size: pm(draw, 800 * size),
}


@pytest.mark.parametrize("device", STREAMS)
def test_random_accesses(both, device):
    assert play(STREAMS[device](random.Random(device), 1), *both) >= 800


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("device", STREAMS)
def test_many_random_accesses(both, device, seed):
    play(STREAMS[device](random.Random(f"{device} {seed}"), 5), *both)


def test_its_clock():
    assert Qemu.tick_ns == TICK_NS
