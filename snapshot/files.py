"""Reading a whole file that somebody named: a regular one, of bounded size. What else may lie there never begins, or
has no end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from snapshot.errors import Refused, check_path

MAX_FILE = 1 << 30


def read_file(path: Path) -> bytes:
    """What it holds. Raises Refused for a device, a FIFO, a folder, or more than 1 GiB; OSError."""
    check_path(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO must not hang us
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Refused(errno.EINVAL, "not a regular file", str(path))
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise Refused(errno.EFBIG, f"more than {MAX_FILE >> 20} MiB", str(path))
    return data
