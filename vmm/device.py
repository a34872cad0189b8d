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
* `restored()` re-derives line levels and the alarm, and raises no edge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from vmm.registers import Bank, Register, shared

S = TypeVar("S")
F = TypeVar("F", bound=Callable[..., Any])


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
    """Base of every device model. Subclasses set `State` and take wires (vmm.wires) as constructor arguments."""

    State: ClassVar[type]
    registers: ClassVar[tuple[Register, ...]] = ()
    banks: ClassVar[Mapping[str, Bank]] = {}  # the same, by bank
    outside: ClassVar[tuple[str, ...]] = ()  # names of methods
    invariants: ClassVar[tuple[str, ...]] = ()
    state: S

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [register for member in vars(cls).values() for register in getattr(member, "_registers", ())]
        if twice := shared(own):
            one, other = twice
            raise TypeError(f"{cls.__name__}: two methods for the same register: {one}, and {other}")
        found = {(r.kind, r.bank, r.offset, r.size): r for r in (*cls.registers, *own)}
        cls.registers = tuple(found.values())
        cls.banks = {name: Bank(cls.registers, name) for name in dict.fromkeys(r.bank for r in cls.registers)}
        cls.outside = _marked(cls, "_outside", cls.outside)
        cls.invariants = _marked(cls, "_invariant", cls.invariants)

    def __init__(self) -> None:
        self.state = self.State()

    def reset(self) -> None:
        """RESET# was asserted. Power-on state unless the datasheet keeps something."""
        self.state = self.State()
        self.restored()

    def deadline(self) -> int | None:
        """Guest time in ns of the next event, computed from state; None when nothing is pending. The device's Alarm is
        told it whenever it may have moved."""
        return None

    def expire(self) -> None:
        """`deadline()` has been reached: do what is due, and move the deadline on."""

    def restored(self) -> None:
        """State was assigned as a whole: drive lines and the alarm from it. Raise no edge, change no state."""


def _marked(cls: type, mark: str, inherited: tuple[str, ...]) -> tuple[str, ...]:
    own = (name for name, member in vars(cls).items() if getattr(member, mark, False))
    return tuple(dict.fromkeys((*inherited, *own)))
