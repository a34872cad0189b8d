"""Segment descriptors in the guest's tables (SDM vol. 3, 3.4.5)."""

from __future__ import annotations

from emu.engine import Engine
from emu.linear import FaultError, read_pieces


def descriptor_of(engine: Engine, selector: int, beyond: int) -> int:
    """Raises FaultError: `beyond` is the vector where the table ends before it."""
    table = engine.segment("ldtr" if selector & 4 else "gdtr")
    if (selector | 7) > table.limit:
        raise FaultError(beyond, selector & 0xFFFC)
    return read_pieces(engine, table.base + (selector & ~7), 8)


def base_of(descriptor: int) -> int:
    return descriptor >> 16 & 0xFFFFFF | descriptor >> 32 & 0xFF000000


def limit_of(descriptor: int) -> int:
    """In bytes."""
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
    return limit << 12 | 0xFFF if descriptor >> 55 & 1 else limit
