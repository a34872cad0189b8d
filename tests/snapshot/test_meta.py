"""What a file says of itself is read without the rest of it."""

from __future__ import annotations

import os

import pytest

from snapshot.meta import peek
from snapshot.reader import Reader
from tests.conftest import ROOT

FILES = sorted(path for path in (ROOT / "fixtures" / "snapshots").rglob("*") if path.is_file())


@pytest.fixture
def whole():
    for path in FILES:
        try:
            with Reader(path) as reader:
                if reader.meta is not None:
                    return path, reader.meta
        except Exception:
            continue
    raise AssertionError("no golden has META")


def test_it_is_what_the_reader_has(whole):
    path, meta = whole
    before = len(os.listdir("/proc/self/fd"))
    assert peek(path) == meta
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [0, 1, 32, 40, 100])
def test_nothing_of_what_is_cut(whole, tmp_path, size):
    (tmp_path / "cut").write_bytes(whole[0].read_bytes()[:size])
    assert peek(tmp_path / "cut") is None


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        peek(tmp_path / "nowhere")
