"""A KVM CPU's state, to and from architectural `CpuState`. No KVM structure leaves this file.

Where the two differ: KVM has an `unusable` bit for a segment (VMX's word for one that is not present); x87 registers
come in stack order, ours in physical order; and events keep stale numbers when nothing is pending.
"""

from __future__ import annotations

import ctypes
from typing import Any

from kvmbackend import abi
from vmm.cpu.protocol import CpuState, EventState, FpuState, SegmentState, TableState
from vmm.cpu.validity import LMA
from vmm.errors import BackendError

_SEGMENTS = {name: "ldt" if name == "ldtr" else name for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")}
_TABLES = {"gdtr": "gdt", "idtr": "idt"}
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")

TSC = 0x10
MSRS = {
    "star": 0xC0000081,
    "lstar": 0xC0000082,
    "cstar": 0xC0000083,
    "sfmask": 0xC0000084,
    "kernel_gs_base": 0xC0000102,
    "tsc_aux": 0xC0000103,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
    "pat": 0x277,
}
_RESET = CpuState()

# Our state does not tell the shadow of STI from that of MOV SS. This one is valid whatever IF is (SDM vol. 3,
# 26.3.1.5).
_SHADOW_MOV_SS = 1


def save(vcpu: int, halted: bool, tsc: int) -> CpuState:
    """The state between two instructions, with no I/O outstanding. Raises BackendError."""
    regs, sregs, xsave = abi.Regs(), abi.Sregs(), abi.Xsave()
    debug, events = abi.DebugRegs(), abi.VcpuEvents()
    for what, request, into in (
        ("KVM_GET_REGS", abi.GET_REGS, regs),
        ("KVM_GET_SREGS", abi.GET_SREGS, sregs),
        ("KVM_GET_XSAVE", abi.GET_XSAVE, xsave),
        ("KVM_GET_DEBUGREGS", abi.GET_DEBUGREGS, debug),
        ("KVM_GET_VCPU_EVENTS", abi.GET_VCPU_EVENTS, events),
    ):
        abi.call(what, vcpu, request, into)
    values: dict[str, Any] = {name: getattr(regs, name) for name in abi.REGS}
    values |= {ours: _segment(getattr(sregs, theirs)) for ours, theirs in _SEGMENTS.items()}
    values |= {
        ours: TableState(base=table.base, limit=table.limit)
        for ours, theirs in _TABLES.items()
        for table in (getattr(sregs, theirs),)
    }
    values |= {name: getattr(sregs, name) for name in _CONTROL}
    values |= {f"dr{i}": debug.db[i] for i in range(4)}
    values |= {name: read_msr(vcpu, number, getattr(_RESET, name)) for name, number in MSRS.items()}
    return CpuState(
        **values,
        dr6=debug.dr6,
        dr7=debug.dr7,
        tsc=tsc,
        fpu=_fpu(xsave),
        event=_event(events),
        interrupt_shadow=bool(events.interrupt_shadow),
        nmi_blocked=bool(events.nmi_masked),
        halted=halted,
    )


def load(vcpu: int, state: CpuState, apic_base: int = 0) -> None:
    """Make `state` the CPU's; the TSC is left to the caller. Raises BackendError for what the host refuses.
    `apic_base` is IA32_APIC_BASE, which says whether CPUID shows an APIC.

    The order is KVM's: control registers before what they give a meaning to, events last."""
    sregs = abi.Sregs()
    abi.call("KVM_GET_SREGS", vcpu, abi.GET_SREGS, sregs)  # what is not ours in it stays
    for ours, theirs in _SEGMENTS.items():
        _set_segment(getattr(sregs, theirs), getattr(state, ours))
    if not state.efer & LMA:
        sregs.cs.l = 0  # means nothing there, and KVM wants it so
    sregs.tr.type |= 2  # busy, as LTR leaves it and as VMX demands; an older snapshot may say otherwise
    for ours, theirs in _TABLES.items():
        table = getattr(state, ours)
        setattr(sregs, theirs, abi.Table(base=table.base, limit=table.limit))
    for name in _CONTROL:
        setattr(sregs, name, getattr(state, name))
    sregs.apic_base = apic_base
    sregs.interrupt_bitmap = (ctypes.c_uint64 * 4)()
    abi.call("the segments and control registers are not valid together", vcpu, abi.SET_SREGS, sregs)
    regs = abi.Regs(*(getattr(state, name) for name in abi.REGS))
    abi.call("KVM_SET_REGS", vcpu, abi.SET_REGS, regs)
    abi.call("the x87 and SSE state is not valid", vcpu, abi.SET_XSAVE, _xsave(state.fpu))
    debug = abi.DebugRegs(dr6=state.dr6, dr7=state.dr7)
    debug.db[:] = (state.dr0, state.dr1, state.dr2, state.dr3)
    abi.call("the debug registers are not valid", vcpu, abi.SET_DEBUGREGS, debug)
    for name, number in MSRS.items():
        value = getattr(state, name)
        # A register the host has not got can only have its value at reset.
        if not write_msr(vcpu, number, value) and value != getattr(_RESET, name):
            raise BackendError(f"cpu.{name}: this host's KVM refuses {value:#x} for MSR {number:#x}")
    abi.call("the pending event is not valid", vcpu, abi.SET_VCPU_EVENTS, _events(state))


def set_apic_base(vcpu: int, value: int) -> None:
    """IA32_APIC_BASE, which KVM shows in CPUID and does no more with."""
    sregs = abi.Sregs()
    abi.call("KVM_GET_SREGS", vcpu, abi.GET_SREGS, sregs)
    sregs.apic_base = value
    abi.call("KVM_SET_SREGS", vcpu, abi.SET_SREGS, sregs)


def nmi_waits(vcpu: int) -> bool:
    """Whether an NMI that came now would have to: one is being handled, or taken."""
    events = abi.VcpuEvents()
    abi.call("KVM_GET_VCPU_EVENTS", vcpu, abi.GET_VCPU_EVENTS, events)
    return bool(events.nmi_masked or events.nmi_injected or events.nmi_pending)


def read_msr(vcpu: int, number: int, otherwise: int = 0) -> int:
    """An MSR's value; `otherwise` when the host has not got it."""
    msrs: Any = _OneMsr(nmsrs=1)
    msrs.entries[0].index = number
    return msrs.entries[0].data if abi.call("KVM_GET_MSRS", vcpu, abi.GET_MSRS, msrs) else otherwise


def write_msr(vcpu: int, number: int, value: int) -> bool:
    """Whether the host took the value."""
    msrs: Any = _OneMsr(nmsrs=1)
    msrs.entries[0].index, msrs.entries[0].data = number, value
    return bool(abi.call("KVM_SET_MSRS", vcpu, abi.SET_MSRS, msrs))


_OneMsr = abi.msrs(1)


def _segment(s: Any) -> SegmentState:
    return SegmentState(
        selector=s.selector,
        base=s.base,
        limit=s.limit,
        type=s.type,
        s=bool(s.s),
        dpl=s.dpl,
        present=bool(s.present) and not s.unusable,
        avl=bool(s.avl),
        long=bool(s.l),
        db=bool(s.db),
        granular=bool(s.g),
    )


def _set_segment(s: Any, state: SegmentState) -> None:
    s.selector, s.base, s.limit = state.selector, state.base, state.limit
    s.type, s.s, s.dpl, s.present = state.type, state.s, state.dpl, state.present
    s.avl, s.l, s.db, s.g, s.unusable = state.avl, state.long, state.db, state.granular, not state.present


def _fpu(x: Any) -> FpuState:
    top = x.fsw >> 11 & 7
    return FpuState(
        fcw=x.fcw,
        fsw=x.fsw,
        ftw=x.ftw,
        fop=x.fop & 0x7FF,
        fip=x.fip,
        fdp=x.fdp,
        st=tuple(bytes(x.st[i - top & 7][:10]) for i in range(8)),
        mxcsr=x.mxcsr,
        xmm=tuple(bytes(register) for register in x.xmm),
    )


def _xsave(fpu: FpuState) -> abi.Xsave:
    x: Any = abi.Xsave(fcw=fpu.fcw, fsw=fpu.fsw, ftw=fpu.ftw, fop=fpu.fop, fip=fpu.fip, fdp=fpu.fdp, mxcsr=fpu.mxcsr)
    top = fpu.fsw >> 11 & 7
    for i, value in enumerate(fpu.st):
        x.st[i - top & 7][:10] = value
    for i, value in enumerate(fpu.xmm):
        x.xmm[i][:] = value
    x.xstate_bv = 3  # x87 and SSE are in use: else the processor would take their values at reset
    return x  # type: ignore[no-any-return]


def _event(e: Any) -> EventState | None:
    if e.exception_injected or e.exception_pending:
        error = e.exception_error_code if e.exception_has_error_code else None
        return EventState(kind="exception", vector=e.exception_nr, error_code=error)
    if e.interrupt_injected:
        return EventState(kind="interrupt", vector=e.interrupt_nr)
    if e.nmi_injected or e.nmi_pending:
        return EventState(kind="nmi", vector=2)
    return None


def _events(state: CpuState) -> abi.VcpuEvents:
    e = abi.VcpuEvents(
        interrupt_shadow=_SHADOW_MOV_SS if state.interrupt_shadow else 0,
        nmi_masked=state.nmi_blocked,
        flags=abi.VALID_SHADOW | abi.VALID_NMI_PENDING,
    )
    match state.event:
        case EventState(kind="exception", vector=vector, error_code=error):
            e.exception_injected, e.exception_nr = 1, vector
            e.exception_has_error_code, e.exception_error_code = error is not None, error or 0
        case EventState(kind="interrupt", vector=vector):
            e.interrupt_injected, e.interrupt_nr = 1, vector
        case EventState(kind="software"):
            pass  # RIP is still at the INT n, which runs again; KVM tells of none itself
        case EventState(kind="nmi"):
            e.nmi_injected = 1
    return e
