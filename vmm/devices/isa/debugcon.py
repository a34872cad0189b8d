"""Debug console: one port that takes characters, at E9 (Bochs) or 402 (SeaBIOS, OVMF).

Bochs, "port e9 hack": a byte written is a character for the host, and a read answers E9, by which a guest knows that
the port is there. QEMU, isa-debugcon: the same at any port, the answer a property (`readback`).

Absent: nothing.
"""

from __future__ import annotations

from snapshot.schema import state
from vmm.device import Device
from vmm.registers import reads, writes
from vmm.wires import Transmit


@state("debugcon", version=1)
class DebugconState:
    """Debug console: it remembers nothing."""


class Debugcon(Device[DebugconState]):
    """A port that takes characters for this computer, and answers `readback`."""

    State = DebugconState

    def __init__(self, transmit: Transmit, readback: int) -> None:
        super().__init__()
        self._transmit, self._readback = transmit, readback

    @reads(0)
    def read(self) -> int:
        return self._readback

    @writes(0)
    def write(self, value: int) -> None:
        self._transmit(value)
