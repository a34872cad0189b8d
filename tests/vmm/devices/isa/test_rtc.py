"""The MC146818: calendar against Python's, lazy flags against a second-by-second walk, and the datasheet's rules."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.bus import Bus
from vmm.devices.isa import rtc
from vmm.devices.isa.rtc import SECOND, Rtc
from vmm.testing import Rig

NEVER = 0xC0
PIE, AIE, UIE = 0x40, 0x20, 0x10


class Chip:
    def __init__(self, epoch_ns: int = 0, below: int = 256 << 20, above: int = 0) -> None:
        self.rig = Rig()
        self.device = Rtc(self.rig.clock, self.rig.alarm, self.rig.line("irq8"))
        self.device.state = rtc.power_on(epoch_ns, below, above)
        self.bus = Bus()
        self.bus.ports.window(self.device).map(0x70)

    def __getitem__(self, index: int) -> int:
        self.bus.port_out(0x70, 1, index)
        return self.bus.port_in(0x71, 1)

    def __setitem__(self, index: int, value: int) -> None:
        self.bus.port_out(0x70, 1, index)
        self.bus.port_out(0x71, 1, value)

    def irq(self) -> bool:
        return bool(self.rig.lines.get("irq8", False))

    def wait(self, ns: int) -> list[int]:
        """Let time pass, meeting deadlines. Returns the times at which the pin rose."""
        end, rose = self.rig.now + ns, []
        while (due := self.device.deadline()) is not None and due <= end:
            assert due > self.rig.now
            self.rig.now = due
            was = self.irq()
            self.device.expire()
            rose += [due] if self.irq() and not was else []
        self.rig.now = end
        return rose

    def time(self) -> tuple[int, ...]:
        return tuple(self[i] for i in (rtc.CENTURY, 9, 8, 7, 4, 2, 0))


def bcd(value: int) -> int:
    return int(str(value), 16)


def fields(at: datetime) -> tuple[int, ...]:
    return at.year // 100, at.year % 100, at.month, at.day, at.hour, at.minute, at.second


MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(2199, 12, 31))


def epoch_ns(at: datetime) -> int:
    return int((at.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1)) * 1000


@given(MOMENTS, st.integers(0, 40 * 365 * 86_400), st.booleans(), st.integers(0, SECOND - 1))
def test_the_calendar_is_the_calendar(start, seconds, binary, part):
    chip = Chip(epoch_ns(start.replace(microsecond=0)) + part)
    if binary:
        chip[0x0B] = 0x06
        for index, value in zip((9, 8, 7, 4, 2, 0), fields(start)[1:], strict=True):
            chip[index] = value
        chip[rtc.CENTURY] = start.year // 100
    chip.wait(seconds * SECOND)
    assert chip.time() == tuple(v if binary else bcd(v) for v in fields(start + timedelta(seconds=seconds)))
    # the second ends with the wall clock's
    chip.wait(SECOND - part - 1)
    assert chip.time()[-1] == (lambda s: s if binary else bcd(s))((start + timedelta(seconds=seconds)).second)
    chip.wait(1)
    assert chip.time() == tuple(v if binary else bcd(v) for v in fields(start + timedelta(seconds=seconds + 1)))


@pytest.mark.parametrize("hour, shown", [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_twelve_hour_mode(hour, shown):
    chip = Chip()
    chip[0x0B] = 0x80
    chip[4] = shown
    chip[0x0B] = 0
    chip.wait(SECOND)
    assert chip[4] == shown
    chip.wait(3600 * SECOND)
    after = (hour + 1) % 24
    assert chip[4] == bcd((after - 1) % 12 + 1) | (0x80 if after >= 12 else 0)


def test_the_day_of_the_week_goes_round():
    chip = Chip(epoch_ns(datetime(2026, 11, 22)))  # a Sunday
    assert chip[6] == 1
    chip.wait(6 * 86_400 * SECOND)
    assert chip[6] == 7
    chip.wait(86_400 * SECOND)
    assert chip[6] == 1


ALARMS = st.tuples(*(st.integers(0, most) | st.just(None) for most in (59, 59, 23)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 86_399), ALARMS, st.integers(1, 100_000), st.booleans())
def test_alarm_against_a_walk(start, alarm, seconds, watched):
    """AF is set at exactly the seconds that match, whether or not anybody looks in between."""
    chip = Chip(start * SECOND)
    for index, value in zip((1, 3, 5), alarm, strict=True):
        chip[index] = NEVER | 0x3F if value is None else bcd(value)
    if watched:
        chip[0x0B] = 2 | AIE

    def matches(t: int) -> bool:
        parts = (t % 60, t // 60 % 60, t // 3600 % 24)
        return all(want is None or want == part for want, part in zip(alarm, parts, strict=True))

    first = next((t for t in range(1, seconds + 1) if matches(start + t)), None)
    rose = chip.wait(seconds * SECOND)
    if watched:
        assert rose == ([] if first is None else [first * SECOND])
    assert bool(chip[0x0C] & AIE) == (first is not None)


@pytest.mark.parametrize("rate", range(1, 16))
def test_periodic_rate(rate):
    chip = Chip()
    chip[0x0A] = 0x20 | rate
    chip[0x0B] = 2 | PIE
    ticks = {1: 128, 2: 256}.get(rate, 1 << rate - 1)
    rose = []
    for _ in range(3):
        rose += chip.wait(ticks * SECOND // 32_768 + 1)
        assert chip.irq()
        assert chip[0x0C] & (0x80 | PIE) == 0x80 | PIE
        assert not chip.irq()
    assert rose == [-(-n * ticks * SECOND // 32_768) for n in (1, 2, 3)]


def test_eight_seconds_at_1024_hz_are_8192_interrupts():
    chip = Chip()
    chip[0x0B] = 2 | PIE
    count = 0
    while chip.rig.now < 8 * SECOND:
        due = chip.device.deadline()
        assert due is not None
        chip.rig.now = due
        chip.device.expire()
        count += chip.irq()
        chip[0x0C]
    assert count == 8192


def test_interrupts_missed_while_masked_are_one_flag():
    chip = Chip()
    chip.rig.now = 10**17
    assert chip[0x0C] == PIE | AIE | UIE, "not IRQF: nothing is enabled"
    assert chip[0x0C] == 0


def test_enabling_a_flag_that_is_set_raises_the_pin():
    chip = Chip()
    chip.rig.now = SECOND
    chip[0x0B] = 2 | UIE
    assert chip.irq()
    assert chip[0x0C] & 0x90 == 0x90
    assert not chip.irq()


def test_no_deadline_while_the_pin_is_up():
    chip = Chip()
    chip[0x0B] = 2 | PIE | UIE
    chip.wait(10 * SECOND)
    assert chip.irq() and chip.device.deadline() is None


def test_update_in_progress_comes_before_the_update():
    chip = Chip(5 * SECOND)
    chip.rig.now = SECOND - rtc.UPDATE_NS - 1
    assert not chip[0x0A] & 0x80
    chip.rig.now += 1
    assert chip[0x0A] & 0x80 and chip[0] == 5
    chip.rig.now = SECOND
    assert not chip[0x0A] & 0x80 and chip[0] == 6


def test_set_holds_the_calendar_and_clears_uie():
    chip = Chip(5 * SECOND)
    chip[0x0B] = 0x80 | 2 | UIE
    assert chip[0x0B] == 0x82
    chip.wait(100 * SECOND)
    assert chip[0] == 5 and not chip[0x0A] & 0x80
    chip[0x0B] = 2
    chip.wait(SECOND)
    assert chip[0] == 6


def test_leaving_divider_reset_updates_half_a_second_later():
    chip = Chip(5 * SECOND)
    chip[0x0A] = 0x70
    chip.wait(12_345_678_901)
    assert chip[0] == 5
    chip[0x0A] = 0x26
    chip.wait(SECOND // 2 - 1)
    assert chip[0] == 5
    chip.wait(1)
    assert chip[0] == 6


def test_registers_c_and_d_are_read_only_and_ram_is_ram():
    chip = Chip()
    chip[0x0C] = chip[0x0D] = 0
    assert chip[0x0D] == 0x80
    for index in (*range(0x0E, 0x32), *range(0x33, 0x80)):
        chip[index] = index ^ 0x5A
    assert all(chip[i] == i ^ 0x5A for i in (*range(0x0E, 0x32), *range(0x33, 0x80)))


def test_reset_keeps_time_and_memory():
    chip = Chip(5 * SECOND)
    chip[0x40] = 0x77
    chip[0x0B] = 2 | PIE
    chip.wait(SECOND)
    assert chip.irq()
    chip.device.reset()
    assert not chip.irq() and chip[0] == 6 and chip[0x40] == 0x77 and chip[0x0B] == 2


def test_memory_sizes():
    chip = Chip(below=3 << 30, above=5 << 30)
    word = lambda index: chip[index] | chip[index + 1] << 8  # noqa: E731
    assert word(0x15) == 640 and word(0x17) == word(0x30) == 0xFFFF
    assert word(0x34) == (3 << 30) - (16 << 20) >> 16
    assert word(0x5B) | chip[0x5D] << 16 == 5 << 30 >> 16
    assert Chip(below=4 << 20)[0x18] == 3 << 10 >> 8


@given(st.binary(min_size=10, max_size=10), st.integers(0, 255), st.sampled_from((0, 2, 4, 6)), st.integers(0, 10**18))
def test_any_time_a_guest_writes_becomes_a_date(registers, century, format_bits, wait):
    chip = Chip()
    chip[0x0B] = 0x80 | format_bits
    for index, value in enumerate(registers):
        chip[index] = value
    chip[rtc.CENTURY] = century
    chip[0x0B] = format_bits | AIE
    chip.rig.now += wait + SECOND
    chip.device.expire()
    number = (lambda v: v) if format_bits & 4 else (lambda v: int(f"{v:x}"))
    assert 1 <= number(chip[8]) <= 12 and 1 <= number(chip[7]) <= 31 and number(chip[0]) < 60


def test_a_leap_day():
    chip = Chip(epoch_ns(datetime(2028, 2, 28, 23, 59, 59)))
    chip.wait(SECOND)
    assert chip.time()[:4] == (0x20, 0x28, 0x02, 0x29)
