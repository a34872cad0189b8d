"""Virtual addresses of a CPU at rest: the page walk, over any RAM that can be read (SDM vol. 3, chapter 4)."""

from __future__ import annotations

from collections.abc import Callable

from vmm.cpu.protocol import CpuState

PAGE = 4096
_FRAME = 0x000F_FFFF_FFFF_F000
_PRESENT, _LARGE = 0x01, 0x80

ReadPhysical = Callable[[int, int], bytes]  # (address, size): short where there is no RAM


def translate(state: CpuState, read: ReadPhysical, address: int) -> int | None:
    """The guest-physical address behind a linear one; None where nothing is mapped."""
    if not state.cr0 >> 31 & 1:
        return address & 0xFFFFFFFF
    shifts: tuple[int, ...]
    if state.efer & 0x400:
        shifts, width, table = (39, 30, 21, 12), 8, state.cr3 & _FRAME
    elif state.cr4 & 0x20:
        shifts, width, table = (30, 21, 12), 8, state.cr3 & 0xFFFFFFE0
    else:
        shifts, width, table = (22, 12), 4, state.cr3 & 0xFFFFF000
    for shift in shifts:
        index = address >> shift & (0x1FF if width == 8 else 0x3FF)
        raw = read(table + index * width, width)
        entry = int.from_bytes(raw, "little")
        if len(raw) < width or not entry & _PRESENT:
            return None
        large = entry & _LARGE and shift in (30, 21, 22) and not (shift == 30 and len(shifts) == 3)
        if shift == 12 or large:
            inside = (1 << shift) - 1
            return entry & _FRAME & ~inside | address & inside
        table = entry & _FRAME
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
