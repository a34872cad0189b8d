"""What differs between two snapshots: state by field name, RAM by runs of pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from snapshot.chain import Chain
from snapshot.container import BLOCK, PAGE
from snapshot.errors import SnapshotError
from snapshot.field_types import Json

_MISSING = "(not there)"


@dataclass(frozen=True)
class FieldDifference:
    part: str
    field: str  # "" when a part is on one side only, or its schema differs
    first: Json
    second: Json


@dataclass(frozen=True)
class RamDifference:
    """Pages [start, end), guest physical, each with a byte that differs; `at` is the first such byte."""

    region: str
    start: int
    end: int
    at: int


def state(first: Chain, second: Chain) -> Iterator[FieldDifference]:
    for name in dict.fromkeys((*first.parts, *second.parts)):
        ours, theirs = first.parts.get(name), second.parts.get(name)
        if ours is None or theirs is None:
            yield FieldDifference(name, "", _MISSING if ours is None else "", _MISSING if theirs is None else "")
            continue
        versions = [f"{part.schema['name']} version {part.schema['version']}" for part in (ours, theirs)]
        if versions[0] != versions[1]:
            yield FieldDifference(name, "", *versions)
        before, after = dict(_leaves(ours.state, "")), dict(_leaves(theirs.state, ""))
        for field in dict.fromkeys((*before, *after)):
            if before.get(field, _MISSING) != after.get(field, _MISSING):
                yield FieldDifference(name, field, before.get(field, _MISSING), after.get(field, _MISSING))


def ram(first: Chain, second: Chain) -> Iterator[RamDifference]:
    """Raises SnapshotError when the two are laid out otherwise."""
    if [(r.base, r.size) for r in first.rams] != [(r.base, r.size) for r in second.rams]:
        raise SnapshotError("the two have RAM of other sizes: it cannot be compared")
    for index, image in enumerate(first.rams):
        run: RamDifference | None = None
        for start, at in _pages(first, second, index):
            start, at = image.base + start, image.base + at
            if run is not None and run.end == start:
                run = RamDifference(image.name, run.start, start + PAGE, run.at)
                continue
            if run is not None:
                yield run
            run = RamDifference(image.name, start, start + PAGE, at)
        if run is not None:
            yield run


def _pages(first: Chain, second: Chain, index: int) -> Iterator[tuple[int, int]]:
    """(start, first byte that differs) of each page that does, as offsets in the region."""
    ours, theirs = first.digests(index), second.digests(index)
    for number in sorted(ours.keys() | theirs.keys()):
        if ours.get(number) == theirs.get(number):
            continue
        a, b = first.block(index, number), second.block(index, number)
        for page in range(0, len(a), PAGE):
            x, y = a[page : page + PAGE], b[page : page + PAGE]
            if x != y:
                differs = next(i for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q)
                yield number * BLOCK + page, number * BLOCK + page + differs


def _leaves(value: Json, path: str) -> Iterator[tuple[str, Json]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, value
