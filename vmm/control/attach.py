"""A terminal joined to a running machine's console, and parted from it without harm."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from vmm.control.client import Client, Failed, result, sense
from vmm.control.lifecycle import check_name
from vmm.control.terminal import MONITOR, OTHER_KEYS, raw_mode
from vmm.errors import BackendError, RequestError
from vmm.host import streams
from vmm.host.shown import shown

_REPLAY = 1 << 14  # bytes of what was shown before
_WAIT_S = 30.0
_LOOK_S = 0.05
_LEAVE_S = 1.0  # for a machine that does not answer
_KEYS = f"Ctrl-] then d leaves it running, {OTHER_KEYS}"


def attach(folder: Path, name: str, wait_s: float = 0.0) -> int:
    """Join this terminal to a machine's console, until Ctrl-] d or the machine's end. A machine that is not there yet
    is waited for, so many seconds at most. Returns the exit status. Raises
    BackendError when standard output takes nothing, RequestError when there is no such machine."""
    with _client(folder, name, wait_s) as client:
        try:
            with raw_mode() as interactive:
                if interactive:
                    streams.tell(f"anyhyve: {name}: {_KEYS}\r\n")
                return _Session(client, interactive).run()
        except streams.Unwritable:
            raise
        except BackendError as error:
            streams.tell(f"\nanyhyve: {shown(error)}\n")
            return 0
        except Failed as error:
            streams.tell(f"\nanyhyve: {name}: {shown(error)}\n")
            return 1


def _client(folder: Path, name: str, wait_s: float) -> Client:
    """Raises BackendError, RequestError."""
    check_name(name)
    ends_at, said = time.monotonic() + wait_s, False
    while True:
        try:
            return Client(folder, name)
        except RequestError as error:
            if time.monotonic() >= ends_at:
                waited = f" (waited {wait_s:g} s)" if wait_s else ""
                raise RequestError(f"{error}{waited}") from None
            if not said:
                streams.tell(f"anyhyve: waiting for {shown(name)}, {wait_s:g} s at most\n")
                said = True
        time.sleep(_LOOK_S)


class _Session:
    def __init__(self, client: Client, interactive: bool) -> None:
        self._client = client
        self._interactive = interactive
        self._keys = bytearray()  # typed, not sent yet
        self._writing: int | None = None  # the console.write without answer
        self._full = False  # the machine took nothing of the last one
        self._monitor = False
        self._input_open = True
        end = client.call("console.read", offset=None)
        with sense(client.name):
            self._reading = self._read(max(0, end["offset"] - _REPLAY))

    def run(self) -> int:
        leaves_at: float | None = None  # at the latest: what was typed before is sent first
        while leaves_at is None or (self._keys and not self._full and time.monotonic() < leaves_at):
            listens = self._input_open and leaves_at is None
            sources: list[Client | int] = [self._client, *([0] if listens else [])]
            timeout_s = None if leaves_at is None else max(0.0, leaves_at - time.monotonic())
            ready = [self._client] if self._client.heard else select.select(sources, [], [], timeout_s)[0]
            if 0 in ready and not self._type(os.read(0, 1024)):
                leaves_at = time.monotonic() + _LEAVE_S
            if self._client in ready:
                self._hear()
            if self._keys and self._writing is None:
                data = bytes(self._keys[:4096])
                self._writing = self._client.ask("console.write", data=data.decode("latin-1"))
        return 0

    def _read(self, offset: int) -> int:
        return self._client.ask("console.read", offset=offset, wait_s=_WAIT_S)

    def _hear(self) -> None:
        message = self._client.read()
        with sense(self._client.name):
            if message.get("id") == self._reading:
                found = result(message)
                streams.write(found["data"].encode("latin-1"))  # the guest's console, as it is
                self._reading = self._read(found["next"])
            else:
                taken = result(message)["taken"]
                del self._keys[:taken]
                self._writing, self._full = None, not taken

    def _type(self, data: bytes) -> bool:
        """Take what was typed; returns False when the user leaves."""
        if not data:
            self._input_open = False
        asks = False
        for byte in data:
            if self._monitor:
                self._monitor = False
                if byte in b"dD":
                    return False
                if byte == MONITOR:
                    self._keys.append(byte)
                else:
                    asks = True
            elif self._interactive and byte == MONITOR:
                self._monitor = True
            else:
                self._keys.append(byte)
        if asks:  # once for what was typed at once
            streams.tell(f"\r\nanyhyve: {_KEYS}\r\n")
        return True
