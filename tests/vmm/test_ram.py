"""RAM gives up what was written since it was mapped."""

from hypothesis import given
from hypothesis import strategies as st

from vmm.ram import PAGE, Ram

PAGES = 64


@given(st.sets(st.integers(0, PAGES - 1)), st.sets(st.integers(0, PAGES - 1)))
def test_revert_gives_the_first_bytes_back_and_says_what_changed(first, second):
    ram = Ram.fresh(PAGES * PAGE)
    (region,) = ram.regions
    for written in (first, second):
        for page in written:
            region.view[page * PAGE + 7] = 1
        changed = {page for start, end in region.revert() for page in range(start // PAGE, end // PAGE)}
        assert written <= changed
        assert bytes(region.view) == bytes(PAGES * PAGE)
    ram.close()


def test_reading_outside_gives_nothing():
    ram = Ram.fresh(PAGE)
    assert ram.read(0, 8) == bytes(8) and ram.read(PAGE, 1) == b"" and ram.read(PAGE - 4, 8) == b""
    ram.close()
