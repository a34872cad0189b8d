"""Message-signalled interrupts of a PCI function, MSI and MSI-X.

Source: PCI Local Bus Specification 3.0, 6.8. A message is a write of memory: a function that may not master the bus
sends none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

from snapshot.field_types import MaxSize, u3, u16, u32, u64
from snapshot.schema import state
from vmm.devices.pci.function import Function, Signalling
from vmm.devices.pci.header import Field
from vmm.registers import reads, span, writes

MOST_VECTORS = 2048
_MSI_ENABLE, _MSI_64, _MSI_MASKING = 0x001, 0x080, 0x100
_MSIX_ENABLE, _MSIX_MASK_ALL = 0x8000, 0x4000
S = TypeVar("S")


@state("pci.msi", version=1)
class MsiState:
    """The MSI capability: one vector to 32."""

    enabled: Annotated[bool, "MSI enable"] = False
    vectors: Annotated[u3, "multiple message enable: logarithm of the number of vectors"] = 0
    address: Annotated[u64, "message address"] = 0
    data: Annotated[u16, "message data"] = 0
    mask: Annotated[u32, "vectors that are masked"] = 0
    pending: Annotated[u32, "vectors signalled while masked"] = 0


class MsiCapability(Signalling):
    """MSI with addresses of 64 bits and a mask a vector, in the state's field `msi`. `vectors` is a power of two, 32 at
    most."""

    id, size = 0x05, 24

    def __init__(self, vectors: int = 1) -> None:
        self._log = vectors.bit_length() - 1

    def signals(self, function: Function[Any]) -> bool:
        return _msi(function).enabled

    def fields(self, at: int) -> Iterator[Field]:
        writable = (1 << (1 << self._log)) - 1
        yield Field(at + 2, 2, self._control, _MSI_ENABLE | 7 << 4, self._put_control)
        yield Field(at + 4, 8, lambda f: _msi(f).address & ~3, ~3 & (1 << 64) - 1, partial(_put_msi, "address"))
        yield Field(at + 12, 2, lambda f: _msi(f).data, 0xFFFF, partial(_put_msi, "data"))
        yield Field(at + 16, 4, lambda f: _msi(f).mask & writable, writable, self._put_mask)
        yield Field(at + 20, 4, lambda f: _msi(f).pending & writable)

    def signal(self, function: Function[Any], vector: int) -> None:
        """Interrupt by a vector, once; masked it waits."""
        s = _msi(function)
        vector &= (1 << min(s.vectors, self._log)) - 1
        if s.mask >> vector & 1:
            s.pending |= 1 << vector
        else:
            bits = (1 << min(s.vectors, self._log)) - 1
            function.message(s.address & ~3, s.data & ~bits | vector)

    def _control(self, function: Function[Any]) -> int:
        s = _msi(function)
        return _MSI_64 | _MSI_MASKING | self._log << 1 | min(s.vectors, self._log) << 4 | s.enabled

    def _put_control(self, function: Function[Any], value: int) -> None:
        s = _msi(function)
        s.enabled, s.vectors = bool(value & _MSI_ENABLE), min(value >> 4 & 7, self._log)
        function.drive_intx()
        self._release(function)

    def _put_mask(self, function: Function[Any], value: int) -> None:
        _msi(function).mask = value
        self._release(function)

    def _release(self, function: Function[Any]) -> None:
        """Send what waits and is masked no more."""
        s = _msi(function)
        for vector in range(1 << self._log):
            if s.enabled and s.pending >> vector & ~s.mask >> vector & 1:
                s.pending &= ~(1 << vector)
                self.signal(function, vector)


def _msi(function: Function[Any]) -> MsiState:
    found: MsiState = function.state.msi
    return found


def _put_msi(name: str, function: Function[Any], value: int) -> None:
    setattr(_msi(function), name, value)


@state("pci.msix.vector", version=1)
class VectorState:
    """An entry of an MSI-X table, and its pending bit."""

    address: Annotated[u64, "message address"] = 0
    data: Annotated[u32, "message data"] = 0
    masked: Annotated[bool, "masked"] = True
    pending: Annotated[bool, "signalled while masked"] = False


@state("pci.msix", version=1)
class MsixState:
    """The MSI-X capability."""

    enabled: Annotated[bool, "MSI-X enable"] = False
    masked: Annotated[bool, "function mask: all vectors are"] = False
    vectors: Annotated[tuple[VectorState, ...], MaxSize(MOST_VECTORS), "the table"] = ()


def table(vectors: int) -> Any:
    """The state's field `msix` of a function with so many vectors."""
    return field(default_factory=lambda: MsixState(vectors=tuple(VectorState() for _ in range(vectors))))


