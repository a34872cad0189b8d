"""The standard streams of this process: closed ones, full ones, and ones that nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from vmm.errors import BackendError


class Unwritable(BackendError):
    """Standard output takes nothing."""


def have_all() -> None:
    """Let a stream that is closed be /dev/null: the next file to be opened would get its number. Raises OSError."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", buffering=1)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Context manager around what writes to standard output. Raises Unwritable where that cannot be, BrokenPipeError
    where its reader has gone; no more is tried of it when the process ends."""
    try:
        yield
    except OSError as error:
        _give_up(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise Unwritable(f"standard output: {error.strerror or error}") from None


def write(data: bytes | bytearray) -> None:
    """Write to standard output, at once. Raises Unwritable."""
    try:
        with writing():
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise Unwritable("standard output: its reader has gone") from None


def tell(text: str) -> None:
    """Write to standard error; where nothing can be written there it is not said."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _give_up(sys.stderr)


def _give_up(stream: TextIO) -> None:
    """What is not written yet would be tried again at the end, and be one more error there."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
