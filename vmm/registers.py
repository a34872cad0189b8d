"""Declared registers: which accesses of a bank a method answers.

    @reads(0)                              read() -> int                        one byte at offset 0
    @writes(0x10, size=4)                  write(value)                         four bytes at offset 0x10
    @reads(span(0x20, 3, step=8), size=4)  read(index) -> int                   a family of three, eight bytes apart
    @reads(span(0, 256 << 20), size=ANY)   read(offset, size) -> int            whatever no other register of it answers

A family costs one entry, however many it has.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
ANY = 0  # as a size: every access that lies within the span


@dataclass(frozen=True)
class Span:
    """`count` offsets, `step` bytes apart, from `start` on."""

    start: int
    count: int
    step: int


def span(start: int, count: int, step: int = 1) -> Span:
    """A family of registers: its method takes the index of the one that is accessed, counted from 0. Raises ValueError
    for a family of none, or of none apart."""
    if start < 0 or count < 1 or step < 1:
        raise ValueError(f"no family of registers: {count}, {step} bytes apart from {start}")
    return Span(start, count, step)


@dataclass(frozen=True)
class Register:
    """One declared access, or a family of them. `kind` is "read" or "write", `size` in bytes or ANY, `method` the name
    of the method that answers; `span` is None for one that stands alone."""

    kind: str
    bank: str
    offset: int
    size: int
    method: str
    span: Span | None = None

    @property
    def end(self) -> int:
        """The offset behind its last byte."""
        if self.span is None:
            return self.offset + self.size
        return self.offset + (self.span.count - 1) * self.span.step + max(self.size, 1)

    def bind(self, device: object, offset: int, size: int) -> Callable[..., Any] | None:
        """What answers `size` bytes at `offset`: `() -> int` for a read, `(value) -> None` for a write; None when this
        register does not."""
        method: Callable[..., Any] = getattr(device, self.method)
        if self.span is None:
            return method if (offset, size) == (self.offset, self.size) else None
        if self.size == ANY:
            return partial(method, offset - self.offset, size) if self.offset <= offset <= self.end - size else None
        index, off = divmod(offset - self.offset, self.span.step)
        return partial(method, index) if not off and 0 <= index < self.span.count and size == self.size else None

    def meets(self, other: Register) -> bool:
        """Whether some access is for both of them alike. One of its own size goes before one of any."""
        if (self.kind, self.bank, self.size) != (other.kind, other.bank, other.size):
            return False
        if self.size == ANY:
            return self.offset < other.end and other.offset < self.end
        fine, coarse = sorted((self._offsets, other._offsets), key=lambda offsets: offsets.step)
        first = coarse.start + max(0, -(-(fine.start - coarse.start) // coarse.step)) * coarse.step
        end = min(coarse[-1], fine[-1], first + coarse.step * fine.step) + 1  # then it comes round again
        return any(offset in fine for offset in range(first, end, coarse.step))

    @property
    def _offsets(self) -> range:
        step, count = (1, 1) if self.span is None else (self.span.step, self.span.count)
        return range(self.offset, self.offset + step * count, step)

    def __str__(self) -> str:
        return f"{self.kind} {self.bank or 'registers'}+{self.offset:#x}/{self.size or 'any'} {self.method}"


def reads(*offsets: int | Span, bank: str = "", size: int = 1) -> Callable[[F], F]:
    """Declare that the method answers a read of `size` bytes at these offsets."""
    return _declare("read", offsets, bank, size)


def writes(*offsets: int | Span, bank: str = "", size: int = 1) -> Callable[[F], F]:
    """Declare that the method takes a write of `size` bytes at these offsets."""
    return _declare("write", offsets, bank, size)


def _declare(kind: str, offsets: tuple[int | Span, ...], bank: str, size: int) -> Callable[[F], F]:
    if size == ANY and not all(isinstance(offset, Span) for offset in offsets):
        raise TypeError("a register of any size is declared with a span")

    def mark(function: F) -> F:
        before = sys._getframe(1).f_locals.get(function.__name__)  # in the class, when it is read
        if before is not function and hasattr(before, "_registers"):
            raise TypeError(f"{function.__qualname__}: two methods of one name, and the first has registers")
        declared: list[Register] = getattr(function, "_registers", [])
        for at in offsets:
            place, family = (at.start, at) if isinstance(at, Span) else (at, None)
            declared.append(Register(kind, bank, place, size, function.__name__, family))
        function._registers = declared  # type: ignore[attr-defined]
        return function

    return mark


def shared(registers: Iterable[Register]) -> tuple[Register, Register] | None:
    """Two of them that answer one access; None where no two do."""
    return next((pair for pair in itertools.combinations(registers, 2) if pair[0].meets(pair[1])), None)


class Bank:
    """All registers of one bank, found by offset and size. One a class, whatever the number of devices."""

    def __init__(self, registers: tuple[Register, ...], name: str) -> None:
        own = [register for register in registers if register.bank == name]
        self.size = max((register.end for register in own), default=1)
        self._alone = {(r.kind, r.offset, r.size): r for r in own if r.span is None}
        # A register of its own size is asked before one of any.
        self._families = sorted((r for r in own if r.span is not None), key=lambda r: r.size == ANY)

    def find(self, device: object, kind: str, offset: int, size: int) -> Callable[..., Any] | None:
        """What answers this access of a device's bank; None when nothing does."""
        if (register := self._alone.get((kind, offset, size))) is not None:
            return register.bind(device, offset, size)
        for family in self._families:
            if family.kind == kind and (found := family.bind(device, offset, size)) is not None:
                return found
        return None
