"""Our devices answer as QEMU's, a device oracle nobody here wrote, at random accesses and times; what they answer
otherwise by choice stands in docs/against-qemu.md, and each row of that is played.

A stream of accesses is a generator: it is sent what we answered, for a driver looks before it reads. Bits of an answer
that a row of the page speaks of are masked out, and accesses that would carry such a difference on are left out: where
that is done it says which row.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Generator, Iterator

import pytest

from tests.conftest import ROOT
from vmm.devices.isa.pit import Pit
from vmm.errors import BackendError
from vmm.qtest import board as qtest
from vmm.qtest.board import Command, OurBoard
from vmm.qtest.qemu import Qemu

Stream = Generator[tuple[Command, int], int | None, None]  # an access, and the bits of its answer that count
ALL = 0xFF
ROW = re.compile(r"^\| (\w+) \| `(.*?)` \| (0x\w+) \| (0x\w+) \| (.*) \|$", re.M)
ROWS, PC_ROWS = map(ROW.findall, (ROOT / "docs" / "against-qemu.md").read_text().split("\n## Board pc"))


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no qemu-system-x86_64 here (Debian: qemu-system-x86)")
    with Qemu() as found:
        yield found


def text(accesses: str) -> list[Command]:
    return [command for _, command in qtest.parse(accesses.replace(";", "\n"))]


def play(stream: Stream, ours: OurBoard, qemu: Qemu) -> int:
    """How many accesses were played."""
    history: list[str] = []
    answer = None
    try:
        while True:
            command, bits = stream.send(answer)
            answer, theirs = ours.play(command), qemu.play(command)
            history.append(f"{command}" + ("" if answer is None else f"  # {answer:#x}"))
            if answer is not None and (answer ^ (theirs or 0)) & bits:
                raise AssertionError("\n".join((*history[-20:], f"there it is {theirs:#x}")))
    except StopIteration:
        return len(history)


# --- rows


def test_no_row_is_forgotten():
    table = [line for line in (ROOT / "docs" / "against-qemu.md").open() if line.startswith("| ") and "`" in line]
    assert len(ROWS) + len(PC_ROWS) == len(table) > 30 and len(PC_ROWS) > 10


@pytest.mark.parametrize(
    ("device", "accesses", "here", "there", "why"), ROWS, ids=[f"{r[0]} {r[4][:40]}" for r in ROWS]
)
def test_row(qemu, device, accesses, here, there, why):
    ours = OurBoard()
    for command in text(accesses):
        answers = ours.play(command), qemu.play(command)
    assert answers == (int(here, 16), int(there, 16))


# --- random accesses


def inb(port: int, bits: int = ALL) -> tuple[Command, int]:
    return Command("in", 1, port), bits


def outb(port: int, value: int) -> tuple[Command, int]:
    return Command("out", 1, port, value), ALL


def step(ns: int) -> tuple[Command, int]:
    return Command("clock_step", value=-(-ns // Qemu.tick_ns) * Qemu.tick_ns), ALL


def pic(draw: random.Random, count: int) -> Stream:
    """Whatever there is, but no OCW3 on top of a poll (row 1); no line of theirs moves (row 2)."""
    polls = set()
    for _ in range(count):
        port, value = draw.choice((0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)), draw.randrange(256)
        ocw3 = port in (0x20, 0xA0) and value & 0x18 == 0x08
        if draw.random() < 0.5:
            polls.discard(port & 0xFE)
            yield inb(port)
        elif not (ocw3 and port in polls):
            if ocw3 and value & 4:
                polls.add(port)
            yield outb(port, value)


def uart(draw: random.Random, count: int, *, loopback: bool) -> Stream:
    """Any register. In loopback no modem status (its row); else the interrupt's line is looked at, and OUT2 is on."""
    out2 = 0 if loopback else 0x08
    lcr, mcr, ier, fcr, waiting = 0x03, out2, 0, 0, 0
    start = (0x3FB, 0), (0x3F9, 0), (0x3FA, 0), (0x3FB, 0x80), (0x3F8, 1), (0x3F9, 0), (0x3FB, lcr), (0x3FC, mcr)
    for port, value in start:
        yield outb(port, value)
    yield outb(0x4D0, 0x10)  # by level, so that a request is no more when its line has fallen
    for port in (0x3FA, 0x3FD, 0x3FE):
        yield inb(port, 0)
    for _ in range(count):
        offset, value, data = draw.randrange(8), draw.randrange(256), not lcr & 0x80
        if draw.random() < 0.5:
            bits = ALL
            if offset == 0 and data:
                bits = ALL if waiting or fcr & 1 else 0  # an empty buffer
                waiting = max(0, waiting - 1)
            elif offset == 6 and loopback:
                bits = 0xF0
            elif offset == 2 and waiting:
                yield step(10**9)  # the time-out, which theirs show above the trigger level, too
                bits = 0xF7
            yield inb(0x3F8 + offset, bits)
            if not loopback and draw.random() < 0.1:
                yield outb(0x20, 0x0A)
                yield inb(0x20, 0x10)
            continue
        match offset:
            case 0 if data and mcr & 0x10:
                waiting = min(waiting + 1, 16 if fcr & 1 else 1)
            case 1 if data:
                ier = value = value & (0x07 if loopback else 0x0F)
            case 1:
                value &= 0x07  # a second holds four characters
            case 2:
                if ier & 2:
                    continue  # clearing the transmitter FIFO
                value = value if value & 1 else 0  # without FCR0
                if (value ^ fcr) & 1 or value & 2:
                    waiting = 0
                fcr = value
            case 3:
                lcr = value = value & ~0x40  # no break
            case 4:
                mcr = value = value | out2 if not loopback else value
                if not loopback:
                    mcr = value = value & ~0x10
        yield outb(0x3F8 + offset, value)


