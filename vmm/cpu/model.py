"""The one CPU model both backends present: `x86-64-v2`, what the emulated CPU and any KVM host of ten years can do.

No AVX, XSAVE, MTRR, RDRAND or hypervisor leaves. References: SDM vol. 2 CPUID; AMD APM vol. 3 appendix E.
"""

from __future__ import annotations

MODEL_NAME = "x86-64-v2"
TSC_KHZ = 4_000_000  # a host whose TSC is slower can still show it; one that is faster may not be able to
PHYS_BITS = 40
LINEAR_BITS = 48

# fmt: off
_F1_EDX = sum(1 << b for b in (
    0, 1, 2, 3, 4, 5, 6, 8, 11, 13,       # fpu vme de pse tsc msr pae cx8 sep pge
    15, 16, 17, 19, 23, 24, 25, 26,       # cmov pat pse36 clflush mmx fxsr sse sse2
))
_F1_ECX = sum(1 << b for b in (0, 9, 13, 19, 20, 23))           # sse3 ssse3 cx16 sse4.1 sse4.2 popcnt
_F81_EDX = (_F1_EDX & 0x0183F3FF & ~(1 << 11)) | sum(1 << b for b in (11, 20, 26, 27, 29))  # syscall nx 1gb rdtscp lm
_F81_ECX = 1                                                      # lahf_lm
# fmt: on

_VENDOR = b"AuthenticAMD"
_BRAND = b"anyhyve x86-64-v2 virtual CPU".ljust(48, b"\0")


def _words(text: bytes) -> tuple[int, ...]:
    return tuple(int.from_bytes(text[i : i + 4], "little") for i in range(0, len(text), 4))


_vendor = _words(_VENDOR)
_brand = _words(_BRAND)

# leaf -> (eax, ebx, ecx, edx); every leaf's answer is the same for all sub-leaves, absent ones are zero
CPUID: dict[int, tuple[int, int, int, int]] = {
    0x00000000: (1, _vendor[0], _vendor[2], _vendor[1]),
    0x00000001: (0x00060FB1, 0x00000800, _F1_ECX, _F1_EDX),  # family 15, model 107; CLFLUSH line 64 bytes
    0x80000000: (0x80000008, _vendor[0], _vendor[2], _vendor[1]),
    0x80000001: (0x00060FB1, 0, _F81_ECX, _F81_EDX),
    0x80000002: (_brand[0], _brand[1], _brand[2], _brand[3]),
    0x80000003: (_brand[4], _brand[5], _brand[6], _brand[7]),
    0x80000004: (_brand[8], _brand[9], _brand[10], _brand[11]),
    0x80000007: (0, 0, 0, 1 << 8),  # invariant TSC
    0x80000008: (LINEAR_BITS << 8 | PHYS_BITS, 0, 0, 0),
}


_APIC, _APIC_ENABLED, _ARAT = 1 << 9, 1 << 11, 1 << 2
_TSC_DEADLINE, _HYPERVISOR = 1 << 24, 1 << 31
_HTT, _CMP_LEGACY = 1 << 28, 1 << 1  # there are several cores
_MACHINE_CHECK = 1 << 7 | 1 << 14  # MCE, MCA


def _with_apic() -> dict[int, tuple[int, int, int, int]]:
    eax, ebx, ecx, edx = CPUID[1]
    return {
        **CPUID,
        0: (6, *CPUID[0][1:]),
        # Told that this is a hypervisor's, kernels do not look for the counters of a processor.
        1: (eax, ebx, ecx | _TSC_DEADLINE | _HYPERVISOR, edx | _MACHINE_CHECK | _APIC),
        6: (_ARAT, 0, 0, 0),  # its timer always runs
        0x80000001: (*CPUID[0x80000001][:3], CPUID[0x80000001][3] | _MACHINE_CHECK),
    }


CPUID_WITH_APIC = _with_apic()  # of a CPU that has a local APIC, which is enabled


def cpuid(
    leaf: int, subleaf: int, apic_base: int | None = None, number: int = 0, cpus: int = 1
) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX. Leaves beyond the highest answer zero, as AMD's do. `apic_base` is IA32_APIC_BASE of a CPU
    that has a local APIC, `number` its id; `cpus` are the cores of one package (APM vol. 3, E.4.7)."""
    eax, ebx, ecx, edx = (CPUID if apic_base is None else CPUID_WITH_APIC).get(leaf, (0, 0, 0, 0))
    if leaf == 1 and apic_base is not None:
        ebx |= number << 24
        if not apic_base & _APIC_ENABLED:
            edx &= ~_APIC
    if cpus > 1:
        if leaf == 1:
            ebx, edx = ebx | cpus << 16, edx | _HTT
        elif leaf == 0x80000001:
            ecx |= _CMP_LEGACY
        elif leaf == 0x80000008:
            ecx |= cpus - 1 | (cpus - 1).bit_length() << 12
    return eax, ebx, ecx, edx


def leaves(apic: bool, number: int = 0, cpus: int = 1) -> dict[int, tuple[int, int, int, int]]:
    """All there are, of CPU `number` of `cpus`; with `apic`, of one that has a local APIC, which is enabled."""
    base = _APIC_ENABLED if apic else None
    return {leaf: cpuid(leaf, 0, base, number, cpus) for leaf in (CPUID_WITH_APIC if apic else CPUID)}


_FEATURES = {  # (leaf, register: 2 ECX, 3 EDX) -> names of the bits
    (1, 2): dict(zip((0, 9, 13, 19, 20, 23), ("pni", "ssse3", "cx16", "sse4_1", "sse4_2", "popcnt"), strict=True)),
    (1, 3): {0: "fpu", 4: "tsc", 6: "pae", 8: "cx8", 11: "sep", 13: "pge", 15: "cmov", 19: "clflush", 24: "fxsr",
             25: "sse", 26: "sse2"},
    (0x80000001, 3): {11: "syscall", 20: "nx", 26: "pdpe1gb", 27: "rdtscp", 29: "lm"},
}  # fmt: skip


def lacking(host: dict[int, tuple[int, int, int, int]]) -> list[str]:
    """Features of the model that a host with these CPUID leaves has not got, by their names in /proc/cpuinfo."""
    return [
        name
        for (leaf, register), bits in _FEATURES.items()
        for bit, name in bits.items()
        if CPUID[leaf][register] >> bit & 1 and not host.get(leaf, (0, 0, 0, 0))[register] >> bit & 1
    ]
