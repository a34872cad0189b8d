"""Declared state: one dataclass drives save, load, validation, the printed schema and the generated tests.

A state is a plain value: a dataclass whose fields carry exact widths. Nothing here knows a device or a CPU.

    @state("rtc.mc146818", version=1)
    class RtcState:
        index: Annotated[u7, "CMOS address latch"] = 0

Rules
* Field types are the aliases below, `bool`, another @state class, `tuple[T, ...]` with Size or MaxSize,
  `bytes` with Size or MaxSize, and `T | None`.
* `encode` and `decode` are inverse; unknown, missing or out-of-range fields are SnapshotError.
* A released version is frozen. A change is a new version and an @upgrade from the old one.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from snapshot.errors import SnapshotError

Json = None | bool | int | str | list["Json"] | dict[str, "Json"]


@dataclasses.dataclass(frozen=True)
class Bits:
    """An unsigned integer of `width` bits."""

    width: int


@dataclasses.dataclass(frozen=True)
class Range:
    """An integer between `low` and `high`, both included."""

    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Size:
    """Exactly `count` bytes, or `count` elements of a tuple."""

    count: int


@dataclasses.dataclass(frozen=True)
class MaxSize:
    """At most `count` bytes, elements or characters."""

    count: int


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of a closed set of words."""

    words: tuple[str, ...]


u2 = Annotated[int, Bits(2)]
u3 = Annotated[int, Bits(3)]
u4 = Annotated[int, Bits(4)]
u5 = Annotated[int, Bits(5)]
u6 = Annotated[int, Bits(6)]
u7 = Annotated[int, Bits(7)]
u8 = Annotated[int, Bits(8)]
u16 = Annotated[int, Bits(16)]
u32 = Annotated[int, Bits(32)]
u56 = Annotated[int, Bits(56)]
u64 = Annotated[int, Bits(64)]
i64 = Annotated[int, Range(-(2**63), 2**63 - 1)]


class Type:
    """One field type: how it is checked, encoded, decoded and described. Values are JSON-shaped after encode."""

    def encode(self, value: Any, path: str) -> Json:
        raise NotImplementedError

    def decode(self, value: Json, path: str) -> Any:
        raise NotImplementedError

    def describe(self) -> Json:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class IntType(Type):
    low: int
    high: int
    word: Json  # how the schema names it: "u7", "i64" or {"range": [low, high]}

    def encode(self, value: Any, path: str) -> Json:
        if type(value) is not int or not self.low <= value <= self.high:
            raise SnapshotError(f"{path}: {value!r} is not an integer in {self.low}..{self.high}")
        return value

    decode = encode

    def describe(self) -> Json:
        return self.word


@dataclasses.dataclass(frozen=True)
class BoolType(Type):
    def encode(self, value: Any, path: str) -> Json:
        if type(value) is not bool:
            raise SnapshotError(f"{path}: {value!r} is not true or false")
        return value

    decode = encode

    def describe(self) -> Json:
        return "bool"


@dataclasses.dataclass(frozen=True)
class WordType(Type):
    words: tuple[str, ...]

    def encode(self, value: Any, path: str) -> Json:
        if value not in self.words or type(value) is not str:
            raise SnapshotError(f"{path}: {value!r} is not one of {', '.join(self.words)}")
        return value

    decode = encode

    def describe(self) -> Json:
        return {"one_of": list(self.words)}


@dataclasses.dataclass(frozen=True)
class TextType(Type):
    most: int

    def encode(self, value: Any, path: str) -> Json:
        if type(value) is not str or len(value) > self.most or not (value.isascii() and value.isprintable()):
            raise SnapshotError(f"{path}: not printable ASCII text of at most {self.most} characters")
        return value

    decode = encode

    def describe(self) -> Json:
        return {"text_max": self.most}


