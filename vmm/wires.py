"""What a device is wired to."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Guest time, the only time a device knows."""

    def now_ns(self) -> int: ...


class Line(Protocol):
    """A wire out of a device: called with the new level each time it is driven."""

    def __call__(self, level: bool, /) -> None: ...
