"""Pages a private mapping has copied."""

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm import dirty_pages
from vmm.dirty_pages import PAGE, Scanner, dirty_extents, pagemap_extents, scan_extents

COUNT = 64
page_sets = st.sets(st.integers(0, COUNT - 1), max_size=20)


def runs(numbers: set[int]) -> list[tuple[int, int]]:
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n + 1 for n in numbers if n + 1 not in numbers)
    return [(start * PAGE, end * PAGE) for start, end in zip(starts, ends, strict=True)]


class Private:
    """A MAP_PRIVATE mapping of a file of COUNT pages."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(os.urandom(COUNT * PAGE))
            file.flush()
            self.map = mmap.mmap(file.fileno(), COUNT * PAGE, mmap.MAP_PRIVATE)
        pin = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(pin)
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)

    def touch(self, read: set[int], written: set[int]) -> None:
        for number in read:
            self.map[number * PAGE + 5]
        for number in written:
            self.map[number * PAGE + 7] ^= 0xFF

    def scan(self, address: int, size: int) -> list[tuple[int, int]]:
        try:
            return scan_extents(self.pagemap, address, size)
        except OSError as error:
            assert error.errno == errno.ENOTTY
            pytest.skip("no PAGEMAP_SCAN before Linux 6.7")


@pytest.fixture
def private() -> Iterator[Private]:
    mapping = Private()
    yield mapping
    os.close(mapping.pagemap)


@settings(deadline=None, max_examples=50)
@given(page_sets, page_sets, st.integers(0, COUNT), st.integers(0, COUNT))
def test_both_ways_name_the_written_pages_and_no_others(read: set[int], written: set[int], a: int, b: int) -> None:
    mapping, (first, stop) = Private(), sorted((a, b))
    try:
        mapping.touch(read, written)
        start, size = mapping.address + first * PAGE, (stop - first) * PAGE
        expected = runs({n - first for n in written if first <= n < stop})
        assert pagemap_extents(mapping.pagemap, start, size) == expected
        assert dirty_extents(start, size) == expected
        assert mapping.scan(start, size) == expected
    finally:
        os.close(mapping.pagemap)


def test_more_runs_than_one_call_holds(private: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    written = set(range(0, COUNT, 2)) | {9, 11, 12, 13}
    private.touch(set(range(COUNT)), written)
    monkeypatch.setattr(dirty_pages, "_REGIONS", 3)
    monkeypatch.setattr(dirty_pages, "_ENTRIES", 5)
    assert pagemap_extents(private.pagemap, private.address, COUNT * PAGE) == runs(written)
    assert private.scan(private.address, COUNT * PAGE) == runs(written)


def test_dropping_the_copies_cleans(private: Private) -> None:
    private.touch(set(), {3, 4})
    assert dirty_extents(private.address, COUNT * PAGE) == [(3 * PAGE, 5 * PAGE)]
    private.map.madvise(mmap.MADV_DONTNEED)
    assert dirty_extents(private.address, COUNT * PAGE) == []


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EINVAL])
def test_old_kernel(private: Private, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, "refused")

    private.touch({1}, {2})
    monkeypatch.setattr("fcntl.ioctl", refuse)
    assert dirty_extents(private.address, COUNT * PAGE) == [(2 * PAGE, 3 * PAGE)]


def test_swapped_out_copies_count() -> None:
    """pagemap.rst: bit 62 swapped, 63 present, 61 file or shared; no swap is needed to check what is made of them."""
    copied = {top for top in range(256) if dirty_pages._IS_COPIED[top]}
    assert copied == {top for top in range(256) if top >> 6 and not top >> 5 & 1}


def test_a_scanner_that_has_no_memory_leaves_nothing_open(monkeypatch):
    def refuse(*_: object) -> None:
        raise MemoryError

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("vmm.dirty_pages.array", SimpleNamespace(array=refuse))
        Scanner(0, 4096)
    assert os.listdir("/proc/self/fd") == before
