"""Guest memory at linear addresses, for what is done in an instruction's place: accesses of the supervisor's.

They mark pages as accessed and dirty, as the engine's own do.
"""

from __future__ import annotations

from collections.abc import Iterator

from emu.engine import Engine
from vmm.cpu.paging import PAGE, NotCanonicalError, PageFaultError, Paging, walk
from vmm.cpu.validity import LMA

GP, NP, TS, PAGE_FAULT, UD, DB = 13, 11, 10, 14, 6, 1
MASK64 = (1 << 64) - 1


class FaultError(Exception):
    """The exception that an access or a check would raise. CR2 is set where it is a page fault."""

    def __init__(self, vector: int, error_code: int = 0) -> None:
        self.vector, self.error_code = vector, error_code


def read(engine: Engine, linear: int, size: int) -> int:
    """Raises FaultError."""
    found = b""
    for at, part in _pages(linear, size):
        found += engine.read_physical(physical(engine, at), part)
    return int.from_bytes(found, "little")


def read_pieces(engine: Engine, linear: int, size: int, piece: int = 4) -> int:
    """As `read`, but so many bytes at a time, which a device can tell. Raises FaultError."""
    return sum(read(engine, linear + at, piece) << 8 * at for at in range(0, size, piece))


def write(engine: Engine, linear: int, data: bytes) -> None:
    """All of it or, raising FaultError, nothing. What is not aligned goes byte by byte, which a device can tell."""
    places = [(physical(engine, at, write=True), part) for at, part in _pages(linear, len(data))]
    step = 1 if linear % len(data) else len(data)
    at = iter(range(0, len(data), step))
    for place, part in places:
        for offset in range(0, part, step):
            i = next(at)
            engine.write_physical(place + offset, data[i : i + step])


def physical(engine: Engine, linear: int, write: bool = False) -> int:
    """The guest-physical address. Raises FaultError."""
    control = Paging(engine.cr[0], engine.cr[3], engine.cr[4], engine.u64("efer").value)
    try:
        return walk(control, engine.read_physical, linear, write, engine.write_physical)
    except NotCanonicalError:
        raise FaultError(GP) from None
    except PageFaultError as fault:
        engine.cr[2] = linear & (MASK64 if control.efer & LMA else 0xFFFFFFFF)
        raise FaultError(PAGE_FAULT, fault.error_code) from None


def _pages(linear: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that lie in one page each: where, and how many bytes."""
    while size:
        part = min(size, PAGE - linear % PAGE)
        yield linear, part
        linear, size = linear + part, size - part
