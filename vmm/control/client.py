"""The other end of a machine's socket.

with Client(rundir(), "box") as box:
    box.call("checkpoint", path="/tmp/box.snapshot")
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmm.control import place, protocol
from vmm.errors import BackendError


class Failed(Exception):
    """The machine's answer is an error, of this code. One line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """A connection to one running machine; for one thread. Raises BackendError when there is none, or it is lost."""

    def __init__(self, folder: Path, name: str, *, timeout_s: float | None = None) -> None:
        self.name = name
        self._socket = place.connect(folder, name)
        self._socket.settimeout(timeout_s)
        self._heard = bytearray()
        self._last = 0

    def call(self, method: str, event: Callable[[dict[str, Any]], None] = lambda _: None, **params: Any) -> Any:
        """The method's result; events that come meanwhile go to `event`. Raises Failed."""
        call = self.ask(method, **params)
        while True:
            message = self.read()
            if message.get("method") == "event":
                event(message["params"])
            elif message.get("id") in (call, None):
                if error := message.get("error"):
                    raise Failed(error["code"], error["message"])
                return message["result"]

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
        line, _, self._heard = self._heard.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    @property
    def heard(self) -> bool:
        """Whether `read` would answer at once."""
        return b"\n" in self._heard

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
