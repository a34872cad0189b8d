"""The KVM tests on any computer: QEMU emulates a processor with SVM, Debian's own kernel and KVM run on it, and this
project's tests run on those.

    python -m tests.emulated_kvm [--timeout SECONDS] [PYTEST ARGUMENTS]

The exit status is pytest's; its report comes back as guests/kvm-lane/report.xml. Needs qemu-system-x86_64 (Debian:
qemu-system-x86) and busybox (busybox-static). References: AMD APM vol. 2, chapter 15 (SVM); QEMU 7.2 target/i386.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.emulated_kvm.image import ROOT, build
from vmm.errors import BackendError, GuestError
from vmm.guest.debian import kernel_files

FOLDER = ROOT / "guests" / "kvm-lane"
REPORT = FOLDER / "report.xml"
DEFAULT = ["-q", "tests/vmm/cpu", "tests/vmm/machine", "tests/vmm/debug", "tests/vmm/saving", "-m", "kvm and not slow"]
ALWAYS = ["--require-kvm", "--hypothesis-profile=emulated", "-p", "no:cacheprovider", "--color=no",
          "--junitxml=/tmp/report.xml", "--basetemp=/tmp/pytest"]  # fmt: skip
MODULES = ("irqbypass.ko", "ccp.ko", "kvm.ko", "kvm-amd.ko")
QEMU = "qemu-system-x86_64"
ALIVE = FOLDER / "alive"  # grows while the computer does not stand still
STILL_S = 100


class Phases:
    """What took how long."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def done(self, what: str) -> None:
        now = time.monotonic()
        print(f"lane: {what}: {now - self._last:.1f} s", flush=True)
        self._last = now

    def whole(self) -> None:
        print(f"lane: whole: {time.monotonic() - self._started:.1f} s", flush=True)


def script(arguments: list[str]) -> str:
    """What runs inside: the tests, from the project's own folder."""
    python = shlex.quote(sys.executable)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": "/root", "TERM": "dumb",
        "PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
    }  # fmt: skip
    words = shlex.join([*(f"{name}={value}" for name, value in environment.items())])
    return f"cd {shlex.quote(str(ROOT))} && exec env {words} {python} -m pytest {shlex.join([*arguments, *ALWAYS])}\n"


class Console:
    """What the computer writes: the tests' output is shown as it comes, our own marks become phases."""

    def __init__(self, phases: Phases) -> None:
        self.lines = [""]
        self.status: int | None = None  # the tests' exit status, once it was said
        self._phases = phases
        self._inside = False
        self._shown = 0  # characters of the last line

    def take(self, text: str) -> None:
        first, *rest = text.replace("\r", "").split("\n")
        self.lines[-1] += first
        for line in rest:
            self._line()
            self.lines.append(line)
        if self._inside and not self.lines[-1].startswith("lane: "[: len(self.lines[-1])]):
            self._show("")

    def _line(self) -> None:
        """The last line is whole."""
        line = self.lines[-1]
        mark = line[line.find("lane: ") :] if "lane: " in line else ""
        if mark == "lane: up":
            self._phases.done("boot of the kernel")
        elif mark == "lane: kvm":
            self._phases.done("KVM loaded")
            self._inside = True
        elif found := re.fullmatch(r"lane: status (\d+)", mark):
            self._phases.done("tests")
            self._inside, self.status = False, int(found[1])
        elif self._inside:
            self._show("\n")
        self._shown = 0

    def _show(self, end: str) -> None:
        print(self.lines[-1][self._shown :], end=end, flush=True)
        self._shown = len(self.lines[-1])


