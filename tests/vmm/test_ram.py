"""RAM: where it lies, what devices' windows show, what is given up that was written since it was mapped."""

import mmap
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapshot.errors import SnapshotError
from snapshot.mapped import FileMemory, stamp
from tests.snapshot.test_mapped import flags
from vmm.dirty_pages import PAGE, Scanner
from vmm.errors import BackendError, GuestError, RequestError
from vmm.ram import HOLE_END, HOLE_START, Ram, RamWindow, Region, layout

PAGES = 64


PAGE_SETS = st.sets(st.integers(0, PAGES - 1))


@given(PAGE_SETS, st.lists(PAGE_SETS, max_size=3))
def test_what_is_fixed_shows_again_when_later_pages_are_given_up(before, after):
    ram = Ram.fresh(PAGES * PAGE)
    (region,) = ram.regions
    for page in before:
        region.view[page * PAGE + 7] = 1
    held = bytes(region.view)
    kept = region.kept()
    fixed = region.showing(kept)
    assert fixed.address == region.address and bytes(fixed.view) == bytes(kept.contents) == held
    scanner = Scanner(fixed.address, fixed.size)
    for written in after:
        for page in written:
            region.view[page * PAGE + 7] = 2
        extents = scanner.extents()
        assert written <= {page for start, end in extents for page in range(start // PAGE, end // PAGE)}
        assert {at for start, end in fixed.touched() for at in range(start, end, PAGE)} >= {
            page * PAGE for page in before
        }
        for start, end in extents:
            fixed.memory.madvise(mmap.MADV_DONTNEED, start, end - start)
        assert bytes(region.view) == held and not scanner.extents()
    scanner.close()
    kept.contents.close()
    ram.close()


GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "regions"),
    [
        (PAGE, [(0, PAGE)]),
        (3 * GIB, [(0, 3 * GIB)]),
        (3 * GIB + PAGE, [(0, 3 * GIB), (4 * GIB, PAGE)]),
        (9 * GIB, [(0, 3 * GIB), (4 * GIB, 6 * GIB)]),
    ],
)
def test_the_last_gigabyte_below_four_is_a_hole(size, regions):
    assert layout(size) == regions
    ram = Ram.fresh(size)
    assert [(region.name, region.base, region.size) for region in ram.regions] == [
        (f"ram.{i}", *region) for i, region in enumerate(regions)
    ]
    assert ram.size == size
    ram.close()


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE + 1, PAGE // 2])
def test_memory_is_whole_pages(size):
    with pytest.raises(RequestError):
        layout(size)
    with pytest.raises(ValueError):
        RamWindow(Ram(()), size, True)


def test_more_than_the_host_has_is_its_fault():
    with pytest.raises(BackendError):
        Ram.fresh(1 << 60)
    with pytest.raises(BackendError):
        Ram(()).window(1 << 60)


def islands(*places):
    """RAM of (first page, pages), apart from each other."""
    regions = []
    for i, (page, pages) in enumerate(places):
        memory = mmap.mmap(-1, pages * PAGE)
        regions.append(Region(f"ram.{i}", page * PAGE, pages * PAGE, memory, memoryview(memory)))
    return Ram(regions)


ISLANDS = (1, 2), (5, 1)
INSIDE = {address for page, pages in ISLANDS for address in range(page * PAGE, (page + pages) * PAGE)}
ENDS = st.sampled_from([page * PAGE + off for page in range(8) for off in (-2, -1, 0, 1)]).filter(lambda at: at >= 0)


@given(ENDS, st.sampled_from([0, 1, 2, 3, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE]))
def test_bytes_are_those_of_one_region_or_none(base, size):
    ram = islands(*ISLANDS)
    held = {address: address * 7 & 0xFF for address in INSIDE}
    for region in ram.regions:
        region.view[:] = bytes(held[region.base + i] for i in range(region.size))
    if any(r.base <= base and base + size <= r.base + r.size for r in ram.regions):
        assert ram.read(base, size) == bytes(held[base + i] for i in range(size))
        ram.write(base, bytes([0xA5]) * size)
        held |= {base + i: 0xA5 for i in range(size)}
    else:
        assert ram.read(base, size) == b""
        with pytest.raises(GuestError):
            ram.slice(base, size)
        with pytest.raises(GuestError):
            ram.write(base, bytes(size))
    assert {r.base + i: byte for r in ram.regions for i, byte in enumerate(r.view)} == held
    ram.close()


