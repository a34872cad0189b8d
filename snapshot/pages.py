"""Memory in pages: which bytes of a sparse file can matter, and private memory that is in no core dump.

Extents are half-open (start, end) byte pairs in ascending order, not touching each other.

Rules
* An answer may say too much (a whole range), never too little.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

NORESERVE = 0x4000  # mmap(2), linux/mman.h: pages are paid for when touched; Python has no name for it before 3.13


_MAP_FIXED = 0x10  # mmap(2), linux/mman.h


def zeros(size: int) -> mmap.mmap:
    """Private memory, which core dumps leave out. Raises OSError."""
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    memory.madvise(mmap.MADV_DONTDUMP)
    return memory


def map_over(address: int, size: int, fd: int = -1) -> None:
    """Put private memory where other memory is: a file's, or zeros. Python's mmap has no MAP_FIXED. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    place, length, offset = ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_long(0)
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | NORESERVE | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
    if libc.mmap(place, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    libc.madvise(place, length, mmap.MADV_DONTDUMP)


def present_extents(fd: int, size: int, offset: int = 0) -> list[tuple[int, int]]:
    """The extents, counted from `offset`, of the `size` bytes there that are not holes of the file."""
    extents: list[tuple[int, int]] = []
    at, stop = offset, offset + size
    while at < stop:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                break
            return [(0, size)]
        if start < stop:
            extents.append((start - offset, min(at, stop) - offset))
    return extents
