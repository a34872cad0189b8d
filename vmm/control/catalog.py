"""The snapshots of named machines: a folder a machine, and in it files that say themselves what they are.

    STATE/NAME/20261123T161555.snapshot    $XDG_STATE_HOME/anyhyve, by default ~/.local/state/anyhyve

There is no index that could disagree with the files: a snapshot's time is its file's, its parent is written in it, and
one that is kept is read-only. Deleting never leaves a difference without what it stands on.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot.errors import SnapshotError
from snapshot.reader import Reader
from vmm.control.lifecycle import check_name
from vmm.errors import BackendError, RequestError

SUFFIX = ".snapshot"
AUTOSAVED = f"autosave{SUFFIX}"
SUSPENDED = f"suspended{SUFFIX}"
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


@dataclass(frozen=True)
class Entry:
    """What the catalog tells of one snapshot."""

    machine: str
    path: Path
    time_s: float  # Unix
    size_bytes: int  # on disk
    parent: str | None  # the file it is a difference to, in the same folder
    kept: bool
    problem: str | None  # why it cannot be read

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


def entries(name: str | None = None) -> list[Entry]:
    """Every snapshot in the catalog, or those of one machine, oldest first. Raises RequestError for what cannot name a
    machine."""
    pattern = check_name(name) if name is not None else "*"
    return sorted((entry(path) for path in root().glob(f"{pattern}/*{SUFFIX}")), key=lambda e: (e.time_s, e.path))


def entry(path: Path) -> Entry:
    """What a snapshot's file tells without its RAM being read; one that cannot be read has a `problem`. Raises
    OSError when there is no such file."""
    info = path.stat()
    parent, problem = None, None
    try:
        with Reader(path) as reader:
            parent = None if reader.parent is None else reader.parent.file
    except (SnapshotError, OSError) as error:
        problem = str(error)
    kept = not info.st_mode & _WRITE
    return Entry(path.parent.name, path, info.st_mtime, info.st_blocks * 512, parent, kept, problem)


def newest(name: str) -> Path:
    """The path of the machine's youngest snapshot that can be read. Raises RequestError when there is none."""
    found = [each for each in entries(name) if each.problem is None]
    if not found:
        raise RequestError(f"there is no snapshot of {name} in {root()}")
    return found[-1].path


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
    staying: set[Path] = set()
    for each in [*found[max(0, len(found) - leave) :], *(e for e in found if e.kept)]:
        staying.update(_with_ancestors(each.path))
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
