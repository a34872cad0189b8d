"""Unicorn's insides: the only file that knows them.

Unicorn is QEMU's TCG as a library. Its public API loses what a saved machine needs (hidden segment state, CPL, the
interrupt shadow) and hands exceptions to the host instead of the guest's IDT. This file reaches the engine's own CPU
structure through offsets that hold for one build, 2.1.4, on 64-bit hosts; each of them is checked at start-up
(emu.layout), and another build is refused with BackendError.

What it offers the rest of `emu`: typed views of the CPU's fields, hooks by raw address, one-instruction blocks, and
a hidden page from which the engine fetches an interrupt's vector (so that INTA happens exactly when it is taken).
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from typing import Any

import unicorn
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from emu.native.code import Code
from vmm.errors import BackendError
from vmm.ram import HOLE_START, Shown

VERSION = "2.1.4"

# --- offsets: uc_struct, CPUState, CPUX86State of Unicorn 2.1.4 (QEMU 5.0.1), 64-bit little-endian hosts
_UC_CPU = 0x1B8
_UC_NO_EXIT_REQUEST = 0x7F2
_CPU_CFLAGS_NEXT_TB = 0x18
_CPU_INTERRUPT_REQUEST = 0x1C
_CPU_ENV = 0x128
_CPU_CLUSTER_INDEX = 0x8194
_CPU_HALTED = 0x8198
_CPU_EXCEPTION_INDEX = 0x81A0
_CPU_CLASS = 0x81B0  # a pointer to its methods
_CLASS_DEBUG_EXCEPTION = 0x78
_CPU_TO_ENV = 0x8A50
_UC_MEMORY_MAPPING = 0x120  # a function pointer: guest-physical address to memory region
_UC_PAGES = {"l1_map": 0x2E0, "v_l1_size": 0x2F0, "v_l1_shift": 0x2F4, "v_l2_levels": 0x2F8}  # pages with code

# The slow store of this build, up to its call of uc->memory_mapping: found by its bytes, never assumed.
_SLOW_STORE = bytes.fromhex(
    "41574989ff41564189d641554989cd41544989f4554c89cd534889f381e3ff0f00004883ec28"
    "488b87a8810000498b71184c894424084809de4889c7ff9020010000"
)

_ENV = {
    "regs": 0x0,
    "eip": 0x80,
    "eflags": 0x88,
    "hflags": 0xB0,
    "hflags2": 0xB4,
    "segs": 0xB8,
    "ldt": 0x148,
    "tr": 0x160,
    "gdt": 0x178,
    "idt": 0x190,
    "cr": 0x1A8,
    "a20_mask": 0x1F0,
    "efer": 0x250,
    "fpcs": 0x2F2,  # and FDS behind it
    "mxcsr": 0x330,
    "star": 0x12D8,
    "lstar": 0x12E8,
    "cstar": 0x12F0,
    "fmask": 0x12F8,
    "kernelgsbase": 0x1300,
    "tsc_aux": 0x1320,
    "pat": 0x14A0,
    "error_code": 0x1508,
    "exception_is_int": 0x150C,
    "exception_next_eip": 0x1510,
    "dr": 0x1518,
    "breakpoints": 0x1558,
    "old_exception": 0x1578,
    "vm_vmcb": 0x1580,
    "intercept": 0x1590,
    "intercept_cr_read": 0x1598,
    "intercept_cr_write": 0x159A,
    "intercept_dr_read": 0x159C,
    "intercept_dr_write": 0x159E,
    "features": 0x1600,
    "uc": 0x1B58,
}

_REGISTERS = _ENV["uc"]  # bytes, up to what is the engine's own

INTERRUPT_VIRQ = 0x100
HF_INHIBIT_IRQ = 1 << 3
# The flags that the engine takes from RFLAGS itself whenever it looks for code: here too, nothing would clear them.
_HF_OF_RFLAGS = 1 << 8 | 3 << 12 | 1 << 17  # TF, IOPL, VM
TF, NT, RF = 1 << 8, 1 << 14, 1 << 16  # RFLAGS
_DR6_BS = 1 << 14
HF_LMA = 1 << 14
HF_GUEST = 1 << 21
HF2_GIF = 1 << 0
HF2_NMI = 1 << 2
# What is intercepted, by the SVM's exit codes (AMD APM vol. 2, appendix C), which reach HOOK_INTR with 0x100 added.
EXIT_READ_CR, EXIT_WRITE_CR, EXIT_READ_DR, EXIT_WRITE_DR = 0x100, 0x110, 0x120, 0x130  # and the register's number
EXIT_IDTR, EXIT_GDTR, EXIT_LDTR, EXIT_TR = 0x16A, 0x16B, 0x16C, 0x16D  # writes
CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))  # exceptions: SDM vol. 3, table 6-4
MOST_DELIVERIES = 1000  # of exceptions, with no code run in between
_CFLAGS_NONE = 0xFFFFFFFF
_EXECUTE = 0  # what a breakpoint waits for, in DR7
_MASK64 = (1 << 64) - 1
_DR7_NONE = 0x400  # no breakpoint: the one bit that is always set
EXIT_PAUSE = 0x177
EXIT_MSR = 0x17C
EXIT_SHUTDOWN = 0x17F
_INTERCEPT = sum(1 << (code - 0x160) for code in (EXIT_MSR, EXIT_IDTR, EXIT_GDTR, EXIT_LDTR, EXIT_TR))
_INTERCEPT_PAUSE = 1 << EXIT_PAUSE - 0x160
_INTERCEPT_CR_READ, _INTERCEPT_CR_WRITE, _INTERCEPT_DR = 0x100, 0x119, 0xFF  # CR8; CR0, CR3, CR4, CR8; all

# The engine's leftover SVM code reads a VMCB by physical address: MSR permission map at +0x48, interrupt vector at
# +0x64, event injection at +0xa8. Placed across a page end, the first two are MMIO (a callback is the INTA cycle) and
# the last, touched by every exception, is plain memory. It lies above the guest's 40 physical bits, out of reach.
_HIDDEN = 1 << 41
VMCB = _HIDDEN + 0x1000 - 0x70
_MSRPM = _HIDDEN + 0x10000
_VMCB_MSRPM = 0x48
_VMCB_VECTOR = 0x64

_4_GIB = 1 << 32
_PIECE, _LARGE_PIECE = 64 << 20, 256 << 20  # of the hole below 4 GiB: where PCI devices are put, and below that

HOOK_INTR = uc_const.UC_HOOK_INTR
HOOK_INSN = uc_const.UC_HOOK_INSN
HOOK_BLOCK = uc_const.UC_HOOK_BLOCK
HOOK_INSN_INVALID = uc_const.UC_HOOK_INSN_INVALID

_OF_CPU = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_MMIO_READ = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_void_p)
_MMIO_WRITE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p
)  # fmt: skip

Read = Callable[[int, int], int]
Write = Callable[[int, int, int], None]


def library() -> ctypes.CDLL:
    """The engine's shared library: each of its functions is an exported symbol."""
    from unicorn.unicorn_py3 import unicorn as binding

    return ctypes.CDLL(binding.uclib._name)


