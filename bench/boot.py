"""Boot to shell, whole process, against QEMU TCG: same kernel, initrd, memory, one CPU, alternating in one run."""

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guest", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--append", default=CMDLINE)
    arguments = parser.parse_args()
    guest = arguments.guest
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        sys.exit("bench: no qemu-system-x86_64 here, so there is nothing to compare with")
    table = []
    for kernel in ("vmlinuz", "vmlinux"):
        common = ["-kernel", str(guest / kernel), "-initrd", str(guest / "initrd.img"), "-append", arguments.append]
        theirs = [qemu, "-accel", "tcg", "-m", "256", "-smp", "1", "-nographic", "-nic", "none", "-no-reboot", *common]
        ours = [sys.executable, "-m", "anyhyve", "run", "--memory", "256M", "--until", GOAL.decode(),
                *(a.replace("-kernel", "--kernel").replace("-initrd", "--initrd").replace("-append", "--append")
                  if a.startswith("-") else a for a in common)]  # fmt: skip
        rows = []
        for i in track(range(arguments.rounds), description=f"booting {kernel}", transient=True):
            pair = {id(command): until_shell(command) for command in ((ours, theirs) if i % 2 else (theirs, ours))}
            rows.append((pair[id(ours)], pair[id(theirs)]))
        us, them = (statistics.median(column) for column in zip(*rows, strict=True))
        ratios = [a / b for a, b in rows]  # of neighbours in time: the computer's own ups and downs cancel
        singles = " ".join(f"{ratio:.2f}" for ratio in ratios)
        table.append((kernel, f"{us:.2f}", f"{them:.2f}", f"{statistics.median(ratios):.2f}", singles))
    columns = "kernel", "anyhyve s (median)", "QEMU TCG s (median)", "ratio (median)", "ratios of single rounds"
    show.table(columns, table)


if __name__ == "__main__":
    main()
