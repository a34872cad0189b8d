"""Who stands on a snapshot: the differences in its folder whose BASE names its file and its identity.

Looked up before a file is replaced, so it costs little: headers are read, up to BASE, and nothing else is checked. Of a
folder with more than MAX_FILES files only so many are looked at.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snapshot import canon
from snapshot.container import (
    BASE,
    CHUNK_HEADER,
    END_PAYLOAD,
    FILE_HEADER,
    MAGIC,
    MAX_CHUNKS,
    MAX_JSON,
    PART,
    Chunk,
    Parent,
)
from snapshot.errors import SnapshotError

MAX_FILES = 4096
_MAX_BASE = 4096  # bytes; a Parent has less than 400


def is_snapshot(path: Path) -> bool:
    """Whether the regular file at `path` begins as a snapshot does; an empty one does not. Raises OSError."""
    with _opened(path) as fd:
        return fd is not None and os.pread(fd, len(MAGIC), 0) == MAGIC


def standing_on(path: Path) -> list[str]:
    """The names, in order, of the files that are differences to the snapshot at `path`. Raises OSError."""
    with _opened(path) as fd:
        if fd is None or (size := os.fstat(fd).st_size) < END_PAYLOAD.size:
            return []
        end = os.pread(fd, END_PAYLOAD.size, size - END_PAYLOAD.size)
    wanted = Parent(END_PAYLOAD.unpack(end)[2], path.name)
    found = []
    with os.scandir(path.parent) as entries:
        for entry, _ in zip(entries, range(MAX_FILES), strict=False):
            with contextlib.suppress(OSError, SnapshotError):  # what cannot be read cannot be woken either
                if entry.name != path.name and _parent(Path(entry.path)) == wanted:
                    found.append(entry.name)
    return sorted(found)


def _parent(path: Path) -> Parent | None:
    """The parent that the file at `path` names, when it is a snapshot that names one. Raises OSError, SnapshotError."""
    with _opened(path) as fd:
        if fd is None or os.pread(fd, len(MAGIC), 0) != MAGIC:
            return None
        at = FILE_HEADER.size
        for _ in range(MAX_CHUNKS):
            if len(header := os.pread(fd, CHUNK_HEADER.size, at)) < CHUNK_HEADER.size:
                return None
            chunk = Chunk.unpack(at, header)
            if chunk.kind == BASE:
                return Parent.from_json(canon.decode(os.pread(fd, min(chunk.length, _MAX_BASE), chunk.payload)))
            if chunk.kind != PART or chunk.length > MAX_JSON:
                return None
            at = chunk.next
    return None


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A descriptor of the regular file at `path`; None for anything else there, which is not opened if it can be told
    before. Raises OSError."""
    if not stat.S_ISREG(path.lstat().st_mode):
        yield None
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)
