"""The user's terminal as the guest's serial console. Ctrl-] opens the monitor: s saves, q quits."""

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

from vmm.control.supervisor import Supervisor, WrongState
from vmm.machine.machine import Machine, Stopped, StopReason

MONITOR = 0x1D  # Ctrl-]


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
        self._machine = machine = vm.machine
        self._save_path, self._force = save_path or Path("anyhyve.snapshot"), force
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._raw = contextlib.ExitStack()
        self._leave = threading.Event()
        self._monitor = False
        self._line = bytearray()  # shown when it ends: a write for each byte would be most of the console's cost
        machine.board.console.listen(self._show)

    def __enter__(self) -> Terminal:
        if self.interactive:
            print(f"anyhyve: Ctrl-] then s saves to {self._save_path}, q quits", file=sys.stderr)
            self._raw.enter_context(raw_mode())
        if sys.stdin is not None and not sys.stdin.closed:
            self._machine.loop.awaits_input = True
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self._raw.close()
        with contextlib.suppress(OSError):
            self._flush(self._machine)

    def _show(self, byte: int) -> None:
        self._line.append(byte)
        if byte == 10 or self.interactive:
            self._flush(self._machine)

    def _flush(self, _machine: Machine) -> None:
        sys.stdout.buffer.write(self._line)
        sys.stdout.buffer.flush()
        self._line.clear()

    def _read(self) -> None:
        while not self._leave.is_set():
            try:
                full = self._machine.board.console.full
                ready, _, _ = select.select([] if full else [0], [], [], 0.1)
                data = os.read(0, 1024) if ready else None
                if not ready and self._line:
                    self._machine.post(self._flush)  # a prompt: whoever reads us may be waiting for it
            except OSError:
                return
            if data == b"":  # end of input: the guest runs on
                self._machine.loop.awaits_input = bool(self._machine.far_ends)
                return
            if data and (rest := self._filter(data)):
                self._machine.send(rest)

    def _filter(self, data: bytes) -> bytes:
        if not self.interactive:
            return data
        rest = bytearray()
        for byte in data:
            if self._monitor:
                self._monitor = False
                if byte == MONITOR:
                    rest.append(byte)
                elif byte in b"qQ":
                    self._machine.post(lambda _: Stopped(StopReason.QUIT))
                elif byte in b"sS":
                    self._save()
            elif byte == MONITOR:
                self._monitor = True
            else:
                rest.append(byte)
        return bytes(rest)

    def _save(self) -> None:
        def done(saved: Future[dict[str, Any]]) -> None:
            error = saved.exception()
            if error is None:
                self._note(f"saved to {self._save_path} at position {saved.result()['position']}")
            else:
                self._note(f"not saved: {error}")

        try:
            self._vm.save(self._save_path.absolute(), force=self._force).add_done_callback(done)
        except WrongState as error:
            self._note(f"not saved: {error}")

    def _note(self, text: str) -> None:
        print(f"\r\nanyhyve: {text}\r", file=sys.stderr)
