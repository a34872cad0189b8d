"""RAM gives up what was written since it was mapped."""

import mmap
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.snapshot.test_mapped import flags
from vmm.dirty_pages import PAGE, Scanner
from vmm.ram import Ram

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
