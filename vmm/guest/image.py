"""Putting a guest into fresh RAM and naming the CPU state it starts from.

Three ways in, told apart by the file itself:
* bzImage by the 64-bit boot protocol (Linux Documentation/arch/x86/boot.rst, section "64-bit Boot Protocol");
* ELF vmlinux by PVH (xen/include/public/arch-x86/hvm/start_info.h) where it has the note, else at its ELF entry with
  the 64-bit boot protocol's registers;
* a flat binary at 1 MiB, entered at its first byte in long mode with the first 4 GiB mapped, for tests.
A wrong file is GuestError, one line.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from snapshot.files import read_file
from vmm.cpu.protocol import CpuState, SegmentState, TableState
from vmm.errors import GuestError
from vmm.guest import foreign
from vmm.ram import Ram

FLAT_BASE = 0x100000

_ZERO_PAGE = 0x7000
_GDT = 0x8000
_PAGE_TABLES = 0x9000  # PML4, PDPT, four page directories: 0x9000..0xefff
_PVH_INFO = 0x10000
_CMDLINE = 0x20000
_BOOT_CS, _BOOT_DS = 0x10, 0x18
_E820_RAM, _E820_RESERVED = 1, 2
_PT_LOAD, _PT_NOTE = 1, 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_XLF_KERNEL_64 = 1


@dataclass(frozen=True)
class Image:
    """What a guest is made from. `kernel` is a bzImage, an ELF vmlinux or, with `flat`, raw code; `names` are those of
    the two files, for people."""

    kernel: bytes
    initrd: bytes = b""
    cmdline: str = ""
    flat: bool = False
    names: tuple[str, str] = ("", "")

    @classmethod
    def from_files(cls, kernel: Path, initrd: Path | None = None, cmdline: str = "", flat: bool = False) -> Image:
        names = kernel.name, initrd.name if initrd else ""
        return cls(_read(kernel), _read(initrd) if initrd else b"", cmdline, flat, names)


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise GuestError(f"{path}: {error.strerror}") from None  # its own name may be a descriptor's number


def load(image: Image, ram: Ram) -> CpuState:
    """Write the guest into `ram` and return the state its CPU starts from. Raises GuestError, which names the file."""
    try:
        return _load(image, ram)
    except GuestError as error:
        raise GuestError(f"{image.names[0]}: {error}" if image.names[0] else str(error)) from None


def _load(image: Image, ram: Ram) -> CpuState:
    kernel = image.kernel
    if not kernel:
        raise GuestError("the kernel is an empty file")
    if image.flat:
        _fits(ram, FLAT_BASE, len(kernel), "the code")
        ram.write(FLAT_BASE, kernel)
        return _long_mode(ram, FLAT_BASE)
    if kernel[:4] == b"\x7fELF":
        return _load_elf(image, ram)
    if kernel[0x202:0x206] == b"HdrS":
        return _load_bzimage(image, ram)
    if (what := foreign.known(kernel)) is not None:
        raise GuestError(f"the kernel is neither a bzImage nor an ELF vmlinux; it is {what}")
    raise GuestError("the kernel is neither a bzImage nor an ELF vmlinux (raw code wants --flat)")


def memory_map(ram: Ram) -> list[tuple[int, int, int]]:
    """E820: (base, size, type)."""
    low = ram.regions[0].size
    if low < 0x200000:
        raise GuestError("a Linux guest needs at least 2 MiB of memory")
    return [
        (0, 0x9FC00, _E820_RAM),
        (0x9FC00, 0x400, _E820_RESERVED),
        (0xF0000, 0x10000, _E820_RESERVED),
        (0x100000, low - 0x100000, _E820_RAM),
        *((region.base, region.size, _E820_RAM) for region in ram.regions[1:]),
    ]


def _load_bzimage(image: Image, ram: Ram) -> CpuState:
    kernel = image.kernel
    if len(kernel) < 0x290:
        raise GuestError("the bzImage is cut short")
    (version,) = struct.unpack_from("<H", kernel, 0x206)
    (xloadflags,) = struct.unpack_from("<H", kernel, 0x236)
    if version < 0x20C or not xloadflags & _XLF_KERNEL_64:
        raise GuestError("the bzImage has no 64-bit entry point (boot protocol 2.12 is needed)")
    setup_sectors = kernel[0x1F1] or 4
    payload = kernel[(setup_sectors + 1) * 512 :]
    preferred, init_size = struct.unpack_from("<QI", kernel, 0x258)
    if preferred < 0x100000 or not payload:
        raise GuestError("the bzImage header is damaged")
    (paragraphs,) = struct.unpack_from("<I", kernel, 0x1F4)  # syssize, of 16 bytes
    if len(payload) < 16 * paragraphs:
        raise GuestError(
            f"the bzImage is cut short: {len(payload)} bytes of code, and its header says {16 * paragraphs}"
        )
    _fits(ram, preferred, max(init_size, len(payload)), "the kernel")
    ram.write(preferred, payload)
    _zero_page(image, ram, kernel[0x1F1:0x290], preferred + init_size)
    state = _long_mode(ram, preferred + 0x200)
    state.rsi = _ZERO_PAGE
    return state


def _load_elf(image: Image, ram: Ram) -> CpuState:
    kernel = image.kernel
    try:
        if (why := foreign.elf(kernel)) is not None:
            raise GuestError(f"the ELF file is no kernel we can boot: it is {why}")
        entry, phoff = struct.unpack_from("<QQ", kernel, 24)
        (phnum,) = struct.unpack_from("<H", kernel, 56)
        top, pvh, start = 0, None, None
        left = {
            _PT_LOAD: len(kernel),
            _PT_NOTE: len(kernel),
        }  # bytes; each is looked at once, however many headers say so
        for i in range(phnum):
            header = struct.unpack_from("<IIQQQQQQ", kernel, phoff + 56 * i)
            kind, _, offset, virtual, physical, filesz, memsz, _ = header
            if kind in left:
                left[kind] -= filesz
                if left[kind] < 0:
                    raise GuestError("the ELF kernel's segments are more than the file")
            if kind == _PT_LOAD and memsz:
                if offset + filesz > len(kernel) or filesz > memsz:
                    raise GuestError("the ELF kernel is cut short")
                _fits(ram, physical, memsz, "the kernel")
                ram.write(physical, kernel[offset : offset + filesz])
                top = max(top, physical + memsz)
                if virtual <= entry < virtual + memsz:
                    start = entry - virtual + physical
            elif kind == _PT_NOTE:
                pvh = _pvh_entry(kernel[offset : offset + filesz]) or pvh
    except (struct.error, IndexError, OverflowError):
        raise GuestError("the ELF kernel is cut short or damaged") from None
    if pvh is not None:
        if pvh >= 1 << 32:
            raise GuestError(f"the ELF kernel's PVH entry {pvh:#x} is not below 4 GiB")
        return _pvh(image, ram, pvh, top)
    if start is None:
        raise GuestError("the ELF kernel's entry lies in none of its segments")
    _zero_page(image, ram, bytes(0x290 - 0x1F1), top)
    state = _long_mode(ram, start)
    state.rsi = _ZERO_PAGE
    return state


def _pvh_entry(notes: bytes) -> int | None:
    at = 0
    while at + 12 <= len(notes):
        namesz, descsz, kind = struct.unpack_from("<III", notes, at)
        desc = at + 12 + (namesz + 3 & ~3)
        if notes[at + 12 : at + 16] == b"Xen\0" and kind == _XEN_ELFNOTE_PHYS32_ENTRY and descsz in (4, 8):
            return int.from_bytes(notes[desc : desc + descsz], "little")
        at = desc + (descsz + 3 & ~3)
    return None


def _fits(ram: Ram, base: int, size: int, what: str) -> None:
    low = ram.regions[0].size
    if base + size > low:
        raise GuestError(
            f"{what} needs {_mebibytes(base + size)} of memory, the machine has {_mebibytes(low)} below 4 GiB"
        )


def _mebibytes(size: int) -> str:
    """Rounded up, as --memory takes it."""
    return f"{-(-size >> 20)}M"


def _place_initrd(image: Image, ram: Ram, above: int, highest: int) -> tuple[int, int]:
    if not image.initrd:
        return 0, 0
    size = len(image.initrd)
    low = ram.regions[0].size
    base = min(low, highest + 1) - size & ~0xFFF
    if base < above:
        if highest + 1 < low:
            raise GuestError(f"no room for an initrd of {size} bytes: the kernel wants it below {highest + 1:#x}")
        raise GuestError(
            f"kernel and initrd need {_mebibytes(above + size + 0xFFF)} of memory, the machine has {_mebibytes(low)}"
        )
    ram.write(base, image.initrd)
    return base, size


def _place_cmdline(image: Image, ram: Ram) -> bytes:
    try:
        cmdline = image.cmdline.encode()
    except UnicodeEncodeError:
        raise GuestError("the kernel command line is no text") from None
    if len(cmdline) >= 2048 or b"\0" in cmdline:
        raise GuestError("the kernel command line is longer than 2047 bytes, or has a zero in it")
    ram.write(_CMDLINE, cmdline + b"\0")
    return cmdline


def _zero_page(image: Image, ram: Ram, header: bytes, kernel_end: int) -> None:
    """struct boot_params: the kernel's own setup header, then what the loader must fill in."""
    page = bytearray(4096)
    page[0x1F1 : 0x1F1 + len(header)] = header
    (highest,) = struct.unpack_from("<I", page, 0x22C)
    base, size = _place_initrd(image, ram, kernel_end, highest or 0x7FFFFFFF)
    _place_cmdline(image, ram)
    page[0x210] = 0xFF  # type_of_loader: undefined
    page[0x211] |= 1  # LOADED_HIGH
    struct.pack_into("<H", page, 0x1FA, 0xFFFF)  # vid_mode: normal
    struct.pack_into("<II", page, 0x218, base, size)
    struct.pack_into("<I", page, 0x228, _CMDLINE)
    entries = memory_map(ram)
    page[0x1E8] = len(entries)
    for i, entry in enumerate(entries):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * i, *entry)
    ram.write(_ZERO_PAGE, bytes(page))


