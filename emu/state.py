"""The emulated CPU's state, to and from architectural `CpuState`. No Unicorn byte leaves this file."""

from __future__ import annotations

from unicorn import x86_const as x86

from emu.engine import HF2_NMI, HF_INHIBIT_IRQ, RF, Engine
from emu.linear import MASK64
from vmm.cpu.protocol import CpuState, EventState, FpuState, SegmentState, TableState
from vmm.cpu.validity import LMA, MXCSR_BITS, RFLAGS_BITS, VM

_GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
_BUSY = 2 << 8  # of a TSS's type, in a segment's flags
_ENV_MSRS = {
    "star": "star",
    "lstar": "lstar",
    "cstar": "cstar",
    "sfmask": "fmask",
    "kernel_gs_base": "kernelgsbase",
    "pat": "pat",
    "tsc_aux": "tsc_aux",
}
_SYSENTER = {"sysenter_cs": 0x174, "sysenter_esp": 0x175, "sysenter_eip": 0x176}


def save(engine: Engine, tsc: int, halted: bool, event: EventState | None) -> CpuState:
    """The architectural state between two instructions. Changes nothing."""
    uc = engine.uc
    values: dict[str, object] = {name: engine.regs[i] for i, name in enumerate(_GPRS)}
    segments = {name: _segment(engine, name) for name in _SEGMENTS}
    for name, segment in segments.items():
        _complete(segment, busy=name == "tr")
    long_mode = bool(engine.u64("efer").value & LMA)
    code64 = long_mode and segments["cs"].long
    if code64:
        segments["cs"].db = False
    values |= segments
    values |= {name: TableState(base=s.base, limit=s.limit & 0xFFFF)
               for name in ("gdtr", "idtr") for s in (engine.segment(name),)}  # fmt: skip
    values |= {f"cr{i}": engine.cr[i] for i in (0, 2, 3, 4)}
    values |= {f"dr{i}": engine.dr[i] for i in (0, 1, 2, 3, 6, 7)}
    values |= {name: engine.u64(field).value for name, field in _ENV_MSRS.items()}
    values |= {name: engine.read_msr(number) for name, number in _SYSENTER.items()}
    return CpuState(
        **values,  # type: ignore[arg-type]
        rip=engine.eip.value & (MASK64 if code64 else 0xFFFFFFFF),
        rflags=uc.reg_read(x86.UC_X86_REG_RFLAGS) & RFLAGS_BITS & ~(VM if long_mode else 0),
        cr8=engine.cr8(),
        efer=engine.u64("efer").value,
        tsc=tsc,
        fpu=_fpu(engine),
        interrupt_shadow=bool(engine.hflags.value & HF_INHIBIT_IRQ),
        nmi_blocked=bool(engine.hflags2.value & HF2_NMI),
        event=event,
        halted=halted,
    )


def load(engine: Engine, state: CpuState) -> None:
    """Make `state` the engine's. Order matters: the hidden flags are derived from all the rest, and so come last."""
    uc = engine.uc
    engine.hflags.value &= ~HF_INHIBIT_IRQ
    engine.u64("efer").value = state.efer
    for i, value in ((0, state.cr0), (2, state.cr2), (3, state.cr3), (4, state.cr4)):
        engine.cr[i] = value
    engine.set_cr8(state.cr8)
    for i, name in enumerate(_GPRS):
        engine.regs[i] = getattr(state, name)
    for name in _SEGMENTS:
        _set_segment(engine, name, getattr(state, name))
    engine.segment("tr").flags &= ~_BUSY  # as this engine's LTR leaves it: it aborts where it finds another type
    for name, table in (("gdtr", state.gdtr), ("idtr", state.idtr)):
        segment = engine.segment(name)
        segment.base, segment.limit = table.base, table.limit
    engine.dr[6] = state.dr6
    for name, field in _ENV_MSRS.items():
        engine.u64(field).value = getattr(state, name)
    for name, number in _SYSENTER.items():
        engine.write_msr(number, getattr(state, name))
    uc.reg_write(x86.UC_X86_REG_RFLAGS, state.rflags)
    engine.eip.value = state.rip
    _set_fpu(engine, state.fpu)
    engine.hflags2.value = engine.hflags2.value & ~HF2_NMI | (HF2_NMI if state.nmi_blocked else 0)
    engine.settle_down()
    engine.update_hflags()
    engine.set_debug_registers((state.dr0, state.dr1, state.dr2, state.dr3), state.dr7)
    if state.interrupt_shadow or state.rflags & RF:  # RF too makes a block of one instruction
        engine.hflags.value |= HF_INHIBIT_IRQ
    engine.flush_tlb()


