"""What a device may be wired to. The annotation of a constructor's argument says which wire it takes; `wire` makes the
device from a source of wires: the board's, or a test rig's.

    class Thermometer(Device[ThermometerState]):
        def __init__(self, clock: Clock, alarm: Alarm, irq: Line) -> None: ...

A wire is a value given once and never replaced, so that a device holds nothing but its wires and its state.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

D = TypeVar("D")
UNWIRED = object()  # a source's answer for what it has no wire for: the argument's default is taken
Source = Callable[[str, Any], Any]  # (name of the argument, its annotation) -> the wire


class Clock(Protocol):
    """Guest time, the only time a device knows."""

    def now_ns(self) -> int: ...


class Line(Protocol):
    """A wire out of a device: called with the new level each time it is driven."""

    def __call__(self, level: bool, /) -> None: ...


class Lines(Protocol):
    """Wires out of a device, by number: called with one's level each time it is driven."""

    def __call__(self, number: int, level: bool, /) -> None: ...


class Alarm(Protocol):
    """Told the device's deadline (guest ns; None: nothing is pending) each time that may have moved, and by
    `restored()`; then `expire()` is called once guest time is there."""

    def __call__(self, when_ns: int | None, /) -> None: ...


class Transmit(Protocol):
    """Takes each byte a device sends to whoever is at its far end."""

    def __call__(self, byte: int, /) -> None: ...


class Posting(Protocol):
    """Told whether byte writes of the device's first register do nothing but send, and so may come late, in order."""

    def __call__(self, level: bool, /) -> None: ...


class ResetRequest(Protocol):
    """Asks for RESET# of the whole machine, and returns at once."""

    def __call__(self) -> None: ...


class ExitRequest(Protocol):
    """Asks the machine to end with a status, and returns at once."""

    def __call__(self, status: int, /) -> None: ...


class Tsc(Protocol):
    """A CPU's time-stamp counter."""

    def read(self) -> int:
        """What it shows now."""
        ...

    def when_ns(self, value: int, /) -> int | None:
        """The guest time at which it has come to `value`, which may be past; None: not before guest time ends."""
        ...


class Placement(Protocol):
    """Puts a bank of the device at an address of its space, or nowhere; told each time that may have moved, and by
    `restored()`."""

    def __call__(self, bank: str, base: int | None, /) -> None: ...


class Inta(Protocol):
    """The interrupt acknowledge cycles of the 8259As: a vector."""

    def __call__(self) -> int: ...


class Msi(Protocol):
    """A message-signalled interrupt: one 32-bit write to `address` (PCI 3.0, 6.8.1)."""

    def __call__(self, address: int, data: int, /) -> None: ...


class Configuration(Protocol):
    """All functions' configuration spaces; `function` is bus << 8 | device << 3 | function. What is not there reads as
    ones."""

    def read(self, function: int, offset: int, size: int, /) -> int: ...
    def write(self, function: int, offset: int, size: int, value: int, /) -> None: ...


class Dma(Protocol):
    """The machine's RAM, as a bus master sees it."""

    def view(self, address: int, size: int) -> memoryview | None:
        """The bytes at guest-physical [address, address + size), not to be kept or written: None where that is not all
        RAM, or the device may not master the bus."""
        ...

    def write(self, address: int, data: bytes) -> bool:
        """Write, and drop what a CPU has translated there. False, and nothing is written, where `view` gives None."""
        ...


class CpuPins(Protocol):
    """What a board drives at a CPU."""

    def intr(self, level: bool) -> None: ...
    def apic_event(self, level: bool) -> None: ...  # an NMI, INIT or start-up message waits at its local APIC
    def tsc(self) -> int: ...
    def tsc_reaches(self, value: int) -> int | None: ...  # guest ns; None: not before guest time ends
    def set_a20(self, enabled: bool) -> None: ...
    def defer_writes(self, port: int, on: bool) -> None: ...  # byte writes of `port` may come late, in order
    def discard_code(self, start: int, end: int) -> None: ...  # RAM behind these addresses was changed
    def kick(self) -> None: ...  # come back at the next boundary: the board wants something


class Junction:
    """Drivers on one wire: it is high while any of them is, as open collectors are. Every listener is told the level
    each time one of them changes its own."""

    def __init__(self, *listeners: Line) -> None:
        self._levels: list[bool | None] = []  # None: not driven since everything was forgotten
        self._listeners = list(listeners)

    def listen(self, listener: Line) -> None:
        self._listeners.append(listener)

    def driver(self) -> Line:
        """One more driver."""
        levels, listeners, own = self._levels, self._listeners, len(self._levels)
        levels.append(None)

        def drive(level: bool) -> None:
            if levels[own] is level:
                return
            levels[own] = level
            # While a driver is still unknown the wire can rise but not fall: another may be holding it up.
            if level or None not in levels:
                high = level or any(levels)
                for listener in listeners:
                    listener(high)

        return drive

    def forget(self) -> None:
        """Before restoring: every driver will drive again."""
        self._levels[:] = [None] * len(self._levels)


def wire(cls: Callable[..., D], source: Source) -> D:
    """Make a device, each of its constructor's arguments from `source`. Raises TypeError, naming the argument, for one
    that has neither wire nor default."""
    arguments: dict[str, Any] = {}
    for name, annotation, needed in _arguments(cls):
        given = source(name, annotation)
        if given is not UNWIRED:
            arguments[name] = given
        elif needed:
            raise TypeError(f"{cls.__name__}: nothing is wired to {name!r}")
    return cls(**arguments)


@functools.cache
def _arguments(cls: Callable[..., Any]) -> list[tuple[str, Any, bool]]:
    """Of a constructor: name, annotation, and whether there is no default. Found once: a board has many of a class."""
    hints = typing.get_type_hints(cls.__init__)
    parameters = list(inspect.signature(cls.__init__).parameters.items())[1:]
    return [(name, hints.get(name), parameter.default is parameter.empty) for name, parameter in parameters]
