"""One port read on KVM: the whole way to the UART's line status register, beside a C loop that answers the same
exits of the same guest. Both in one machine, in turns. Needs /dev/kvm and a C compiler."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vmm.cli import show
from vmm.errors import BackendError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig

READS, ROUNDS = 20_000, 9
# mov dx, 0x3fd; again: mov ecx, READS; 1: in al, dx; dec ecx; jnz 1b; out 0x501 by dx; jmp again
CODE = b"\x66\xba\xfd\x03\xb9" + READS.to_bytes(4, "little") + b"\xec\xff\xc9\x75\xfb\x66\xba\x01\x05\xee\xeb\xeb"


def c_loop() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "reads.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        return ctypes.CDLL(str(library)).reads


def main() -> int:
    try:
        machine = Machine.boot(MachineConfig(memory_bytes=4 << 20), Image(CODE, flat=True), "kvm")
    except BackendError as error:
        print(f"no figure for KVM: {error}")
        return 0
    bare = c_loop()
    with machine:
        cpu: Any = machine.cpu
        shared = ctypes.addressof(ctypes.c_char.from_buffer(cpu._vcpu._shared))
        rows = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            machine.run()
            ours = time.perf_counter() - started
            cpu._alarm.set(0)  # C has no use for the end of our time slice
            cpu._alarm.quiet()
            started = time.perf_counter()
            count = bare(cpu._fd, ctypes.c_void_p(shared), READS)
            theirs = time.perf_counter() - started
            assert count == READS
            machine.run()  # to the end of the round that C began
            rows.append((ours / READS * 1e6, theirs / READS * 1e6))
    us, them = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(a / b for a, b in rows)
    show.line(f"one port read on KVM: {us:.1f} us, {them:.1f} us in C, ratio {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
