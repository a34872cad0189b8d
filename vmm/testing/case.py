"""One test of one device, as a value: the state it wakes in, and what is done to it. It can be run, made smaller, kept
in a file and written as a pytest file."""

from __future__ import annotations

import functools
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import blake3

from snapshot import schema, versions
from snapshot.errors import SnapshotError
from snapshot.field_types import Json
from vmm.errors import RequestError
from vmm.qtest.board import Command
from vmm.testing import actions
from vmm.testing.actions import Action, Wake
from vmm.testing.subject import Subject
from vmm.testing.twins import Twins


class Stale(RequestError):
    """A case of a device that has changed since: it says nothing of the one there is now."""


@dataclass(frozen=True)
class Case:
    """`golden` is a device's state as a snapshot holds it, `fields` what stands in it instead; `now` in guest ns."""

    device: str
    golden: dict[str, Json]
    now: int
    fields: dict[str, Json]
    actions: tuple[Action, ...]

    @functools.cached_property
    def id(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))  # also of what canon refuses
        return blake3.blake3(text.encode()).hexdigest()[:8]

    def to_json(self) -> dict[str, Json]:
        return {
            "device": self.device,
            "golden": self.golden,
            "now": self.now,
            "fields": self.fields,
            "actions": [str(action) for action in self.actions],
        }

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Raises RequestError."""
        try:
            found = json.loads(text)
            listed = tuple(actions.parse(line) for line in found.pop("actions"))
            case = cls(**found, actions=listed)
            if type(case.device) is not str or type(case.now) is not int or type(case.golden) is not dict:
                raise ValueError
            return replace(case, fields=dict(case.fields))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RequestError("not a case") from None

    def run(self, *, subject: Subject | None = None, answers: list[Any] | None = None, **how: Any) -> None:
        """Raises what the device raises, or AssertionError for what does not hold; Stale when the case is none of this
        device as it is now. A state that is none of its schema must be refused, and then is. `subject` when it is not
        the one of this name; `answers` is given what each action answers; `how` as Twins has it."""
        subject = subject or Subject.named(self.device)
        for action in self.actions:
            if isinstance(action, actions.Call):
                try:
                    subject.arguments(action)
                except RequestError as error:
                    raise Stale(str(error)) from None
        fields = {**self.golden, **self.fields}
        try:
            value = _decode(fields, subject)
        except SnapshotError:
            try:
                _decode(self.golden, subject)
            except SnapshotError as error:
                raise Stale(f"{self.device} has another state now: {error}") from None
            return
        assert schema.encode(value) == fields, "a state is not as it was read"
        twins = Twins(subject, value, self.now, **how)
        answers = [] if answers is None else answers
        for action in self.actions:
            answers.append(twins.do(action))
        twins.check()

    def failure(self, **how: Any) -> str | None:
        """What goes wrong, in words that are the same whenever it goes wrong for the same reason; None when nothing
        does. Raises Stale, as `run`."""
        error = self._raised(**how)
        return None if error is None else cause(error)

    def told(self, **how: Any) -> tuple[list[str], Exception | None]:
        """The same with all numbers: its lines, with what was answered to each, and what is raised in the end."""
        answers: list[Any] = []
        error = self._raised(answers=answers, **how)
        done = len(self.actions)
        answers += [None] * (done - len(answers))
        lines = self.lines()
        said = [line + _answered(answer) for line, answer in zip(lines[-done:], answers, strict=True)] if done else []
        return lines[: len(lines) - done] + said, error

    def _raised(self, **how: Any) -> Exception | None:
        try:
            self.run(**how)
        except Stale:
            raise
        except Exception as error:
            return error
        return None

    def lines(self) -> list[str]:
        """What stands in the state instead, and what is done."""
        states = [f"{name} = {json.dumps(value)}, not {json.dumps(self.golden.get(name))}"
                  for name, value in self.fields.items()]  # fmt: skip
        return [f"guest time {self.now} ns", *states, *map(str, self.actions)]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _decode(fields: dict[str, Json], subject: Subject) -> Any:
    state = subject.device.State
    declared = schema.schema_of(state)
    return versions.decode(declared.name, declared.version, fields, state)


def cause(error: BaseException) -> str:
    """What is told of an error, but for the numbers."""
    kind, said, where = _parts(error)
    return f"{kind}: {re.sub(_NUMBERS, 'N', said)}{where}"


def told(error: BaseException) -> list[str]:
    """The kind of an error, what it says, and where; and what was expected and what came, where that is known."""
    return ["{}: {}{}".format(*_parts(error)), *getattr(error, "__notes__", ())]


def _parts(error: BaseException) -> tuple[str, str, str]:
    """Its kind, its first line, and the innermost function that is the device's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _OURS.search(f.filename)]
    where = f" in {frames[-1].name}" if frames else ""
    return type(error).__name__, str(error).split("\n")[0], where


def _answered(answer: Any) -> str:
    if answer is None:
        return ""
    return f": {answer:#x}" if type(answer) is int else f": {answer!r}"


