"""On KVM: a restore for growing RAM, which must be flat, and resets of a machine in one process: 100 pages dirtied by
the guest, then everything back. Needs /dev/kvm."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from vmm.cli import show
from vmm.errors import BackendError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig

PAGES, RESETS = 100, 300
# mov edi, 0x200000; mov ecx, PAGES; 1: inc dword [rdi]; add edi, 0x1000; dec ecx; jnz 1b; mov dx, 0x501; out dx, al
# then the same again
CODE = (
    b"\xbf\x00\x00\x20\x00\xb9" + PAGES.to_bytes(4, "little") + b"\xff\x07\x81\xc7\x00\x10\x00\x00\xff\xc9\x75\xf4"
    b"\x66\xba\x01\x05\xee\xeb\xe3"
)


def main() -> int:
    image = Image(CODE, flat=True)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = Path(folder, "guest")
        for mib in (256, 1024, 4096):
            try:
                with Machine.boot(MachineConfig(memory_bytes=mib << 20), image, "kvm") as machine:
                    machine.run()
                    machine.save(file)
            except BackendError as error:
                print(f"no figures for KVM: {error}")
                return 0
            times = []
            for _ in range(9):
                started = time.perf_counter()
                with Machine.restore(file, "kvm", max_memory=mib << 20) as woken:
                    woken.run()
                    times.append((time.perf_counter() - started) * 1e3)
            show.line(f"restore on KVM, file to first exit, {mib} MiB: {statistics.median(times):.1f} ms")
        with Machine.restore(file, "kvm", max_memory=4 << 30) as woken:
            moment = woken.moment()
            whole, back = [], []
            for _ in range(RESETS):
                started = time.perf_counter()
                woken.run()
                ran = time.perf_counter()
                dirty = woken.rewind(moment)
                whole.append(time.perf_counter() - started)
                back.append(time.perf_counter() - ran)
                assert dirty >= PAGES * 4096
        reset_ms = statistics.median(back) * 1e3
        show.line(
            f"reset with {PAGES} dirty pages: {reset_ms:.2f} ms, {1e3 / reset_ms:.0f} a second; "
            f"with the guest's run {1 / statistics.median(whole):.0f} a second"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
