"""For tests of devices and machines, yours as well as ours. Needs the `test` extra (Hypothesis).

from vmm.testing import check_device

def test_thermometer():
    check_device(Thermometer)
"""

from vmm.testing.case import Case
from vmm.testing.devices import check_device, device_machine
from vmm.testing.rig import Rig, wiring
from vmm.testing.strategies import states, values
from vmm.testing.subject import Subject

__all__ = ["Case", "Rig", "Subject", "check_device", "device_machine", "states", "values", "wiring"]
