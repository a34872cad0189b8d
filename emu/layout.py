"""Is this the Unicorn whose insides `emu.engine` knows? Every offset is put to the test before it is relied on.

`check_fields` compares, for each new engine, what is seen through the offsets with the public API. What the API cannot
show (exceptions, intercepts, the interrupt vector's way) is watched while a small program runs, once a process.
"""

from __future__ import annotations

import contextlib
import struct
from functools import cache
from typing import Any

import unicorn
from unicorn import x86_const as x86

from emu.engine import EXIT_MSR, EXIT_READ_CR, EXIT_READ_DR, EXIT_WRITE_CR, EXIT_WRITE_DR, INTERRUPT_VIRQ, Engine
from vmm.errors import BackendError

# What the fields without an API hold in a new engine of this build and CPU model.
_HFLAGS, _HFLAGS2 = 0x40C0B0, 0x1  # CS64 LMA PE ..., GIF
_FEATURES = (0x078BFBFD, 0xC6D8220B)

_GENERAL = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{i}" for i in range(8, 16)))
_MSRS = {
    "star": 0xC0000081,
    "lstar": 0xC0000082,
    "cstar": 0xC0000083,
    "fmask": 0xC0000084,
    "kernelgsbase": 0xC0000102,
    "tsc_aux": 0xC0000103,
    "pat": 0x277,
}


def checked_engine() -> Engine:
    """A new engine, found to be the one we know. Raises BackendError."""
    check_running()
    engine = Engine()
    with contextlib.ExitStack() as refused:
        refused.callback(engine.close)
        check_fields(engine)
        refused.pop_all()
    return engine


def check_fields(engine: Engine) -> None:
    """Raises BackendError, naming them, when fields are not where the offsets say. Leaves a new engine as it was."""
    uc = engine.uc
    wrong: list[str] = []

    def same(name: str, seen: int, wanted: int) -> None:
        if seen != wanted:
            wrong.append(name)

    def write(register: str, value: Any) -> None:
        uc.reg_write(getattr(x86, f"UC_X86_REG_{register}"), value)

    def read(register: str) -> int:
        return int(uc.reg_read(getattr(x86, f"UC_X86_REG_{register}")))

    for i, name in enumerate(_GENERAL):
        write(name, 0x1122334455660000 + i)
        same("regs", engine.regs[i], 0x1122334455660000 + i)
        write(name, 0)
    same("eip", engine.eip.value, read("RIP"))
    for index in (0, 4):
        same("cr", engine.cr[index], read(f"CR{index}"))
    for index in (2, 3):
        write(f"CR{index}", 0x5000 + index * 0x1000)
        same("cr", engine.cr[index], 0x5000 + index * 0x1000)
        write(f"CR{index}", 0)
    flags = read("RFLAGS")
    write("RFLAGS", 0x3202)  # IOPL 3, IF
    same("eflags", engine.eflags.value, 0x3202)
    write("RFLAGS", flags)
    for i, name in enumerate(("FS", "GS")):
        write(f"{name}_BASE", 0x7000 + i)
        same("segs", engine.segment(name.lower()).base, 0x7000 + i)
        write(f"{name}_BASE", 0)
    for name, field, value, reset in (
        ("GDTR", "gdt", (0, 0x123456, 0x7F, 0), (0, 0, 0xFFFF, 0)),
        ("IDTR", "idt", (0, 0x123456, 0x7F, 0), (0, 0, 0xFFFF, 0)),
        ("LDTR", "ldt", (0x18, 0x123456, 0x7F, 0x8200), (0, 0, 0, 0)),
        ("TR", "tr", (0x18, 0x123456, 0x7F, 0x8B00), (0, 0, 0, 0)),
    ):
        write(name, value)
        segment = engine.segment(name.lower())
        same(field, segment.base << 32 | segment.limit, 0x123456 << 32 | 0x7F)
        write(name, reset)
    for field, number in _MSRS.items():
        kept = uc.msr_read(number)
        uc.msr_write(number, 0x00010203)
        same(field, engine.u64(field).value, 0x00010203)
        uc.msr_write(number, kept)
    write("DR0", 0x777000)
    same("dr", engine.dr[0], 0x777000)
    write("DR0", 0)
    write("FCS", 0x1234)
    same("fpcs", engine.u16("fpcs").value, 0x1234)
    write("FCS", 0)
    write("MXCSR", 0x1FA0)
    same("mxcsr", engine.u32("mxcsr").value, 0x1FA0)
    write("MXCSR", 0x1F80)
    engine.set_debug_registers((0x777000, 0, 0, 0), 0x401)
    same("breakpoints", bool(engine.u64("breakpoints").value), True)
    engine.set_debug_registers((0, 0, 0, 0), 0x400)
    same("breakpoints", engine.u64("breakpoints").value, 0)
    same("efer", engine.u64("efer").value, uc.msr_read(0xC0000080))
    same("hflags", engine.hflags.value, _HFLAGS)
    same("hflags2", engine.hflags2.value, _HFLAGS2)
    same("features", engine.features[0] << 64 | engine.features[1], _FEATURES[0] << 64 | _FEATURES[1])
    same("cflags_next_tb", engine.cflags_next_tb.value, 0xFFFFFFFF)
    same("old_exception", engine.old_exception.value, -1)
    same("a20_mask", engine.a20_mask.value, -1)
    same("interrupt_request", engine.interrupt_request.value, 0)
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        raise BackendError(f"unicorn's CPU structure is not laid out as 2.1.4's: {names}")


