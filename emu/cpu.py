"""The emulated CPU: a `vmm.cpu.protocol.Cpu` on Unicorn.

Theory of operation
-------------------
Each block of straight-line code is charged to the clock, by its size in bytes, when it is entered; a block that would
cross the limit is refused, and `run()` decides what to do at that boundary.

    code       |--- block A ---|--------- block B ---------|--- block C ---|
    time       0               40                          110             150
                               ^                           ^
                               entering B charges 70: time is 110 while B runs

A deadline at 100 is seen at 110, when B has ended: B crosses it, so B is refused at 40, let through once more alone,
and the run ends. An interrupt whose line rises while B runs is taken at 110 too, before C: the limit becomes 0, and C
is refused. So everything that happens to the machine happens at boundaries, and where they lie depends on the code
alone: a run is a function of the state it began with.

A stop inside a block (`stop_at`) charges the block, then runs its instructions one by one up to there. What is charged
and not yet run is `clock.prepaid`; a CPU that wakes there first finishes the block, one instruction at a time, before
anything else may happen. That is why a cut leaves no trace.

    stop_at 70 |--- block A ---|--- run ---|  prepaid  |
                               40          70 (position; time is 110)
"""

from __future__ import annotations

import mmap
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import unicorn
from unicorn import x86_const as x86

from emu import layout, state
from emu.core import Core
from emu.engine import HF_INHIBIT_IRQ, INTERRUPT_VIRQ, MOST_DELIVERIES, Kept
from emu.native import replaced
from vmm.clock import BYTES_PER_NS, LAST_NS, GuestClock, Word
from vmm.cpu import model as cpu_model
from vmm.cpu import startup
from vmm.cpu.protocol import (
    Cpu,
    CpuState,
    Crashed,
    EventState,
    Exit,
    Expired,
    Halted,
    Intr,
    IoBus,
    Kicked,
    Reached,
    Shutdown,
)
from vmm.ram import Ram

_TIME, _LIMIT, _REFUSED = Word.TIME.value, Word.LIMIT.value, Word.REFUSED.value
_EXCEPTIONS, _TSC_OFFSET, _TSC_SCALE = Word.EXCEPTIONS.value, Word.TSC_OFFSET.value, Word.TSC_SCALE.value
_DELIVERIES, _STEPPING = Word.DELIVERIES.value, Word.STEPPING.value
_FOREVER = (1 << 64) - 1
_IF = 1 << 9

PORTABLE = "ANYHYVE_PORTABLE"  # set in the environment: use Python callbacks though machine code would do


@dataclass(frozen=True)
class _Mark:
    kept: Kept
    saved: CpuState
    tsc_offset: int

    @property
    def armed(self) -> bool:
        return bool(self.kept.dr7 & 0xFF)


