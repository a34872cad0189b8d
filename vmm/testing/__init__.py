"""Tests of devices and machines: each name is imported when it is first asked for, for only some need Hypothesis, and
pytest loads the plugin in here wherever anyhyve is installed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmm.testing.case import Case as Case
    from vmm.testing.cuts import cut_anywhere as cut_anywhere
    from vmm.testing.devices import check_device as check_device
    from vmm.testing.devices import device_machine as device_machine
    from vmm.testing.expect import Expect as Expect
    from vmm.testing.rig import Rig as Rig
    from vmm.testing.rig import wiring as wiring
    from vmm.testing.roundtrip import RoundTrips as RoundTrips
    from vmm.testing.roundtrip import round_trips as round_trips
    from vmm.testing.shell import Completed as Completed
    from vmm.testing.strategies import states as states
    from vmm.testing.strategies import values as values
    from vmm.testing.subject import Subject as Subject

_WHERE = {
    "Case": "case",
    "Completed": "shell",
    "Expect": "expect",
    "Rig": "rig",
    "RoundTrips": "roundtrip",
    "Subject": "subject",
    "check_device": "devices",
    "cut_anywhere": "cuts",
    "device_machine": "devices",
    "round_trips": "roundtrip",
    "states": "strategies",
    "values": "strategies",
    "wiring": "rig",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError(f"{name}: no Hypothesis here: pip install 'anyhyve[test]'") from None
