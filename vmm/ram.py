"""Guest RAM: one mapping a region, shared by pointer with either CPU backend.

A fresh machine maps anonymous memory, a restored one the snapshot file, both MAP_PRIVATE: which pages the guest has
written is then the kernel's to tell, and costs nothing while it runs. None of it is in a core dump. RAM below the
32-bit hole and RAM from 4 GiB up are separate regions from the start.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from snapshot.mapped import FileMemory
from snapshot.pages import map_over, zeros
from vmm.dirty_pages import PAGE, dirty_extents
from vmm.errors import BackendError, GuestError, RequestError

_COPY = 8 << 20
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

    def kept(self) -> RamCopy:
        """A copy of what it holds now, as a file in memory that holds nothing for pages of zeros. Raises SnapshotError
        when the file it is read from was changed, OSError."""
        copy = RamCopy(self.name, self.size, self.touched())
        for start, end in copy.extents:
            while start < end:
                start += os.pwrite(copy.file, self.view[start : min(end, start + _COPY)], start)
        self.check()
        return copy

    def check(self, every_s: float = 0.0) -> None:
        """Raises SnapshotError when a file that some of it is still read from is no longer what it was; the file is
        looked at every `every_s` seconds."""
        if isinstance(self.memory, FileMemory):
            self.memory.check(every_s)

    def showing(self, copy: RamCopy) -> Region:
        """The same region, at the same address, once it was made to show a copy: as if it had been restored from there.
        What was written to it since it was mapped is gone. Raises OSError."""
        map_over(self.address, self.size, copy.file)
        if isinstance(self.memory, FileMemory):
            self.memory.leave_file()
        return replace(self, stored=copy.extents)


class RamCopy:
    """What a region held at one moment. `contents` is not to be changed."""

    def __init__(self, name: str, size: int, extents: list[tuple[int, int]]) -> None:
        self.extents, self.size = extents, size
        self.file = os.memfd_create(name, os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.file)
        os.truncate(self.file, size)
        self.contents = mmap.mmap(self.file, size, mmap.MAP_SHARED, mmap.PROT_READ)
        self.contents.madvise(mmap.MADV_DONTDUMP)


def layout(size: int) -> list[tuple[int, int]]:
    """(base, size) of the regions of a machine with `size` bytes of RAM."""
    if size % PAGE or size <= 0:
        raise RequestError(f"memory must be a positive multiple of {PAGE} bytes, not {size}")
    low = min(size, HOLE_START)
    return [(0, low)] + ([(HOLE_END, size - low)] if size > low else [])


class Shown(NamedTuple):
    """`size` bytes at guest-physical `base` are this computer's memory at `address`."""

    base: int
    size: int
    address: int
    writable: bool


class RamWindow:
    """RAM of a device's own that the guest sees where the window is mapped, and a CPU accesses as it does the
    machine's: a frame buffer, or a ROM, which it may not write (its writes are lost). Nowhere until it is mapped. Shown
    are whole pages, below 4 GiB, where no RAM of the machine's is and no window made before it; what moves is seen from
    the end of the block that moved it on."""

    def __init__(self, ram: Ram, size: int, writable: bool) -> None:
        """Raises BackendError when the host has not the memory, ValueError for a size that is not whole pages."""
        if size <= 0 or size % PAGE:
            raise ValueError(f"a window of RAM is whole pages, not {size} bytes")
        self.base: int | None = None
        self.size, self.writable = size, writable
        self._ram = ram
        try:
            self._memory = zeros(size)
        except OSError as error:
            raise BackendError(f"cannot map {size} bytes of a device's RAM: {error.strerror}") from None
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def map(self, base: int) -> None:
        """Put it at `base`, wherever it was before."""
        if base != self.base:
            self.base = base
            self._ram.change()

    def unmap(self) -> None:
        """Take it away, if it is there."""
        if self.base is not None:
            self.base = None
            self._ram.change()


class Ram:
    """All RAM of one machine. `changes` counts how often a device's window of it moved; `on_change` is called then."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)
        self.changes = 0
        self.on_change: Callable[[], None] = lambda: None
        self._windows: list[RamWindow] = []  # the one on top first

    def window(self, size: int, *, writable: bool = True) -> RamWindow:
        """One more, below all there are, mapped nowhere. Raises as RamWindow does."""
        made = RamWindow(self, size, writable)
        self._windows.append(made)
        return made

    def change(self) -> None:
        self.changes += 1
        self.on_change()

    def shown(self) -> list[Shown]:
        """What is seen of the devices' windows."""
        free = list(self.holes(HOLE_END))
        found = []
        for window in self._windows:
            if window.base is None or window.base % PAGE:
                continue
            rest = []
            for base, size in free:
                first, last = max(base, window.base), min(base + size, window.base + window.size)
                if first >= last:
                    rest.append((base, size))
                    continue
                address = window.address + first - window.base
                found.append(Shown(first, last - first, address, window.writable))
                rest += [(at, end - at) for at, end in ((base, first), (last, base + size)) if at < end]
            free = rest
        return found

    @classmethod
    def fresh(cls, size: int) -> Ram:
        """Zeroed RAM. Raises BackendError when the host has not the memory."""
        regions = []
        for i, (base, length) in enumerate(layout(size)):
            try:
                memory = zeros(length)
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
            if at < (last := min(region.base, end)):
                yield at, last - at
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

    def check(self, every_s: float = 0.0) -> None:
        """The same of all regions."""
        for region in self.regions:
            region.check(every_s)

    def files(self) -> list[int]:
        """The descriptors that `check` needs."""
        files = [region.memory.file for region in self.regions if isinstance(region.memory, FileMemory)]
        return [file for file in files if file >= 0]

    def close(self) -> None:
        for window in self._windows:
            window.view.release()
        for region in self.regions:
            region.view.release()
            with contextlib.suppress(BufferError):  # a ctypes view still points here; the mapping goes with it
                region.memory.close()
