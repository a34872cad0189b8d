"""Reset control register at CF9.

Intel I/O Controller Hub (ICH9, 316972), 13.7.5 "RST_CNT: Reset Control Register": RST_CPU (bit 2) going from 0 to 1
resets, hard if SYS_RST (bit 1) is set and soft (INIT#) if not; FULL_RST (bit 3) makes a hard reset a power cycle.

Four bytes at CF8 are CONFADD, the address of PCI configuration mechanism #1 (PCI 3.0, 3.2.2.3.2), never this register:
without PCI such a write is lost and a read floats. A probe for PCI would reset the machine else.

Absent: the difference between the three. Each is the machine's one reset, as on QEMU's PIIX and ICH9.
"""

from __future__ import annotations

from typing import Annotated

from snapshot.schema import state
from vmm.device import Device
from vmm.registers import reads, writes
from vmm.wires import ResetRequest

SYS_RST, RST_CPU, FULL_RST = 0x02, 0x04, 0x08


@state("reset.cf9", version=1)
class ResetControlState:
    """Reset control register."""

    sys_rst: Annotated[bool, "bit 1: hard reset, not soft"] = False
    rst_cpu: Annotated[bool, "bit 2: as last written; it acts when it goes from 0 to 1"] = False
    full_rst: Annotated[bool, "bit 3: a hard reset cycles the power"] = False


class ResetControl(Device[ResetControlState]):
    """Offset 0 is CF8, where the register is the second byte of an aligned dword."""

    State = ResetControlState

    def __init__(self, reset: ResetRequest) -> None:
        super().__init__()
        self._reset_system = reset

    @reads(1)
    def read(self) -> int:
        s = self.state
        return s.sys_rst * SYS_RST | s.rst_cpu * RST_CPU | s.full_rst * FULL_RST

    @writes(1)
    def write(self, value: int) -> None:
        s = self.state
        rising = bool(value & RST_CPU) and not s.rst_cpu
        s.sys_rst, s.rst_cpu, s.full_rst = bool(value & SYS_RST), bool(value & RST_CPU), bool(value & FULL_RST)
        if rising:
            self._reset_system()

    @reads(0, size=4)
    def read_confadd(self) -> int:
        return 0xFFFFFFFF

    @writes(0, size=4)
    def write_confadd(self, value: int) -> None:
        """Nobody is there."""
