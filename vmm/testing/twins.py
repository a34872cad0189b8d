"""A device and the twin woken from its snapshot: whatever is done is done to both, and these must hold:

* nothing raises, an answer fits its width, and an access does a bounded amount of work;
* the twin cannot be told from the original: same answers, same edges, same acts on the outside, same state;
* saving changes nothing; `restored()` changes no state, acts on nothing, and drives each line once to where it was;
* the state stays within its schema, a deadline that has been served does not lie in the past, and the alarm was told
  the deadline there is;
* what the device declares as @invariant goes on holding, once it has held.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from types import FrameType
from typing import Any

from snapshot import schema, versions
from vmm.bus import Bus
from vmm.qtest.board import Command
from vmm.testing.actions import Action, Call, Wake
from vmm.testing.rig import Rig
from vmm.testing.subject import Subject

_MAX_EXPIRIES = 64
MAX_LINES = 20_000  # of Python that one access may run
Limit = Callable[[], AbstractContextManager[Any]]
LAST_NS = 1 << 55  # guest time fits 56 bits, and a device may look as far ahead again


class Twins:
    """`spoil` changes what the twin wakes with: a planted fault, to see whether it is found. Without `same_state` only
    what can be seen from outside is compared. `bounded` counts what the device does, which takes long: else it may do
    as much as it likes. Every method raises AssertionError, naming what does not hold."""

    def __init__(
        self,
        subject: Subject,
        state: Any,
        now: int,
        *,
        spoil: Callable[[Any], Any] = lambda state: state,
        same_state: bool = True,
        bounded: bool = True,
    ) -> None:
        self._spoil, self._same_state = spoil, same_state
        self._kept: set[str] = set()  # invariants that have held
        self.first = _Twin(subject, now, copy.deepcopy(state), Bounded if bounded else nullcontext)
        self.twin: _Twin | None = None
        self._compare()  # a deadline of this state may have passed already

    def do(self, action: Action) -> Any:
        """Returns what a read or a call answered."""
        match action:
            case Wake():
                self.twin = self.first.wake(self._spoil)
            case Command(op, value=value) if op.startswith("clock"):
                now = self.first.rig.now
                if op == "clock_step":
                    value = (self.first.device.deadline() or now) if value is None else now + value
                self._move_to(value or 0)
            case _:
                answer = self._both(action)
                self._compare()
                return answer
        self._compare()
        return None

    def check(self) -> None:
        """What holds of the states at any time."""
        self._compare()
        for twin in filter(None, (self.first, self.twin)):
            schema.encode(twin.device.state)  # what is done to it stays within the schema
        if self.twin is not None and self._same_state:
            assert self.twin.device.state == self.first.device.state, "the twin is in another state"

    def _compare(self) -> None:
        """What can be seen of them from outside."""
        first, twin = self.first, self.twin
        first.expire()
        holding = set(filter(first.holds, first.device.invariants))
        if lost := self._kept - holding:
            raise AssertionError(f"{min(lost)} holds no more")
        self._kept = holding
        if twin is not None:
            twin.expire()
            assert twin.rig.events == first.rig.events, "the twin acts differently on the outside"
            if twin.rig.edges != first.rig.edges:
                line = next(a or b for a, b in zip_longest(first.rig.edges, twin.rig.edges) if a != b)[0]
                raise AssertionError(f"line {line} of the twin differs")

    def _both(self, action: Command | Call) -> Any:
        answer = self.first.play(action)
        if self.twin is not None and (other := self.twin.play(action)) != answer:
            raise AssertionError(f"the twin answers {other!r}, not {answer!r}")
        return answer

    def _move_to(self, now: int) -> None:
        for twin in (self.first, self.twin):
            if twin is not None:
                twin.rig.now = max(twin.rig.now, min(now, LAST_NS))


class _Twin:
    """One device on a bus of its own, woken in `state`."""

    def __init__(self, subject: Subject, now: int, state: Any, limit: Limit, ram: bytearray | None = None) -> None:
        self.subject, self.rig, self._limit = subject, Rig(now=now), limit
        if ram is not None:
            self.rig.ram[:] = ram
        self.device = subject.build(self.rig)
        self.bus = Bus()
        subject.put(self.bus, self.device)
        self.device.state = state
        with limit():
            self.device.restored()
        self.acted, self.edges = bool(self.rig.events), list(self.rig.edges)
        self.rig.events.clear()
        self.rig.edges.clear()

    def wake(self, spoil: Callable[[Any], Any]) -> _Twin:
        """Another, from what a snapshot would hold of this one."""
        state = self.device.state
        declared, saved = schema.schema_of(type(state)), schema.encode(state)
        assert schema.encode(state) == saved, "saving changed the state"
        woken = spoil(versions.decode(declared.name, declared.version, saved, type(state)))
        before = schema.encode(woken)
        made = _Twin(self.subject, self.rig.now, woken, self._limit, self.rig.ram)
        assert schema.encode(made.device.state) == before, "restored() changed the state"
        assert not made.acted, "restored() acted on the outside"
        for line in self.rig.lines.keys() | made.rig.lines.keys():  # one that was never driven is low
            same = made.rig.lines.get(line, False) == self.rig.lines.get(line, False)
            assert same, f"line {line} differs after the restore"
        moved = [line for line, _ in made.edges]
        assert len(moved) == len(set(moved)), "restored() moved a line to and fro"  # the board would see an interrupt
        self.rig.events.clear()
        self.rig.edges.clear()
        return made

    def play(self, action: Command | Call) -> Any:
        arguments = self.subject.arguments(action) if isinstance(action, Call) else {}
        with self._limit():
            answer = self._played(action, arguments)
            self._expire()
        if isinstance(action, Command) and action.op in ("in", "read"):
            size = action.size
            assert 0 <= answer < 1 << 8 * size, f"a read of {size} bytes answered {answer:#x}"
        return answer

    def _played(self, action: Command | Call, arguments: dict[str, Any]) -> Any:
        match action:
            case Command("in", size, address):
                return self.bus.port_in(address, size)
            case Command("read", size, address):
                return self.bus.mmio_read(address, size)
            case Command("out", size, address, value):
                return self.bus.port_out(address, size, value or 0)
            case Command("write", size, address, value):
                return self.bus.mmio_write(address, size, value or 0)
            case Call(method):
                return getattr(self.device, method)(**arguments)
        raise AssertionError(f"nothing that is done to a device: {action}")

    def expire(self) -> None:
        """As the board does."""
        with self._limit():
            self._expire()

    def _expire(self) -> None:
        for _ in range(_MAX_EXPIRIES):
            deadline = self.device.deadline()
            if deadline is None or deadline > self.rig.now:
                self._told()
                return
            self.device.expire()
        raise AssertionError(f"the deadline stays in the past: {_MAX_EXPIRIES} expire() did not serve all it missed")

    def _told(self) -> None:
        deadline = self.device.deadline()
        if self.rig.alarmed:
            told = self.rig.alarm_ns
            assert told == deadline, f"the deadline is {deadline}, and the alarm was told {told}"
        else:
            assert deadline is None, "it has a deadline, and no Alarm to tell it to"

    def holds(self, invariant: str) -> bool:
        with self._limit():
            return bool(getattr(self.device, invariant)())


class Bounded:
    """Context manager. Raises AssertionError when more than so many lines of Python run in it: an access of a guest's
    does a bounded amount of work, whatever the state and however much time has passed."""

    def __init__(self, most: int = MAX_LINES) -> None:
        self._left = most

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise AssertionError("an access does not come to an end")
        return self._trace
