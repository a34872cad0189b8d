"""The snapshots of named machines: a folder a machine, and in it files that say themselves what they are.

    STATE/NAME/20261123T161555.snapshot    $XDG_STATE_HOME/anyhyve, by default ~/.local/state/anyhyve

There is no index that could disagree with the files: which was saved after which is written in them, as is a parent,
and one that is kept is read-only. Deleting never leaves a difference without what it stands on, nor does a save.

The order is the machine's own, and no clock of this computer is asked: META has a `sequence`, one more with each save
of a machine of that name. Files without, of older releases or of `run --save`, come before those with it, by guest
time.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from snapshot import target
from snapshot.errors import Refused, SnapshotError
from snapshot.field_types import Json
from snapshot.meta import peek
from snapshot.reader import Reader, decode_part
from vmm.board.config import MachineConfig
from vmm.clock import ClockState, GuestClock
from vmm.control.client import Failed
from vmm.control.lifecycle import check_name
from vmm.errors import BackendError, RequestError
from vmm.saving.parts import with_state

SUFFIX = ".snapshot"
AUTOSAVED = f"autosave{SUFFIX}"
SUSPENDED = f"suspended{SUFFIX}"
T = TypeVar("T")
_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def root() -> Path:
    """The catalog: a folder that has one folder for each machine. It need not be there."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base, "anyhyve")


def folder(name: str) -> Path:
    """The folder of one machine's snapshots, made when it is not there. Raises RequestError for what cannot name a
    machine, BackendError when the host does not let us make it."""
    path = root() / check_name(name)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(f"{path}: {error.strerror}") from None
    return path


def new(name: str) -> Path:
    """A path in the machine's folder for a snapshot of this moment; there is no file yet. Raises as `folder`."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    path, count = folder(name) / f"{stamp}{SUFFIX}", 1
    while path.exists():
        path, count = path.with_name(f"{stamp}-{count}{SUFFIX}"), count + 1
    return path


def over(name: str, file: str, save: Callable[[Path], T]) -> T:
    """Save to `file` in the machine's folder, over the one before. What is to stay there, since it is kept or another
    stands on it, costs no save: that then goes beside it, to FILE-1 and so on. Returns what `save` returns, raises what
    that does and as `folder`."""
    path = _beside(folder(name) / file)
    while True:
        try:
            return save(path)
        except (RequestError, Failed):
            if (other := _beside(folder(name) / file)) == path:
                raise
            path = other  # it came to stay while it was waited for


def _beside(path: Path) -> Path:
    """The path itself, or the first beside it, that a save may be put at."""
    at, count = path, 0
    with contextlib.suppress(OSError):  # the save will say
        while True:
            try:
                target.refuse(at)
                break
            except Refused:
                count += 1
                at = path.with_stem(f"{path.stem}-{count}")
    return at


@dataclass(frozen=True)
class Entry:
    """What the catalog tells of one snapshot."""

    machine: str
    path: Path
    time_s: float  # Unix, as the file has it: for people, the order is not by it
    size_bytes: int  # on disk
    sequence: int  # which of the saves of a machine of this name it is; 0 where the file does not say
    guest_unix_ns: int  # the guest's wall clock (Unix) when it was saved
    parent: str | None  # the file it is a difference to, in the same folder
    kept: bool
    problem: str | None  # why it cannot be read

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


def entries(name: str | None = None) -> list[Entry]:
    """Every snapshot in the catalog, or those of one machine; each machine's in the order they were saved in. Raises
    RequestError for what cannot name a machine."""
    pattern = check_name(name) if name is not None else "*"
    found = (entry(path) for path in root().glob(f"{pattern}/*{SUFFIX}"))
    return sorted(found, key=lambda e: (e.machine, e.sequence, e.guest_unix_ns, e.path))


def entry(path: Path) -> Entry:
    """What a snapshot's file tells without its RAM being read; one that cannot be read has a `problem`. Raises
    OSError when there is no such file."""
    info = path.stat()
    parent, problem, sequence, guest_unix_ns = None, None, 0, 0
    try:
        with Reader(path) as reader:
            parent = None if reader.parent is None else reader.parent.file
            sequence, guest_unix_ns = _sequence(reader.meta), _guest_unix_ns(reader)
    except (SnapshotError, OSError) as error:
        problem = str(error)
    kept, size = not info.st_mode & _WRITE, info.st_blocks * 512
    return Entry(path.parent.name, path, info.st_mtime, size, sequence, guest_unix_ns, parent, kept, problem)


def last_sequence(name: str) -> int:
    """The highest sequence of the machine's snapshots; 0 where there is none. Raises RequestError for what cannot name
    a machine."""
    highest = 0
    for path in (root() / check_name(name)).glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            highest = max(highest, _sequence(peek(path)))
    return highest


def _sequence(meta: Json) -> int:
    found = meta.get("sequence") if isinstance(meta, dict) else None
    if not isinstance(found, int) or isinstance(found, bool):
        return 0
    return int(found) if 0 < found < 1 << 62 else 0


def _guest_unix_ns(reader: Reader) -> int:
    """The guest's wall clock; 0 where it is a machine we do not know."""
    try:
        config: MachineConfig = decode_part(next(with_state(reader.parts, MachineConfig)), MachineConfig)
        clock = GuestClock(config.tsc_khz)
        clock.load(decode_part(next(with_state(reader.parts, ClockState)), ClockState))
    except (StopIteration, SnapshotError):
        return 0
    return config.epoch_ns + clock.now_ns()


