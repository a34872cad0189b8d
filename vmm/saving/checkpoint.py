"""A save that hardly stops the machine: a forked copy of this process writes what the machine was at that instant.

    checkpoint = machine.checkpoint(path)    # the pause: CPU and device state, and the fork
    machine.run(...)                         # the kernel copies each page the guest now writes
    checkpoint.wait()

Rules
* The copy touches nothing but its memory, the file and a pipe: every other descriptor is closed in it, so that a client
  or a lock of the machine's is never held open by it.
* It outlives the machine: what was asked for is finished. Signals of the terminal and of a service manager, meant for
  the machine, do not reach it; `cancel()` does.
* Whatever ends it, the file is whole under its name or nothing of it is left. See docs/decisions/0005.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from snapshot.errors import SnapshotError
from snapshot.writer import Writer
from vmm.errors import BackendError, Cancelled, RequestError
from vmm.saving.save import cannot

_TELL_S = 0.1  # progress is told this often
_MAX_FD = 1 << 20
_NOT_FOR_THE_COPY = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

Fill = Callable[[Writer], None]  # writes all of a snapshot but its end


class NoProcess(BackendError):
    """The host has no process to give, or not the memory for it."""


def write(path: Path, fill: Fill, *, force: bool = False) -> None:
    """Write a snapshot while the caller waits. Raises SnapshotError, RequestError for what is not to be replaced,
    BackendError."""
    try:
        with Writer(path, force=force) as writer:
            fill(writer)
            writer.commit()
    except OSError as error:
        raise cannot(path, error) from None


class Checkpoint:
    """A snapshot on its way to disk. One thread must call `wait()`."""

    def __init__(
        self, path: Path, fill: Fill, total_bytes: int, *, force: bool = False, keep: Sequence[int] = ()
    ) -> None:
        """`keep` are descriptors that `fill` needs. Raises RequestError for what is not to be replaced, BackendError
        when the host does not let it begin; then nothing of it is left."""
        self.path = path
        self._cancelled = self._ended = False
        self._lock = threading.Lock()  # over the process: its number is used again once it was waited for
        with contextlib.ExitStack() as undone:
            try:
                self._writer = undone.enter_context(Writer(path, force=force))
                self._told, tell = os.pipe()
            except OSError as error:
                raise cannot(path, error) from None
            undone.callback(os.close, self._told)
            # Blocked meanwhile, so that none of them ends the copy before it ignores them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_THE_COPY)
            try:
                self._pid = _fork()
                if self._pid == 0:
                    _write_and_end(self._writer, fill, _Teller(tell, total_bytes), keep, before)
            except OSError as error:
                raise NoProcess(str(cannot(path, error))) from None
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                os.close(tell)
            undone.pop_all()

    def wait(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Block until the file is in place. `progress` is called with bytes done and in all. Raises SnapshotError,
        RequestError or BackendError when it failed, Cancelled after `cancel()`."""
        last: dict[str, Any] = {}
        with self._writer:
            try:
                with os.fdopen(self._told, "rb") as lines:
                    for line in lines:
                        last = _said(line)
                        if "done" in last:
                            progress(last["done"], last["total"])
            finally:
                with self._lock:
                    _, status = os.waitpid(self._pid, 0)
                    self._ended = True
            try:
                if self._writer.in_place:
                    return
            except OSError as error:
                raise cannot(self.path, error) from None
        if self._cancelled:
            raise Cancelled(f"the save to {self.path} was cancelled")
        match last:
            case {"fault": "file", "why": why}:
                raise SnapshotError(why)
            case {"fault": "host", "why": why}:
                raise BackendError(why)
            case {"fault": "request", "why": why}:
                raise RequestError(why)
            case {"fault": "us", "why": why}:
                raise AssertionError(why)
        raise BackendError(f"cannot save to {self.path}: the process writing it was ended by signal {status & 0x7F}")

    def cancel(self) -> None:
        """From any thread: give it up, if it is not in place yet."""
        self._cancelled = True
        with self._lock:
            if not self._ended:
                os.kill(self._pid, signal.SIGKILL)


class _Teller:
    """The copy's end of the pipe: one JSON object a line."""

    def __init__(self, pipe: int, total_bytes: int) -> None:
        self.pipe = pipe
        self._done, self._total = 0, total_bytes
        self._next = 0.0

    def progress(self, size_bytes: int) -> None:
        self._done = min(self._done + size_bytes, self._total)
        if (now := time.monotonic()) >= self._next:
            self._next = now + _TELL_S
            self.say(done=self._done, total=self._total)

    def say(self, **what: Any) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(self.pipe, json.dumps(what).encode() + b"\n")


def _said(line: bytes) -> dict[str, Any]:
    """What the copy told; nothing, where it was ended in the middle of a line."""
    try:
        said: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return said


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads: see the rules above
        return os.fork()


def _write_and_end(
    writer: Writer, fill: Fill, teller: _Teller, keep: Sequence[int], unblocked: set[int | signal.Signals]
) -> NoReturn:
    """What the forked copy does from its first instruction to its end: write the file, tell how far it is, exit."""
    try:
        for number in _NOT_FOR_THE_COPY:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        gc.disable()  # no finalizer of the machine's may run here
        writer.progress = teller.progress
        try:
            with writer:
                _keep_only(writer.fileno(), teller.pipe, *keep)
                fill(writer)
                writer.commit()
        except SnapshotError as error:
            teller.say(fault="file", why=str(error))
        except BackendError as error:
            teller.say(fault="host", why=str(error))
        except OSError as error:
            fault = cannot(writer.path, error)
            teller.say(fault="request" if isinstance(fault, RequestError) else "host", why=str(fault))
        except MemoryError:
            teller.say(fault="host", why=f"cannot save to {writer.path}: out of memory")
        except BaseException as error:
            teller.say(fault="us", why=f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _keep_only(*kept: int) -> None:
    """Close every other descriptor, first of all: there may be no room for one more. The standard ones lead nowhere."""
    start = 3
    for fd in sorted(kept):
        os.closerange(start, max(start, fd))
        start = max(start, fd + 1)
    os.closerange(start, _MAX_FD)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        if standard not in kept:
            os.dup2(nowhere, standard)
