"""The fields of a state, one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from snapshot import field_types as types
from snapshot import schema


def paths(cls: type, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field, those of nested states one by one."""
    for field in schema.schema_of(cls).fields:
        match field.type:
            case schema.StructType(inner) | types.ListType(schema.StructType(inner)):
                yield from paths(inner, (*before, field.name))
            case _:
                yield (*before, field.name)


def forget(cls: type, path: tuple[str, ...]) -> Callable[[Any], Any]:
    """Set the field to what a fresh device has there."""

    def spoil(state: Any) -> Any:
        return _put(state, path, cls())

    return spoil


def _put(state: Any, path: tuple[str, ...], fresh: Any) -> Any:
    name, *rest = path
    mine, default = getattr(state, name), getattr(fresh, name)
    if rest and isinstance(mine, tuple):
        default = tuple(_put(item, tuple(rest), like) for item, like in zip(mine, default, strict=True))
    elif rest:
        default = _put(mine, tuple(rest), default)
    return dataclasses.replace(state, **{name: default})
