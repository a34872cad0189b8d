"""SMBIOS tables: what a machine calls itself, for a kernel that is started without a firmware.

Source: System management BIOS reference specification 3.0 (DSP0134), clauses 5.2.2 and 7.
"""

from __future__ import annotations

import struct

from vmm.cpu.model import MODEL_NAME, TSC_KHZ

AT = 0xF_8000  # in memory: on a multiple of 16 between F0000 and FFFFF, where it is looked for
_MAKER, _PRODUCT = "anyhyve", "anyhyve pc"
_ENTRY_BYTES = 24
_NO_CHARACTERISTICS, _IS_VIRTUAL = 1 << 3, 1 << 4
_UNKNOWN = 2


def tables(cpus: int, memory: list[tuple[int, int]], at: int) -> bytes:
    """All as they are in memory from `at` on: the 64-bit entry point, then structures. `memory` has base and size in
    bytes of each piece of RAM."""
    structures = b"".join(_structures(cpus, memory))
    entry = bytearray(
        struct.pack("<5sBBBBBBBIQ", b"_SM3_", 0, _ENTRY_BYTES, 3, 0, 0, 1, 0, len(structures), at + _ENTRY_BYTES)
    )
    entry[5] = -sum(entry) & 0xFF
    return bytes(entry) + structures


def _structures(cpus: int, memory: list[tuple[int, int]]) -> list[bytes]:
    total_kb = sum(size for _, size in memory) >> 10
    found = [
        # Its date is that of no build: the same machine has the same memory.
        _structure(0, 0, struct.pack("<BBHBBQBBBBBB", 1, 2, 0xF000, 3, 0, _NO_CHARACTERISTICS, 0, _IS_VIRTUAL, 0, 0,
                                     0xFF, 0xFF), _MAKER, "1", "01/01/2020"),
        _structure(1, 0x100, struct.pack("<BBBB16sBBB", 1, 2, 0, 0, bytes(16), 6, 0, 0), _MAKER, _PRODUCT),
        _structure(3, 0x300, struct.pack("<BBBBBBBBBIBBBBB", 1, 1, 0, 0, 0, 3, 3, 3, _UNKNOWN, *[0] * 6), _MAKER),
    ]  # fmt: skip
    found += [_processor(number) for number in range(cpus)]
    found.append(_structure(16, 0x1000, struct.pack("<BBBIHHQ", 1, 3, 3, 0x8000_0000, 0xFFFE, 1, total_kb << 10)))
    size_mb = min(total_kb >> 10, 0x7FFF)
    more_mb = total_kb >> 10 if size_mb == 0x7FFF else 0
    found.append(
        _structure(17, 0x1100, struct.pack("<HHHHHBBBBBHHBBBBBIHHHH", 0x1000, 0xFFFE, 64, 64, size_mb, 9, 0, 1, 0, 7, 0,
                                           0, 0, 0, 0, 0, 0, more_mb, 0, 0, 0, 0), "RAM")
    )  # fmt: skip
    for number, (base, size) in enumerate(memory):
        last = base + size - 1
        found.append(
            _structure(19, 0x1300 + number, struct.pack("<IIHBQQ", 0xFFFF_FFFF, 0xFFFF_FFFF, 0x1000, 1, base, last))
        )
    found.append(_structure(32, 0x2000, bytes(7)))  # no error at boot
    found.append(_structure(127, 0x7F00, b""))
    return found


def _processor(number: int) -> bytes:
    mhz = TSC_KHZ // 1000
    body = struct.pack(
        "<BBBBQBBHHHBBHHHBBBBBBHHHHH", 1, 3, 1, 2, 0, 3, 0, 0, mhz, mhz, 0x41, 1, 0xFFFF, 0xFFFF, 0xFFFF, 0, 0, 0, 1, 1,
        1, 0x0C, 1, 1, 1, 1,
    )  # fmt: skip
    return _structure(4, 0x400 + number, body, f"CPU {number}", _MAKER, MODEL_NAME)


def _structure(kind: int, handle: int, body: bytes, *strings: str) -> bytes:
    text = b"".join(each.encode() + b"\0" for each in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + text + b"\0"
