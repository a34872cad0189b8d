"""What goes wrong with snapshots, and whose fault it is; the host's is OSError."""

import errno
import os
from pathlib import Path


class SnapshotError(Exception):
    """The file is at fault: damaged, hostile, foreign, or not for this machine. The message is one line."""


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
