"""The machine code is its source, assembled."""

from __future__ import annotations

import shutil

import pytest

from emu import cpu
from emu.native import build, replaced, x86_64


def test_what_is_committed_is_what_the_source_says():
    for tool in ("as", "ld", "objcopy", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here (Debian: binutils)")
    code, places = build.assemble()
    assert code == x86_64.CODE
    assert places == x86_64.PLACES
    assert build.ASSEMBLED.read_text() == build.module(code, places)


@pytest.fixture
def native():
    if (refusal := cpu.native_refusal()) is not None:
        pytest.skip(refusal)


def test_every_function_is_replaced(native):
    assert replaced.replace() == []


def test_what_is_not_as_we_know_it_is_left_alone_and_named(native, monkeypatch):
    replaced.replace()  # so that none has the bytes it had
    left = replaced.replace.__wrapped__()
    assert set(left) == set(replaced._KNOWN)
    monkeypatch.setattr(replaced, "replace", lambda: left)
    assert "helper_sysret" in cpu.probe()
