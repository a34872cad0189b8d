"""Guest time on KVM: the host's, while the guest runs; still, between two runs.

At any moment

    TSC of the guest = the counter of the vCPU, less what it counted while nobody ran the machine, which KVM cannot stop

and the clock, the counter and the host's clock are brought together at three places: where a run begins (`resume`),
at each exit (`move_on`), and where a state is loaded (`set`). Between them the invariant is: the clock showed
`seen_ns` when the host's clock showed `host_ns`. What the machine has skipped since is the clock less `seen_ns`.
"""

from __future__ import annotations

import time

from kvmbackend.vm import Vcpu
from vmm.clock import GuestClock

# The host takes longer than this between two runs only when nobody runs the machine.
_PAUSE_NS = 1_000_000
_MASK64 = (1 << 64) - 1
now = time.monotonic_ns


class TimeKeeper:
    """Of one vCPU."""

    def __init__(self, vcpu: Vcpu, clock: GuestClock) -> None:
        self._vcpu, self._clock = vcpu, clock
        self.host_ns = now()  # when the clock was moved on last,
        self.seen_ns = clock.now_ns()  # and where to
        self._known: tuple[int, int] | None = None  # host_ns and its TSC, once somebody wanted to know

    def resume(self) -> None:
        """The guest runs from here on. Between two runs guest time went on by what the machine skipped, and no more. A
        moment of the run loop's own still counts; for a longer pause the TSC is set to where guest time is."""
        self._known = None
        host, here = now(), self._clock.now_ns()
        ahead = host - self.host_ns - (here - self.seen_ns)
        if 0 <= ahead < _PAUSE_NS:
            self._clock.skip(ahead)
        else:
            read_ns, tsc = now(), self._vcpu.read_tsc()
            self._vcpu.write_tsc(tsc + self._ticks(now() - read_ns - ahead) & _MASK64)
        self.host_ns, self.seen_ns = host, self._clock.now_ns()

    def step(self) -> None:
        """The guest runs, and its clock is another's."""
        self._known = None

    def move_on(self) -> None:
        """The guest has run until now."""
        host = now()
        self._clock.skip(host - self.host_ns)
        self.host_ns, self.seen_ns = host, self._clock.now_ns()

    def tsc(self) -> int:
        """The time-stamp counter at the clock's time."""
        if self._known is None or self._known[0] != self.host_ns:
            self._known = self.host_ns, self._vcpu.read_tsc() - self._ticks(now() - self.host_ns)
        return self._known[1] + self._ticks(self._clock.now_ns() - self.seen_ns) & _MASK64  # what was skipped counts

    def reaches(self, tsc: int) -> int:
        """Guest ns at which the counter comes to a value; now, if it has."""
        left = tsc - self.tsc()
        return self._clock.now_ns() + max(0, -(-left * 1_000_000 // self._vcpu.tsc_khz))

    def set(self, tsc: int) -> None:
        """The clock was set, and this is the counter at its time."""
        self.host_ns, self.seen_ns = now(), self._clock.now_ns()
        self._vcpu.write_tsc(tsc)
        self._known = self.host_ns, tsc

    def _ticks(self, ns: int) -> int:
        return ns * self._vcpu.tsc_khz // 1_000_000
