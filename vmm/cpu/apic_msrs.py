"""The MSRs that a CPU has with a local APIC: the APIC's own, and what kernels ask a CPU of the model's vendor for.

Sources: Intel SDM vol. 3, 11.4.4 (IA32_APIC_BASE), 11.5.4.1 (IA32_TSC_DEADLINE); AMD APM vol. 2, 9.3 (machine checks)
and 13.2 (performance counters); BKDG of family 10h, 3.10 (MSRC001_0055).
"""

from __future__ import annotations

from vmm.cpu.protocol import Apic

_MACHINE_CHECKS = (0x179, 0x17A)  # MCG_CAP: no bank reports one; MCG_STATUS: none is handled
_COUNTERS = range(0xC001_0000, 0xC001_0008)  # four that never count, and what they are to count: nothing
_INTERRUPT_PENDING = 0xC001_0055  # no C1E


def read(apic: Apic, number: int) -> int | None:
    """None: #GP(0)."""
    match number:
        case 0x1B:
            return apic.base()
        case 0x6E0:
            return apic.deadline_msr()
        case _ if number in (*_MACHINE_CHECKS, *_COUNTERS, _INTERRUPT_PENDING):
            return 0
    return None


def write(apic: Apic, number: int, value: int) -> bool:
    """False: #GP(0), and nothing happened."""
    match number:
        case 0x1B:
            return apic.set_base(value)
        case 0x6E0:
            apic.set_deadline_msr(value)
            return True
    return number in _COUNTERS or (number == _MACHINE_CHECKS[1] and value == 0)
