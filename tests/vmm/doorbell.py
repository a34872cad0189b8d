"""A device in memory that no board has: for tests of what such a device can do to a machine."""

from __future__ import annotations

from typing import Annotated

from snapshot.field_types import u8, u64
from snapshot.schema import state
from vmm.board.kinds import IsaOptions, Kind
from vmm.device import Device
from vmm.registers import reads, span, writes
from vmm.wires import Alarm, Clock, Dma, Line

BASE = 0xD000_0000
RING, WHEN, COPY, ACKNOWLEDGE = 0x00, 0x08, 0x10, 0x20


@state("test.doorbell", version=1)
class DoorbellState:
    rung: Annotated[u8, "how often, since it was acknowledged"] = 0
    when_ns: Annotated[u64, "rings by itself then; 0 never"] = 0
    total: Annotated[u64, "how often at all"] = 0


class Doorbell(Device[DoorbellState]):
    """A doorbell: +0 rings at once, +8 rings so many ns from now, +16 copies a byte in RAM, +32 quiets."""

    State = DoorbellState

    def __init__(self, clock: Clock, alarm: Alarm, dma: Dma, irq: Line) -> None:
        super().__init__()
        self._clock, self._alarm, self._dma, self._irq = clock, alarm, dma, irq

    @reads(RING, size=8)
    def read_total(self) -> int:
        return self.state.total

    @writes(RING, size=8)
    def ring(self, value: int) -> None:
        self._ring()

    @writes(WHEN, size=8)
    def write_when(self, value: int) -> None:
        self.state.when_ns = self._clock.now_ns() + (value & 0xFFFF_FFFF)
        self._alarm(self.deadline())

    @writes(span(COPY, 2, step=8), size=8)
    def copy(self, index: int, value: int) -> None:
        """From the low half's address to the high half's, `index` + 1 bytes."""
        source = self._dma.view(value & 0xFFFF_FFFF, index + 1)
        if source is not None:
            self._dma.write(value >> 32, bytes(source))

    @writes(ACKNOWLEDGE, size=8)
    def acknowledge(self, value: int) -> None:
        self.state.rung = 0
        self._irq(False)

    def deadline(self) -> int | None:
        return self.state.when_ns or None

    def expire(self) -> None:
        self.state.when_ns = 0
        self._alarm(None)
        self._ring()

    def restored(self) -> None:
        self._irq(self.state.rung > 0)
        self._alarm(self.deadline())

    def _ring(self) -> None:
        s = self.state
        s.rung, s.total = min(s.rung + 1, 255), s.total + 1 & (1 << 64) - 1
        self._irq(True)


KIND = Kind("doorbell", Doorbell, IsaOptions, space="memory", width=8)
