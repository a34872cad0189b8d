"""A device: pure registers over one declared state.

A device sees offsets into its own banks, never addresses; the bus owns addresses. Wiring (lines out, sinks, the
clock) is constructor arguments; `state` is the only attribute that changes. Saving, loading, validation and the
generic tests come from the state's schema, so no device has save or load code.

    class Rtc(Device[RtcState]):
        @reads(1)
        def read_data(self) -> int: ...

Rules
* What a guest does never raises.
* No device reads the host's clock; a pending event is a deadline computed from state.
* `restored()` re-derives line levels and raises no edge.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Generic, Protocol, TypeVar

S = TypeVar("S")
F = TypeVar("F", bound=Callable[..., Any])


class Clock(Protocol):
    """Guest time, the only time a device knows."""

    def now_ns(self) -> int: ...


class Line(Protocol):
    """A wire out of a device: called with the new level each time it is driven."""

    def __call__(self, level: bool, /) -> None: ...


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


def outside(function: F) -> F:
    """Mark what happens to the device from without: the host's input, a pin, INTA. Arguments are annotated as fields of
    a state are, so that generic tests can draw them."""
    function._outside = True  # type: ignore[attr-defined]
    return function


def invariant(function: F) -> F:
    """Mark a method `() -> bool` that says what holds of the state: whatever is done, it goes on holding."""
    function._invariant = True  # type: ignore[attr-defined]
    return function


class Device(Generic[S]):
    """Base of every device model. Subclasses set `State` and take wiring as constructor arguments."""

    State: ClassVar[type]
    mmio: ClassVar[bool] = False  # its banks are meant for memory, not for I/O ports
    registers: ClassVar[tuple[Register, ...]] = ()
    outside: ClassVar[tuple[str, ...]] = ()  # names of methods
    invariants: ClassVar[tuple[str, ...]] = ()
    state: S

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found = {(r.kind, r.bank, r.offset, r.size): r for r in cls.registers}
        for name, member in vars(cls).items():
            for kind, bank, offset, size in getattr(member, "_registers", ()):
                arguments = len(inspect.signature(member).parameters) - 1
                indexed = arguments > (1 if kind == "write" else 0)
                found[kind, bank, offset, size] = Register(kind, bank, offset, size, name, indexed)
        cls.registers = tuple(found.values())
        cls.outside = _marked(cls, "_outside", cls.outside)
        cls.invariants = _marked(cls, "_invariant", cls.invariants)

    def __init__(self) -> None:
        self.state = self.State()

    def reset(self) -> None:
        """RESET# was asserted. Power-on state unless the datasheet keeps something."""
        self.state = self.State()
        self.restored()

    def deadline(self) -> int | None:
        """Guest time in ns of the next event, computed from state; None when nothing is pending."""
        return None

    def expire(self) -> None:
        """`deadline()` has been reached: do what is due and move the deadline on."""

    def restored(self) -> None:
        """State was assigned as a whole: drive line levels from it. Raise no edge, change no state."""


def _marked(cls: type, mark: str, inherited: tuple[str, ...]) -> tuple[str, ...]:
    own = (name for name, member in vars(cls).items() if getattr(member, mark, False))
    return tuple(dict.fromkeys((*inherited, *own)))
