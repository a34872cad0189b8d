"""The registers of tables, loaded in every mode from wherever the operand is: once per backend (SDM vol. 2, LGDT, LLDT,
LTR)."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cpu.program import assemble
from tests.vmm.cpu.test_modes import CODE, END, protected_mode, real_mode
from vmm.cpu.protocol import CpuState
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
OPERAND, FAR = 0x640, 0x140  # FAR: where FS, SS and CS begin, as far as they do
LIMIT, BASE = 0x123, 0x00007E01_89ABCDE0
GDT, FAULT = 0x500, 0x620
CODE32, CODE64 = 0x00CF9B000000FFFF, 0x00AF9B000000FFFF


def with_segments(state: CpuState, **code) -> CpuState:
    base = 0 if code.get("long") else FAR
    return replace(
        state, cs=replace(state.cs, selector=FAR >> 4, base=base, **code), fs=replace(state.fs, base=FAR),
        ss=replace(state.ss, base=FAR), rbx=0x600, rsi=0x20, rbp=0x500, rdi=0x10,
    )  # fmt: skip


def long_mode(**code) -> CpuState:
    state = replace(protected_mode(), cr0=0x80000011, cr3=0x20000, cr4=0x20, efer=0x500)
    return with_segments(state, **code)


MODES = {
    "real": (".code16", lambda: with_segments(real_mode())),
    "protected, 16 bits": (".code16", lambda: with_segments(protected_mode(), db=False)),
    "protected": (".code32", lambda: with_segments(protected_mode())),
    "compatibility": (".code32", lambda: long_mode()),
    "compatibility, 16 bits": (".code16", lambda: long_mode(db=False)),
    "64-bit": (".code64", lambda: long_mode(db=False, long=True)),
}
WIDE = ("0x40(%ebx)", "(%ebx,%edi,4)", "0x20(%esi,%ebx)", "0x40(,%ebx,1)")
FORMS = {
    ".code16": ("0x640", "0x40(%bx)", "0x20(%bx,%si)", "(%bp)", "%fs:0x500", "%ds:0x140(%bp)", *WIDE),
    ".code32": ("0x640", "(%ebp)", "%fs:0x500", "%fs:-0x100(%ebx)", "%ds:0x140(%ebp)", *WIDE),
    ".code64": (
        "0x640", "(%rbx,%rdi,4)", "0x140(%rbp)", "%fs:(%rbp)", "%ds:0x140(%rbp)", "data(%rip)", "0x40(%r8)",
        "(%r8,%r9,4)", *WIDE,
    ),
}  # fmt: skip
LOADS = [(mode, form) for mode, (code, _) in MODES.items() for form in FORMS[code]]


def run(
    backend: str, mode: str, source: str, descriptors: tuple[int, ...] = ()
) -> tuple[CpuState, bytes, tuple[int, int]]:
    """The state in the end, the GDT, and of the fault there was its vector and error code."""
    directive, state = MODES[mode]
    long = not mode.startswith("prot")
    code, labels = assemble(
        f"""
        {directive}; {source}; {END}
data:   .word   {LIMIT}
        .quad   {BASE}
        .code{64 if long else 32}
gp:     movl    $13, {FAULT}
        jmp     1f
