"""What a release promised: its schemas as one JSON value, and what a later one must not do to them.

    {"states": [schema, ...], "upgrades": [[name, from, to], ...], "downgrades": [[name, from, to], ...],
     "renames": {old: new, ...}}

A change of a released version orphans the snapshots it is in; so does a version with no way to the newest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from snapshot.describe import record
from snapshot.errors import SnapshotError
from snapshot.field_types import Json
from snapshot.files import read_file
from snapshot.schema import declared, schema_of, without_docs
from snapshot.versions import downgrades, renames, upgrades

Dump = dict[str, Any]


def dump(prefixes: tuple[str, ...] = ()) -> Dump:
    """The schemas declared in this process; with `prefixes` only of states whose names begin with one."""
    states = [schema_of(cls).describe() for _, cls in sorted(declared().items())]
    kept = [state for state in states if not prefixes or str(state["name"]).startswith(prefixes)]
    names = {state["name"] for state in kept}
    return {
        "states": kept,
        "upgrades": [step for step in upgrades() if step[0] in names],
        "downgrades": [step for step in downgrades() if step[0] in names],
        "renames": {old: new for old, new in renames().items() if new in names},
    }


def load(path: Path) -> Dump:
    """Raises SnapshotError for what is no dump; OSError."""
    try:
        value = json.loads(read_file(path))
        for state in value["states"]:
            record(state["fields"])
            _ = state["name"], state["version"]
        _ = [(name, old, new) for name, old, new in value["upgrades"]]
        _ = dict(value["renames"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SnapshotError(f"{path}: not a dump of schemas ({error})") from None
    return dict(value)


def complaints(old: Dump, new: Dump) -> list[str]:
    """Each change from `old` to `new` that would leave a snapshot of `old` unreadable, in one line."""
    before, after = _by_version(old), _by_version(new)
    newest = {name: max(v for n, v in after if n == name) for name, _ in after}
    found = []
    for (name, version), fields in before.items():
        name = new["renames"].get(name, name)
        if name not in newest:
            found.append(f"{name}: no version of it is left")
        elif (name, version) not in after:
            found.append(f"{name} version {version}: it is gone")
        elif (difference := _difference(fields, after[name, version])) is not None:
            found.append(f"{name} version {version}: {difference}, and the version is still {version}")
        elif not _reaches(new["upgrades"], name, version, newest[name]):
            found.append(f"{name} version {version}: no upgrade leads to version {newest[name]}")
    return found


def versions(release: Dump) -> dict[str, int]:
    """The newest version of each state in a release: what it writes, and the most it reads."""
    newest: dict[str, int] = {}
    for state in release["states"]:
        newest[state["name"]] = max(state["version"], newest.get(state["name"], 0))
    return newest


def _by_version(value: Dump) -> dict[tuple[str, int], Json]:
    return {(s["name"], s["version"]): without_docs(s["fields"]) for s in value["states"]}


def _difference(old: Any, new: Any) -> str | None:
    ours, theirs = {f["name"]: f["type"] for f in old}, {f["name"]: f["type"] for f in new}
    for name in ours:
        if name not in theirs:
            return f"field {name} is gone"
        if ours[name] != theirs[name]:
            return f"field {name} is now {json.dumps(theirs[name])}, was {json.dumps(ours[name])}"
    for name in theirs:
        if name not in ours:
            return f"field {name} is new"
    return None if list(ours) == list(theirs) else "its fields are in another order"


def _reaches(upgrades: list[list[Any]], name: str, version: int, goal: int) -> bool:
    steps = {(step[0], step[1]): step[2] for step in upgrades}
    while version != goal:
        if (name, version) not in steps or steps[name, version] <= version:
            return False
        version = steps[name, version]
    return True
