"""Configuration space as fields: what is read there, which bits a guest can write, and what a write does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

SIZE = 256  # bytes
Get = Callable[[Any], int]  # of the function
Put = Callable[[Any, int], None]


@dataclass(frozen=True)
class Field:
    """`size` bytes from `offset` on; `mask` has the bits that can be written, which `put` is given with all others as
    they are."""

    offset: int
    size: int
    get: Get
    mask: int = 0
    put: Put | None = None

    @classmethod
    def fixed(cls, offset: int, size: int, value: int) -> Field:
        return cls(offset, size, lambda _: value)


def kept(*registers: tuple[int, int, int]) -> tuple[bytes, tuple[Field, ...]]:
    """Registers of a byte that hold what is written to them and do nothing else here, as (offset, default, bits that
    can be written): what the state's field `kept` is at first, and the fields."""

    def of(place: int, offset: int, mask: int) -> Field:
        def put(function: Any, value: int) -> None:
            s = function.state
            s.kept = s.kept[:place] + bytes((value,)) + s.kept[place + 1 :]

        return Field(offset, 1, lambda function: function.state.kept[place], mask, put)

    fields = (of(place, offset, mask) for place, (offset, _, mask) in enumerate(registers))
    return bytes(default for _, default, _ in registers), tuple(fields)


@dataclass(frozen=True)
class Space:
    """A configuration space of 256 bytes: the field at each."""

    at: tuple[Field | None, ...]

    @classmethod
    def of(cls, fields: Iterable[Field]) -> Space:
        """Raises ValueError for two at one byte."""
        at: list[Field | None] = [None] * SIZE
        for field in fields:
            for byte in range(field.offset, field.offset + field.size):
                if at[byte] is not None:
                    raise ValueError(f"two fields at {byte:#x} of configuration space")
                at[byte] = field
        return cls(tuple(at))

    def _met(self, offset: int, size: int) -> Iterator[Field]:
        """Those that an access meets, each once, in the order of offsets."""
        return (field for field in dict.fromkeys(self.at[offset : offset + size]) if field is not None)

    def read(self, function: Any, offset: int, size: int) -> int:
        """`size` bytes at `offset`; where there is no field they are zero."""
        value = 0
        for field in self._met(offset, size):
            shift, found = 8 * (field.offset - offset), field.get(function)
            value |= found << shift if shift >= 0 else found >> -shift
        return value & (1 << 8 * size) - 1

    def write(self, function: Any, offset: int, size: int, value: int) -> None:
        """Each field is written once."""
        for field in self._met(offset, size):
            if field.put is None:
                continue
            shift, there = 8 * (field.offset - offset), (1 << 8 * size) - 1  # the access, as the field sees it
            given, there = (value >> shift, there >> shift) if shift >= 0 else (value << -shift, there << -shift)
            mask = field.mask & there
            field.put(function, field.get(function) & ~mask | given & mask)