KEYBOARD = {
    0x05: (), 0xED: range(8), 0xEE: (), 0xF0: range(4), 0xF2: (), 0xF3: range(128), 0xF4: (), 0xF5: (), 0xF6: (),
    0xFF: (),
}  # fmt: skip
MOUSE = {
    0xE6: (), 0xE7: (), 0xE8: range(4), 0xE9: (), 0xEA: (), 0xEB: (), 0xF0: (), 0xF2: (), 0xF3: (10, 20, 40, 60, 100),
    0xF4: (), 0xF5: (), 0xF6: (), 0xFF: (),
}  # fmt: skip
KNOCKS = (200, 100, 80), (200, 200, 80)
CONTROLLER = 0x20, 0xA7, 0xA8, 0xA9, 0xAA, 0xAB, 0xAD, 0xAE, 0xD0, 0xDD, 0xDF, 0xF1, 0xFF


def i8042(draw: random.Random, count: int) -> Stream:
    """As drivers do: a command, the answer to its end, an argument, the answer to its end (rows on what was not read).
    Bit 3 of the status and the system flag are ours alone."""

    def answers() -> Stream:
        for _ in range(20):
            status = yield inb(0x64, 0xF7)
            if not (status or 0) & 1:
                return
            yield inb(0x60)
        raise AssertionError("it goes on answering")

    def to_mouse(value: int) -> Stream:
        yield outb(0x64, 0xD4)
        yield outb(0x60, value)
        yield from answers()

    def to_keyboard(value: int) -> Stream:
        yield outb(0x60, value)
        yield from answers()

    yield outb(0x64, 0xAA)
    yield inb(0x60)
    yield outb(0x64, 0x60)
    yield outb(0x60, 0x65)
    yield from to_keyboard(0xFF)
    yield from to_mouse(0xFF)
    for _ in range(count):
        match draw.randrange(9):
            case 0 | 1:
                command = draw.choice(list(KEYBOARD))
                yield from to_keyboard(command)
                if KEYBOARD[command]:
                    yield from to_keyboard(draw.choice(KEYBOARD[command]))
            case 2 | 3:
                command = draw.choice(list(MOUSE))
                yield from to_mouse(command)
                if MOUSE[command]:
                    yield from to_mouse(draw.choice(MOUSE[command]))
            case 4 | 5:
                yield outb(0x64, draw.choice(CONTROLLER))
                yield from answers()
            case 6:  # what begins a knock ends it: their mouse and ours disagree on rates in between
                for rate in (10, *draw.choice(KNOCKS)):
                    yield from to_mouse(0xF3)
                    yield from to_mouse(rate)
            case 7:
                yield outb(0x64, 0xD1)
                yield outb(0x60, draw.choice((0xCF, 0xCD)))
            case _:
                yield outb(0x64, draw.choice((0x60, 0xD2, 0xD3)))
                yield outb(0x60, draw.randrange(256) | 0x04)
                yield from answers()


