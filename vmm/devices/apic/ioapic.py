"""Intel 82093AA I/O advanced programmable interrupt controller.

Source: Intel 82093AA datasheet (290566-001), chapters 2 and 3.

A message is delivered when it is sent, so Delivery Status always reads idle.

Absent
* Polarity (INTPOL) is kept and not looked at: a line is asserted or it is not.
* The APIC's bus, and arbitration on it: ids are stored.
* ExtINT and SMI are sent nowhere: the 8259A reaches a CPU by its LINT0, and there is no SMM.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from snapshot.field_types import Size, u4, u5, u8, u24, u64
from snapshot.schema import state
from vmm.device import Device, invariant, outside
from vmm.devices.apic.messages import EXTINT, NMI, SMI, Send
from vmm.registers import reads, writes

PINS = 24
VERSION = 0x0017_0011  # 24 entries; the 82093AA's own number
_ID, _VERSION, _ARBITRATION, _TABLE = 0x00, 0x01, 0x02, 0x10
_WRITABLE = 0xFF00_0000_0001_AFFF
_VECTOR, _LOGICAL, _REMOTE_IRR, _LEVEL, _MASKED = 0xFF, 1 << 11, 1 << 14, 1 << 15, 1 << 16


def _masked() -> tuple[int, ...]:
    return (_MASKED,) * PINS


@state("apic.82093aa", version=1)
class IoApicState:
    """An I/O APIC."""

    select: Annotated[u8, "IOREGSEL"] = 0
    id: Annotated[u4, "IOAPICID"] = 0
    lines: Annotated[u24, "level of each INTIN"] = 0
    table: Annotated[tuple[u64, ...], Size(PINS), "IOREDTBL, with Remote IRR (bit 14)"] = field(default_factory=_masked)


class IoApic(Device[IoApicState]):
    """Registers IOREGSEL at 0 and IOWIN at 0x10. `send` is the bus to the local APICs."""

    State = IoApicState

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    @outside
    def set_line(self, pin: u5, level: bool) -> None:
        """Drive INTIN `pin`; there are 24."""
        if pin >= PINS:
            return
        s, bit = self.state, 1 << pin
        rises, s.lines = level and not s.lines & bit, s.lines | bit if level else s.lines & ~bit
        if self._level_triggered(pin):
            self._deliver_level(pin)
        elif rises and not s.table[pin] & _MASKED:  # one that comes while masked is not held (3.2.4, bit 16)
            self._deliver(pin)

    @outside
    def end_of_interrupt(self, vector: u8) -> None:
        """Every level-triggered entry of the vector is free again, and sends anew where its line is still asserted."""
        for pin, entry in enumerate(self.state.table):
            if entry & (_LEVEL | _REMOTE_IRR | _VECTOR) == _LEVEL | _REMOTE_IRR | vector:
                self._put(pin, entry & ~_REMOTE_IRR)
                self._deliver_level(pin)

    def makes_nmis(self) -> bool:
        """Whether what comes to an input is an NMI."""
        return any(entry & (_MASKED | 0x700) == NMI << 8 for entry in self.state.table)

    @invariant
    def only_a_level_is_awaited(self) -> bool:
        """Remote IRR is for level-triggered entries."""
        return all(entry & _LEVEL or not entry & _REMOTE_IRR for entry in self.state.table)

    # --- registers

    @reads(0, size=4)
    def read_select(self) -> int:
        return self.state.select

    @writes(0, size=4)
    def write_select(self, value: int) -> None:
        self.state.select = value & 0xFF

    @reads(0x10, size=4)
    def read_window(self) -> int:
        s = self.state
        match s.select:
            case 0x00 | 0x02:  # an id, and the arbitration id that is loaded with it
                return s.id << 24
            case 0x01:
                return VERSION
        pin, high = divmod(s.select - _TABLE, 2)
        if not 0 <= pin < PINS:
            return 0
        return s.table[pin] >> 32 if high else s.table[pin] & 0xFFFF_FFFF

    @writes(0x10, size=4)
    def write_window(self, value: int) -> None:
        s = self.state
        if s.select == _ID:
            s.id = value >> 24 & 15
            return
        pin, high = divmod(s.select - _TABLE, 2)
        if not 0 <= pin < PINS:
            return
        shift = 32 * high
        entry = s.table[pin] & ~(0xFFFF_FFFF << shift) | value << shift
        entry = entry & _WRITABLE | s.table[pin] & _REMOTE_IRR
        if not entry & _LEVEL:
            entry &= ~_REMOTE_IRR
        self._put(pin, entry)
        self._deliver_level(pin)

    # --- delivery

    def _level_triggered(self, pin: int) -> bool:
        return bool(self.state.table[pin] & _LEVEL)

    def _put(self, pin: int, entry: int) -> None:
        table = self.state.table
        self.state.table = (*table[:pin], entry, *table[pin + 1 :])

    def _deliver_level(self, pin: int) -> None:
        """A level is sent once, and not again before its EOI."""
        entry = self.state.table[pin]
        if entry & _LEVEL and not entry & (_MASKED | _REMOTE_IRR) and self.state.lines >> pin & 1:
            self._put(pin, entry | _REMOTE_IRR)
            self._deliver(pin)

    def _deliver(self, pin: int) -> None:
        entry = self.state.table[pin]
        mode = entry >> 8 & 7
        if mode not in (SMI, EXTINT):
            self._send(entry >> 56, bool(entry & _LOGICAL), mode, entry & _VECTOR, bool(entry & _LEVEL), None)

    def reset(self) -> None:
        self.state = IoApicState(lines=self.state.lines)  # the inputs are others' outputs
