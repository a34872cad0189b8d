"""What a file is that is no kernel for this machine: said in words, where it would else be run into the ground."""

from __future__ import annotations

import struct

from snapshot.container import MAGIC

_MAGIC = (  # offset, bytes, what it is
    (0x38, b"ARM\x64", "an ARM64 kernel"),
    (0x30, b"RISCV\0\0\0", "a RISC-V kernel"),
    (0, b"\x1f\x8b", "packed with gzip: unpack it first"),
    (0, b"\xfd7zXZ\0", "packed with xz: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "packed with zstd: unpack it first"),
    (0, b"\x02\x21\x4c\x18", "packed with lz4: unpack it first"),
    (0, b"BZh", "packed with bzip2: unpack it first"),
    (0, b"070701", "an initial RAM disk (a cpio archive): --initrd takes it"),
    (0, b"070702", "an initial RAM disk (a cpio archive): --initrd takes it"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
    (0, b"QFI\xfb", "a disk image (qcow2)"),
    (0x8001, b"CD001", "a CD image (ISO 9660)"),
    (0, b"!<arch>\n", "an archive, such as a Debian package"),
    (0, MAGIC, "a snapshot: `anyhyve restore` wakes it"),
    (0, b"#!", "a script"),
    (0, b"MZ", "a program for UEFI, or Windows"),
)
_MACHINES = {3: "32-bit x86", 8: "MIPS", 20: "PowerPC", 21: "PowerPC", 22: "S/390", 40: "ARM", 183: "ARM64",
             243: "RISC-V", 258: "LoongArch"}  # fmt: skip
_ET_EXEC = 2
_PROGRAM = {2, 3, 7, 0x6474E552}  # PT_DYNAMIC, PT_INTERP, PT_TLS, PT_GNU_RELRO: what programs have and kernels have not


def known(data: bytes) -> str | None:
    """What a file is by its first bytes, None for one that is not known."""
    return next((what for at, magic, what in _MAGIC if data[at : at + len(magic)] == magic), None)


def elf(data: bytes) -> str | None:
    """Why an ELF file is not a kernel for x86-64, None where it may be one. Raises struct.error, IndexError for one
    that is cut short. Source: elf(5)."""
    order = "<" if data[5] == 1 else ">"
    kind, machine = struct.unpack_from(f"{order}HH", data, 16)
    if data[4] != 2 or data[5] != 1 or machine != 62:
        return f"for {_MACHINES.get(machine, f'machine {machine} of the ELF standard')}, not for x86-64"
    if kind != _ET_EXEC:
        return {1: "an object file, such as a kernel module", 3: "a program or a library", 4: "a core dump"}.get(
            kind, f"of type {kind}"
        )
    (offset,), (count,) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<H", data, 56)
    if any(struct.unpack_from("<I", data, offset + 56 * i)[0] in _PROGRAM for i in range(count)):
        return "a program for an operating system"
    return None
