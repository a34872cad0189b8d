"""ACPI machine language, written.

Source: ACPI specification 6.4, chapter 20 (encoding) and 6.4 (resource descriptors). A term is its bytes; what takes
terms joins them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

Value = int | str | bytes | Sequence["Value"]  # bytes: a term already

_SEGMENT = 4  # characters of a name
_MEMORY, _IO, _BUS = 0, 1, 2  # kinds of address space


def _with_length(body: bytes) -> bytes:
    """PkgLength, which counts itself, and the body (20.2.4)."""
    if len(body) + 1 < 0x40:
        return bytes((len(body) + 1,)) + body
    for more in (1, 2, 3):
        size = len(body) + 1 + more
        if size < 1 << 4 + 8 * more:
            return bytes((more << 6 | size & 15,)) + (size >> 4).to_bytes(more, "little") + body
    raise ValueError(f"a package of {len(body)} bytes is too long")


def path(text: str) -> bytes:
    r"""A name, such as \_SB.PCI0. Raises ValueError for what is none."""
    parts = text.removeprefix("\\").split(".")
    for part in parts:
        if not 0 < len(part) <= _SEGMENT or not part.replace("_", "A").isalnum() or part != part.upper():
            raise ValueError(f"{text!r} is no name")
    root = b"\\" if text.startswith("\\") else b""
    lead = {1: b"", 2: b"\x2e"}.get(len(parts), b"\x2f" + bytes((len(parts),)))
    return root + lead + b"".join(part.ljust(_SEGMENT, "_").encode() for part in parts)


def value(given: Value) -> bytes:
    """A term from an integer, a text or a package of values. Raises ValueError for what is not encodable."""
    if isinstance(given, bytes):
        return given
    if isinstance(given, str):
        return b"\x0d" + given.encode("ascii") + b"\0"
    if not isinstance(given, int):
        if len(given) > 255:
            raise ValueError(f"a package of {len(given)} values")
        return b"\x12" + _with_length(bytes((len(given),)) + b"".join(map(value, given)))
    if given in (0, 1):
        return bytes((given,))
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= given < 1 << 8 * size:
            return bytes((prefix,)) + given.to_bytes(size, "little")
    raise ValueError(f"{given} is no integer of 64 bits")


def name(where: str, what: Value) -> bytes:
    """Name (where, what)"""
    return b"\x08" + path(where) + value(what)


def scope(where: str, *terms: bytes) -> bytes:
    """Scope (where) { ... }"""
    return b"\x10" + _with_length(path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    """Device (where) { ... }"""
    return b"\x5b\x82" + _with_length(path(where) + b"".join(terms))


def buffer(data: bytes) -> bytes:
    """Buffer () { ... }"""
    return b"\x11" + _with_length(value(len(data)) + data)


def eisa_id(text: str) -> bytes:
    """EisaId ("PNP0A03"): three letters of five bits, four hexadecimal digits, big end first (19.6.37)."""
    letters, product = text[:3], int(text[3:], 16)
    maker = (ord(letters[0]) & 31) << 10 | (ord(letters[1]) & 31) << 5 | ord(letters[2]) & 31
    return b"\x0c" + struct.pack(">HH", maker, product)


# --- resource descriptors


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { ... }: the descriptors, and an end tag without a checksum."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def ports(first: int, count: int) -> bytes:
    """IO (Decode16, first, first, 1, count)"""
    return struct.pack("<BBHHBB", 0x47, 1, first, first, 1, count)


def interrupt(*numbers: int) -> bytes:
    """IRQNoFlags () { ... }: edge-triggered, active high."""
    return struct.pack("<BH", 0x22, sum(1 << number for number in numbers))


def memory(base: int, size: int, writable: bool = True) -> bytes:
    """Memory32Fixed (ReadWrite, base, size)"""
    return struct.pack("<BHBII", 0x86, 9, writable, base, size)


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber, produced."""
    return _range(0x88, _BUS, 0, "H", first, last)


def port_range(first: int, last: int) -> bytes:
    """WordIO, produced: ISA and others."""
    return _range(0x88, _IO, 3, "H", first, last)


def memory_range(first: int, last: int) -> bytes:
    """DWordMemory, produced: not cacheable, read and written; QWordMemory where an address has more bits."""
    tag, code = (0x87, "I") if last < 1 << 32 else (0x8A, "Q")
    return _range(tag, _MEMORY, 1, code, first, last)


def _range(tag: int, kind: int, flags: int, code: str, first: int, last: int) -> bytes:
    body = struct.pack(f"<BBB5{code}", kind, 0x0C, flags, 0, first, last, 0, last - first + 1)
    return struct.pack("<BH", tag, len(body)) + body
