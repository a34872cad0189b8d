"""The types of a state's fields: how each is marked, checked, encoded, decoded and described."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from snapshot.errors import SnapshotError

Json = None | bool | int | str | list["Json"] | dict[str, "Json"]


@dataclasses.dataclass(frozen=True)
class Bits:
    """An unsigned integer of `width` bits."""

    width: int


@dataclasses.dataclass(frozen=True)
class Range:
    """An integer between `low` and `high`, both included."""

    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Size:
    """Exactly `count` bytes, or `count` elements of a tuple."""

    count: int


@dataclasses.dataclass(frozen=True)
class MaxSize:
    """At most `count` bytes, elements or characters."""

    count: int


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of a closed set of words."""

    words: tuple[str, ...]


u2 = Annotated[int, Bits(2)]
u3 = Annotated[int, Bits(3)]
u4 = Annotated[int, Bits(4)]
u5 = Annotated[int, Bits(5)]
u7 = Annotated[int, Bits(7)]
u8 = Annotated[int, Bits(8)]
u16 = Annotated[int, Bits(16)]
u24 = Annotated[int, Bits(24)]
u32 = Annotated[int, Bits(32)]
u56 = Annotated[int, Bits(56)]
u64 = Annotated[int, Bits(64)]
i64 = Annotated[int, Range(-(2**63), 2**63 - 1)]


class Type:
    """One field type: how it is checked, encoded, decoded and described. Values are JSON-shaped after encode."""

    def encode(self, value: Any, path: str) -> Json:
        raise NotImplementedError

    def decode(self, value: Json, path: str) -> Any:
        raise NotImplementedError

    def describe(self) -> Json:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class IntType(Type):
    low: int
    high: int
    word: Json  # how the schema names it: "u7", "i64" or {"range": [low, high]}

    def encode(self, value: Any, path: str) -> Json:
        if type(value) is not int or not self.low <= value <= self.high:
            raise SnapshotError(f"{path}: {value!r} is not an integer in {self.low}..{self.high}")
        return value

    decode = encode

    def describe(self) -> Json:
        return self.word


@dataclasses.dataclass(frozen=True)
class BoolType(Type):
    def encode(self, value: Any, path: str) -> Json:
        if type(value) is not bool:
            raise SnapshotError(f"{path}: {value!r} is not true or false")
        return value

    decode = encode

    def describe(self) -> Json:
        return "bool"


@dataclasses.dataclass(frozen=True)
class WordType(Type):
    words: tuple[str, ...]

    def encode(self, value: Any, path: str) -> Json:
        if value not in self.words or type(value) is not str:
            raise SnapshotError(f"{path}: {value!r} is not one of {', '.join(self.words)}")
        return value

    decode = encode

    def describe(self) -> Json:
        return {"one_of": list(self.words)}


@dataclasses.dataclass(frozen=True)
class TextType(Type):
    most: int

    def encode(self, value: Any, path: str) -> Json:
        if type(value) is not str or len(value) > self.most or not (value.isascii() and value.isprintable()):
            raise SnapshotError(f"{path}: not printable ASCII text of at most {self.most} characters")
        return value

    decode = encode

    def describe(self) -> Json:
        return {"text_max": self.most}


@dataclasses.dataclass(frozen=True)
class BytesType(Type):
    least: int
    most: int

    def encode(self, value: Any, path: str) -> Json:
        if not isinstance(value, bytes) or not self.least <= len(value) <= self.most:
            raise SnapshotError(f"{path}: not bytes of length {self.least}..{self.most}")
        return value.hex()

    def decode(self, value: Json, path: str) -> bytes:
        if type(value) is not str or not 2 * self.least <= len(value) <= 2 * self.most:
            raise SnapshotError(f"{path}: not hex text for {self.least}..{self.most} bytes")
        try:
            data = bytes.fromhex(value)
        except ValueError:
            raise SnapshotError(f"{path}: not hex text") from None
        if data.hex() != value:
            raise SnapshotError(f"{path}: hex text is not canonical (lower case, no spaces)")
        return data

    def describe(self) -> Json:
        return {"bytes": self.most} if self.least == self.most else {"bytes_max": self.most}


@dataclasses.dataclass(frozen=True)
class ListType(Type):
    item: Type
    least: int
    most: int

    def encode(self, value: Any, path: str) -> Json:
        if not isinstance(value, tuple) or not self.least <= len(value) <= self.most:
            raise SnapshotError(f"{path}: not a list of {self.least}..{self.most} elements")
        return [self.item.encode(v, f"{path}[{i}]") for i, v in enumerate(value)]

    def decode(self, value: Json, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            raise SnapshotError(f"{path}: not a list of {self.least}..{self.most} elements")
        return tuple(self.item.decode(v, f"{path}[{i}]") for i, v in enumerate(value))

    def describe(self) -> Json:
        size = {"count": self.most} if self.least == self.most else {"max": self.most}
        return {"list": self.item.describe(), **size}


@dataclasses.dataclass(frozen=True)
class OptionalType(Type):
    item: Type

    def encode(self, value: Any, path: str) -> Json:
        return None if value is None else self.item.encode(value, path)

    def decode(self, value: Json, path: str) -> Any:
        return None if value is None else self.item.decode(value, path)

    def describe(self) -> Json:
        return {"optional": self.item.describe()}
