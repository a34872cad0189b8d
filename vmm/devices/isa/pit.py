"""Intel 8254 programmable interval timer, and system control port B (0x61), which holds counter 2's gate.

Source: Intel 82C54 datasheet (231244), "Operational Description" and "Mode Definitions"; port 0x61 as in the Intel
82371SB (290550), section 2.5.6.

A counter is a function of elapsed input clocks, worked out when somebody looks: no access, however late, does more
than a few divisions. Clock edges are exact: edge n falls at ceil(n * 10^9 / 1193182) ns.

Absent
* A count of 1 in modes 2 and 3, which the datasheet forbids, counts as 2.
* A counter that was never loaded reads 0. Invalid BCD digits count as their binary value.
* The speaker makes no sound; parity and I/O check never fail (bits 6 and 7 of port 0x61 read 0).
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated

from snapshot.field_types import OneOf, Range, Size, u4, u8, u16, u56, u64
from snapshot.schema import state
from vmm.device import Device
from vmm.registers import reads, span, writes
from vmm.wires import Alarm, Clock, Line

HZ = 1_193_182
_REFRESH_NS = 15_085  # port 0x61 bit 4 follows the DRAM refresh request


@state("pit.counter", version=1)
class CounterState:
    """One counter: CR is what the guest writes, CE what counts."""

    mode: Annotated[int, Range(0, 5), "mode"] = 0
    access: Annotated[str, OneOf(("low", "high", "both")), "bytes read and written"] = "both"
    bcd: Annotated[bool, "four decimal digits"] = False
    cr: Annotated[u16, "count register"] = 0
    low_byte: Annotated[u8 | None, "first byte of a count whose second is awaited"] = None
    read_high: Annotated[bool, "the next read gives the high byte"] = False
    latch: Annotated[u16 | None, "latched count"] = None
    status_latch: Annotated[u8 | None, "latched status"] = None
    written: Annotated[bool, "a whole count was written since the control word"] = False
    null_count: Annotated[bool, "CR was written and CE not yet loaded from it"] = True
    gate: Annotated[bool, "GATE input"] = True
    load_at: Annotated[u56 | None, "clock edge at which CE is loaded from CR"] = None
    initial: Annotated[int, Range(1, 0x10000), "count CE was loaded with"] = 0x10000
    start: Annotated[u56 | None, "clock edge at which CE was loaded; in mode 3 where this half began"] = None
    frozen: Annotated[u56 | None, "clocks counted when counting was stopped; counting while null"] = None
    second_half: Annotated[bool, "mode 3: OUT is low"] = False


def _counters() -> tuple[CounterState, ...]:
    return CounterState(), CounterState(), CounterState(gate=False)


@state("pit.8254", version=1)
class PitState:
    counters: Annotated[tuple[CounterState, ...], Size(3), "counters 0, 1, 2"] = field(default_factory=_counters)
    portb: Annotated[u4, "port 0x61: gate 2, speaker, parity check off, I/O check off"] = 0
    irq0: Annotated[bool, "level counter 0's OUT was last driven to"] = False
    next_edge: Annotated[u64 | None, "clock edge at which it changes next"] = None


class Counter:
    """One counter's behaviour at clock edge `t`. Every method takes the edge and settles the counter there first."""

    def __init__(self, state: CounterState) -> None:
        self.state = state

    # --- what the guest does

    def write(self, t: int, value: int) -> None:
        s = self.state
        self._settle(t)
        match s.access:
            case "low":
                self._count(t, value)
            case "high":
                self._count(t, value << 8)
            case _ if s.low_byte is None:
                s.low_byte = value
                if s.mode == 0:  # "Writing the first byte disables counting. OUT is set low immediately."
                    s.load_at = None
                    self._freeze(t)
            case _:
                low, s.low_byte = s.low_byte, None
                self._count(t, value << 8 | low)

    def read(self, t: int) -> int:
        s = self.state
        if s.status_latch is not None:
            value, s.status_latch = s.status_latch, None
            return value
        count = s.latch if s.latch is not None else self.value(t)
        high = s.access == "high" or (s.access == "both" and s.read_high)
        s.read_high = s.access == "both" and not s.read_high
        if not s.read_high:
            s.latch = None
        return count >> 8 if high else count & 0xFF

    def latch_count(self, t: int) -> None:
        if self.state.latch is None:
            self.state.latch = self.value(t)

    def latch_status(self, t: int) -> None:
        s = self.state
        if s.status_latch is None:
            out = self.out(t)
            access = {"low": 1, "high": 2, "both": 3}[s.access]
            s.status_latch = out << 7 | s.null_count << 6 | access << 4 | s.mode << 1 | s.bcd

    def set_gate(self, t: int, level: bool) -> None:
        s = self.state
        self._settle(t)
        rising, s.gate = level and not s.gate, level
        if s.mode in (1, 5):
            if rising and s.written:
                s.load_at = t + 1
        elif not level:
            self._freeze(t)
            s.second_half = False  # OUT is high at once in mode 3
        elif rising and s.mode in (2, 3):
            if s.written:
                s.load_at = t + 1
        elif rising and s.low_byte is None and s.frozen is not None:
            s.start, s.frozen = max(0, t - s.frozen), None

    # --- what it shows

    def out(self, t: int) -> bool:
        self._settle(t)
        s = self.state
        if s.start is None:
            return s.mode != 0
        n = self._elapsed(t)
        match s.mode:
            case 0:
                return s.load_at is None and s.low_byte is None and n >= s.initial
            case 1:
                return n >= s.initial
            case 2:
                return s.frozen is not None or n != self._period() - 1
            case 3:
                return not s.second_half
            case _:
                return n != s.initial

    def value(self, t: int) -> int:
        """CE as the guest reads it."""
        self._settle(t)
        s = self.state
        if s.start is None:
            return 0
        n, modulus = self._elapsed(t), self._modulus()
        match s.mode:
            case 2:
                count = self._period() - n
            case 3:  # counts by two, from an even number
                count = (self._period() & ~1) - 2 * n
            case _:
                count = s.initial - n
        count %= modulus
        return int(str(count), 16) if s.bcd else count

    def next_edge(self, t: int) -> int | None:
        """The clock edge after `t` at which OUT changes, if nobody touches the counter before."""
        out, s = self.out(t), self.state
        if s.load_at is not None:
            after = Counter(replace(s))
            edge = s.load_at
            return edge if after.out(edge) != out else after.next_edge(edge)
        if s.start is None or s.frozen is not None:
            return None
        n = self._elapsed(t)
        match s.mode:
            case 0 | 1:
                return s.start + s.initial if n < s.initial else None
            case 2:
                last = self._period() - 1
                return s.start + (last if n < last else last + 1)
            case 3:
                return s.start + self._half()
            case _:
                return s.start + s.initial + (n == s.initial) if n <= s.initial else None

    # --- how it counts

    def _count(self, t: int, value: int) -> None:
        """A whole count was written."""
        s = self.state
        s.cr = value
        s.null_count = True
        first, s.written = not s.written, True
        # Modes 1 and 5 load at the trigger; modes 2 and 3, once counting, at the end of the cycle.
        if s.mode in (0, 4) or (s.mode in (2, 3) and first):
            s.load_at = t + 1

    def _settle(self, t: int) -> None:
        """Bring loads and reloads up to clock edge `t`, in a bounded number of steps."""
        s = self.state
        if s.load_at is not None and t >= s.load_at:
            self._cycles(s.load_at)
            self._load(s.load_at)
            s.second_half = False
            s.load_at = None
            if s.gate or s.mode in (1, 5):
                s.frozen = None
            else:
                s.frozen = 0
        self._cycles(t)

    def _cycles(self, t: int) -> None:
        """Modes 2 and 3: reload at each end of a cycle (of a half cycle, in mode 3)."""
        s = self.state
        if s.mode not in (2, 3) or s.start is None or s.frozen is not None:
            return
        # A new count waits for the first end; what follows repeats, and whole periods are skipped.
        for _ in range(4):
            length = self._half() if s.mode == 3 else self._period()
            if t - s.start < length:
                return
            if s.null_count:
                self._load(s.start + length)
            else:
                s.start += length
            s.second_half = s.mode == 3 and not s.second_half
            if not s.null_count and t > s.start:
                period = self._period()
                s.start += (t - s.start) // period * period

    def _load(self, t: int) -> None:
        s = self.state
        digits = s.cr if not s.bcd else sum((s.cr >> 4 * i & 15) * 10**i for i in range(4))
        s.initial = digits % self._modulus() or self._modulus()
        s.start = t
        s.null_count = False

    def _freeze(self, t: int) -> None:
        s = self.state
        if s.start is not None and s.frozen is None:
            s.frozen = self._elapsed(t)

    def _elapsed(self, t: int) -> int:
        """Clocks counted since the load."""
        s = self.state
        if s.frozen is not None:
            return s.frozen
        return max(0, t - (s.start or 0))

    def _period(self) -> int:
        return max(2, self.state.initial)

    def _half(self) -> int:
        """Mode 3: an odd count is high for one clock longer than low."""
        return self._period() + (not self.state.second_half) >> 1

    def _modulus(self) -> int:
        return 10_000 if self.state.bcd else 0x10000


