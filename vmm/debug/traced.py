"""A bus that tells of each access; a CPU that is given one need not know."""

from __future__ import annotations

from collections.abc import Callable

from vmm.cpu.protocol import IoBus


class TracedBus:
    """Implements the CPU's `IoBus` over another. `tell` is called with one line an access, a read's once it has its
    answer, a write's before it is done."""

    def __init__(self, bus: IoBus, tell: Callable[[str], None]) -> None:
        self._bus, self._tell = bus, tell

    def port_in(self, port: int, size: int) -> int:
        value = self._bus.port_in(port, size)
        self._tell(f"in {port:#x}, {size} bytes: {value:#x}")
        return value

    def port_out(self, port: int, size: int, value: int) -> None:
        self._tell(f"out {port:#x}, {size} bytes: {value:#x}")
        self._bus.port_out(port, size, value)

    def mmio_read(self, addr: int, size: int) -> int:
        value = self._bus.mmio_read(addr, size)
        self._tell(f"read {addr:#x}, {size} bytes: {value:#x}")
        return value

    def mmio_write(self, addr: int, size: int, value: int) -> None:
        self._tell(f"write {addr:#x}, {size} bytes: {value:#x}")
        self._bus.mmio_write(addr, size, value)
