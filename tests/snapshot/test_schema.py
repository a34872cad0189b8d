"""Declared states: one declaration drives save, load, validation and the printed schema."""

from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import canon
from snapshot.errors import SnapshotError
from snapshot.field_types import MaxSize, OneOf, Range, Size, i64, u2, u7, u64
from snapshot.schema import declared, encode, schema_of, state
from snapshot.versions import decode, upgrade


@state("test.schema.inner", version=1)
class Inner:
    """An inner value."""

    level: bool = False
    count: Annotated[u7, "how many"] = 0


@state("test.schema", version=1)
class Outer:
    """Every kind of field.

    And more text, which is not the doc line.
    """

    small: Annotated[u2, "two bits"] = 0
    wide: u64 = 0
    signed: i64 = 0
    ranged: Annotated[int, Range(-3, 12), "a range"] = 0
    word: Annotated[str, OneOf(("lo", "hi"))] = "lo"
    text: Annotated[str, MaxSize(5)] = ""
    fixed: Annotated[bytes, Size(2)] = b"\0\0"
    open: Annotated[bytes, MaxSize(3)] = b""
    inner: Annotated[Inner, "nested"]
    pair: Annotated[tuple[u7, ...], Size(2)] = (0, 0)
    many: Annotated[tuple[Inner, ...], MaxSize(2)] = ()
    maybe: Annotated[u7 | None, "or nothing"] = None


inners = st.builds(Inner, level=st.booleans(), count=st.integers(0, 127))
outers = st.builds(
    Outer,
    small=st.integers(0, 3),
    wide=st.integers(0, 2**64 - 1),
    signed=st.integers(-(2**63), 2**63 - 1),
    ranged=st.integers(-3, 12),
    word=st.sampled_from(("lo", "hi")),
    text=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=5),
    fixed=st.binary(min_size=2, max_size=2),
    open=st.binary(max_size=3),
    inner=inners,
    pair=st.tuples(st.integers(0, 127), st.integers(0, 127)),
    many=st.lists(inners, max_size=2).map(tuple),
    maybe=st.none() | st.integers(0, 127),
)


@given(outers)
def test_round_trip_through_canonical_json(value: Outer) -> None:
    data = canon.decode(canon.encode(encode(value)))
    assert isinstance(data, dict)
    assert decode("test.schema", 1, data, Outer) == value


def test_the_printed_schema() -> None:
    assert schema_of(Outer).describe() == {
        "name": "test.schema",
        "version": 1,
        "doc": "Every kind of field.",
        "fields": [
            {"name": "small", "type": "u2", "doc": "two bits"},
            {"name": "wide", "type": "u64", "doc": ""},
            {"name": "signed", "type": "i64", "doc": ""},
            {"name": "ranged", "type": {"range": [-3, 12]}, "doc": "a range"},
            {"name": "word", "type": {"one_of": ["lo", "hi"]}, "doc": ""},
            {"name": "text", "type": {"text_max": 5}, "doc": ""},
            {"name": "fixed", "type": {"bytes": 2}, "doc": ""},
            {"name": "open", "type": {"bytes_max": 3}, "doc": ""},
            {
                "name": "inner",
                "type": {
                    "struct": [
                        {"name": "level", "type": "bool", "doc": ""},
                        {"name": "count", "type": "u7", "doc": "how many"},
                    ]
                },
                "doc": "nested",
            },
            {"name": "pair", "type": {"list": "u7", "count": 2}, "doc": ""},
            {
                "name": "many",
                "type": {
                    "list": {
                        "struct": [
                            {"name": "level", "type": "bool", "doc": ""},
                            {"name": "count", "type": "u7", "doc": "how many"},
                        ]
                    },
                    "max": 2,
                },
                "doc": "",
            },
            {"name": "maybe", "type": {"optional": "u7"}, "doc": "or nothing"},
        ],
    }


