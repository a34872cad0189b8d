"""The independent verifier, against files built by hand from the tables of docs/snapshot-format.md."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshot.verify import Bad, main, verify
from tests.conftest import ROOT

SCRIPT = ROOT / "snapshot" / "verify.py"
HEAD = b"\x89ANYHYVE\r\n\x1a\n" + struct.pack("<HH16x", 1, 0)
BLOCK = 65536


@dataclass(frozen=True)
class Chunk:
    """A chunk as the page has it; what a test breaks is replaced."""

    kind: bytes
    name: bytes
    payload: bytes
    version: int = 1
    flags: int = 0
    alignment: int = 16
    reserved: int = 0
    reserved_2: int = 0
    length: int | None = None
    digest: bytes | None = None
    before: bytes = b"\0"  # the first byte of the padding before and after the payload
    after: bytes = b"\0"

    def header(self) -> bytes:
        digest = self.digest
        if digest is None:
            digest = bytes(32) if self.kind == b"RAMD" else blake3(self.payload).digest()
        length = len(self.payload) if self.length is None else self.length
        return struct.pack(
            "<4sHHIIQ32s32sQ", self.kind, self.version, self.flags, self.alignment, self.reserved, length, self.name,
            digest, self.reserved_2,
        )  # fmt: skip

    def but(self, **changes: Any) -> Chunk:
        return dataclasses.replace(self, **changes)


def chunk(kind: bytes, name: bytes, payload: bytes, **fields: Any) -> Chunk:
    return Chunk(kind, name, payload, **fields)


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def schema(**fields: Any) -> dict[str, Any]:
    described = [{"name": name, "type": its, "doc": ""} for name, its in fields.items()]
    return {"name": "test.state", "version": 1, "doc": "One line.", "fields": described}


def part(name: bytes = b"config", value: Any = None) -> Chunk:
    return chunk(b"PART", name, canonical({"schema": schema(n="u8"), "state": {"n": 7}} if value is None else value))


def typed(its: Any, value: Any) -> Chunk:
    return part(b"config", {"schema": schema(v=its), "state": {"v": value}})


def base(name: str = "parent.snap", identity: bytes = bytes(32)) -> Chunk:
    return chunk(b"BASE", b"parent", canonical({"digest": identity.hex(), "file": name}))


def meta(payload: bytes = b"{}", **fields: Any) -> Chunk:
    return chunk(b"META", b"meta", payload, flags=1, **fields)


def entry(number: int, field: int, block: bytes) -> bytes:
    return struct.pack("<II32s", number, field, blake3(block).digest())


def index(at: int, size: int, codec: int, entries: list[bytes], block: int = BLOCK, n: int | None = None) -> bytes:
    return struct.pack("<QQIIQ", at, size, block, codec, len(entries) if n is None else n) + b"".join(entries)


def pair(data: bytes, rami: bytes, name: bytes = b"ram.0") -> list[Chunk]:
    digest = blake3(data).digest() if rami[20:24] == b"\1\0\0\0" else None
    return [chunk(b"RAMD", name, data, alignment=4096, digest=digest), chunk(b"RAMI", name, rami)]


def blocks(memory: bytes, numbers: list[int] | None) -> dict[int, bytes]:
    every = {at // BLOCK: memory[at : at + BLOCK] for at in range(0, len(memory), BLOCK)}
    return {number: block for number, block in every.items() if (any(block) if numbers is None else number in numbers)}


def ram(memory: bytes, at: int = 0, name: bytes = b"ram.0", numbers: list[int] | None = None) -> list[Chunk]:
    entries = [entry(number, 0, block) for number, block in blocks(memory, numbers).items()]
    return pair(memory, index(at, len(memory), 0, entries), name)


def frame(block: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(block)


def packed(memory: bytes, at: int = 0, name: bytes = b"ram.0", numbers: list[int] | None = None) -> list[Chunk]:
    stored = {
        number: (form if len(form := frame(block)) < len(block) else block)
        for number, block in blocks(memory, numbers).items()
    }
    entries = [entry(n, len(form), memory[n * BLOCK : (n + 1) * BLOCK]) for n, form in stored.items()]
    return pair(b"".join(stored.values()), index(at, len(memory), 1, entries), name)


def forms(*stored: tuple[bytes, bytes], size: int = 4096) -> list[Chunk]:
    """Blocks 0, 1... of a packed region, each as stored form and what it should decode to."""
    entries = [entry(number, len(form), block) for number, (form, block) in enumerate(stored)]
    return pair(b"".join(form for form, _ in stored), index(0, size, 1, entries))


def end(head: bytes, chunks: list[Chunk], length: int, count: int | None = None, digest: bytes | None = None) -> Chunk:
    digest = digest or blake3(head + b"".join(chunk.header() for chunk in chunks)).digest()
    return chunk(b"END ", b"", struct.pack("<QQ32s", len(chunks) if count is None else count, length, digest))


def lay(out: bytearray, one: Chunk) -> None:
    out += one.header()
    gap = -len(out) % (one.alignment or 16)
    out += one.before + bytes(gap - 1) if gap else b""
    out += one.payload


def build(
    chunks: list[Chunk], head: bytes = HEAD, finish: Callable[[Chunk], Chunk] | None = None, **ends: Any
) -> bytes:
    out = bytearray(head)
    for one in chunks:
        lay(out, one)
        gap = -len(out) % 16
        out += one.after + bytes(gap - 1) if gap else b""
    last = end(head, chunks, **{"length": len(out) + 96 + 48, **ends})
    lay(out, finish(last) if finish else last)
    return bytes(out)


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def identity(data: bytes) -> bytes:
    return data[-32:]


MEMORY = noise(BLOCK) + bytes(BLOCK) + b"abcd" * (BLOCK // 4) + b"x" * 4096  # noise, nothing, packs well, short


def good_files() -> dict[str, tuple[bytes, str]]:
    unknown = chunk(b"XTRA", b"a", b"\0\1\2", flags=1, version=9, alignment=4096)
    high = ram(b"h" * 4096, at=(1 << 64) - 4096, name=b"ram.1")
    return {
        "raw": (build([part(), *ram(MEMORY)]), "1 part, 1 region, 3 blocks"),
        "zstd": (build([part(), *packed(MEMORY)]), "1 part, 1 region, 3 blocks"),
        "zstd, a zero block present": (build([part(), *packed(MEMORY, numbers=[1])]), "1 part, 1 region, 1 block"),
        "raw, all present": (build([part(), *ram(MEMORY, numbers=[0, 1, 2, 3])]), "1 part, 1 region, 4 blocks"),
        "nothing present": (build([part(), *packed(bytes(4096))]), "1 part, 1 region, 0 blocks"),
        "no RAM": (build([part(), part(b"cpu.0"), part(b"a")]), "3 parts, 0 regions, 0 blocks"),
        "meta": (build([part(), *ram(bytes(4096)), meta(b'["\\u00e9\\ud83d\\ude00"]')]), "1 part, 1 region, 0 blocks"),
        "unknown": (build([part(), unknown, meta(), unknown.but(name=b"b")]), "1 part, 0 regions, 0 blocks"),
        "unknown version of META": (build([part(), meta(b"?").but(version=2)]), "1 part, 0 regions, 0 blocks"),
        "two regions": (build([part(), *packed(MEMORY, 4096), *high]), "1 part, 2 regions, 4 blocks"),
        "higher minor version": (build([part()], HEAD[:14] + b"\7\0" + HEAD[16:]), "1 part, 0 regions, 0 blocks"),
        "empty optional chunk": (build([part(), unknown.but(payload=b"")]), "1 part, 0 regions, 0 blocks"),
        "long name": (build([part(), part(b"a.-_" * 8)]), "2 parts, 0 regions, 0 blocks"),
        "full": (build([part(), *full(0)]), "1 part, 0 regions, 0 blocks"),
        "4096 chunks": (build([part()] + [part(b"%d" % n) for n in range(4095)]), "4096 parts, 0 regions, 0 blocks"),
    }


def full(more: int) -> list[Chunk]:
    """What a part `config` leaves of all that payloads may be together, and `more`."""
    lengths = [1 << 20, (1 << 20) - len(part().payload) + more]
    return [chunk(b"XTRA", b"%d" % n, bytes(length), flags=1) for n, length in enumerate(lengths)]


GOOD = good_files()


@pytest.fixture
def snap(tmp_path: Path) -> Callable[..., Path]:
    def write(data: bytes, name: str = "it.snap") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("name", GOOD)
def test_good(name, snap, capsys):
    data, told = GOOD[name]
    path = snap(data)
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: good, {told}\n"
    assert verify(path).identity == identity(data)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


F = {"name": "a", "type": "u1", "doc": ""}
VALUES: list[tuple[Any, list[Any], list[Any]]] = [  # type, values of it, values that are not
    ("u1", [0, 1], [2, -1, True, None, "1"]),
    ("u63", [(1 << 63) - 1], [1 << 63]),
    ("u64", [(1 << 64) - 1], [-1]),
    ("i64", [-(1 << 63), (1 << 63) - 1], [1 << 63, "0", False]),
    ({"range": [-3, 5]}, [-3, 5], [-4, 6, True]),
    ("bool", [True, False], [0, 1, None, "true"]),
    ({"one_of": ["a", "b"]}, ["a", "b"], ["c", "", 0, ["a"]]),
    ({"text_max": 2}, ["", " ~"], ["abc", "\u00e9", *"\n\x7f\0\xa0\xad\u2028\ue000\uffff", 5, None]),
    ({"bytes": 2}, ["00ff"], ["00", "00f", "00FF", "00ffaa", "0g00", 0, None]),
    ({"bytes": 0}, [""], ["00"]),
    ({"bytes_max": 2}, ["", "00", "00ff"], ["0", "00ffaa", "AA", "00\n", []]),
    ({"count": 2, "list": "u1"}, [[0, 1]], [[0], [0, 1, 0], [0, 2], {}, "01"]),
    ({"list": "bool", "max": 2}, [[], [True], [True, False]], [[True] * 3, [0], None]),
    ({"optional": "u1"}, [None, 0], [2, "null"]),
    ({"struct": [F]}, [{"a": 0}], [{"a": 2}, {}, {"a": 0, "b": 0}, [], None]),
    ({"struct": []}, [{}], [{"a": 0}]),
    ({"list": {"optional": {"struct": [F]}}, "max": 3}, [[None, {"a": 1}]], [[{"a": None}]]),
]
NO_TYPES: list[Any] = [
    "u", "u0", "u65", "u08", "u" + "9" * 100_000,
    "u-1", "u8 ", "u\u0668", "i32", "BOOL", "", None, 8, True, [], ["u8"], {}, {"u8": 1},
    {"range": [1]}, {"range": [0, 1, 2]}, {"range": [False, True]}, {"range": ["0", "1"]}, {"range": {}},
    {"one_of": "a"}, {"one_of": [1]}, {"one_of": {"a": 1}}, {"text_max": -1}, {"text_max": "1"}, {"text_max": True},
    {"bytes": -1}, {"bytes": None}, {"bytes_max": -1}, {"bytes": 1, "bytes_max": 1}, {"list": "u8"},
    {"list": "u8", "max": -1}, {"list": "u8", "count": True}, {"list": "u9x", "max": 0}, {"count": 1, "max": 1},
    {"count": 1, "list": "u8", "max": 1}, {"optional": "no"}, {"optional": "u8", "max": 1}, {"struct": {}},
    {"struct": [F, F]}, {"struct": [{"name": "a", "type": "u1"}]}, {"struct": [{**F, "type": "u"}]},
    {"range": [0, 1], "x": 0},
]  # fmt: skip


@pytest.mark.parametrize("its, good, bad", VALUES, ids=[str(v[0]) for v in VALUES])
def test_values_of_a_type(its, good, bad, snap):
    for value in good:
        verify(snap(build([typed(its, value)])))
    for value in bad:
        with pytest.raises(Bad, match="not of its type"):
            verify(snap(build([typed(its, value)])))


@pytest.mark.parametrize("its", NO_TYPES, ids=lambda its: str(its)[:40])
def test_no_such_type(its, snap):
    with pytest.raises(Bad):
        verify(snap(build([typed({"list": its, "max": 0}, [])])))


def json_case(payload: bytes) -> bytes:
    return build([part(), meta(payload)])


def state_case(**changes: Any) -> bytes:
    return build([part(b"config", {"schema": {**schema(n="u8"), **changes}, "state": {"n": 7}})])


def base_case(value: Any) -> bytes:
    return build([part(), chunk(b"BASE", b"parent", canonical(value))])


def second(one: Chunk, **changes: Any) -> bytes:
    return build([part(), one.but(**changes)])


def region(size: int = 4096, data: bytes = bytes(4096), **fields: Any) -> bytes:
    fields = {"at": 0, "codec": 0, "entries": [], **fields}
    return build(
        [part(), *pair(data, index(fields.pop("at"), size, fields.pop("codec"), fields.pop("entries"), **fields))]
    )


def twice(first: int, size: int, then: int) -> bytes:
    return build([part(), *ram(bytes(size), first), *ram(bytes(4096), then, b"ram.1")])


def form_case(form: bytes, block: bytes) -> bytes:
    return build([part(), *forms((form, block))])


NOT_CANONICAL = [
    b"",
    b" {}",
    b"{} ",
    b"{}\n",
    b"[1, 2]",
    b'{"a" :1}',
    b'{"b":1,"a":2}',
    b'{"a":1,"a":1}',
    b"01",
    b"-0",
    b"-01",
    b"+1",
    b"1.0",
    b"1.5",
    b"1e3",
    b"1E3",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"nul",
    b"True",
    b"[1,]",
    b"[1",
    b"]",
    b"{}{}",
    b"18446744073709551616",
    b"-9223372036854775809",
    b"1" * 100_000,
    b'"\xc3\xa9"',
    b'"\\u00E9"',
    b'"\\u0041"',
    b'"\\/"',
    b'"\\u000a"',
    b'"\\u0022"',
    b'"\n"',
    b'"\x7f"',
    b'"\\x"',
    b'"\\ud800"',
    b'"\\udc00"',
    b'"\\udc00\\ud800"',
    b'"a',
    b'"\\ud83d\\\\\\ude00"',
    b'{"\\ud800":1}',
    b"\xef\xbb\xbf{}",
    b"{1:2}",
    b"'a'",
    canonical(nested(33)),
    b"[" * 999_999,
    b'{"a":' * (1 << 18),
    b'"' * 99_999,
    b'"\\"' * 50_000,
    b'{"\\ud83d\\ude00":1,"\\uffee":1}',
    b'[[]"' + b'"[' * 5,
]


def bad_files() -> dict[str, tuple[bytes, str]]:
    big = b'"' + b"a" * ((1 << 20) - 2) + b'"'
    small, text = frame(b"x" * 4096), b"x" * 4096
    unknown = chunk(b"XTRA", b"a", b"abc", flags=1)
    no_size = zstandard.ZstdCompressor(write_content_size=False).compress(text)
    words = zstandard.ZstdCompressionDict(b"xyzzy" * 100)
    dictionary = zstandard.ZstdCompressionDict(
        zstandard.train_dictionary(1024, [noise(64, n) * 4 for n in range(99)]).as_bytes()
    )
    named = zstandard.ZstdCompressor(dict_data=dictionary).compress(text)
    nameless = zstandard.ZstdCompressor(dict_data=words).compress(b"xyzzy" * 100 + bytes(3596))
    e = [entry(n, 0, bytes(BLOCK)) for n in range(3)]
    good = build([part()])
    raw = ram(text)
    stored, of_stored = forms((small, text))
    huge = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + small[7:]
    files: dict[str, tuple[bytes, str]] = {
        # File header
        "empty": (b"", "cut in the file header"),
        "no magic": (build([part()], b"\x88" + HEAD[1:]), "magic"),
        "text mode": (build([part()], HEAD.replace(b"\r\n", b"\n") + b"\0"), "magic"),
        "major 0": (build([part()], HEAD[:12] + b"\0\0" + HEAD[14:]), "major"),
        "major 2": (build([part()], HEAD[:12] + b"\2\0" + HEAD[14:]), "major"),
        "reserved in file header": (build([part()], HEAD[:31] + b"\1"), "reserved bytes of the file header"),
        # Chunk
        "kind not ASCII": (second(unknown, kind=b"XTR\x7f"), "printable"),
        "kind with a zero": (second(unknown, kind=b"XTR\0"), "printable"),
        "flag 1": (second(unknown, flags=3), "reserved flags"),
        "flag 15": (second(unknown, flags=0x8001), "reserved flags"),
        "alignment 0": (second(unknown, alignment=0), "alignment"),
        "alignment 32": (second(unknown, alignment=32), "alignment"),
        "reserved at 12": (second(unknown, reserved=1), "reserved bytes of the header"),
        "reserved at 88": (second(unknown, reserved_2=1 << 63), "reserved bytes of the header"),
        "no name": (second(unknown, name=b""), "name"),
        "capital in a name": (second(unknown, name=b"A"), "name"),
        "slash in a name": (second(unknown, name=b"a/b"), "name"),
        "name goes on after zero": (second(unknown, name=b"a\0b"), "name"),
        "name with line end": (second(unknown, name=b"a\n"), "name"),
        "digest of payload": (second(unknown, digest=bytes(32)), "digest of the payload"),
        "digest of RAMD": (build([part(), raw[0].but(digest=noise(32)), raw[1]]), "digest of RAMD"),
        "padding before payload": (second(unknown, alignment=4096, before=b"\1"), "padding"),
        "padding after payload": (second(unknown, after=b"\1"), "padding"),
        "padding after END": (good + bytes(16), "something after END"),
        "two of kind and name": (build([part(), unknown, unknown]), "same kind and name"),
        "two versions of kind and name": (build([part(), meta(), meta().but(version=2)]), "same kind and name"),
        "4097 chunks": (build([part()] + [part(b"%d" % n) for n in range(4096)]), "more than 4096"),
        # Kinds
        "optional PART": (second(part(b"a"), flags=1), "is optional"),
        "META not optional": (second(meta(), flags=0), "not optional"),
        "PART at 4096": (second(part(b"a"), alignment=4096), "aligned"),
        "RAMD at 16": (build([part(), raw[0].but(alignment=16), raw[1]]), "aligned"),
        "RAMI at 4096": (build([part(), raw[0], raw[1].but(alignment=4096)]), "aligned"),
        "name of BASE": (second(base(), name=b"child"), "another name"),
        "name of META": (second(meta(), name=b"mete"), "another name"),
        "unknown kind": (second(unknown, flags=0), "unknown"),
        "unknown version": (second(part(b"a"), version=2), "unknown"),
        "version 0": (second(part(b"a"), version=0), "unknown"),
        "unknown version, optional": (second(part(b"a"), version=2, flags=1), "PART is optional"),
        "META 2, not optional": (second(meta(), version=2, flags=0), "unknown"),
        # Order
        "config is not first": (build([part(b"a"), part()]), "first chunk"),
        "first is META": (build([meta()]), "first chunk"),
        "END only": (build([]), "first chunk"),
        "PART after BASE": (build([part(), base(), part(b"a")]), "comes after"),
        "PART after RAM": (build([part(), *raw, part(b"a")]), "comes after"),
        "BASE after RAM": (build([part(), *raw, base()]), "comes after"),
        "two BASE": (build([part(), base(), base("b")]), "same kind and name"),
        "RAM after META": (build([part(), meta(), *raw]), "comes after"),
        "unknown before RAM": (build([part(), unknown, *raw]), "comes after"),
        "RAMD only": (build([part(), raw[0]]), "pairs"),
        "RAMD, META": (build([part(), raw[0], meta()]), "pairs"),
        "RAMI only": (build([part(), raw[1]]), "pairs"),
        "RAMI before RAMD": (build([part(), raw[1], raw[0]]), "pairs"),
        "RAMI of another": (build([part(), raw[0], raw[1].but(name=b"ram.1")]), "pairs"),
        # Sizes
        "payload too long": (second(meta(), payload=big + b" "), "longer than its limit"),
        "told too long": (second(unknown, length=(1 << 64) - 1), "longer than its limit"),
        "all too long": (build([part(), *full(1)]), "together"),
        "RAMD too long": (build([part(), raw[0].but(length=(1 << 40) + 4096), raw[1]]), "longer than its limit"),
        "longer than the file": (build([part(), raw[0].but(length=1 << 40), raw[1]]), "longer than the file"),
        # PART
        "PART not an object": (build([part(value=[])]), "not an object"),
        "PART with more": (build([part(value={"schema": schema(), "state": {}, "x": 0})]), "not an object"),
        "PART without schema": (build([part(value={"state": {}})]), "not an object"),
        "schema with more": (state_case(more=1), "not an object"),
        "schema of null": (build([part(value={"schema": None, "state": {}})]), "not an object"),
        "name of a schema": (state_case(name=1), "name"),
        "version 0 of a state": (state_case(version=0), "version"),
        "version true of a state": (state_case(version=True), "version"),
        "version of text": (state_case(version="1"), "version"),
        "doc of a schema": (state_case(doc=None), "doc"),
        "two lines of doc": (state_case(doc="a\nb"), "one line"),
        "fields of an object": (state_case(fields={}), "not a list"),
        "field of text": (state_case(fields=["n"]), "not an object"),
        "field with more": (state_case(fields=[{**F, "x": 0}]), "not an object"),
        "field without doc": (state_case(fields=[{"name": "n", "type": "u8"}]), "not an object"),
        "name of a field": (state_case(fields=[{**F, "name": 1}]), "name"),
        "doc of a field": (state_case(fields=[{**F, "doc": 1}]), "doc"),
        "two fields of one name": (state_case(fields=[F, F]), "two fields"),
        "state lacks a field": (state_case(fields=[F, {**F, "name": "n"}]), "keys of the state"),
        "state has more": (state_case(fields=[]), "keys of the state"),
        "state of a list": (build([part(value={"schema": schema(), "state": []})]), "keys of the state"),
        # BASE
        "BASE not an object": (base_case("parent"), "not an object"),
        "BASE with more": (base_case({"digest": "0" * 64, "file": "a", "x": 0}), "not an object"),
        "BASE digest short": (base_case({"digest": "0" * 62, "file": "a"}), "64 hex"),
        "BASE digest capitals": (base_case({"digest": "A" * 64, "file": "a"}), "64 hex"),
        "BASE digest null": (base_case({"digest": None, "file": "a"}), "64 hex"),
        # RAMD and RAMI
        "RAMI of 31 bytes": (build([part(), raw[0], raw[1].but(payload=bytes(31))]), "32 bytes"),
        "RAMI digest": (build([part(), raw[0], raw[1].but(digest=bytes(32))]), "digest of the payload"),
        "base": (region(at=1), "base"),
        "size 0": (region(0, b""), "size"),
        "size of no page": (region(4097, bytes(4097)), "size"),
        "size over 1 TiB": (region((1 << 40) + 4096, b"", codec=1), "size"),
        "ends above 2^64": (region(8192, bytes(8192), at=(1 << 64) - 4096), "above"),
        "regions overlap": (twice(0, 8192, 4096), "above the one before"),
        "regions of one base": (twice(0, 4096, 0), "above the one before"),
        "regions descend": (twice(8192, 4096, 0), "above the one before"),
        "size of a block": (region(block=4096), "size of a block"),
        "codec 2": (region(codec=2), "codec"),
        "n too great": (region(n=1 << 63), "number of present"),
        "more blocks than there are": (region(entries=e[:2]), "number of present"),
        "n too small": (region(entries=e[:1], n=0), "number of present"),
        "index with more": (build([part(), raw[0], raw[1].but(payload=raw[1].payload + b"\0")]), "number of present"),
        "block beyond the region": (region(entries=e[1:2]), "no such block"),
        "blocks descend": (region(2 * BLOCK, bytes(2 * BLOCK), entries=[e[1], e[0]]), "ascend"),
        "a block twice": (region(2 * BLOCK, bytes(2 * BLOCK), entries=[e[0], e[0]]), "ascend"),
        "reserved of an entry": (region(data=text, entries=[entry(0, 1, text)]), "reserved bytes of an entry"),
        "RAMD too short": (region(8192), "as long as the region"),
        "RAMD longer than the region": (region(4096, bytes(8192)), "as long as the region"),
        "digest of a block": (region(data=text, entries=[entry(0, 0, b"y" * 4096)]), "digest of a block"),
        "digest of a hole": (region(BLOCK, bytes(BLOCK), entries=[entry(0, 0, b"y")]), "digest of a block"),
        "absent block": (build([part(), *ram(MEMORY, numbers=[0, 2])]), "not present is not zero"),
        "absent block before": (build([part(), *ram(MEMORY, numbers=[2, 3])]), "not present is not zero"),
        "absent last byte": (region(data=bytes(4095) + b"\1"), "not present is not zero"),
        # Stored forms
        "stored of no length": (form_case(b"", text), "stored form is empty"),
        "stored longer than block": (form_case(text + b"x", text), "longer than its block"),
        "less stored": (build([part(), stored.but(payload=small[:-1]), of_stored]), "stored forms"),
        "more stored": (build([part(), stored.but(payload=small + b"x"), of_stored]), "stored forms"),
        "raw form, digest": (form_case(text, b"y" * 4096), "digest of a block"),
        "zstd form, digest": (form_case(small, b"y" * 4096), "digest of a block"),
        "something after the frame": (form_case(small + b"x", text), "zstd"),
        "two frames": (form_case(frame(text) + frame(b""), text), "zstd"),
        "skippable before": (form_case(b"\x50\x2a\x4d\x18\0\0\0\0" + small, text), "zstd frame"),
        "skippable of the size": (form_case(b"\x50\x2a\x4d\x18\0\x10\0\0" + small, text), "zstd frame"),
        "cut frame": (form_case(small[:-1], text), "zstd"),
        "no frame": (form_case(b"xxxxxxxx", text), "zstd"),
        "no content size": (form_case(no_size, text), "content size"),
        "content size less": (form_case(frame(text[:-1]), text[:-1]), "content size"),
        "content size more": (form_case(frame(text + b"x"), text), "content size"),
        "content size of a terabyte": (form_case(huge, text), "content size of"),
        "content size lies": (form_case(frame(b"x" * 4000)[:5] + small[5:7] + frame(b"x" * 4000)[7:], text), "zstd"),
        "named dictionary": (form_case(named, text), "dictionary"),
        "nameless dictionary": (form_case(nameless, b"xyzzy" * 100 + bytes(3596)), "zstd"),
        # END
        "END count": (build([part()], count=2), "number of chunks"),
        "END length": (build([part()], length=1), "length of the file"),
        "END digest": (build([part()], digest=bytes(32)), "digest of the headers"),
        "END payload's digest": (build([part()], finish=lambda e: e.but(digest=bytes(32))), "digest of the payload"),
        "END name": (build([part()], finish=lambda e: e.but(name=b"end")), "another name"),
        "END optional": (build([part()], finish=lambda e: e.but(flags=1)), "is optional"),
        "END at 4096": (build([part()], finish=lambda e: e.but(alignment=4096)), "aligned"),
        "END version": (build([part()], finish=lambda e: e.but(version=2)), "unknown"),
        "END reserved": (build([part()], finish=lambda e: e.but(reserved=1)), "reserved"),
        "END short": (build([part()], finish=lambda e: e.but(payload=e.payload[:47])), "48 bytes"),
        "END long": (build([part()], finish=lambda e: e.but(payload=e.payload + b"\0")), "limit"),
        "something after": (good + b"\0", "something after END"),
        "no END": (good[:-144], "without END"),
        "two ENDs": (good + good[-144:], "something after END"),
    }  # fmt: skip
    for name in ("", ".", "..", "a/b", "/a", "a" * 256, "\u00e9", "a\n", "\x7f", 1, None):
        files[f"parent {name!a:.20}"] = base_case({"digest": "0" * 64, "file": name}), "good name"
    for payload in NOT_CANONICAL:
        files[f"JSON {payload!r:.30}"] = json_case(payload), ""
    return files


BAD = bad_files()


@pytest.mark.parametrize("name", BAD)
def test_bad(name, snap, capsys):
    data, rule = BAD[name]
    path = snap(data)
    assert main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert re.match(re.escape(str(path)) + ": offset 0x[0-9a-f]+: .*" + re.escape(rule), err)


@pytest.mark.parametrize(
    "payload",
    [
        b"null",
        b"0",
        b"-1",
        b"18446744073709551615",
        b"-9223372036854775808",
        b'"/"',
        b'"\\b\\t\\n\\f\\r\\"\\\\"',
        b'"\\u007f"',
        b'"\\u0000"',
        b'"\\\\ud800"',
        b'"\\ud83d\\ude00"',
        b'{"":0,"A":1,"a":2}',
        canonical(nested(32)),
        b'"[[[[' + b"[" * 99 + b'"',
        b'{"\\uffee":1,"\\ud83d\\ude00":1}',
        b'"\\\\\\"[[["',
    ],
)
def test_canonical_json(payload, snap):
    verify(snap(json_case(payload)))


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)
fixtures_are_fine = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@fixtures_are_fine
@given(JSON)
def test_any_json(snap, value):
    verify(snap(json_case(canonical(value))))


@fixtures_are_fine
@given(JSON, st.data())
def test_json_with_one_byte_changed(snap, value, data):
    """One byte is another: no crash, and never two texts for one value."""
    text = bytearray(canonical(value))
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        verify(snap(json_case(bytes(text))))
    except Bad:
        return
    assert canonical(json.loads(text)) == text


@fixtures_are_fine
@given(JSON, JSON)
def test_any_type_and_value(snap, its, value):
    """Whatever a schema holds, it is an answer and no crash."""
    try:
        verify(snap(build([typed(its, value)])))
    except Bad:
        return


SMALL = {
    "no RAM": build([part(), base(), meta(b"{}")]),
    "packed": build([part(), *packed(b"x" * 4096), chunk(b"XTRA", b"x", b"abc", flags=1)]),
    "raw": build([part(), *ram(b"x" * 4096)]),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_truncation(name, snap):
    path = snap(SMALL[name])
    for length in reversed(range(len(SMALL[name]))):
        os.truncate(path, length)
        with pytest.raises(Bad):
            verify(path)


@pytest.mark.parametrize(
    ("name", "step"), [("no RAM", 1), ("packed", 1), ("raw", 5), pytest.param("raw", 1, marks=pytest.mark.slow)]
)
def test_every_bit(name, step, snap):
    """Each bit of each byte, those of a zstd frame included without which it decodes to the same; in the quick tests,
    where there is a whole page, each fifth."""
    data = SMALL[name]
    path = snap(data)
    with open(path, "r+b", buffering=0) as file:
        for bit in range(0, 8 * len(data), step):
            where = bit // 8
            os.pwrite(file.fileno(), bytes([data[where] ^ 1 << bit % 8]), where)
            with pytest.raises(Bad):
                verify(path)
            os.pwrite(file.fileno(), data[where : where + 1], where)


@fixtures_are_fine
@given(st.binary(max_size=300))
def test_any_bytes(snap, data):
    for head in (b"", HEAD, SMALL["no RAM"][:128]):
        with pytest.raises(Bad):
            verify(snap(head + data))


def chain(snap: Callable[..., Path], count: int) -> tuple[Path, list[bytes]]:
    """Files 0.snap, 1.snap...: each a difference to the one before, all of the same regions."""
    memory = noise(BLOCK) + bytes(4096)
    files = [build([part(), *ram(memory)])]
    for number in range(1, count):
        its = packed(memory, numbers=[number % 2])
        files.append(build([part(), base(f"{number - 1}.snap", identity(files[-1])), *its]))
    for number, data in enumerate(files):
        path = snap(data, f"{number}.snap")
    return path, files


@pytest.mark.parametrize("count", [2, 3, 64])
def test_chain(count, snap, capsys):
    path, files = chain(snap, count)
    found = verify(path)
    assert (found.files, found.identity) == (count, identity(files[-1]))
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"1 region, 1 block, difference, chain of {count} files\n")


def test_chain_of_65(snap):
    path, _ = chain(snap, 65)
    with pytest.raises(Bad, match="more than 64"):
        verify(path)


@pytest.mark.parametrize("missing", [0, 1])
def test_parent_missing(missing, snap, tmp_path, capsys):
    path, _ = chain(snap, 3)
    (tmp_path / f"{missing}.snap").unlink()
    assert main([str(path)]) == 2
    assert f"parent '{missing}.snap'" in capsys.readouterr().err


def test_parent_missing_and_file_bad(snap):
    data = bytearray(build([part(), base()]))
    data[-1] ^= 1
    with pytest.raises(Bad, match="digest of the headers"):
        verify(snap(bytes(data)))


@pytest.mark.parametrize("damaged", [0, 1])
def test_parent_bad(damaged, snap):
    """Its RAM is another; its identity, which does not look at RAM, is as it was."""
    path, files = chain(snap, 3)
    data = bytearray(files[damaged])
    data[4096] ^= 1
    assert identity(bytes(data)) == identity(files[damaged])
    snap(bytes(data), f"{damaged}.snap")
    with pytest.raises(Bad, match=f"parent '{damaged}.snap': offset 0x1000: (the digest of a block|zstd)"):
        verify(path)


def test_parent_of_another_identity(snap):
    path, _ = chain(snap, 3)
    snap(build([part(), part(b"a"), *ram(noise(BLOCK) + bytes(4096))]), "0.snap")
    with pytest.raises(Bad, match="another identity"):
        verify(path)


@pytest.mark.parametrize(
    "regions",
    [
        [],
        ram(bytes(8192)),
        ram(bytes(4096), at=4096),
        ram(bytes(4096), name=b"ram.1"),
        ram(bytes(4096)) + ram(bytes(4096), 4096, b"ram.1"),
    ],
)
def test_parent_of_other_regions(regions, snap):
    parent = build([part(), *regions])
    snap(parent, "parent.snap")
    with pytest.raises(Bad, match="other regions"):
        verify(snap(build([part(), base(identity=identity(parent)), *packed(bytes(4096))])))


def test_parent_is_itself(snap):
    with pytest.raises(Bad, match="another identity"):
        verify(snap(build([part(), base("it.snap")])))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_not_a_file(make, snap, tmp_path, capsys):
    """As the file itself, and as a parent, which is there and no snapshot. A FIFO does not hang us."""
    make(tmp_path / "parent.snap")
    assert main([str(tmp_path / "parent.snap")]) == 2
    assert main([str(snap(build([part(), base()])))]) == 1
    assert capsys.readouterr().err.count("not a regular file") == 2


def test_parent_in_another_folder(snap, tmp_path, monkeypatch):
    """The parent is sought beside the file, not where we are."""
    path, _ = chain(snap, 2)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert verify(Path("..") / path.name).files == 2


def test_absent_block_of_a_difference_is_zero(snap):
    parent = build([part(), *ram(b"x" * 4096)])
    snap(parent, "parent.snap")
    verify(snap(build([part(), base(identity=identity(parent)), *ram(bytes(4096))])))
    with pytest.raises(Bad, match="not present is not zero"):
        verify(snap(build([part(), base(identity=identity(parent)), *ram(b"x" * 4096, numbers=[])])))


def test_sparse_terabyte(tmp_path):
    """One present block, one of zeros; the rest is a hole, and not read."""
    size, last = 1 << 40, (1 << 24) - 1
    entries = [entry(0, 0, bytes(BLOCK)), entry(last, 0, b"x" * BLOCK)]
    data, rami = pair(b"", index(0, size, 0, entries))
    chunks = [part(), data.but(length=size), rami]
    first = build([chunks[0]])[:-144]
    start = -(-(len(first) + 96) // 4096) * 4096
    after = rami.header() + rami.payload
    after += bytes(-len(after) % 16)
    closing = end(HEAD, chunks, start + size + len(after) + 144)
    path = tmp_path / "terabyte.snap"
    with open(path, "wb") as file:
        file.write(first + chunks[1].header())
        file.seek(start + last * BLOCK)
        file.write(b"x" * BLOCK + after + closing.header() + closing.payload)
    assert verify(path).blocks == 2
    with open(path, "r+b") as file:
        file.seek(start + size // 2 + 5)
        file.write(b"\1")
    with pytest.raises(Bad, match=f"offset {start + size // 2 + 5:#x}: a block that is not present"):
        verify(path)


def test_wide_window(snap):
    """A window of 2 GiB in the header of a frame costs nothing: the content size bounds what is allocated."""
    block = b"x" * BLOCK
    form = b"\x28\xb5\x2f\xfd\x40\xa8" + struct.pack("<H", BLOCK - 256) + b"\x03\x00\x08x"
    form = form[:-4] + struct.pack("<I", BLOCK << 3 | 1 << 1 | 1)[:3] + b"x"  # last block, run of one byte
    verify(snap(build([part(), *forms((form, block), size=BLOCK)])))


@pytest.mark.parametrize(
    "payload",
    [b"[" + b"[]," * 300_000 + b"[]]", b'"' + b"\\\\" * 500_000 + b'"', b'"\\"' * 300_000, b"9" * (1 << 20)],
    ids=["lists", "escapes", "quotes", "digits"],
)
def test_long_json(payload, snap):
    """As long as may be: an answer, in time and memory that grow with the length only."""
    try:
        verify(snap(json_case(payload)))
    except Bad:
        assert payload[:2] not in (b"[[", b'"\\\\')


def test_many_choices(snap):
    """A list of texts is not looked through for each value."""
    texts = [f"{n:x}" for n in range(50_000)]
    verify(snap(build([typed({"list": {"one_of": texts}, "max": len(texts)}, texts[::-1])])))


def page_dump() -> bytes:
    text = (ROOT / "docs" / "snapshot-format.md").read_text()
    dump = text.split("<!-- dump -->")[1].split("<!-- end of dump -->")[0]
    out = bytearray()
    repeat = False
    for line in dump.splitlines():
        if line == "*":
            repeat = True
        elif found := re.match(r"([0-9a-f]{8})  ((?:[0-9a-f]{2} {1,2}){1,16})", line):
            at = int(found[1], 16)
            if repeat:
                out += out[-16:] * ((at - len(out)) // 16)
            repeat = False
            assert len(out) == at, line
            out += bytes.fromhex(found[2])
    return bytes(out)


def test_page(snap, capsys):
    path = snap(page_dump())
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: good, 1 part, 1 region, 1 block\n"


def run(*arguments: object, cwd: Path = ROOT) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("how", [("-m", "snapshot.verify"), (SCRIPT,)], ids=["module", "script"])
def test_command_line(how, snap, tmp_path):
    good, bad = snap(SMALL["raw"], "good.snap"), snap(SMALL["raw"][:-1], "bad\n.snap")
    status, out, err = run(*how, good)
    assert (status, out, err) == (0, f"{good}: good, 1 part, 1 region, 1 block\n", "")
    status, out, err = run(*how, bad)
    assert (status, out, err.count("\n")) == (1, "", 1)
    for wrong in ((), (good, good), (tmp_path / "none",), (tmp_path,), ("",)):
        status, out, err = run(*how, *wrong)
        assert (status, out, err.count("\n")) == (2, "", 1)


def test_stands_alone(snap, tmp_path):
    """Of this project it needs nothing, and what else it needs it says."""
    alone = tmp_path / "verify.py"
    alone.write_bytes(SCRIPT.read_bytes())
    path = snap(SMALL["packed"])
    assert run(alone, path, cwd=tmp_path)[0] == 0
    status, out, err = run("-S", alone, path, cwd=tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name
    }
    assert imported <= {*sys.stdlib_module_names, "blake3", "zstandard"}


def test_what_is_no_file_is_closed_again(tmp_path, capsys):
    before = len(os.listdir("/proc/self/fd"))
    assert main([str(tmp_path)]) != 0
    assert len(os.listdir("/proc/self/fd")) == before
