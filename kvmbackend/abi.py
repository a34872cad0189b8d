"""KVM's interface to user space: request numbers, structures, and the one way to call them.

Linux Documentation/virt/kvm/api.rst; include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h. A request's number
holds the size of its argument, so a structure of the wrong size is refused by the kernel; sizes are asserted here too.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from ctypes import c_int64, c_uint8, c_uint16, c_uint32, c_uint64

from vmm.errors import BackendError

API_VERSION = 12


# --- structures


class Segment(ctypes.Structure):
    """struct kvm_segment"""

    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class Table(ctypes.Structure):
    """struct kvm_dtable"""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


REGS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


class Regs(ctypes.Structure):
    """struct kvm_regs"""

    _fields_ = [(name, c_uint64) for name in REGS]


class Sregs(ctypes.Structure):
    """struct kvm_sregs"""

    _fields_ = [
        *((name, Segment) for name in SEGMENTS),
        ("gdt", Table),
        ("idt", Table),
        *((name, c_uint64) for name in CONTROL),
        ("interrupt_bitmap", c_uint64 * 4),
    ]


class DebugRegs(ctypes.Structure):
    """struct kvm_debugregs"""

    _fields_ = [
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class VcpuEvents(ctypes.Structure):
    """struct kvm_vcpu_events"""

    _fields_ = [
        ("exception_injected", c_uint8),
        ("exception_nr", c_uint8),
        ("exception_has_error_code", c_uint8),
        ("exception_pending", c_uint8),
        ("exception_error_code", c_uint32),
        ("interrupt_injected", c_uint8),
        ("interrupt_nr", c_uint8),
        ("interrupt_soft", c_uint8),
        ("interrupt_shadow", c_uint8),
        ("nmi_injected", c_uint8),
        ("nmi_pending", c_uint8),
        ("nmi_masked", c_uint8),
        ("nmi_padding", c_uint8),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", c_uint8 * 4),
        ("triple_fault_pending", c_uint8),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


VALID_NMI_PENDING, VALID_SHADOW = 1, 4


class Xsave(ctypes.Structure):
    """struct kvm_xsave: the XSAVE area, whose first 512 bytes are FXSAVE's (SDM vol. 1, 10.5.1 and 13.4)."""

    _fields_ = [
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftw", c_uint8),
        ("reserved1", c_uint8),
        ("fop", c_uint16),
        ("fip", c_uint64),
        ("fdp", c_uint64),
        ("mxcsr", c_uint32),
        ("mxcsr_mask", c_uint32),
        ("st", (c_uint8 * 16) * 8),
        ("xmm", (c_uint8 * 16) * 16),
        ("reserved2", c_uint8 * 96),
        ("xstate_bv", c_uint64),
        ("rest", c_uint8 * (4096 - 520)),
    ]


class MsrEntry(ctypes.Structure):
    """struct kvm_msr_entry"""

    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


def msrs(count: int) -> type[ctypes.Structure]:
    """struct kvm_msrs with `count` entries."""

    class Msrs(ctypes.Structure):
        _fields_ = [("nmsrs", c_uint32), ("padding", c_uint32), ("entries", MsrEntry * count)]

    return Msrs


class CpuidEntry(ctypes.Structure):
    """struct kvm_cpuid_entry2"""

    _fields_ = [
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    ]


MAX_CPUID = 256


class Cpuid(ctypes.Structure):
    """struct kvm_cpuid2 with room for MAX_CPUID entries"""

    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", CpuidEntry * MAX_CPUID)]


class MemoryRegion(ctypes.Structure):
    """struct kvm_userspace_memory_region"""

    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


class MsrFilterRange(ctypes.Structure):
    """struct kvm_msr_filter_range: a set bit lets an access of base + bit through"""

    _fields_ = [("flags", c_uint32), ("nmsrs", c_uint32), ("base", c_uint32), ("bitmap", ctypes.c_void_p)]


class MsrFilter(ctypes.Structure):
    """struct kvm_msr_filter"""

    _fields_ = [("flags", c_uint32), ("ranges", MsrFilterRange * 16)]


MSR_FILTER_DEFAULT_DENY, MSR_FILTER_READ, MSR_FILTER_WRITE = 1, 1, 2


