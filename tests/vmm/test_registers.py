"""Declared registers, by the declaration alone; tests/vmm/test_bus.py has the accesses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.registers import ANY, Bank, Register, reads, shared, span, writes

STARTS, COUNTS, STEPS, SIZES = st.integers(0, 9), st.integers(1, 5), st.integers(1, 8), st.sampled_from((1, 2, 4, 8))


@pytest.mark.parametrize("family", [(-1, 1, 1), (0, 0, 1), (0, 1, 0), (0, -1, 1), (0, 1, -1)])
def test_a_family_of_none_is_refused(family):
    with pytest.raises(ValueError, match="no family"):
        span(*family)


@pytest.mark.parametrize("declare", [reads, writes])
def test_any_size_wants_a_span(declare):
    with pytest.raises(TypeError, match="span"):
        declare(span(0, 4), 5, size=ANY)
    declare(span(0, 4), span(5, 1), size=ANY)


class Chip:
    @reads(1, 3)
    @writes(3, bank="other", size=2)
    def byte(self, *value: int) -> int:
        return 1

    @reads(span(0, 1))
    def alone(self, index: int) -> int:
        return index


def test_what_is_declared():
    registers = Chip.byte._registers + Chip.alone._registers  # type: ignore[attr-defined]
    assert registers == [
        Register("write", "other", 3, 2, "byte", None),
        Register("read", "", 1, 1, "byte", None),
        Register("read", "", 3, 1, "byte", None),
        Register("read", "", 0, 1, "alone", span(0, 1)),
    ]
    assert [Bank(tuple(registers), name).size for name in ("", "other", "none")] == [4, 5, 1]


class Asked:
    def answer(self, *arguments: int) -> tuple[int, ...]:
        return arguments


@given(STARTS, COUNTS, STEPS, SIZES, st.integers(0, 60), SIZES)
def test_a_family_answers_at_each_of_its_offsets(start, count, step, size, offset, asked):
    register = Register("read", "", start, size, "answer", span(start, count, step))
    offsets = [start + index * step for index in range(count)]
    bound = register.bind(Asked(), offset, asked)
    if offset in offsets and asked == size:
        assert bound is not None and bound() == (offsets.index(offset),)
    else:
        assert bound is None
    assert register.end == offsets[-1] + size


@given(STARTS, COUNTS, st.integers(0, 20), SIZES)
def test_any_size_is_what_lies_within(start, count, offset, asked):
    register = Register("read", "", start, ANY, "answer", span(start, count))
    bound = register.bind(Asked(), offset, asked)
    if set(range(offset, offset + asked)) <= set(range(start, start + count)):
        assert bound is not None and bound() == (offset - start, asked)
    else:
        assert bound is None
    assert register.end == start + count


@given(STARTS, SIZES, st.integers(0, 20), SIZES)
def test_one_alone_answers_as_a_whole(start, size, offset, asked):
    chip = Asked()
    register = Register("write", "", start, size, "answer")
    assert register.bind(chip, offset, asked) == (chip.answer if (offset, asked) == (start, size) else None)
    assert register.end == start + size


def test_a_register_of_its_own_size_comes_before_one_of_any():
    any_size = Register("read", "", 0, ANY, "__str__", span(0, 8))
    own = Register("read", "", 4, 4, "answer", span(4, 1))
    for order in ((any_size, own), (own, any_size)):
        found = Bank(order, "").find(Asked(), "read", 4, 4)
        assert found is not None and found() == (0,)
        assert Bank(order, "").find(Asked(), "write", 4, 4) is None


FAMILIES = st.builds(span, st.integers(0, 30), st.integers(1, 8), st.integers(1, 7))


@given(FAMILIES, FAMILIES, st.sampled_from((1, 4, ANY)))
def test_two_meet_where_one_access_is_for_both(one, other, size):
    a, b = (Register("read", "", at.start, size, "byte", at) for at in (one, other))
    accesses = [(offset, n) for offset in range(90) for n in (1, 4)]
    both = any(a.bind(Chip(), *access) and b.bind(Chip(), *access) for access in accesses)
    assert a.meets(b) == b.meets(a) == both
    assert (shared([a, b]) is not None) == both


def test_others_do_not_meet():
    one = Register("read", "", 0, 1, "byte")
    assert one.meets(replace(one, method="other"))
    for other in (replace(one, kind="write"), replace(one, bank="b"), replace(one, size=2), replace(one, offset=1)):
        assert not one.meets(other)