@dataclasses.dataclass(frozen=True)
class BytesType(Type):
    least: int
    most: int

    def encode(self, value: Any, path: str) -> Json:
        if not isinstance(value, bytes) or not self.least <= len(value) <= self.most:
            raise SnapshotError(f"{path}: not bytes of length {self.least}..{self.most}")
        return value.hex()

    def decode(self, value: Json, path: str) -> bytes:
        if type(value) is not str or not 2 * self.least <= len(value) <= 2 * self.most:
            raise SnapshotError(f"{path}: not hex text for {self.least}..{self.most} bytes")
        try:
            data = bytes.fromhex(value)
        except ValueError:
            raise SnapshotError(f"{path}: not hex text") from None
        if data.hex() != value:
            raise SnapshotError(f"{path}: hex text is not canonical (lower case, no spaces)")
        return data

    def describe(self) -> Json:
        return {"bytes": self.most} if self.least == self.most else {"bytes_max": self.most}


@dataclasses.dataclass(frozen=True)
class ListType(Type):
    item: Type
    least: int
    most: int

    def encode(self, value: Any, path: str) -> Json:
        if not isinstance(value, tuple) or not self.least <= len(value) <= self.most:
            raise SnapshotError(f"{path}: not a list of {self.least}..{self.most} elements")
        return [self.item.encode(v, f"{path}[{i}]") for i, v in enumerate(value)]

    def decode(self, value: Json, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            raise SnapshotError(f"{path}: not a list of {self.least}..{self.most} elements")
        return tuple(self.item.decode(v, f"{path}[{i}]") for i, v in enumerate(value))

    def describe(self) -> Json:
        size = {"count": self.most} if self.least == self.most else {"max": self.most}
        return {"list": self.item.describe(), **size}


@dataclasses.dataclass(frozen=True)
class OptionalType(Type):
    item: Type

    def encode(self, value: Any, path: str) -> Json:
        return None if value is None else self.item.encode(value, path)

    def decode(self, value: Json, path: str) -> Any:
        return None if value is None else self.item.decode(value, path)

    def describe(self) -> Json:
        return {"optional": self.item.describe()}


@dataclasses.dataclass(frozen=True)
class StructType(Type):
    cls: type

    def encode(self, value: Any, path: str) -> Json:
        if type(value) is not self.cls:
            raise SnapshotError(f"{path}: not a {self.cls.__name__}")
        return {f.name: f.type.encode(getattr(value, f.name), f"{path}.{f.name}") for f in schema_of(self.cls).fields}

    def decode(self, value: Json, path: str) -> Any:
        if not isinstance(value, dict):
            raise SnapshotError(f"{path}: not an object")
        fields = schema_of(self.cls).fields
        names = {f.name for f in fields}
        if missing := sorted(names - value.keys()):
            raise SnapshotError(f"{path}.{missing[0]}: missing")
        if unknown := sorted(value.keys() - names):
            raise SnapshotError(f"{path}.{unknown[0]}: unknown field")
        return self.cls(**{f.name: f.type.decode(value[f.name], f"{path}.{f.name}") for f in fields})

    def describe(self) -> Json:
        return {"struct": schema_of(self.cls).describe_fields()}


@dataclasses.dataclass(frozen=True)
class Field:
    name: str
    type: Type
    doc: str


@dataclasses.dataclass(frozen=True)
class Schema:
    """What the file says about one state: `name`, `version`, a doc line and the fields in order."""

    name: str
    version: int
    doc: str
    fields: tuple[Field, ...]

    def describe_fields(self) -> list[Json]:
        return [{"name": f.name, "type": f.type.describe(), "doc": f.doc} for f in self.fields]

    def describe(self) -> dict[str, Json]:
        return {"name": self.name, "version": self.version, "doc": self.doc, "fields": self.describe_fields()}


_SCHEMAS: dict[type, Schema] = {}
_BY_NAME: dict[tuple[str, int], type] = {}
_UPGRADES: dict[type, Callable[[Any], Any]] = {}
_RENAMED: dict[str, str] = {}
_DOWNGRADES: dict[type, Callable[[Any], Any]] = {}

C = TypeVar("C", bound=type)


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def state(name: str, version: int) -> Callable[[C], C]:
    """Declare a state: the class becomes a slotted, keyword-only dataclass with a checked schema."""

    def declare(cls: C) -> C:
        new: Any = dataclasses.dataclass(kw_only=True, slots=True)(cls)
        hints = get_type_hints(new, include_extras=True)
        fields = []
        for field in dataclasses.fields(new):
            kind, doc = _type_of(hints[field.name], f"{cls.__name__}.{field.name}")
            fields.append(Field(field.name, kind, doc))
        doc = (cls.__doc__ or "").strip().split("\n")[0]
        if doc.startswith(cls.__name__ + "("):
            doc = ""  # dataclasses' own signature line
        if (name, version) in _BY_NAME:
            raise TypeError(f"state {name} version {version} is declared twice")
        _SCHEMAS[new] = Schema(name, version, doc, tuple(fields))
        _BY_NAME[name, version] = new
        return new  # type: ignore[no-any-return]

    return declare


U = TypeVar("U", bound=Callable[[Any], Any])


def upgrade(function: U) -> U:
    """Register `function(old: StateV1) -> StateV2`, found by its annotation, as the way to the next version."""
    source, target = _step(function)
    old, new = _SCHEMAS[source], _SCHEMAS[target]
    if source in _UPGRADES or old.name != new.name or old.version >= new.version:  # so a chain of upgrades ends
        raise TypeError(f"{function.__name__}: not the one upgrade from an older version of {new.name}")
    _UPGRADES[source] = function
    return function


def downgrade(function: U) -> U:
    """Register `function(new: StateV2) -> StateV1` as the way back, for writing what an older release reads. It raises
    SnapshotError, naming the field, for what the older version cannot say."""
    source, target = _step(function)
    new, old = _SCHEMAS[source], _SCHEMAS[target]
    if source in _DOWNGRADES or old.name != new.name or old.version >= new.version:
        raise TypeError(f"{function.__name__}: not the one downgrade from a newer version of {old.name}")
    _DOWNGRADES[source] = function
    return function


def renamed(old: str, new: str) -> None:
    """Declare that the state `new` was called `old`: snapshots that say `old` are read as it, versions and all."""
    if old in {name for name, _ in _BY_NAME} or old in _RENAMED:
        raise TypeError(f"{old}: it is a state of its own, or was renamed before")
    _RENAMED[old] = new


def renames() -> dict[str, str]:
    """New name by old name."""
    return dict(_RENAMED)


def _step(function: Callable[[Any], Any]) -> tuple[type, type]:
    hints = get_type_hints(function)
    target = hints.pop("return")
    (source,) = hints.values()
    if source not in _SCHEMAS or target not in _SCHEMAS:
        raise TypeError(f"{function.__name__}: not from a declared state to another")
    return source, target


def upgrades() -> list[tuple[str, int, int]]:
    """(name, from, to) of each registered upgrade."""
    return _steps(_UPGRADES)


def downgrades() -> list[tuple[str, int, int]]:
    """(name, from, to) of each registered downgrade."""
    return _steps(_DOWNGRADES)


def _steps(functions: Mapping[type, Callable[[Any], Any]]) -> list[tuple[str, int, int]]:
    pairs = [(_SCHEMAS[source], _SCHEMAS[_step(function)[1]]) for source, function in functions.items()]
    return sorted((old.name, old.version, new.version) for old, new in pairs)


def lower(value: Any, version: int) -> Any:
    """`value` as a state of an older `version` of its name. Raises SnapshotError when no way leads there."""
    name = schema_of(type(value)).name
    while (found := schema_of(type(value)).version) > version:
        step = _DOWNGRADES.get(type(value))
        if step is None:
            raise SnapshotError(f"{name}: no downgrade from version {found} to version {version}")
        value = step(value)
        StructType(type(value)).encode(value, name)
    if found != version:
        raise SnapshotError(f"{name}: version {version} is not among those a downgrade leads to")
    return value


def without_docs(value: Json) -> Json:
    """A schema, or a part of one, without its doc lines: what a released version promises."""
    if isinstance(value, dict):
        return {key: without_docs(item) for key, item in value.items() if key != "doc"}
    return [without_docs(item) for item in value] if isinstance(value, list) else value


def type_of(hint: Any, where: str) -> Type:
    """The type a hint declares, as for a field. Raises TypeError, naming `where`."""
    return _type_of(hint, where)[0]


def _type_of(hint: Any, where: str) -> tuple[Type, str]:
    doc = ""
    marks: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        doc = next((e for e in extras if isinstance(e, str)), "")
        marks = tuple(e for e in extras if not isinstance(e, str))
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"{where}: only T | None may be a union")
        return OptionalType(_type_of(Annotated[(inner[0], *marks)] if marks else inner[0], where)[0]), doc
    size = next((m for m in marks if isinstance(m, (Size, MaxSize))), None)
    least, most = (size.count if isinstance(size, Size) else 0, size.count) if size else (0, 0)
    if hint is bool:
        return BoolType(), doc
    if hint is int:
        for mark in marks:
            if isinstance(mark, Bits):
                return IntType(0, (1 << mark.width) - 1, f"u{mark.width}"), doc
            if isinstance(mark, Range):
                word: Json = "i64" if mark == Range(-(2**63), 2**63 - 1) else {"range": [mark.low, mark.high]}
                return IntType(mark.low, mark.high, word), doc
    if hint is str:
        for mark in marks:
            if isinstance(mark, OneOf):
                return WordType(mark.words), doc
            if isinstance(mark, MaxSize):
                return TextType(mark.count), doc
    if hint is bytes and size:
        return BytesType(least, most), doc
    if origin is tuple and size and get_args(hint)[1:] == (...,):
        return ListType(_type_of(get_args(hint)[0], where)[0], least, most), doc
    if isinstance(hint, type) and hint in _SCHEMAS:
        return StructType(hint), doc
    raise TypeError(f"{where}: {hint!r} has no exact width")


