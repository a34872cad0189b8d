"""Change one field of a part, checked against the schema in the file."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from snapshot.container import Part
from snapshot.describe import RecordType, parse, record
from snapshot.errors import SnapshotError
from snapshot.field_types import ListType, OptionalType, Type


def set_field(parts: Mapping[str, Part], assignment: str) -> Part:
    """The part that `PART.FIELD=VALUE` changes, changed; FIELD may go on with .NAME or [INDEX]. Raises SnapshotError,
    naming the part or field that is not there or what its type refuses."""
    path, equals, text = assignment.partition("=")
    path = path.strip()
    name = next((n for n in sorted(parts, key=len, reverse=True) if path.startswith(n + ".")), None)
    if not equals or name is None:
        raise SnapshotError(f"{assignment!r} is not PART.FIELD=VALUE with one of {', '.join(parts)}")
    part = parts[name]
    state: Any = copy.deepcopy(part.state)
    kind: Type = record(part.schema["fields"])
    holder, key, at = None, None, name
    for step in re.findall(r"[^.\[\]]+", path[len(name) + 1 :]):
        if holder is not None:
            state_here = holder[key]
        else:
            state_here = state
        while isinstance(kind, OptionalType) and state_here is not None:
            kind = kind.item
        at = f"{at}.{step}"
        match kind:
            case RecordType(fields) if step in fields:
                holder, key, kind = state_here, step, fields[step]
            case ListType(item) if step.isdecimal() and int(step) < len(state_here):
                holder, key, kind = state_here, int(step), item
            case _:
                raise SnapshotError(f"{at}: there is no such field")
    if holder is None:
        raise SnapshotError(f"{assignment!r} names no field")
    holder[key] = parse(kind, text.strip(), at)
    return replace(part, state=state)
