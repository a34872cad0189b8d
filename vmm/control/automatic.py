"""Saves nobody asks for at the time: every N seconds, and when this process is told to end (SIGTERM, SIGHUP)."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from snapshot.errors import SnapshotError
from vmm.control.supervisor import Supervisor, WrongState
from vmm.errors import BackendError, GuestError, RequestError
from vmm.machine.machine import Machine, Stop, Stopped, StopReason

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Automatic:
    """Context manager, on the main thread, around `Supervisor.run`. `autosave` every so many seconds, over one file.
    `suspend_to`: a signal saves there and ends the machine; it runs on when that fails. Without, a signal ends it."""

    def __init__(self, vm: Supervisor, *, autosave: Path | None, every_s: float, suspend_to: Path | None) -> None:
        self._vm = vm
        self._autosave = autosave
        self._every_s = every_s
        self._suspend_to = suspend_to
        self._left = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._kept = {number: signal.signal(number, self._signalled) for number in _SIGNALS}
        if self._autosave is not None:
            self._start(self._save_now_and_then, self._autosave)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left.set()
        for thread in self._threads:
            thread.join()
        for number, kept in self._kept.items():
            signal.signal(number, kept)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        # It may have come in the middle of anything: a handler only posts.
        if self._suspend_to is None:
            signal.signal(number, signal.SIG_DFL)  # a second one ends a machine that comes to no safe point
            self._vm.machine.post(lambda _: Stopped(StopReason(signal.Signals(number).name)))
        else:
            self._vm.machine.post(self._suspend)

    def _suspend(self, _machine: Machine) -> Stop | None:
        assert self._suspend_to is not None
        self._start(self._suspend_when_free, self._suspend_to)
        return None

    def _start(self, action: object, path: Path) -> None:
        thread = threading.Thread(target=action, args=(path,), daemon=True, name="automatic")  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _suspend_when_free(self, path: Path) -> None:
        while not self._left.is_set():
            try:
                self._vm.save(path, end=True).result()
                return
            except WrongState:
                self._left.wait(0.05)  # a save is under way: it is finished first
            except (SnapshotError, BackendError, GuestError, RequestError) as error:
                self._vm.tell("warning", text=f"not suspended, the machine runs on: {error}")
                return

    def _save_now_and_then(self, path: Path) -> None:
        while not self._left.wait(self._every_s):
            try:
                self._vm.save(path).result()
            except WrongState:
                pass  # the one under way will do
            except (SnapshotError, BackendError, GuestError, RequestError) as error:
                self._vm.tell("warning", text=f"not saved: {error}")
