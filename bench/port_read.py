"""One port read through the bus, beside a bare Unicorn IN hook that returns 0."""

from __future__ import annotations

import statistics
import time

import unicorn
from unicorn import x86_const as x86

from vmm.cli import show
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig

READS = 200_000
# mov dx, 0x3fd; mov ecx, READS; again: in al, dx; dec ecx; jnz again; hlt
CODE = b"\x66\xba\xfd\x03\xb9" + READS.to_bytes(4, "little") + b"\xec\xff\xc9\x75\xfb\xf4"


def ours() -> float:
    """Microseconds a read of COM1's line status register."""
    with Machine.boot(MachineConfig(memory_bytes=4 << 20), Image(CODE, flat=True)) as machine:
        started = time.perf_counter()
        machine.run()
        return (time.perf_counter() - started) / READS * 1e6


def bare() -> float:
    engine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    engine.mem_map(0x100000, 0x1000)
    engine.mem_write(0x100000, CODE)
    engine.hook_add(unicorn.UC_HOOK_INSN, lambda *_: 0, None, 1, 0, x86.UC_X86_INS_IN)
    started = time.perf_counter()
    engine.emu_start(0x100000, 0)
    return (time.perf_counter() - started) / READS * 1e6


def main() -> None:
    rows = [(ours(), bare()) for _ in range(5)]
    us, them = (statistics.median(column) for column in zip(*rows, strict=True))
    show.line(f"one port read: {us:.2f} us through the bus, {them:.2f} us bare hook, ratio {us / them:.2f}")


if __name__ == "__main__":
    main()
