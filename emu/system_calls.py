"""SYSCALL and SYSENTER, which this engine leaves to its host: it adds the instruction's two bytes to RIP afterwards."""

from __future__ import annotations

from unicorn import x86_const as x86

from emu.engine import RF, Engine

_MASK64 = (1 << 64) - 1
_SYSENTER_CS, _SYSENTER_ESP, _SYSENTER_EIP = 0x174, 0x175, 0x176
_LMA = 1 << 10  # EFER
_LONG = 1 << 21  # of a segment's flags
_IF_VM = 1 << 9 | 1 << 17  # RFLAGS
_CODE64, _CODE32, _DATA = 0xA09B00, 0xC09B00, 0xC09300  # flags of flat segments


def syscall(engine: Engine) -> None:
    """In 64-bit mode, compatibility mode and, with EFER.SCE, outside long mode (AMD APM vol. 3, SYSCALL)."""
    flags = engine.uc.reg_read(x86.UC_X86_REG_RFLAGS)
    star = engine.u64("star").value
    long_mode = bool(engine.u64("efer").value & _LMA)
    code = engine.segment("cs")
    compatibility = not code.flags & _LONG
    if long_mode:
        engine.regs[1] = engine.eip.value + 2 & _MASK64
        engine.regs[11] = flags & ~RF
        flags = flags & ~engine.u64("fmask").value & ~RF
        target = engine.u64("cstar" if compatibility else "lstar").value
    else:
        engine.regs[1] = engine.eip.value + 2 & 0xFFFFFFFF
        flags &= ~(_IF_VM | RF)
        target = star & 0xFFFFFFFF
    engine.uc.reg_write(x86.UC_X86_REG_RFLAGS, flags | 2)
    _flat(engine, star >> 32 & 0xFFFC, _CODE64 if long_mode else _CODE32)
    engine.eip.value = target - 2 & _MASK64


def sysenter(engine: Engine) -> None:
    """Outside long mode (SDM vol. 2, SYSENTER); the model's vendor raises #UD for it in long mode."""
    flags = engine.uc.reg_read(x86.UC_X86_REG_RFLAGS) & ~_IF_VM
    engine.uc.reg_write(x86.UC_X86_REG_RFLAGS, flags)
    engine.regs[4] = engine.read_msr(_SYSENTER_ESP)
    _flat(engine, engine.read_msr(_SYSENTER_CS) & 0xFFFC, _CODE32)
    engine.eip.value = engine.read_msr(_SYSENTER_EIP) - 2 & _MASK64


def _flat(engine: Engine, selector: int, code_flags: int) -> None:
    """CS and, behind it, SS: flat, of level 0."""
    for name, at, flags in (("cs", selector, code_flags), ("ss", selector + 8 & 0xFFFF, _DATA)):
        segment = engine.segment(name)
        segment.selector, segment.base, segment.limit, segment.flags = at, 0, 0xFFFFFFFF, flags
    engine.update_hflags()
