"""Ctrl-C while a machine runs.

Python raises KeyboardInterrupt wherever it is. That may be where an engine's call has just come in and nothing is
guarded yet: ctypes prints it there, and drops it, and the guest runs on. Or in the middle of a guest's access, half of
which is done. So while the loop runs SIGINT is taken down, and raised between two instructions.

The functions of `signal` proper look for each handler in an enum, which takes 28 us, as long as a short run.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class Interrupt:
    """Context manager: `came` says whether SIGINT did, and `wake` is called then, in the handler. What came and was not
    raised is raised at the end. The second one is raised where it comes: the first may have come to no safe point.
    Another's handler is left alone, and so is SIGINT where it is ignored, or of a thread that is not the main one."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.came = False
        self._wake = wake
        self._ours = False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        if main and _signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._ours = True
            _signal.signal(signal.SIGINT, self._signalled)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._ours:
            _signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.came and error is None:
                raise KeyboardInterrupt

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        _signal.signal(signal.SIGINT, signal.default_int_handler)
        self.came = True
        self._wake()
