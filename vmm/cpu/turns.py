"""Whose turn it is: of several CPUs one runs at a time.

A turn lasts 200 us of guest time (on KVM, where a change costs more, 2 ms) while another CPU could run; the sixteenth
PAUSE in it gives it up, for whoever spins waits for another. KVM does not tell of PAUSEs: there who wakes another gives
it up. A CPU that halts gives it up, too. Then it is the turn of the next that can run, in the order of their numbers.

The choice is a function of states alone (of `smp`, of the CPUs', of guest time), and made before each run of a CPU: to
ask once more, where a run was cut, changes nothing. So everything it depends on is known at the moment it changes:
when a CPU wakes, the one that runs comes back at the end of its block, and its PAUSEs count from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from snapshot.field_types import u8, u64
from snapshot.schema import state
from vmm.clock import BYTES_PER_NS, GuestClock, Word
from vmm.cpu.protocol import Cpu

PATIENCE = 16  # PAUSEs
_TIME = Word.TIME.value
_FOREVER = (1 << 64) - 1


@state("smp", version=1)
class TurnState:
    """Which CPU runs."""

    current: Annotated[u8, "number of the CPU whose turn it is"] = 0
    ends: Annotated[u64, "guest time when the turn is over, where another CPU can run, in quarters of a ns"] = 0
    pauses: Annotated[u8, "PAUSEs in this turn while another CPU could run"] = 0


class Turns:
    """The turns of one machine's CPUs."""

    def __init__(self, cpus: Sequence[Cpu], clock: GuestClock) -> None:
        self.state = TurnState()
        self._cpus, self._clock = cpus, clock
        self._contended = False  # another can run

    @property
    def current(self) -> Cpu:
        """The CPU whose turn it is."""
        return self._cpus[self.state.current]

    def replace(self, cpus: Sequence[Cpu]) -> None:
        """Go on with other CPUs."""
        self._cpus, self._contended = cpus, False

    def choose(self) -> Cpu:
        """The CPU that is to run now. Inside a block nobody takes its turn away."""
        if len(self._cpus) == 1:
            return self.current
        if not self._clock.prepaid:
            s, time = self.state, self._clock.words[_TIME]
            if time >= s.ends or s.pauses >= PATIENCE or not self.current.can_run():
                number = self._next()
                if number is not None:
                    s.current, s.ends, s.pauses = number, time + self._cpus[number].turn_ns * BYTES_PER_NS, 0
        self._look()
        return self.current

    def limit(self) -> int:
        """To when it may run, in quarters of a ns."""
        return self.state.ends if self._contended else _FOREVER

    def woken(self, number: int, level: bool) -> None:
        """What a CPU waits for has come, or is gone."""
        before = self._contended
        self._look()
        if self._contended and level and number != self.state.current and not self.current.counts_pauses:
            # Who spins for the one that was woken is not to be told from who works.
            self.state.pauses = PATIENCE
            self.current.kick()
        elif self._contended and not before:
            self.current.kick()

    def another_can_run(self) -> bool:
        return self._next() is not None

    def any_listens(self) -> bool:
        """Whether an interrupt would wake one of them."""
        return any(cpu.listens() for cpu in self._cpus)

    def _look(self) -> None:
        self._contended = self.another_can_run()
        self.current.count_pauses(self._paused if self._contended else None)

    def _next(self) -> int | None:
        """The next CPU that can run, the current one left out."""
        count, current = len(self._cpus), self.state.current
        return next((n % count for n in range(current + 1, current + count) if self._cpus[n % count].can_run()), None)

    def _paused(self) -> None:
        self.state.pauses = min(self.state.pauses + 1, PATIENCE)
        if self.state.pauses == PATIENCE:
            self.current.kick()
