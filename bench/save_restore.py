"""What a save and a restore cost, against QEMU TCG's migration to a file and back: same guest, same run.

save     guest stopped to file complete: ours with digests, fsync and rename, QEMU's from `stop` to `migrate` completed.
restore  file to first instruction in a live process, against QEMU's `migrate-incoming` to running; and ours for growing
         RAM, which must be flat.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zstandard
from rich.console import Console

from bench.qemu import CMDLINE, Qemu, debian
from vmm.cli import show
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig

GOAL = "shell ready"


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
        qemu = Qemu(folder, *debian(guest))
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
        waiting = Qemu(folder, *debian(guest), "-incoming", "defer")

        def come(waiting: Qemu = waiting) -> None:
            waiting("migrate-incoming", uri=f"exec:cat {stream}")
            while waiting("query-status")["status"] == "inmigrate":
                time.sleep(0.0005)
            waiting("cont")  # it was stopped when it was saved

        incoming.append(timed(come))
        waiting.close()
    rows = []
    median = statistics.median
    for what, us, them in (
        ("save: guest stopped", saves, theirs),
        ("restore: to first instruction", restores, incoming),
    ):
        rows.append((what, f"{median(us):.1f}", f"{median(them):.1f}", f"{median(us) / median(them):.2f}"))
    for mib in (256, 1024, 4096):
        with Machine.boot(MachineConfig(memory_bytes=mib << 20), image) as large:
            large.run(position=50_000_000)
            large.save(folder / "large")
        times = [timed(lambda: wake(folder / "large")) for _ in range(rounds)]
        rows.append((f"restore: {mib} MiB of RAM", f"{median(times):.1f}", "", ""))
    show.table(("what", "anyhyve ms", "QEMU ms", "ratio"), rows)
    show.table(("on disk", "anyhyve MB", "QEMU stream MB", "ratio"), sizes(machine, folder, stream))


def a_second(machine: Machine) -> None:
    started = machine.clock.now_ns()
    while machine.clock.now_ns() < started + 10**9:
        machine.run(position=machine.position + 10_000)


def sizes(machine: Machine, folder: Path, stream: Path) -> list[tuple[str, ...]]:
    """On disk, of the same booted guest: raw, packed with zstd level 3, and a second of idling as a difference."""
    a_second(machine)  # the shell starts
    machine.save(folder / "packed", packed=True)
    machine.save(folder / "before")
    a_second(machine)
    machine.save(folder / "idle", parent=folder / "before")
    theirs = len(zstandard.ZstdCompressor(level=3).compress(stream.read_bytes())) / 1e6
    mb = {name: (folder / name).stat().st_blocks * 512 / 1e6 for name in ("before", "packed", "idle")}
    raw = stream.stat().st_size / 1e6
    return [
        ("raw", f"{mb['before']:.1f}", f"{raw:.1f}", f"{mb['before'] / raw:.2f}"),
        ("zstd", f"{mb['packed']:.1f}", f"{theirs:.1f}", f"{mb['packed'] / theirs:.2f}"),
        ("1 s of idling, as a difference", f"{mb['idle']:.1f}", "", ""),
    ]


if __name__ == "__main__":
    main(measure, rounds=5)
