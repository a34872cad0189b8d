"""What hooks and MSRs ask of the CPU that is on the engine."""

from __future__ import annotations

from typing import Protocol

from vmm.cpu.protocol import Apic, IoBus


class OnEngine(Protocol):
    """That CPU."""

    @property
    def bus(self) -> IoBus: ...
    @property
    def apic(self) -> Apic | None: ...
    def acknowledge(self) -> int: ...  # INTA: the vector
    def tsc(self) -> int: ...
    def write_tsc(self, value: int) -> None: ...
    def pause(self) -> None: ...  # it ran one, and these are counted


class Asked(Protocol):
    """What knows it."""

    @property
    def on(self) -> OnEngine: ...
