"""What a save and a restore cost, against QEMU TCG's migration to a file and back: same guest, same run.

save     guest stopped to file complete: ours with digests, fsync and rename, QEMU's from `stop` to `migrate` completed.
restore  file to first instruction in a live process, against QEMU's `migrate-incoming` to running; and ours for growing
         RAM, which must be flat.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard
from rich.console import Console
from rich.table import Table

from vmm.boot import Image
from vmm.machine import Machine, MachineConfig

CMDLINE = "console=ttyS0 mitigations=off"
GOAL = "shell ready"


class Qemu:
    """One QEMU with a QMP socket, its guest's serial console on pipes."""

    def __init__(self, guest: Path, folder: Path, *extra: str, memory_mib: int = 256) -> None:
        self.socket_path = folder / f"qmp{time.monotonic_ns()}"
        self.process = subprocess.Popen(
            [shutil.which("qemu-system-x86_64") or sys.exit("bench: no qemu-system-x86_64 here"),
             "-accel", "tcg", "-m", str(memory_mib), "-smp", "1", "-display", "none", "-nic", "none",
             "-serial", "stdio",
             "-kernel", str(guest / "vmlinuz"), "-initrd", str(guest / "initrd.img"), "-append", CMDLINE,
             "-qmp", f"unix:{self.socket_path},server=on,wait=off", *extra],
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
        assert self.process.stdout
        seen = b""
        while text not in seen:
            seen += self.process.stdout.read1(65536)  # type: ignore[attr-defined]

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


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def wake(file: Path) -> None:
    machine = Machine.restore(file)
    machine.run(position=machine.position + 1)
    machine.close()


def main(measure: Callable[[Path, int, Path, Console], None], rounds: int) -> None:
    """Call `measure` with the guest's folder, rounds, and a scratch folder on this disk."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--guest", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=rounds)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir="."))
    try:
        measure(arguments.guest, arguments.rounds, folder, Console())
    finally:
        shutil.rmtree(folder)


def measure(guest: Path, rounds: int, folder: Path, out: Console) -> None:
    image = Image.from_files(guest / "vmlinuz", guest / "initrd.img", CMDLINE)
    with out.status("booting both"):
        machine = Machine.boot(MachineConfig(memory_bytes=256 << 20), image)
        machine.run(until=GOAL)
        qemu = Qemu(guest, folder)
        qemu.until(GOAL.encode())
    stream = folder / "qemu.stream"
    qemu("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    saves, theirs = [], []
    for _ in range(rounds):
        saves.append(timed(lambda: machine.save(folder / "ours")))

        def migrate() -> None:
            qemu("stop")
            qemu("migrate", uri=f"exec:cat > {stream}")
            qemu.until_done()

        theirs.append(timed(migrate))
        qemu("cont")
    qemu.close()
    restores, incoming = [], []
    for _ in range(rounds):
        restores.append(timed(lambda: wake(folder / "ours")))
        waiting = Qemu(guest, folder, "-incoming", "defer")

        def come(waiting: Qemu = waiting) -> None:
            waiting("migrate-incoming", uri=f"exec:cat {stream}")
            while waiting("query-status")["status"] == "inmigrate":
                time.sleep(0.0005)
            waiting("cont")  # it was stopped when it was saved

        incoming.append(timed(come))
        waiting.close()
    table = Table("what", "anyhyve ms", "QEMU ms", "ratio")
    median = statistics.median
    for what, us, them in (
        ("save: guest stopped", saves, theirs),
        ("restore: to first instruction", restores, incoming),
    ):
        table.add_row(what, f"{median(us):.1f}", f"{median(them):.1f}", f"{median(us) / median(them):.2f}")
    for mib in (256, 1024, 4096):
        with Machine.boot(MachineConfig(memory_bytes=mib << 20), image) as large:
            large.run(position=50_000_000)
            large.save(folder / "large")
        times = [timed(lambda: wake(folder / "large")) for _ in range(rounds)]
        table.add_row(f"restore: {mib} MiB of RAM", f"{median(times):.1f}", "", "")
    out.print(table)
    out.print(sizes(machine, folder, stream))


def a_second(machine: Machine) -> None:
    started = machine.clock.now_ns()
    while machine.clock.now_ns() < started + 10**9:
        machine.run(position=machine.position + 10_000)


def sizes(machine: Machine, folder: Path, stream: Path) -> Table:
    """On disk, of the same booted guest: raw, packed with zstd level 3, and a second of idling as a difference."""
    a_second(machine)  # the shell starts
    machine.save(folder / "packed", packed=True)
    machine.save(folder / "before")
    a_second(machine)
    machine.save(folder / "idle", parent=folder / "before")
    theirs = len(zstandard.ZstdCompressor(level=3).compress(stream.read_bytes())) / 1e6
    mb = {name: (folder / name).stat().st_blocks * 512 / 1e6 for name in ("before", "packed", "idle")}
    raw = stream.stat().st_size / 1e6
    table = Table("on disk", "anyhyve MB", "QEMU stream MB", "ratio")
    table.add_row("raw", f"{mb['before']:.1f}", f"{raw:.1f}", f"{mb['before'] / raw:.2f}")
    table.add_row("zstd", f"{mb['packed']:.1f}", f"{theirs:.1f}", f"{mb['packed'] / theirs:.2f}")
    table.add_row("1 s of idling, as a difference", f"{mb['idle']:.1f}", "", "")
    return table


if __name__ == "__main__":
    main(measure, rounds=5)
