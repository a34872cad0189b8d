"""A CPU's local APIC.

Source: Intel SDM vol. 3, chapter 11 "Advanced programmable interrupt controller". Six LVT entries, version 0x14; it
counts at 1 GHz, a tick of guest time, before it is divided.

Absent
* x2APIC, CMCI, suppression of EOI broadcasts, SMI. Thermal and performance interrupts never come; their LVTs are kept.
* A CPU's id is fixed: writes of the ID register are lost (11.4.6: model specific).
* LINT1 is edge-triggered (11.5.1); ExtINT is for LINT0, where the 8259As are.
* Arbitration and remote read registers: the bus has neither.
"""

from __future__ import annotations

from typing import Annotated

from snapshot.field_types import Range, Size, u4, u8, u32, u56, u64
from snapshot.schema import state
from vmm.device import Device, outside
from vmm.devices.apic.messages import EVERYONE, EXTINT, FIXED, INIT, LOWEST, NMI, EndOfInterrupt, Send
from vmm.registers import reads, span, writes
from vmm.wires import Alarm, Clock, Inta, Line, Placement, Tsc

BASE = 0xFEE0_0000
VERSION = 0x0005_0014  # six LVT entries
_PAGES = (1 << 40) // 4096  # of the model's physical addresses
_MASKED, _REMOTE_IRR, _LEVEL = 1 << 16, 1 << 14, 1 << 15
_ONE_SHOT, _PERIODIC, _DEADLINE = range(3)  # timer modes
_ICR = 0xFF00_0000_000C_CFFF
_SEND_ILLEGAL, _RECEIVED_ILLEGAL, _NO_REGISTER = 0x20, 0x40, 0x80  # ESR
_LVT = {0x32: "timer", 0x33: "thermal", 0x34: "performance", 0x35: "lint0", 0x36: "lint1", 0x37: "error"}
_LVT_BITS = {"timer": 0x7_00FF, "thermal": 0x1_07FF, "performance": 0x1_07FF, "lint0": 0x1_A7FF, "lint1": 0x1_A7FF,
             "error": 0x1_00FF}  # fmt: skip


@state("apic.local", version=1)
class LapicState:
    """A local APIC."""

    enabled: Annotated[bool, "IA32_APIC_BASE.EN"] = True
    page: Annotated[int, Range(0, _PAGES - 1), "IA32_APIC_BASE's page"] = BASE >> 12
    tpr: Annotated[u8, "task priority"] = 0
    ldr: Annotated[u8, "logical id"] = 0
    dfr: Annotated[u4, "model of logical ids: 15 flat, 0 clusters"] = 15
    software: Annotated[bool, "SVR bit 8: enabled by software"] = False
    focus: Annotated[bool, "SVR bit 9"] = False
    spurious: Annotated[u8, "SVR: vector of an interrupt that is gone"] = 0xFF
    irr: Annotated[bytes, Size(32), "interrupts requested, vector 0 first"] = bytes(32)
    isr: Annotated[bytes, Size(32), "interrupts in service"] = bytes(32)
    tmr: Annotated[bytes, Size(32), "those that are level-triggered"] = bytes(32)
    esr: Annotated[u8, "errors, as of the last write of ESR"] = 0
    errors: Annotated[u8, "errors since"] = 0
    icr: Annotated[u64, "interrupt command"] = 0
    timer: Annotated[u32, "LVT: timer"] = _MASKED
    thermal: Annotated[u32, "LVT: thermal sensor"] = _MASKED
    performance: Annotated[u32, "LVT: performance counters"] = _MASKED
    lint0: Annotated[u32, "LVT: LINT0"] = _MASKED
    lint1: Annotated[u32, "LVT: LINT1"] = _MASKED
    error: Annotated[u32, "LVT: error"] = _MASKED
    divide: Annotated[u4, "divide configuration"] = 0
    initial: Annotated[u32, "initial count"] = 0
    count: Annotated[u32, "count at `started`"] = 0
    started: Annotated[u56 | None, "guest ns from which it counts down; null: it does not"] = None
    deadline_tsc: Annotated[u64, "IA32_TSC_DEADLINE"] = 0
    lint0_level: Annotated[bool, "level of LINT0"] = False
    lint1_level: Annotated[bool, "level of LINT1"] = False
    nmi: Annotated[bool, "an NMI waits for the CPU"] = False
    init: Annotated[bool, "an INIT waits for the CPU"] = False
    sipi: Annotated[u8 | None, "a start-up message waits for the CPU: its vector"] = None
    waits: Annotated[bool, "the CPU waits for a start-up message, and runs nothing"] = False


