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

from rich.console import Console
from rich.progress import track
from rich.table import Table

CMDLINE = "console=ttyS0 mitigations=off"
GOAL = b"shell ready"


def until_shell(command: list[str]) -> float:
    """Seconds from process start to the shell's banner on standard output."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
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
    table = Table("kernel", "anyhyve s (median)", "QEMU TCG s (median)", "ratio", "ratios of single rounds")
    for kernel in ("vmlinuz", "vmlinux"):
        common = ["-kernel", str(guest / kernel), "-initrd", str(guest / "initrd.img"), "-append", arguments.append]
        theirs = [qemu, "-accel", "tcg", "-m", "256", "-smp", "1", "-nographic", "-nic", "none", "-no-reboot", *common]
        ours = [sys.executable, "-m", "vmm", "run", "--memory", "256M", "--until", GOAL.decode(),
                *(a.replace("-kernel", "--kernel").replace("-initrd", "--initrd").replace("-append", "--append")
                  if a.startswith("-") else a for a in common)]  # fmt: skip
        rows = []
        for _ in track(range(arguments.rounds), description=f"booting {kernel}", transient=True):
            rows.append((until_shell(ours), until_shell(theirs)))
        us, them = (statistics.median(column) for column in zip(*rows, strict=True))
        singles = " ".join(f"{a / b:.2f}" for a, b in rows)
        table.add_row(kernel, f"{us:.2f}", f"{them:.2f}", f"{us / them:.2f}", singles)
    Console().print(table)


if __name__ == "__main__":
    main()