def newest(name: str) -> Path:
    """The path of the machine's youngest snapshot that can be read. Raises RequestError when there is none."""
    found = [each for each in entries(name) if each.problem is None]
    if not found:
        raise RequestError(f"there is no snapshot of {name} in {root()}")
    return found[-1].path


def clear(name: str) -> None:
    """Remove what saves of the machine left that were killed in the middle. Raises RequestError for what cannot name a
    machine."""
    target.clear(root() / check_name(name))


def keep(path: Path, on: bool = True) -> None:
    """Make a snapshot and all it stands on read-only, which protects them from `prune`, `delete` and being replaced.
    Without `on` make this one writable again. Raises OSError when there is no such file."""
    for each in _with_ancestors(path) if on else [path]:
        mode = stat.S_IMODE(each.stat().st_mode)
        each.chmod(mode & ~_WRITE if on else mode | stat.S_IWUSR)


def delete(path: Path) -> None:
    """Remove a snapshot. Raises RequestError for one that is kept, or that another is a difference to; then it
    stays."""
    found = entry(path)
    if found.kept:
        raise RequestError(f"{path}: it is kept")
    for other in sorted(path.parent.glob(f"*{SUFFIX}")):
        if entry(other).parent == path.name:
            raise RequestError(f"{path}: {other.name} is a difference to it")
    path.unlink()


def prune(name: str, leave: int) -> list[Path]:
    """Delete the machine's snapshots, but not the newest `leave`, those kept, and what these stand on. Returns the
    paths of what was deleted. Raises RequestError for what cannot name a machine."""
    found = entries(name)
    parents = {each.path: each.parent for each in found}
    staying: set[Path] = set()
    for each in [*found[max(0, len(found) - leave) :], *(e for e in found if e.kept)]:
        path: Path | None = each.path
        while path in parents and path not in staying:  # what that stands on stays already
            staying.add(path)
            parent = parents[path]
            path = None if parent is None else path.with_name(parent)
    gone = [each.path for each in found if each.path not in staying]
    for path in gone:
        path.unlink()
    return gone


def _with_ancestors(path: Path) -> Iterable[Path]:
    seen: list[Path] = []
    while path not in seen and path.exists():
        seen.append(path)
        parent = entry(path).parent
        if parent is None:
            break
        path = path.with_name(parent)
    return seen
