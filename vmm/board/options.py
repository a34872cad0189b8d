"""Options of a kind of device: a frozen dataclass whose fields are annotated as those of a state are. From it come the
command line's `option=value`, what JSON may say, what the file holds, the checks, and the docs.

    @dataclass(frozen=True, kw_only=True)
    class UartOptions:
        irq: Annotated[int, Range(0, 15), "ISA interrupt"] = 4
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from snapshot import field_types as types
from snapshot import schema
from snapshot.errors import SnapshotError
from vmm.errors import RequestError

_YES, _NO = ("on", "true", "yes"), ("off", "false", "no")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Of a kind that has none."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: its type, what it says, and its default (None: it has to be given)."""

    name: str
    type: types.Type
    doc: str
    default: Any

    def parse(self, text: str) -> Any:
        """The value a text says. Raises RequestError."""
        try:
            return self.type.decode(self._decoded(text), self.name)
        except ValueError:
            raise RequestError(f"{self.name}={text}: not a number") from None
        except SnapshotError as error:
            raise RequestError(str(error)) from None

    def _decoded(self, text: str) -> types.Json:
        match self.type:
            case types.IntType():
                return int(text, 0)
            case types.BoolType() if text in _YES + _NO:
                return text in _YES
        return text

    def spell(self, value: Any) -> str:
        """The text that `parse` makes the value of."""
        encoded = self.type.encode(value, self.name)
        return _YES[0] if encoded is True else _NO[0] if encoded is False else str(encoded)


def options_of(cls: type[Any]) -> Mapping[str, Option]:
    """The options a dataclass declares, by name."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        kind, doc = schema.type_and_doc(hints[field.name], f"{cls.__name__}.{field.name}")
        default = None if field.default is dataclasses.MISSING else field.default
        found[field.name] = Option(field.name, kind, doc, default)
    return found


def read(cls: type[Any], given: Iterable[tuple[str, Any]], besides: Iterable[str] = ()) -> Any:
    """The options a list of names and values says: values as texts, or as JSON has them. `besides`: others that there
    are, which somebody else has read. Raises RequestError, naming the option, for one that is not there, twice there,
    missing, or not of its type."""
    declared, values = options_of(cls), {}
    for name, value in given:
        if name not in declared:
            raise RequestError(f"there is no option {name!r}; there are {', '.join([*besides, *declared]) or 'none'}")
        if name in values:
            raise RequestError(f"option {name!r} is given twice")
        try:
            option = declared[name]
            values[name] = option.parse(value) if isinstance(value, str) else option.type.decode(value, name)
        except SnapshotError as error:
            raise RequestError(str(error)) from None
    for name, option in declared.items():
        if option.default is None and name not in values:
            raise RequestError(f"option {name!r} is missing: {option.doc}")
    return cls(**values)


def spell(options: Any) -> tuple[tuple[str, str], ...]:
    """The names and texts of those that are not as by default: what `read` makes the same options of."""
    kind: type[Any] = type(options)
    declared = options_of(kind)
    values = {name: getattr(options, name) for name in declared}
    return tuple((name, declared[name].spell(value)) for name, value in values.items()
                 if value != declared[name].default)  # fmt: skip
