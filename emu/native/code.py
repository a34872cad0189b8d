"""A copy of the machine code in executable memory, its table filled."""

from __future__ import annotations

import mmap
import struct
from ctypes import addressof, c_char

from emu.native import x86_64


class Code:
    """Raises OSError where the host refuses such memory. Must live as long as it may be called."""

    def __init__(self, **table: int) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        assert len(x86_64.CODE) <= mmap.PAGESIZE
        self._memory.write(x86_64.CODE)
        self._first = c_char.from_buffer(self._memory)
        self.set(**table)

    def set(self, **table: int) -> None:
        """Fill entries of the table."""
        for name, value in table.items():
            struct.pack_into("<Q", self._memory, x86_64.PLACES[name], value)

    def __getitem__(self, name: str) -> int:
        """The address of a function."""
        return addressof(self._first) + x86_64.PLACES[name]
