"""Guest memory at linear addresses, for what is done in an instruction's place: accesses of the supervisor's."""

from __future__ import annotations

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
    while len(found) < size:
        at = linear + len(found)
        found += engine.read_physical(physical(engine, at), min(size - len(found), PAGE - at % PAGE))
    return int.from_bytes(found, "little")


def physical(engine: Engine, linear: int, write: bool = False) -> int:
    """The guest-physical address. Raises FaultError."""
    control = Paging(engine.cr[0], engine.cr[3], engine.cr[4], engine.u64("efer").value)
    try:
        return walk(control, engine.read_physical, linear, write)
    except NotCanonicalError:
        raise FaultError(GP) from None
    except PageFaultError as fault:
        engine.cr[2] = linear & (MASK64 if control.efer & LMA else 0xFFFFFFFF)
        raise FaultError(PAGE_FAULT, fault.error_code) from None
