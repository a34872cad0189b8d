"""The numbers of KVM's interface, written a second time: as `strace -X raw` shows them, and from linux/kvm.h."""

from __future__ import annotations

import ast

import pytest

from kvmbackend import abi
from tests.conftest import ROOT

REQUESTS = {
    "GET_API_VERSION": 0xAE00, "CREATE_VM": 0xAE01, "CHECK_EXTENSION": 0xAE03, "GET_VCPU_MMAP_SIZE": 0xAE04,
    "GET_SUPPORTED_CPUID": 0xC008AE05, "CREATE_VCPU": 0xAE41, "SET_USER_MEMORY_REGION": 0x4020AE46,
    "SET_TSS_ADDR": 0xAE47, "SET_IDENTITY_MAP_ADDR": 0x4008AE48, "REGISTER_COALESCED_MMIO": 0x4010AE67,
    "UNREGISTER_COALESCED_MMIO": 0x4010AE68, "RUN": 0xAE80, "GET_REGS": 0x8090AE81, "SET_REGS": 0x4090AE82,
    "GET_SREGS": 0x8138AE83, "SET_SREGS": 0x4138AE84, "INTERRUPT": 0x4004AE86, "GET_MSRS": 0xC008AE88,
    "SET_MSRS": 0x4008AE89, "SET_SIGNAL_MASK": 0x4004AE8B, "SET_CPUID2": 0x4008AE90, "NMI": 0xAE9A,
    "SET_GUEST_DEBUG": 0x4048AE9B, "GET_VCPU_EVENTS": 0x8040AE9F, "SET_VCPU_EVENTS": 0x4040AEA0,
    "GET_DEBUGREGS": 0x8080AEA1, "SET_DEBUGREGS": 0x4080AEA2, "SET_TSC_KHZ": 0xAEA2, "GET_TSC_KHZ": 0xAEA3,
    "ENABLE_CAP": 0x4068AEA3, "GET_XSAVE": 0x9000AEA4, "SET_XSAVE": 0x5000AEA5, "SET_MSR_FILTER": 0x4188AEC6,
}  # fmt: skip
CONSTANTS = {
    "API_VERSION": 12, "CAP_SET_TSS_ADDR": 4, "CAP_COALESCED_MMIO": 15, "CAP_SET_IDENTITY_MAP_ADDR": 37,
    "CAP_READONLY_MEM": 81, "CAP_COALESCED_PIO": 162, "MEM_READONLY": 2, "MSR_FILTER_DEFAULT_DENY": 1,
    "MSR_FILTER_READ": 1, "MSR_FILTER_WRITE": 2, "MSR_EXIT_FILTER": 4, "VALID_NMI_PENDING": 1, "VALID_SHADOW": 4,
    "GUESTDBG_ENABLE": 1, "GUESTDBG_SINGLESTEP": 2, "EXIT_IO": 2, "EXIT_DEBUG": 4, "EXIT_HLT": 5, "EXIT_MMIO": 6,
    "EXIT_IRQ_WINDOW_OPEN": 7, "EXIT_SHUTDOWN": 8, "EXIT_FAIL_ENTRY": 9, "EXIT_SET_TPR": 11, "EXIT_INTERNAL_ERROR": 17,
    "EXIT_RDMSR": 29, "EXIT_WRMSR": 30, "INTERNAL_ERROR_EMULATION": 1,
}  # fmt: skip
REQUIRED = {
    "USER_MEMORY": 3, "EXT_CPUID": 7, "SET_GUEST_DEBUG": 23, "VCPU_EVENTS": 41, "DEBUGREGS": 50, "XSAVE": 55,
    "GET_TSC_KHZ": 61, "IMMEDIATE_EXIT": 136, "X86_USER_SPACE_MSR": 188, "X86_MSR_FILTER": 189,
}  # fmt: skip
RUN_PAGE = {  # struct kvm_run: offsets
    "RUN_WINDOW": 0, "RUN_IMMEDIATE_EXIT": 1, "RUN_REASON": 8, "RUN_READY": 12, "RUN_IF": 13, "RUN_CR8": 16,
    "RUN_EXIT": 32, "RUN_MSR_INDEX": 44, "RUN_MSR_DATA": 48, "RING_ENTRIES": 8, "RING_ENTRY": 24,
}  # fmt: skip


@pytest.mark.parametrize("name", [*REQUESTS, *CONSTANTS, *RUN_PAGE])
def test_numbers(name):
    assert getattr(abi, name) == (REQUESTS | CONSTANTS | RUN_PAGE)[name]


def test_what_is_needed_of_the_host():
    assert abi.REQUIRED == REQUIRED


def named_requests():
    """(file, what is said, the constant) wherever a request stands beside its name."""
    for file in sorted((ROOT / "kvmbackend").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else []
            said = next((part.value for part in parts[:1] if isinstance(part, ast.Constant)), None)
            used = [part.attr for part in parts[1:3] if isinstance(part, ast.Attribute) and part.attr in REQUESTS]
            if isinstance(said, str) and "KVM_" in said.upper() and used:
                yield file.name, said, used[0]


def test_an_error_names_the_request_that_was_made():
    found = list(named_requests())
    assert len(found) > 15
    for file, said, constant in found:
        name = said.split(":")[0].removeprefix("KVM_").removeprefix("X86_")
        assert name == constant, f"{file}: {said} is said of {constant}"
