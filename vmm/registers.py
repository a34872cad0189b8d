"""Declared registers: which accesses a method answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from vmm.device import Device

F = TypeVar("F", bound=Callable[..., Any])


class Register:
    """One declared access: (bank, offset, size in bytes) and the name of the method that answers it."""

    def __init__(self, kind: str, bank: str, offset: int, size: int, method: str, indexed: bool) -> None:
        self.kind, self.bank, self.offset, self.size, self.method = kind, bank, offset, size, method
        self.indexed = indexed

    def bind(self, device: Device[Any]) -> Callable[..., Any]:
        """The callable the bus keeps: `() -> int` for a read, `(value) -> None` for a write."""
        method: Callable[..., Any] = getattr(device, self.method)
        return partial(method, self.offset) if self.indexed else method

    def __repr__(self) -> str:
        return f"{self.kind} {self.bank or 'registers'}+{self.offset}/{self.size} {self.method}"


def reads(*offsets: int, bank: str = "", size: int = 1) -> Callable[[F], F]:
    """Declare that the method answers a read of `size` bytes at these offsets: `() -> int` or `(offset) -> int`."""
    return _declare("read", offsets, bank, size)


def writes(*offsets: int, bank: str = "", size: int = 1) -> Callable[[F], F]:
    """Declare that the method takes a write of `size` bytes at these offsets: `([offset,] value) -> None`."""
    return _declare("write", offsets, bank, size)


def _declare(kind: str, offsets: tuple[int, ...], bank: str, size: int) -> Callable[[F], F]:
    def mark(function: F) -> F:
        declared: list[tuple[str, str, int, int]] = getattr(function, "_registers", [])
        declared += [(kind, bank, offset, size) for offset in offsets]
        function._registers = declared  # type: ignore[attr-defined]
        return function

    return mark
