"""The host's end of the serial line: what the guest wrote, who listens, and what to stop at."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

_KEEP = 1 << 20


class Console:
    """Collects the guest's output. `watch(regex)` asks for `found` to be set once the output matches."""

    def __init__(self) -> None:
        self.output = bytearray()  # the last MiB
        self.total = 0
        self._lock = threading.Lock()  # over these two, for other threads' `read`
        self.found = False
        self.on_match: Callable[[], None] = lambda: None
        self._listeners: list[Callable[[int], None]] = []
        self._pattern: re.Pattern[bytes] | None = None
        self._from = 0

    def listen(self, listener: Callable[[int], None]) -> None:
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[int], None]) -> None:
        self._listeners.remove(listener)

    def watch(self, pattern: str | None) -> None:
        """Look for `pattern` in what the guest writes from now on."""
        self._pattern = None if pattern is None else re.compile(pattern.encode())
        self._from = len(self.output)
        self.found = False

    def read(self, offset: int, most: int) -> tuple[int, bytes]:
        """From any thread: up to `most` bytes written since the guest had written `offset`, and the offset they begin
        at: a later one where the earlier are no longer kept."""
        with self._lock:
            start = self.total - len(self.output)
            offset = min(max(offset, start), self.total)
            return offset, bytes(self.output[offset - start : offset - start + most])

    def transmit(self, byte: int) -> None:
        """The UART's sink."""
        with self._lock:
            self.output.append(byte)
            self.total += 1
            if len(self.output) > 2 * _KEEP:
                cut = len(self.output) - _KEEP
                del self.output[:cut]
                self._from = max(0, self._from - cut)
        for listener in self._listeners:
            listener(byte)
        if self._pattern is not None:
            # Only the last lines can complete a match: a search over the whole output would be quadratic.
            start = max(self._from, self.output.rfind(b"\n", 0, max(0, len(self.output) - 1)) + 1)
            match = self._pattern.search(self.output, start)
            if match:
                self._pattern = None
                self._from = match.end()
                self.found = True
                self.on_match()
