"""The 8254, against a model that moves one clock at a time, and the datasheet's own waveforms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.bus import Bus
from vmm.devices.isa.pit import HZ, Pit
from vmm.testing import Rig


class Slow:
    """One counter moved a clock at a time, as the datasheet's text tells it. The oracle."""

    def __init__(self, mode: int, bcd: bool, access: str, gate: bool) -> None:
        self.mode, self.bcd, self.access, self.gate = mode, bcd, access, gate
        self.modulus = 10_000 if bcd else 0x10000
        self.cr: int | None = None
        self.first: int | None = None
        self.ce: int | None = None
        self.out = mode != 0
        self.load = self.trigger = self.fresh = False
        self.armed = False  # a strobe or an expiry is still to come
        self.null = True
        self.stopped = False

    def write(self, value: int) -> None:
        if self.access == "both" and self.first is None:
            self.first = value
            if self.mode == 0:
                self.stopped, self.out, self.load = True, False, False
            return
        raw = {"low": value, "high": value << 8}.get(self.access, value << 8 | (self.first or 0))
        self.first = None
        count = int(f"{raw:x}") if self.bcd else raw
        new = self.cr is None
        self.cr = count or self.modulus
        self.null = self.fresh = True
        if self.mode in (0, 4) or (self.mode in (2, 3) and new):
            self.load = True
            if self.mode == 0:
                self.out = False

    def set_gate(self, level: bool) -> None:
        if level and not self.gate and self.mode in (1, 2, 3, 5) and self.cr is not None:
            self.load = True
        if not level and self.mode in (2, 3):
            self.out = True
        self.gate = level

    def clock(self) -> None:
        if self.load:
            self.load = False
            self._reload()
            self.stopped = False
            self.armed = True
            self.waiting = not self.gate and self.mode in (2, 3)
            self.out = self.mode not in (0, 1)
            return
        if self.ce is None or self.stopped:
            return
        if self.mode in (0, 4, 2, 3) and not self.gate:
            return
        if self.mode in (2, 3) and self.waiting:
            return
        if self.mode == 2:
            if self.ce == 1:
                self._reload()
                self.out = True
            else:
                self.ce -= 1
                self.out = self.ce != 1
            return
        if self.mode == 3:
            self.left -= 1
            self.ce -= 2
            if self.left == 0:
                self.out = not self.out
                self._reload()
            return
        self.ce = (self.ce - 1) % self.modulus
        if self.mode in (4, 5):
            self.out = not (self.ce == 0 and self.armed)
        elif self.ce == 0:
            self.out = True
        if self.ce == 0:
            self.armed = False

    def _reload(self) -> None:
        assert self.cr is not None
        self.ce = self.cr
        self.null = False
        if self.mode == 3:
            high = self.out or self.load
            self.left = (self.cr + 1) // 2 if high else self.cr // 2
            self.ce = self.cr & ~1

    def value(self) -> int:
        if self.ce is None:
            return 0
        count = self.ce % self.modulus
        return int(str(count), 16) if self.bcd else count