BAD: list[tuple[str, Any]] = [
    ("small", 4),
    ("small", -1),
    ("small", True),
    ("small", "1"),
    ("small", None),
    ("wide", 2**64),
    ("signed", -(2**63) - 1),
    ("ranged", 13),
    ("word", "mid"),
    ("word", 1),
    ("text", "123456"),
    ("text", "a\nb"),
    ("maybe", 128),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_value_that_does_not_fit_is_refused_both_ways(field: str, value: Any) -> None:
    outer = Outer(inner=Inner())
    data = encode(outer)
    with pytest.raises(SnapshotError, match=rf"^test\.schema\.{field}: "):
        decode("test.schema", 1, data | {field: value}, Outer)
    setattr(outer, field, value)
    with pytest.raises(SnapshotError, match=rf"^test\.schema\.{field}: "):
        encode(outer)


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("fixed", "00", "fixed"),
        ("fixed", "0G00", "fixed"),
        ("fixed", "AB00", "fixed"),
        ("fixed", "0 00", "fixed"),
        ("fixed", 7, "fixed"),
        ("open", "00112233", "open"),
        ("pair", [1], "pair"),
        ("pair", [1, 200], r"pair\[1\]"),
        ("pair", {"0": 1}, "pair"),
        ("inner", [], "inner"),
        ("inner", {"level": True}, "inner.count"),
        ("inner", {"level": True, "count": 1, "more": 1}, "inner.more"),
        ("many", [{"level": 1, "count": 1}], r"many\[0\].level"),
    ],
)
def test_decode_refuses(field: str, value: Any, where: str) -> None:
    data = encode(Outer(inner=Inner()))
    with pytest.raises(SnapshotError, match=rf"^test\.schema\.{where}: "):
        decode("test.schema", 1, data | {field: value}, Outer)


def test_missing_unknown_and_foreign() -> None:
    data = encode(Outer(inner=Inner()))
    with pytest.raises(SnapshotError, match=r"^test\.schema\.zzz: unknown field"):
        decode("test.schema", 1, data | {"zzz": 1}, Outer)
    del data["wide"]
    with pytest.raises(SnapshotError, match=r"^test\.schema\.wide: missing"):
        decode("test.schema", 1, data, Outer)
    with pytest.raises(SnapshotError, match=r"expected a test\.schema$"):
        decode("test.schema.inner", 1, {}, Outer)
    with pytest.raises(SnapshotError, match="version 9 is not known here"):
        decode("test.schema", 9, {}, Outer)


@state("test.schema.clock", version=1)
class ClockV1:
    seconds: u7 = 0


@state("test.schema.clock", version=2)
class ClockV2:
    tenths: Annotated[int, Range(0, 1270)] = 0


@state("test.schema.clock", version=3)
class ClockV3:
    tenths: Annotated[int, Range(0, 1000)] = 0


@state("test.schema.clock", version=5)
class ClockV5:
    tenths: u7 = 0


@upgrade
def clock_v1_to_v2(old: ClockV1) -> ClockV2:
    return ClockV2(tenths=old.seconds * 10)


@upgrade
def clock_v2_to_v3(old: ClockV2) -> ClockV3:
    return ClockV3(tenths=old.tenths)


def test_an_upgrade_is_from_a_declared_state_to_another() -> None:
    def from_none(old: int) -> ClockV3:
        return ClockV3(tenths=old)

    def to_none(old: ClockV1) -> int:
        return old.seconds

    for function in (from_none, to_none):
        with pytest.raises(TypeError, match=f"{function.__name__}: not from a declared state to another"):
            upgrade(function)


def test_upgrades_run_step_by_step() -> None:
    assert decode("test.schema.clock", 1, {"seconds": 9}, ClockV3) == ClockV3(tenths=90)
    assert decode("test.schema.clock", 2, {"tenths": 9}, ClockV3) == ClockV3(tenths=9)
    with pytest.raises(SnapshotError, match=r"version 2 is not known here \(this program has 1\)"):
        decode("test.schema.clock", 2, {"tenths": 9}, ClockV1)
    with pytest.raises(SnapshotError, match="no upgrade from version 3"):
        decode("test.schema.clock", 3, {"tenths": 9}, ClockV5)


def test_what_an_upgrade_gives_must_fit_its_schema() -> None:
    with pytest.raises(SnapshotError, match=r"test\.schema\.clock\.tenths: 1270 is not"):
        decode("test.schema.clock", 1, {"seconds": 127}, ClockV3)


def test_an_upgrade_goes_up_one_name() -> None:
    def down(old: ClockV3) -> ClockV1:
        return ClockV1()

    def across(old: Inner) -> ClockV1:
        return ClockV1()

    def again(old: ClockV1) -> ClockV2:
        return ClockV2()

    for bad in (down, across, again):
        with pytest.raises(TypeError):
            upgrade(bad)


def test_declarations_without_an_exact_width_are_refused() -> None:
    for name, hint in {
        "plain": int,
        "float": float,
        "bytes": bytes,
        "text": str,
        "list": tuple[u7, ...],
        "union": u7 | bool | None,
        "pair": Annotated[tuple[u7, u7], Size(2)],
        "object": object,
    }.items():
        with pytest.raises(TypeError, match=r"has no exact width|only T"):
            state(f"test.schema.bad.{name}", version=1)(type("Bad", (), {"__annotations__": {"field": hint}}))


def test_a_version_is_declared_once() -> None:
    with pytest.raises(TypeError, match="declared twice"):
        state("test.schema.inner", version=1)(type("Again", (), {"__annotations__": {}}))
    assert declared()["test.schema.inner", 1] is Inner