class Lapic(Device[LapicState]):
    """The local APIC of CPU `number` of `cpus`, and all its interrupts: implements the CPU's `Intr`. Registers of four
    bytes, sixteen apart. `intr` is the CPU's INTR pin; `event` says that an NMI, an INIT or a start-up message waits
    for it; `send` and `eoi` are the bus to others."""

    State = LapicState

    def __init__(
        self, number: int, clock: Clock, alarm: Alarm, intr: Line, send: Send, eoi: EndOfInterrupt, inta: Inta,
        event: Line, place: Placement, tsc: Tsc, cpus: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.number, self.cpus = number, cpus
        self._clock, self._alarm, self._tsc = clock, alarm, tsc
        self._intr, self._event, self._inta = intr, event, inta
        self._send, self._eoi, self._place = send, eoi, place

    # --- the CPU's side

    @property
    def apic(self) -> Lapic:
        return self

    def pending(self) -> bool:
        """The INTR pin's level."""
        return self._highest() is not None or self._external()

    def waits_for_task_priority(self) -> bool:
        """Whether an interrupt is held back by the task priority alone: CR8 lets it come."""
        s = self.state
        return s.enabled and not self.pending() and _top(s.irr) >> 4 > _top(s.isr) >> 4

    @outside
    def acknowledge(self) -> int:
        """The vector the CPU is to take: the highest requested, or the 8259As', or the spurious one."""
        s = self.state
        vector = self._highest()
        if vector is not None:
            s.irr, s.isr = _without(s.irr, vector), _with(s.isr, vector)
        elif self._external():
            vector = self._inta()
        else:
            vector = s.spurious
        self._drive()
        return vector

    @outside
    def task_priority(self) -> u4:
        """CR8 (11.8.6.1)."""
        return self.state.tpr >> 4

    @outside
    def set_task_priority(self, value: u4) -> None:
        """Write CR8."""
        self.state.tpr = value << 4
        self._drive()

    @outside
    def base(self) -> u64:
        """IA32_APIC_BASE (11.4.4)."""
        s = self.state
        return s.page << 12 | s.enabled << 11 | (self.number == 0) << 8

    @outside
    def set_base(self, value: u64) -> bool:
        """Write IA32_APIC_BASE. False, and nothing happens, for bits that are reserved. What is disabled loses its
        state, as at power-on (11.4.3)."""
        s = self.state
        if value & ~0x900 & 0xFFF or value >> 12 >= _PAGES:
            return False
        if s.enabled and not value & 0x800:
            self.state = s = LapicState(lint0_level=s.lint0_level, lint1_level=s.lint1_level, nmi=s.nmi, init=s.init,
                                        sipi=s.sipi, waits=s.waits)  # fmt: skip
        s.enabled, s.page = bool(value & 0x800), value >> 12
        self.restored()
        return True

    @outside
    def deadline_msr(self) -> u64:
        """IA32_TSC_DEADLINE (11.5.4.1): 0 while nothing is awaited."""
        return self.state.deadline_tsc

    @outside
    def set_deadline_msr(self, value: u64) -> None:
        """Write IA32_TSC_DEADLINE; of no effect in another mode of the timer."""
        if self._mode() == _DEADLINE:
            self.state.deadline_tsc = value
            self.tsc_moved()

    @outside
    def tsc_moved(self) -> None:
        """The TSC was written: what waits for it waits for another time."""
        self._alarm(self.deadline())

    @outside
    def take_nmi(self) -> bool:
        """Whether an NMI waits; it waits no more."""
        waited, self.state.nmi = self.state.nmi, False
        self._drive()
        return waited

    @outside
    def take_init(self) -> bool:
        """Whether an INIT waits; then the APIC is as INIT leaves it (11.4.7.3), and a CPU that is not the first waits
        for a start-up message (9.4.2)."""
        s = self.state
        if not s.init:
            return False
        self.state = LapicState(enabled=s.enabled, page=s.page, lint0_level=s.lint0_level, lint1_level=s.lint1_level,
                                sipi=s.sipi if self.number else None, waits=self.number != 0)  # fmt: skip
        self.restored()
        return True

    @outside
    def take_sipi(self) -> u8 | None:
        """The vector of the start-up message that the CPU waits for, and that is there: it waits no more."""
        s = self.state
        vector = s.sipi if s.waits else None
        if vector is not None:
            s.sipi, s.waits = None, False
            self._drive()
        return vector

    def begins_anew(self) -> bool:
        """Whether an INIT is to be done, or a start-up message that is waited for."""
        s = self.state
        return s.init or (s.waits and s.sipi is not None)

    # --- pins and messages

    @outside
    def set_lint0(self, level: bool) -> None:
        """Drive LINT0: INTR of the 8259As."""
        rises, self.state.lint0_level = level and not self.state.lint0_level, level
        self._local(self.state.lint0, rises)
        self._drive()

    @outside
    def set_lint1(self, level: bool) -> None:
        """Drive LINT1: NMI."""
        s = self.state
        rises, s.lint1_level = level and not s.lint1_level, level
        if rises and not s.enabled and not s.waits:
            s.nmi = True
            self._drive()
        self._local(s.lint1 & ~_LEVEL, rises)

    @outside
    def accept(self, mode: u4, vector: u8, level: bool) -> None:
        """Take an interrupt message that is for this APIC (11.8.1)."""
        s = self.state
        match mode:
            case _ if not s.enabled:
                pass
            case 0 | 1:  # fixed, lowest priority
                if vector < 16:
                    self._wrong(_RECEIVED_ILLEGAL)
                elif s.software:
                    s.irr = _with(s.irr, vector)
                    s.tmr = _with(s.tmr, vector) if level else _without(s.tmr, vector)
                    self._drive()
            case 4 if not s.waits:  # NMI
                s.nmi = True
                self._drive()
            case 5:  # INIT
                s.init, s.sipi = True, None
                self._drive()
            case 6 if s.init or s.waits:  # start-up: of no effect on a CPU that runs (9.4.3)
                s.sipi = vector
                self._drive()

    def makes_nmis(self) -> bool:
        """Whether what comes to LINT0 is an NMI."""
        return self.state.enabled and self.state.lint0 & (_MASKED | 0x700) == NMI << 8

    def is_named(self, destination: int, logical: bool) -> bool:
        """Whether a message to `destination` is for this APIC (11.6.2)."""
        s = self.state
        if destination == EVERYONE:
            return True
        if not logical:
            return destination == self.number
        if s.dfr == 15:
            return bool(destination & s.ldr)
        return destination >> 4 in (s.ldr >> 4, 15) and bool(destination & s.ldr & 15)

    def takes_fixed(self) -> bool:
        """Whether it takes part in the choice of the lowest priority."""
        return self.state.enabled and self.state.software

    def processor_priority(self) -> int:
        """PPR (11.8.3.1)."""
        s = self.state
        served = _top(s.isr) & 0xF0
        return s.tpr if s.tpr >> 4 >= served >> 4 else served

    # --- registers, by number

    @reads(span(0, 64, 16), size=4)
    def read(self, number: int) -> int:
        s = self.state
        match number:
            case 0x02:
                return self.number << 24
            case 0x03:
                return VERSION
            case 0x08:
                return s.tpr
            case 0x09:
                return 0  # arbitration priority
            case 0x0A:
                return self.processor_priority()
            case 0x0B:
                return 0  # EOI
            case 0x0D:
                return s.ldr << 24
            case 0x0E:
                return s.dfr << 28 | 0x0FFF_FFFF
            case 0x0F:
                return s.spurious | s.software << 8 | s.focus << 9
            case 0x28:
                return s.esr
            case 0x30:
                return s.icr & 0xFFFF_FFFF
            case 0x31:
                return s.icr >> 32
            case 0x38:
                return s.initial
            case 0x39:
                return self._current()
            case 0x3E:
                return s.divide
        if number in _LVT:
            return int(getattr(s, _LVT[number]))
        if 0x10 <= number < 0x28:
            bits = (s.isr, s.tmr, s.irr)[number - 0x10 >> 3]
            return int.from_bytes(bits[4 * (number & 7) :][:4], "little")
        self._wrong(_NO_REGISTER)
        return 0

    @writes(span(0, 64, 16), size=4)
    def write(self, number: int, value: int) -> None:
        s = self.state
        match number:
            case 0x02 | 0x03 | 0x09 | 0x0A | 0x39:
                pass  # they can only be read
            case 0x08:
                s.tpr = value & 0xFF
                self._drive()
            case 0x0B:
                self._end_of_interrupt()
            case 0x0D:
                s.ldr = value >> 24
            case 0x0E:
                s.dfr = value >> 28
            case 0x0F:
                self._set_svr(value)
            case 0x28:
                s.esr, s.errors = s.errors, 0
            case 0x30:
                s.icr = s.icr & ~0xFFFF_FFFF | value & _ICR
                self._command()
            case 0x31:
                s.icr = s.icr & 0xFFFF_FFFF | value << 32 & _ICR
            case 0x38:
                self._set_initial(value)
            case 0x3E:
                self._count_from(self._current())
                s.divide = value & 0xB
                self._alarm(self.deadline())
            case _ if number in _LVT:
                self._set_lvt(_LVT[number], value)
            case _:
                if not 0x10 <= number < 0x28:
                    self._wrong(_NO_REGISTER)

    def _set_svr(self, value: int) -> None:
        s = self.state
        s.spurious, s.software, s.focus = value & 0xFF, bool(value & 0x100), bool(value & 0x200)
        if not s.software:  # 11.4.7.2
            for name in _LVT.values():
                setattr(s, name, getattr(s, name) | _MASKED)
        self._drive()

    def _set_lvt(self, name: str, value: int) -> None:
        s = self.state
        before: int = getattr(s, name)
        mode = self._mode()
        value = value & _LVT_BITS[name] | before & _REMOTE_IRR
        if not value & _LEVEL:
            value &= ~_REMOTE_IRR
        setattr(s, name, value if s.software else value | _MASKED)
        if name == "timer" and (mode == _DEADLINE) != (self._mode() == _DEADLINE):
            s.started, s.initial, s.count, s.deadline_tsc = None, 0, 0, 0  # it is disarmed
            self._alarm(self.deadline())
        if name == "lint0":
            self._local(s.lint0, False)
        self._drive()

    def _end_of_interrupt(self) -> None:
        """The highest in service is served (11.8.5)."""
        s = self.state
        if not any(s.isr):
            return
        vector = _top(s.isr)
        s.isr = _without(s.isr, vector)
        if _has(s.tmr, vector):
            if s.lint0 & _REMOTE_IRR and s.lint0 & 0xFF == vector:
                s.lint0 &= ~_REMOTE_IRR
                self._local(s.lint0, False)
            self._eoi(vector)
        self._drive()

    def _command(self) -> None:
        """The low half of ICR was written: an interrupt is sent (11.6.1)."""
        icr = self.state.icr
        mode, vector, logical, shorthand = icr >> 8 & 7, icr & 0xFF, bool(icr & 0x800), icr >> 18 & 3
        if mode == INIT and icr & _LEVEL and not icr & 0x4000:
            return  # INIT level de-assert: for arbitration ids, which are none
        if mode in (FIXED, LOWEST) and vector < 16:
            self._wrong(_SEND_ILLEGAL)
            return
        match shorthand:
            case 0:
                self._send(icr >> 56, logical, mode, vector, False, None)
            case 1:
                self.accept(mode, vector, False)
            case 2:
                self._send(EVERYONE, False, mode, vector, False, None)
            case _:
                self._send(EVERYONE, False, mode, vector, False, self.number)

    # --- the timer

    def _mode(self) -> int:
        return self.state.timer >> 17 & 3

    def _tick_ns(self) -> int:
        divide = self.state.divide
        return 1 << ((divide & 3 | divide >> 1 & 4) + 1 & 7)

    def _set_initial(self, value: int) -> None:
        if self._mode() != _DEADLINE:
            self.state.initial = value
            self._count_from(value)
            self._alarm(self.deadline())

    def _count_from(self, count: int) -> None:
        s = self.state
        s.count, s.started = count, self._clock.now_ns() if count else None

    def _zero_ns(self, started: int) -> int:
        """When a count that began then comes to zero."""
        return started + self.state.count * self._tick_ns()

    def _current(self) -> int:
        s = self.state
        if s.started is None:
            return 0
        ahead = self._zero_ns(s.started) - self._clock.now_ns()
        if ahead > 0:
            return min(s.count, -(-ahead // self._tick_ns()))
        if self._mode() != _PERIODIC or not s.initial:
            return 0
        return s.initial - -ahead // self._tick_ns() % s.initial

    def deadline(self) -> int | None:
        s = self.state
        if self._mode() == _DEADLINE:
            return self._tsc.when_ns(s.deadline_tsc) if s.deadline_tsc else None
        return None if s.started is None else self._zero_ns(s.started)

    def expire(self) -> None:
        s, now = self.state, self._clock.now_ns()
        if (due := self.deadline()) is None or due > now:
            self._alarm(due)  # a TSC that is a processor's own is not of one mind with the clock to the last ns
            return
        if self._mode() == _DEADLINE:
            s.deadline_tsc = 0
        elif self._mode() == _PERIODIC and s.initial:
            period = s.initial * self._tick_ns()
            s.started, s.count = due + (now - due) // period * period, s.initial
        else:
            s.started, s.count = None, 0
        if not s.timer & _MASKED:
            self.accept(FIXED, s.timer & 0xFF, False)
        self._alarm(self.deadline())

    # --- interrupts

    def _highest(self) -> int | None:
        """The vector requested, where its class is above what runs."""
        s = self.state
        if not s.enabled or not any(s.irr):
            return None
        vector = _top(s.irr)
        return vector if vector >> 4 > self.processor_priority() >> 4 else None

    def _external(self) -> bool:
        """Whether the 8259As' interrupt comes through LINT0."""
        s = self.state
        return s.lint0_level and (not s.enabled or s.lint0 & (_MASKED | 0x700) == EXTINT << 8)

    def _local(self, lvt: int, rises: bool) -> None:
        """A local pin is as it is, and has risen or not: what its LVT says of it (11.5.1). Only LINT0 has levels."""
        s, mode = self.state, lvt >> 8 & 7
        if lvt & _MASKED or not s.enabled:
            return
        if mode == FIXED and lvt & _LEVEL:
            if s.lint0_level and not lvt & _REMOTE_IRR and lvt & 0xFF >= 16:
                s.lint0 |= _REMOTE_IRR
                self.accept(FIXED, lvt & 0xFF, True)
        elif rises and mode in (FIXED, NMI, INIT):
            self.accept(mode, lvt & 0xFF, False)

    def _wrong(self, error: int) -> None:
        """An error was seen (11.5.3): one that is new is interrupted for."""
        s = self.state
        is_new, s.errors = not s.errors & error, s.errors | error
        if is_new and not s.error & _MASKED:
            self.accept(FIXED, s.error & 0xFF, False)

    def _drive(self) -> None:
        s = self.state
        self._intr(self.pending())
        self._event(s.nmi or self.begins_anew())

    def reset(self) -> None:
        s = self.state
        self.state = LapicState(  # the inputs are others' outputs
            lint0_level=s.lint0_level, lint1_level=s.lint1_level, waits=self.number != 0
        )
        self.restored()

    def restored(self) -> None:
        s = self.state
        self._place("", s.page << 12 if s.enabled else None)
        self._alarm(self.deadline())
        self._drive()


def _top(bits: bytes) -> int:
    """The highest vector; 0 for none."""
    return max(0, int.from_bytes(bits, "little").bit_length() - 1)


def _has(bits: bytes, vector: int) -> bool:
    return bool(bits[vector >> 3] >> (vector & 7) & 1)


def _with(bits: bytes, vector: int) -> bytes:
    return (int.from_bytes(bits, "little") | 1 << vector).to_bytes(32, "little")


def _without(bits: bytes, vector: int) -> bytes:
    return (int.from_bytes(bits, "little") & ~(1 << vector)).to_bytes(32, "little")
