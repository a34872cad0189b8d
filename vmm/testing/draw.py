"""Cases out of bytes, by what a device declares. Any bytes are a case, and few bytes a small one, so that a fuzzer that
changes bytes changes cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from snapshot import field_types as types
from snapshot import schema
from snapshot.field_types import Json
from vmm.qtest.board import Command
from vmm.testing.actions import Action, Call, Wake
from vmm.testing.case import Case
from vmm.testing.subject import Subject

T = TypeVar("T")

_MOST_ACTIONS = 40
_WAITS = (1, 100, 1000, 10**6, 10**9, 10**12)  # ns


class Choices:
    """Numbers out of bytes; when those are used up, always zero."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, bound: int) -> int:
        size = (bound - 1).bit_length() + 7 >> 3
        found = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(found, "little") % bound

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def case(subject: Subject, golden: dict[str, Json], now: int, data: bytes, *, hostile: bool = False) -> Case:
    """Some fields of the golden state replaced and some actions. `hostile`: values no schema allows."""
    c = Choices(data)
    declared = schema.schema_of(subject.device.State).fields
    fields: dict[str, Json] = {}
    if declared:
        for _ in range(c.below(4) or (len(declared) if c.below(8) == 0 else 0)):
            field = c.one_of(declared)
            fields[field.name] = _hostile(c, golden[field.name]) if hostile else value(c, field.type)
    done: list[Action] = []
    while c.left and len(done) < _MOST_ACTIONS:
        done.append(_action(subject, c))
    return Case(subject.name, golden, now, fields, tuple(done))


def _action(subject: Subject, c: Choices) -> Action:
    kind = c.below(16)
    if kind < 11 and subject.device.registers:
        register = c.one_of(subject.device.registers)
        at, address = subject.place(register)
        size = register.size or c.one_of(subject.sizes(at))
        if register.span is not None:
            address += register.span.step * c.below(register.span.count)
        if register.kind == "read":
            return subject.read(at, address, size)
        return subject.write(at, address, size, _written(subject, c, size))
    if kind == 12 and subject.calls:
        method, wanted = c.one_of(list(subject.calls.items()))
        return Call(method, tuple((name, value(c, kind)) for name, kind in wanted.items()))
    if kind == 13:
        return Wake()
    if kind == 14 and subject.at:
        at = c.one_of(subject.at)
        size, address = c.one_of(subject.sizes(at)), max(0, at.base + c.below(16) - 4)
        if c.below(2):
            return subject.read(at, address, size)
        return subject.write(at, address, size, c.below(1 << 8 * size))
    most = c.one_of((0, *_WAITS))
    return Command("clock_step", value=c.below(most + 1) if most else None)


def _written(subject: Subject, c: Choices, size: int) -> int:
    """Half of them numbers that stand in the device's code."""
    if subject.constants and c.below(2):
        return c.one_of(subject.constants)
    return c.below(1 << 8 * size)


def value(c: Choices, kind: types.Type) -> Json:
    """Any that the type allows, in its encoded form."""
    match kind:
        case types.IntType(low, high):
            span = high - low + 1
            return (low + c.below(min(span, 256)), low + c.below(span), high, 0 if low < 0 else low)[c.below(4)]
        case types.BoolType():
            return bool(c.below(2))
        case types.WordType(words):
            return str(c.one_of(words))
        case types.TextType(most):
            return "".join(chr(32 + c.below(95)) for _ in range(c.below(min(most, 64) + 1)))
        case types.BytesType(least, most):
            size = max(least, c.one_of((0, 1, c.below(min(most, 64) + 1), most)))
            few = bytes(c.below(256) for _ in range(min(size, 64)))
            return (few * (size // max(1, len(few)) + 1))[:size].hex()
        case types.ListType(item, least, most):
            return [value(c, item) for _ in range(max(least, c.below(min(most, 16) + 1)))]
        case types.OptionalType(item):
            return None if c.below(4) == 0 else value(c, item)
        case schema.StructType(cls):
            return {field.name: value(c, field.type) for field in schema.schema_of(cls).fields}
    raise AssertionError(f"no value for {kind}")


_HOSTILE: tuple[Json, ...] = (
    None, True, -1, 0, 1 << 64, -(1 << 64), 10**40, "", "zz", "0", "0" * 100_000, "\ud800", "é", [], [[]], [0] * 1000,
    {}, {"": 0},
)  # fmt: skip


def _hostile(c: Choices, golden: Json) -> Json:
    """Something else in the place of a value, or within it."""
    match golden:
        case dict() if golden and c.below(4):
            key = c.one_of(sorted(golden))
            if c.below(8) == 0:
                return {name: item for name, item in golden.items() if name != key}
            return {**golden, key: _hostile(c, golden[key])}
        case list() if golden and c.below(4):
            i = c.below(len(golden))
            return [*golden[:i], _hostile(c, golden[i]), *golden[i + 1 :]]
    return c.one_of(_HOSTILE)
