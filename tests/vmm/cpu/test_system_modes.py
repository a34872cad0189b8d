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
OPERAND, FAR = 0x640, 0x140  # FAR: where FS and SS begin, but for real mode
LIMIT, BASE = 0x123, 0x00007E01_89ABCDE0
GDT = 0x500


def with_segments(state: CpuState, **code) -> CpuState:
    return replace(
        state, cs=replace(state.cs, **code), fs=replace(state.fs, base=FAR), ss=replace(state.ss, base=FAR),
        rbx=0x600, rsi=0x20, rbp=0x500, rdi=0x10,
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


def run(backend: str, mode: str, source: str, descriptors: tuple[int, ...] = ()) -> tuple[CpuState, bytes]:
    """The state in the end, and the GDT."""
    directive, state = MODES[mode]
    code, _ = assemble(f"{directive}; {source}; {END}; data: .word {LIMIT}; .quad {BASE}", CODE)
    started = replace(state(), rip=CODE, gdtr=replace(state().gdtr, base=GDT, limit=0x7F), r8=0x600, r9=0x10)
    with Machine.boot(MachineConfig(memory_bytes=4 << 20), Image(b"\xf4", flat=True), backend) as machine:
        machine.ram.write(CODE, code)
        machine.ram.write(GDT, struct.pack(f"<{3 + len(descriptors)}Q", 0, 0, 0, *descriptors))
        machine.ram.write(OPERAND, struct.pack("<HQ", LIMIT, BASE))
        machine.ram.write(0x20000, struct.pack("<Q", 0x21003))
        machine.ram.write(0x21000, struct.pack("<Q", 0x22003))
        machine.ram.write(0x22000, struct.pack("<Q", 0x83))
        machine.cpu.load(started)
        assert machine.run() == Stopped(StopReason.EXIT, 1)
        return machine.cpu.save(), machine.ram.read(GDT, 0x80)


@each_backend
@pytest.mark.parametrize(("mode", "form"), LOADS)
def test_gdtr_and_idtr(backend, mode, form):
    state, _ = run(backend, mode, f"lgdt {form}; lidt {form}")
    base = BASE if mode == "64-bit" else BASE & (0xFFFFFF if MODES[mode][0] == ".code16" else 0xFFFFFFFF)
    for table in (state.gdtr, state.idtr):
        assert (table.base, table.limit) == (base, LIMIT)


@each_backend
@pytest.mark.parametrize("mode", MODES)
def test_gdtr_by_an_operand_of_the_other_size(backend, mode):
    """24 bits of the base with one of 16 bits; in 64-bit mode there is one size."""
    state, _ = run(backend, mode, ".byte 0x66; lgdt 0x640")
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
    state, gdt = run(backend, mode, source, table)
    whole = limit << 12 | 0xFFF if granular else limit
    assert (state.ldtr.selector, state.ldtr.base, state.ldtr.limit, state.ldtr.type) == (0x18, base, whole, 2)
    assert (state.tr.selector, state.tr.base, state.tr.limit, state.tr.type) == (0x28, base + 0x10000, whole, kind | 2)
    assert state.ldtr.present and state.tr.present and not state.ldtr.s and not state.tr.s
    busy = struct.pack("<8Q", 0, 0, 0, table[0], table[1], table[2] | 2 << 40, table[3], 0)
    assert gdt[:64] == busy


@each_backend
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "real"])
def test_an_ldtr_that_is_none(backend, mode):
    state, _ = run(backend, mode, "mov $3, %ax; lldt %ax", descriptor(2, 0, 0, False))
    assert not state.ldtr.present
