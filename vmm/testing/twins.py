"""A device and the twin woken from its snapshot: whatever is done is done to both, and these must hold:

* nothing raises, an answer is an int that fits its width, and an access does a bounded amount of work;
* nothing but `state` changes, of the device and its class;
* the twin cannot be told from the original: same answers, same edges, same acts on the outside, same state;
* saving changes nothing; `restored()` changes no state, acts on nothing, and drives each line once to where it was;
* the state stays within its schema, a deadline that has been served does not lie in the past, and the alarm was told
  the deadline there is;
* what the device declares as @invariant goes on holding, once it has held.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from types import FrameType
from typing import Any

from snapshot import schema, versions
from vmm.bus import Bus
from vmm.qtest.board import Command
from vmm.testing import watched
from vmm.testing.actions import Action, Call, Wake
from vmm.testing.rig import Rig
from vmm.testing.subject import Subject
from vmm.testing.watched import Watched

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
        if self.twin is not None and self._same_state and self.twin.device.state != self.first.device.state:
            ours, twins = schema.encode(self.first.device.state), schema.encode(self.twin.device.state)
            raise _differs("the twin is in another state", ours, twins)

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
            if first.rig.events != twin.rig.events:
                raise _differs("the twin acts differently on the outside", *_first(first.rig.events, twin.rig.events))
            if first.rig.edges != twin.rig.edges:
                differ = _first(first.rig.edges, twin.rig.edges)
                line = (differ[0] or differ[1])[0]
                raise _differs(f"line {line} of the twin differs", *map(_edge, differ))

    def _both(self, action: Command | Call) -> Any:
        answer = self.first.play(action)
        if self.twin is not None and (other := self.twin.play(action)) != answer:
            raise AssertionError(f"the twin answers {_number(other)}, not {_number(answer)}")
        return answer

    def _move_to(self, now: int) -> None:
        for twin in (self.first, self.twin):
            if twin is not None:
                twin.rig.now = max(twin.rig.now, min(now, LAST_NS))


def _differs(what: str, expected: Any, came: Any) -> AssertionError:
    """What does not hold, in words that are the same each time; what was expected and what came are its notes."""
    error = AssertionError(what)
    for line in _differences(expected, came):
        error.add_note(line)
    return error


def _differences(expected: Any, came: Any, path: str = "") -> Iterator[str]:
    """What differs in two values of JSON, down to the item, in words."""
    match expected, came:
        case dict(), dict():
            for name in expected:
                yield from _differences(expected[name], came[name], f"{path}.{name}")
        case list(), list() if len(expected) == len(came):
            for i, (one, other) in enumerate(zip(expected, came, strict=True)):
                yield from _differences(one, other, f"{path}[{i}]")
        case _ if expected != came:
            yield (f"{path[1:]}: " if path else "") + f"expected {expected}, came {came}"


def _first(ours: list[Any], twins: list[Any]) -> tuple[Any, Any]:
    """The first that differs; None stands for one that is not there."""
    return next(pair for pair in zip_longest(ours, twins) if pair[0] != pair[1])


def _edge(edge: tuple[str, bool] | None) -> str:
    return "nothing" if edge is None else "it to rise" if edge[1] else "it to fall"


def _number(answer: Any) -> str:
    return f"{answer:#x}" if type(answer) is int else repr(answer)


class _Twin:
    """One device on a bus of its own, woken in `state`."""

    def __init__(self, subject: Subject, now: int, state: Any, limit: Limit, ram: bytearray | None = None) -> None:
        self.subject, self.rig, self._limit = subject, Rig(now=now), limit
        if ram is not None:
            self.rig.ram[:] = ram
        self.device = subject.build(self.rig)
        self.watched = Watched(self.device)
        self.bus = Bus()
        subject.put(self.bus, self.watched)
        self.device.state = state
        with limit():
            self.watched.call("restored")
        self.acted, self.edges = bool(self.rig.events), list(self.rig.edges)
        self.rig.events.clear()
        self.rig.edges.clear()

    def wake(self, spoil: Callable[[Any], Any]) -> _Twin:
        """Another, from what a snapshot would hold of this one."""
        state = self.device.state
        declared, saved = schema.schema_of(type(state)), schema.encode(state)
        if (after := schema.encode(state)) != saved:
            raise _differs("saving changed the state", saved, after)
        woken = spoil(versions.decode(declared.name, declared.version, saved, type(state)))
        before = schema.encode(woken)
        made = _Twin(self.subject, self.rig.now, woken, self._limit, self.rig.ram)
        if (after := schema.encode(made.device.state)) != before:
            raise _differs("restored() changed the state", before, after)
        assert not made.acted, "restored() acted on the outside"
        for line in self.rig.lines.keys() | made.rig.lines.keys():  # one that was never driven is low
            levels = self.rig.lines.get(line, False), made.rig.lines.get(line, False)
            if levels[0] != levels[1]:
                raise _differs(f"line {line} differs after the restore", *("high" if up else "low" for up in levels))
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
                return self.watched.call(method, **arguments)
        raise AssertionError(f"nothing that is done to a device: {action}")

    def expire(self) -> None:
        """As the board does."""
        with self._limit():
            self._expire()

    def _expire(self) -> None:
        for _ in range(_MAX_EXPIRIES):
            deadline = self.watched.deadline()
            if deadline is None or deadline > self.rig.now:
                self._told(deadline)
                return
            self.watched.call("expire")
        raise _differs(
            f"the deadline stays in the past: {_MAX_EXPIRIES} expire() did not serve all it missed",
            f"later than guest time {self.rig.now}",
            deadline,
        )

    def _told(self, deadline: int | None) -> None:
        if self.rig.alarmed:
            told = self.rig.alarm_ns
            assert told == deadline, f"the deadline is {deadline}, and the alarm was told {told}"
        else:
            assert deadline is None, "it has a deadline, and no Alarm to tell it to"

    def holds(self, invariant: str) -> bool:
        with self._limit():
            return bool(self.watched.call(invariant))


class Bounded:
    """Context manager. Raises AssertionError when more than so many lines of Python run in it: an access of a guest's
    does a bounded amount of work, whatever the state and however much time has passed."""

    def __init__(self, most: int = MAX_LINES) -> None:
        self._left = most

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return None if frame.f_code.co_filename == watched.__file__ else self._trace(frame, event, argument)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise AssertionError("an access does not come to an end")
        return self._trace
