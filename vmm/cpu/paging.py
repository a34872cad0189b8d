"""Virtual addresses of a CPU at rest: the page walk, over any RAM that can be read (SDM vol. 3, chapter 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmm.cpu.model import PHYS_BITS
from vmm.cpu.protocol import CpuState
from vmm.cpu.validity import LMA, NXE, PAE, PG

PAGE = 4096
_WP = 1 << 16  # of CR0
_PSE = 1 << 4  # of CR4

# An entry's bits (SDM vol. 3, tables 4-14 to 4-20).
_PRESENT, _WRITABLE, _ACCESSED, _DIRTY, _LARGE, _LARGE_PAT = 1 << 0, 1 << 1, 1 << 5, 1 << 6, 1 << 7, 1 << 12
_NO_EXECUTE = 1 << 63
_FRAME = 0x000F_FFFF_FFFF_F000
_BEYOND = _FRAME & -(1 << PHYS_BITS)  # beyond the CPU's physical addresses
_DIRECTORY_RESERVED = 0x7FF0_0000_0000_0000
_RESERVED_BIT = 1 << 3  # of #PF's error code

ReadPhysical = Callable[[int, int], bytes]  # (address, size): short where there is no RAM
WritePhysical = Callable[[int, bytes], None]


class Paging(NamedTuple):
    """What of a CPU decides how its linear addresses are translated."""

    cr0: int
    cr3: int
    cr4: int
    efer: int


class PageFaultError(Exception):
    """What the walk comes to instead: the error code that #PF pushes (SDM vol. 3, 4.7)."""

    def __init__(self, error_code: int) -> None:
        self.error_code = error_code


class NotCanonicalError(Exception):
    """The address is none: bits 63 to 47 are not alike (SDM vol. 1, 3.3.7.1)."""


def walk(
    paging: Paging, read: ReadPhysical, address: int, write: bool = False, mark: WritePhysical | None = None
) -> int:
    """The guest-physical address behind a linear one, for the supervisor's access. With `mark` entries are marked as
    accessed and dirty. Raises PageFaultError, NotCanonicalError."""
    cr0, cr3, cr4, efer = paging
    if efer & LMA:
        address &= (1 << 64) - 1
        if address >> 47 not in (0, 0x1FFFF):
            raise NotCanonicalError
    else:
        address &= 0xFFFFFFFF
    if not cr0 & PG:
        return address
    levels, width, table = _levels(cr3, cr4, efer)
    reserved = 0 if width == 4 else _BEYOND | (0 if efer & NXE else _NO_EXECUTE)
    writable = True
    for shift in levels:
        index = address >> shift & (0x1FF if width == 8 else 0x3FF)
        raw = read(table + index * width, width)
        entry = int.from_bytes(raw, "little")
        if len(raw) < width or not entry & _PRESENT:
            raise PageFaultError(write << 1)
        directory = shift == 30 and len(levels) == 3  # PAE's four: no rights, and less of them is free
        large = bool(entry & _LARGE) and shift in (22, 21, 30) and (shift != 22 or bool(cr4 & _PSE)) and not directory
        size = 1 << shift
        wrong = entry & reserved
        if directory:
            wrong |= entry & (_DIRECTORY_RESERVED | _NO_EXECUTE)
        elif shift == 39:
            wrong |= entry & _LARGE
        elif large:
            wrong |= entry & (1 << 21 if shift == 22 else size - 1 & _FRAME & ~_LARGE_PAT)
        if wrong:
            raise PageFaultError(_RESERVED_BIT | write << 1 | _PRESENT)
        writable = writable and bool(entry & _WRITABLE or directory)
        last = shift == 12 or large
        if last and write and not writable and cr0 & _WP:
            raise PageFaultError(write << 1 | _PRESENT)
        wanted = _ACCESSED | (_DIRTY if last and write else 0)
        if mark is not None and not directory and entry & wanted != wanted:
            mark(table + index * width, (entry & 0xFFFFFFFF | wanted).to_bytes(4, "little"))
        if last:
            frame = entry & _FRAME & ~(size - 1)
            if shift == 22:  # bits 39 to 32 lie in 20 to 13 (PSE-36)
                frame = entry & 0xFFC00000 | (entry >> 13 & 0xFF) << 32
            return frame | address & size - 1
        table = entry & (_FRAME if width == 8 else 0xFFFFF000)
    raise AssertionError("a page walk ends at its last level")


def _levels(cr3: int, cr4: int, efer: int) -> tuple[tuple[int, ...], int, int]:
    """What each level's index is shifted by, an entry's size in bytes, and the first table."""
    if efer & LMA:
        return (39, 30, 21, 12), 8, cr3 & _FRAME
    if cr4 & PAE:
        return (30, 21, 12), 8, cr3 & 0xFFFFFFE0
    return (22, 12), 4, cr3 & 0xFFFFF000


def translate(state: CpuState, read: ReadPhysical, address: int) -> int | None:
    """The guest-physical address behind a linear one; None where nothing is mapped."""
    try:
        return walk(Paging(state.cr0, state.cr3, state.cr4, state.efer), read, address)
    except (PageFaultError, NotCanonicalError):
        return None


def read_virtual(state: CpuState, read: ReadPhysical, address: int, size: int) -> bytes:
    """Up to `size` bytes at a linear address: fewer where the mapping ends."""
    found = b""
    while len(found) < size:
        at = address + len(found) & (1 << 64) - 1
        physical = translate(state, read, at)
        if physical is None:
            break
        piece = read(physical, min(size - len(found), PAGE - at % PAGE))
        if not piece:
            break
        found += piece
    return found


def code_bits(state: CpuState) -> int:
    """16, 32 or 64: how the CPU reads its code now."""
    if state.efer & 0x400 and state.cs.long:
        return 64
    return 32 if state.cs.db else 16
