"""The HPET: what its specification says of matches, modes and routes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.bus import Bus
from vmm.devices.hpet import TICK_NS, Hpet
from vmm.testing import Rig, check_device
from vmm.testing.rig import wiring

BASE = 0xFED0_0000
LEVEL, ENABLE, PERIODIC, SET, NARROW, FSB = 0x002, 0x004, 0x008, 0x040, 0x100, 0x4000
ONES = (1 << 64) - 1


class Chip:
    def __init__(self) -> None:
        self.rig = Rig()
        self.device: Any = wiring(Hpet)(self.rig)
        self.bus = Bus()
        self.bus.memory.window(self.device, width=4).map(BASE)

    def __getitem__(self, place: tuple[int, int] | int) -> int:
        offset, size = place if isinstance(place, tuple) else (place, 4)
        return self.bus.mmio_read(BASE + offset, size)

    def __setitem__(self, place: tuple[int, int] | int, value: int) -> None:
        offset, size = place if isinstance(place, tuple) else (place, 4)
        self.bus.mmio_write(BASE + offset, size, value)

    def high(self) -> set[str]:
        return {name for name, level in self.rig.lines.items() if level}

    def wait(self, ticks: int) -> list[tuple[int, str]]:
        """Let time pass, meeting deadlines. Returns the ticks at which a line rose."""
        end, rose = self.rig.now + ticks * TICK_NS, []
        while (due := self.device.deadline()) is not None and due <= end:
            self.rig.now = due
            before = len(self.rig.edges)
            self.device.expire()
            rose += [(due // TICK_NS, name) for name, level in self.rig.edges[before:] if level]
        self.rig.now = end
        return rose


@pytest.fixture
def chip() -> Chip:
    return Chip()


def test_any_guest():
    check_device(Hpet)


def test_what_it_says_of_itself(chip):
    assert chip[0, 8] == 10_000_000 << 32 | 0x8086A201
    for index in range(3):
        assert chip[0x100 + 32 * index, 8] == 0xF00000 << 32 | 0x8030


def test_nothing_that_is_reserved_is_anything_else(chip):
    used = {0x00, 0x04, 0x10, 0x20, 0xF0, 0xF4, *(0x100 + 32 * i + r for i in range(3) for r in range(0, 24, 4))}
    for offset in range(0, 0x400, 4):
        if offset not in used:
            chip[offset] = 0xFFFF_FFFF
            assert chip[offset] == 0, hex(offset)


@given(st.integers(0, ONES), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_it_counts_while_it_is_enabled(value, before, during):
    chip = Chip()
    chip.rig.now = before * TICK_NS
    chip[0xF0, 8] = value
    chip.wait(7)
    assert chip[0xF0, 8] == value, "it stands"
    chip[0x10] = 1
    chip.rig.now += during * TICK_NS
    assert chip[0xF0, 8] == value + during & ONES
    chip[0x10] = 0
    chip.wait(7)
    assert chip[0xF0, 8] == value + during & ONES


def test_a_match_is_of_equal_bits_only(chip):
    chip[0x10] = 1
    chip.wait(100)
    chip[0x108, 8], chip[0x100] = 50, ENABLE | 20 << 9
    assert chip.wait(10**6) == [], "it has gone by, and comes round in 5,800 years"
    chip[0x100] = ENABLE | NARROW | 20 << 9
    chip[0x108, 8] = 1_000_150
    assert chip.wait(100) == [(1_000_150, "irq20")]


def test_32_bits_come_round(chip):
    chip[0xF0, 8] = 0x1_FFFF_FFF0
    chip[0x108], chip[0x100], chip[0x10] = 4, ENABLE | NARROW | 21 << 9, 1
    assert chip.wait((1 << 32) + 100) == [(20, "irq21"), (20 + (1 << 32), "irq21")]


def test_one_that_was_missed_for_a_whole_round(chip):
    chip[0x108], chip[0x100], chip[0x10] = 4, ENABLE | NARROW | 21 << 9, 1
    chip.rig.now = (4 + (1 << 32)) * TICK_NS
    chip.device.expire()
    assert chip.device.deadline() == (4 + 2 * (1 << 32)) * TICK_NS


def test_a_period_is_counted_from_the_match(chip):
    """Linux's way: VAL_SET, the first match, then the period (2.3.9.2.2)."""
    chip[0x10] = 3
    chip[0x100] = ENABLE | PERIODIC | SET | NARROW
    assert chip[0x100] & SET
    chip[0x108] = 1000
    assert not chip[0x100] & SET
    chip[0x108] = 250
    assert chip[0x108] == 1000, "the period alone was written"
    assert chip.wait(1600) == [(at, "irq0") for at in (1000, 1250, 1500)]
    assert chip[0x108] == 1750
    chip.rig.now += 10_000 * TICK_NS
    chip.device.expire()
    assert 0 < chip.device.deadline() - chip.rig.now <= 250 * TICK_NS and chip[0x108] == 11_750


def test_a_comparator_of_eight_bytes_is_one_value(chip):
    chip[0x100] = ENABLE | PERIODIC | SET
    chip[0x108, 8] = 0x1_0000_0005
    assert chip[0x108, 8] == 0x1_0000_0005 and not chip[0x100] & SET


def test_an_edge_stays_until_the_next(chip):
    """So that an 8259A, which forgets an edge whose line fell, takes it."""
    chip[0x10], chip[0x108, 8], chip[0x100] = 3, 10, ENABLE
    chip.wait(10)
    assert chip.high() == {"irq0"}
    chip[0x108, 8] = 20
    assert chip.wait(20) == [(20, "irq0")]
    chip[0x100] = 0
    assert chip.high() == set()


def test_a_level_stays_until_its_status_is_cleared(chip):
    chip[0x10], chip[0x128, 8], chip[0x120] = 1, 10, ENABLE | LEVEL | 23 << 9
    assert chip.wait(10) == [(10, "irq23")]
    assert chip[0x20] == 2
    chip[0x24] = 0xFFFF_FFFF
    chip[0x20] = 5
    assert chip[0x20] == 2 and chip.high() == {"irq23"}
    chip[0x20] = 2
    assert chip[0x20] == 0 and chip.high() == set()


def test_a_level_is_seen_without_an_interrupt(chip):
    chip[0x10], chip[0x108, 8], chip[0x100] = 1, 10, LEVEL | 20 << 9
    assert chip.wait(10) == [] and chip[0x20] == 1


def test_legacy_replacement_shuts_out_what_was_there(chip):
    chip.device.set_pit(True)
    chip.device.set_rtc(True)
    assert chip.high() == {"irq0", "irq8"}
    chip[0x10] = 3
    assert chip.high() == set()
    chip[0x128, 8], chip[0x120] = 10, ENABLE
    assert chip.wait(10) == [(10, "irq8")]
    chip.device.set_pit(False)
    chip[0x10] = 1
    assert chip.high() == {"irq8"}, "the RTC's again"


def test_a_message(chip):
    chip[0x10], chip[0x110], chip[0x114] = 1, 0x41, 0xFEE0_1000
    chip[0x108, 8], chip[0x100] = 10, ENABLE | FSB | 20 << 9
    assert chip.wait(10) == []
    assert chip.rig.events == [("msi", (0xFEE0_1000, 0x41))]


def test_a_route_that_is_none_does_not_stick(chip):
    chip[0x100] = 22 << 9
    chip[0x100] = 9 << 9
    assert chip[0x100] >> 9 & 31 == 22
