"""What a board has to be told of to a system that runs on it: a firmware's tables are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Platform:
    """Where things are on a board. Interrupts are inputs of the I/O APIC, whose first sixteen are the ISA's."""

    cpus: int = 1
    lapic: int = 0xFEE0_0000
    ioapic: int = 0xFEC0_0000
    hpet: int | None = 0xFED0_0000
    hpet_id: int = 0x8086_A201
    pm: int = 0x600  # I/O port of PM1
    sci: int = 9
    reset: tuple[int, int] = (0xCF9, 6)  # port, value
    pirqs: tuple[int, int, int, int] = (10, 10, 11, 11)  # interrupts of PIRQ A to D
    slots: range = range(1, 32)  # of PCI devices
    pci_memory: tuple[int, int] = (0xC000_0000, 0xFEBF_FFFF)
    serial: Mapping[int, tuple[int, int]] = field(  # number: port, interrupt
        default_factory=lambda: {1: (0x3F8, 4), 2: (0x2F8, 3)}
    )
