"""The deadlines of a board's devices: pushed by each, the earliest known at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vmm.device import Device
from vmm.wires import Alarm

_MOST = 1000  # events that may be due at one time: a device whose deadline does not move on is at fault


class Alarms:
    """`kick` is called when a deadline comes before what was the earliest: a CPU may be running towards that."""

    def __init__(self, kick: Callable[[], None]) -> None:
        self.next_ns: int | None = None  # the earliest
        self._due: list[int | None] = []
        self._devices: list[Device[Any]] = []
        self._kick = kick

    def __len__(self) -> int:
        return len(self._due)

    def alarm(self) -> Alarm:
        """The wire for one more device, which `belongs` is told of next. Raises TypeError for a second one of it."""
        if len(self._due) > len(self._devices):
            raise TypeError("a device has one alarm")
        due, own = self._due, len(self._due)
        due.append(None)

        def push(when_ns: int | None) -> None:
            if when_ns == due[own]:
                return
            due[own] = when_ns
            before = self.next_ns
            self.next_ns = min((each for each in due if each is not None), default=None)
            if self.next_ns is not None and (before is None or self.next_ns < before):
                self._kick()

        return push

    def belongs(self, device: Device[Any]) -> None:
        """The device that took the last alarm."""
        self._devices.append(device)

    def expire_due(self, now_ns: int) -> None:
        """Let every event that is due happen, earliest first; of those at one time, in the order of the board."""
        for _ in range(_MOST):
            if self.next_ns is None or self.next_ns > now_ns:
                return
            self._devices[self._due.index(self.next_ns)].expire()
        late = type(self._devices[self._due.index(self.next_ns)]).__name__
        raise AssertionError(f"the deadline of a {late} stays in the past: what was missed is served in one expire()")
