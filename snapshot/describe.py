"""The types a schema in a file describes: for checking and showing the state of a device this program does not know.

The inverse of `Type.describe()`. A description that is none is SnapshotError.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from snapshot.errors import SnapshotError
from snapshot.field_types import BoolType, BytesType, IntType, Json, ListType, OptionalType, TextType, Type, WordType

_MAX_DEPTH = 32
_MAX_BITS = 64


@dataclass(frozen=True)
class RecordType(Type):
    """Named fields: a state, or a struct within one. Values are JSON-shaped."""

    fields: dict[str, Type]

    def decode(self, value: Json, path: str) -> Json:
        if not isinstance(value, dict) or value.keys() != self.fields.keys():
            raise SnapshotError(f"{path}: not an object of exactly the fields of the schema")
        for name, kind in self.fields.items():
            kind.decode(value[name], f"{path}.{name}")
        return value


def record(fields: Json, depth: int = 0) -> RecordType:
    """The type of a list of field descriptions."""
    if not isinstance(fields, list):
        raise SnapshotError("schema fields are not a list")
    found: dict[str, Type] = {}
    for field in fields:
        if not isinstance(field, dict) or field.keys() != {"name", "type", "doc"}:
            raise SnapshotError("schema field is not an object of exactly name, type and doc")
        name = field["name"]
        if not isinstance(name, str) or not isinstance(field["doc"], str):
            raise SnapshotError("schema field name and doc are not text")
        if name in found:
            raise SnapshotError("schema names a field twice")
        found[name] = described(field["type"], depth + 1)
    return RecordType(found)


def described(value: Json, depth: int = 0) -> Type:
    """The type of a description: "u7", {"bytes": 4}, {"list": ..., "count": 3}, ..."""
    if depth > _MAX_DEPTH:
        raise SnapshotError("schema types nest too deep")
    match value:
        case "bool":
            return BoolType()
        case "i64":
            return IntType(-(1 << 63), (1 << 63) - 1, value)
        case str() if (bits := re.fullmatch(r"u([1-9][0-9]?)", value)) and int(bits[1]) <= _MAX_BITS:
            return IntType(0, (1 << int(bits[1])) - 1, value)
        case {"range": [low, high], **rest} if not rest and _is_int(low) and _is_int(high) and low <= high:  # type: ignore[operator]
            return IntType(low, high, value)  # type: ignore[arg-type]
        case {"one_of": [*words], **rest} if not rest and all(isinstance(word, str) for word in words):
            return WordType(tuple(words))  # type: ignore[arg-type]
        case {"text_max": most, **rest} if not rest and _is_size(most):
            return TextType(most)  # type: ignore[arg-type]
        case {"bytes": size, **rest} if not rest and _is_size(size):
            return BytesType(size, size)  # type: ignore[arg-type]
        case {"bytes_max": most, **rest} if not rest and _is_size(most):
            return BytesType(0, most)  # type: ignore[arg-type]
        case {"list": item, "count": count, **rest} if not rest and _is_size(count):
            return ListType(described(item, depth + 1), count, count)  # type: ignore[arg-type]
        case {"list": item, "max": most, **rest} if not rest and _is_size(most):
            return ListType(described(item, depth + 1), 0, most)  # type: ignore[arg-type]
        case {"optional": item, **rest} if not rest:
            return OptionalType(described(item, depth + 1))
        case {"struct": fields, **rest} if not rest:
            return record(fields, depth)
    raise SnapshotError(f"schema has an unknown type {json.dumps(value)[:80]}")


def parse(kind: Type, text: str, path: str) -> Json:
    """A value as a person writes it: 0x83, true, a word, hex bytes; lists and structs as JSON. Raises SnapshotError."""
    value: Json = text
    if isinstance(kind, OptionalType):
        if text == "null":
            return None
        return parse(kind.item, text, path)
    try:
        if isinstance(kind, IntType):
            value = int(text, 0)
        elif isinstance(kind, BoolType | ListType | RecordType):
            value = json.loads(text)
    except (ValueError, RecursionError):
        raise SnapshotError(f"{path}: {text!r} is not a value of its type") from None
    kind.decode(value, path)
    return value


def _is_int(value: Json) -> bool:
    return type(value) is int


def _is_size(value: Json) -> bool:
    return type(value) is int and value >= 0
