"""QEMU, the peer: driven over QMP."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CMDLINE = "console=ttyS0 mitigations=off"


def debian(guest: Path) -> list[str]:
    """The arguments that boot it."""
    return ["-kernel", str(guest / "vmlinuz"), "-initrd", str(guest / "initrd.img"), "-append", CMDLINE]


class Qemu:
    """One QEMU with a QMP socket, its guest's serial console on pipes."""

    def __init__(self, folder: Path, *arguments: str, memory_mib: int = 256) -> None:
        self.socket_path = folder / f"qmp{time.monotonic_ns()}"
        self.process = subprocess.Popen(
            [shutil.which("qemu-system-x86_64") or sys.exit("bench: no qemu-system-x86_64 here"),
             "-accel", "tcg", "-m", str(memory_mib), "-smp", "1", "-display", "none", "-nic", "none",
             "-serial", "stdio",
             "-qmp", f"unix:{self.socket_path},server=on,wait=off", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(str(self.socket_path))
                break
            except OSError:
                time.sleep(0.01)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                sys.exit(f"bench: QEMU: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def until(self, text: bytes) -> None:
        assert isinstance(self.process.stdout, io.BufferedReader)
        seen = b""
        while text not in seen:
            seen += self.process.stdout.read1(65536)

    def type(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def until_done(self) -> None:
        while self("query-migrate").get("status") != "completed":
            time.sleep(0.0005)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
