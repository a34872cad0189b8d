"""The main job, shown: boot, save in the middle, kill, wake in a new process, compare with an undisturbed run."""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

OWN = Path("fixtures", "guests", "own", "own.bin")
CMDLINE = "console=ttyS0 mitigations=off"


def anyhyve(*arguments: str | Path | int) -> dict[str, Any]:
    """One process of ours; its --json answer."""
    command = [sys.executable, "-m", "anyhyve", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"demo: {' '.join(map(str, arguments[:1]))} failed: {done.stderr.strip()}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guest", type=Path, required=True)
    guest = parser.parse_args().guest
    out = Console(soft_wrap=True)
    if (guest / "initrd.img").exists():
        boot: list[str | Path] = ["--kernel", guest / "vmlinuz", "--initrd", guest / "initrd.img", "--append", CMDLINE]
        goal, name = "shell ready", "Debian"
    else:
        out.print("[yellow]No Debian guest could be fetched: using the small guest of this repository.")
        boot = ["--kernel", OWN, "--flat", "--memory", "16M"]
        goal, name = "round 0040", "own guest"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "middle.snapshot"
        with out.status(f"booting {name} undisturbed"):
            whole = anyhyve("run", *boot, "--until", goal)
        out.print(f"undisturbed   {name} to {goal!r} in {whole['wall_s']:.1f} s, position {whole['position']:,}")
        with out.status("booting again, to save in the middle"):
            half = anyhyve("run", *boot, "--at", whole["position"] // 2, "--save", file)
        out.print(f"saved         at position {half['position']:,} ({half['position'] / whole['position']:.0%}), "
                  f"{file.stat().st_blocks * 512 / 1e6:.0f} MB on disk; that process has ended")  # fmt: skip
        with out.status("waking in a new process"):
            woken = anyhyve("restore", file, "--until", goal)
        out.print(f"woken         in a new process, to {goal!r} in {woken['wall_s']:.1f} s")
        if name == "Debian":
            out.print(f"the shell     answers: {command(file, goal)}")
        same = {k: woken["digest"][k] == whole["digest"][k] for k in ("ram", "cpu", "devices")}
        same["position"] = woken["position"] == whole["position"]
        out.print(f"compared      {', '.join(f'{k} {_word(v)}' for k, v in same.items())}")
        if not all(same.values()):
            sys.exit("demo: the woken machine differs from the undisturbed one")
        out.print("[green]verdict       a cut leaves no trace")
    for line in following(boot):
        out.print(line, markup=False, highlight=False)


def following(boot: list[str | Path]) -> list[str]:
    """How to go on from here: where the command is, and what to do with it next."""
    return [
        "the command   is .venv/bin/anyhyve, or anyhyve after: . .venv/bin/activate",
        f"try           .venv/bin/anyhyve run {shlex.join(map(str, boot))}    # Ctrl-] then q ends it",
    ]


def _word(equal: bool) -> str:
    return "equal" if equal else "DIFFERENT"


def command(file: Path, goal: str) -> str:
    """Wake the snapshot once more as a user would, type a command when the shell is there, and read the answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "anyhyve", "restore", str(file), "--pace", "max", "--until", "answer=[0-9]+ .*amd64"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin and isinstance(process.stdout, io.BufferedReader)
    seen, deadline = "", time.monotonic() + 60
    typed = False
    while (chunk := process.stdout.read1(4096).decode(errors="replace")) and time.monotonic() < deadline:
        seen += chunk
        if not typed and goal in seen:
            process.stdin.write(b"echo answer=$((6*7)) $(uname -srm)\n")
            process.stdin.flush()
            typed = True
    process.kill()
    found: list[str] = re.findall(r"answer=\d+ [^\r\n]*", seen)
    return found[-1] if found else sys.exit("demo: the woken shell did not answer")


if __name__ == "__main__":
    main()