def run(kernel: Path, initrd: Path, timeout_s: float, phases: Phases) -> int | None:
    """Boot, show what the tests print, and return their exit status; None when the computer stood still."""
    # One processor: with two, QEMU 7.2 often loses a timer interrupt to a nested guest, and all stands still. With one
    # it happens too, seldom; the sign of life stops then, which no test can bring about.
    command = [
        QEMU, "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "3G", "-nodefaults", "-nographic",
        "-no-reboot", "-serial", "stdio", "-serial", f"file:{REPORT}", "-serial", f"file:{ALIVE}",
        "-kernel", str(kernel), "-initrd", str(initrd),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
    ]  # fmt: skip
    ALIVE.write_bytes(b"")
    console = Console(phases)
    # A SIGTERM while it starts waits until there is somebody to switch it off.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, held),
    )  # fmt: skip
    clock = threading.Timer(timeout_s, process.kill)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        clock.start()
        assert process.stdout is not None
        output = process.stdout.fileno()
        while alive := time.time() - ALIVE.stat().st_mtime < STILL_S:
            if select.select([output], [], [], 5)[0]:
                if not (piece := os.read(output, 1 << 16)):
                    break
                console.take(piece.decode(errors="replace"))
    finally:
        timed_out = not clock.is_alive()
        clock.cancel()
        process.kill()
        process.wait()
    if console.status is not None:  # whatever became of the computer then
        return console.status
    if not alive and not timed_out:
        print(f"\nlane: the emulated computer has stood still for {STILL_S} s", file=sys.stderr)
        return None
    why = f"it was stopped after {timeout_s:.0f} s" if timed_out else "it ended by itself"
    tail = "\n".join(console.lines[-15:])
    print(f"lane: no exit status came back: {why}. The console's last lines:\n{tail}", file=sys.stderr)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.emulated_kvm", description="The KVM tests under emulated SVM.")
    parser.add_argument("--timeout", type=float, default=1500, help="seconds until the computer is switched off")
    options, arguments = parser.parse_known_args()
    for tool, package in ((QEMU, "qemu-system-x86"), ("busybox", "busybox-static")):
        if shutil.which(tool) is None:
            print(f"lane: {tool} is not here (Debian: {package})", file=sys.stderr)
            return 2
    phases = Phases()
    try:
        kernel_files(FOLDER, ("boot/vmlinuz-*", *(f"*/{name}*" for name in MODULES)))
    except GuestError as error:
        print(f"lane: no kernel: {error}", file=sys.stderr)
        return 2
    phases.done("kernel and modules")
    carried = _carried(phases)
    modules = {name: (FOLDER / name).read_bytes() for name in MODULES if (FOLDER / name).exists()}
    with tempfile.TemporaryDirectory(prefix="anyhyve-lane-") as scratch:
        initrd = Path(scratch, "initrd.img")
        initrd.write_bytes(build(modules, script(arguments or DEFAULT), carried))
        phases.done(f"image of {initrd.stat().st_size >> 20} MiB")
        status = run(FOLDER / "vmlinuz", initrd, options.timeout, phases)
        if status is None:
            print("lane: once more from the start", file=sys.stderr)
            status = run(FOLDER / "vmlinuz", initrd, options.timeout, phases)
    phases.whole()
    return 1 if status is None else status


def _carried(phases: Phases) -> list[Path]:
    """Guests for the tests inside, and snapshots the emulated CPU makes here: there it would boot for ten minutes."""
    from tests.vmm.machine.crossing import CARRIED, save_debian_at_its_shell

    guest = ROOT / "guests" / "debian"
    files = [path for path in (guest / "vmlinux", guest / "initrd.img") if path.exists()]
    if files:
        try:
            for board, file in CARRIED.items():
                save_debian_at_its_shell(guest, "emu", board, file)
        except (BackendError, GuestError) as error:
            print(f"lane: no snapshot to carry: {error}", file=sys.stderr)
            return files
        phases.done("snapshots on the emulated CPU")
        files += CARRIED.values()
    return files


def leave_at_sigterm() -> None:
    """An outer time limit ends us by SIGTERM: the computer and the scratch folder go too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    os.chdir(ROOT)
    leave_at_sigterm()
    sys.exit(main())