class Pit(Device[PitState]):
    """Ports: counters 0..2 at 0..2, control word at 3; port B in bank "portb". Counter 0's OUT is `irq0`."""

    State = PitState

    def __init__(self, clock: Clock, alarm: Alarm, irq0: Line) -> None:
        super().__init__()
        self._clock = clock
        self._alarm, self._irq0 = alarm, irq0

    def _edge(self) -> int:
        return self._clock.now_ns() * HZ // 10**9

    def _counter(self, index: int) -> Counter:
        return Counter(self.state.counters[index])

    @reads(span(0, 3))
    def read_counter(self, index: int) -> int:
        return self._counter(index).read(self._edge())

    @writes(span(0, 3))
    def write_counter(self, index: int, value: int) -> None:
        t = self._edge()
        self._drive(t)
        self._counter(index).write(t, value)
        self._follow(t)

    @writes(3)
    def write_control(self, value: int) -> None:
        select, access, t = value >> 6, value >> 4 & 3, self._edge()
        if select == 3:
            self._read_back(t, value)
        elif access == 0:
            self._counter(select).latch_count(t)
        else:
            self._drive(t)
            mode = value >> 1 & 7
            counters = list(self.state.counters)
            counters[select] = CounterState(
                mode=mode - 4 if mode > 5 else mode,
                access=("low", "high", "both")[access - 1],
                bcd=bool(value & 1),
                gate=counters[select].gate,
            )
            self.state.counters = tuple(counters)
            self._follow(t)

    def _read_back(self, t: int, value: int) -> None:
        for index in range(3):
            if value & 2 << index:
                if not value & 0x20:
                    self._counter(index).latch_count(t)
                if not value & 0x10:
                    self._counter(index).latch_status(t)

    @reads(0, bank="portb")
    def read_portb(self) -> int:
        out = self._counter(2).out(self._edge())
        refresh = self._clock.now_ns() // _REFRESH_NS & 1
        return self.state.portb | refresh << 4 | out << 5

    @writes(0, bank="portb")
    def write_portb(self, value: int) -> None:
        self.state.portb = value & 0x0F
        self._counter(2).set_gate(self._edge(), bool(value & 1))

    def deadline(self) -> int | None:
        edge = self.state.next_edge
        return None if edge is None else -(-edge * 10**9 // HZ)

    def expire(self) -> None:
        self._drive(self._edge())

    def restored(self) -> None:
        self._irq0(self.state.irq0)
        self._alarm(self.deadline())

    def _drive(self, t: int) -> None:
        """Show the interrupt controller what counter 0 did up to now: a pulse that has gone by is still a pulse."""
        s = self.state
        if s.next_edge is not None and t >= s.next_edge:
            if self._counter(0).out(t) == s.irq0:
                self._irq0(not s.irq0)
                self._irq0(s.irq0)
            self._follow(t)

    def _follow(self, t: int) -> None:
        """Counter 0 was touched, or its time has come: its OUT, and when it will change."""
        s, counter = self.state, self._counter(0)
        level = counter.out(t)
        if level != s.irq0:
            s.irq0 = level
            self._irq0(level)
        s.next_edge = counter.next_edge(t)
        self._alarm(self.deadline())
