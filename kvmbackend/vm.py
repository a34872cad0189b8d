"""One KVM virtual machine and its CPUs, set up: RAM slots, CPUID of the model, the MSRs the model has, its TSC rate.

There is no in-kernel interrupt controller or timer: those are the board's, as on every backend.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

from kvmbackend import abi, state
from vmm.cpu import model as cpu_model
from vmm.errors import BackendError
from vmm.ram import Ram

DEVICE = "/dev/kvm"
_MIB = 1 << 20

# Three pages the kernel wants below 4 GiB on hosts that cannot run real mode natively: in the hole, where no RAM is.
_IDENTITY_MAP, _TSS = 0xFFFBC000, 0xFFFBD000

# (first, last): an access of any other MSR is #GP(0), as on the emulated CPU; or ours to answer, of a CPU with an APIC.
_MSR_RANGES = ((0x174, 0x176), (0x277, 0x277), (0xC0000080, 0xC0000084), (0xC0000100, 0xC0000103))


class Vm:
    """What a machine's CPUs have in common: RAM, and which MSRs they have. `ring` is the page of posted writes, once
    there is a CPU (None: not here). `apic`: each CPU has a local APIC, which is the board's. Then MSRs that KVM has not
    got, and writes of the TSC, are exits."""

    def __init__(self, ram: Ram, apic: bool = False) -> None:
        self.apic = apic
        self.ring: memoryview | None = None
        self._ram, self._shown = ram, ram.changes
        self._a20 = True
        self._descriptors: list[int] = []
        self._slots = 0
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        self.system = self._keep(open_device())
        self.fd = self._keep(abi.call("KVM_CREATE_VM", self.system, abi.CREATE_VM))
        if abi.extension(self.fd, abi.CAP_SET_IDENTITY_MAP_ADDR):
            address = (ctypes.c_uint8 * 8)(*_IDENTITY_MAP.to_bytes(8, "little"))
            abi.call("KVM_SET_IDENTITY_MAP_ADDR", self.fd, abi.SET_IDENTITY_MAP_ADDR, address)
        if abi.extension(self.fd, abi.CAP_SET_TSS_ADDR):
            abi.call("KVM_SET_TSS_ADDR", self.fd, abi.SET_TSS_ADDR, _TSS)
        self._allow_msrs()
        self._map_ram()

    def _keep(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    def _allow_msrs(self) -> None:
        wanted: Any = abi.MsrFilter(flags=abi.MSR_FILTER_DEFAULT_DENY)
        bitmap = ctypes.create_string_buffer(b"\xff" * 8)
        both = abi.MSR_FILTER_READ | abi.MSR_FILTER_WRITE
        tsc = abi.MSR_FILTER_READ if self.apic else both
        ranges = [(state.TSC, state.TSC, tsc), *((first, last, both) for first, last in _MSR_RANGES)]
        for place, (first, last, flags) in zip(wanted.ranges, ranges, strict=False):
            place.flags = flags
            place.base, place.nmsrs, place.bitmap = first, last - first + 1, ctypes.addressof(bitmap)
        abi.call("KVM_X86_SET_MSR_FILTER", self.fd, abi.SET_MSR_FILTER, wanted)
        if self.apic:
            exits = abi.EnableCap(cap=abi.REQUIRED["X86_USER_SPACE_MSR"])
            exits.args[0] = abi.MSR_EXIT_FILTER
            abi.call("KVM_ENABLE_CAP: MSRs in user space", self.fd, abi.ENABLE_CAP, exits)

    def set_a20(self, enabled: bool) -> None:
        if enabled != self._a20:
            self._a20 = enabled
            self._map_ram()

    def show_ram(self) -> None:
        """Where the RAM shows itself otherwise than before, have the guest see that."""
        if self._shown != self._ram.changes:
            self._shown = self._ram.changes
            self._map_ram()

    def _map_ram(self) -> None:
        """Put RAM, and devices' windows of it, where the guest sees it. With A20 off bit 20 of an address
        is not seen: each odd MiB shows the even one below it."""
        a20 = self._a20
        for slot in range(self._slots):
            self._slot(slot, 0, 0, 0)
        self._slots = 0
        for region in self._ram.regions:
            pieces = [(0, region.size)]
            if not a20:
                pieces = [(at, min(_MIB, region.size - at)) for at in range(0, region.size, _MIB)]
            for at, size in pieces:
                seen = at if a20 else at & ~_MIB
                self._slot(self._slots, region.base + at, size, region.address + seen)
                self._slots += 1
        for window in self._ram.shown():
            if not window.writable and not abi.extension(self.fd, abi.CAP_READONLY_MEM):
                raise BackendError("kvm: this host's KVM has not got KVM_CAP_READONLY_MEM, for a device's ROM")
            flags = 0 if window.writable else abi.MEM_READONLY
            self._slot(self._slots, window.base, window.size, window.address, flags)
            self._slots += 1

    def _slot(self, number: int, base: int, size: int, address: int, flags: int = 0) -> None:
        slot = abi.MemoryRegion(
            slot=number, flags=flags, guest_phys_addr=base, memory_size=size, userspace_addr=address
        )
        abi.call("KVM_SET_USER_MEMORY_REGION", self.fd, abi.SET_USER_MEMORY_REGION, slot)

    def defer_writes(self, port: int, on: bool) -> None:
        """Whether byte writes of `port` go to the ring instead of leaving the guest."""
        request = abi.REGISTER_COALESCED_MMIO if on else abi.UNREGISTER_COALESCED_MMIO
        abi.call("KVM_REGISTER_COALESCED_MMIO", self.fd, request, abi.CoalescedZone(addr=port, size=1, pio=1))

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


class Vcpu:
    """One CPU of a machine, `number` of `cpus`: `fd` is its descriptor, `run` its shared page."""

    def __init__(self, vm: Vm, number: int = 0, cpus: int = 1) -> None:
        self.vm = vm
        self.fd = abi.call("KVM_CREATE_VCPU", vm.fd, abi.CREATE_VCPU, number)
        self._ours = number == 0
        try:
            self._set_cpuid(number, cpus)
            size = abi.call("KVM_GET_VCPU_MMAP_SIZE", vm.system, abi.GET_VCPU_MMAP_SIZE)
            self._shared = mmap.mmap(self.fd, size)
            self.run = memoryview(self._shared)
            self.tsc_khz = abi.call("KVM_GET_TSC_KHZ", self.fd, abi.GET_TSC_KHZ)
            if self._ours:
                page = abi.extension(vm.fd, abi.CAP_COALESCED_MMIO)
                posts = page and abi.extension(vm.fd, abi.CAP_COALESCED_PIO)
                vm.ring = self.run[page * mmap.PAGESIZE : (page + 1) * mmap.PAGESIZE] if posts else None
        except BaseException:
            self.close()
            raise

    def _set_cpuid(self, number: int, cpus: int) -> None:
        host = supported_cpuid(self.vm.system)
        # What KVM does not offer but the processor has runs natively, or comes back to us to be finished.
        if lacking := [name for name in cpu_model.lacking(host) if name not in _processor_flags()]:
            raise BackendError(f"kvm: this host's CPU has not got {', '.join(lacking)} of {cpu_model.MODEL_NAME}")
        leaves = cpu_model.leaves(self.vm.apic, number, cpus)
        model: Any = abi.Cpuid(nent=len(leaves))
        for entry, (leaf, registers) in zip(model.entries, leaves.items(), strict=False):
            entry.function = leaf
            entry.eax, entry.ebx, entry.ecx, entry.edx = registers
        abi.call("KVM_SET_CPUID2", self.fd, abi.SET_CPUID2, model)

    def set_tsc_khz(self, khz: int) -> None:
        """Raises BackendError where the host cannot: without hardware scaling a TSC can be made faster, not slower."""
        if khz != self.tsc_khz:
            abi.call(f"this host cannot run the TSC at {khz} kHz", self.fd, abi.SET_TSC_KHZ, khz)
            self.tsc_khz = khz

    def read_tsc(self) -> int:
        return state.read_msr(self.fd, state.TSC)

    def write_tsc(self, value: int) -> None:
        # KVM takes a write near what the counter would show for an attempt to synchronise CPUs, and ignores the
        # difference; so it takes any write of 0. A write far away is taken as it is, and so is the next one.
        state.write_msr(self.fd, state.TSC, value ^ 1 << 62)
        state.write_msr(self.fd, state.TSC, value or 1)

    def close(self) -> None:
        """The first's is closed last: the ring lies in its page."""
        if hasattr(self, "run"):
            if self._ours and self.vm.ring is not None:
                self.vm.ring.release()
            self.run.release()
            self._shared.close()
        os.close(self.fd)