@given(st.integers(0, 9))
def test_holes_are_what_no_ram_covers(pages):
    ram = islands(*ISLANDS)
    holes = list(ram.holes(pages * PAGE))
    assert all(size > 0 for _, size in holes)
    covered = {at // PAGE for base, size in holes for at in range(base, base + size, PAGE)}
    assert covered == {page for page in range(pages) if page * PAGE not in INSIDE}
    ram.close()


PAGES_SHOWN = [*range(16), *range((HOLE_END // PAGE) - 4, HOLE_END // PAGE)]
BASES = st.sampled_from([page * PAGE for page in PAGES_SHOWN if not 9 < page < 16])
UNALIGNED = st.sampled_from([3 * PAGE + 512, 7 * PAGE - 1, 8 * PAGE + 1])  # shown nowhere
WINDOWS = st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=4)
MOVES = st.lists(st.tuples(st.integers(0, 3), st.none() | BASES | UNALIGNED), max_size=12)


@given(WINDOWS, MOVES)
@example([(1, True), (1, False)], [(0, 6 * PAGE), (1, 8 * PAGE)])
@example([(1, True), (1, False)], [(0, 8 * PAGE), (1, 6 * PAGE)])
def test_each_page_shows_ram_or_the_first_window_made(made, moves):
    """Page by page: the machine's RAM, else the window made first among those that are mapped there."""
    ram, told = islands(*ISLANDS), []
    ram.on_change = lambda: told.append(ram.changes)
    windows = [ram.window(pages * PAGE, writable=writable) for pages, writable in made]
    for which, base in moves:
        if which < len(windows):
            before, moved = len(told), windows[which].base != base
            windows[which].map(base) if base is not None else windows[which].unmap()
            assert windows[which].base == base
            assert told[before:] == ([before + 1] if moved else [])
    want = {}
    for page in PAGES_SHOWN:
        at = page * PAGE
        for window in windows if at not in INSIDE else []:
            base = window.base
            if base is not None and base % PAGE == 0 and base <= at < base + window.size:
                want[page] = window.address + at - base, window.writable
                break
    got = {}
    for shown in ram.shown():
        assert shown.size > 0 and shown.size % PAGE == shown.base % PAGE == 0
        for off in range(0, shown.size, PAGE):
            assert (shown.base + off) // PAGE not in got
            got[(shown.base + off) // PAGE] = shown.address + off, shown.writable
    assert got == want
    ram.close()


def test_a_window_is_a_devices_own_memory():
    ram = Ram.fresh(PAGE)
    window = ram.window(2 * PAGE)
    window.map(HOLE_START)
    window.view[PAGE] = 7
    (shown,) = ram.shown()
    assert shown == (HOLE_START, 2 * PAGE, window.address, True)
    assert bytes(ram.regions[0].view) == bytes(PAGE)
    ram.close()
    for view in (window.view, ram.regions[0].view):
        with pytest.raises(ValueError, match="released"):
            view[0]


def test_a_copy_is_whole():
    size = 24 << 20
    ram = Ram.fresh(size)
    (region,) = ram.regions
    region.view[1 << 20 : 19 << 20] = os.urandom(18 << 20)
    copy = region.kept()
    assert bytes(copy.contents) == bytes(region.view)
    assert copy.size == os.fstat(copy.file).st_size == size
    copy.contents.close()
    ram.close()


def test_reading_outside_gives_nothing():
    ram = Ram.fresh(PAGE)
    assert ram.read(0, 8) == bytes(8) and ram.read(PAGE, 1) == b"" and ram.read(PAGE - 4, 8) == b""
    ram.close()


def test_it_is_in_no_core_dump():
    """Nor are copies of it, what shows them, and a device's."""
    ram = Ram.fresh(16 * PAGE)
    (region,) = ram.regions
    copy = region.kept()
    shown = region.showing(copy)
    window = ram.window(PAGE)
    found = re.findall(rf"^(\w+)-\w+ r--s .*memfd:{region.name} ", Path("/proc/self/maps").read_text(), re.M)
    contents = int(found[0], 16)
    fresh = Ram.fresh(PAGE)
    for address in (fresh.regions[0].address, shown.address, window.address, contents):
        assert "dd" in flags(address)


def test_what_is_read_from_a_file_is_checked_as_long_as_it_is(tmp_path):
    """Looked at again when it is time, and no more once the region shows a copy."""
    path, held = tmp_path / "file", os.urandom(4 * PAGE)
    path.write_bytes(held)

    def still(there):
        if there.read_bytes() != held:
            raise SnapshotError("it is another")

    with path.open("rb") as file:
        memory = FileMemory(file.fileno(), 0, len(held), path, stamp(file.fileno()), still)
    ram = Ram((Region("ram.0", 0, len(held), memory, memoryview(memory), [(0, len(held))]), *Ram.fresh(PAGE).regions))
    (region, fresh) = ram.regions
    (descriptor,) = ram.files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "file", 0)  # as where standard input was closed
        assert ram.files() == [0]
    assert os.pread(descriptor, PAGE, 0) == held[:PAGE]
    assert region.touched()[0] == (0, len(held)) and not fresh.touched()
    copy = region.kept()
    assert bytes(copy.contents) == held
    ram.check()
    with path.open("r+b") as file:
        file.write(bytes(PAGE))
    ram.check(1e9)
    for look in (region.check, ram.check, region.kept):
        with pytest.raises(SnapshotError, match="it was changed while its RAM was in use: it is another"):
            look()
    assert region.showing(copy).stored == copy.extents
    ram.check()
    assert ram.files() == [] and bytes(region.view) == held
    ram.close()


def test_a_copy_that_nobody_has_is_gone():
    copy = Ram.fresh(PAGE).regions[0].kept()
    file = copy.file
    os.fstat(file)
    del copy
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_fresh_ram_is_of_huge_pages_where_there_are():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without them")
    ram = Ram.fresh(16 * PAGE)
    assert "hg" in flags(ram.regions[0].address)
    ram.close()
