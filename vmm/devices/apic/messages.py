"""What interrupt controllers say to each other (SDM vol. 3, 11.11 and table 11-2 "delivery mode"; 82093AA, 3.2.4)."""

from __future__ import annotations

from typing import Protocol

FIXED, LOWEST, SMI, NMI, INIT, SIPI, EXTINT = 0, 1, 2, 4, 5, 6, 7
EVERYONE = 0xFF  # as a destination

MSI_BASE, MSI_END = 0xFEE0_0000, 0xFEF0_0000  # writes of devices to these addresses are messages (SDM vol. 3, 11.11.1)


class Send(Protocol):
    """Delivers an interrupt message to the local APICs that `destination` names: an APIC's id, or a logical one. `mode`
    is the delivery mode; `level` says that the vector's EOI is to be told to the I/O APIC; the APIC `but` is left
    out."""

    def __call__(
        self, destination: int, logical: bool, mode: int, vector: int, level: bool, but: int | None, /
    ) -> None: ...


class EndOfInterrupt(Protocol):
    """Told of the EOI of a level-triggered vector."""

    def __call__(self, vector: int, /) -> None: ...


def from_msi(address: int, data: int) -> tuple[int, bool, int, int, bool, None] | None:
    """What a device's write of `data` means (SDM vol. 3, figures 11-24 and 11-25), as Send's arguments; None where
    it is no message."""
    if not MSI_BASE <= address < MSI_END:
        return None
    return address >> 12 & 0xFF, bool(address & 4), data >> 8 & 7, data & 0xFF, bool(data >> 15 & 1), None
