"""The CPU protocol: what a backend must do, and the architectural state every backend translates to and from.

`run()` returns only between two instructions with no I/O outstanding, so every return is a place to save.
Why I/O is not an Exit: on KVM an IN has not yet advanced RIP when it exits, and on Unicorn a stop inside an I/O hook
re-executes; so the backend finishes the instruction itself, through the bus it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from snapshot.field_types import OneOf, Size, u2, u4, u8, u16, u32, u64
from snapshot.schema import state
from vmm.wires import CpuPins


@dataclass(frozen=True)
class Expired:
    """The limit is reached, between two blocks."""


@dataclass(frozen=True)
class Reached:
    """The position asked for, perhaps inside a block. Nothing may happen to the machine before the next run()."""


@dataclass(frozen=True)
class Halted:
    """HLT with nothing to wake it yet."""


@dataclass(frozen=True)
class Kicked:
    """Another thread called kick()."""


@dataclass(frozen=True)
class Shutdown:
    """A triple fault."""


@dataclass(frozen=True)
class Crashed:
    """The backend cannot go on: `why` in one line."""

    rip: int
    why: str


Exit = Expired | Reached | Halted | Kicked | Shutdown | Crashed


class IoBus(Protocol):
    """The backend performs I/O itself, through the bus it was given, inside run(). Sizes in bytes."""

    def port_in(self, port: int, size: int) -> int: ...
    def port_out(self, port: int, size: int, value: int) -> None: ...
    def mmio_read(self, addr: int, size: int) -> int: ...
    def mmio_write(self, addr: int, size: int, value: int) -> None: ...


class Apic(Protocol):
    """What a CPU has of its local APIC besides the registers in memory (SDM vol. 3, 11.4.4, 11.5.4.1, 11.8.6)."""

    number: int  # of the CPU,
    cpus: int  # of how many

    def base(self) -> int: ...  # IA32_APIC_BASE
    def set_base(self, value: int) -> bool: ...  # False: #GP
    def deadline_msr(self) -> int: ...  # IA32_TSC_DEADLINE
    def set_deadline_msr(self, value: int) -> None: ...
    def tsc_moved(self) -> None: ...  # the TSC was written
    def task_priority(self) -> int: ...  # CR8
    def set_task_priority(self, value: int) -> None: ...
    def waits_for_task_priority(self) -> bool: ...  # an interrupt does, for a lower one
    def take_nmi(self) -> bool: ...  # whether one waits: it waits no more
    def begins_anew(self) -> bool: ...  # an INIT, or a start-up message that is waited for, is there
    def take_init(self) -> bool: ...
    def take_sipi(self) -> int | None: ...  # its vector


class Intr(Protocol):
    """The interrupt controller behind the INTR pin; the CPU pulls when it can take an interrupt."""

    @property
    def apic(self) -> Apic | None: ...  # None where the CPU has none
    def pending(self) -> bool: ...
    def acknowledge(self) -> int: ...  # INTA: the vector


@state("cpu.segment", version=1)
class SegmentState:
    """A segment register with its hidden part (SDM vol. 3, 3.4.3)."""

    selector: Annotated[u16, "visible selector"] = 0
    base: Annotated[u64, "hidden base"] = 0
    limit: Annotated[u32, "hidden limit in bytes, granularity applied"] = 0xFFFF
    type: Annotated[u4, "descriptor type"] = 3
    s: Annotated[bool, "code or data (not system)"] = True
    dpl: Annotated[u2, "privilege level"] = 0
    present: Annotated[bool, "descriptor present"] = True
    avl: Annotated[bool, "available to software"] = False
    long: Annotated[bool, "64-bit code"] = False
    db: Annotated[bool, "32-bit default size"] = False
    granular: Annotated[bool, "limit counted in pages"] = False


@state("cpu.table", version=1)
class TableState:
    """GDTR or IDTR."""

    base: Annotated[u64, "linear base"] = 0
    limit: Annotated[u16, "limit in bytes"] = 0xFFFF


@state("cpu.event", version=1)
class EventState:
    """An event that was accepted but not yet delivered (SDM vol. 3, 6.14)."""

    kind: Annotated[str, OneOf(("interrupt", "nmi", "exception", "software")), "what it is"]
    vector: Annotated[u8, "IDT vector"]
    error_code: Annotated[u32 | None, "pushed error code, if it has one"] = None


@state("cpu.fpu", version=1)
class FpuState:
    """x87 and SSE state, as FXSAVE64 shows it (SDM vol. 1, 10.5.1)."""

    fcw: Annotated[u16, "control word"] = 0x37F
    fsw: Annotated[u16, "status word with TOP"] = 0
    ftw: Annotated[u8, "abridged tag word: bit i set when physical register i is in use"] = 0
    fop: Annotated[u16, "last opcode"] = 0
    fip: Annotated[u64, "last instruction pointer"] = 0
    fdp: Annotated[u64, "last data pointer"] = 0
    st: Annotated[tuple[Annotated[bytes, Size(10)], ...], Size(8), "R0..R7, physical order, 80 bits each"] = (
        bytes(10),
    ) * 8
    mxcsr: Annotated[u32, "SSE control and status"] = 0x1F80
    xmm: Annotated[tuple[Annotated[bytes, Size(16)], ...], Size(16), "XMM0..XMM15"] = (bytes(16),) * 16


def _code() -> SegmentState:
    return SegmentState(selector=0xF000, base=0xFFFF0000, type=11)


def _system(type: int) -> SegmentState:
    return SegmentState(type=type, s=False)


@state("cpu.x86_64", version=1)
class CpuState:
    """One CPU's architectural state between two instructions. Defaults are those of RESET (SDM vol. 3, table 9-1)."""

    rax: u64 = 0
    rbx: u64 = 0
    rcx: u64 = 0
    rdx: u64 = 0
    rsi: u64 = 0
    rdi: u64 = 0
    rbp: u64 = 0
    rsp: u64 = 0
    r8: u64 = 0
    r9: u64 = 0
    r10: u64 = 0
    r11: u64 = 0
    r12: u64 = 0
    r13: u64 = 0
    r14: u64 = 0
    r15: u64 = 0
    rip: u64 = 0xFFF0
    rflags: u64 = 2
    es: SegmentState = field(default_factory=SegmentState)
    cs: SegmentState = field(default_factory=_code)
    ss: SegmentState = field(default_factory=SegmentState)
    ds: SegmentState = field(default_factory=SegmentState)
    fs: SegmentState = field(default_factory=SegmentState)
    gs: SegmentState = field(default_factory=SegmentState)
    ldtr: SegmentState = field(default_factory=lambda: _system(2))
    tr: SegmentState = field(default_factory=lambda: _system(11))
    gdtr: TableState = field(default_factory=TableState)
    idtr: TableState = field(default_factory=TableState)
    cr0: u64 = 0x60000010
    cr2: u64 = 0
    cr3: u64 = 0
    cr4: u64 = 0
    cr8: u4 = 0
    dr0: u64 = 0
    dr1: u64 = 0
    dr2: u64 = 0
    dr3: u64 = 0
    dr6: u64 = 0xFFFF0FF0
    dr7: u64 = 0x400
    efer: u64 = 0
    star: u64 = 0
    lstar: u64 = 0
    cstar: u64 = 0
    sfmask: u64 = 0
    kernel_gs_base: u64 = 0
    sysenter_cs: u64 = 0
    sysenter_esp: u64 = 0
    sysenter_eip: u64 = 0
    pat: u64 = 0x0007040600070406
    tsc_aux: u64 = 0
    tsc: Annotated[u64, "time-stamp counter at the clock's time"] = 0
    fpu: FpuState = field(default_factory=FpuState)
    event: Annotated[EventState | None, "accepted and not yet delivered"] = None
    interrupt_shadow: Annotated[bool, "STI or MOV SS just ran: interrupts wait one instruction"] = False
    nmi_blocked: Annotated[bool, "in an NMI handler, before its IRET"] = False
    halted: Annotated[bool, "HLT ran; waiting for an interrupt"] = False


REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)), "rip", "rflags")


class Cpu(CpuPins, Protocol):
    """One CPU of either backend. `intr` says that the INTR pin changed; the vector is pulled from Intr when the
    interrupt is taken. `kick` is the only method another thread may call."""

    def run(self, limit: int) -> Exit: ...  # to that guest time, in quarters of a ns: absolute, so no stop moves it

    turn_ns: int  # for how long it runs while another could
    counts_pauses: bool

    def can_run(self) -> bool: ...  # it does not halt, or something that wakes it is there
    def listens(self) -> bool: ...  # an interrupt would wake it
    def count_pauses(self, counted: Callable[[], None] | None) -> None: ...  # called at each PAUSE, if it counts
    def stop_at(self, position: int | None) -> None: ...  # run() returns Reached at the first boundary not before it
    def registers(self) -> tuple[int, ...]: ...  # those of REGISTERS: what of save() costs little
    def mark(self) -> object: ...  # the state, in this backend's own shape, for `reset` of this very CPU
    def reset(self, mark: object) -> None: ...
    def save(self) -> CpuState: ...  # architectural state, no backend's layout
    def load(self, state: CpuState) -> None: ...
    @staticmethod
    def refusal(state: CpuState) -> str | None: ...  # why load() would refuse it, naming the field; None: it would not
    @staticmethod
    def tsc_khz(wanted: int | None = None) -> int: ...  # the TSC's rate: its own, or BackendError if not as wanted
    def exits(self) -> dict[str, int]: ...  # how often it left the guest's code, by reason
    def close(self) -> None: ...
