"""What a file says of itself is read without the rest of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapshot.container import BLOCK
from snapshot.field_types import Json
from snapshot.meta import peek
from snapshot.writer import Writer
from tests.snapshot.test_target import Config

SAID: Json = {"sequence": 7, "text": "of the machine"}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    with Writer(tmp_path / "whole") as writer:
        writer.part("config", Config(number=7))
        writer.ram("ram.0", 0, memoryview(bytes(BLOCK)), None)
        writer.meta(SAID)
        writer.commit()
    return tmp_path / "whole"


def test_it_is_what_was_written(whole):
    before = len(os.listdir("/proc/self/fd"))
    assert peek(whole) == SAID
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [0, 1, 32, 40, 60])
def test_nothing_of_what_is_cut(whole, tmp_path, size):
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:size])
    assert peek(tmp_path / "cut") is None


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        peek(tmp_path / "nowhere")
