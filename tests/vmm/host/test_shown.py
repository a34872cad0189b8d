"""What is shown of text from elsewhere says something, and does nothing."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from vmm.host.shown import shown

# C0, DEL, C1; ends of lines and paragraphs; directions; without width; half a pair; not assigned.
DOES_SOMETHING = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_one_line_that_does_nothing(text):
    line = shown(text)
    assert not {unicodedata.category(each) for each in line} & DOES_SOMETHING
    assert len(line.splitlines()) <= 1
    line.encode()
    assert shown(line) == line, "what crosses a socket is escaped on both sides"


@given(st.text(st.characters(categories=["L", "N", "P", "S", "M"]) | st.just(" ")))
def test_what_can_be_printed_is_as_it_was(text):
    assert shown(text) == text


def test_how_it_is_spelt():
    assert shown("\x1b[2J\n\x7f\x9b\u2028\u202e\u200b\udc80é") == r"\x1b[2J\n\x7f\x9b\u2028\u202e\u200b\udc80é"
