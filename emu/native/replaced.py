"""Functions of the engine's library that ours take the place of, for all engines of this process.

A jump over its first bytes leads to the replacement (x86_64.S). Where they are not the bytes we know, or the host lets
nobody write to code, the function stays as it is.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from functools import cache

from emu import engine
from emu.native.code import Code

# symbol (of x86-64) -> (the function here, its bytes up to where the replacement goes on)
_KNOWN = {
    "cpu_svm_check_intercept_param": ("check_intercept", "f687b2000000207507c3660f1f440000"),
    "helper_raise_interrupt": ("raise_interrupt", "4189d04883ec0831c9ba01000000"),
    "helper_ldmxcsr": ("ldmxcsr", "89b730030000e905c6f7ff0f"),
    "helper_fxrstor": ("fxrstor", "415641554154554889fd534c8b742428"),
    "helper_fstenv": ("fstenv", "4157415641554989cd415455"),
    "helper_sysret": ("sysret", "554889fdf68750020000010f84b5020000"),
    "helper_iret_protected": ("iret", "4157415641554154554889fd53"),
}
_SYSRET_UNDEFINED = 0x2C6  # into helper_sysret: where its conditional jump goes
# What `check_intercept` relies on: the value of a MOV to a control register is in R12.
_WRITE_CRN = bytes.fromhex("41544989d431d2554889fd534863de488b4c24188d7310e8")

_FSTENV = bytes.fromhex("488b0c24e9")  # helper_fstenv: its return address as one more argument, and a jump

_GOES_ON = frozenset(("check_intercept", "fxrstor", "fstenv", "sysret", "iret"))  # those with a rest to go on with


@cache
def replace() -> list[str]:
    """Put them in place, once a process; the names of those that could not be. Raises OSError where the host refuses
    executable memory."""
    library = engine.library()

    def address(name: str) -> int:
        found = ctypes.cast(getattr(library, f"{name}_x86_64"), ctypes.c_void_p).value
        assert found is not None
        if ctypes.string_at(found, len(_FSTENV)) == _FSTENV:
            at = found + len(_FSTENV)
            found = at + 4 + ctypes.c_int32.from_address(at).value
        return found

    code = Code(
        vmcb=engine.VMCB,
        update_mxcsr=address("update_mxcsr_status"),
        raise_exception=address("raise_exception_err_ra"),
        raise_interrupt_rest=address("raise_interrupt"),
        load_long=address("cpu_ldl_data_ra"),
        sysret_undefined=address("helper_sysret") + _SYSRET_UNDEFINED,
    )
    _KEPT.append(code)
    left = []
    for name, (ours, digits) in _KNOWN.items():
        known, at = bytes.fromhex(digits), address(name)
        right = ctypes.string_at(at, len(known)) == known
        if ours == "check_intercept":
            right = right and ctypes.string_at(address("helper_write_crN"), len(_WRITE_CRN)) == _WRITE_CRN
        if ours in _GOES_ON:
            code.set(**{f"{ours}_rest": at + len(known)})
        if not (right and _write(at, b"\x48\xb8" + struct.pack("<Q", code[ours]) + b"\xff\xe0")):  # mov rax; jmp rax
            left.append(name)
    return left


_KEPT: list[Code] = []


def _write(address: int, data: bytes) -> bool:
    """Whether the host let us."""
    libc = ctypes.CDLL(None)
    first = address & -mmap.PAGESIZE
    size = address + len(data) - first

    def protect(how: int) -> bool:
        return not libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(size), ctypes.c_int(how))

    if not protect(mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
        return False
    ctypes.memmove(address, data, len(data))
    protect(mmap.PROT_READ | mmap.PROT_EXEC)
    return True
