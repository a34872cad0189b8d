"""What goes wrong with snapshots, and whose fault it is; the host's is OSError."""

import errno
import os
from pathlib import Path
from typing import Self


class SnapshotError(Exception):
    """The file is at fault: damaged, hostile, foreign, or not for this machine. The message is one line; `file` is
    which, where that is known."""

    file: Path | None = None

    def of(self, file: Path) -> Self:
        """The same, of this file if it is not of another."""
        if self.file is None:
            self.file = Path(file)
        return self


class Refused(OSError):
    """What was asked for is at fault: the path cannot be one, or what lies there is not to be replaced."""


def check_path(path: Path | str) -> None:
    """Raises Refused for what no host can have as a path. (os.open would raise ValueError.)"""
    try:
        if b"\0" not in os.fsencode(path):
            return
    except UnicodeEncodeError:
        pass
    raise Refused(errno.EINVAL, "that cannot be a path", ascii(str(path)))
