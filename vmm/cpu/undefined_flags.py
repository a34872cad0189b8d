"""What an instruction leaves undefined: the bits about which two right CPUs may differ after executing it.

References: SDM vol. 1, table A-2 (EFLAGS) and table 8-1 (x87 condition codes); "Flags Affected" of each instruction in
SDM vol. 2 and AMD APM vol. 3. Two rows judge: BT's ZF, and the destination of BSF and BSR with a zero source, were
undefined in older editions and are unmodified in newer ones. Software relies on that: a CPU that breaks it is to be
found.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import capstone
from capstone import x86

CF, PF, AF, ZF, SF, OF = (1 << bit for bit in (0, 2, 4, 6, 7, 11))
C0, C1, C2, C3 = (1 << bit for bit in (8, 9, 10, 14))
STATUS = CF | PF | AF | ZF | SF | OF

# fmt: off
_FLAGS = {  # whatever the operands; POPCNT, CMPXCHG, COMISS, FCOMI, PTEST, PCMPxSTRx and the rest define all they write
    "aaa aas": OF | SF | ZF | PF,
    "aam aad": OF | AF | CF,
    "daa das": OF,
    "and or xor test": AF,
    "mul imul": SF | ZF | AF | PF,             # some editions of the SDM define IMUL's SF; the table and AMD do not
    "div idiv": STATUS,
    "bt bts btr btc": OF | SF | AF | PF,       # ZF is unaffected
    "bsf bsr": STATUS & ~ZF,
    # F3 BSF and F3 BSR. The model has neither BMI1 nor LZCNT: there F3 is reserved (SDM vol. 2, 2.1.1) and ignored. But
    # hosts that have them cannot hide them, and then CF and ZF mean something else. Compilers emit F3 BSF for any model
    # when no one reads the flags. A different result is not excused: a guest would see on which CPU it is.
    "tzcnt lzcnt": STATUS,
    "andn blsi blsmsk blsr bzhi": AF | PF,
    "bextr": SF | AF | PF,
}
_X87 = {  # SDM vol. 1, table 8-1; for all not named C1 is 0 or the rounding, and the others undefined
    "fcom fcomp fcompp ficom ficomp ftst fucom fucomp fucompp fxam fprem fprem1": 0,
    "fldenv frstor fninit fnsave": 0,
    "fcos fsin fsincos fptan": C0 | C1 | C3,   # C1 only when C2 = 1, which is not looked at
    "ffree ffreep fldcw fnclex fnop fnstcw fnstenv fnstsw wait": C0 | C1 | C2 | C3,
}
# fmt: on
_BY_NAME = {name: mask for names, mask in _FLAGS.items() for name in names.split()}
_X87_BY_NAME = {name: mask for names, mask in _X87.items() for name in names.split()}
_ROTATES = frozenset(["rol", "ror", "rcl", "rcr"])
_SHIFTS = frozenset(["shl", "sal", "shr", "sar", "shld", "shrd"])


class Undefined(NamedTuple):
    """What may differ. `destination` is a register by its name in CpuState, or "memory": the one memory operand."""

    flags: int = 0  # bits of RFLAGS
    fsw: int = 0  # bits of the x87 status word
    destination: str | None = None
    bits: int = 0  # which bits of the destination


class _Instruction(NamedTuple):
    name: str
    opcode: int  # its first byte after the prefixes
    size: int  # of the first operand, in bits
    immediate: int | None  # the last operand if it is one
    register: str  # the first operand if it is one


def _engine(mode: int) -> capstone.Cs:
    engine = capstone.Cs(capstone.CS_ARCH_X86, mode)
    engine.detail = True
    return engine


_ENGINES = {16: _engine(capstone.CS_MODE_16), 32: _engine(capstone.CS_MODE_32), 64: _engine(capstone.CS_MODE_64)}


@lru_cache(maxsize=1 << 16)  # a guest runs the same code again and again, and decoding costs more than all else here
def _decode(code: bytes, mode_bits: int) -> _Instruction | None:
    engine = _ENGINES[mode_bits]
    found = next(engine.disasm(code, 0, 1), None)
    if found is None:
        return None
    size, immediate, register = 0, None, ""
    if found.operands:
        first, last = found.operands[0], found.operands[-1]
        size = first.size * 8
        immediate = last.imm if last.type == x86.X86_OP_IMM else None
        register = engine.reg_name(first.reg) if first.type == x86.X86_OP_REG else ""
    return _Instruction(engine.insn_name(found.id), found.opcode[0], size, immediate, register)


def _destination(register: str) -> str:
    if not register:
        return "memory"
    return register.rstrip("dw") if register[1].isdigit() else "r" + register[-2:]  # r8d is in r8, eax in rax


def undefined(code: bytes, mode_bits: int, rcx: int = 0, rflags: int = 0) -> Undefined:
    """What the instruction at the start of `code` leaves undefined; nothing when it cannot be decoded.

    `rcx` is before it: CL may be a count. `rflags` is after it: its ZF says whether BSF's or BSR's source was zero.
    """
    found = _decode(code[:15], mode_bits)
    if found is None:
        return Undefined()
    if found.name in _SHIFTS | _ROTATES:
        return _shift(found, (rcx if found.immediate is None else found.immediate) & (63 if found.size == 64 else 31))
    if 0xD8 <= found.opcode <= 0xDF or found.name == "wait":
        return Undefined(fsw=_X87_BY_NAME.get(found.name, C0 | C2 | C3))
    bits = _result(found, bool(rflags & ZF))
    return Undefined(_BY_NAME.get(found.name, 0), 0, _destination(found.register) if bits else None, bits)


def _result(found: _Instruction, source_zero: bool) -> int:
    if found.name == "bswap" and found.size == 16:
        return 0xFFFF
    if found.name in ("bsf", "bsr") and found.size == 32 and source_zero:
        return 0xFFFFFFFF << 32  # it is unmodified, but older CPUs may clear the upper half (SDM vol. 2, BSF)
    return 0


def _shift(found: _Instruction, count: int) -> Undefined:
    """SDM vol. 2, RCL/RCR/ROL/ROR, SAL/SAR/SHL/SHR, SHLD, SHRD. `count` is masked."""
    if count == 0:
        return Undefined()
    flags = OF if count > 1 else 0
    if found.name in ("shld", "shrd"):
        if count > found.size:
            return Undefined(STATUS, 0, _destination(found.register), (1 << found.size) - 1)
        flags |= AF
    elif found.name not in _ROTATES:
        flags |= AF
        if count >= found.size and found.name != "sar":  # SAR shifts out copies of the sign
            flags |= CF
    return Undefined(flags)
