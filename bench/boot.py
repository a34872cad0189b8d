"""Boot to shell, whole process, on both boards and on QEMU TCG: same kernel, initrd, memory, one CPU, taking turns in
one run."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import track

from vmm.cli import show

CMDLINE = "console=ttyS0 mitigations=off"
GOAL = b"shell ready"


def until_shell(command: list[str]) -> float:
    """Seconds from process start to the shell's banner on standard output."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # as installed: compiled once, not at every start
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout
    seen = b""
    while GOAL not in seen:
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            sys.exit(f"bench: {command[0]} ended before its shell: {seen[-300:].decode(errors='replace')}")
        seen += chunk
    wall = time.perf_counter() - started
    process.kill()
    process.wait()
    return wall


def contestants(qemu: str, guest: Path, kernel: str, append: str) -> dict[str, list[str]]:
    files = {"kernel": str(guest / kernel), "initrd": str(guest / "initrd.img"), "append": append}
    theirs = [qemu, "-accel", "tcg", "-m", "256", "-smp", "1", "-nographic", "-nic", "none", "-no-reboot"]
    ours = [sys.executable, "-m", "anyhyve", "run", "--memory", "256M", "--until", GOAL.decode()]
    for name, value in files.items():
        theirs += [f"-{name}", value]
        ours += [f"--{name}", value]
    return {"pc": [*ours, "--board", "pc"], "isapc": [*ours, "--board", "isapc"], "QEMU TCG": theirs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guest", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--append", default=CMDLINE)
    arguments = parser.parse_args()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        sys.exit("bench: no qemu-system-x86_64 here, so there is nothing to compare with")
    table = []
    for kernel in ("vmlinuz", "vmlinux"):
        commands = contestants(qemu, arguments.guest, kernel, arguments.append)
        order, rounds = list(commands), []
        for _ in track(range(arguments.rounds), description=f"booting {kernel}", transient=True):
            rounds.append({name: until_shell(commands[name]) for name in order})
            order = order[1:] + order[:1]
        for name, other in (("pc", "QEMU TCG"), ("pc", "isapc")):
            us, them = (statistics.median(row[which] for row in rounds) for which in (name, other))
            ratios = [row[name] / row[other] for row in rounds]  # neighbours in time: ups and downs cancel
            singles = " ".join(f"{ratio:.2f}" for ratio in ratios)
            ratio = f"{statistics.median(ratios):.2f}"
            table.append((kernel, f"{name} / {other}", f"{us:.2f}", f"{them:.2f}", ratio, singles))
    columns = "kernel", "which", "s (median)", "s of the other", "ratio (median)", "ratios of single rounds"
    show.table(columns, table)


if __name__ == "__main__":
    main()
