"""The bus: who answers at which port or physical address.

One port read is one dict look-up and one bound method. Unclaimed reads float high, unclaimed writes are lost;
an access wider than the registers below it is split into bytes, low address first, as the ISA bridge does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmm.device import Device

Reader = Callable[[], int]
Writer = Callable[[int], None]


class Bus:
    """Port and memory-mapped I/O of one machine. Implements the CPU's `IoBus`."""

    def __init__(self) -> None:
        # key is address << 4 | size: one integer hash, no tuple built on the hot way
        self._readers: dict[int, Reader] = {}
        self._writers: dict[int, Writer] = {}
        self._mmio_readers: dict[int, Reader] = {}
        self._mmio_writers: dict[int, Writer] = {}

    def claim_ports(self, device: Device[Any], base: int, bank: str = "") -> None:
        """Put one bank of a device's declared registers at I/O port `base`."""
        self._claim(device, base, bank, self._readers, self._writers)

    def claim_mmio(self, device: Device[Any], base: int, bank: str = "") -> None:
        """Put one bank of a device's declared registers at physical address `base`."""
        self._claim(device, base, bank, self._mmio_readers, self._mmio_writers)

    def watch_ports(self, device: Device[Any], base: int, bank: str, after: Callable[[], None]) -> None:
        """Call `after()` once any port of this bank has been read or written."""
        for register in device.registers:
            if register.bank == bank:
                table: dict[int, Any] = self._readers if register.kind == "read" else self._writers
                key = (base + register.offset) << 4 | register.size
                table[key] = _watched(table[key], after)

    @staticmethod
    def _claim(
        device: Device[Any], base: int, bank: str, readers: dict[int, Reader], writers: dict[int, Writer]
    ) -> None:
        for register in device.registers:
            if register.bank != bank:
                continue
            table: dict[int, Any] = readers if register.kind == "read" else writers
            key = (base + register.offset) << 4 | register.size
            if key in table:
                raise AssertionError(f"{base + register.offset:#x} is claimed twice")
            table[key] = register.bind(device)

    def port_in(self, port: int, size: int) -> int:
        reader = self._readers.get(port << 4 | size)
        if reader is not None:
            return reader()
        return _split_read(self._readers, port, size, 0xFFFF)

    def port_out(self, port: int, size: int, value: int) -> None:
        writer = self._writers.get(port << 4 | size)
        if writer is not None:
            writer(value)
        else:
            _split_write(self._writers, port, size, value, 0xFFFF)

    def mmio_read(self, addr: int, size: int) -> int:
        reader = self._mmio_readers.get(addr << 4 | size)
        if reader is not None:
            return reader()
        return _split_read(self._mmio_readers, addr, size, -1)

    def mmio_write(self, addr: int, size: int, value: int) -> None:
        writer = self._mmio_writers.get(addr << 4 | size)
        if writer is not None:
            writer(value)
        else:
            _split_write(self._mmio_writers, addr, size, value, -1)


def _watched(access: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    def watched(*value: int) -> Any:
        result = access(*value)
        after()
        return result

    return watched


def _split_read(table: dict[int, Reader], addr: int, size: int, mask: int) -> int:
    value = 0
    for i in range(size):
        reader = table.get((addr + i & mask) << 4 | 1)
        value |= (0xFF if reader is None else reader()) << 8 * i
    return value


def _split_write(table: dict[int, Writer], addr: int, size: int, value: int, mask: int) -> None:
    for i in range(size):
        writer = table.get((addr + i & mask) << 4 | 1)
        if writer is not None:
            writer(value >> 8 * i & 0xFF)
