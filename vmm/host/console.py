"""This computer's end of a serial line: what the guest wrote, who listens, what to stop at; and what was typed."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

# Bytes that no text has: two are never UTF-8's, and what the others begin is not Unicode's, or a mere mark of its own.
# A command's output comes in them (vmm/testing/shell.py), with a kernel's lines anywhere between.
NO_TEXT = b"\xc0\xc1" + bytes(range(0xF1, 0x100))
_KEEP = 1 << 20
_END = ord("\n")
_AT_ONCE, _ENOUGH = 4096, 1 << 16  # bytes typed: given to a port at a time, and waiting for it
BACK = 4096  # bytes of a line that are searched: one without an end must not take the square of its length


class Console:
    """Collects the guest's output, and what the guest has not taken yet of what was typed. `watch(regex)` asks for
    `found` to be set once a line of output matches."""

    def __init__(self) -> None:
        self.output = bytearray()  # the last MiB, or up to two
        self.total = 0
        self._lock = threading.Lock()  # over these two, for other threads' `read`
        self.found = False
        self.lost: str | None = None  # the line that says so
        self._lost: re.Pattern[str] | None = None
        self.on_match: Callable[[], None] = lambda: None
        self.on_input: Callable[[], None] = lambda: None  # called from any thread
        self.typed = bytearray()
        self._listeners: list[Callable[[int], None]] = []
        self._pattern: re.Pattern[str] | None = None
        self._from = 0  # as `total` counts

    def send(self, data: bytes) -> None:
        """From any thread: type `data`, from the next boundary on."""
        self.typed.extend(data)
        self.on_input()

    def take(self, receive: Callable[[bytes], int]) -> None:
        """Give what was typed to the guest's port, which says how much it took."""
        del self.typed[: receive(bytes(self.typed[:_AT_ONCE]))]

    @property
    def full(self) -> bool:
        """Whether the guest should take what was typed before more is: who can wait does."""
        return len(self.typed) >= _ENOUGH

    def listen(self, listener: Callable[[int], None]) -> None:
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[int], None]) -> None:
        self._listeners.remove(listener)

    def watch(self, pattern: str | None, since: int | None = None, lost: str | None = None) -> None:
        """Look for `pattern` in each line the guest goes on to write; what it wrote before `since` (as `total` counts;
        by default: before now) is not part of the line. The first whole line that has `lost` becomes that."""
        self._lost, self.lost = None if lost is None else expression(lost), None
        self._pattern = None if pattern is None else expression(pattern)
        self._from = self.total if since is None else since
        self.found = False

    def read(self, offset: int, most: int | None = None) -> tuple[int, bytes]:
        """From any thread: all bytes, or `most` of them, written since the guest had written `offset`, and the offset
        they begin at: a later one where the earlier are no longer kept."""
        with self._lock:
            start = self.total - len(self.output)
            offset = min(max(offset, start), self.total)
            end = None if most is None else offset - start + most
            return offset, bytes(self.output[offset - start : end])

    def recall(self, shown: bytes) -> None:
        """The same guest wrote this before, to another process's console. Nobody who listens is told."""
        with self._lock:
            self.output.extend(shown)
            self.total += len(shown)

    def keep(self, output: bytes) -> None:
        """Have this kept, and nothing else of what was written up to now. `total` counts on, and an offset of before is
        good for what comes."""
        with self._lock:
            self.output[:] = output

    def transmit(self, byte: int) -> None:
        """The UART's sink."""
        with self._lock:
            self.output.append(byte)
            self.total += 1
            if len(self.output) > 2 * _KEEP:
                del self.output[:-_KEEP]
        for listener in self._listeners:
            listener(byte)
        if self._pattern is not None and self._matches(self._pattern):
            self._pattern = None
            self.found = True
            self.on_match()
        if byte == _END and self._lost is not None and (found := self._lost.search(self._last_line())):
            self._lost, self.lost = None, found[0].rstrip()
            self.on_match()

    def _last_line(self) -> str:
        end = len(self.output) - 1
        first = max(end - BACK, 0)
        line = self.output[max(self.output.rfind(b"\n", first, end) + 1, first) : end]
        return text(line.translate(None, NO_TEXT))

    def _matches(self, pattern: re.Pattern[str]) -> bool:
        """Whether the line the guest is writing matches, its end included once that is written. A pattern can only come
        to match there: any line before it has been searched as it grew."""
        size = len(self.output)
        since = size - (self.total - self._from)
        first = max(since, size - BACK, 0)
        line = max(first, self.output.rfind(b"\n", first, size - 1) + 1)
        begun = first == line > max(since, 0)  # its beginning is too far back: the byte before is not the end of one
        return pattern.search(text(self.output[line - begun :]), int(begun)) is not None


def expression(pattern: str) -> re.Pattern[str]:
    """One for lines of output. Raises re.error."""
    return re.compile(pattern, re.MULTILINE)


def text(data: bytes | bytearray) -> str:
    """To be searched; what is no UTF-8 can be encoded again, so that bytes can be counted."""
    return data.decode(errors="surrogateescape")
