"""The user's terminal as the guest's serial console. Ctrl-] opens the monitor, which takes the next key: s saves, q
quits, another Ctrl-] is the guest's, and any other key has the keys said."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from snapshot.errors import SnapshotError
from vmm.control.supervisor import Supervisor, WrongState
from vmm.errors import BackendError, RequestError
from vmm.host import streams, threads
from vmm.host.shown import shown
from vmm.machine.machine import Machine, Stopped, StopReason

MONITOR = 0x1D  # Ctrl-]
OTHER_KEYS = "Ctrl-] sends it, ? says this"  # which every monitor has
_AT_ONCE = 4096  # bytes of output
_TICK_S = 0.1


@contextlib.contextmanager
def raw_mode() -> Iterator[bool]:
    """Context manager: lets every key through while it is entered, if standard input is a terminal. Gives whether it
    is."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield False
        return
    kept = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield True
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, kept)


class Terminal:
    """Context manager: while it is entered, console output goes to standard output and typing goes to the guest."""

    def __init__(self, vm: Supervisor, save_path: Path | None, *, force: bool = False) -> None:
        self._vm = vm
        self._machine = vm.machine
        self._save_path, self._force = save_path or Path("anyhyve.snapshot"), force
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._raw = contextlib.ExitStack()
        self._leave = threading.Event()
        self._keys = f"Ctrl-] then s saves to {self._save_path}, q quits, {OTHER_KEYS}"
        self._monitor = False
        self._saving: Future[dict[str, Any]] | None = None  # the last save that a key asked for
        self._asks = False  # whether to replace the file: the next key is the answer
        self._line = bytearray()  # shown when it ends, is long, or a tick later: a write for each byte would cost most

    def __enter__(self) -> Terminal:
        """Raises BackendError when the host has no thread for it."""
        reads = sys.stdin is not None and not sys.stdin.closed
        with self._raw:
            if self.interactive:
                streams.tell(f"anyhyve: {shown(self._keys)}\n")
                self._raw.enter_context(raw_mode())
            self._machine.loop.awaits_input = self._machine.loop.awaits_input or reads
            threads.start("terminal", lambda: self._tend(reads))
            self._raw = self._raw.pop_all()
        self._machine.board.console.listen(self._show)
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self._machine.board.console.unlisten(self._show)
        self._raw.close()
        with contextlib.suppress(BackendError):
            self._flush(self._machine)

    def _show(self, byte: int) -> None:
        self._line.append(byte)
        if byte == 10 or self.interactive or len(self._line) >= _AT_ONCE:
            self._flush(self._machine)

    def _flush(self, _machine: Machine) -> None:
        line, self._line = self._line, bytearray()
        streams.write(line)

    def _tend(self, reads: bool) -> None:
        """Read what is typed, to its end; show what the guest has written of a line."""
        while not self._leave.is_set():
            if reads and not self._machine.board.console.full:
                reads = self._read()
            else:
                self._leave.wait(_TICK_S)
            if self._line:
                self._machine.post(self._flush)  # a prompt: whoever reads us may be waiting for it

    def _read(self) -> bool:
        """Wait for something typed, a tick at most. Returns whether there may be more."""
        try:
            ready, _, _ = select.select([0], [], [], _TICK_S)
            data = os.read(0, 1024) if ready else None
        except OSError:
            return False
        if data == b"":  # end of input: the guest runs on
            self._machine.loop.awaits_input = bool(self._machine.far_ends)
            return False
        if data and (rest := self._filter(data)):
            self._machine.send(rest)
        return True

    def _filter(self, data: bytes) -> bytes:
        if not self.interactive:
            return data
        rest, unknown = bytearray(), False
        for byte in data:
            if self._asks:
                self._asks = False
                if byte in b"yY":
                    self._save()
                else:
                    self._note("not saved")
                    self._monitor = byte == MONITOR
            elif self._monitor:
                self._monitor = False
                if byte == MONITOR:
                    rest.append(byte)
                elif byte in b"qQ":
                    self._quit()
                elif byte in b"sS":
                    self._may_save()
                else:
                    unknown = True
            elif byte == MONITOR:
                self._monitor = True
            else:
                rest.append(byte)
        if unknown:  # once for what was typed at once
            self._note(self._keys)
        return bytes(rest)

    def _quit(self) -> None:
        """End the run, behind a save that was asked for before."""

        def end(_: object = None) -> None:
            self._machine.post(lambda _: Stopped(StopReason.QUIT))

        if self._saving is None:
            end()
        else:
            self._saving.add_done_callback(end)

    def _may_save(self) -> None:
        """Save, or ask first where a file would be replaced. The guest runs on meanwhile."""
        try:
            self._machine.can_save(self._save_path.absolute(), force=self._force)
        except (SnapshotError, BackendError, RequestError) as error:
            self._note(f"not saved: {error}")
            return
        self._asks = not self._force and os.path.lexists(self._save_path)
        if self._asks:
            self._note(f"replace {self._save_path}? y saves, any other key does not")
        else:
            self._save()

    def _save(self) -> None:
        def done(saved: Future[dict[str, Any]]) -> None:
            error = saved.exception()
            if error is None:
                self._note(f"saved to {self._save_path} at position {saved.result()['position']}")
            else:
                self._note(f"not saved: {error}")

        self._note(f"saving to {self._save_path}")
        try:
            self._saving = self._vm.save(self._save_path.absolute(), force=self._force)
            self._saving.add_done_callback(done)
        except WrongState as error:
            self._note(f"not saved: {error}")

    def _note(self, text: str) -> None:
        streams.tell(f"\r\nanyhyve: {shown(text)}\r\n")
