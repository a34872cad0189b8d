"""The engine's insides: refused when they are another build's."""

from __future__ import annotations

import re

import pytest
import unicorn

from emu import engine as engine_module
from emu import layout
from vmm.errors import BackendError

UNSEEN = {
    "error_code", "exception_is_int", "exception_next_eip", "vm_vmcb",
    *(name for name in engine_module._ENV if "intercept" in name),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(engine_module._ENV))
def test_another_layout_is_refused(monkeypatch, name):
    """By the field's name, but where the API cannot show it, and the engine itself is lost."""
    monkeypatch.setitem(engine_module._ENV, name, engine_module._ENV[name] + 8)
    how = "does not run as it should" if name in UNSEEN else "laid out as 2.1.4's" + f": {name}" * (name != "uc")
    with pytest.raises(BackendError, match=f"{re.escape(how)}{'' if name in UNSEEN else '$'}"):
        layout.check_running.__wrapped__()


def test_where_no_memory_is_it_reads_ones():
    engine = layout.checked_engine()
    assert engine.read_physical(1 << 38, 5) == b"\xff" * 5
    engine.close()


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
