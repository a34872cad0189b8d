"""The bus against a slow reading of its rule, whatever is mapped, moved, removed and accessed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.schema import state
from vmm.bus import Bus, Space
from vmm.device import Device
from vmm.registers import ANY, reads, span, writes


@state("test.bus.nothing", version=1)
class Nothing:
    """No state: what is done is told."""


Log = list[tuple[str, int, int, int]]  # which device, offset, size, value written (-1 for a read)


class Told(Device[Nothing]):
    """Answers by where it is asked, and tells."""

    State = Nothing

    def __init__(self, number: int, log: Log) -> None:
        super().__init__()
        self.number, self.log = number, log

    def told(self, offset: int, size: int) -> int:
        self.log.append((str(self.number), offset, size, -1))
        return int.from_bytes(((self.number * 64 + offset + i) & 0xFF for i in range(size)), "little")

    def took(self, offset: int, size: int, value: int) -> None:
        self.log.append((str(self.number), offset, size, value))


class Bytes(Told):
    """As an ISA chip: bytes, one of them read only, and a word that lies over two of them."""

    @reads(span(0, 6))
    def read(self, index: int) -> int:
        return self.told(index, 1)

    @writes(span(1, 5))
    def write(self, index: int, value: int) -> None:
        self.took(index + 1, 1, value)

    @reads(2, size=2)
    def read_word(self) -> int:
        return self.told(2, 2)

    @writes(2, size=2)
    def write_word(self, value: int) -> None:
        self.took(2, 2, value)


class Dwords(Told):
    """As a PCI function: registers of four bytes, one of them also as a byte, one write only."""

    @reads(span(0, 3, step=4), size=4)
    def read(self, index: int) -> int:
        return self.told(index * 4, 4)

    @writes(span(0, 4, step=4), size=4)
    def write(self, index: int, value: int) -> None:
        self.took(index * 4, 4, value)

    @reads(5)
    def read_byte(self) -> int:
        return self.told(5, 1)


class Quads(Told):
    """As an HPET: eight bytes, every sixteen."""

    @reads(span(0, 2, step=16), size=8)
    def read(self, index: int) -> int:
        return self.told(index * 16, 8)

    @writes(span(0, 2, step=16), size=8)
    def write(self, index: int, value: int) -> None:
        self.took(index * 16, 8, value)


class Range(Told):
    """As a window on something else, with one register of its own in it."""

    @reads(span(0, 24), size=ANY)
    def read(self, offset: int, size: int) -> int:
        return self.told(offset, size)

    @writes(span(0, 20), size=ANY)
    def write(self, offset: int, size: int, value: int) -> None:
        self.took(offset, size, value)

    @reads(8, size=4)
    def read_own(self) -> int:
        return self.told(8, 4) ^ 0xFFFFFFFF


KINDS = ((Bytes, 1), (Dwords, 4), (Quads, 8), (Range, 1), (Dwords, 8), (Bytes, 4))


# --- the rule, read slowly


@dataclass
class SlowWindow:
    device: Told
    width: int
    size: int
    base: int | None = None

    def register(self, kind: str, offset: int, size: int) -> Callable[..., Any] | None:
        """By each declaration, written out."""
        if not 0 <= offset <= self.size - size:
            return None
        any_size = None
        for declared in type(self.device).registers:
            if declared.kind != kind:
                continue
            method: Callable[..., Any] = getattr(self.device, declared.method)
            family = declared.span
            if family is None:
                if (declared.offset, declared.size) == (offset, size):
                    return method
            elif declared.size == ANY and family.start <= offset and offset + size <= family.start + family.count:
                any_size = partial(method, offset - family.start, size)
        for declared in type(self.device).registers:
            family = declared.span
            if declared.kind == kind and family is not None and declared.size == size:
                for index in range(family.count):
                    if family.start + index * family.step == offset:
                        return partial(getattr(self.device, declared.method), index)
        return any_size


@dataclass
class SlowBus:
    end: int
    windows: list[SlowWindow] = field(default_factory=list)

    def top(self, address: int) -> SlowWindow | None:
        for window in self.windows:
            if window.base is not None and address in range(window.base, window.base + window.size):
                return window
        return None

    def plan(self, kind: str, address: int, size: int) -> list[tuple[int, int, SlowWindow | None, int, int]]:
        """(place, bytes, window, offset of the register, its size)."""
        pieces: list[tuple[int, int, SlowWindow | None, int, int]] = []
        at = 0
        while at < size:
            here = (address + at) % self.end
            window = self.top(here)
            if window is None or window.base is None:
                pieces.append((at, 1, None, 0, 1))
                at += 1
                continue
            offset = here - window.base
            if at == 0 and window.register(kind, offset, size):
                pieces.append((0, size, window, offset, size))
                break
            around = offset - offset % window.width
            count = min(size - at, window.size - offset, around + window.width - offset)
            if window.register(kind, offset, count):
                pieces.append((at, count, window, offset, count))
            elif window.register(kind, around, window.width):
                pieces.append((at, count, window, around, window.width))
            else:
                count = 1
                pieces.append((at, 1, window if window.register(kind, offset, 1) else None, offset, 1))
            at += count
        return pieces

    def read(self, address: int, size: int) -> int:
        value = b""
        for at, count, window, offset, whole in self.plan("read", address, size):
            if window is None:
                value += b"\xff"
                continue
            register = window.register("read", offset, whole)
            assert register is not None and window.base is not None
            lane = (address + at) % self.end - window.base - offset
            value += register().to_bytes(whole, "little")[lane : lane + count]
        return int.from_bytes(value, "little")

    def write(self, address: int, size: int, value: int) -> None:
        data = value.to_bytes(size, "little")
        for at, count, window, offset, whole in self.plan("write", address, size):
            if window is None:
                continue
            register, before = window.register("write", offset, whole), window.register("read", offset, whole)
            assert register is not None and window.base is not None
            lane = (address + at) % self.end - window.base - offset
            old = bytes(whole) if count == whole or before is None else before().to_bytes(whole, "little")
            new = old[:lane] + data[at : at + count] + old[lane + count :]
            register(int.from_bytes(new, "little"))


PLACES = st.integers(0, 80) | st.sampled_from((0xFFF0, 0xFFFC, 0xFFFF, 0x1_0000))
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("map"), st.integers(0, len(KINDS) - 1), PLACES),
        st.tuples(st.just("unmap"), st.integers(0, len(KINDS) - 1), st.just(0)),
        st.tuples(st.just("read"), st.integers(1, 8), PLACES),
        st.tuples(st.just("write"), st.integers(1, 8), PLACES),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(ACTIONS, st.integers(0, (1 << 64) - 1), st.sampled_from((1 << 16, 1 << 64)))
def test_as_the_rule_says(actions, value, end):
    ours, theirs = Log(), Log()
    space, slow = Space(end), SlowBus(end)
    windows = []
    for number, (kind, width) in enumerate(KINDS):
        windows.append(space.window(kind(number, ours), width=width))
        slow.windows.append(SlowWindow(kind(number, theirs), width, windows[-1].size))
    for what, which, place in actions:
        match what:
            case "map":
                windows[which].map(place)
                slow.windows[which].base = place
            case "unmap":
                windows[which].unmap()
                slow.windows[which].base = None
            case "read":
                for _ in range(2):  # worked out, and once it is
                    reader = space.readers.get(place << 4 | which)
                    answer = space.read(place, which) if reader is None else reader()
                    assert answer == slow.read(place, which)
            case "write":
                written = value & (1 << 8 * which) - 1
                for _ in range(2):
                    writer = space.writers.get(place << 4 | which)
                    if writer is None:
                        space.write(place, which, written)
                    else:
                        writer(written)
                    slow.write(place, which, written)
        assert ours == theirs


# --- named cases


class Pair:
    """A device of a kind among the ports of a bus, and what was done to it."""

    def __init__(self, kind: type[Told], width: int, base: int = 0x100) -> None:
        self.log: Log = []
        self.bus = Bus()
        self.window = self.bus.ports.window(kind(0, self.log), width=width)
        self.window.map(base)


def test_a_wide_access_of_bytes_is_bytes():
    isa = Pair(Bytes, 1)
    assert isa.bus.port_in(0x100, 4) == 0x03020100
    assert [entry[1:3] for entry in isa.log] == [(0, 1), (1, 1), (2, 1), (3, 1)], "the word is not part of a dword"


def test_part_of_a_register_is_read_and_written_as_a_whole():
    pci = Pair(Dwords, 4)
    assert pci.bus.port_in(0x102, 2) == 0x0302
    pci.bus.port_out(0x101, 1, 0xAA)
    assert pci.log == [("0", 0, 4, -1), ("0", 0, 4, -1), ("0", 0, 4, 0x0302AA00)]


def test_what_cannot_be_read_is_zero_around_what_is_written():
    pci = Pair(Dwords, 4)
    pci.bus.port_out(0x10D, 1, 0xAA)
    assert pci.log == [("0", 12, 4, 0xAA00)]


def test_the_first_made_is_on_top_wherever_it_moves():
    log: Log = []
    bus = Bus()
    first, second = (bus.memory.window(Bytes(number, log)) for number in (0, 1))
    second.map(0x1000)
    assert bus.mmio_read(0x1000, 1) == 64
    first.map(0x1000)
    assert bus.mmio_read(0x1000, 1) == 0
    second.map(0x2000)
    second.map(0x1000)
    assert bus.mmio_read(0x1000, 1) == 0, "what has happened before does not matter"
    first.unmap()
    assert bus.mmio_read(0x1000, 1) == 64


def test_a_window_may_move_itself_away_in_its_own_access():
    class Leaves(Told):
        @writes(0)
        def write(self, value: int) -> None:
            window.map(0x2000)

    bus = Bus()
    window = bus.memory.window(Leaves(0, []))
    window.map(0x1000)
    bus.mmio_write(0x1000, 4, 1)
    assert window.base == 0x2000 and bus.memory.top(0x1000) is None


def test_configuration_address_does_not_reach_the_reset_register():
    """PCI's probe writes a dword to CF8; its second byte is not CF9."""
    from vmm.board.board import Board
    from vmm.board.config import MachineConfig
    from vmm.clock import GuestClock

    board = Board(MachineConfig(), GuestClock(1_000_000))
    board.bus.port_out(0xCF8, 4, 0x80000600)
    assert board.state.request == "none" and board.bus.port_in(0xCF8, 4) == 0xFFFFFFFF
    assert board.bus.port_in(0xCF9, 1) == 0
    board.bus.port_out(0xCF9, 1, 0x06)
    assert board.state.request == "reset"


