"""A Debian guest with a program that keeps known values in x87 and SSE registers (floats.S), saved while it runs."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.conftest import ROOT
from vmm.errors import GuestError
from vmm.guest.image import Image
from vmm.guest.newc import Archive
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason

BOARDS = ("isapc", "pc")
# Made by the emulated CPU of one computer, for the KVM of another (tests/emulated_kvm).
CARRIED = {board: ROOT / "guests" / "kvm-lane" / f"sums.{board}.snapshot" for board in BOARDS}
COMMAND = b"kept=anyhyve; floats & echo half=$kept\n"


def build_floats(folder: Path) -> Path:
    """The program. Raises GuestError where there is no assembler."""
    for tool in ("as", "ld"):
        if shutil.which(tool) is None:
            raise GuestError(f"no {tool} here (Debian: binutils)")
    source = Path(__file__).parent / "floats.S"
    subprocess.run(["as", "--64", "-o", folder / "floats.o", source], check=True)
    subprocess.run(["ld", "-o", folder / "floats", folder / "floats.o"], check=True)
    return folder / "floats"


def sums(program: Path, count: int) -> list[bytes]:
    """The first lines it prints, by running it on this computer's processor."""
    with subprocess.Popen([program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        found = [line.split()[1] for line in itertools.islice(process.stdout, count)]
        process.kill()
    return found


def boot_debian(folder: Path, program: Path, backend: str, board: str) -> Machine:
    extra = Archive()
    extra.file("bin/floats", program.read_bytes(), 0o755)
    initrd = (folder / "initrd.img").read_bytes()
    initrd += bytes(-len(initrd) % 4) + bytes(extra)  # the kernel looks for another archive at multiples of four
    image = Image((folder / "vmlinux").read_bytes(), initrd=initrd, cmdline="console=ttyS0 mitigations=off quiet")
    return Machine.boot(MachineConfig(memory_bytes=128 << 20, board=board), image, backend)


def save_debian_at_its_shell(folder: Path, backend: str, board: str, file: Path) -> None:
    """Saves the guest at the shell, before the program starts."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        boot_debian(folder, build_floats(Path(scratch)), backend, board) as machine,
    ):
        assert machine.run(until="shell ready") == Stopped(StopReason.PATTERN)
        machine.save(file, packed=True)
