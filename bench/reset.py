"""Resets of a machine in one process, with CPU and all devices, against QEMU's `loadvm`: a guest that dirties so many
pages in a loop, from the mark to its next exit and back. And whether the memory stays flat.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from bench.qemu import Qemu
from bench.save_restore import timed
from vmm.cli import show
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped

ROUNDS, BATCH = 7, 300


def dirtying(pages: int) -> bytes:
    """mov edi, 0x200000; mov ecx, pages; 1: inc dword [rdi]; add edi, 0x1000; dec ecx; jnz 1b; mov dx, 0x501;
    out dx, al; and again. The same guest as bench.kvm_restore's."""
    return (
        b"\xbf\x00\x00\x20\x00\xb9" + pages.to_bytes(4, "little") + b"\xff\x07\x81\xc7\x00\x10\x00\x00\xff\xc9\x75\xf4"
        b"\x66\xba\x01\x05\xee\xeb\xe3"
    )


def rates(pages: int, batch: int, verify: bool) -> list[float]:
    """Resets a second, of each round."""
    found = []
    with Machine.boot(MachineConfig(memory_bytes=16 << 20), Image(dirtying(pages), flat=True)) as machine:
        stop = machine.run()
        assert isinstance(stop, Stopped) and stop.reason == "exit"
        moment = machine.moment()
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for _ in range(batch):
                machine.run()
                written = machine.rewind(moment, verify=verify)
            found.append(batch / (time.perf_counter() - started))
        assert written >= pages * 4096 and isinstance(machine.run(), Stopped)
    return found


def loadvms(pages: int, folder: Path) -> float:
    """Milliseconds of QEMU's `loadvm`, with the same loop as a multiboot kernel dirtying pages in between."""
    loop = dirtying(pages)[:21]
    address, size = 0x100000, 32
    header = struct.pack("<3I5I", 0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000) & 0xFFFFFFFF,
                         address, address, 0, 0, address + size)  # fmt: skip
    kernel, disk = folder / "kernel", folder / "disk"
    kernel.write_bytes(header + loop + b"\xeb" + (-(len(loop) + 2) & 0xFF).to_bytes(1, "little"))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    qemu = Qemu(folder, "-kernel", str(kernel), "-drive", f"file={disk},if=none,format=qcow2", memory_mib=16)
    time.sleep(2)  # its firmware
    qemu("human-monitor-command", **{"command-line": "savevm mark"})
    taken = []
    for _ in range(20):
        time.sleep(0.005)
        taken.append(timed(lambda: qemu("human-monitor-command", **{"command-line": "loadvm mark"})))
    assert qemu("query-status")["running"]
    qemu.close()
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verify-reset", action="store_true", help="compare everything after each; slow")
    parser.add_argument("--million", action="store_true", help="a million resets, and the memory they took")
    arguments = parser.parse_args()
    rows = []
    qemu = shutil.which("qemu-img") is not None and shutil.which("qemu-system-x86_64") is not None
    for pages in (1, 10, 50, 200):
        us = statistics.median(rates(pages, BATCH, arguments.verify_reset))
        with tempfile.TemporaryDirectory(dir=".") as folder:
            them = 1e3 / loadvms(pages, Path(folder)) if qemu else None
        theirs = ("no QEMU here", "") if them is None else (f"{them:,.0f}", f"{us / them:.0f}")
        rows.append((pages, f"{us:,.0f}", *theirs))
    show.table(("dirty pages", "resets/s, with the run", "QEMU loadvm/s, without", "times"), rows)
    if arguments.million:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        rates(10, 1_000_000 // ROUNDS + 1, False)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        show.line(f"a million resets: {time.perf_counter() - started:.0f} s, memory grew by {grown} KiB")


if __name__ == "__main__":
    main()
