"""To talk with a guest at its serial console, as a test does."""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass
from functools import partial

from vmm.errors import GuestError, RequestError
from vmm.guest.lost import LOST
from vmm.host.console import BACK, expression, text
from vmm.host.shown import shown
from vmm.machine.machine import Fault, Machine, Stopped, StopReason
from vmm.testing import shell
from vmm.testing.shell import Completed

_SHOWN = 12  # lines
_SHOWN_OF_COMMAND = 100


@dataclass(frozen=True)
class _Patience:
    """How long to wait."""

    seconds: float  # of guest time
    until_ns: int
    ends_at: float  # as time.monotonic counts


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
        self._asked = 0  # of the shell, up to now
        self._folder: str | None = None  # the guest's, for what is run

    @property
    def output(self) -> str:
        """All that was written and is still kept (the last MiB at least), but for the output of commands that were
        `run`."""
        return shell.readable(self.machine.board.console.read(0)[1])

    def send(self, text: str) -> None:
        """Type at the console; the guest sees it when it runs."""
        self.log.append(f"send {text!r}")
        self.machine.send(text.encode())

    def expect(self, pattern: str, *, seconds: float | None = None) -> re.Match[str]:
        """Run until the console shows the regular expression, within a line. Raises GuestError, with the last lines of
        the console, when the guest ends or is lost before, or that many guest seconds pass; RequestError for what is
        no expression."""
        self.log.append(f"expect {pattern!r}")
        machine, patience = self.machine, self._patience(seconds)
        try:
            wanted = expression(pattern)
        except re.error as error:
            raise RequestError(f"not a regular expression: {error}: {pattern}") from None
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
            why = self._go_on(patience, until=pattern)

    def run(self, command: str, *, input: bytes | str = b"", seconds: float | None = None) -> str:
        """Have the shell run a command, as `execute` does: what it writes. What is no UTF-8 is U+FFFD. Raises
        GuestError also when its status is not 0."""
        done = self.execute(command, input=input, seconds=seconds)
        written = done.output.decode(errors="replace")
        if done.status != 0:
            raise GuestError(f"{command!r} ended with status {done.status}:\n{_lines(written, _SHOWN_OF_COMMAND)}")
        return written

    def execute(self, command: str, *, input: bytes | str = b"", seconds: float | None = None) -> Completed:
        """Have a POSIX shell that waits at the console run a command, with `input` to read: its status and what it
        writes, to the byte, however much that is. It is run by the shell itself: a folder it changes to, or a variable
        it sets, stays. What it leaves running holds nothing up, and is not heard of. Raises GuestError, with the last
        lines of the console, when the guest ends or is lost before it ends, or that many guest seconds pass; or when
        the guest has not what it takes (`vmm/testing/shell.py`)."""
        self.log.append(f"run {command!r}")
        patience, data = self._patience(seconds), input.encode() if isinstance(input, str) else input
        ask = partial(self._ask, command, patience)
        if self._folder is None:
            place = int(ask(1, shell.where(self._next())).fields[0], 16)
            if not place:
                raise GuestError(f"cannot run {command!r}: the guest has no folder to write to")
            self._folder = shell.FOLDERS[place - 1]
        lines = shell.put(command.encode(), f"{self._folder}/{shell.SOURCE}")
        if data:
            lines += shell.put(data, f"{self._folder}/{shell.INPUT}")
        *before, last = shell.batches(lines)
        for batch in before:
            ask(0, [*batch, shell.here(self._next())])
        answer = ask(4, [*last, *shell.go(self._next(), self._folder, reads=bool(data))])
        done = shell.completed(answer)
        if done is None:
            lacks = int(ask(1, shell.missing(self._next())).fields[0], 16)
            why = f"the guest has no {shell.TOOLS[lacks - 1]}" if lacks else "what it wrote did not come whole"
            raise GuestError(f"cannot run {command!r}: {why}")
        self.log.append(f"status {done.status}, {len(done.output)} bytes")
        return done

    def _next(self) -> int:
        """The number of an answer."""
        self._asked += 1
        return self._asked

    def _ask(self, command: str, patience: _Patience, fields: int, lines: list[str]) -> shell.Answer:
        """Type, and have the answer whose number is the last. It is heard as it comes: the console keeps a MiB only."""
        machine, console = self.machine, self.machine.board.console
        answer = shell.Answer(self._asked, fields, lambda: machine.post(lambda _: Stopped(StopReason.COMMAND)))
        machine.send("".join(f"{line}\n" for line in lines).encode())
        console.listen(answer.hear)
        try:
            while not answer.whole:
                why = self._go_on(patience)
                if why and not answer.whole:
                    raise GuestError(f"{command!r} never ended: {why}; {self._meanwhile(answer)}")
        finally:
            console.unlisten(answer.hear)
        self._at = console.total
        return answer

    def _patience(self, seconds: float | None) -> _Patience:
        seconds = self.seconds if seconds is None else seconds
        until_ns = self.machine.clock.now_ns() + int(seconds * 1e9)
        return _Patience(seconds, until_ns, time.monotonic() + self.wall_seconds)

    def _go_on(self, patience: _Patience, until: str | None = None) -> str:
        """Run the machine: why there is nothing more to wait for, or empty where there may be."""
        stop = self.machine.run(
            until=until, since=self._at, until_ns=patience.until_ns, lost=self.lost,
            seconds=max(0.0, patience.ends_at - time.monotonic()),
        )  # fmt: skip
        match stop:
            case Stopped("pattern" | "command"):
                return ""
            case Stopped("time"):
                return f"waited {patience.seconds:g} guest seconds"
            case Stopped("timeout"):
                return f"waited {self.wall_seconds:g} s on the clock on the wall"
            case Stopped("panic", why=said):
                return f"it is lost: {shown(said)}"
            case Stopped("halted", why=more):
                return f"it halted {more}"
            case Stopped():
                return f"it ended with {stop}"
            case Fault(rip, what):
                return f"the CPU could not go on at {rip:#x}: {what}"

    def _meanwhile(self, answer: shell.Answer) -> str:
        """What there is to show of a command that has not ended: what it wrote is in a file of the guest's."""
        if not answer.begun:  # the shell did not come to it
            return f"the last lines:\n{self._last_lines()}"
        said = shell.readable(answer.others).strip("\n")
        return (
            f"the console showed meanwhile:\n{_lines(said, _SHOWN)}" if said else "the console showed nothing meanwhile"
        )

    def _last_lines(self) -> str:
        return _lines(self.output.removesuffix("\n"), _SHOWN)


def _lines(written: str, most: int) -> str:
    """The last lines of what a guest wrote, in an error's message."""
    return "\n".join(map(shown, written.split("\n")[-most:]))
