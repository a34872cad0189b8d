"""Save a machine and go on from the file, again and again while it runs: what a test demands of a machine must hold of
one that was woken, at any moment (`pytest --vm-roundtrip`)."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmm.errors import BackendError

if TYPE_CHECKING:
    from vmm.machine.machine import Machine


@dataclass
class RoundTrips:
    """Of one machine, every so many guest ns. A machine that is marked makes none: the mark is of what it is now."""

    every_ns: int
    next_ns: int = 0
    made: int = 0

    def left_ns(self, now_ns: int) -> int:
        """How long the machine may run until the next."""
        return max(0, self.next_ns - now_ns)

    def at_safe_point(self, machine: Machine) -> None:
        now = machine.clock.now_ns()
        if now < self.next_ns:
            return
        if self.next_ns and not machine.marked:
            try:
                with tempfile.TemporaryDirectory(prefix="anyhyve") as folder:
                    machine.save(Path(folder) / "snapshot")
                    machine.go_on_from(Path(folder) / "snapshot")
            except OSError as error:
                raise BackendError(f"no place for a round trip: {error.strerror or error}") from None
            self.made += 1
        self.next_ns = now + self.every_ns
