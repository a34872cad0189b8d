"""For tests of devices and machines, yours as well as ours. What draws examples needs the `test` extra (Hypothesis).

from anyhyve.testing import check_device

def test_thermometer():
    check_device(Thermometer)
"""

from typing import TYPE_CHECKING, Any

import vmm.testing as _testing

if TYPE_CHECKING:
    from vmm.testing import Case as Case
    from vmm.testing import Completed as Completed
    from vmm.testing import Expect as Expect
    from vmm.testing import Rig as Rig
    from vmm.testing import RoundTrips as RoundTrips
    from vmm.testing import Subject as Subject
    from vmm.testing import check_device as check_device
    from vmm.testing import cut_anywhere as cut_anywhere
    from vmm.testing import device_machine as device_machine
    from vmm.testing import round_trips as round_trips
    from vmm.testing import states as states
    from vmm.testing import values as values
    from vmm.testing import wiring as wiring

__all__ = list(_testing.__all__)


def __getattr__(name: str) -> Any:
    return getattr(_testing, name)