class EmuCpu(Cpu):
    """One emulated CPU over shared RAM. What only its core and the hooks use: `bus`, `apic`, `paused`, and while it is
    not on the engine `kept`, its registers, with `tsc_offset`, `counts` and `exceptions`."""

    turn_ns = 200_000
    counts_pauses = True

    def __init__(self, ram: Ram, bus: IoBus, intr: Intr, clock: GuestClock, first: Cpu | None = None, /) -> None:
        self.bus, self.apic = bus, intr.apic
        self.kept = Kept()
        self.paused: Callable[[], None] | None = None
        self.tsc_offset = self.exceptions = 0
        self._clock, self._words, self._intr = clock, clock.words, intr
        self._pin = False
        self._waits_at_apic = False  # an NMI, an INIT or a start-up message does
        self._halted = False
        self._event: EventState | None = None
        self._stop_at: int | None = None
        if first is None:
            self._core = core = Core(self, ram, bus, clock, native_refusal() is None)
        else:
            assert isinstance(first, EmuCpu)
            self._core = core = first._core
            self.kept.copy(core.new)
        self.counts = dict.fromkeys(core.hooks.counts, 0)
        self._engine, self._hooks = core.engine, core.hooks

    # --- the protocol

    def run(self, limit: int) -> Exit:
        words, clock, core, engine = self._words, self._clock, self._core, self._engine
        ended: Shutdown | Crashed | None
        core.put_on(self)
        if self._event is not None and (ended := self._deliver()) is not None:
            return ended
        if clock.prepaid and (stopped := self._finish_block()) is not None:
            return stopped
        while True:
            if core.ram_changed():
                core.show_windows()
            if self._stop_at is not None and clock.position >= self._stop_at:
                return Reached()
            if core.kicked:
                core.kicked = False
                return Kicked()
            if words[_TIME] >= limit:
                return Expired()
            if self._waits_at_apic and (ended := self._attend()) is not None:
                return ended
            if self._halted:
                if not (self._pin and engine.eflags.value & _IF):
                    return Halted()
                self._halted = False
            goal = _FOREVER if self._stop_at is None else words[_TIME] + self._stop_at - clock.position
            # While an NMI is blocked, the handler of the one before ends at some block's end.
            look = min(limit, words[_TIME] + 1) if self._waits_at_apic else limit
            nearest = min(look, goal)
            if (ended := self._enter(nearest)) is not None:
                return ended
            # A limit that was lowered meanwhile, by a kick or a rising INTR, is none: what wants to be seen at this
            # boundary is seen before the next block is gone into.
            refused, time = words[_REFUSED], words[_TIME]
            if not refused or words[_LIMIT] != nearest or not time < nearest < time + refused:
                continue
            # The next block crosses the limit. An exact stop goes into it, also behind a deadline; a deadline waits for
            # its end.
            if self._stop_at is not None and clock.position + refused > self._stop_at:
                words[_TIME] = time + refused
                clock.prepaid = refused
                if (stopped := self._finish_block()) is not None:
                    return stopped
            elif (ended := self._enter(time + refused)) is not None:
                return ended

    def kick(self) -> None:
        self._core.kicked = True
        self._words[_LIMIT] = 0

    def intr(self, level: bool) -> None:
        self._pin = level
        if self._core.on is not self:
            return
        if level:
            self._words[_LIMIT] = 0  # stop at the next boundary, where it can be taken
        else:
            self._engine.interrupt_request.value &= ~INTERRUPT_VIRQ

    def apic_event(self, level: bool) -> None:
        self._waits_at_apic = level
        if level and self._core.on is self:
            self._words[_LIMIT] = 0

    def can_run(self) -> bool:
        if not self._halted:
            return True
        on = self._core.on is self
        flags = self._engine.eflags.value if on else self.kept.eflags
        if self._pin and flags & _IF:
            return True
        if not self._waits_at_apic or self.apic is None:
            return False
        return self.apic.begins_anew() or not (self._engine.nmi_blocked if on else self.kept.nmi_blocked)

    def listens(self) -> bool:
        flags = self._engine.eflags.value if self._core.on is self else self.kept.eflags
        return bool(flags & _IF)

    def count_pauses(self, counted: Callable[[], None] | None) -> None:
        self.paused = counted
        if self._core.on is self:
            self._engine.intercept_pauses(counted is not None)

    def pause(self) -> None:
        """It ran a PAUSE, which is counted."""
        if self.paused is not None:
            self.paused()

    def tsc(self) -> int:
        return self._core.ticks() + self._offset & _FOREVER

    def tsc_reaches(self, value: int) -> int | None:
        ticks = value - self._offset & _FOREVER
        if ticks <= self._core.ticks():
            return self._clock.now_ns()
        quarters = -(-(ticks << 32) // self._words[_TSC_SCALE])
        when_ns = -(-quarters // BYTES_PER_NS)
        return when_ns if when_ns < LAST_NS else None

    def set_a20(self, enabled: bool) -> None:
        self._engine.set_a20(enabled)

    def stop_at(self, position: int | None) -> None:
        self._stop_at = position

    def registers(self) -> tuple[int, ...]:
        engine = self._engine
        with self._core.shown(self):
            return (*engine.regs, engine.eip.value, engine.uc.reg_read(x86.UC_X86_REG_RFLAGS) & 0xFFFFFFFF)

    def save(self) -> CpuState:
        with self._core.shown(self):
            saved = state.save(self._engine, self.tsc(), self._halted, self._event)
        if self.apic is not None:
            saved.cr8 = self.apic.task_priority()
        return saved

    def load(self, saved: CpuState) -> None:
        self._core.put_on(self)
        self._event = saved.event
        self._halted = saved.halted
        self._set_tsc(saved.tsc)
        state.load(self._engine, saved)
        self._engine.intercept_pauses(self.paused is not None)

    def mark(self) -> object:
        with self._core.shown(self):
            return _Mark(self._engine.kept_registers(), self.save(), self._offset)

    def reset(self, mark: object) -> None:
        assert isinstance(mark, _Mark)
        on = self._core.on is self
        if mark.armed or (self._engine.breakpoints_armed if on else self.kept.dr7 & 0xFF):
            self.load(mark.saved)
            return
        if on:
            self._engine.restore_registers(mark.kept)
            self._engine.intercept_pauses(self.paused is not None)
        else:
            self.kept.copy(mark.kept)
        self._offset = mark.tsc_offset
        self._event, self._halted = mark.saved.event, mark.saved.halted

    @staticmethod
    def refusal(state: CpuState) -> str | None:
        return None  # what this CPU cannot hold, none can

    @staticmethod
    def tsc_khz(wanted: int | None = None) -> int:
        return cpu_model.TSC_KHZ if wanted is None else wanted

    def defer_writes(self, port: int, on: bool) -> None:
        pass  # a write costs less here than keeping it for later

    def discard_code(self, start: int, end: int) -> None:
        self._engine.discard_code(start, end)

    def exits(self) -> dict[str, int]:
        on = self._core.on is self
        counts, exceptions = (self._hooks.counts, self._words[_EXCEPTIONS]) if on else (self.counts, self.exceptions)
        return counts | {"exception": exceptions}

    def close(self) -> None:
        self._core.close()

    # --- running

    def _enter(self, limit: int, inside: bool = False) -> Shutdown | Crashed | None:
        """Run until the limit, a halt or a failure. None: the CPU can go on, and the word REFUSED is the size of the
        block that was not entered, 0 when there is none. `inside` a block nobody is heard: neither kicks nor the INTR
        pin."""
        words, engine, hooks = self._words, self._engine, self._hooks
        if self._pin and not inside:
            engine.interrupt_request.value |= INTERRUPT_VIRQ
        else:
            engine.interrupt_request.value &= ~INTERRUPT_VIRQ
        words[_REFUSED] = 0
        words[_LIMIT] = limit
        if self._core.kicked and not inside:
            words[_LIMIT] = 0
        hooks.counts["stop"] += 1
        crash = None
        try:
            engine.start(engine.eip.value)
        except unicorn.UcError as error:
            crash = Crashed(engine.eip.value, f"{error} at {engine.eip.value:#x}")
        if hooks.ended is not None:
            return hooks.end()
        if crash is not None:
            return crash
        if words[_DELIVERIES] > MOST_DELIVERIES:
            words[_DELIVERIES] = 0
            return Crashed(engine.eip.value, "an exception's handler cannot be fetched, which raises another")
        if engine.halted.value:
            self._halted = True
            hooks.counts["halt"] += 1
        return None

    def _finish_block(self) -> Exit | None:
        """Run what is prepaid, one instruction at a time; None at the block's end. Time stands at the block's end."""
        self._words[_STEPPING] = 1
        try:
            return self._step()
        finally:
            self._words[_STEPPING] = 0
            self._engine.one_instruction(False)

    def _step(self) -> Exit | None:
        words, clock, engine = self._words, self._clock, self._engine
        while clock.prepaid:
            # Where the block has moved memory, what it sees is decided at its end: it is not cut before that.
            if self._stop_at is not None and clock.position >= self._stop_at and not self._core.ram_changed():
                return Reached()
            # The first entry is refused and tells the instruction's size; the second runs it.
            end, left = words[_TIME], self._blocks_left()
            engine.one_instruction(True)
            if (ended := self._enter(end, inside=True)) is not None:
                return ended
            size = words[_REFUSED]
            if size and self._blocks_left() == left:
                engine.one_instruction(True)
                words[_TIME] = end - size
                if (ended := self._enter(end, inside=True)) is not None:
                    return ended
                if words[_TIME] < end:
                    words[_TIME] = end
                    continue  # another thread's kick came in between and lowered the limit
            # What leaves the block leaves the rest of it charged, as when the block ran whole.
            leaves = not size or self._halted or self._blocks_left() != left
            clock.prepaid = 0 if leaves else max(0, clock.prepaid - size)
        return None

    def _blocks_left(self) -> int:
        """How many blocks were left before their end: by a fault, or for an instruction that is done here."""
        counts = self._hooks.counts
        return int(self._words[_EXCEPTIONS]) + counts["msr"] + counts["system"]

    def _attend(self) -> Shutdown | None:
        """Do what waits at the local APIC, as far as it can be done now."""
        apic, engine = self.apic, self._engine
        assert apic is not None
        if apic.begins_anew():
            startup.begin_anew(self, apic)
            return None
        if engine.nmi_blocked or engine.hflags.value & HF_INHIBIT_IRQ:
            return None
        if not apic.take_nmi():
            self._waits_at_apic = False  # it is something else
            return None
        self._halted, self._event = False, EventState(kind="nmi", vector=2)
        return self._deliver()

    def _deliver(self) -> Shutdown | None:
        """Deliver the event that another CPU had accepted, or what a fault in its delivery leads to."""
        event, self._event = self._event, None
        assert event is not None
        delivery = self._hooks.delivery
        match event.kind:
            case "software":
                return None  # RIP is still at the INT n: it runs again
            case "exception":
                delivered = delivery.exception(event.vector, event.error_code or 0)
            case _:
                delivered = delivery.hardware(event.vector)
        return None if delivered else Shutdown()

    def acknowledge(self) -> int:
        """The interrupt is taken: INTA. Returns the vector."""
        # The engine does this behind the delivery, which may fault: there would be a second INTA.
        self._engine.interrupt_request.value &= ~INTERRUPT_VIRQ
        self._hooks.counts["interrupt"] += 1
        self._pin = False
        vector = self._intr.acknowledge()
        if self._intr.pending():  # another one waits: look again at the handler's first block
            self.intr(True)
        return vector

    # --- time-stamp counter: guest time in the TSC's ticks, plus what the guest wrote

    def write_tsc(self, value: int) -> None:
        """As the guest does: what waits for a value of it waits for another time."""
        self._set_tsc(value)
        if self.apic is not None:
            self.apic.tsc_moved()

    def _set_tsc(self, value: int) -> None:
        self._offset = value - self._core.ticks() & _FOREVER

    @property
    def _offset(self) -> int:
        return self._words[_TSC_OFFSET] if self._core.on is self else self.tsc_offset

    @_offset.setter
    def _offset(self, value: int) -> None:
        if self._core.on is self:
            self._words[_TSC_OFFSET] = value
        else:
            self.tsc_offset = value


def native_refusal() -> str | None:
    """Why this host cannot use machine code for the engine's callbacks; None when it can."""
    if os.environ.get(PORTABLE):
        return f"{PORTABLE} is set"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the host is {platform.machine()}, not x86-64"
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    except OSError as error:
        return f"the host refuses executable memory ({error.strerror})"
    return None


def probe() -> str:
    """Build an engine, which checks its insides, and say how callbacks run here. Raises BackendError."""
    layout.check_running()
    refusal = native_refusal()
    how = "native callbacks" if refusal is None else f"portable callbacks, slower: {refusal}"
    if refusal is None and (left := replaced.replace()):
        how += f"; the engine's own {', '.join(left)}, which checks less"
    return f"unicorn {unicorn.__version__}, {how}"
