"""The engine's insides: refused when they are another build's."""

from __future__ import annotations

import pytest
import unicorn

from emu import engine as engine_module
from emu import layout
from vmm.errors import BackendError


@pytest.mark.parametrize("name", sorted(engine_module._ENV))
def test_another_layout_is_refused(monkeypatch, name):
    monkeypatch.setitem(engine_module._ENV, name, engine_module._ENV[name] + 8)
    with pytest.raises(BackendError, match=r"laid out|does not run as it should"):
        layout.check_running.__wrapped__()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(unicorn, "__version__", "2.2.0")
    with pytest.raises(BackendError, match=r"needs unicorn 2\.1\.4, this is 2\.2\.0"):
        engine_module.Engine()
