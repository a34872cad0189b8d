"""Which bytes of a sparse file can matter: those that are not holes.

Extents are half-open (start, end) byte pairs in ascending order, not touching each other.

Rules
* An answer may say too much (a whole range), never too little.
"""

from __future__ import annotations

import errno
import os

NORESERVE = 0x4000  # mmap(2), linux/mman.h: pages are paid for when touched; Python has no name for it before 3.13


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
