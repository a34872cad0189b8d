"""Declared state: one dataclass drives save, load, validation, the printed schema and the generated tests.

A state is a plain value: a dataclass whose fields carry exact widths. Nothing here knows a device or a CPU.

    @state("rtc.mc146818", version=1)
    class RtcState:
        index: Annotated[u7, "CMOS address latch"] = 0

Rules
* Field types are the aliases of snapshot.field_types, `bool`, another @state class, `tuple[T, ...]` with Size or
  MaxSize, `bytes` with Size or MaxSize, and `T | None`.
* `encode` and `decode` are inverse; unknown, missing or out-of-range fields are SnapshotError.
* A released version is frozen. A change is a new version and an @upgrade from the old one (snapshot.versions).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from snapshot.errors import SnapshotError
from snapshot.field_types import (
    Bits,
    BoolType,
    BytesType,
    IntType,
    Json,
    ListType,
    MaxSize,
    OneOf,
    OptionalType,
    Range,
    Size,
    TextType,
    Type,
    WordType,
)


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

C = TypeVar("C", bound=type)


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def state(name: str, version: int) -> Callable[[C], C]:
    """Declare a state: the class becomes a slotted, keyword-only dataclass with a checked schema."""

    def declare(cls: C) -> C:
        new: Any = dataclasses.dataclass(kw_only=True, slots=True)(cls)
        hints = get_type_hints(new, include_extras=True)
        fields = []
        for field in dataclasses.fields(new):
            kind, doc = type_and_doc(hints[field.name], f"{cls.__name__}.{field.name}")
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


def without_docs(value: Json) -> Json:
    """A schema, or a part of one, without its doc lines: what a released version promises."""
    if isinstance(value, dict):
        return {key: without_docs(item) for key, item in value.items() if key != "doc"}
    return [without_docs(item) for item in value] if isinstance(value, list) else value


def type_of(hint: Any, where: str) -> Type:
    """The type a hint declares, as for a field. Raises TypeError, naming `where`."""
    return type_and_doc(hint, where)[0]


def type_and_doc(hint: Any, where: str) -> tuple[Type, str]:
    """The same, and what its annotation says of it."""
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
        return OptionalType(type_of(Annotated[(inner[0], *marks)] if marks else inner[0], where)), doc
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
        return ListType(type_of(get_args(hint)[0], where), least, most), doc
    if isinstance(hint, type) and hint in _SCHEMAS:
        return StructType(hint), doc
    raise TypeError(f"{where}: {hint!r} has no exact width")


def schema_of(cls: type) -> Schema:
    """The schema of a @state class."""
    return _SCHEMAS[cls]


def declared() -> dict[tuple[str, int], type]:
    """Every declared state by (name, version)."""
    return dict(_BY_NAME)


def encode(value: Any) -> dict[str, Json]:
    """`value` as JSON-shaped data. Raises SnapshotError naming the field that does not fit its own schema."""
    cls = type(value)
    encoded = StructType(cls).encode(value, schema_of(cls).name)
    assert isinstance(encoded, dict)
    return encoded
