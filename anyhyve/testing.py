"""For tests of devices and machines, yours as well as ours. What draws examples needs the `test` extra (Hypothesis).

from anyhyve.testing import check_device

def test_thermometer():
    check_device(Thermometer)
"""

from vmm.testing import (
    Case,
    Expect,
    Rig,
    RoundTrips,
    Subject,
    check_device,
    cut_anywhere,
    device_machine,
    round_trips,
    states,
    values,
    wiring,
)

__all__ = [
    "Case",
    "Expect",
    "Rig",
    "RoundTrips",
    "Subject",
    "check_device",
    "cut_anywhere",
    "device_machine",
    "round_trips",
    "states",
    "values",
    "wiring",
]
