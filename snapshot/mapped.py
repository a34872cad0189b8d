"""A file as private memory, in a process that lives on when somebody cuts the file.

To touch memory whose file has become shorter, or cannot be read, is SIGBUS, which ends a process without a word. Here
the rest of the mapping becomes zeros instead, the thread goes on, and `check` says what happened. Why the signal's
handler may be Python is said in docs/decisions/0010.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snapshot.errors import SnapshotError
from snapshot.pages import NORESERVE, map_over

_SA_SIGINFO = 4  # sigaction(2)


class FileMemory(mmap.mmap):
    """`size` bytes of an open file as memory: pages come in when they are touched, writes never reach the file. Not in
    core dumps. Outlives the descriptor it was made with."""

    def __new__(
        cls, fd: int, offset: int, size: int, path: Path, stamp: tuple[int, int], still: Callable[[Path], None]
    ) -> FileMemory:
        """`path` is for messages; `stamp` is the file's, when it was found good; `still` raises SnapshotError for a
        path where something else lies than what was found good. Raises OSError, ValueError for a file that is
        shorter."""
        _listen()
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        memory = super().__new__(cls, fd, size, mmap.MAP_PRIVATE | NORESERVE, protection, offset=offset)
        memory.madvise(mmap.MADV_DONTDUMP)
        memory._start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory._stop = memory._start + size
        memory._path, memory._stamp, memory._still = path, stamp, still
        memory._fault, memory._looked_s = None, -math.inf
        memory.file = os.dup(fd)
        memory._leave = weakref.finalize(memory, os.close, memory.file)
        _alive.add(memory)
        return memory

    file: int  # a descriptor of it, -1 when what happens to it matters no more
    _start: int
    _stop: int
    _path: Path
    _stamp: tuple[int, int]
    _still: Callable[[Path], None]
    _fault: str | None
    _looked_s: float
    _leave: Callable[[], object]

    def check(self, every_s: float = 0.0) -> None:
        """Raises SnapshotError when the file is no longer what it was, if this memory may show it. The file is looked
        at every `every_s` seconds, a system call; and read, when somebody has written to it."""
        if self.file >= 0 and self._fault is None and (now_s := time.monotonic()) >= self._looked_s + every_s:
            self._looked_s = now_s
            self._look()
        if self._fault is not None:
            raise SnapshotError(f"{self._path}: it was changed while its RAM was in use: {self._fault}")

    def _look(self) -> None:
        if (now := stamp(self.file)) != self._stamp:
            try:
                self._still(Path(f"/proc/self/fd/{self.file}"))
                self._stamp = now
            except (SnapshotError, OSError) as error:
                self._fault = str(error)

    def leave_file(self) -> None:
        """The memory shows something else from now on: what happens to the file matters no more."""
        self.file, self._fault = -1, None
        self._leave()

    def close(self) -> None:
        self.leave_file()
        super().close()
        _alive.discard(self)  # the addresses may be another's soon

    def _lost(self, address: int) -> bool:
        """Whether `address` lies here: then all from its page on is zeros now. Raises OSError."""
        if not self._start <= address < self._stop:
            return False
        page = address - address % mmap.PAGESIZE
        map_over(page, self._stop - page)
        self._fault = f"its RAM from {page - self._start:#x} on cannot be read"
        return True


def stamp(fd: int) -> tuple[int, int]:
    """What is another after each write to the file: its size, and when that was."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


# --- the signal


class _SigInfo(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int), ("errno", ctypes.c_int), ("code", ctypes.c_int), ("address", ctypes.c_void_p)]


class _SigAction(ctypes.Structure):
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(_SigInfo), ctypes.c_void_p)
_alive: weakref.WeakSet[FileMemory] = weakref.WeakSet()
_before: _SigAction | None = None  # what SIGBUS did before we listened


def _bus_error(number: int, info: Any, context: int) -> None:
    address, code = info.contents.address or 0, info.contents.code
    with contextlib.suppress(OSError):  # no room for zeros: then it ends as it would without us
        if code > 0 and any(memory._lost(address) for memory in tuple(_alive)):
            return
    # Not ours: the access is made again, or the signal sent again, and means what it meant before.
    _sigaction(_before, None)
    if code <= 0:
        signal.raise_signal(number)


_handler = _HANDLER(_bus_error)  # kept: the kernel has its address


def _listen() -> None:
    global _before
    if _before is None:
        _before = _SigAction()
        _sigaction(_SigAction(handler=ctypes.cast(_handler, ctypes.c_void_p), flags=_SA_SIGINFO), _before)


def _sigaction(new: _SigAction | None, old: _SigAction | None) -> None:
    ctypes.CDLL(None).sigaction(signal.SIGBUS, new and ctypes.byref(new), old and ctypes.byref(old))