class EnableCap(ctypes.Structure):
    """struct kvm_enable_cap"""

    _fields_ = [("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("padding", c_uint8 * 64)]


MSR_EXIT_FILTER = 1 << 2  # of the argument of CAP_X86_USER_SPACE_MSR: those that the filter denies


class CoalescedZone(ctypes.Structure):
    """struct kvm_coalesced_mmio_zone"""

    _fields_ = [("addr", c_uint64), ("size", c_uint32), ("pio", c_uint32)]


class GuestDebug(ctypes.Structure):
    """struct kvm_guest_debug"""

    _fields_ = [("control", c_uint32), ("padding", c_uint32), ("debugreg", c_uint64 * 8)]


GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP = 1, 2

for _structure, _size in (
    (Segment, 24),
    (Table, 16),
    (Regs, 144),
    (Sregs, 312),
    (DebugRegs, 128),
    (VcpuEvents, 64),
    (Xsave, 4096),
    (MsrEntry, 16),
    (msrs(1), 24),
    (CpuidEntry, 40),
    (MemoryRegion, 32),
    (MsrFilterRange, 24),
    (MsrFilter, 392),
    (EnableCap, 104),
    (CoalescedZone, 16),
    (GuestDebug, 72),
):
    assert ctypes.sizeof(_structure) == _size, _structure


# --- request numbers: _IO, _IOR, _IOW, _IOWR of asm-generic/ioctl.h with type 0xAE


def _io(number: int) -> int:
    return 0xAE00 | number


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | 0xAE00 | number


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | 0xAE00 | number


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | 0xAE00 | number


GET_API_VERSION = _io(0x00)
CREATE_VM = _io(0x01)
CHECK_EXTENSION = _io(0x03)
GET_VCPU_MMAP_SIZE = _io(0x04)
GET_SUPPORTED_CPUID = _iowr(0x05, 8)
CREATE_VCPU = _io(0x41)
SET_USER_MEMORY_REGION = _iow(0x46, 32)
SET_TSS_ADDR = _io(0x47)
SET_IDENTITY_MAP_ADDR = _iow(0x48, 8)
REGISTER_COALESCED_MMIO = _iow(0x67, 16)
UNREGISTER_COALESCED_MMIO = _iow(0x68, 16)
RUN = _io(0x80)
GET_REGS = _ior(0x81, 144)
SET_REGS = _iow(0x82, 144)
GET_SREGS = _ior(0x83, 312)
SET_SREGS = _iow(0x84, 312)
INTERRUPT = _iow(0x86, 4)
GET_MSRS = _iowr(0x88, 8)
SET_MSRS = _iow(0x89, 8)
SET_SIGNAL_MASK = _iow(0x8B, 4)
SET_CPUID2 = _iow(0x90, 8)
NMI = _io(0x9A)
SET_GUEST_DEBUG = _iow(0x9B, 72)
GET_VCPU_EVENTS = _ior(0x9F, 64)
SET_VCPU_EVENTS = _iow(0xA0, 64)
GET_DEBUGREGS = _ior(0xA1, 128)
SET_DEBUGREGS = _iow(0xA2, 128)
ENABLE_CAP = _iow(0xA3, 104)
SET_TSC_KHZ = _io(0xA2)
GET_TSC_KHZ = _io(0xA3)
GET_XSAVE = _ior(0xA4, 4096)
SET_XSAVE = _iow(0xA5, 4096)
SET_MSR_FILTER = _iow(0xC6, 392)

# --- what we need of the host: capability number by name, KVM_CAP_*
REQUIRED = {
    "USER_MEMORY": 3,
    "EXT_CPUID": 7,
    "SET_GUEST_DEBUG": 23,
    "VCPU_EVENTS": 41,
    "DEBUGREGS": 50,
    "XSAVE": 55,
    "GET_TSC_KHZ": 61,
    "IMMEDIATE_EXIT": 136,
    "X86_USER_SPACE_MSR": 188,
    "X86_MSR_FILTER": 189,
}
CAP_SET_TSS_ADDR, CAP_COALESCED_MMIO, CAP_SET_IDENTITY_MAP_ADDR = 4, 15, 37
CAP_READONLY_MEM, CAP_COALESCED_PIO = 81, 162
CAP_MAX_VCPUS = 66
MEM_READONLY = 1 << 1

# --- struct kvm_run: offsets in bytes
RUN_WINDOW, RUN_IMMEDIATE_EXIT, RUN_REASON, RUN_READY, RUN_IF = 0, 1, 8, 12, 13
RUN_CR8, RUN_EXIT = 16, 32  # RUN_EXIT: the union of what each reason has to say
RUN_MSR_INDEX, RUN_MSR_DATA = RUN_EXIT + 12, RUN_EXIT + 16
RUN_MMIO_DATA, RUN_MMIO_WRITE = RUN_EXIT + 8, RUN_EXIT + 20

EXIT_IO, EXIT_DEBUG, EXIT_HLT, EXIT_MMIO = 2, 4, 5, 6
EXIT_IRQ_WINDOW_OPEN, EXIT_SHUTDOWN, EXIT_FAIL_ENTRY, EXIT_INTERNAL_ERROR = 7, 8, 9, 17
EXIT_SET_TPR, EXIT_RDMSR, EXIT_WRMSR = 11, 29, 30
INTERNAL_ERROR_EMULATION = 1

# --- struct kvm_coalesced_mmio_ring: first and last u32, then entries of 24 bytes {u64 addr, u32 len, u32 pio, u8[8]}
RING_ENTRIES, RING_ENTRY = 8, 24

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, c_int64]


def call(what: str, fd: int, request: int, argument: ctypes.Structure | ctypes.Array[ctypes.c_uint8] | int = 0) -> int:
    """One request. Raises BackendError that says `what` was asked for and why the host refused it."""
    try:
        if not isinstance(argument, int):
            return fcntl.ioctl(fd, request, argument)  # type: ignore[no-any-return]
        if argument < 1 << 31:
            return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise BackendError(f"kvm: {what}: {error.strerror}") from None
    # Python's ioctl takes a C int; an address above 2 GiB needs the real one.
    result = int(_libc.ioctl(fd, request, argument))
    if result < 0:
        raise BackendError(f"kvm: {what}: {os.strerror(ctypes.get_errno())}")
    return result


def extension(fd: int, number: int) -> int:
    """KVM_CHECK_EXTENSION: 0 where the host has not got it."""
    return call("KVM_CHECK_EXTENSION", fd, CHECK_EXTENSION, number)
