"""QEMU's board under qtest: an oracle for devices that nobody here wrote.

qtest moves the clock only in builds with its own accelerator, which distributions leave out. So time is made of
instructions: with `-icount shift=0` each takes one guest nanosecond, and all that this computer has is a ROM of NOPs
with a breakpoint behind it. A debugger that sets RIP and ECX lets exactly so many nanoseconds pass (a second takes 30
ms), and every timer of QEMU's goes off at its own time.

One thing has to be kept in check. When the breakpoint is hit the CPU counts as idle for a moment, and time skips to the
next timer (`sleep=off`; else it would go on by the host's clock). So there always is one: the HPET is set to where time
is to stop, and the CPU stops a nanosecond before. The HPET counts in units of 10 ns, and so does this clock.

Sources: QEMU 7.2, docs/devel/tcg-icount.rst, softmmu/icount.c, softmmu/qtest.c; IA-PC HPET specification 1.0a, section
2.3; GDB manual, appendix E "Remote Serial Protocol".
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from vmm.errors import BackendError
from vmm.qtest.board import Command

PROGRAM = "qemu-system-x86_64"
_PATIENCE_S = 60.0
_MOST_TICKS = 50_000_000_000  # at once: 500 s take 15, and ECX counts the rounds

# The ROM ends where the first 4 GiB do. The breakpoint is in a page of its own, for QEMU translates a page that has one
# instruction by instruction.
_ROM_SIZE, _ROM_BASE = 0x10000, 0xFFFF0000
_NOPS = 1000
_LOOP = b"\x90" * _NOPS + b"\x66\x49" + b"\x0f\x85" + (-(_NOPS + 6) & 0xFFFF).to_bytes(2, "little")  # dec ecx; jnz
_ROUND = _NOPS + 2  # instructions
_END = 0x1000
_LOOP_AT = _END - len(_LOOP)  # with one more NOP before it
_ECX, _RIP = 2, 16  # register numbers of the target description

_HPET = 0xFED00000
_CONFIG, _TIMER, _COMPARATOR = _HPET + 0x10, _HPET + 0x100, _HPET + 0x108
_TO_NOBODY = 20 << 9 | 1 << 2  # one-shot, enabled, to an input of the I/O APIC, which is masked


def _rom() -> bytes:
    rom = bytearray(b"\xf4" * _ROM_SIZE)
    rom[_LOOP_AT - 1 : _END] = b"\x90" + _LOOP
    return bytes(rom)


class Qemu:
    """One QEMU, whose CPU only passes time. Context manager. `program` may be another build's; `options` are more
    words of its command line. Every method raises BackendError when it is not here, ends, or does not answer."""

    tick_ns = 10
    now_ns = 0
    _heard = b""
    _gdb: _Gdb | None = None

    def __init__(self, program: str = PROGRAM, options: Iterable[str] = ()) -> None:
        if shutil.which(program) is None:
            raise BackendError(f"{program} is not here (Debian: qemu-system-x86)")
        with tempfile.TemporaryDirectory(prefix="anyhyve") as folder:
            (Path(folder) / "rom").write_bytes(_rom())
            gate = Path(folder) / "gdb"
            self._process = subprocess.Popen(
                [program, "-accel", "tcg", "-icount", "shift=0,sleep=off", "-S", "-machine", "pc", "-m", "256",
                 "-nodefaults", "-display", "none", "-serial", "null", "-rtc", "base=2020-01-01,clock=vm",
                 "-bios", f"{folder}/rom", "-qtest", "stdio", "-qtest-log", "/dev/null",
                 "-gdb", f"unix:{gate},server=on,wait=off", *options],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            )  # fmt: skip
            try:
                self.play(Command("in", 1, 0x80))  # once it answers, its files are open
                self._gdb = _Gdb(gate)
                self._gdb.ask("qXfer:features:read:target.xml:0,ffb")  # registers have numbers for who has asked
                self._gdb.ask(f"Z0,{_ROM_BASE + _END:x},1")
                self.play(Command("write", 8, _TIMER, _TO_NOBODY))
                self.play(Command("write", 8, _CONFIG, 1))
            except BaseException:
                self.close()
                raise

    def play(self, command: Command) -> int | None:
        """What a read answered. The clock never goes back."""
        match command.op:
            case "clock_step" if command.value is None:
                raise BackendError("QEMU does not say when its next timer is due: give clock_step a time")
            case "clock_step":
                self._pass(command.value or 0)
            case "clock_set":
                self._pass(max(0, (command.value or 0) - self.now_ns))
            case _:
                return self._say(command)
        return None

    def _say(self, command: Command) -> int | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"%s\n" % str(command).encode())
        except OSError:
            raise BackendError("QEMU has ended") from None
        while (line := self._line()).startswith("IRQ"):
            pass
        if not line.startswith("OK"):
            raise BackendError(f"QEMU answers {str(command)!r} with {line!r}")
        return int(line.split()[1], 0) if command.op in ("in", "read") else None

    def _line(self) -> str:
        assert self._process.stdout is not None
        while b"\n" not in self._heard:
            if not select.select([self._process.stdout], [], [], _PATIENCE_S)[0]:
                raise BackendError("QEMU does not answer")
            if not (piece := os.read(self._process.stdout.fileno(), 1 << 16)):
                raise BackendError("QEMU has ended")
            self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode(errors="replace")

    def _pass(self, ns: int) -> None:
        """To the first tick at or after `ns` from now."""
        ticks = -(-ns // self.tick_ns)
        while ticks:
            step = min(ticks, _MOST_TICKS)
            self._tick(step)
            ticks -= step

    def _tick(self, ticks: int) -> None:
        self.now_ns += ticks * self.tick_ns
        self._say(Command("write", 8, _COMPARATOR, self.now_ns // self.tick_ns))
        rounds, nops = divmod(ticks * self.tick_ns - 1 - 2, _ROUND)
        assert self._gdb is not None
        self._gdb.ask(f"P{_RIP:x}={(_LOOP_AT + _NOPS - nops).to_bytes(8, 'little').hex()}")
        self._gdb.ask(f"P{_ECX:x}={(rounds + 1).to_bytes(8, 'little').hex()}")
        self._gdb.ask("c")

    def close(self) -> None:
        if self._gdb is not None:
            self._gdb.close()
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Gdb:
    """A debugger's end of the remote serial protocol: a packet, and its answer."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_PATIENCE_S)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            raise BackendError(f"QEMU's debugger port: {error.strerror}") from None
        self._heard = b""

    def ask(self, packet: str) -> str:
        """Its answer. Raises BackendError, also for an error number."""
        data = packet.encode()
        until = time.monotonic() + _PATIENCE_S
        try:
            self._socket.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))
            while (end := self._heard.find(b"#")) < 0 or len(self._heard) < end + 3:
                piece = self._socket.recv(1 << 16)
                if not piece or time.monotonic() > until:
                    raise BackendError("QEMU's debugger port has closed" if not piece else "QEMU stands still")
                self._heard += piece
            answer, self._heard = self._heard[:end].partition(b"$")[2].decode(), self._heard[end + 3 :]
            self._socket.sendall(b"+")
        except OSError as error:
            raise BackendError(f"QEMU's debugger port: {error}") from None
        if answer == "" or (answer.startswith("E") and len(answer) == 3):
            raise BackendError(f"QEMU's debugger port answers {packet!r} with {answer!r}")
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()
