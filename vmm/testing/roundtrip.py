"""Save a machine and go on from the file, again and again while it runs: what a test demands of a machine must hold of
one that was woken, at any moment (`pytest --vm-roundtrip`)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import BackendError
from vmm.machine import machine as machines
from vmm.machine.machine import Machine


@dataclass
class RoundTrips:
    """A hook of one machine's run loop: a round trip every so many guest ns."""

    machine: Machine
    every_ns: int
    next_ns: int = 0
    made: int = 0

    def due_ns(self) -> int:
        return self.next_ns

    def __call__(self) -> None:
        now = self.machine.clock.now_ns()
        if now < self.next_ns:
            return
        if self.next_ns:
            try:
                with tempfile.TemporaryDirectory(prefix="anyhyve") as folder:
                    self.machine.save(Path(folder) / "snapshot")
                    self.machine.go_on_from(Path(folder) / "snapshot")
            except OSError as error:
                raise BackendError(f"no place for a round trip: {error.strerror or error}") from None
            self.made += 1
        self.next_ns = now + self.every_ns


@contextmanager
def round_trips(every_ns: int) -> Iterator[list[RoundTrips]]:
    """While it is entered, every machine that is made makes them. Those there are so far."""
    found: list[RoundTrips] = []

    def begin(machine: Machine) -> None:
        found.append(RoundTrips(machine, every_ns))
        machine.loop.hooks.append(found[-1])

    machines.made.append(begin)
    try:
        yield found
    finally:
        machines.made.remove(begin)
