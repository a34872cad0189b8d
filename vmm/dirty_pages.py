"""Which pages of a private mapping this process has copied since it was made, read from its page tables.

Extents are half-open (start, end) byte pairs in ascending order, not touching each other.

Rules
* An answer may say too much (a page that was only read, a whole range), never too little.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import struct

PAGE = 4096

# linux/fs.h: PAGEMAP_SCAN is _IOWR('f', 16, struct pm_scan_arg), Linux 6.7
_PM_SCAN_ARG = struct.Struct("<12Q")
_PAGEMAP_SCAN = 3 << 30 | _PM_SCAN_ARG.size << 16 | ord("f") << 8 | 16
_PAGE_IS_FILE, _PAGE_IS_PRESENT, _PAGE_IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_REGION_WORDS = 3  # struct page_region: start, end, categories
_REGIONS = 4096

# Documentation/admin-guide/mm/pagemap.rst: bits 61 file or shared, 62 swapped, 63 present; here of an entry's top byte
_FILE, _SWAPPED, _PRESENT = 1 << 5, 1 << 6, 1 << 7
_IS_COPIED = bytes((top & (_SWAPPED | _PRESENT) != 0) and not top & _FILE for top in range(256))
_ENTRIES = 1 << 17


def dirty_extents(address: int, size: int) -> list[tuple[int, int]]:
    """The extents, counted from `address`, of a private mapping's pages that are its own copies."""
    scanner = Scanner(address, size)
    try:
        return scanner.extents()
    finally:
        scanner.close()


class Scanner:
    """`dirty_extents` of one mapping, again and again: what can be prepared is."""

    def __init__(self, address: int, size: int) -> None:
        self._address, self._size = address, size
        self._regions = array.array("Q", bytes(8 * _REGION_WORDS * _REGIONS))
        self._scans = True  # until the kernel says it has no PAGEMAP_SCAN
        self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)  # last: nobody would close it

    def extents(self) -> list[tuple[int, int]]:
        if self._scans:
            try:
                return _scan(self._fd, self._address, self._size, self._regions)
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise
                self._scans = False
        return pagemap_extents(self._fd, self._address, self._size)

    def close(self) -> None:
        os.close(self._fd)


def scan_extents(fd: int, address: int, size: int) -> list[tuple[int, int]]:
    """`dirty_extents` by one walk in the kernel. Raises OSError (ENOTTY) before Linux 6.7."""
    return _scan(fd, address, size, array.array("Q", bytes(8 * _REGION_WORDS * _REGIONS)))


def _scan(fd: int, address: int, size: int, regions: array.array[int]) -> list[tuple[int, int]]:
    extents: list[tuple[int, int]] = []
    at, stop = address, address + size
    while at < stop:
        request = bytearray(
            _PM_SCAN_ARG.pack(
                _PM_SCAN_ARG.size,
                0,  # flags
                at,
                stop,
                0,  # where the walk ended, set by the kernel
                regions.buffer_info()[0],
                _REGIONS,
                0,  # no limit on pages
                _PAGE_IS_FILE,  # inverted,
                _PAGE_IS_FILE,  # so required to be clear,
                _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED,  # and any of these
                _PAGE_IS_FILE,  # all that is told apart: nothing, so that neighbours come as one region
            )
        )
        count = fcntl.ioctl(fd, _PAGEMAP_SCAN, request, True)
        for i in range(0, count * _REGION_WORDS, _REGION_WORDS):
            _append(extents, regions[i] - address, regions[i + 1] - address)
        at = _PM_SCAN_ARG.unpack(request)[4]
    return extents


def pagemap_extents(fd: int, address: int, size: int) -> list[tuple[int, int]]:
    """`dirty_extents` from the page table entries of /proc/self/pagemap, on any kernel."""
    extents: list[tuple[int, int]] = []
    for first in range(0, size // PAGE, _ENTRIES):
        entries = os.pread(fd, 8 * min(_ENTRIES, size // PAGE - first), (address // PAGE + first) * 8)
        copied = entries[7::8].translate(_IS_COPIED)
        start = copied.find(1)
        while start >= 0:
            end = copied.find(0, start)
            end = end if end >= 0 else len(copied)
            _append(extents, (first + start) * PAGE, (first + end) * PAGE)
            start = copied.find(1, end)
    return extents


def _append(extents: list[tuple[int, int]], start: int, end: int) -> None:
    if extents and extents[-1][1] == start:
        start, _ = extents.pop()
    extents.append((start, end))
