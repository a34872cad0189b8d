"""Several CPUs: boots beside QEMU TCG, and what sharing one engine costs. All in one run, taking turns."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.progress import track

from bench.boot import CMDLINE, GOAL, contestants, until_shell
from emu.cpu import EmuCpu
from vmm.cli import show
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig
from vmm.testing.expect import Expect

CPUS = (1, 2, 4)
SWITCHES, REWINDS = 20_000, 500
FOUR = Path("fixtures", "guests", "four", "four.bin")
BUSY = "for n in 1 2; do ( i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done ) & done; wait"
CONTENTION = "for n in 1 2 3 4; do find /sys >/dev/null 2>&1 & done; wait"


def boots(qemu: str, guest: Path) -> dict[str, list[str]]:
    """Commands by name, for each number of CPUs."""
    found = {}
    for count in CPUS:
        commands = contestants(qemu, guest, "vmlinux", CMDLINE)
        theirs = [*commands["QEMU TCG"]]
        theirs[theirs.index("-smp") + 1] = str(count)
        found[f"ours, {count}"] = [*commands["pc"], "--cpus", str(count)]
        for thread in ("single", "multi") if count > 1 else ("single",):
            theirs[theirs.index("-accel") + 1] = f"tcg,thread={thread}"
            found[f"QEMU {thread}, {count}"] = [*theirs]
    return found


def at_shell(guest: Path, cpus: int) -> Machine:
    image = Image.from_files(guest / "vmlinux", guest / "initrd.img", CMDLINE)
    machine = Machine.boot(MachineConfig(memory_bytes=256 << 20, board="pc", cpus=cpus), image)
    machine.run(until=GOAL.decode())
    return machine


def command(machine: Machine, text: str) -> Callable[[], float]:
    """Host CPU seconds of a command at the guest's shell."""
    console = Expect(machine, seconds=600)

    def run() -> float:
        began = time.process_time()
        console.run(text)
        return time.process_time() - began

    return run


def switch_us(machine: Machine) -> float:
    """One change of the CPU that is on the engine."""
    first, second = machine.cpus[0], machine.cpus[1]
    assert isinstance(first, EmuCpu) and isinstance(second, EmuCpu)
    core = first._core
    began = time.process_time()
    for _ in range(SWITCHES // 2):
        core.put_on(second)
        core.put_on(first)
    return (time.process_time() - began) / SWITCHES * 1e6


def rewind_us(cpus: int) -> float:
    """The way back over a millisecond of all CPUs' work, without it."""
    config = MachineConfig(memory_bytes=4 << 20, board="pc", cpus=cpus)
    with Machine.boot(config, Image.from_files(FOUR, flat=True)) as machine:
        machine.run(until_ns=5_000_000)
        moment, taken = machine.moment(), []
        for _ in range(REWINDS):
            machine.run(until_ns=6_000_000)
            began = time.perf_counter()
            machine.rewind(moment)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guest", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        sys.exit("bench: no qemu-system-x86_64 here, so there is nothing to compare with")
    commands = boots(qemu, arguments.guest)
    rounds = [
        {name: until_shell(words) for name, words in commands.items()}
        for _ in track(range(arguments.rounds), description="booting", transient=True)
    ]
    median = {name: statistics.median(row[name] for row in rounds) for name in commands}
    table = []
    for count in CPUS:
        for other in [name for name in commands if name.startswith("QEMU") and name.endswith(f" {count}")]:
            ratio = statistics.median(row[f"ours, {count}"] / row[other] for row in rounds)
            table.append((f"boot, {other}", f"{median[f'ours, {count}']:.2f}", f"{median[other]:.2f}", f"{ratio:.2f}"))
    for what, text, cpus in (("two busy processes", BUSY, 2), ("4 times find over /sys", CONTENTION, 4)):
        with at_shell(arguments.guest, cpus) as several, at_shell(arguments.guest, 1) as one:
            ours, theirs = command(several, text), command(one, text)
            pairs = [(ours(), theirs()) for _ in track(range(arguments.rounds), description=what, transient=True)]
            us, them = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            table.append((f"{what}, {cpus} CPUs / 1", f"{us:.2f}", f"{them:.2f}", f"{ratio:.2f}"))
            if cpus == 2:
                switch = switch_us(several)
    rewinds = [(rewind_us(4), rewind_us(1)) for _ in range(arguments.rounds)]
    four, one_us = (statistics.median(side) for side in zip(*rewinds, strict=True))
    ratio = statistics.median(a / b for a, b in rewinds)
    table.append(("rewind, 4 CPUs / 1", f"{four / 1e6:.6f}", f"{one_us / 1e6:.6f}", f"{ratio:.2f}"))
    show.table(("what", "s (median)", "s of the other", "ratio (median)"), table)
    show.line(f"one change of the CPU on the engine: {switch:.1f} us")


if __name__ == "__main__":
    main()
