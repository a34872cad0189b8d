"""Debug exit: a port by which a guest ends the machine with a status.

QEMU, isa-debug-exit (hw/misc/debugexit.c): a write of v ends with status (v << 1) | 1, so never 0; reads are 0. The
board puts it at 501, QEMU's default.

Absent: QEMU's `iosize`: the registers are one, two and four bytes at offset 0.
"""

from __future__ import annotations

from snapshot.schema import state
from vmm.device import Device
from vmm.registers import reads, writes
from vmm.wires import ExitRequest


@state("debug_exit", version=1)
class DebugExitState:
    """Debug exit: it remembers nothing."""


class DebugExit(Device[DebugExitState]):
    """A port by which the guest ends the machine with a status; the host's own exit code is its low byte."""

    State = DebugExitState

    def __init__(self, exit: ExitRequest) -> None:
        super().__init__()
        self._exit = exit

    @reads(0, size=1)
    @reads(0, size=2)
    @reads(0, size=4)
    def read(self) -> int:
        return 0

    @writes(0, size=1)
    @writes(0, size=2)
    @writes(0, size=4)
    def write(self, value: int) -> None:
        self._exit(value << 1 | 1)
