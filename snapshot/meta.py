"""What a snapshot says of itself to people, read without the rest: for a list of many files."""

from __future__ import annotations

import os
from pathlib import Path

from snapshot import canon
from snapshot.container import CHUNK_HEADER, END, FILE_HEADER, MAX_CHUNKS, MAX_JSON, META, Chunk
from snapshot.errors import SnapshotError
from snapshot.field_types import Json


def peek(path: Path) -> Json:
    """The contents of META, not checked against a digest; None where there is none, or the file is no snapshot. Raises
    OSError when it cannot be opened."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        offset = FILE_HEADER.size
        for _ in range(MAX_CHUNKS):
            chunk = Chunk.unpack(offset, os.pread(fd, CHUNK_HEADER.size, offset).ljust(CHUNK_HEADER.size, b"\0"))
            if chunk.kind == META and chunk.length <= MAX_JSON:
                return canon.decode(os.pread(fd, chunk.length, chunk.payload))
            if chunk.kind == END:
                break
            offset = chunk.next
    except (SnapshotError, OverflowError, OSError):
        pass
    finally:
        os.close(fd)
    return None
