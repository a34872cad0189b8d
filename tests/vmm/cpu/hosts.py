"""What known KVM hosts do otherwise than the processor they show, by test: each is expected to fail there, and to be
taken from this list when it no longer does."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from kvmbackend.vm import open_device, supported_cpuid

EXCEPTIONS = {
    # KVM without virtualization hardware: it interprets the guest's kernel, and runs its user mode natively.
    "kvm_pvm": {
        "wrmsr of a bad value": "WRMSR of PAT is not checked",
        "cr0: reserved in the high half": "a MOV to CR0 takes any value",
        "pat: no such type": "WRMSR of PAT is not checked",
        "sti_holds": "no exit when interrupts become possible between two interpreted instructions",
        "tsc_aux": "there is no TSC_AUX",
        "syscall_and_sysret": "SYSCALL needs its target to be mapped for the user",
        "test_paging_of_protected_mode": "paging outside 64-bit mode is not enforced",
        "cpuid_is_the_model[kvm-1]": "features of the host's shine through",
        "cpuid_is_the_model[kvm-13]": "features of the host's shine through",
        "for an exception-kvm": "a fault of delivery is always a double fault",
        "tsc_is_guest_time": "RDTSC shows the host's TSC, whatever the guest's was set to",
        "begins_it_anew": "there is no TSC_AUX",
        "time_stamp_counter_of_its_own": "RDTSC shows the host's TSC, whatever the guest's was set to",
        "tsc_that_is_written_moves": "RDTSC shows the host's TSC, whatever the guest's was set to",
    },
    # KVM on the SVM that QEMU 7.2 emulates.
    "qemu-svm": {
        "a gate beyond the IDT": "QEMU's error code is the vector times 16, not 8",
        "operand_of_the_other_size[64-bit": "QEMU takes 24 bits of the base",
        "an_ldtr_that_is_none": "QEMU leaves it present",
        "fault_of_delivery[gate": "QEMU's error code is the vector times 16, not 8",
        "pushes_rf[kvm-divide": "QEMU does not set RF",
        "pushes_rf[kvm-write": "QEMU does not set RF",
        "cannot_be_delivered": "QEMU's error code is the vector times 16, not 8",
        "cr0: reserved in the high half": "QEMU drops the high half",
        "cr3: beyond": "QEMU does not check CR3",
        "not canonical": "QEMU does not check bases and MSRs",
        "mxcsr: reserved": "QEMU does not check MXCSR",
        "tr: a null selector": "QEMU takes it",
        "debug_registers_can_be_watched": "QEMU does not know GD",
        "three_cpus[spinning": "QEMU takes PAUSE and the instruction behind it in one step",
    },
}
# What a host does right in one run and wrong in the next: it says nothing there.
UNSTEADY = {
    "qemu-svm": {
        "page fault without": "KVM injects the page fault, and QEMU's SVM may count it as the first of two or not",
        "not_present[0xf-False": "RIP may be behind an INT n whose delivery faults",
        "not_present[0-False": "RIP may be behind an INT n whose delivery faults",
        "sti_then_cli": "an interrupt of the host's in the shadow of STI or MOV SS ends it in QEMU's SVM",
        "holds_interrupts_back": "an interrupt of the host's in the shadow of STI or MOV SS ends it in QEMU's SVM",
        "breakpoint_is_of_one_cpu": "in QEMU's SVM a guest's breakpoints stay armed behind it, for whoever runs next",
        "breakpoint-kvm": "in QEMU's SVM a guest's breakpoints stay armed behind it, for whoever runs next",
        "writes-kvm": "in QEMU's SVM a guest's breakpoints stay armed behind it, for whoever runs next",
    },
}
# With linear addresses of 57 bits KVM asks the host for their width, not the guest.
_CPUID_LA57 = 1 << 16  # leaf 7, ECX
_LA57 = {"not canonical in 48 bits": "MSRs and GDTR take it, as on processors with such addresses"}


@cache
def host() -> str | None:
    """Which KVM this is."""
    if Path("/sys/module/kvm_pvm").exists():
        return "kvm_pvm"
    if "QEMU TCG CPU" in Path("/proc/cpuinfo").read_text():
        return "qemu-svm"
    return None


@cache
def _known() -> dict[str, str]:
    system = open_device()
    try:
        wide = supported_cpuid(system)[7][2] & _CPUID_LA57
    finally:
        os.close(system)
    return EXCEPTIONS.get(host() or "", {}) | (_LA57 if wide else {})


def exception(test: str) -> str | None:
    """Why `test` fails on this host's KVM, if it is known to."""
    return next((reason for part, reason in _known().items() if part in test), None)


def unsteady(test: str) -> str | None:
    """Why `test` says nothing on this host's KVM, if it does not."""
    return next((reason for part, reason in UNSTEADY.get(host() or "", {}).items() if part in test), None)