def supported_cpuid(system: int) -> dict[int, tuple[int, int, int, int]]:
    """EAX, EBX, ECX and EDX of each leaf (subleaf 0) that KVM, open as `system`, can offer. Raises BackendError."""
    supported: Any = abi.Cpuid(nent=abi.MAX_CPUID)
    abi.call("KVM_GET_SUPPORTED_CPUID", system, abi.GET_SUPPORTED_CPUID, supported)
    return {e.function: (e.eax, e.ebx, e.ecx, e.edx) for e in supported.entries[: supported.nent] if not e.index}


def _processor_flags() -> set[str]:
    with open("/proc/cpuinfo") as lines:
        return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def open_device() -> int:
    """A descriptor of /dev/kvm. Raises BackendError that names what is missing."""
    try:
        system = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BackendError(f"kvm: there is no {DEVICE} (no virtualization here, or its module is not loaded)") from None
    except PermissionError:
        raise BackendError(f"kvm: no permission to read and write {DEVICE} (on Debian: join the group kvm)") from None
    except OSError as error:
        raise BackendError(f"kvm: cannot open {DEVICE}: {error.strerror}") from None
    try:
        version = abi.call("KVM_GET_API_VERSION", system, abi.GET_API_VERSION)
        if version != abi.API_VERSION:
            raise BackendError(f"kvm: {DEVICE} speaks version {version} of the interface, not {abi.API_VERSION}")
        for name, number in abi.REQUIRED.items():
            if not abi.extension(system, number):
                raise BackendError(f"kvm: this host's KVM has not got KVM_CAP_{name}")
    except BaseException:
        os.close(system)
        raise
    return system