def schema_of(cls: type) -> Schema:
    """The schema of a @state class."""
    return _SCHEMAS[cls]


def declared() -> dict[tuple[str, int], type]:
    """Every declared state by (name, version)."""
    return dict(_BY_NAME)


def find(name: str, version: int) -> type | None:
    """The state of this name and version, or of the name it has now."""
    return _BY_NAME.get((_RENAMED.get(name, name), version))


def encode(value: Any) -> dict[str, Json]:
    """`value` as JSON-shaped data. Raises SnapshotError naming the field that does not fit its own schema."""
    cls = type(value)
    encoded = StructType(cls).encode(value, schema_of(cls).name)
    assert isinstance(encoded, dict)
    return encoded


def decode(name: str, version: int, data: Mapping[str, Json], want: type) -> Any:
    """The state `want` from `data` written as `name` version `version`, upgraded step by step where it is older."""
    cls = find(name, version)
    target = schema_of(want)
    if _RENAMED.get(name, name) != target.name:
        raise SnapshotError(f"{name}: expected a {target.name}")
    if cls is None or version > target.version:
        raise SnapshotError(f"{name}: version {version} is not known here (this program has {target.version})")
    value = StructType(cls).decode(dict(data), name)
    while type(value) is not want:
        step = _UPGRADES.get(type(value))
        if step is None:
            raise SnapshotError(f"{name}: no upgrade from version {schema_of(type(value)).version}")
        value = step(value)
        StructType(type(value)).encode(value, name)  # an upgrade too gives only what its schema allows
    return value
