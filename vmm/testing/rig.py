"""A device's surroundings in a test: a clock, lines, sinks; and how to wire a class to them by its constructor."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

from vmm.device import Device
from vmm.wires import Clock, Line


@dataclass
class Rig:
    """A clock that stands still until moved, lines and sinks that remember."""

    now: int = 0
    lines: dict[str, bool] = field(default_factory=dict)
    edges: list[tuple[str, bool]] = field(default_factory=list)
    events: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    @property
    def clock(self) -> Rig:
        return self

    def now_ns(self) -> int:
        return self.now

    def line(self, name: str) -> Callable[[bool], None]:
        """An output line, low until driven; its last level is kept in `lines`, every change of it in `edges`."""

        def drive(level: bool) -> None:
            if bool(level) != self.lines.get(name, False):
                self.edges.append((name, bool(level)))
            self.lines[name] = bool(level)

        return drive

    def sink(self, name: str) -> Callable[..., None]:
        """A sink for whatever the device calls it with; every call is kept in `events`."""

        def take(*values: Any) -> None:
            self.events.append((name, values))

        return take


Build = Callable[[Rig], Device[Any]]


def wiring(cls: type[Device[Any]]) -> Build:
    """How to build a device from its class: what its constructor calls a Clock, a Line or a callable is given one of
    the rig's. Raises TypeError for an argument that is something else and has no default."""
    hints = typing.get_type_hints(cls.__init__)
    wires: dict[str, Callable[[Rig], Any]] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        hint = hints.get(name)
        if parameter.default is not parameter.empty:
            continue
        if hint is Clock:
            wires[name] = lambda rig: rig.clock
        elif hint is Line:
            wires[name] = methodcaller("line", name)
        elif typing.get_origin(hint) is typing.get_origin(Callable[..., Any]):
            wires[name] = methodcaller("sink", name)
        else:
            raise TypeError(f"{cls.__name__}: what is {name!r}? Give a function that builds the device from a Rig")
    return lambda rig: cls(**{name: wire(rig) for name, wire in wires.items()})
