"""How long a guest of 1 GiB that dirties its memory stands still for a checkpoint, against QEMU TCG's stop-and-save of
the same guest in the same run: Debian, 300 MB of files in RAM, copying them for ever.
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

from rich.console import Console

from bench.qemu import CMDLINE, Qemu, debian
from bench.save_restore import GOAL, main, timed
from snapshot.verify import verify
from vmm.cli import show
from vmm.control.supervisor import Supervisor
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig

MIB = 1024
DIRTY = (
    "mount -t tmpfs -o size=900m none /tmp; for i in $(seq 150); do cat /bin/busybox; done > /tmp/a; echo fil''led; "
    "while :; do cat /tmp/a > /tmp/b; done\n"
)


def measure(guest: Path, rounds: int, folder: Path, out: Console) -> None:
    image = Image.from_files(guest / "vmlinuz", guest / "initrd.img", CMDLINE)
    with out.status("booting both and filling their memory"):
        qemu = Qemu(folder, *debian(guest), memory_mib=MIB)
        qemu.until(GOAL.encode())
        qemu.type(DIRTY.encode())
        machine = Machine.boot(MachineConfig(memory_bytes=MIB << 20), image)
        machine.run(until=GOAL)
        machine.send(DIRTY.encode())
        machine.run(until="filled")
        qemu.until(b"filled")
    vm = Supervisor(machine)
    runner = threading.Thread(target=vm.run)
    runner.start()
    qemu("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    live, full, theirs = [], [], []
    for _ in range(rounds):
        qemu("stop")  # the other shall have the computer to itself
        time.sleep(0.3)
        live.append(vm.save(folder / "live").result())
        verify(folder / "live")
        full.append(vm.save(folder / "full", hold=True).result())
        vm.pause().result()
        qemu("cont")
        time.sleep(0.3)

        def migrate() -> None:
            qemu("stop")
            qemu("migrate", uri=f"exec:cat > {folder / 'stream'}")
            qemu.until_done()

        theirs.append(timed(migrate))
        vm.resume().result()
    vm.stop()
    runner.join()
    qemu.close()
    them = statistics.median(theirs)
    rows = []
    for what, saves in (("checkpoint", live), ("checkpoint --hold", full)):
        us = statistics.median(save["pause_s"] for save in saves) * 1e3
        rows.append((what, f"{us:.1f}", f"{us / them:.3f}"))
    rows.append(("QEMU: stop and save", f"{them:.1f}", "1"))
    show.table((f"{MIB} MiB guest, dirtying memory: the guest stands still", "ms", "of QEMU's"), rows)
    size, wall = (statistics.median(save[key] for save in live) for key in ("size_bytes", "wall_s"))
    show.line(f"a checkpoint is whole on disk after {wall:.2f} s: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main(measure, rounds=9)
