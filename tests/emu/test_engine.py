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


@pytest.mark.parametrize("refuse", [layout.check_running.__wrapped__, layout.checked_engine])
def test_a_refused_engine_is_closed(monkeypatch, refuse):
    """It has reserved a gibibyte."""
    layout.check_running()
    closed = []
    close = engine_module.Engine.close

    def count(engine):
        closed.append(engine)
        close(engine)

    monkeypatch.setattr(engine_module.Engine, "close", count)
    monkeypatch.setattr(layout, "_HFLAGS", 0)
    with pytest.raises(BackendError, match=r"laid out as 2\.1\.4's: hflags"):
        refuse()
    assert len(closed) == 1