CALENDAR = {0: (0, 59), 2: (0, 59), 4: (0, 23), 7: (1, 28), 8: (1, 12), 9: (0, 99), 0x32: (20, 20)}


def rtc(draw: random.Random, count: int, longest_ns: int) -> Stream:
    """Calendar, alarm, interrupts. The calendar is written under SET, as the datasheet wants it. Not looked at: the day
    of the week, UIP, dates before 1970, the periodic interrupt before it has been enabled for a period, and an alarm
    that was written a second ago: theirs may go off at once."""
    b, rate, periodic_ns, alarm_ns = 0x02, 6, 0, 0

    def put(index: int, value: int) -> Stream:
        yield outb(0x70, index)
        yield outb(0x71, value)

    def number(value: int) -> int:
        return value if b & 4 else value // 10 << 4 | value % 10

    def hour(value: int) -> int:
        return number(value) if b & 2 else number((value - 1) % 12 + 1) | (0x80 if value >= 12 else 0)

    def alarm(index: int) -> Stream:
        nonlocal alarm_ns
        alarm_ns = -(10**9)
        value = draw.randint(0, 23 if index == 5 else 59)
        yield from put(index, 0xFF if draw.random() < 0.5 else hour(value) if index == 5 else number(value))

    def wait() -> Stream:
        nonlocal periodic_ns, alarm_ns
        ns = draw.randrange(draw.choice((10**4, 10**6, 10**7, longest_ns)))
        periodic_ns, alarm_ns = periodic_ns + ns, alarm_ns + ns
        yield step(ns)

    def calendar() -> Stream:
        nonlocal periodic_ns
        yield from put(0x0B, b | 0x80)
        for index, (low, high) in CALENDAR.items():
            value = high if draw.random() < 0.3 else draw.randint(low, high)
            yield from put(index, hour(value) if index == 4 else number(value))
        for index in (1, 3, 5):
            yield from alarm(index)
        if draw.random() < 0.5:
            yield from wait()
        yield from put(0x0B, b)
        yield outb(0x70, 0x0C)
        yield inb(0x71, 0)
        periodic_ns = 0

    yield from calendar()
    for _ in range(count):
        match draw.randrange(11):
            case 0 | 1 | 2 | 3:
                index = draw.choice((0, 2, 4, 7, 8, 9, 0x32, 1, 3, 5, 0x0A, 0x0B, 0x0C, 0x0C, 0x0D, 0x0E, 0x40))
                yield outb(0x70, index)
                if index == 0x0C:
                    due = b & 0x40 and rate and periodic_ns > 10**9 << rate - 1 >> 15
                    bits = ALL if due else 0x3F
                    yield inb(0x71, bits if alarm_ns >= 0 else bits & 0x5F)
                    periodic_ns, alarm_ns = 0, 0 if alarm_ns >= 0 else -(10**9)
                else:
                    yield inb(0x71, 0x7F if index == 0x0A else ALL)
            case 4 | 5 | 6:
                yield from wait()
            case 7:
                b = b & 0x70 | draw.choice((0, 2, 4, 6))
                yield from calendar()
            case 8:
                yield from alarm(draw.choice((1, 3, 5)))
            case 9:
                yield from put(0x40, draw.randrange(256))
                rate, periodic_ns = draw.choice((0, *range(3, 16))), 0
                yield from put(0x0A, 0x20 | rate)
            case _:
                b, periodic_ns = b & 6 | draw.randrange(256) & 0x70, 0
                yield from put(0x0B, b)


