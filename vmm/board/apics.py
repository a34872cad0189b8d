"""The bus between a board's APICs, and from its devices to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vmm.device import Device
from vmm.devices.apic.ioapic import IoApic
from vmm.devices.apic.lapic import Lapic
from vmm.devices.apic.messages import FIXED, LOWEST, from_msi
from vmm.wires import CpuPins

IO_APIC_PINS: Mapping[int, int] = {0: 2}  # of ISA interrupts, where it is not their number


class Apics:
    """Who is there; a message is accepted when it is sent."""

    def __init__(self) -> None:
        self.locals: list[Lapic] = []
        self._io: list[IoApic] = []

    def add(self, device: Device[Any]) -> None:
        """A device of the board, which may be one."""
        if isinstance(device, Lapic):
            self.locals.append(device)
        elif isinstance(device, IoApic):
            self._io.append(device)

    def send(self, destination: int, logical: bool, mode: int, vector: int, level: bool, but: int | None) -> None:
        """As vmm.devices.apic.messages.Send. Of those named one takes a message of lowest priority: the least busy."""
        named = [apic for apic in self.locals if apic.number != but and apic.is_named(destination, logical)]
        if mode == LOWEST:
            mode, takers = FIXED, [apic for apic in named if apic.takes_fixed()]
            named = sorted(takers, key=lambda apic: (apic.processor_priority(), apic.number))[:1]
        for apic in named:
            apic.accept(mode, vector, level)

    def make_nmis(self) -> bool:
        """Whether a line leads to an NMI: a CPU that halts with interrupts off may be waiting for it."""
        return any(apic.makes_nmis() for apic in self.locals) or any(apic.makes_nmis() for apic in self._io)

    def message(self, address: int, data: int) -> None:
        """A device's write to memory, which is an interrupt message where its address is one."""
        if (sent := from_msi(address, data)) is not None:
            self.send(*sent)

    def end_of_interrupt(self, vector: int) -> None:
        for apic in self._io:
            apic.end_of_interrupt(vector)


class BoardTsc:
    """The TSC of the CPU that is attached."""

    def __init__(self, pins: Callable[[], CpuPins]) -> None:
        self._pins = pins

    def read(self) -> int:
        return self._pins().tsc()

    def when_ns(self, value: int) -> int | None:
        return self._pins().tsc_reaches(value)
