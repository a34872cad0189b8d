"""Which architectural states a CPU can be in (SDM vol. 3, 2.5, 17.2 and 26.3).

Both backends refuse the rest before anything is made, in the same words: a state that contradicts itself would make one
CPU raise exceptions for ever, another refuse to run, and a third abort. The same rules decide where an instruction that
loads one of these registers raises #GP.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmm.cpu.model import PHYS_BITS
from vmm.cpu.protocol import CpuState, EventState, SegmentState

PE, ET, NW, CD, PG = 1 << 0, 1 << 4, 1 << 29, 1 << 30, 1 << 31
CR0_BITS = PE | 0x3E | 1 << 16 | 1 << 18 | NW | CD | PG  # PE MP EM TS ET NE, WP, AM
PAE = 1 << 5
CR4_BITS = 0x7FF  # VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT
SCE, LME, LMA, NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11
EFER_BITS = SCE | LME | LMA | NXE
IF, VM = 1 << 9, 1 << 17
RFLAGS_BITS, RFLAGS_ONES = 0x3F7FD7, 2
DR6_BITS, DR6_ONES = 0xE00F, 0xFFFF0FF0
DR7_BITS, DR7_ONES = 0xFFFF23FF, 0x400
MXCSR_BITS = 0xFFFF
PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))

WITH_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17))
_MAIN = ("es", "cs", "ss", "ds", "fs", "gs")
_VM86 = SegmentState(limit=0xFFFF, type=3, s=True, dpl=3)
_CODE, _READABLE = 8, 2  # of a segment's type


def canonical(address: int) -> bool:
    return address >> 47 in (0, 0x1FFFF)


def control_refusal(cr0: int, cr3: int, cr4: int, efer: int) -> str | None:
    """Why these control registers cannot be together; None when they can."""
    if cr0 & ~CR0_BITS:
        return f"cr0: bits {cr0 & ~CR0_BITS:#x} are reserved"
    if cr0 & PG and not cr0 & PE:
        return "cr0: PG without PE"
    if cr0 & NW and not cr0 & CD:
        return "cr0: NW without CD"
    if cr3 >> PHYS_BITS:
        return f"cr3: {cr3:#x} is beyond {PHYS_BITS} bits of physical address"
    if cr4 & ~CR4_BITS:
        return f"cr4: bits {cr4 & ~CR4_BITS:#x} are reserved on this model"
    if efer & ~EFER_BITS:
        return f"efer: bits {efer & ~EFER_BITS:#x} are reserved on this model"
    if bool(efer & LMA) != bool(efer & LME and cr0 & PG):
        return "efer: LMA is not LME and cr0.PG"
    if efer & LMA and not cr4 & PAE:
        return "cr4: no PAE in long mode"
    return None


def pat_refused(value: int) -> bool:
    return any(value >> 8 * i & 0xFF not in PAT_TYPES for i in range(8))


def refusal(state: CpuState) -> str | None:
    """Why no CPU of this model can be in that state, naming the field; None when one can."""
    wrong = control_refusal(state.cr0, state.cr3, state.cr4, state.efer) or next(_wrong(state), None)
    return None if wrong is None else f"cpu.{wrong}"


def _wrong(state: CpuState) -> Iterator[str]:
    long_mode, protected = bool(state.efer & LMA), bool(state.cr0 & PE)
    code64 = long_mode and state.cs.long
    yield from _wrong_flags(state, long_mode, protected)
    if code64 and state.rip >> 48 not in (0, 0xFFFF):
        yield f"rip: {state.rip:#x} is no canonical address"
    if not code64 and state.rip >> 32:
        yield f"rip: {state.rip:#x} is beyond 32 bits"
    for name, zeros, ones in (("dr6", ~(DR6_BITS | DR6_ONES), DR6_ONES), ("dr7", ~(DR7_BITS | DR7_ONES), DR7_ONES)):
        value = getattr(state, name)
        if value & zeros or value & ones != ones:
            yield f"{name}: {value:#x} has reserved bits that are not as they must be"
    if state.fpu.mxcsr & ~MXCSR_BITS:
        yield f"fpu.mxcsr: bits {state.fpu.mxcsr & ~MXCSR_BITS:#x} are reserved"
    for name in ("lstar", "cstar", "kernel_gs_base", "sysenter_esp", "sysenter_eip"):
        if not canonical(getattr(state, name)):
            yield f"{name}: {getattr(state, name):#x} is no canonical address"
    if pat_refused(state.pat):
        yield f"pat: {state.pat:#x} has a memory type there is not"
    if state.tsc_aux >> 32:
        yield f"tsc_aux: {state.tsc_aux:#x} is beyond 32 bits"
    for name in ("gdtr", "idtr"):
        if not canonical(getattr(state, name).base):
            yield f"{name}.base: {getattr(state, name).base:#x} is no canonical address"
    yield from _wrong_segments(state, long_mode, protected)
    if state.event is not None:
        yield from _wrong_event(state, state.event, protected)


def _wrong_flags(state: CpuState, long_mode: bool, protected: bool) -> Iterator[str]:
    if state.rflags & ~RFLAGS_BITS or not state.rflags & RFLAGS_ONES:
        yield f"rflags: {state.rflags:#x} has reserved bits that are not as they must be"
    if state.rflags & VM and long_mode:
        yield "rflags: VM in long mode"
    if state.rflags & VM and not protected:
        yield "rflags: VM in real mode"


def _wrong_segments(state: CpuState, long_mode: bool, protected: bool) -> Iterator[str]:
    virtual = bool(state.rflags & VM)
    for name in (*_MAIN, "ldtr", "tr"):
        segment = getattr(state, name)
        if name in ("fs", "gs", "ldtr", "tr"):
            if segment.present and not canonical(segment.base):
                yield f"{name}.base: {segment.base:#x} is no canonical address"
        elif segment.base >> 32 and (segment.present or name == "cs"):
            yield f"{name}.base: {segment.base:#x} is beyond 32 bits"
        if segment.present and (
            (segment.limit & 0xFFF != 0xFFF and segment.granular) or (segment.limit >> 20 and not segment.granular)
        ):
            yield f"{name}.limit: {segment.limit:#x} is none that a descriptor can say"
    if state.ldtr.present and (state.ldtr.s or state.ldtr.type != 2):
        yield f"ldtr.type: {state.ldtr.type} is no LDT"
    if not state.tr.present or state.tr.s or state.tr.type | 2 not in ((11,) if long_mode else (3, 11)):
        yield f"tr.type: {state.tr.type} is no task state segment"
    if virtual:
        for name in _MAIN:
            segment = getattr(state, name)
            if segment.base != segment.selector << 4 or not _is_vm86(segment):
                yield f"{name}: not as virtual-8086 mode has it"
        return
    code, stack = state.cs, state.ss
    if not (code.present and code.s and (code.type & _CODE or code.type & 0xB == 3)):
        yield f"cs.type: {code.type} is no code segment"
    if long_mode and code.long and code.db:
        yield "cs: L and D together"
    if stack.present and not (stack.s and stack.type & (_CODE | _READABLE) == 2):
        yield f"ss.type: {stack.type} is no stack segment"
    for name in ("ds", "es", "fs", "gs"):
        segment = getattr(state, name)
        if segment.present and not (segment.s and (not segment.type & _CODE or segment.type & _READABLE)):
            yield f"{name}.type: {segment.type} cannot be read"
    level = stack.dpl
    if not protected and level:
        yield f"ss.dpl: {level} in real mode"
    if protected and code.type & _CODE and (code.dpl > level if code.type & 4 else code.dpl != level):
        yield f"cs.dpl: {code.dpl} where the stack is of level {level}"
    if protected and not code.type & _CODE and level:
        yield f"cs.type: {code.type} at level {level}"


def _is_vm86(segment: SegmentState) -> bool:
    return (segment.limit, segment.type | 1, segment.s, segment.dpl, segment.present) == (
        _VM86.limit, _VM86.type, _VM86.s, _VM86.dpl, _VM86.present,
    )  # fmt: skip


def _wrong_event(state: CpuState, event: EventState, protected: bool) -> Iterator[str]:
    error = event.error_code
    match event.kind:
        case "nmi" if event.vector != 2:
            yield f"event.vector: {event.vector} is not NMI's"
        case "exception" if event.vector > 31 or event.vector == 2:
            yield f"event.vector: {event.vector} is no exception's"
        case "interrupt" if not state.rflags & IF or state.interrupt_shadow:
            yield "event: an interrupt was accepted while none can be"
    wanted = event.kind == "exception" and protected and event.vector in WITH_ERROR_CODE
    if (error is not None) != wanted or (error or 0) >> 16:
        yield f"event.error_code: {error}, of {event.kind} {event.vector}"
