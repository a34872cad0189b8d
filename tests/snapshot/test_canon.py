"""Canonical JSON: docs/snapshot-format.md, "Canonical JSON"."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import canon
from snapshot.errors import SnapshotError
from snapshot.field_types import Json

values = st.recursive(
    st.none() | st.booleans() | st.integers(canon.MIN_INT, canon.MAX_INT) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_round_trip(value: Json) -> None:
    data = canon.encode(value)
    assert canon.decode(data) == value
    assert json.loads(data) == value
    assert data.isascii() and not any(byte < 0x20 or byte > 0x7E for byte in data)


@given(st.binary(max_size=40) | st.text(alphabet='[]{}",:0123456789-+.eE \\untrfals/', max_size=20).map(str.encode))
def test_any_bytes_decode_to_themselves_or_are_refused(data: bytes) -> None:
    try:
        value = canon.decode(data)
    except SnapshotError as error:
        assert "\n" not in str(error)
    else:
        assert canon.encode(value) == data


def test_the_bytes_of_each_kind_of_value() -> None:
    value: Json = {"b": [None, True, False], "a": -1, "é\U0001f600": '"\\/\n\x01\x7f', "B": {}}
    assert canon.encode(value) == (rb'{"B":{},"a":-1,"b":[null,true,false],"\u00e9\ud83d\ude00":"\"\\/\n\u0001\u007f"}')


@pytest.mark.parametrize(
    "text",
    [
        "",
        " 1",
        "1\n",
        "[1, 2]",
        '{"b":1,"a":2}',
        '{"a":1,"a":1}',
        '{"a":{"b":1,"b":2}}',
        "1.0",
        "1e3",
        "-0",
        "01",
        "+1",
        "NaN",
        "Infinity",
        "-Infinity",
        "18446744073709551616",
        "-9223372036854775809",
        "9" * 5000,
        r'"\u0041"',
        r'"\u00E9"',
        r'"\ud800"',
        r'"\/"',
        '"é"',
        '"\x01"',
        '"\x7f"',
        "\ufeff1",
        "[" * 33 + "]" * 33,
        "[" * 100000,
        '{"a":' * 100000,
        "[" * 100000 + "]" * 100000,
        "[1]]",
        "nul",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(SnapshotError) as error:
        canon.decode(text.encode())
    assert len(str(error.value)) < 100 and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 32 + "]" * 32, "18446744073709551615", "-9223372036854775808"])
def test_limits_are_inclusive(text: str) -> None:
    assert canon.encode(canon.decode(text.encode())) == text.encode()


@pytest.mark.parametrize("value", [1.5, b"x", (1,), {1: 2}, {"a": [object()]}, "\udc00", {"\ud800": 1}, 1 << 64])
def test_encode_refuses_what_json_here_does_not_have(value: Json) -> None:
    with pytest.raises(SnapshotError):
        canon.encode(value)


def test_encode_refuses_a_value_that_holds_itself() -> None:
    loop: list[Json] = []
    loop.append(loop)
    with pytest.raises(SnapshotError, match="deeper than 32"):
        canon.encode(loop)
