"""A process that leaves its terminal once it is up."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


def go() -> Callable[[Path], None]:
    """Fork, to be called before there are threads. The parent waits and does not return: it ends with status 0 once the
    child is up, or as the child does. The child, in a session of its own, is given the function that says it is up:
    from then on it has no input, and what it says on standard error goes to a file (which raises OSError when it cannot
    be)."""
    sys.stdout.flush()
    sys.stderr.flush()
    hears, says = os.pipe()
    child = os.fork()
    if child:
        os.close(says)
        up = os.read(hears, 1)
        sys.exit(0 if up else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    os.close(hears)
    os.setsid()

    def up_and_away(log: Path) -> None:
        nothing = os.open(os.devnull, os.O_RDWR)
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        for end, number in ((nothing, 0), (nothing, 1), (words, 2)):
            os.dup2(end, number)
        os.close(nothing)
        os.close(words)
        os.write(says, b"u")
        os.close(says)

    return up_and_away
