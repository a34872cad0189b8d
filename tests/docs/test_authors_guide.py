"""docs/device-authors-guide.md, run: the device is whole, small, versioned, and passes the generic properties."""

import re

from snapshot import schema, versions
from tests.conftest import ROOT

GUIDE = ROOT / "docs" / "device-authors-guide.md"


def test_the_guide_runs():
    device, test = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    lines = [line for line in device.splitlines() if line.strip()]
    assert len(lines) < 60
    import sys
    import types

    module = types.ModuleType("guide")
    sys.modules["guide"] = module
    names = module.__dict__
    exec(compile(device, "guide", "exec"), names)
    exec(compile(test, "guide", "exec"), names)
    old = schema.encode(names["WatchdogV1"](fed_ns=7, seconds=3))
    new = versions.decode("watchdog", 1, old, names["WatchdogState"])
    assert new == names["WatchdogState"](fed_ns=7, period_ms=255)