np:     movl    $11, {FAULT}
1:      pop     %{"rax" if long else "eax"}
        mov     %eax, {FAULT + 4}
        {END}
        """,
        CODE,
    )
    started = replace(
        state(), rip=CODE - state().cs.base, gdtr=replace(state().gdtr, base=GDT, limit=0x7F), r8=0x600, r9=0x10
    )
    with Machine.boot(MachineConfig(memory_bytes=4 << 20), Image(b"\xf4", flat=True), backend) as machine:
        machine.ram.write(CODE, code)
        machine.ram.write(GDT, struct.pack(f"<{3 + len(descriptors)}Q", 0, CODE64 if long else CODE32, 0, *descriptors))
        for vector, label in ((13, "gp"), (11, "np")):
            gate = struct.pack("<Q", labels[label] & 0xFFFF | 8 << 16 | 0x8E00 << 32)
            machine.ram.write(0x1000 + vector * (16 if long else 8), gate)
        machine.ram.write(OPERAND, struct.pack("<HQ", LIMIT, BASE))
        machine.ram.write(0x20000, struct.pack("<Q", 0x21003))
        machine.ram.write(0x21000, struct.pack("<Q", 0x22003))
        machine.ram.write(0x22000, struct.pack("<Q", 0x83))
        machine.cpu.load(started)
        assert machine.run() == Stopped(StopReason.EXIT, 1)
        vector, error = struct.unpack("<II", machine.ram.read(FAULT, 8))
        return machine.cpu.save(), machine.ram.read(GDT, 0x80), (vector, error)


@each_backend
@pytest.mark.parametrize(("mode", "form"), LOADS)
def test_gdtr_and_idtr(backend, mode, form):
    state, _, _ = run(backend, mode, f"lgdt {form}; lidt {form}")
    base = BASE if mode == "64-bit" else BASE & (0xFFFFFF if MODES[mode][0] == ".code16" else 0xFFFFFFFF)
    for table in (state.gdtr, state.idtr):
        assert (table.base, table.limit) == (base, LIMIT)


@each_backend
@pytest.mark.parametrize("mode", MODES)
def test_gdtr_by_an_operand_of_the_other_size(backend, mode):
    """24 bits of the base with one of 16 bits; in 64-bit mode there is one size."""
    state, _, _ = run(backend, mode, ".byte 0x66; lgdt 0x640")
    want = BASE if mode == "64-bit" else BASE & (0xFFFFFFFF if MODES[mode][0] == ".code16" else 0xFFFFFF)
    assert state.gdtr.base == want


def descriptor(kind: int, base: int, limit: int, granular: bool) -> tuple[int, int]:
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16 | (0x80 | kind) << 40 | (limit >> 16) << 48
    return low | granular << 55 | (base >> 24 & 0xFF) << 56, base >> 32


SYSTEM = [(mode, kind) for mode in MODES if mode != "real" for kind in (1, 9) if kind == 9 or mode.startswith("prot")]


@each_backend
@pytest.mark.parametrize("granular", [False, True])
@pytest.mark.parametrize("operand", ["register", "memory"])
@pytest.mark.parametrize(("mode", "kind"), SYSTEM)
def test_ldtr_and_tr(backend, mode, kind, operand, granular):
    """What the descriptor says; a task is busy then, in the GDT too."""
    limit, base = 0x91235, BASE if mode == "64-bit" else BASE & 0xFFFFFFFF
    table = (*descriptor(2, base, limit, granular), *descriptor(kind, base + 0x10000, limit, granular))
    source = "mov $0x18, %ax; lldt %ax; mov $0x28, %bx; ltr %bx"
    if operand == "memory":
        source = "movw $0x18, 0x640; lldt 0x640; movw $0x28, 0x640; ltr 0x640"
    state, gdt, _ = run(backend, mode, source, table)
    whole = limit << 12 | 0xFFF if granular else limit
    assert (state.ldtr.selector, state.ldtr.base, state.ldtr.limit, state.ldtr.type) == (0x18, base, whole, 2)
    assert (state.tr.selector, state.tr.base, state.tr.limit, state.tr.type) == (0x28, base + 0x10000, whole, kind | 2)
    assert state.ldtr.present and state.tr.present and not state.ldtr.s and not state.tr.s
    busy = struct.pack(
        "<8Q", 0, struct.unpack_from("<Q", gdt, 8)[0], 0, table[0], table[1], table[2] | 2 << 40, table[3], 0
    )
    assert gdt[:64] == busy


@each_backend
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "real"])
def test_an_ldtr_that_is_none(backend, mode):
    state, _, fault = run(backend, mode, "mov $3, %ax; lldt %ax", descriptor(2, 0, 0, False))
    assert not state.ldtr.present and fault == (0, 0)


LDT, TASK = 2, 9
PRESENT, OF_CODE_OR_DATA = 1 << 47, 1 << 44
# A host's KVM that interprets its guests has other error codes; the processor's are here (SDM vol. 2, LLDT, LTR).
# Instruction, selector, bits of the descriptor at 0x18 that are the other way, and the fault.
FAULTS = {
    "no LDT": ("lldt", 0x18, (LDT ^ TASK) << 40, (13, 0x18)),
    "no task": ("ltr", 0x18, (LDT ^ TASK) << 40, (13, 0x18)),
    "a task that is busy": ("ltr", 0x18, 2 << 40, (13, 0x18)),
    "data of an LDT's type": ("lldt", 0x18, OF_CODE_OR_DATA, (13, 0x18)),
    "code of a task's type": ("ltr", 0x18, OF_CODE_OR_DATA, (13, 0x18)),
    "no LDT, and not present": ("lldt", 0x18, (LDT ^ TASK) << 40 | PRESENT, (13, 0x18)),
    "an LDT that is not present": ("lldt", 0x18, PRESENT, (11, 0x18)),
    "a task that is not present": ("ltr", 0x18, PRESENT, (11, 0x18)),
    "RPL is no part of the error": ("ltr", 0x1B, PRESENT, (11, 0x18)),
    "an LDT of the LDT": ("lldt", 0x1C, 0, (13, 0x1C)),
    "a task of the LDT": ("ltr", 0x1C, 0, (13, 0x1C)),
    "no task at all": ("ltr", 3, 0, (13, 0)),
    "an LDT beyond the end": ("lldt", 0x80, 0, (13, 0x80)),
    "a task beyond the end": ("ltr", 0x80, 0, (13, 0x80)),
}


@pytest.mark.parametrize("backend", ["emu"], indirect=True)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "real"])
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_system_descriptor(backend, mode, name):
    """A fault, and nothing is loaded."""
    instruction, selector, other, fault = FAULTS[name]
    low, high = descriptor(LDT if instruction == "lldt" else TASK, 0x1000, 0x67, False)
    table = (low ^ other, high)
    state, gdt, found = run(backend, mode, f"mov ${selector}, %ax; {instruction} %ax", table)
    _, before, _ = run(backend, mode, "nop", table)
    assert found == fault and gdt == before
    assert state.ldtr.selector == state.tr.selector == 0


HIGH = {"the upper half has a type": BASE >> 32 | 1 << 40, "the base is not canonical": 0x8000}


@pytest.mark.parametrize("backend", ["emu"], indirect=True)
@pytest.mark.parametrize("name", HIGH)
@pytest.mark.parametrize("instruction", ["lldt", "ltr"])
def test_the_upper_half_of_a_descriptor(backend, instruction, name):
    low, _ = descriptor(LDT if instruction == "lldt" else TASK, BASE, 0x67, False)
    _, _, found = run(backend, "64-bit", f"mov $0x18, %ax; {instruction} %ax", (low, HIGH[name]))
    assert found == (13, 0x18)
