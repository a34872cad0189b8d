"""High precision event timers: a counter of 100 MHz and three comparators.

Source: IA-PC HPET specification 1.0a, chapter 2. The block's id, its counter's period and its three timers are those of
QEMU's.

A match is of the counter's and the comparator's bits, so one that lies behind comes when the counter has come round.
Counting is worked out when somebody looks: `counter` plus guest time.

An edge that is signalled by a pin leaves the pin high until the next one, or until the timer is disabled: a controller
that forgets an edge whose line has fallen (the 8259A) sees it.

Absent
* A timer is routed to pins 20 to 23 of the I/O APIC, or by the FSB, or by legacy replacement; to no other pin.
* A comparator written by two accesses of four bytes has VAL_SET cleared by the one of the low half.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from snapshot.field_types import Size, u3, u5, u32, u56, u64
from snapshot.schema import state
from vmm.device import Device, outside
from vmm.registers import reads, span, writes
from vmm.wires import Alarm, Clock, Line, Msi

TIMERS = 3
TICK_NS = 10
FIRST_PIN, LAST_PIN = 20, 23
_CAPABILITIES = 0x8086_A201  # of vendor 8086: revision 1, three timers, a counter of 64 bits, legacy replacement
_PERIOD_FS = TICK_NS * 10**6
_TIMER_CAPABILITIES = 0x8030  # FSB delivery, 64 bits, periodic
_ROUTES = 0xF << FIRST_PIN
_LOW, _HIGH, _ALL = (1 << 32) - 1, (1 << 32) - 1 << 32, (1 << 64) - 1
_LAST_TICK = (1 << 56) - 1


@state("hpet.timer", version=1)
class TimerState:
    """One comparator."""

    level: Annotated[bool, "Tn_INT_TYPE_CNF: level-triggered"] = False
    enabled: Annotated[bool, "Tn_INT_ENB_CNF: a match interrupts"] = False
    periodic: Annotated[bool, "Tn_TYPE_CNF"] = False
    setting: Annotated[bool, "Tn_VAL_SET_CNF: a write of the comparator is one of its accumulator, too"] = False
    narrow: Annotated[bool, "Tn_32MODE_CNF: 32 bits are compared"] = False
    route: Annotated[u5, "Tn_INT_ROUTE_CNF: pin of the I/O APIC"] = 0
    fsb: Annotated[bool, "Tn_FSB_EN_CNF: interrupt by a message"] = False
    comparator: Annotated[u64, "value compared with the counter"] = _ALL
    period: Annotated[u64, "what a match of a periodic timer adds to it"] = 0
    message: Annotated[u32, "Tn_FSB_INT_VAL"] = 0
    address: Annotated[u32, "Tn_FSB_INT_ADDR"] = 0
    raised: Annotated[bool, "an edge was signalled by its pin, which is still high"] = False
    due: Annotated[u56 | None, "tick of guest time of the next match"] = None


def _timers() -> tuple[TimerState, ...]:
    return tuple(TimerState() for _ in range(TIMERS))


@state("hpet", version=1)
class HpetState:
    """The timer block."""

    enabled: Annotated[bool, "ENABLE_CNF: it counts"] = False
    legacy: Annotated[bool, "LEG_RT_CNF: timers 0 and 1 are interrupts 0 and 8, and what was there is not"] = False
    status: Annotated[u3, "level-triggered timers that have matched"] = 0
    counter: Annotated[u64, "main counter; while it counts, what it was at guest time zero"] = 0
    pit: Annotated[bool, "level of the 8254's OUT"] = False
    rtc: Annotated[bool, "level of the RTC's IRQ"] = False
    timers: Annotated[tuple[TimerState, ...], Size(TIMERS)] = field(default_factory=_timers)


class Hpet(Device[HpetState]):
    """Registers of four bytes; comparators of eight, too. `irq0` and `irq8` are the 8254's and the RTC's interrupts,
    which pass through here; `irq20` to `irq23` pins of the I/O APIC."""

    State = HpetState

    def __init__(
        self, clock: Clock, alarm: Alarm, msi: Msi, irq0: Line, irq8: Line, irq20: Line, irq21: Line, irq22: Line,
        irq23: Line,
    ) -> None:  # fmt: skip
        super().__init__()
        self._clock, self._alarm, self._msi = clock, alarm, msi
        self._irq0, self._irq8 = irq0, irq8
        self._pins = (irq20, irq21, irq22, irq23)

    # --- what passes through

    @outside
    def set_pit(self, level: bool) -> None:
        """Drive the 8254's OUT."""
        self.state.pit = level
        self._drive()

    @outside
    def set_rtc(self, level: bool) -> None:
        """Drive the RTC's IRQ."""
        self.state.rtc = level
        self._drive()

    # --- the block's registers

    @reads(0x000, size=4)
    def read_capabilities(self) -> int:
        return _CAPABILITIES

    @reads(0x004, size=4)
    def read_period(self) -> int:
        return _PERIOD_FS

    @reads(0x010, size=4)
    def read_configuration(self) -> int:
        return self.state.enabled | self.state.legacy << 1

    @writes(0x010, size=4)
    def write_configuration(self, value: int) -> None:
        s, counter = self.state, self._counter()
        s.enabled, s.legacy = bool(value & 1), bool(value & 2)
        self._set_counter(counter)

    @reads(0x020, size=4)
    def read_status(self) -> int:
        return self.state.status

    @writes(0x020, size=4)
    def write_status(self, value: int) -> None:
        self.state.status &= ~value
        self._drive()

    @reads(0x0F0, size=4)
    def read_counter(self) -> int:
        return self._counter() & _LOW

    @reads(0x0F4, size=4)
    def read_counter_high(self) -> int:
        return self._counter() >> 32

    @writes(0x0F0, size=4)
    def write_counter(self, value: int) -> None:
        self._set_counter(self._counter() & _HIGH | value)

    @writes(0x0F4, size=4)
    def write_counter_high(self, value: int) -> None:
        self._set_counter(self._counter() & _LOW | value << 32)

    @reads(0x008, 0x00C, 0x014, 0x018, 0x01C, 0x024, span(0x028, 50, 4), 0x0F8, 0x0FC, span(0x118, 3, 32),
           span(0x11C, 3, 32), span(0x160, 168, 4), size=4)  # fmt: skip
    def read_reserved(self, _index: int = 0) -> int:
        return 0

    @writes(0x024, size=4)
    def write_status_high(self, value: int) -> None:
        """Reserved; without it a write here would be one of the whole status as it reads, and clear it."""

    # --- a timer's registers

    @reads(span(0x100, TIMERS, 32), size=4)
    def read_timer(self, index: int) -> int:
        t = self.state.timers[index]
        bits = t.level << 1 | t.enabled << 2 | t.periodic << 3 | t.setting << 6 | t.narrow << 8 | t.fsb << 14
        return _TIMER_CAPABILITIES | bits | t.route << 9

    @writes(span(0x100, TIMERS, 32), size=4)
    def write_timer(self, index: int, value: int) -> None:
        t = self.state.timers[index]
        counted = t.narrow
        t.level, t.enabled, t.periodic = bool(value & 0x002), bool(value & 0x004), bool(value & 0x008)
        t.setting, t.narrow, t.fsb = t.periodic and bool(value & 0x040), bool(value & 0x100), bool(value & 0x4000)
        if (pin := value >> 9 & 31) == 0 or _ROUTES >> pin & 1:  # one that it cannot be routed to does not stick
            t.route = pin
        if not t.level:
            self.state.status &= ~(1 << index)
        if not t.enabled or t.level or t.fsb:
            t.raised = False
        if t.narrow != counted:
            self._aim(index)
        self._drive()

    @reads(span(0x104, TIMERS, 32), size=4)
    def read_routes(self, _index: int) -> int:
        return _ROUTES

    @reads(span(0x108, TIMERS, 32), size=4)
    def read_comparator(self, index: int) -> int:
        return self.state.timers[index].comparator & _LOW

    @reads(span(0x10C, TIMERS, 32), size=4)
    def read_comparator_high(self, index: int) -> int:
        return self.state.timers[index].comparator >> 32

    @writes(span(0x108, TIMERS, 32), size=4)
    def write_comparator(self, index: int, value: int) -> None:
        self._compare(index, value, _LOW)
        self.state.timers[index].setting = False

    @writes(span(0x10C, TIMERS, 32), size=4)
    def write_comparator_high(self, index: int, value: int) -> None:
        self._compare(index, value << 32, _HIGH)

    @reads(span(0x108, TIMERS, 32), size=8)
    def read_comparator_whole(self, index: int) -> int:
        return self.state.timers[index].comparator

    @writes(span(0x108, TIMERS, 32), size=8)
    def write_comparator_whole(self, index: int, value: int) -> None:
        self._compare(index, value, _ALL)
        self.state.timers[index].setting = False

    @reads(span(0x110, TIMERS, 32), size=4)
    def read_message(self, index: int) -> int:
        return self.state.timers[index].message

    @writes(span(0x110, TIMERS, 32), size=4)
    def write_message(self, index: int, value: int) -> None:
        self.state.timers[index].message = value

    @reads(span(0x114, TIMERS, 32), size=4)
    def read_address(self, index: int) -> int:
        return self.state.timers[index].address

    @writes(span(0x114, TIMERS, 32), size=4)
    def write_address(self, index: int, value: int) -> None:
        self.state.timers[index].address = value

    # --- counting

    def _tick(self) -> int:
        return self._clock.now_ns() // TICK_NS

    def _counter(self) -> int:
        s = self.state
        return s.counter + self._tick() & _ALL if s.enabled else s.counter

    def _set_counter(self, value: int) -> None:
        """It stands at `value`, and goes on from there if it is enabled."""
        s = self.state
        s.counter = value - self._tick() & _ALL if s.enabled else value
        for index in range(TIMERS):
            self._aim(index)
        self._drive()

    def _compare(self, index: int, value: int, mask: int) -> None:
        """Write the bits of `mask` of a comparator; of a periodic timer they are its period, and the comparator's where
        VAL_SET says so (2.3.9.2.2)."""
        t = self.state.timers[index]
        if t.periodic:
            t.period = t.period & ~mask | value
        if not t.periodic or t.setting:
            t.comparator = t.comparator & ~mask | value
            self._aim(index)

    def _aim(self, index: int) -> None:
        """Find a timer's next match: its comparator, or the counter, is another one."""
        t = self.state.timers[index]
        t.due = None
        if self.state.enabled:
            self._aim_at(t, self._tick() + (t.comparator - self._counter() & self._mask(t)))
        self._alarm(self.deadline())

    def _aim_at(self, timer: TimerState, tick: int) -> None:
        timer.due = tick if tick <= _LAST_TICK else None  # guest time ends before

    def _mask(self, timer: TimerState) -> int:
        return _LOW if timer.narrow else _ALL

    def deadline(self) -> int | None:
        return min((t.due * TICK_NS for t in self.state.timers if t.due is not None), default=None)

    def expire(self) -> None:
        now = self._tick()
        for index, timer in enumerate(self.state.timers):
            if timer.due is not None and timer.due <= now:
                self._match(index, timer, timer.due, now)
        self._alarm(self.deadline())

    def _match(self, index: int, timer: TimerState, due: int, now: int) -> None:
        """The counter has come to the comparator, once or more often; the next match lies ahead."""
        mask = self._mask(timer)
        period = timer.period & mask if timer.periodic else 0
        ahead = ((now - due) // (period or mask + 1) + 1) * (period or mask + 1)
        if period:
            timer.comparator = timer.comparator & ~mask | timer.comparator + ahead & mask
        self._aim_at(timer, due + ahead)
        if timer.enabled and timer.fsb:
            self._msi(timer.address, timer.message)
        elif timer.level:
            self.state.status |= 1 << index
        elif timer.enabled:
            timer.raised = False
            self._drive()
            timer.raised = True
        self._drive()

    # --- interrupts

    def _interrupts(self, index: int) -> bool:
        """The level of a timer's pin."""
        s, t = self.state, self.state.timers[index]
        if not s.enabled or not t.enabled or t.fsb:
            return False
        return bool(s.status >> index & 1) if t.level else t.raised

    def _drive(self) -> None:
        s = self.state
        levels = [self._interrupts(index) for index in range(TIMERS)]
        self._irq0(levels[0] if s.legacy else s.pit)
        self._irq8(levels[1] if s.legacy else s.rtc)
        routed = [(s.timers[i].route, levels[i]) for i in range(TIMERS) if i == 2 or not s.legacy]
        for pin, line in enumerate(self._pins, FIRST_PIN):
            line((pin, True) in routed)

    def reset(self) -> None:
        self.state = HpetState(pit=self.state.pit, rtc=self.state.rtc)  # the inputs are others' outputs
        self.restored()

    def restored(self) -> None:
        self._drive()
        self._alarm(self.deadline())
