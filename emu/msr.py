"""Model-specific registers of the CPU model, for RDMSR and WRMSR that the engine hands over.

Reads of FS.base, GS.base and KERNEL_GS_BASE stay with the engine, and where machine code can look at them (emu.native)
most writes too. Everything else comes here, and a number that is not in the table is #GP(0), as on hardware (SDM
vol. 2, RDMSR).
"""

from __future__ import annotations

from emu.asked import Asked
from emu.engine import Engine
from vmm.cpu import apic_msrs
from vmm.cpu.validity import EFER_BITS, canonical, pat_refused

BASES = (0xC0000100, 0xC0000101, 0xC0000102)  # the engine reads them, and writes what the machine code lets pass

_CANONICAL = (*BASES, 0xC0000082, 0xC0000083)


class Msrs:
    """`read` and `write` answer None/False for #GP(0)."""

    def __init__(self, engine: Engine, core: Asked) -> None:
        self._engine, self._core = engine, core
        self._fields = {
            0xC0000081: engine.u64("star"),
            0xC0000082: engine.u64("lstar"),
            0xC0000083: engine.u64("cstar"),
            0xC0000084: engine.u64("fmask"),
            0xC0000103: engine.u64("tsc_aux"),
            0x277: engine.u64("pat"),
        }

    def read(self, number: int) -> int | None:
        if number in self._fields:
            return self._fields[number].value
        if number == 0x10:
            return self._core.on.tsc()
        if number in (0x174, 0x175, 0x176, 0xC0000080):
            return self._engine.read_msr(number)
        apic = self._core.on.apic
        return None if apic is None else apic_msrs.read(apic, number)

    def write(self, number: int, value: int) -> bool:
        if number in _CANONICAL and not canonical(value):
            return False
        if number == 0xC0000103 and value >> 32:
            return False
        if number == 0x277 and pat_refused(value):
            return False
        if number in self._fields:
            self._fields[number].value = value & 0xFFFFFFFF if number == 0xC0000084 else value
        elif number == 0x10:
            self._core.on.write_tsc(value)
        elif number in BASES:
            self._engine.write_msr(number, value)
        elif number == 0xC0000080:
            old = self._engine.u64("efer").value
            if value & ~EFER_BITS or ((value ^ old) & 0x100 and self._engine.cr[0] >> 31 & 1):
                return False
            self._engine.write_msr(number, value & ~0x400 | old & 0x400)  # LMA is read-only
        elif number in (0x174, 0x175, 0x176):
            self._engine.write_msr(number, value & 0xFFFFFFFF)  # 32 bits on the model's vendor (APM vol. 2, 6.1.2)
        else:
            apic = self._core.on.apic
            return apic is not None and apic_msrs.write(apic, number, value)
        return True
