"""The PCI bus of a board: which function is where, and where its banks are seen."""

from __future__ import annotations

from typing import Any

from vmm.bus import Bus, Window
from vmm.devices.pci.function import Function


class PciBus:
    """Bus 0. Implements Configuration."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._functions: dict[int, Function[Any]] = {}

    def put(self, at: int, function: Function[Any]) -> dict[str, Window]:
        """A function is at device << 3 | function. Returns a window for each bank of its BARs, which is nowhere yet."""
        self._functions[at] = function
        if first := self._functions.get(at & ~7):
            first.many = any(other & ~7 == at & ~7 for other in self._functions if other & 7)
        windows: dict[str, Window] = {}
        for bar in function.all_windows():
            ends = sorted([*bar.banks.values(), bar.size])
            for bank, offset in bar.banks.items():
                size = min(function.banks[bank].size, ends[ends.index(offset) + 1] - offset)
                space = self._bus.ports if bar.io else self._bus.memory
                windows[bank] = space.window(function, bank, size=size, width=bar.width)
        return windows

    def read(self, function: int, offset: int, size: int) -> int:
        found = self._functions.get(function)
        return (1 << 8 * size) - 1 if found is None else found.read_config(offset, size)

    def write(self, function: int, offset: int, size: int, value: int) -> None:
        if (found := self._functions.get(function)) is not None:
            found.write_config(offset, size, value)