class MsixCapability(Signalling):
    """MSI-X of so many `vectors`, in the state's field `msix`. Its table is bank "msix", its pending bits bank "pba",
    both in BAR `bar` at the offsets given."""

    id, size = 0x11, 12

    def __init__(self, vectors: int, bar: int, table: int = 0, pba: int = 0x800) -> None:
        self._vectors, self._bar, self._table, self._pba = vectors, bar, table, pba

    def signals(self, function: Function[Any]) -> bool:
        return _msix(function).enabled

    def fields(self, at: int) -> Iterator[Field]:
        yield Field(at + 2, 2, self._control, _MSIX_ENABLE | _MSIX_MASK_ALL, self._put_control)
        yield Field.fixed(at + 4, 4, self._table | self._bar)
        yield Field.fixed(at + 8, 4, self._pba | self._bar)

    def signal(self, function: Function[Any], vector: int) -> None:
        """Interrupt by a vector, once; masked it waits."""
        s = _msix(function)
        if vector >= len(s.vectors):
            return
        entry = s.vectors[vector]
        if s.masked or entry.masked:
            entry.pending = True
        else:
            function.message(entry.address & ~3, entry.data)

    def _control(self, function: Function[Any]) -> int:
        s = _msix(function)
        return self._vectors - 1 | s.masked * _MSIX_MASK_ALL | s.enabled * _MSIX_ENABLE

    def _put_control(self, function: Function[Any], value: int) -> None:
        s = _msix(function)
        s.enabled, s.masked = bool(value & _MSIX_ENABLE), bool(value & _MSIX_MASK_ALL)
        function.drive_intx()
        for vector in range(len(s.vectors)):
            self.release(function, vector)

    def release(self, function: Function[Any], vector: int) -> None:
        """Send what waits and is masked no more."""
        s = _msix(function)
        entry = s.vectors[vector]
        if s.enabled and entry.pending and not s.masked and not entry.masked:
            entry.pending = False
            self.signal(function, vector)


def _msix(function: Function[Any]) -> MsixState:
    found: MsixState = function.state.msix
    return found


class MsixFunction(Function[S]):
    """Base of functions with MSI-X: the banks that its capability names."""

    msix: ClassVar[MsixCapability]

    @reads(span(0, 4 * MOST_VECTORS, 4), size=4, bank="msix")
    def read_table(self, word: int) -> int:
        vectors = _msix(self).vectors
        if word >> 2 >= len(vectors):
            return 0
        entry = vectors[word >> 2]
        match word & 3:
            case 0:
                return entry.address & 0xFFFF_FFFC
            case 1:
                return entry.address >> 32
            case 2:
                return entry.data
        return int(entry.masked)

    @writes(span(0, 4 * MOST_VECTORS, 4), size=4, bank="msix")
    def write_table(self, word: int, value: int) -> None:
        vectors = _msix(self).vectors
        if word >> 2 >= len(vectors):
            return
        entry = vectors[word >> 2]
        match word & 3:
            case 0:
                entry.address = entry.address & ~0xFFFF_FFFF | value & ~3
            case 1:
                entry.address = entry.address & 0xFFFF_FFFF | value << 32
            case 2:
                entry.data = value
            case _:
                entry.masked = bool(value & 1)
                self.msix.release(self, word >> 2)

    @reads(span(0, MOST_VECTORS // 32, 4), size=4, bank="pba")
    def read_pending(self, word: int) -> int:
        vectors = _msix(self).vectors[32 * word : 32 * word + 32]
        return sum(entry.pending << i for i, entry in enumerate(vectors))

    @writes(span(0, MOST_VECTORS // 32, 4), size=4, bank="pba")
    def write_pending(self, word: int, value: int) -> None:
        """Pending bits can only be read."""
