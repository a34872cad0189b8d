"""The machine code is its source, assembled."""

from __future__ import annotations

import shutil

import pytest

from emu.native import build, x86_64


def test_what_is_committed_is_what_the_source_says():
    for tool in ("as", "ld", "objcopy", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here (Debian: binutils)")
    code, places = build.assemble()
    assert code == x86_64.CODE
    assert places == x86_64.PLACES
    assert build.ASSEMBLED.read_text() == build.module(code, places)