class Chip:
    """A PIT on a bus, moved to clock edges."""

    def __init__(self) -> None:
        self.rig = Rig()
        self.levels: list[bool] = []
        self.device = Pit(self.rig.clock, self.rig.alarm, self.levels.append)
        self.bus = Bus()
        self.bus.ports.window(self.device).map(0x40)
        self.bus.ports.window(self.device, "portb").map(0x61)
        self.edge = 0

    def to(self, edge: int) -> None:
        """Move to the first ns of this clock edge, meeting every deadline on the way."""
        self.edge = edge
        end = -(-edge * 10**9 // HZ)
        while (due := self.device.deadline()) is not None and due <= end:
            assert due > self.rig.now or not self.rig.now
            self.rig.now = due
            self.device.expire()
        self.rig.now = end

    def out(self, value: int, port: int = 0x40) -> None:
        self.bus.port_out(port, 1, value)

    def control(self, counter: int, mode: int, access: int = 3, bcd: int = 0) -> None:
        self.out(counter << 6 | access << 4 | mode << 1 | bcd, 0x43)

    def load(self, counter: int, count: int) -> None:
        self.out(count & 0xFF, 0x40 + counter)
        self.out(count >> 8, 0x40 + counter)

    def read(self, counter: int) -> int:
        low = self.bus.port_in(0x40 + counter, 1)
        return low | self.bus.port_in(0x40 + counter, 1) << 8

    def status(self, counter: int) -> int:
        self.out(0xE0 | 2 << counter, 0x43)
        return self.bus.port_in(0x40 + counter, 1)


WORDS = ("low", "high", "both")
COUNTS = st.integers(2, 12) | st.integers(0, 0xFFFF)


def digits(value: int) -> int:
    return int(str(value % 10_000), 16)


@settings(max_examples=400, deadline=None)
@given(
    mode=st.integers(0, 5),
    bcd=st.booleans(),
    access=st.integers(1, 3),
    steps=st.lists(
        st.tuples(st.just("count"), COUNTS)
        | st.tuples(st.just("gate"), st.booleans())
        | st.tuples(st.just("run"), st.integers(0, 30) | st.sampled_from((300, 70_000))),
        max_size=12,
    ),
)
def test_each_mode_counts_as_the_clock_by_clock_model(mode, bcd, access, steps):
    chip, slow = Chip(), Slow(mode, bcd, WORDS[access - 1], gate=False)
    chip.control(2, mode, access, int(bcd))
    now = 0
    for what, value in steps:
        if what == "gate":
            chip.out(int(value), 0x61)
            slow.set_gate(value)
        elif what == "count":
            count = digits(value) if bcd else value
            if access != 3:
                count &= 0xFF
            if mode in (2, 3) and (count if access != 2 else count << 8) == 1:
                continue  # forbidden
            if bcd and access != 3:
                count = digits(int(f"{count:x}") % 100) if f"{count:x}".isdigit() else 0x42
            for byte in (count & 0xFF, count >> 8)[: 2 if access == 3 else 1]:
                chip.out(byte, 0x42)
                slow.write(byte)
        else:
            for _ in range(value):
                slow.clock()
            now += value
            chip.to(now)
        counter = chip.device._counter(2)
        assert counter.out(now) == slow.out, f"OUT after {what} {value}"
        assert counter.value(now) == slow.value(), f"count after {what} {value}"
        assert counter.state.null_count == slow.null
    assert chip.bus.port_in(0x61, 1) >> 5 & 1 == slow.out


@settings(max_examples=200, deadline=None)
@given(mode=st.sampled_from((0, 2, 3, 4)), count=st.integers(2, 40), later=st.integers(0, 300))
def test_every_edge_of_counter_0_falls_on_its_clock(mode, count, later):
    chip, slow = Chip(), Slow(mode, False, "both", gate=True)
    chip.control(0, mode)
    chip.load(0, count)
    slow.write(count & 0xFF)
    slow.write(count >> 8)
    level, edges = slow.out, []
    for t in range(1, later + 1):
        slow.clock()
        if slow.out != level:
            level = slow.out
            edges.append((-(-t * 10**9 // HZ), level))
    seen = []
    end = -(-later * 10**9 // HZ)
    while (due := chip.device.deadline()) is not None and due <= end:
        chip.rig.now = due
        chip.levels.clear()
        chip.device.expire()
        seen += [(due, level) for level in chip.levels]
    assert seen == edges


def test_a_pulse_that_went_by_is_still_a_pulse():
    chip = Chip()
    chip.control(0, 2)
    chip.load(0, 100)
    chip.to(1)
    chip.levels.clear()
    chip.rig.now += 10**12
    chip.device.expire()
    assert chip.levels == [False, True]
    due = chip.device.deadline()
    assert due is not None and due > chip.rig.now


def test_a_late_access_to_the_counter_does_not_lose_the_edge():
    chip = Chip()
    chip.control(0, 0)
    chip.load(0, 100)
    chip.levels.clear()
    chip.rig.now = 10**9
    chip.control(0, 0)
    assert chip.levels == [True, False]


def test_the_counter_latch_holds_until_it_is_read():
    chip = Chip()
    chip.control(0, 2)
    chip.load(0, 0x1234)
    chip.to(11)
    chip.out(0x00, 0x43)
    chip.to(2000)
    chip.out(0x00, 0x43)  # ignored: one is held
    assert chip.read(0) == 0x1234 - 10
    assert chip.read(0) == 0x1234 - 1999


def test_read_back_gives_status_then_count():
    chip = Chip()
    chip.control(1, 3)
    assert chip.status(1) == 0x80 | 0x40 | 0x30 | 3 << 1  # OUT high, null count
    chip.load(1, 1000)
    chip.to(1)
    assert chip.status(1) == 0x80 | 0x30 | 3 << 1
    chip.to(11)
    chip.out(0xC2 | 2 << 1, 0x43)  # count and status, counters 0 and 1
    chip.to(600)
    assert chip.bus.port_in(0x41, 1) == 0x80 | 0x30 | 3 << 1
    assert chip.read(1) == 980
    chip.out(0xE4, 0x43)
    chip.to(1200)
    assert chip.bus.port_in(0x41, 1) == 0x30 | 3 << 1, "the first latch holds; OUT was low at 600"


@pytest.mark.parametrize("named", range(8))
def test_read_back_latches_the_counters_that_are_named(named):
    """Each has its own bit (datasheet, figure 11)."""
    chip = Chip()
    for index in range(3):
        chip.control(index, 2)
    chip.out(0xC0 | named << 1, 0x43)
    for index, counter in enumerate(chip.device.state.counters):
        latched = (counter.latch is not None, counter.status_latch is not None)
        assert latched == (bool(named >> index & 1),) * 2


def test_least_significant_byte_only_reads_one_byte_of_a_latch():
    chip = Chip()
    chip.control(0, 2, access=1)
    chip.out(0x80)
    chip.to(1)
    chip.out(0x00, 0x43)
    chip.to(5)
    assert [chip.bus.port_in(0x40, 1) for _ in range(2)] == [0x80, 0x7C]


def test_a_bcd_counter_counts_decimal():
    chip = Chip()
    chip.control(0, 2, bcd=1)
    chip.load(0, 0x1000)
    chip.to(2)
    assert chip.read(0) == 0x0999


def test_zero_is_the_largest_count():
    chip = Chip()
    chip.control(0, 0)
    chip.load(0, 0)
    chip.to(0x10000)
    assert chip.status(0) & 0x80 == 0
    chip.to(0x10001)
    assert chip.status(0) & 0x80


def test_a_new_count_in_mode_2_waits_for_the_end_of_the_cycle():
    chip = Chip()
    chip.control(0, 2)
    chip.load(0, 10)
    chip.to(4)
    chip.load(0, 20)
    assert chip.status(0) & 0x40, "null count until it is loaded"
    chip.to(10)
    assert chip.read(0) == 1
    chip.to(11)
    assert chip.read(0) == 20


def test_modes_6_and_7_are_2_and_3():
    chip = Chip()
    for word, mode in ((6, 2), (7, 3)):
        chip.control(0, word)
        assert chip.status(0) >> 1 & 7 == mode


def test_port_b_shows_refresh_and_keeps_its_four_bits():
    chip = Chip()
    chip.out(0xFF, 0x61)
    assert chip.bus.port_in(0x61, 1) & 0xCF == 0x0F
    toggles = set()
    for _ in range(4):
        toggles.add(chip.bus.port_in(0x61, 1) & 0x10)
        chip.rig.now += 15_085
    assert toggles == {0, 0x10}


@pytest.mark.parametrize("mode", range(6))
def test_the_oracle_can_fail(mode):
    """A counter that is one clock early is told apart from the right one in every mode."""
    chip, slow = Chip(), Slow(mode, False, "both", gate=False)
    chip.control(2, mode)
    differs = False
    for counter in (slow.write, lambda byte: chip.out(byte, 0x42)):
        counter(5)
        counter(0)
    chip.out(1, 0x61)
    slow.set_gate(True)
    for t in range(12):
        chip.to(t + 1)
        differs |= chip.device._counter(2).out(t + 1) != slow.out
        slow.clock()
    assert differs


def test_its_clock() -> None:
    """A twelfth of 14.31818 MHz (IBM AT): 1193182 clocks in a second, to the nearest."""
    rig = Rig()
    pit = Pit(rig.clock, rig.alarm, rig.line("irq0"))
    pit.write_control(0x30)
    for _ in range(2):
        pit.write_counter(0, 0)
    assert pit.deadline() == 54_926_240  # 65537 clocks
