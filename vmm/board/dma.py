"""A bus master's way to RAM."""

from __future__ import annotations

from collections.abc import Callable

from vmm.errors import GuestError
from vmm.ram import Ram

Discard = Callable[[int, int], None]  # what a CPU has translated in [start, end)


class RamDma:
    """Implements `vmm.wires.Dma`. `ram` is asked for at each access: a machine that goes on from a file has another.
    `allowed` says whether the device may master the bus now."""

    def __init__(
        self, ram: Callable[[], Ram | None], discard_code: Discard, allowed: Callable[[], bool] = lambda: True
    ) -> None:
        self._ram, self._discard_code, self._allowed = ram, discard_code, allowed

    def view(self, address: int, size: int) -> memoryview | None:
        found = self._slice(address, size)
        return None if found is None else found.toreadonly()

    def write(self, address: int, data: bytes) -> bool:
        found = self._slice(address, len(data))
        if found is None:
            return False
        found[:] = data
        self._discard_code(address, address + len(data))
        return True

    def _slice(self, address: int, size: int) -> memoryview | None:
        ram = self._ram()
        if ram is None or size < 0 or address < 0 or not self._allowed():
            return None
        try:
            return ram.slice(address, size)
        except GuestError:
            return None
