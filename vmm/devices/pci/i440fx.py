"""Intel 82441FX PCI and memory controller (PMC) of the 440FX: the host bridge.

Source: Intel 82441FX datasheet (290549-001), section 3.2.

Absent
* PAM and the other memory registers are kept and do nothing: RAM is seen from C0000 to FFFFF, read and written.
* There is no SMM: SMRAM is kept, with its lock, and its memory is where it always is.
* Errors are not made, and ERRSTS reads 0.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from snapshot.field_types import Size, u8
from snapshot.schema import state
from vmm.devices.pci.configuration import HostBridge, MechanismState
from vmm.devices.pci.function import FunctionState
from vmm.devices.pci.header import Field, kept

_SMRAM, _D_OPEN, _D_LCK, _SMRAM_BITS, _C_BASE_SEG = 0x72, 0x40, 0x10, 0x78, 0x02
_KEPT, _FIELDS = kept(
    (0x50, 0x00, 0xFF),  # PMC configuration
    (0x51, 0x01, 0xFF),
    (0x52, 0x00, 0xFF),  # deturbo counter
    (0x53, 0x80, 0xC8),  # data bus
    (0x54, 0x00, 0xFF),  # auxiliary
    (0x55, 0x00, 0xFF),  # DRAM row types
    (0x56, 0x00, 0xFF),
    (0x57, 0x01, 0xFF),  # DRAM control
    (0x58, 0x10, 0xFF),  # DRAM timing
    (0x59, 0x00, 0x30),  # PAM
    *((offset, 0x00, 0x33) for offset in range(0x5A, 0x60)),
    *((offset, 0x01, 0xFF) for offset in range(0x60, 0x68)),  # DRAM row boundaries
    (0x68, 0x00, 0xC0),  # fixed DRAM hole
    (0x70, 0x10, 0xF0),  # multi-transaction timer
    (0x71, 0x00, 0xFF),
    (0x90, 0x00, 0xFF),  # error command
    (0x93, 0x00, 0x0D),  # turbo reset control
)


@state("pci.i440fx", version=1)
class I440fxState:
    """The host bridge."""

    pci: Annotated[FunctionState, "configuration header"] = field(default_factory=lambda: FunctionState(command=0x0006))
    mechanism: Annotated[MechanismState, "configuration mechanism #1"] = field(default_factory=MechanismState)
    kept: Annotated[bytes, Size(len(_KEPT)), "registers that only hold what is written"] = _KEPT
    smram: Annotated[u8, "SMRAM control"] = _C_BASE_SEG


def _put_smram(function: Any, value: int) -> None:
    s = function.state
    if not s.smram & _D_LCK:
        s.smram = value & (~_D_OPEN if value & _D_LCK else -1) | _C_BASE_SEG


class I440fx(HostBridge[I440fxState]):
    """Device 0. It answers all of memory, and its command register cannot be told not to."""

    State = I440fxState
    vendor, device, class_code, revision = 0x8086, 0x1237, 0x060000, 2
    subsystem = 0x1AF4, 0x1100  # QEMU's, by which SeaBIOS knows a machine like it
    status, commands = 0x0280, 0x0140
    own = (*_FIELDS, Field(_SMRAM, 1, lambda f: f.state.smram, _SMRAM_BITS, _put_smram))