_GDT, _IDT, _CODE, _HANDLER, _STACK = 0x1000, 0x2000, 0x4000, 0x5000, 0x7000
_VECTOR = 0x66
_SIZES = {13: 2, EXIT_MSR: 2, EXIT_READ_CR + 8: 4}  # of an instruction; of others 3
_MOST_SEEN = 20  # of exceptions: another layout may raise them for ever
_PROGRAM = bytes.fromhex(
    "cd55"  # int 0x55
    "b8301200008ed8"  # mov eax, 0x1230; mov ds, eax: #GP(0x1230)
    "b910000000"  # mov ecx, 0x10
    "0f32"  # rdmsr
    "0f22c0"  # mov cr0, rax
    "440f20c0"  # mov rax, cr8
    "0f21f8"  # mov rax, dr7
    "0f23f8"  # mov dr7, rax
    "fb90"  # sti; nop
    "0f0b"  # ud2: never reached, the interrupt comes first
)


@cache
def check_running() -> None:
    """Watch an engine take an INT, a fault, intercepts and an interrupt, and halt. Raises BackendError."""
    with contextlib.closing(Engine()) as engine:
        check_fields(engine)
        seen, halted = _watch(engine)
    numbers = EXIT_MSR, EXIT_WRITE_CR, EXIT_READ_CR + 8, EXIT_READ_DR + 7, EXIT_WRITE_DR + 7
    exits = [(number, 0, 0, number & 0xFF) for number in numbers]
    wanted = [(0x55, 1, _CODE + 2, 0x55), (13, 0, 0x1230, 13), *exits, (_VECTOR,)]
    if seen != wanted or not halted:
        raise BackendError(f"unicorn 2.1.4 does not run as it should on this host: {seen}, halted {halted}")


def _watch(engine: Engine) -> tuple[list[tuple[int, ...]], bool]:
    """What was seen while the program ran, and whether it halted."""
    uc = engine.uc
    seen: list[tuple[int, ...]] = []

    def on_exception(_uc: object, number: int, _data: object) -> None:
        if len(seen) > _MOST_SEEN:
            engine.interrupt_request.value = 0
            uc.emu_stop()
        is_int, error = engine.u32("exception_is_int").value, engine.error_code.value
        told = engine.u64("exception_next_eip").value if number == 0x55 else error
        seen.append((number, is_int, told, engine.exception_index.value & 0xFF))
        if number == 0x55:
            engine.u32("exception_is_int").value = 0
            return
        engine.eip.value += _SIZES.get(number, 3)
        if number == EXIT_WRITE_DR + 7:
            engine.interrupt_request.value |= INTERRUPT_VIRQ

    def acknowledge() -> int:
        seen.append((_VECTOR,))
        return _VECTOR

    try:
        uc.mem_map(0, 0x8000)
        uc.mem_write(_GDT, struct.pack("<QQ", 0, 0x00AF9B000000FFFF))
        uc.mem_write(_IDT + 16 * _VECTOR, struct.pack("<HHHHQ", _HANDLER, 8, 0x8E00, 0, 0))
        uc.mem_write(_CODE, _PROGRAM)
        uc.mem_write(_HANDLER, b"\xf4")  # hlt
        uc.hook_add(unicorn.UC_HOOK_INTR, on_exception)
        for name, base in (("gdtr", _GDT), ("idtr", _IDT)):
            engine.segment(name).base, engine.segment(name).limit = base, 0xFFF
        code = engine.segment("cs")
        code.selector, code.limit, code.flags = 8, 0xFFFFFFFF, 0xA09B00
        engine.regs[4] = _STACK
        engine.intercept(acknowledge, ())
        engine.start(_CODE)
    except unicorn.UcError as error:
        seen.append((-1, error.errno))
    return seen, bool(engine.halted.value)