STREAMS = {
    "pic": lambda draw, size: pic(draw, 4000 * size),
    "uart": lambda draw, size: uart(draw, 4000 * size, loopback=False),
    "uart in loopback": lambda draw, size: uart(draw, 4000 * size, loopback=True),
    "i8042": lambda draw, size: i8042(draw, 800 * size),
    "rtc": lambda draw, size: rtc(draw, 300 * size, 10**9),
}


@pytest.mark.parametrize("device", STREAMS)
def test_random_accesses(qemu, device):
    assert play(STREAMS[device](random.Random(device), 1), OurBoard(), qemu) >= 300


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("device", STREAMS)
def test_many_random_accesses(qemu, device, seed):
    play(STREAMS[device](random.Random(f"{device} {seed}"), 5), OurBoard(), qemu)


HZ = 1_193_182


def pit(draw: random.Random, count: int, ours: OurBoard, qemu: Qemu) -> None:
    """Counters, at any time. Theirs count from the write, ours from the pulse after it: what theirs show in the middle
    of a CLK period, ours show one period later. A count is written only after its control word; gates are low only to
    trigger; no BCD, no odd count in mode 3, no look at OUT of modes 1, 2, 4 and 5 (all of these have rows)."""
    history: list[str] = []
    modes: dict[int, tuple[int, int]] = {}

    def both(*accesses: tuple[Command, int]) -> None:
        for command, _ in accesses:
            ours.play(command), qemu.play(command)
            history.append(str(command))

    def to_edge(clocks: int, after_ns: int = 0) -> None:
        edge = ours.clock.now_ns() * HZ // 10**9 + clocks
        at = -(-edge * 10**9 // HZ) + after_ns
        both((Command("clock_set", value=-(-at // Qemu.tick_ns) * Qemu.tick_ns), 0))

    def settle(clocks: int) -> None:
        to_edge(clocks, 420)

    def look(counter: int) -> None:
        mode, access = modes[counter]
        status = draw.random() < 0.3
        reads = [inb(0x40 + counter)] * (2 if access == 3 else 1)
        shown = 0x20 if mode in (0, 3) else 0
        if status:
            reads = [outb(0x43, 0xC0 | 2 << counter), inb(0x40 + counter, 0x3F | shown << 2), *reads]
        elif draw.random() < 0.5:
            reads = [outb(0x43, counter << 6), *reads]
        if counter == 2:
            reads.append(inb(0x61, 0xCF | shown))
        settle(draw.randrange(1, 3))
        theirs = [qemu.play(command) for command, _ in reads]
        settle(1)
        for (command, bits), there in zip(reads, theirs, strict=True):
            here = ours.play(command)
            history.append(f"{command}" + ("" if here is None else f"  # {here:#x}, there {there:#x}"))
            if here is not None:
                assert there is not None and not (here ^ there) & bits, "\n".join(history[-20:])

    def count_of(access: int, mode: int) -> int:
        value = draw.choice((draw.randrange(2, 300), draw.randrange(2, 0x10000)))
        value &= {1: 0xFF, 2: 0xFF00, 3: 0xFFFF}[access] & (~1 if mode == 3 else ~0)
        return max(value, {1: 2, 2: 0x100, 3: 2}[access])

    def program(counter: int, mode: int, access: int) -> None:
        value = count_of(access, mode)
        both(outb(0x43, counter << 6 | access << 4 | mode << 1))
        if access & 1:
            both(outb(0x40 + counter, value & 0xFF))
        if access & 2:
            both(outb(0x40 + counter, value >> 8))
        modes[counter] = mode, access

    for _ in range(count):
        match draw.randrange(6):
            case 0:
                counter = draw.randrange(3)
                if counter == 2:
                    both(outb(0x61, 1))
                to_edge(1)
                program(counter, draw.choice((0, 2, 3, 4)), draw.randrange(1, 4))
                settle(draw.randrange(2, 6))
            case 1:
                both(outb(0x61, 0))
                to_edge(1)
                program(2, draw.choice((1, 5)), 3)
                settle(3)
                to_edge(1)
                both(outb(0x61, 1))
                settle(draw.randrange(2, 6))
            case 2:
                settle(draw.choice((draw.randrange(2, 400), draw.randrange(2, 200_000))))
            case _ if modes:
                look(draw.choice(list(modes)))


def test_random_accesses_to_the_pit(qemu):
    pit(random.Random("pit"), 500, OurBoard(), qemu)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_random_accesses_to_the_pit(qemu, seed):
    pit(random.Random(f"pit {seed}"), 5000, OurBoard(), qemu)


# --- they can fail


PLANTED = {  # device: (port, size) of a read, and what is wrong with its answer
    "pic": (0x21, 0x01), "uart": (0x3FD, 0x01), "uart in loopback": (0x3F8, 0x80), "i8042": (0x60, 0x40),
    "rtc": (0x71, 0x10),
}  # fmt: skip


@pytest.mark.parametrize("device", PLANTED)
def test_a_difference_is_found(qemu, device):
    port, wrong = PLANTED[device]
    ours = OurBoard()
    ours.board.bus.port_in(port, 1)  # it is known from now on who answers
    readers = ours.board.bus.ports.readers
    right = readers[port << 4 | 1]
    readers[port << 4 | 1] = lambda: right() ^ wrong
    with pytest.raises(AssertionError, match=f"inb {port:#x}"):
        play(STREAMS[device](random.Random(device), 1), ours, qemu)


def test_a_difference_of_the_pit_is_found(qemu):
    """A clock that is wrong by one in a hundred thousand."""
    ours = OurBoard()
    now = ours.clock.now_ns
    device = ours.board.devices["pit"]
    assert isinstance(device, Pit)
    device._clock = type("Slow", (), {"now_ns": staticmethod(lambda: now() * 99_999 // 100_000)})()
    with pytest.raises(AssertionError, match="there"):
        pit(random.Random("pit 0"), 1000, ours, qemu)


# --- the oracle's clock


def test_their_time_is_exact(qemu):
    """Their HPET counts it."""
    draw = random.Random("time")
    for longest in (1, 5, 100, 10_000, 10**7, 10**9):
        for _ in range(10):
            qemu.play(Command("clock_step", value=draw.randrange(longest * 10)))
            ticks = qemu.play(Command("read", 8, 0xFED000F0))
            assert ticks is not None and ticks * 10 == qemu.now_ns
    before = qemu.now_ns
    qemu.play(Command("clock_set", value=5))
    assert qemu.now_ns == before, "it does not go back"


def test_no_qemu():
    with pytest.raises(BackendError, match="nowhere-qemu is not here"):
        Qemu("nowhere-qemu")


def test_a_qemu_that_is_none():
    with pytest.raises(BackendError, match=r"QEMU (answers|has ended)"):
        Qemu("true")


def test_a_qemu_that_ends(qemu):
    qemu._process.kill()
    with pytest.raises(BackendError, match="QEMU"):
        for _ in range(100):
            qemu.play(Command("clock_step", value=100))


def test_a_long_time_passes_in_steps(qemu, monkeypatch):
    """One step's rounds are counted in ECX."""
    monkeypatch.setattr("vmm.qtest.qemu._MOST_TICKS", 1000)
    qemu.play(Command("clock_step", value=1_234_560))
    assert qemu.play(Command("read", 8, 0xFED000F0)) == 123_456


@pytest.mark.slow
def test_more_rounds_than_ecx_counts(qemu):
    qemu.play(Command("clock_step", value=4_310_000_000_000))
    assert qemu.play(Command("read", 8, 0xFED000F0)) == 431_000_000_000


SILENT = """#!/bin/sh
echo $$ > {folder}/pid
exec sleep 600
"""
NO_DEBUGGER = """#!/bin/sh
echo $$ > {folder}/pid
while read line; do echo "OK 0x0"; done
"""


@pytest.mark.parametrize(("source", "why"), [(SILENT, "QEMU does not answer"), (NO_DEBUGGER, "QEMU's debugger port: ")])
def test_a_qemu_that_does_not_answer_is_ended(tmp_path, monkeypatch, source, why):
    monkeypatch.setattr("vmm.qtest.qemu._PATIENCE_S", 0.5)
    fake = tmp_path / "qemu"
    fake.write_text(source.format(folder=tmp_path))
    fake.chmod(0o755)
    with pytest.raises(BackendError, match=why):
        Qemu(str(fake))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
