"""Saves nobody asks for at the time: every N seconds, and when this process is told to end (SIGTERM, SIGHUP)."""

from __future__ import annotations

import queue
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from snapshot.errors import SnapshotError
from vmm.control.supervisor import Supervisor, WrongState
from vmm.errors import BackendError, Cancelled, GuestError, RequestError
from vmm.host import threads
from vmm.machine.machine import Stopped, StopReason

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Automatic:
    """Context manager, on the main thread, around `Supervisor.run`. `autosave` every so many seconds, over one file.
    `suspend_to`: a signal saves there and ends the machine; it runs on when that fails, and says so. Without, a signal
    ends it."""

    def __init__(self, vm: Supervisor, *, autosave: Path | None, every_s: float, suspend_to: Path | None) -> None:
        self._vm = vm
        self._autosave = autosave
        self._every_s = every_s
        self._suspend_to = suspend_to
        self._asked: queue.SimpleQueue[Path | None] = queue.SimpleQueue()  # suspend to it; None: no more

    def __enter__(self) -> Self:
        """Raises BackendError when the host has no thread for it."""
        # A thread that is there before it is needed: when a signal comes there may be none to be had.
        self._thread = threads.start("automatic", self._run)
        self._kept = {number: signal.signal(number, self._signalled) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._asked.put(None)
        self._thread.join()
        for number, kept in self._kept.items():
            signal.signal(number, kept)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        # It may have come in the middle of anything: a handler only posts.
        if self._suspend_to is None:
            signal.signal(number, signal.SIG_DFL)  # a second one ends a machine that comes to no safe point
            self._vm.machine.post(lambda _: Stopped(StopReason(signal.Signals(number).name)))
        else:
            self._asked.put(self._suspend_to)

    def _run(self) -> None:
        every_s = self._every_s if self._autosave is not None else None
        due_s = time.monotonic() + (every_s or 0)
        while True:
            try:
                asked = self._asked.get(timeout=every_s and max(0.0, due_s - time.monotonic()))
            except queue.Empty:
                due_s = time.monotonic() + (every_s or 0)
                assert self._autosave is not None
                self._save(self._autosave, end=False)
                continue
            if asked is None:
                return
            self._save(asked, end=True)

    def _save(self, path: Path, end: bool) -> None:
        try:
            self._vm.save(path, end=end).result()
        except WrongState as error:
            # The save under way will do; and a machine that has ended has said why.
            if end and self._vm.alive:
                self._vm.tell("warning", text=f"not suspended: {error}")
        except (SnapshotError, BackendError, GuestError, RequestError, Cancelled) as error:
            what = "not suspended, the machine runs on" if end else "not saved"
            self._vm.tell("warning", text=f"{what}: {error}")
        except Exception as error:  # our own fault; the next one may succeed
            self._vm.tell("warning", text=f"not saved: {type(error).__name__}: {error}")
