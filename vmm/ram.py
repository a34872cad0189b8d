"""Guest RAM: one mapping a region, shared by pointer with either CPU backend.

A fresh machine maps anonymous memory, a restored one the snapshot file, both MAP_PRIVATE: which pages the guest has
written is then the kernel's to tell, and costs nothing while it runs. RAM below the 32-bit hole and RAM
from 4 GiB up are separate regions from the start.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from snapshot.pages import NORESERVE
from vmm.dirty_pages import PAGE, dirty_extents
from vmm.errors import BackendError, GuestError

_COPY = 8 << 20
_MAP_FIXED = 0x10  # mmap(2), linux/mman.h
HOLE_START = 0xC000_0000  # 3 GiB: PCI and chipset MMIO lie from here to 4 GiB
HOLE_END = 0x1_0000_0000


@dataclass(frozen=True)
class Region:
    """`size` bytes of RAM at guest-physical `base`, mapped at host address `address`."""

    name: str
    base: int
    size: int
    memory: mmap.mmap
    view: memoryview
    stored: list[tuple[int, int]] = field(default_factory=list)  # what the snapshot behind it holds

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def touched(self) -> list[tuple[int, int]]:
        """(start, end) of what may hold other bytes than zero: finding it costs nothing for untouched pages."""
        return self.stored + dirty_extents(self.address, self.size)

    def fixed(self) -> tuple[Region, mmap.mmap]:
        """Make what it holds now what a page shows that was not written since, as if it had been restored from there:
        the region, at the same address, and its contents, not to be changed. Raises OSError."""
        with contextlib.ExitStack() as undo:
            file = os.memfd_create(self.name, os.MFD_CLOEXEC)
            undo.callback(os.close, file)
            os.truncate(file, self.size)
            extents = self.touched()
            for start, end in extents:
                while start < end:
                    start += os.pwrite(file, self.view[start : min(end, start + _COPY)], start)
            _map_private(self.address, self.size, file)
            return replace(self, stored=extents), mmap.mmap(file, self.size, mmap.MAP_SHARED, mmap.PROT_READ)


def _map_private(address: int, size: int, fd: int) -> None:
    """Put a private mapping of a file where another mapping is. Python's mmap has no MAP_FIXED."""
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | NORESERVE
    place = ctypes.c_void_p(address)
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    mapped = function(place, ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, ctypes.c_long(0))
    if mapped != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def layout(size: int) -> list[tuple[int, int]]:
    """(base, size) of the regions of a machine with `size` bytes of RAM."""
    if size % PAGE or size <= 0:
        raise GuestError(f"memory must be a positive multiple of {PAGE} bytes, not {size}")
    low = min(size, HOLE_START)
    return [(0, low)] + ([(HOLE_END, size - low)] if size > low else [])


class Ram:
    """All RAM of one machine."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)

    @classmethod
    def fresh(cls, size: int) -> Ram:
        """Zeroed RAM. Raises BackendError when the host has not the memory."""
        regions = []
        for i, (base, length) in enumerate(layout(size)):
            try:
                memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
            except OSError as error:
                raise BackendError(f"cannot map {length} bytes of guest RAM: {error.strerror}") from None
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            regions.append(Region(f"ram.{i}", base, length, memory, memoryview(memory)))
        return cls(regions)

    @property
    def size(self) -> int:
        return sum(region.size for region in self.regions)

    def holes(self, end: int) -> Iterator[tuple[int, int]]:
        """(base, size) of what no RAM covers below `end`."""
        at = 0
        for region in self.regions:
            if region.base > at:
                yield at, region.base - at
            at = region.base + region.size
        if at < end:
            yield at, end - at

    def slice(self, base: int, size: int) -> memoryview:
        """The bytes at guest-physical [base, base+size). GuestError where that is not RAM."""
        for region in self.regions:
            if region.base <= base and base + size <= region.base + region.size:
                return region.view[base - region.base : base - region.base + size]
        raise GuestError(f"{base:#x}..{base + size:#x} is not in guest RAM")

    def read(self, base: int, size: int) -> bytes:
        """Up to `size` bytes at guest-physical `base`: none where that is not RAM."""
        try:
            return bytes(self.slice(base, size))
        except GuestError:
            return b""

    def write(self, base: int, data: bytes) -> None:
        self.slice(base, len(data))[:] = data

    def close(self) -> None:
        for region in self.regions:
            region.view.release()
            with contextlib.suppress(BufferError):  # a ctypes view still points here; the mapping goes with it
                region.memory.close()