class Engine:
    """One Unicorn x86-64 engine with its insides open."""

    def __init__(self) -> None:
        if unicorn.__version__ != VERSION:
            raise BackendError(f"emu needs unicorn {VERSION}, this is {unicorn.__version__}")
        if sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise BackendError(f"emu needs a 64-bit little-endian host, this is {platform.machine()}")
        self._lib = library()
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC)
        self._keep: list[Any] = []  # what the engine points at must outlive it
        self._ram: list[tuple[int, int, int]] = []  # base, size, offset in all RAM
        self._pieces: dict[tuple[int, int], list[Shown | tuple[int, int]]] = {}  # of the hole: what is shown where
        self.uc.reg_read(x86.UC_X86_REG_RAX)  # creates the CPU
        self._handle = int(getattr(self.uc._uch, "value", self.uc._uch))
        self._handle_pointer = ctypes.c_void_p(self._handle)
        self._memory_mapping = self._pointer(self._handle + _UC_MEMORY_MAPPING)
        self._mem_read = self._lib.uc_mem_read
        self._mem_read.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t]
        self._rw_debug = self._lib.cpu_memory_rw_debug_x86_64
        self._rw_debug.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_bool]
        self._two_bytes = ctypes.c_uint16()
        self._invalidate = self._lib.tb_invalidate_phys_range_x86_64
        self._invalidate.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
        self.cpu = self._pointer(self._handle + _UC_CPU)
        if not self.cpu:
            raise BackendError("unicorn's CPU is not where 2.1.4 has it")
        self.env = self.cpu + _CPU_TO_ENV
        if self._pointer(self.cpu + _CPU_ENV) != self.env or self._pointer(self.address("uc")) != self._handle:
            raise BackendError("unicorn's CPU structure is not laid out as 2.1.4's")
        self.halted = ctypes.c_uint32.from_address(self.cpu + _CPU_HALTED)
        self.interrupt_request = ctypes.c_uint32.from_address(self.cpu + _CPU_INTERRUPT_REQUEST)
        self.cflags_next_tb = ctypes.c_uint32.from_address(self.cpu + _CPU_CFLAGS_NEXT_TB)
        self.exception_index = ctypes.c_int32.from_address(self.cpu + _CPU_EXCEPTION_INDEX)
        self._cluster_index = ctypes.c_uint32.from_address(self.cpu + _CPU_CLUSTER_INDEX)
        self._translated_for: dict[frozenset[int], int] = {frozenset(): 0}
        self._debug_exception = ctypes.c_uint64.from_address(
            self._pointer(self.cpu + _CPU_CLASS) + _CLASS_DEBUG_EXCEPTION
        )
        if self._debug_exception.value != self.symbol("breakpoint_handler_x86_64"):
            raise BackendError("unicorn's CPU class is not laid out as 2.1.4's")
        self.regs = (ctypes.c_uint64 * 16).from_address(self.address("regs"))  # RAX RCX RDX RBX RSP RBP RSI RDI R8..
        self.eip = self.u64("eip")
        self.eflags = self.u64("eflags")
        self.hflags = self.u32("hflags")
        self.hflags2 = self.u32("hflags2")
        self.cr = (ctypes.c_uint64 * 5).from_address(self.address("cr"))
        self.dr = (ctypes.c_uint64 * 8).from_address(self.address("dr"))
        self.error_code = self.u32("error_code")
        self.old_exception = ctypes.c_int32.from_address(self.address("old_exception"))
        self.a20_mask = ctypes.c_int32.from_address(self.address("a20_mask"))
        self.features = (ctypes.c_uint64 * 2).from_address(self.address("features"))  # CPUID.1 EDX, ECX
        self._intercept = self.u64("intercept")
        # Stops happen only at block entries: a stop inside a block re-executes a load or store.
        ctypes.c_uint8.from_address(self._handle + _UC_NO_EXIT_REQUEST).value = 1
        # No address ends a run. Otherwise the one that start() must name would, and 0 is an address like another.
        self.uc.ctl_exits_enabled(True)

    # --- views

    @staticmethod
    def _pointer(address: int) -> int:
        return ctypes.c_uint64.from_address(address).value

    def address(self, field: str) -> int:
        return self.env + _ENV[field]

    def u16(self, field: str) -> ctypes.c_uint16:
        return ctypes.c_uint16.from_address(self.address(field))

    def u32(self, field: str, offset: int = 0) -> ctypes.c_uint32:
        return ctypes.c_uint32.from_address(self.address(field) + offset)

    def u64(self, field: str, offset: int = 0) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(self.address(field) + offset)

    def segment(self, name: str) -> Segment:
        """es cs ss ds fs gs ldtr tr gdtr idtr."""
        places = {"ldtr": "ldt", "tr": "tr", "gdtr": "gdt", "idtr": "idt"}
        if name in places:
            return Segment.from_address(self.address(places[name]))
        return Segment.from_address(self.address("segs") + 24 * ("es", "cs", "ss", "ds", "fs", "gs").index(name))

    def set_segment(self, name: str, selector: int, base: int, limit: int, flags: int) -> None:
        """The hidden part too; update_hflags() comes after the last one."""
        segment = self.segment(name)
        segment.selector, segment.base, segment.limit, segment.flags = selector, base, limit, flags & 0xF0FF00

    @property
    def cpl(self) -> int:
        return self.hflags.value & 3

    def rflags(self) -> int:
        return int(self.uc.reg_read(x86.UC_X86_REG_RFLAGS)) & 0xFFFFFFFF

    def set_rflags(self, value: int) -> None:
        self.uc.reg_write(x86.UC_X86_REG_RFLAGS, value)

    def update_hflags(self) -> None:
        """Derive the engine's hidden flags from segments and control registers."""
        self._call("x86_update_hflags_x86_64", self.env)
        self.hflags.value &= ~_HF_OF_RFLAGS

    def set_debug_registers(self, addresses: tuple[int, int, int, int], dr7: int) -> None:
        """Arm the breakpoints of DR0 to DR3 as DR7 says, and those alone. The engine keeps a list of what is armed,
        beside the registers: writing the registers changes nothing in it."""
        update = self._lib.cpu_x86_update_dr7_x86_64
        env = ctypes.c_void_p(self.env)
        update(env, ctypes.c_uint32(_DR7_NONE))
        for i, address in enumerate(addresses):
            self.dr[i] = address
        update(env, ctypes.c_uint32(dr7))
        # The engine looks for those of code when it translates. What it had translated before is kept apart, by a
        # number that is a part of each block's key: one for every set of breakpoints.
        armed = frozenset(addresses[i] for i in range(4) if dr7 >> 2 * i & 3 and dr7 >> 16 + 4 * i & 3 == _EXECUTE)
        if armed not in self._translated_for and len(self._translated_for) > 0xFF:
            self.uc.ctl_flush_tb()
            self._translated_for = {frozenset(): 0}
        self._cluster_index.value = self._translated_for.setdefault(armed, len(self._translated_for))

    @property
    def breakpoints_armed(self) -> bool:
        return bool(self.dr[7] & 0xFF)

    def set_cr0(self, value: int) -> None:
        """With what follows from it: EFER.LMA, hidden flags, translations."""
        self._lib.cpu_x86_update_cr0_x86_64(ctypes.c_void_p(self.env), ctypes.c_uint32(value))

    def set_cr3(self, value: int) -> None:
        self._lib.cpu_x86_update_cr3_x86_64(ctypes.c_void_p(self.env), ctypes.c_uint64(value))

    def set_cr4(self, value: int) -> None:
        self._lib.cpu_x86_update_cr4_x86_64(ctypes.c_void_p(self.env), ctypes.c_uint32(value))

    def flush_tlb(self) -> None:
        self._call("tlb_flush_x86_64", self.cpu)

    def discard_code(self, start: int, end: int) -> None:
        """Drop translated code of guest-physical [start, end): the host changed RAM behind it."""
        for base, size, offset in self._ram:
            first, last = max(start, base), min(end, base + size)
            if first < last:
                self._invalidate(self._handle_pointer, offset + first - base, offset + last - base)

    def read_msr(self, number: int) -> int:
        """The engine's own MSR, past our interception."""
        kept, self._intercept.value = self._intercept.value, 0
        value = int(self.uc.msr_read(number))
        self._intercept.value = kept
        return value

    def write_msr(self, number: int, value: int) -> None:
        kept, self._intercept.value = self._intercept.value, 0
        self.uc.msr_write(number, value)
        self._intercept.value = kept

    def set_a20(self, enabled: bool) -> None:
        wanted = -1 if enabled else ~(1 << 20)
        if self.a20_mask.value != wanted:
            self.a20_mask.value = wanted
            self.flush_tlb()

    def hide_features(self, leaf1_ecx: int, leaf1_edx: int) -> None:
        """Make instructions whose CPUID.1 bit is not in the given words raise #UD (or keep their CR bits clear)."""
        for index, allowed in enumerate((leaf1_edx, leaf1_ecx)):
            self.features[index] &= allowed

    # --- memory and hooks

    def map_ram(self, base: int, size: int, pointer: int) -> None:
        """Guest-physical [base, base + size) is this computer's memory at `pointer`. The engine counts RAM in the order
        of mapping: an offset in that is what it knows translated code by."""
        self.uc.mem_map_ptr(base, size, uc_const.UC_PROT_ALL, pointer)
        self._ram.append((base, size, sum(each for _, each, _ in self._ram)))

    def map_hole(self, base: int, size: int, read: Read, write: Write) -> None:
        """Send accesses of [base, base+size), where no RAM is, to `read(address, size)` and `write(address, size,
        value)`. Below 4 GiB it is mapped in pieces: the engine can give up a piece, to show a device's own RAM there,
        but a large one not in any time."""

        def on_read(_uc: object, offset: int, width: int, place: int | None) -> int:
            return read((place or 0) + offset, width)

        def on_write(_uc: object, offset: int, width: int, value: int, place: int | None) -> None:
            write((place or 0) + offset, width, value)

        self._hole = self.keep(_MMIO_READ(on_read)), self.keep(_MMIO_WRITE(on_write))
        while size:
            whole = _PIECE if base >= HOLE_START else _LARGE_PIECE
            piece = min(size, whole - base % whole) if base < _4_GIB else size
            self._map_mmio(base, piece)
            if base < _4_GIB:
                self._pieces[base, piece] = [(base, piece)]
            base, size = base + piece, size - piece

    def show_windows(self, windows: list[Shown]) -> None:
        """Show devices' own RAM in the hole below 4 GiB, and nothing of it elsewhere. At a boundary only, never from a
        hook."""
        changed = False
        for (base, size), now in self._pieces.items():
            wanted: list[Shown | tuple[int, int]] = []
            at = base
            for window in sorted(windows):
                first, last = max(window.base, base), min(window.base + window.size, base + size)
                if first < last:
                    wanted += [(at, first - at)] if at < first else []
                    wanted.append(Shown(first, last - first, window.address + first - window.base, window.writable))
                    at = last
            wanted += [(at, base + size - at)] if at < base + size else []
            if wanted == now:
                continue
            changed = True
            for each in now:
                self.uc.mem_unmap(each[0], each[1])
            for each in wanted:
                if isinstance(each, Shown):
                    self.uc.mem_map_ptr(each.base, each.size, uc_const.UC_PROT_ALL, each.address)
                    if not each.writable:
                        self._protect(each.base)
                else:
                    self._map_mmio(*each)
            self._pieces[base, size] = wanted
        if changed:
            self.uc.ctl_flush_tb()  # the engine knows code by its place in all RAM, and gives places again
            self.flush_tlb()

    def _protect(self, base: int) -> None:
        """Let writes of the region at `base` be lost, as QEMU's ROM does; the API's own protection ends the run."""
        find = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
        region = find(self._memory_mapping)(self._handle, base)
        self._lib.memory_region_set_readonly_x86_64(ctypes.c_void_p(region), ctypes.c_bool(True))

    def _map_mmio(self, base: int, size: int) -> None:
        """One pair of callbacks serves every piece: the engine gives them the offset in it, and its base."""
        read, write = self._hole
        place = ctypes.c_void_p(base)
        self._check(self._lib.uc_mmio_map(self._handle_pointer, ctypes.c_uint64(base), ctypes.c_size_t(size),
                                          read, place, write, place))  # fmt: skip

    @staticmethod
    def _check(error: int) -> None:
        if error:
            raise BackendError(f"unicorn refuses: {unicorn.UcError(error)}")

    def hook(self, kind: int, function: int, data: int, instruction: int | None = None) -> None:
        """uc_hook_add with a raw function address, which the Python binding has no way to pass."""
        handle = ctypes.c_size_t()
        extra = [] if instruction is None else [ctypes.c_int(instruction)]
        error = self._lib.uc_hook_add(
            ctypes.c_void_p(self._handle),
            ctypes.byref(handle),
            ctypes.c_int(kind),
            ctypes.c_void_p(function),
            ctypes.c_void_p(data),
            ctypes.c_uint64(1),
            ctypes.c_uint64(0),
            *extra,
        )
        self._check(error)

    def keep(self, thing: Any) -> Any:
        self._keep.append(thing)
        return thing

    def symbol(self, name: str) -> int:
        """Address of one of the library's exported functions."""
        try:
            address = ctypes.cast(getattr(self._lib, name), ctypes.c_void_p).value
        except AttributeError:
            raise BackendError(f"unicorn's library does not export {name}") from None
        assert address is not None
        return address

    def _call(self, name: str, pointer: int) -> None:
        getattr(self._lib, name)(ctypes.c_void_p(pointer))

    def intercept(self, acknowledge: Callable[[], int], readable_msrs: tuple[int, ...]) -> None:
        """Take interrupt vectors from `acknowledge()` at the moment of INTA. Send to HOOK_INTR, as EXIT_*, every MSR
        access but reads of `readable_msrs`, every access of a debug register, every read of CR8, and every write of a
        control register or a table's register."""
        permissions = bytearray(b"\xff" * 0x2000)
        for number in readable_msrs:
            bit = 2 * (number if number < 0x2000 else 0x2000 + number - 0xC0000000)
            permissions[bit // 8] &= ~(1 << bit % 8) & 0xFF
        self.uc.mem_map(_MSRPM, 0x2000)
        self.uc.mem_write(_MSRPM, bytes(permissions))
        self.uc.mem_map(_HIDDEN + 0x1000, 0x1000)
        offset = VMCB - _HIDDEN

        def read(_uc: object, where: int, _size: int, _data: object) -> int:
            if where == offset + _VMCB_VECTOR:
                return acknowledge()
            shift = 8 * (where - offset - _VMCB_MSRPM)
            return _MSRPM >> shift & 0xFFFFFFFF if 0 <= shift < 64 else 0

        self.uc.mmio_map(_HIDDEN, 0x1000, read, None, lambda *_: None, None)
        self.u64("vm_vmcb").value = VMCB
        self._intercept.value = _INTERCEPT
        self.u16("intercept_cr_read").value = _INTERCEPT_CR_READ
        self.u16("intercept_cr_write").value = _INTERCEPT_CR_WRITE
        self.u16("intercept_dr_read").value = self.u16("intercept_dr_write").value = _INTERCEPT_DR
        self.hflags.value |= HF_GUEST
        self.hflags2.value |= HF2_GIF

    def filter_stores(self, code: Code) -> bool:
        """Put the code's `store_filter` before the memory look-up of slow stores. False where this build's slow store
        is not the one we know: then such stores stay slow, and nothing else changes."""
        start = self.symbol("tlb_set_dirty_x86_64")
        found = ctypes.string_at(start, 0x1000).find(_SLOW_STORE)
        if found < 0:
            return False
        pointer = ctypes.c_uint64.from_address(self._handle + _UC_MEMORY_MAPPING)
        code.set(store_site=start + found + len(_SLOW_STORE), memory_mapping=pointer.value)
        pointer.value = code["store_filter"]
        return True

    def intercept_pauses(self, on: bool) -> None:
        """Send PAUSE to HOOK_INTR too, or not."""
        if on:
            self._intercept.value |= _INTERCEPT_PAUSE
        else:
            self._intercept.value &= ~_INTERCEPT_PAUSE

    def kept_registers(self) -> Kept:
        """A copy of all registers."""
        kept = Kept()
        ctypes.memmove(kept.memory, self.env, _REGISTERS)
        kept.dr7 = self.dr[7]
        return kept

    def restore_registers(self, kept: Kept) -> None:
        """No breakpoint may be armed, now or then: an armed one is a host pointer beside the register."""
        ctypes.memmove(self.env, kept.memory, _REGISTERS)
        self.settle_down()
        self.flush_tlb()

    def swap_registers(self, gone: Kept, come: Kept) -> None:
        """Keep all registers in `gone`, and have those of `come`. What is translated of addresses stays: to be read
        only, or `flush_tlb` comes next."""
        dr7, a20 = self.dr[7], self.a20_mask.value
        if dr7 & 0xFF:
            self._lib.cpu_x86_update_dr7_x86_64(ctypes.c_void_p(self.env), ctypes.c_uint32(_DR7_NONE))
        ctypes.memmove(gone.memory, self.env, _REGISTERS)
        gone.dr7 = dr7
        ctypes.memmove(self.env, come.memory, _REGISTERS)
        self.a20_mask.value = a20  # there is one gate
        if (dr7 | come.dr7) & 0xFF:
            self.set_debug_registers((self.dr[0], self.dr[1], self.dr[2], self.dr[3]), come.dr7)

    def raise_fault(self, vector: int, error_code: int) -> None:
        """Set up a fault for the INTR hook to deliver, in place of what it was called for."""
        self._set_exception(vector, error_code)
        self.eflags.value |= RF

    def _set_exception(self, vector: int, error_code: int) -> None:
        self.exception_index.value = vector
        self.error_code.value = error_code
        self.u32("exception_is_int").value = 0
        if vector == 8 or vector == 14 or vector in CONTRIBUTORY:
            self.old_exception.value = vector  # what comes of a fault in its delivery (SDM vol. 3, table 6-5)

    def retire(self) -> bool:
        """End an instruction that was done in the engine's place. True when a single-step trap is to be delivered."""
        self.hflags.value &= ~HF_INHIBIT_IRQ
        self.eflags.value &= ~RF
        if not self.eflags.value & TF:
            return False
        self.dr[6] |= _DR6_BS
        self._set_exception(1, 0)
        return True

    def settle_exception(self) -> None:
        """Nothing is set up: what was has been delivered."""
        self.exception_index.value = self.old_exception.value = -1
        self.u32("exception_is_int").value = 0

    def one_instruction(self, on: bool) -> None:
        """Make the next block that is looked for one instruction long, or not."""
        self.cflags_next_tb.value = 1 if on else _CFLAGS_NONE

    def settle_down(self) -> None:
        """Forget what is under way and is no part of the state: the engine stands between two instructions."""
        self.settle_exception()
        self.interrupt_request.value = 0
        self.cflags_next_tb.value = _CFLAGS_NONE

    @property
    def nmi_blocked(self) -> bool:
        return bool(self.hflags2.value & HF2_NMI)

    def cr8(self) -> int:
        return int(self.uc.reg_read(x86.UC_X86_REG_CR8)) & 0xF

    def set_cr8(self, value: int) -> None:
        self.uc.reg_write(x86.UC_X86_REG_CR8, value)

    def write_physical(self, address: int, data: bytes) -> None:
        """Guest-physical memory as the CPU's own tables see it; lost where nothing is."""
        address &= self.a20_mask.value
        try:
            self.uc.mem_write(address, data)
        except unicorn.UcError:
            return
        self.discard_code(address, address + len(data))

    def read_physical(self, address: int, size: int) -> bytes:
        """Guest-physical memory as the CPU's page walks see it; ones where nothing is."""
        data = ctypes.create_string_buffer(size)
        if self._mem_read(self._handle_pointer, address & self.a20_mask.value, data, size):
            return b"\xff" * size
        return data.raw

    def two_bytes(self, linear: int) -> int:
        """What is at a linear address, as the CPU's page tables lead there; 0 where nothing is mapped."""
        self._two_bytes.value = 0
        self._rw_debug(self.cpu, linear, ctypes.addressof(self._two_bytes), 2, False)
        return self._two_bytes.value

    def start(self, rip: int) -> None:
        """Run from `rip` until a hook stops it or the CPU halts. Raises unicorn.UcError."""
        self.uc.emu_start(rip, 0)

    def on_breakpoint(self, deliver: Callable[[], None]) -> None:
        """Call `deliver` for the #DB of a breakpoint that code has come to, in the place of the engine's own handler,
        which takes EIP for a linear address; then the run stops. DR6 is set (SDM vol. 3, 17.2.3). Of breakpoints it is
        only those of code that this engine looks for."""

        def handler(_cpu: int) -> None:
            code, dr7 = self.segment("cs"), self.dr[7]
            linear = code.base + self.eip.value & (_MASK64 if code.flags >> 21 & 1 else 0xFFFFFFFF)
            met = [i for i in range(4) if dr7 >> 16 + 4 * i & 3 == _EXECUTE and self.dr[i] == linear]
            self.dr[6] = self.dr[6] & ~0xF | sum(1 << i for i in met)
            if any(dr7 >> 2 * i & 3 for i in met):
                deliver()
            else:
                self.eflags.value |= RF  # there is nothing at this instruction
                self.hflags.value |= HF_INHIBIT_IRQ
            self.uc.emu_stop()

        self._debug_exception.value = ctypes.cast(self.keep(_OF_CPU(handler)), ctypes.c_void_p).value or 0

    def close(self) -> None:
        """Free the engine. No view may be used afterwards."""
        for name in [n for n, v in vars(self).items() if isinstance(v, ctypes._SimpleCData | ctypes.Array)]:
            delattr(self, name)
        del self.uc
        self._keep.clear()


class Kept:
    """All registers of a CPU that is not on the engine, as it has them. No breakpoint is armed in there: `dr7` says
    which are to be."""

    def __init__(self) -> None:
        self.memory = (ctypes.c_uint8 * _REGISTERS)()
        self.dr7 = _DR7_NONE
        self._eflags = ctypes.c_uint64.from_buffer(self.memory, _ENV["eflags"])
        self._hflags2 = ctypes.c_uint32.from_buffer(self.memory, _ENV["hflags2"])

    @property
    def eflags(self) -> int:
        """But for those of arithmetic."""
        return self._eflags.value

    @property
    def nmi_blocked(self) -> bool:
        return bool(self._hflags2.value & HF2_NMI)

    def copy(self, other: Kept) -> None:
        """Be as another."""
        ctypes.memmove(self.memory, other.memory, _REGISTERS)
        self.dr7 = other.dr7


class Segment(ctypes.Structure):
    """The engine's SegmentCache: `flags` holds the attribute bits 8..23 of a descriptor's high word."""

    _fields_ = [
        ("selector", ctypes.c_uint32),
        ("_pad", ctypes.c_uint32),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    ]
    selector: int
    base: int
    limit: int
    flags: int