def _segment(engine: Engine, name: str) -> SegmentState:
    s = engine.segment(name)
    f = s.flags
    return SegmentState(
        selector=s.selector & 0xFFFF,
        base=s.base,
        limit=s.limit,
        type=f >> 8 & 15,
        s=bool(f >> 12 & 1),
        dpl=f >> 13 & 3,
        present=bool(f >> 15 & 1),
        avl=bool(f >> 20 & 1),
        long=bool(f >> 21 & 1),
        db=bool(f >> 22 & 1),
        granular=bool(f >> 23 & 1),
    )


def _complete(segment: SegmentState, busy: bool) -> None:
    """What loading marks in the hidden part too, and this engine in memory only: LTR a task as busy (SDM vol. 2), a far
    transfer a code segment as accessed."""
    if busy:
        segment.type |= 2
    elif segment.s and segment.present:
        segment.type |= 1


def _set_segment(engine: Engine, name: str, state: SegmentState) -> None:
    segment = engine.segment(name)
    segment.selector, segment.base, segment.limit = state.selector, state.base, state.limit
    segment.flags = (
        state.type << 8
        | state.s << 12
        | state.dpl << 13
        | state.present << 15
        | state.avl << 20
        | state.long << 21
        | state.db << 22
        | state.granular << 23
    )


def _fpu(engine: Engine) -> FpuState:
    uc = engine.uc
    fsw = uc.reg_read(x86.UC_X86_REG_FPSW)
    tags = uc.reg_read(x86.UC_X86_REG_FPTAG)  # two bits a physical register, 3 is empty
    return FpuState(
        fcw=uc.reg_read(x86.UC_X86_REG_FPCW) & 0xFFFF,
        fsw=fsw & 0xFFFF,
        ftw=sum(1 << i for i in range(8) if tags >> 2 * i & 3 != 3),
        fop=uc.reg_read(x86.UC_X86_REG_FOP) & 0x7FF,
        fip=uc.reg_read(x86.UC_X86_REG_FIP),
        fdp=uc.reg_read(x86.UC_X86_REG_FDP),
        st=tuple(_st(uc.reg_read(x86.UC_X86_REG_FP0 + i)) for i in range(8)),
        mxcsr=uc.reg_read(x86.UC_X86_REG_MXCSR) & MXCSR_BITS,
        xmm=tuple(uc.reg_read(x86.UC_X86_REG_XMM0 + i).to_bytes(16, "little") for i in range(16)),
    )


def _st(value: tuple[int, int]) -> bytes:
    mantissa, exponent = value
    return mantissa.to_bytes(8, "little") + (exponent & 0xFFFF).to_bytes(2, "little")


def _set_fpu(engine: Engine, fpu: FpuState) -> None:
    uc = engine.uc
    uc.reg_write(x86.UC_X86_REG_FPCW, fpu.fcw)
    uc.reg_write(x86.UC_X86_REG_FPSW, fpu.fsw)
    for i, value in enumerate(fpu.st):
        uc.reg_write(x86.UC_X86_REG_FP0 + i, (int.from_bytes(value[:8], "little"), int.from_bytes(value[8:], "little")))
    uc.reg_write(x86.UC_X86_REG_FPTAG, sum(3 << 2 * i for i in range(8) if not fpu.ftw >> i & 1))
    uc.reg_write(x86.UC_X86_REG_FOP, fpu.fop)
    uc.reg_write(x86.UC_X86_REG_FIP, fpu.fip)
    uc.reg_write(x86.UC_X86_REG_FDP, fpu.fdp)
    uc.reg_write(x86.UC_X86_REG_MXCSR, fpu.mxcsr)
    for i, register in enumerate(fpu.xmm):
        uc.reg_write(x86.UC_X86_REG_XMM0 + i, int.from_bytes(register, "little"))