def _flat_segment(selector: int, type: int, long: bool = False) -> SegmentState:
    return SegmentState(selector=selector, base=0, limit=0xFFFFFFFF, type=type, db=not long, long=long, granular=True)


def _segments(state: CpuState, ram: Ram, long: bool) -> None:
    code = 0x00AF9B000000FFFF if long else 0x00CF9B000000FFFF
    ram.write(_GDT, struct.pack("<5Q", 0, 0, code, 0x00CF93000000FFFF, 0x00008B0000000067))
    state.gdtr = TableState(base=_GDT, limit=39)
    state.idtr = TableState(base=0, limit=0)
    state.cs = _flat_segment(_BOOT_CS, 11, long)
    for name in ("ds", "es", "ss", "fs", "gs"):
        setattr(state, name, _flat_segment(_BOOT_DS, 3))
    state.ldtr = SegmentState(selector=0, limit=0, type=2, s=False)
    state.tr = SegmentState(selector=0x20, base=0, limit=0x67, type=11, s=False)


def _long_mode(ram: Ram, entry: int) -> CpuState:
    """64-bit mode, first 4 GiB identity-mapped by 2 MiB pages, interrupts off."""
    tables = [0] * (512 * 6)
    tables[0] = _PAGE_TABLES + 0x1000 | 3
    for i in range(4):
        tables[512 + i] = _PAGE_TABLES + 0x2000 + 0x1000 * i | 3
    for i in range(2048):
        tables[1024 + i] = i << 21 | 0x83
    ram.write(_PAGE_TABLES, struct.pack(f"<{len(tables)}Q", *tables))
    state = CpuState(rip=entry, cr0=0x80000033, cr3=_PAGE_TABLES, cr4=0x20, efer=0x500, rsp=0x90000)
    _segments(state, ram, long=True)
    return state


def _pvh(image: Image, ram: Ram, entry: int, kernel_end: int) -> CpuState:
    """32-bit protected mode, paging off, EBX = hvm_start_info."""
    base, size = _place_initrd(image, ram, kernel_end, 0x7FFFFFFF)
    _place_cmdline(image, ram)
    modules, table = _PVH_INFO + 0x100, _PVH_INFO + 0x200
    entries = memory_map(ram)
    info = struct.pack(
        "<IIIIQQQQII", 0x336EC578, 1, 0, 1 if size else 0, modules if size else 0, _CMDLINE, 0, table, len(entries), 0
    )
    ram.write(_PVH_INFO, info)
    ram.write(modules, struct.pack("<QQQQ", base, size, 0, 0))
    ram.write(table, b"".join(struct.pack("<QQII", *entry, 0) for entry in entries))
    state = CpuState(rip=entry, cr0=0x11, rbx=_PVH_INFO, rsp=0x90000)
    _segments(state, ram, long=False)
    return state