_NUMBERS = r"-?0x[0-9a-f]+|\d+|b?'[^']*'"
_OURS = re.compile(r"/vmm/(testing/|bus\.py)")
_SHRINK_S = 30


def smallest(case: Case, why: str, **how: Any) -> Case:
    """As small as it gets within a while and still fails for this reason; itself when it does not."""
    until = time.monotonic() + _SHRINK_S

    def fails(other: Case) -> bool:
        return time.monotonic() < until and other.failure(**how) == why

    return shrink(case, fails) if fails(case) else case


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The smallest difference from the golden state and the shortest list of accesses that still fail."""
    smaller: Case | None = case
    while smaller is not None:
        case = smaller
        smaller = next((other for other in chain(_simpler(case), _shorter(case)) if fails(other)), None)
    return case


def _shorter(case: Case) -> Iterator[Case]:
    """Cases with fewer accesses, for a number that is further from the golden one: an index that was counted up to
    where it fails may begin there."""
    for fewer in _fewer(case):
        for name, value in case.fields.items():
            if isinstance(value, int) and not isinstance(value, bool):
                for far in range(64):
                    yield replace(fewer, fields={**case.fields, name: value + (1 << far)})


def _simpler(case: Case) -> Iterator[Case]:
    """Cases with less in them, the boldest first."""
    yield from _fewer(case)
    for name, value in case.fields.items():
        rest = {other: kept for other, kept in case.fields.items() if other != name}
        yield replace(case, fields=rest)
        for simpler in _towards(case.golden.get(name), value):
            yield replace(case, fields={**rest, name: simpler})
    yield from (replace(case, now=now) for now in _numbers(case.now))
    for i, action in enumerate(case.actions):
        for easier in _easier(action):
            yield replace(case, actions=(*case.actions[:i], easier, *case.actions[i + 1 :]))


def _fewer(case: Case) -> Iterator[Case]:
    """Cases with fewer accesses: without all, without each half, each quarter ... each one."""
    count = len(case.actions)
    size = count
    while size:
        for start in range(0, count, size):
            yield replace(case, actions=case.actions[:start] + case.actions[start + size :])
        size //= 2


def _towards(golden: Json, value: Json) -> Iterator[Json]:
    """Values nearer to the golden one."""
    if value == golden:
        return
    match value, golden:
        case dict(), dict() if value.keys() == golden.keys():
            for key in value:
                if value[key] != golden[key]:
                    yield {**value, key: golden[key]}
                    for nearer in _towards(golden[key], value[key]):
                        yield {**value, key: nearer}
        case list(), list() if len(value) == len(golden):
            for i, (item, old) in enumerate(zip(value, golden, strict=True)):
                if item != old:
                    for nearer in (old, *_towards(old, item)):
                        yield [*value[:i], nearer, *value[i + 1 :]]
        case list(), _ if value:
            yield from (value[:size] for size in _sizes(len(value)))
        case str(), _ if value:
            yield from (value[: 2 * size] for size in _sizes(len(value) // 2))
            if value.strip("0"):
                yield "0" * len(value)
        case int(), _ if not isinstance(value, bool):
            yield from _numbers(value)


def _sizes(size: int) -> Iterator[int]:
    """Smaller ones: nothing, half, three quarters ... one less."""
    yield from ((size - (size >> shift)) for shift in range(size.bit_length()) if size)


def _numbers(value: int) -> Iterator[int]:
    """Smaller ones, and fewer bits."""
    yield from (size if value > 0 else -size for size in _sizes(abs(value)))
    if value > 0:
        yield from (value & ~(1 << bit) for bit in range(value.bit_length()) if value >> bit & 1)


def _easier(action: Action) -> Iterator[Action]:
    match action:
        case Command(value=int(value)):
            yield from (replace(action, value=number) for number in _numbers(value))
        case actions.Call(method, arguments):
            for i, (name, value) in enumerate(arguments):
                for simpler in _towards(None, value):
                    yield actions.Call(method, (*arguments[:i], (name, simpler), *arguments[i + 1 :]))
        case Wake():
            return


PYTEST = '''"""Found by `anyhyve fuzz`: {cause}"""

import os
import sys

from anyhyve.testing import Case

sys.path.insert(0, os.getcwd())  # for a device of a module here, as `anyhyve fuzz` finds it


def test_{name}():
    Case.from_json("""{case}""").run()
'''


def as_pytest(case: Case, why: str) -> str:
    """A test file that fails as the case does, and needs nothing but this package."""
    text = json.dumps(case.to_json(), indent=1).replace("\\", "\\\\")
    name = re.sub(r"\W+", "_", f"{case.device}_{case.id}")
    return PYTEST.format(cause=why.replace("\\", "\\\\").replace('"', "'"), name=name, case=text)


def as_qtest(case: Case, why: str) -> str:
    """The accesses as QEMU's qtest has them. What it has no words for stands in comments."""
    lines = [f"# {case.device} {case.id}: {why}"]
    lines += [f"# state: {name} = {json.dumps(value)}" for name, value in case.fields.items()]
    lines += [str(action) if isinstance(action, Command) else f"# {action}" for action in case.actions]
    return "".join(f"{line}\n" for line in lines)
