"""Configuration mechanism #1: an address register, and a window on the configuration space it names.

Source: PCI Local Bus Specification 3.0, 3.2.2.3.2. The address register answers accesses of four bytes only: others in
its place are other devices'.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from snapshot.field_types import u32
from snapshot.schema import state
from vmm.devices.pci.function import Function
from vmm.registers import ANY, reads, span, writes
from vmm.wires import Configuration, Dma, Line, Msi, Placement

S = TypeVar("S")
_ENABLE, _WRITABLE = 1 << 31, 0x80FF_FFFC


@state("pci.mechanism1", version=1)
class MechanismState:
    """Configuration mechanism #1."""

    address: Annotated[u32, "CONFIG_ADDRESS"] = 0


class HostBridge(Function[S]):
    """Base of host bridges: the mechanism's two registers, banks "address" and "data". The state has a field
    `mechanism`."""

    def __init__(self, place: Placement, intx: Line, msi: Msi, dma: Dma, configuration: Configuration) -> None:
        super().__init__(place, intx, msi, dma)
        self._configuration = configuration

    @property
    def _mechanism(self) -> MechanismState:
        found: MechanismState = self.state.mechanism  # type: ignore[attr-defined]
        return found

    @reads(0, size=4, bank="address")
    def read_address(self) -> int:
        return self._mechanism.address

    @writes(0, size=4, bank="address")
    def write_address(self, value: int) -> None:
        self._mechanism.address = value & _WRITABLE

    @reads(span(0, 4), size=ANY, bank="data")
    def read_data(self, lane: int, size: int) -> int:
        address = self._mechanism.address
        if not address & _ENABLE:
            return (1 << 8 * size) - 1
        return self._configuration.read(address >> 8 & 0xFFFF, address & 0xFC | lane, size)

    @writes(span(0, 4), size=ANY, bank="data")
    def write_data(self, lane: int, size: int, value: int) -> None:
        address = self._mechanism.address
        if address & _ENABLE:
            self._configuration.write(address >> 8 & 0xFFFF, address & 0xFC | lane, size, value)
