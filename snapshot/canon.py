"""Canonical JSON: one value, one byte string.

Rules
* ASCII: characters outside U+0020..U+007E are escaped (short forms, else `\\uxxxx`, in surrogate pairs above U+FFFF).
* Object keys sorted by code point, each once; separators `,` and `:`; no other white space.
* Integers in -(2^63)..2^64-1; no fractions, exponents, NaN or infinities; no lone surrogates.
* Lists and objects nest at most 32 deep.
* The reader encodes what it decoded and compares the bytes, so nothing else is ever accepted: a key that comes twice
  is lost in decoding, and so found.
"""

from __future__ import annotations

import json
from typing import NoReturn

from snapshot.errors import SnapshotError
from snapshot.field_types import Json

MAX_DEPTH = 32
MIN_INT, MAX_INT = -(1 << 63), (1 << 64) - 1
_MAX_DIGITS = 20  # both limits have at most this many characters


def encode(value: Json) -> bytes:
    """The canonical bytes of `value`."""
    _check(value, 0)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def decode(data: bytes) -> Json:
    """The value of `data`, which must be what `encode` gives for it."""
    try:
        value: Json = json.loads(
            data.decode("ascii"),
            parse_int=_integer,
            parse_float=_no_float,
            parse_constant=_no_float,
        )
    except RecursionError:
        raise SnapshotError(f"JSON nests deeper than {MAX_DEPTH}") from None
    except UnicodeDecodeError as error:
        raise SnapshotError(f"JSON has a byte outside ASCII at {error.start}") from None
    except json.JSONDecodeError as error:
        raise SnapshotError(f"not JSON: {error.msg} at {error.pos}") from None
    if encode(value) != data:
        raise SnapshotError("JSON is not in canonical form")
    return value


def _check(value: Json, depth: int) -> None:
    if isinstance(value, (list, dict)):
        if depth == MAX_DEPTH:
            raise SnapshotError(f"JSON nests deeper than {MAX_DEPTH}")
        if isinstance(value, dict):
            for key in value:
                if type(key) is not str:
                    raise SnapshotError(f"JSON key {key!r} is not text")
                _check(key, depth)
            value = list(value.values())
        for item in value:
            _check(item, depth + 1)
    elif type(value) is int:
        if not MIN_INT <= value <= MAX_INT:
            raise SnapshotError("JSON integer is outside -(2^63)..2^64-1")
    elif type(value) is str:
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise SnapshotError("JSON text has a lone surrogate")
    elif value is not None and type(value) is not bool:
        raise SnapshotError(f"JSON has no {type(value).__name__} here")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:  # before int(), whose cost grows with the square of the length
        raise SnapshotError("JSON integer is outside -(2^63)..2^64-1")
    return int(text)


def _no_float(text: str) -> NoReturn:
    raise SnapshotError(f"JSON has a number that is not an integer: {text[:40]}")
