"""What this computer gives a machine, and a snapshot never holds: who is at the far end of a serial port.

    console       nobody but this process: output is kept, `Console.send` types
    null          nobody, and output is not wanted
    file:PATH     output is appended to a regular file
    pty           a pseudo-terminal of its own (`Bindings.places` says which)
    socket:PATH   a UNIX stream socket listens there, for one client at a time

Given when a machine is booted, and again when it is woken: that a part had somebody there is part of the machine (its
config's `bound`), who it was is not.

A far end that is slow, gone or broken never stops the machine: as on a serial line without handshake, what nobody takes
is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import threading
import time
import tty
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from vmm.errors import BackendError, RequestError
from vmm.host import threads
from vmm.host.console import Console

KINDS = ("console", "null", "file:PATH", "pty", "socket:PATH")
_MOST_WAITING = 1 << 20  # bytes of output that wait for a slow far end
_LOOK_AGAIN_MS = 50  # at what does not tell when it changes


class FarEnd(Protocol):
    """Somebody at the other end of a console's line. `place` says where to meet him; None when there is no such."""

    place: str | None
    takes_input: bool

    def close(self) -> None: ...


class Bindings:
    """The far ends of one machine."""

    def __init__(self, consoles: Mapping[str, Console], wanted: Mapping[str, str]) -> None:
        """`wanted`: what is at the far end of which part. Raises RequestError for a part that has none or a wrong word,
        BackendError where this computer does not give it."""
        self._ends: dict[str, FarEnd] = {}
        try:
            for name, spec in wanted.items():
                if name not in consoles:
                    raise RequestError(f"--bind {name}: no part with a far end; there are {', '.join(consoles)}")
                if (end := _make(name, spec, consoles[name])) is not None:
                    self._ends[name] = end
        except BaseException:
            self.close()
            raise

    @property
    def places(self) -> dict[str, str]:
        """Where each is to be met: a device or a socket."""
        return {name: end.place for name, end in self._ends.items() if end.place is not None}

    @property
    def takes_input(self) -> bool:
        """Whether somebody may type."""
        return any(end.takes_input for end in self._ends.values())

    def close(self) -> None:
        while self._ends:
            self._ends.popitem()[1].close()


def _make(name: str, spec: str, console: Console) -> FarEnd | None:
    kind, colon, path = spec.partition(":")
    try:
        match kind:
            case "console" | "null" if not colon:
                return None
            case "pty" if not colon:
                return _pty(console)
            case "file" if path:
                return _File(console, Path(path))
            case "socket" if path:
                return _socket(console, Path(path))
    except OSError as error:
        fault = RequestError if error.errno == errno.EINVAL else BackendError
        raise fault(f"--bind {name}={spec}: {error.strerror or error}") from None
    raise RequestError(f"--bind {name}={spec}: not one of {', '.join(KINDS)}")


class _File:
    """Output, appended to a regular file as it comes."""

    place: str | None = None
    takes_input = False

    def __init__(self, console: Console, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        self._descriptor = os.open(path, flags, 0o600)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise OSError(errno.EINVAL, "no regular file")
        self._console = console
        console.listen(self._take)

    def _take(self, byte: int) -> None:
        with contextlib.suppress(OSError):  # a full disk
            os.write(self._descriptor, bytes((byte,)))

    def close(self) -> None:
        self._console.unlisten(self._take)
        os.close(self._descriptor)


def _pty(console: Console) -> FarEnd:
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    os.set_blocking(ours, False)
    return _Stream(console, None, ours, os.ttyname(theirs), lambda: os.close(theirs))


def _socket(console: Console, path: Path) -> FarEnd:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(path).st_mode) and not _answers(path):
                path.unlink()  # of a machine that is gone
        os.fchmod(listener.fileno(), 0o600)  # which the file then has from its first moment on
        listener.bind(str(path))
        listener.listen(1)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return _Stream(console, listener, None, str(path), lambda: path.unlink(missing_ok=True))


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(str(path))
        except BlockingIOError:  # it has more who wait than it can keep
            return True
        except ConnectionRefusedError:
            return False
    return True


class _Stream:
    """Both ways over a descriptor, or over a client's of a listening socket; a thread of its own moves the bytes."""

    takes_input = True

    def __init__(
        self, console: Console, listener: socket.socket | None, stream: int | None, place: str,
        ended: Callable[[], None],
    ) -> None:  # fmt: skip
        self.place: str | None = place
        self._console, self._listener, self._stream, self._ended = console, listener, stream, ended
        self._sends = True  # the client, as far as we know
        self._waiting = bytearray()  # output that was not taken yet
        self._lock = threading.Lock()  # over that
        self._leaving, self._wake = False, -1
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threads.start(f"far end {place}", self._run)
        except (BackendError, OSError):
            self._let_go()
            raise
        console.listen(self._take)

    def _take(self, byte: int) -> None:
        with self._lock:
            idle = not self._waiting
            if self._stream is not None and len(self._waiting) < _MOST_WAITING:
                self._waiting.append(byte)
        if idle:
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        while not self._leaving:
            stream, full = self._stream, self._console.full
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            if stream is not None:
                reads = select.POLLIN if self._sends and not full else 0
                poll.register(stream, reads | (select.POLLOUT if self._waiting else 0))
            elif self._listener is not None:
                poll.register(self._listener, select.POLLIN)
            ready = dict(poll.poll(_LOOK_AGAIN_MS if full else None))
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            if self._listener is not None and stream is None and self._listener.fileno() in ready:
                self._accept(self._listener)
            elif stream is not None and (events := ready.get(stream, 0)):
                self._move(stream, events)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:  # out of descriptors, or the client is gone already
            time.sleep(_LOOK_AGAIN_MS / 1000)
            return
        client.setblocking(False)
        self._stream, self._sends = client.detach(), True

    def _move(self, stream: int, events: int) -> None:
        if events & select.POLLIN:
            self._read(stream)
        elif events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            self._hang_up()
        elif events & select.POLLOUT:
            self._write(stream)

    def _read(self, stream: int) -> None:
        try:
            data = os.read(stream, 4096)
        except BlockingIOError:
            return
        except OSError:  # the client is gone
            self._hang_up()
            return
        if data:
            self._console.send(data)
        else:
            self._sends = False  # it may listen yet

    def _write(self, stream: int) -> None:
        with self._lock:
            data = bytes(self._waiting[:4096])
        try:
            taken = os.write(stream, data)
        except BlockingIOError:
            return
        except OSError:
            self._hang_up()
            return
        with self._lock:
            del self._waiting[:taken]

    def _hang_up(self) -> None:
        """A socket's next client begins with what is sent from then on; a pseudo-terminal stays."""
        with self._lock:
            self._waiting.clear()
            if self._listener is not None and self._stream is not None:
                os.close(self._stream)
                self._stream = None

    def close(self) -> None:
        self._console.unlisten(self._take)
        self._leaving = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        if self._stream is not None:
            with self._lock, contextlib.suppress(OSError):
                while self._waiting and (taken := os.write(self._stream, self._waiting[:4096])):
                    del self._waiting[:taken]
        self._let_go()

    def _let_go(self) -> None:
        if self._stream is not None:
            os.close(self._stream)
        if self._listener is not None:
            self._listener.close()
        self._ended()
        if self._wake >= 0:
            os.close(self._wake)
