"""To talk with a guest at its serial console, as a test does."""

from __future__ import annotations

import re
import shlex
import time
from collections import deque

from vmm.errors import GuestError
from vmm.guest.lost import LOST
from vmm.host.console import BACK, expression, text
from vmm.host.shown import shown
from vmm.machine.machine import Fault, Machine, Stopped

_SHOWN = 12  # lines


class Expect:
    """What the guest writes from now on, in order: each `expect` looks from where the one before ended. Times are guest
    seconds, of which no wait lasts longer than `wall_seconds` on the clock on the wall. A guest whose console shows
    `lost` is waited for no longer."""

    def __init__(
        self, machine: Machine, *, seconds: float = 60.0, wall_seconds: float = 300.0, lost: str | None = LOST
    ) -> None:
        self.machine = machine
        self.seconds, self.wall_seconds, self.lost = seconds, wall_seconds, lost
        self.log: deque[str] = deque(maxlen=1000)  # what was said and awaited
        self._at = machine.board.console.total

    @property
    def output(self) -> str:
        """All that was written and is still kept (the last MiB at least)."""
        return _decoded(self.machine.board.console.read(0)[1])

    def send(self, text: str) -> None:
        """Type at the console; the guest sees it when it runs."""
        self.log.append(f"send {text!r}")
        self.machine.send(text.encode())

    def expect(self, pattern: str, *, seconds: float | None = None) -> re.Match[str]:
        """Run until the console shows the regular expression, within a line. Raises GuestError, with the last lines of
        the console, when the guest ends or is lost before, or that many guest seconds pass."""
        self.log.append(f"expect {pattern!r}")
        machine, wanted = self.machine, expression(pattern)
        until_ns = machine.clock.now_ns() + int((self.seconds if seconds is None else seconds) * 1e9)
        ends_at = time.monotonic() + self.wall_seconds
        at, begun, why = self._at, False, ""
        while True:
            # Where a line has begun already, the byte before says so.
            offset, data = machine.board.console.read(at - begun)
            begun |= offset > at
            written = text(data)
            if match := wanted.search(written, int(begun)):
                self._at = offset + len(written[: match.end()].encode(errors="surrogateescape"))
                return match
            # What comes can match only from the last line on, as the console looks.
            line, far = offset + data.rfind(b"\n") + 1, offset + len(data) - BACK
            at, begun = (line, False) if line > offset else (max(at, offset), begun)
            if far > at:
                at, begun = far, True
            if why:
                raise GuestError(f"the guest never said {pattern!r}: {why}; its last lines:\n{self._last_lines()}")
            stop = machine.run(
                until=pattern, since=self._at, until_ns=until_ns, lost=self.lost,
                seconds=max(0.0, ends_at - time.monotonic()),
            )  # fmt: skip
            match stop:
                case Stopped("pattern"):
                    continue
                case Stopped("time"):
                    why = f"waited {self.seconds if seconds is None else seconds:g} guest seconds"
                case Stopped("timeout"):
                    why = f"waited {self.wall_seconds:g} s on the clock on the wall"
                case Stopped("panic", why=said):
                    why = f"it is lost: {shown(said)}"
                case Stopped(reason, why=more):
                    why = f"it ended with {reason} {more}".rstrip()
                case Fault(rip, what):
                    why = f"the CPU could not go on at {rip:#x}: {what}"

    def run(self, command: str, *, seconds: float | None = None) -> str:
        """Have a POSIX shell run a command: what it writes. Raises GuestError when its status is not 0."""
        # The line is echoed as it is typed, and must not look like what it prints.
        done = f"eval {shlex.quote(command)}"  # whatever it is: `sleep 1 &`, a syntax error
        self.send(f"printf '%s-%s\\n' any begin; {done}; printf '\\n%s-%s=%d\\n' any end $?\n")
        self.expect(r"any-begin\r?\n", seconds=seconds)
        begin = self._at
        status = self.expect(r"any-end=(\d+)\r?\n", seconds=seconds)[1]
        _, data = self.machine.board.console.read(begin, self._at - begin)
        written = _decoded(data).rpartition("any-end=")[0].removesuffix("\n")
        if status != "0":
            raise GuestError(f"{command!r} ended with status {status}:\n{_lines(written)}")
        return written

    def _last_lines(self) -> str:
        return _lines(self.output.removesuffix("\n"), _SHOWN)


def _lines(written: str, most: int = 0) -> str:
    """The last lines of what a guest wrote, in an error's message."""
    return "\n".join(map(shown, written.split("\n")[-most:]))


def _decoded(data: bytes) -> str:
    return data.decode(errors="replace").replace("\r\n", "\n")
