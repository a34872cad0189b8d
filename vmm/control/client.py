"""The other end of a machine's socket.

with Client(rundir(), "box") as box:
    box.call("checkpoint", path="/tmp/box.snapshot")
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vmm.control import place, protocol
from vmm.errors import BackendError
from vmm.host.shown import shown


class Failed(Exception):
    """The machine's answer is an error, of this code. One line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def result(message: dict[str, Any]) -> Any:
    """What an answer says. Raises Failed; LookupError, TypeError for no answer."""
    if (error := message.get("error")) is not None:
        raise Failed(int(error["code"]), shown(error["message"]))
    return message["result"]


@contextlib.contextmanager
def sense(name: str) -> Iterator[None]:
    """Context manager around reading what a machine has said: BackendError where it is not what one would say."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise BackendError(f"{name}: its answer makes no sense") from None


class Client:
    """A connection to one running machine; for one thread. Raises BackendError when there is none, or it is lost."""

    def __init__(self, folder: Path, name: str, *, timeout_s: float | None = None) -> None:
        self.name = name
        self._socket = place.connect(folder, name)
        self._socket.settimeout(timeout_s)
        self._heard = bytearray()
        self._searched = 0  # bytes of it that hold no end of a line
        self._last = 0

    def call(self, method: str, event: Callable[[dict[str, Any]], None] = lambda _: None, **params: Any) -> Any:
        """The method's result; events that come meanwhile go to `event`. Raises Failed."""
        call = self.ask(method, **params)
        while True:
            message = self.read()
            with sense(self.name):
                if message.get("method") == "event":
                    event(dict(message["params"]))
                elif message.get("id") in (call, None):
                    return result(message)

    def ask(self, method: str, **params: Any) -> int:
        """Send a request and do not wait for the answer. Returns its id."""
        self._last += 1
        request = protocol.pack(method=method, params=params, id=self._last)
        try:
            self._socket.sendall(request)
        except OSError as error:
            # What it said before it left is worth more than that it left.
            if not isinstance(error, BrokenPipeError | ConnectionResetError):
                raise BackendError(f"{self.name}: {error.strerror or error}") from None
        return self._last

    def read(self) -> dict[str, Any]:
        """The next message."""
        while not self.heard:
            try:
                piece = self._socket.recv(1 << 16)
            except ConnectionResetError:  # it left with a question of ours unread
                piece = b""
            except OSError as error:
                raise BackendError(f"{self.name}: {error.strerror or error}") from None
            if not piece or len(self._heard) > protocol.MAX_ANSWER:
                raise BackendError(f"{self.name}: the machine has ended")
            self._heard += piece
        end = self._heard.index(b"\n", self._searched)
        line = self._heard[:end]
        del self._heard[: end + 1]
        self._searched = 0
        with sense(self.name):
            return dict(json.loads(line).items())

    @property
    def heard(self) -> bool:
        """Whether `read` would answer at once."""
        end = self._heard.find(b"\n", self._searched)
        self._searched = len(self._heard) if end < 0 else end
        return end >= 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
