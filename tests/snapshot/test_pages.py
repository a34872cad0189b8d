"""Sparse files."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.pages import present_extents

COUNT = 64
PAGE = 4096
page_sets = st.sets(st.integers(0, COUNT - 1), max_size=20)


def runs(numbers: set[int]) -> list[tuple[int, int]]:
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n + 1 for n in numbers if n + 1 not in numbers)
    return [(start * PAGE, end * PAGE) for start, end in zip(starts, ends, strict=True)]


@settings(deadline=None, max_examples=50)
@given(page_sets, st.integers(0, COUNT), st.integers(0, COUNT))
def test_present_extents_of_a_memfd(written: set[int], a: int, b: int) -> None:
    fd, (first, stop) = os.memfd_create("ram"), sorted((a, b))
    try:
        os.ftruncate(fd, COUNT * PAGE)
        for number in written:
            os.pwrite(fd, b"x", number * PAGE)
        assert present_extents(fd, COUNT * PAGE) == runs(written)
        part = runs({n - first for n in written if first <= n < stop})
        assert present_extents(fd, (stop - first) * PAGE, first * PAGE) == part
    finally:
        os.close(fd)


def test_present_extents_without_seek_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "refused")

    monkeypatch.setattr("os.lseek", refuse)
    assert present_extents(0, 5 * PAGE, PAGE) == [(0, 5 * PAGE)]
