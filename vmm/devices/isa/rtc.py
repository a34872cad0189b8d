"""Motorola MC146818 real-time clock and CMOS memory, with the PC's century byte and memory sizes.

Source: Motorola MC146818 datasheet (ADI-856), "Register Description" and "Update Cycle"; CMOS bytes as the IBM AT
technical reference and Bochs' BIOS use them.

Nothing happens while nobody looks: flags and calendar are brought up to date at an access or when an enabled
interrupt is due, in a few divisions whatever the time that has passed.

Absent
* Time bases other than 32.768 kHz (DV 000 and 001 count as 010), the square-wave output, daylight saving (DSE is kept
  and ignored), the second bank at ports 0x72 and 0x73. The NMI mask of port 0x70 is kept; the board has no NMI source.
* A date the calendar does not have becomes one it has at the next update.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated

from snapshot.field_types import Size, i64, u7, u64
from snapshot.schema import state
from vmm.device import Device, invariant
from vmm.registers import reads, writes
from vmm.wires import Alarm, Clock, Line

SECOND = 10**9
CRYSTAL_HZ = 32_768
UPDATE_NS = (244 + 1984) * 1000  # UIP rises 244 us before an update of 1984 us

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
ALARM = (1, 3, 5)  # seconds, minutes, hours
A, B, C, D = 10, 11, 12, 13
CENTURY = 0x32

SET, BINARY, HOURS_24 = 0x80, 0x04, 0x02  # register B
IRQF, PERIODIC, ALARMED, UPDATED = 0x80, 0x40, 0x20, 0x10  # register C; B enables the last three
_PM = 0x80


@state("rtc.mc146818", version=1)
class RtcState:
    index: Annotated[u7, "address latch (port 0x70)"] = 0
    nmi_masked: Annotated[bool, "bit 7 of port 0x70"] = False
    ram: Annotated[bytes, Size(128), "registers and CMOS memory"] = bytes(A) + bytes((0x26, 0x02, 0, 0x80)) + bytes(114)
    second_ns: Annotated[i64, "guest time of the last whole second of the divider chain"] = 0
    settled_ns: Annotated[u64, "guest time up to which flags and calendar are worked out"] = 0


def power_on(epoch_ns: int, below_4g: int, above_4g: int) -> RtcState:
    """The state at guest time zero: wall clock `epoch_ns` (Unix ns) and RAM sizes in bytes."""
    ram = bytearray(RtcState().ram)
    seconds, into = divmod(epoch_ns, SECOND)
    days, of_day = divmod(seconds, 86_400)
    today = date.fromordinal(min(date(1970, 1, 1).toordinal() + days, date.max.toordinal()))
    _Calendar(ram).show(today, of_day, today.isoweekday() % 7 + 1)
    for index, value in _memory_bytes(below_4g, above_4g).items():
        ram[index] = value
    return RtcState(ram=bytes(ram), second_ns=-into)


def _memory_bytes(below: int, above: int) -> dict[int, int]:
    def words(index: int, value: int, most: int = 0xFFFF, count: int = 2) -> dict[int, int]:
        value = min(value, most)
        return {index + i: value >> 8 * i & 0xFF for i in range(count)}

    extended = words(0x17, max(0, below - (1 << 20)) >> 10)
    return {
        **words(0x15, min(640, below >> 10)),
        **extended,
        **{index + 0x19: value for index, value in extended.items()},  # again at 0x30, as set-up leaves it
        **words(0x34, max(0, below - (16 << 20)) >> 16),
        **words(0x5B, above >> 16, most=0xFFFFFF, count=3),
    }


class _Calendar:
    """The ten time registers, in the format register B asks for."""

    def __init__(self, ram: bytearray) -> None:
        self.ram = ram
        self.binary = bool(ram[B] & BINARY)
        self.hours_24 = bool(ram[B] & HOURS_24)

    def number(self, index: int) -> int:
        value = self.ram[index]
        return value if self.binary else (value >> 4) * 10 + (value & 15)

    def _register(self, value: int) -> int:
        return value if self.binary else value // 10 << 4 | value % 10

    def hour(self, index: int = HOURS) -> int:
        if self.hours_24:
            return self.number(index)
        pm, value = self.ram[index] & _PM, self.ram[index] & ~_PM
        hour = value if self.binary else (value >> 4) * 10 + (value & 15)
        return hour % 12 + (12 if pm else 0)

    def of_day(self) -> int:
        return (self.hour() * 60 + self.number(MINUTES)) * 60 + self.number(SECONDS)

    def advance(self, seconds: int) -> None:
        days, of_day = divmod(self.of_day() + seconds, 86_400)
        year = min(max(1, self.number(CENTURY) * 100 + self.number(YEAR)), 9999)
        month = min(max(1, self.number(MONTH)), 12)
        ordinal = date(year, month, 1).toordinal() + max(1, self.number(DAY)) - 1 + days
        weekday = (self.number(WEEKDAY) - 1 + days) % 7 + 1
        self.show(date.fromordinal(min(ordinal, date.max.toordinal())), of_day, weekday)

    def show(self, day: date, of_day: int, weekday: int) -> None:
        hour = of_day // 3600
        self.ram[HOURS] = self._register(hour)
        if not self.hours_24:
            self.ram[HOURS] = self._register((hour - 1) % 12 + 1) | (_PM if hour >= 12 else 0)
        fields = {
            SECONDS: of_day % 60,
            MINUTES: of_day // 60 % 60,
            WEEKDAY: weekday,
            DAY: day.day,
            MONTH: day.month,
            YEAR: day.year % 100,
            CENTURY: day.year // 100,
        }
        for index, value in fields.items():
            self.ram[index] = self._register(value)

    def until_alarm(self) -> int | None:
        """Seconds from now to the next that matches the alarm (1..86400); None when none ever does."""
        second, minute = (None if self.ram[i] >= 0xC0 else self.number(i) for i in ALARM[:2])
        hour = None if self.ram[ALARM[2]] >= 0xC0 else self.hour(ALARM[2])
        if max(second or 0, minute or 0) > 59 or (hour or 0) > 23:
            return None
        now = self.of_day()
        t = now + 1
        for _ in range(4):  # each unit is put right at most once, after the larger ones
            if hour is not None and t // 3600 % 24 != hour:
                t += (hour - t // 3600) % 24 * 3600 - t % 3600
            elif minute is not None and t // 60 % 60 != minute:
                t += (minute - t // 60) % 60 * 60 - t % 60
            elif second is not None and t % 60 != second:
                t += (second - t) % 60
            else:
                return t - now
        return None


class Rtc(Device[RtcState]):
    """Index register at 0, data at 1. The IRQ pin is shown as a level that a read of register C drops."""

    State = RtcState

    def __init__(self, clock: Clock, alarm: Alarm, irq8: Line) -> None:
        super().__init__()
        self._clock = clock
        self._alarm, self._irq8 = alarm, irq8

    @writes(0)
    def write_index(self, value: int) -> None:
        self.state.index = value & 0x7F
        self.state.nmi_masked = bool(value & 0x80)

    @reads(1)
    def read_data(self) -> int:
        s, now = self.state, self._clock.now_ns()
        if s.index >= D and s.index != CENTURY:
            return 0x80 if s.index == D else s.ram[s.index]  # VRT: the battery is good
        self._settle(now)
        if s.index == A:
            return s.ram[A] & 0x7F | (0x80 if self._updating(now) else 0)
        if s.index == C:
            flags = s.ram[C] & (PERIODIC | ALARMED | UPDATED) | (IRQF if self._irq() else 0)
            self._put(C, 0)
            self._irq8(False)
            self._alarm(self.deadline())
            return flags
        return s.ram[s.index]

    @writes(1)
    def write_data(self, value: int) -> None:
        s, now = self.state, self._clock.now_ns()
        self._settle(now)
        match s.index:
            case 0x0A:
                started = self._stopped() and value & 0x60 != 0x60
                self._put(A, value & 0x7F)
                if started:
                    s.second_ns = now - SECOND // 2  # "the first update cycle begins one half second later"
            case 0x0B:
                self._put(B, value & ~UPDATED if value & SET else value)
                self._irq8(self._irq())
            case 0x0C | 0x0D:
                pass
            case _:
                self._put(s.index, value & 0x7F if s.index == SECONDS else value)
        self._alarm(self.deadline())

    def deadline(self) -> int | None:
        """When the next enabled flag is set; the pin stays up, and nothing is due, until register C is read."""
        s = self.state
        if self._stopped() or self._irq():
            return None
        enabled, due = s.ram[B], []
        period = self._period()
        if enabled & PERIODIC and period:
            ticks = (self._ticks(s.settled_ns) // period + 1) * period
            due.append(s.second_ns - -ticks * SECOND // CRYSTAL_HZ)
        if not enabled & SET:
            if enabled & UPDATED:
                due.append(s.second_ns + SECOND)
            if enabled & ALARMED and (seconds := _Calendar(bytearray(s.ram)).until_alarm()) is not None:
                due.append(s.second_ns + seconds * SECOND)
        return max(0, min(due)) if due else None

    @invariant
    def nothing_is_worked_out_ahead_of_time(self) -> bool:
        return self.state.settled_ns <= self._clock.now_ns()

    def expire(self) -> None:
        self._settle(self._clock.now_ns())

    def reset(self) -> None:
        """RESET# clears interrupt enables and flags; clock, calendar and memory go on (datasheet, "RESET")."""
        self._settle(self._clock.now_ns())
        self._put(B, self.state.ram[B] & ~(PERIODIC | ALARMED | UPDATED | 0x08))
        self._put(C, 0)
        self.restored()

    def restored(self) -> None:
        self._irq8(self._irq())
        self._alarm(self.deadline())

    # --- the divider chain

    def _settle(self, now: int) -> None:
        """Bring flags, calendar and the IRQ pin up to `now`."""
        s = self.state
        since, s.settled_ns = s.settled_ns, now
        if not self._stopped():
            self._count(since, now)
        self._alarm(self.deadline())

    def _count(self, since: int, now: int) -> None:
        s = self.state
        flags = s.ram[C]
        period = self._period()
        if period and self._ticks(now) // period > self._ticks(since) // period:
            flags |= PERIODIC
        seconds = max(0, now - s.second_ns) // SECOND
        if seconds:
            s.second_ns += seconds * SECOND
            if not s.ram[B] & SET:
                ram = bytearray(s.ram)
                calendar = _Calendar(ram)
                alarm = calendar.until_alarm()
                flags |= UPDATED | (ALARMED if alarm is not None and alarm <= seconds else 0)
                calendar.advance(seconds)
                s.ram = bytes(ram)
        if flags != s.ram[C]:
            before = self._irq()
            self._put(C, flags)
            if not before and self._irq():
                self._irq8(True)

    def _ticks(self, now: int) -> int:
        """Crystal periods since the last whole second."""
        return (now - self.state.second_ns) * CRYSTAL_HZ // SECOND

    def _period(self) -> int:
        """Crystal periods between periodic interrupts; 0 for none. RS 1 and 2 are 8 and 9 with this crystal."""
        rate = self.state.ram[A] & 15
        return 0 if rate == 0 else 1 << (rate + 6 if rate < 3 else rate - 1)

    def _stopped(self) -> bool:
        return self.state.ram[A] & 0x60 == 0x60  # DV 11x holds the divider chain in reset

    def _updating(self, now: int) -> bool:
        s = self.state
        return not self._stopped() and not s.ram[B] & SET and s.second_ns + SECOND - now <= UPDATE_NS

    def _irq(self) -> bool:
        return bool(self.state.ram[B] & self.state.ram[C] & (PERIODIC | ALARMED | UPDATED))

    def _put(self, index: int, value: int) -> None:
        ram = self.state.ram
        self.state.ram = ram[:index] + bytes((value,)) + ram[index + 1 :]
