"""System control port A at 92: the PS/2's quick ways to A20 and to a processor reset.

Intel I/O Controller Hub (ICH9, 316972), 13.7.3 "PORT92: Fast A20 and Init Register"; IBM Personal System/2 Hardware
Interface Technical Reference, "System Control Port A".

Absent: the PS/2's lamps (bits 6 and 7), watchdog status (bit 4) and password lock (bit 3), as in the ICH: they read 0.
"""

from __future__ import annotations

from typing import Annotated

from snapshot.schema import state
from vmm.device import Device
from vmm.registers import reads, writes
from vmm.wires import Line, ResetRequest

INIT_NOW, ALT_A20_GATE = 0x01, 0x02


@state("port92", version=1)
class Port92State:
    """System control port A."""

    a20: Annotated[bool, "bit 1: A20 is let through, whatever the keyboard controller says"] = False
    init_now: Annotated[bool, "bit 0: as last written; it acts when it goes from 0 to 1"] = False


class Port92(Device[Port92State]):
    """One register at 0: A20 and a processor reset."""

    State = Port92State

    def __init__(self, a20: Line, reset: ResetRequest) -> None:
        super().__init__()
        self._a20, self._reset_processor = a20, reset

    def restored(self) -> None:
        self._a20(self.state.a20)

    @reads(0)
    def read(self) -> int:
        return self.state.a20 * ALT_A20_GATE | self.state.init_now * INIT_NOW

    @writes(0)
    def write(self, value: int) -> None:
        s = self.state
        rising = bool(value & INIT_NOW) and not s.init_now
        s.a20, s.init_now = bool(value & ALT_A20_GATE), bool(value & INIT_NOW)
        self._a20(s.a20)
        if rising:
            self._reset_processor()
