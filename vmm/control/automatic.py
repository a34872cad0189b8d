"""Saves nobody asks for at the time: every N seconds, and when this process is told to end (SIGTERM, SIGHUP)."""

from __future__ import annotations

import queue
import signal
import threading
import time
from functools import partial
from types import FrameType, TracebackType
from typing import Self

from snapshot.errors import SnapshotError
from vmm.control import catalog
from vmm.control.supervisor import Supervisor, WrongState
from vmm.errors import BackendError, Cancelled, GuestError, RequestError
from vmm.host import threads
from vmm.machine.machine import Stopped, StopReason

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Automatic:
    """Context manager, on the main thread, around `Supervisor.run`. A signal ends the machine; one that is ignored
    (nohup) stays so. Saves one with a `name` into the catalog: every `autosave_s` seconds, each over the one before;
    with `suspend` a signal saves there and ends the machine, which runs on when that fails, and says so."""

    def __init__(
        self, vm: Supervisor, name: str | None, *, autosave_s: float | None = None, suspend: bool = False
    ) -> None:
        self._vm = vm
        self._name = name
        self._every_s = autosave_s
        self._suspend = suspend
        self._thread: threading.Thread | None = None
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()  # to suspend; else there is no more

    def __enter__(self) -> Self:
        """Raises BackendError when the host has no thread for it, or no folder."""
        if self._name is not None and (self._suspend or self._every_s is not None):
            catalog.folder(self._name)
            # A thread that is there before it is needed: when a signal comes there may be none to be had.
            self._thread = threads.start("automatic", partial(self._run, self._name))
        ours = (number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)
        self._kept = {number: signal.signal(number, self._signalled) for number in ours}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is not None:
            self._asked.put(False)
            self._thread.join()
        for number, kept in self._kept.items():
            signal.signal(number, kept)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        # It may have come in the middle of anything: a handler only posts.
        if self._thread is None or not self._suspend:
            signal.signal(number, signal.SIG_DFL)  # a second one ends a machine that comes to no safe point
            self._vm.machine.post(lambda _: Stopped(StopReason(signal.Signals(number).name)))
        else:
            self._asked.put(True)

    def _run(self, name: str) -> None:
        every_s = self._every_s
        due_s = time.monotonic() + (every_s or 0)
        while True:
            try:
                asked = self._asked.get(timeout=every_s and max(0.0, due_s - time.monotonic()))
            except queue.Empty:
                due_s = time.monotonic() + (every_s or 0)
                self._save(name, catalog.AUTOSAVED, end=False)
                continue
            if not asked:
                return
            self._save(name, catalog.SUSPENDED, end=True)

    def _save(self, name: str, file: str, end: bool) -> None:
        try:
            catalog.over(name, file, lambda path: self._vm.save(path, end=end).result())
        except WrongState as error:
            # The save under way will do; and a machine that has ended has said why.
            if end and self._vm.alive:
                self._vm.tell("warning", text=f"not suspended: {error}")
        except (SnapshotError, BackendError, GuestError, RequestError, Cancelled) as error:
            what = "not suspended, the machine runs on" if end else "not saved"
            self._vm.tell("warning", text=f"{what}: {error}")
        except Exception as error:  # our own fault; the next one may succeed
            self._vm.tell("warning", text=f"not saved: {type(error).__name__}: {error}")
