"""Names for physical addresses, from a Linux kernel's System.map.

Only for a kernel that runs where it was linked, as one started from a vmlinux does: physical is virtual less
__START_KERNEL_map (Linux arch/x86/include/asm/page_64_types.h).
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path

from snapshot.files import read_file
from vmm.errors import GuestError

_START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
_END = 0xFFFF_FFFF_C000_0000  # modules from here


class Symbols:
    """Sorted (physical address, name)."""

    def __init__(self, symbols: list[tuple[int, str]]) -> None:
        self._symbols = sorted(symbols)
        self._addresses = [address for address, _ in self._symbols]

    @classmethod
    def load(cls, path: Path) -> Symbols:
        """Raises GuestError for what is no System.map."""
        found = []
        try:
            for line in read_file(path).decode().splitlines():
                address, _, name = line.split(None, 2)
                if _START_KERNEL_MAP <= int(address, 16) < _END:
                    found.append((int(address, 16) - _START_KERNEL_MAP, name))
        except (ValueError, UnicodeDecodeError):
            raise GuestError(f"{path}: not a System.map: lines are ADDRESS TYPE NAME") from None
        return cls(found)

    def at(self, physical: int) -> str | None:
        """`name+0x10` of the symbol that lies there; None outside the kernel."""
        index = bisect_right(self._addresses, physical) - 1
        if index < 0 or (index == len(self._symbols) - 1 and physical != self._addresses[index]):
            return None
        address, name = self._symbols[index]
        return name if address == physical else f"{name}+{physical - address:#x}"
