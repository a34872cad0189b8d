"""A card with all that a PCI function can have: what proves the bus before there is a real one."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from snapshot.field_types import u8, u32
from snapshot.schema import state
from vmm.device import outside
from vmm.devices.pci.configuration import HostBridge, MechanismState
from vmm.devices.pci.features import AdvancedFeatures
from vmm.devices.pci.function import Bar, FunctionState
from vmm.devices.pci.msi import MsiCapability, MsiState, MsixCapability, MsixFunction, MsixState, table
from vmm.registers import reads, span, writes

VECTORS = 3


@state("test.pci.card", version=1)
class CardState:
    """The test card."""

    pci: FunctionState = field(default_factory=FunctionState)
    msi: MsiState = field(default_factory=MsiState)
    msix: MsixState = table(VECTORS)
    scratch: Annotated[u32, "what the first register holds"] = 0
    address: Annotated[u32, "where DMA goes"] = 0


class Card(MsixFunction[CardState]):
    """Registers in memory at 0: scratch, DMA address, DMA of the scratch, interrupt by line, by vector. Among the ports
    and in the BAR of 64 bits: the scratch again."""

    State = CardState
    vendor, device, class_code, revision, pin = 0x1234, 0x5678, 0xFF0000, 2, 1
    subsystem = 0x1AF4, 0x1100
    msix = MsixCapability(VECTORS, bar=1, table=0, pba=0x800)
    single = MsiCapability(4)
    bars = {
        0: Bar(0x100, {"registers": 0}),
        1: Bar(0x1000, {"msix": 0, "pba": 0x800}),
        2: Bar(0x20, {"ports": 0x10}, io=True),
        4: Bar(0x1_0000_0000, {"wide": 0x8000_0000}, wide=True, prefetchable=True),
    }
    rom = Bar(0x800, {"rom": 0})
    capabilities = (single, msix, AdvancedFeatures())

    @reads(0, bank="registers", size=4)
    @reads(0, bank="ports", size=4)
    @reads(0, bank="wide", size=4)
    def read_scratch(self) -> int:
        return self.state.scratch

    @writes(0, bank="registers", size=4)
    @writes(0, bank="ports", size=4)
    @writes(0, bank="wide", size=4)
    def write_scratch(self, value: int) -> None:
        self.state.scratch = value

    @writes(4, bank="registers", size=4)
    def write_address(self, value: int) -> None:
        self.state.address = value

    @writes(8, bank="registers", size=4)
    def write_copy(self, value: int) -> None:
        if not self.dma.write(self.state.address, self.state.scratch.to_bytes(4, "little")):
            self.state.scratch = 0xDEAD_DEAD

    @reads(8, bank="registers", size=4)
    def read_copy(self) -> int:
        seen = self.dma.view(self.state.address, 4)
        return 0xDEAD_DEAD if seen is None else int.from_bytes(seen, "little")

    @writes(12, bank="registers", size=4)
    def write_line(self, value: int) -> None:
        self.interrupt(bool(value & 1))

    @writes(16, bank="registers", size=4)
    def write_vector(self, value: int) -> None:
        self.vector(value & 0xFF)

    @outside
    def vector(self, value: u8) -> None:
        """Interrupt by a vector."""
        if self.msix.signals(self):
            self.msix.signal(self, value)
        elif self.single.signals(self):
            self.single.signal(self, value)

    @reads(span(0, 0x800), bank="rom")
    def read_rom(self, offset: int) -> int:
        return (0x55, 0xAA)[offset] if offset < 2 else offset & 0xFF


@state("test.pci.bridge", version=1)
class BridgeState:
    """The test bridge."""

    pci: FunctionState = field(default_factory=FunctionState)
    mechanism: MechanismState = field(default_factory=MechanismState)


class Bridge(HostBridge[BridgeState]):
    """A host bridge."""

    State = BridgeState
    vendor, device, class_code = 0x8086, 0x1237, 0x060000
