"""The user's terminal as the guest's serial console. Ctrl-] opens the monitor: s saves, q quits."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
import tty
from pathlib import Path

from snapshot.errors import SnapshotError
from vmm.errors import BackendError
from vmm.machine import Machine, Stop, Stopped

_MONITOR = 0x1D  # Ctrl-]


class Terminal:
    """Context manager: while it is entered, console output goes to standard output and typing goes to the guest."""

    def __init__(self, machine: Machine, save_path: Path | None) -> None:
        self._machine = machine
        self._save_path = save_path or Path("anyhyve.snapshot")
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._kept: list[object] | None = None
        self._leave = threading.Event()
        self._monitor = False
        self._line = bytearray()  # shown when it ends: a write for each byte would be most of the console's cost
        machine.board.console.listen(self._show)

    def __enter__(self) -> Terminal:
        if self.interactive:
            print(f"anyhyve: Ctrl-] then s saves to {self._save_path}, q quits", file=sys.stderr)
            self._kept = termios.tcgetattr(0)
            tty.setraw(0)
        if sys.stdin is not None and not sys.stdin.closed:
            self._machine.awaits_input = True
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        if self._kept is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, self._kept)  # type: ignore[arg-type]
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
                ready, _, _ = select.select([0], [], [], 0.1)
                data = os.read(0, 1024) if ready else None
                if not ready and self._line:
                    self._machine.post(self._flush)  # a prompt: whoever reads us may be waiting for it
            except OSError:
                return
            if data == b"":  # end of input: the guest runs on
                self._machine.awaits_input = False
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
                if byte == _MONITOR:
                    rest.append(byte)
                elif byte in b"qQ":
                    self._machine.post(lambda _: Stopped("quit"))
                elif byte in b"sS":
                    self._machine.post(self._save)
            elif byte == _MONITOR:
                self._monitor = True
            else:
                rest.append(byte)
        return bytes(rest)

    def _save(self, machine: Machine) -> Stop | None:
        try:
            machine.save(self._save_path)
            note = f"saved to {self._save_path} at position {machine.position}"
        except (SnapshotError, BackendError) as error:
            note = f"not saved: {error}"
        print(f"\r\nanyhyve: {note}\r", file=sys.stderr)
        return None
