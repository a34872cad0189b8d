"""From one version of a state to another: upgrades on reading, downgrades for what an older release reads, renames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from snapshot.errors import SnapshotError
from snapshot.field_types import Json
from snapshot.schema import StructType, declared, schema_of

_UPGRADES: dict[type, Callable[[Any], Any]] = {}
_RENAMED: dict[str, str] = {}
_DOWNGRADES: dict[type, Callable[[Any], Any]] = {}

U = TypeVar("U", bound=Callable[[Any], Any])


def upgrade(function: U) -> U:
    """Register `function(old: StateV1) -> StateV2`, found by its annotation, as the way to the next version."""
    source, target = _step(function)
    old, new = schema_of(source), schema_of(target)
    if source in _UPGRADES or old.name != new.name or old.version >= new.version:  # so a chain of upgrades ends
        raise TypeError(f"{function.__name__}: not the one upgrade from an older version of {new.name}")
    _UPGRADES[source] = function
    return function


def downgrade(function: U) -> U:
    """Register `function(new: StateV2) -> StateV1` as the way back, for writing what an older release reads. It raises
    SnapshotError, naming the field, for what the older version cannot say."""
    source, target = _step(function)
    new, old = schema_of(source), schema_of(target)
    if source in _DOWNGRADES or old.name != new.name or old.version >= new.version:
        raise TypeError(f"{function.__name__}: not the one downgrade from a newer version of {old.name}")
    _DOWNGRADES[source] = function
    return function


def renamed(old: str, new: str) -> None:
    """Declare that the state `new` was called `old`: snapshots that say `old` are read as it, versions and all."""
    if old in {name for name, _ in declared()} or old in _RENAMED:
        raise TypeError(f"{old}: it is a state of its own, or was renamed before")
    _RENAMED[old] = new


def renames() -> dict[str, str]:
    """New name by old name."""
    return dict(_RENAMED)


def _step(function: Callable[[Any], Any]) -> tuple[type, type]:
    hints = get_type_hints(function)
    target = hints.pop("return")
    (source,) = hints.values()
    if not {source, target} <= set(declared().values()):
        raise TypeError(f"{function.__name__}: not from a declared state to another")
    return source, target


def upgrades() -> list[tuple[str, int, int]]:
    """(name, from, to) of each registered upgrade."""
    return _steps(_UPGRADES)


def downgrades() -> list[tuple[str, int, int]]:
    """(name, from, to) of each registered downgrade."""
    return _steps(_DOWNGRADES)


def _steps(functions: Mapping[type, Callable[[Any], Any]]) -> list[tuple[str, int, int]]:
    pairs = [(schema_of(source), schema_of(_step(function)[1])) for source, function in functions.items()]
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


def find(name: str, version: int) -> type | None:
    """The state of this name and version, or of the name it has now."""
    return declared().get((_RENAMED.get(name, name), version))


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
