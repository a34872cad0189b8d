"""A device's surroundings in a test: a clock, an alarm, lines, sinks, RAM; a source of wires for `vmm.wires.wire`."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vmm.board.declared import made
from vmm.board.slot import Fixed, Lead, Slot
from vmm.device import Device
from vmm.wires import UNWIRED, Alarm, Clock, Configuration, Dma, Inta, Line, Lines, Msi, Placement, Posting, Tsc, wire

RAM_BYTES = 1 << 20
INTA_VECTOR = 0x30


@dataclass
class Rig:
    """A clock that stands still until moved, an alarm, lines and sinks that remember, and a MiB of RAM at 0."""

    now: int = 0
    lines: dict[str, bool | int] = field(default_factory=dict)
    edges: list[tuple[str, bool | int]] = field(default_factory=list)
    events: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    alarm_ns: int | None = None  # what the device told its alarm last,
    alarmed: bool = False  # if it has one
    ram: bytearray = field(default_factory=lambda: bytearray(RAM_BYTES))

    @property
    def clock(self) -> Rig:
        return self

    def now_ns(self) -> int:
        return self.now

    def alarm(self, when_ns: int | None) -> None:
        """The device's alarm, by whatever way it was given it."""
        self.alarmed, self.alarm_ns = True, when_ns

    def line(self, name: str) -> Callable[[bool], None]:
        """An output line, low until driven; its last level is kept in `lines`, every change of it in `edges`."""

        return lambda level: self._drive(name, bool(level))

    def place(self, bank: str, base: int | None) -> None:
        """Where a bank lies is the level of a line, too: low is nowhere."""
        self._drive(f"place of {bank or 'registers'}", False if base is None else base)

    def _drive(self, name: str, level: bool | int) -> None:
        if level != self.lines.get(name, False):
            self.edges.append((name, level))
        self.lines[name] = level

    def sink(self, name: str) -> Callable[..., None]:
        """A sink for whatever the device calls it with; every call is kept in `events`."""

        def take(*values: Any) -> None:
            self.events.append((name, values))

        return take

    def acknowledge(self) -> int:
        """The acknowledge cycle of interrupt controllers that always have the same interrupt."""
        self.events.append(("inta", ()))
        return INTA_VECTOR

    # --- DMA

    def view(self, address: int, size: int) -> memoryview | None:
        fits = 0 <= address <= address + size <= len(self.ram)
        return memoryview(self.ram)[address : address + size].toreadonly() if fits else None

    def write(self, address: int, data: bytes) -> bool:
        if self.view(address, len(data)) is None:
            return False
        self.ram[address : address + len(data)] = data
        self.events.append(("dma", (address, data)))
        return True

    # --- wiring

    def wire(self, leads: Mapping[str, Lead], name: str, annotation: Any) -> Any:
        """What a constructor's argument is given: a value that the slot fixes, else a wire that ends here."""
        if isinstance(lead := leads.get(name), Fixed):
            return lead.value
        if annotation is Clock:
            return self.clock
        if annotation is Alarm:
            self.alarmed = True
            return self.alarm
        if annotation is Dma:
            return self
        if annotation is Tsc:
            return RigTsc(self)
        if annotation is Configuration:
            return RigConfiguration(self)
        if annotation is Lines:
            return lambda number, level: self._drive(f"{name} {number}", bool(level))
        if annotation is Placement:
            return self.place
        if annotation is Inta:
            return self.acknowledge
        if annotation in (Line, Posting):
            return self.line(name)
        if annotation is Msi or _is_sink(annotation):
            return self.sink(name)
        return UNWIRED


@dataclass
class RigTsc:
    """A TSC of 2 GHz that is ahead of the clock."""

    rig: Rig

    def read(self) -> int:
        return 2 * self.rig.now + 5

    def when_ns(self, value: int) -> int | None:
        return max(0, value - 5 + 1 >> 1)


@dataclass
class RigConfiguration:
    """Configuration spaces that keep nothing, and show where they were read."""

    rig: Rig

    def read(self, function: int, offset: int, size: int) -> int:
        return (function << 8 | offset) & (1 << 8 * size) - 1

    def write(self, function: int, offset: int, size: int, value: int) -> None:
        self.rig.events.append(("configuration", (function, offset, size, value)))


Build = Callable[[Rig], Device[Any]]


def _is_sink(annotation: Any) -> bool:
    """A callable, or a Protocol of one, that takes what the device says and answers nothing."""
    if isinstance(annotation, type):
        return getattr(annotation, "_is_protocol", False) and "__call__" in vars(annotation)
    return typing.get_origin(annotation) is typing.get_origin(Callable[..., Any])


def wiring(cls: type[Device[Any]], leads: Mapping[str, Lead] | None = None) -> Build:
    """How to build a device from its class, each argument of its constructor wired to a rig by its annotation
    (vmm.wires). Raises TypeError for one that is something else and has no default, and for a device without state."""

    def build(rig: Rig) -> Device[Any]:
        return made(partial(wire, cls, partial(rig.wire, leads or {})))

    build(Rig())
    return build


def on_a_board(slot: Slot) -> Build:
    """The same, of the device in a slot of a board."""
    return wiring(slot.device, slot.wires)
