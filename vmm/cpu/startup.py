"""What INIT and a start-up message make of a CPU (SDM vol. 3, table 10-1 and 9.4)."""

from __future__ import annotations

from dataclasses import replace

from vmm.cpu.model import CPUID
from vmm.cpu.protocol import Apic, Cpu, CpuState, SegmentState

_CACHE = 3 << 29  # CR0.CD and CR0.NW, which INIT leaves as they are
_KEPT = ("star", "lstar", "cstar", "sfmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip", "pat",
         "tsc_aux", "tsc", "fpu")  # fmt: skip


def reset() -> CpuState:
    """A CPU behind RESET: its family, model and stepping are in EDX."""
    return CpuState(rdx=CPUID[1][0])


def init(before: CpuState) -> CpuState:
    """A CPU behind INIT: as behind RESET, but for its model-specific registers, time-stamp counter, FPU and caches."""
    kept = {name: getattr(before, name) for name in _KEPT}
    return replace(reset(), cr0=before.cr0 & _CACHE | 0x10, **kept)


def start_up(before: CpuState, vector: int) -> CpuState:
    """A CPU that waited for it and gets a start-up message: it begins at 4096 times the vector, in real mode."""
    return replace(before, cs=SegmentState(selector=vector << 8, base=vector << 12, type=11), rip=0, halted=False)


def begin_anew(cpu: Cpu, apic: Apic) -> None:
    """Do the INIT that waits at a CPU's local APIC, and the start-up message that it waits for. The first CPU runs on
    from an INIT, the others wait."""
    if apic.take_init():
        cpu.load(replace(init(cpu.save()), halted=apic.number != 0))
    if (vector := apic.take_sipi()) is not None:
        cpu.load(start_up(cpu.save(), vector))