def test_a_large_range_costs_no_entries():
    class Large(Told):
        @reads(span(0, 256 << 20), size=ANY)
        def read(self, offset: int, size: int) -> int:
            return offset & 0xFF

    bus = Bus()
    bus.memory.window(Large(0, [])).map(0xE000_0000)
    for offset in range(0, 256 << 20, 997):
        assert bus.mmio_read(0xE000_0000 + offset, 1) == offset & 0xFF
    assert len(bus.memory.readers) <= 1 << 16, "nor does a guest that reads it all"


@pytest.mark.parametrize("ports", [True, False])
def test_an_access_is_worked_out_once(ports, monkeypatch):
    """Then it is one look-up, until a window moves: the guest's speed rests on that."""
    bus, log, looked = Bus(), Log(), []
    space = bus.ports if ports else bus.memory
    read, write = (bus.port_in, bus.port_out) if ports else (bus.mmio_read, bus.mmio_write)
    window = space.window(Bytes(0, log))
    window.map(0x40)

    def top(address):
        looked.append(address)
        return Space.top(space, address)

    monkeypatch.setattr(space, "top", top)
    for _ in range(3):
        assert read(0x41, 1) == 1
        write(0x42, 1, 7)
    assert looked == [0x41, 0x42]
    assert log == [("0", 1, 1, -1), ("0", 2, 1, 7)] * 3
    window.map(0x50)
    assert read(0x41, 1) == 0xFF and looked[2:] == [0x41]


def test_a_width_that_is_none():
    with pytest.raises(ValueError, match="1, 2, 4 or 8"):
        Bus().memory.window(Bytes(0, []), width=3)


class Many(Told):
    """2,048 registers, each declared by itself."""

    @reads(*range(0, 8192, 4), size=4)
    def read(self) -> int:
        return 1


def test_moves_do_not_depend_on_how_many_registers_there_are():
    """Work, not time: no register is bound but those that are accessed."""
    bus, bound = Bus(), 0
    windows = [bus.memory.window(Many(number, []), width=4) for number in range(8)]
    began = time.perf_counter()
    for move in range(10_000):
        windows[move % 8].map(0x1000_0000 + (move * 0x2000 & 0xFFF_FFFF))
        bound += bus.mmio_read((windows[move % 8].base or 0) + 8, 4)
    print(f"10,000 moves in {time.perf_counter() - began:.3f} s")
    assert bound == 10_000 and len(bus.memory.readers) == 1
