"""Is a file a good snapshot? An independent reader, written from docs/snapshot-format.md alone.

Source: docs/snapshot-format.md, version 1.0. Nothing is imported from this project, and nothing here is imported by the
code that reads and writes snapshots: where this and they differ, one of the three is wrong.

    python -m snapshot.verify FILE

Exit status 0: good. 1: not good; one line tells the offset and the rule. 2: cannot tell; one line tells why.

Everything is checked, the RAM and the chain of parents too. What is held in memory at once is one JSON payload or one
block of RAM; holes of the file are not read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

try:
    import zstandard
    from blake3 import blake3
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(f"verify: {missing}", file=sys.stderr)
    sys.exit(2)

MAGIC = b"\x89ANYHYVE\r\n\x1a\n"
HEADER = struct.Struct("<4sHHIIQ32s32sQ")
INDEX, ENTRY, END = struct.Struct("<QQIIQ"), struct.Struct("<II32s"), struct.Struct("<QQ32s")
PAGE, BLOCK, REGION = 4096, 65536, 1 << 40
CHUNKS, FILES, DEPTH = 4096, 64, 32
PAYLOAD, PAYLOADS = 1 << 20, 1 << 21
PIECE = 8192 * ENTRY.size  # what is read at once of anything long; whole entries of an index
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # of a frame with content; skippable frames have others

KINDS: dict[bytes, tuple[int, int, bytes | None]] = {  # of version 1: flags, alignment, name when there is but one
    b"PART": (0, 16, None),
    b"BASE": (0, 16, b"parent"),
    b"RAMD": (0, PAGE, None),
    b"RAMI": (0, 16, None),
    b"META": (1, 16, b"meta"),
    b"END ": (0, 16, b""),
}
LIMITS = {b"RAMD": REGION, b"RAMI": INDEX.size + REGION // BLOCK * ENTRY.size, b"END ": END.size}  # others: PAYLOAD
STAGES = {b"PART": 0, b"BASE": 1, b"RAMD": 2, b"RAMI": 2, b"END ": 4}  # optional chunks: 3


class Bad(Exception):
    """The file breaks a rule of the page."""

    def __init__(self, offset: int, rule: str) -> None:
        super().__init__(f"offset {offset:#x}: {rule}")


class CannotTell(Exception):
    """Nothing is known about the file: it, or a parent of it, cannot be read."""


class _NotRegular(CannotTell):
    pass


@dataclass(frozen=True)
class Region:
    name: str
    base: int
    size: int


@dataclass(frozen=True)
class Summary:
    identity: bytes
    parts: int
    regions: tuple[Region, ...]
    blocks: int  # present in this file
    parent: tuple[str, bytes, int] | None  # its name and identity, and the offset that tells them
    files: int = 1  # in the chain, this one too


@dataclass(frozen=True)
class _Chunk:
    raw: bytes
    at: int
    kind: bytes
    known: bool
    name: bytes
    digest: bytes
    start: int
    length: int

    @property
    def stage(self) -> int:
        return STAGES.get(self.kind, 3)


class _File:
    def __init__(self, path: Path) -> None:
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)  # a FIFO must not hang us
        except (OSError, ValueError) as error:
            raise CannotTell(getattr(error, "strerror", None) or str(error)) from None
        status = os.fstat(self.fd)
        self.size = status.st_size
        self._hole = (0, 0)  # no data from the first offset to the second
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise _NotRegular("not a regular file")

    def close(self) -> None:
        os.close(self.fd)

    def read(self, offset: int, length: int) -> bytes:
        pieces = []
        while length:
            piece = os.pread(self.fd, length, offset)
            if not piece:
                raise CannotTell("became shorter while it was read")
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def pieces(self, offset: int, length: int) -> Iterator[bytes]:
        for at in range(offset, offset + length, PIECE):
            yield self.read(at, min(PIECE, offset + length - at))

    def digest(self, offset: int, length: int) -> bytes:
        hasher = blake3()
        for piece in self.pieces(offset, length):
            hasher.update(piece)
        return hasher.digest()

    def data(self, offset: int, end: int) -> int:
        """The first offset, not after `end`, before which there are holes only."""
        if not self._hole[0] <= offset < self._hole[1]:
            try:
                found = os.lseek(self.fd, offset, os.SEEK_DATA)
            except OSError as error:
                found = self.size if error.errno == errno.ENXIO else offset  # no data there; or no such seek here
            self._hole = (offset, found)
        return min(self._hole[1], end)

    def zeros(self, offset: int, end: int, rule: str) -> None:
        while (offset := self.data(offset, end)) < end:
            piece = self.read(offset, min(BLOCK, end - offset))
            if rest := piece.lstrip(b"\0"):
                raise Bad(offset + len(piece) - len(rest), rule)
            offset += len(piece)


def verify(path: Path) -> Summary:
    """Check the file and all its parents. `Bad` when one is not good, `CannotTell` when one cannot be read."""
    first = last = _verify_one(path)
    where, files = "", 1
    while last.parent:
        name, identity, at = last.parent
        if files == FILES:
            raise Bad(at, f"{where}more than {FILES} files in the chain")
        try:
            parent = _verify_one(path.parent / name)
        except _NotRegular as error:
            raise Bad(at, f"{where}parent {name!r}: {error}") from None
        except Bad as error:
            raise Bad(at, f"{where}parent {name!r}: {error}") from None
        except CannotTell as error:
            raise CannotTell(f"parent {name!r}: {error}") from None
        if parent.identity != identity:
            raise Bad(at, f"{where}parent {name!r} has another identity")
        if parent.regions != last.regions:
            raise Bad(at, f"{where}parent {name!r} has other regions")
        last, where, files = parent, f"in {name!r}: ", files + 1
    return Summary(first.identity, first.parts, first.regions, first.blocks, first.parent, files)


def _verify_one(path: Path) -> Summary:
    file = _File(path)
    try:
        return _contents(file)
    except OSError as error:
        raise CannotTell(error.strerror or str(error)) from None
    finally:
        file.close()


def _contents(file: _File) -> Summary:
    chunks = _chunks(file)
    _order(chunks)
    identity = _end(file, chunks)
    regions: list[Region] = []
    blocks, parent = 0, None
    for before, chunk in pairwise([chunks[0], *chunks]):
        if chunk.kind == b"RAMD":
            continue
        if file.digest(chunk.start, chunk.length) != chunk.digest:
            raise Bad(chunk.start, "the digest of the payload is another")
        if chunk.kind == b"RAMI":
            region, present = _ram(file, before, chunk, regions[-1] if regions else None)
            regions.append(region)
            blocks += present
        elif chunk.known and chunk.kind != b"END ":
            try:
                value = _canonical(file.read(chunk.start, chunk.length))
                if chunk.kind == b"PART":
                    _part(value)
                elif chunk.kind == b"BASE":
                    parent = (*_base(value), chunk.start)
            except ValueError as error:
                raise Bad(chunk.start, str(error)) from None
    return Summary(identity, sum(chunk.kind == b"PART" for chunk in chunks), tuple(regions), blocks, parent)


def _chunks(file: _File) -> list[_Chunk]:
    """All headers, each good in itself, and the padding around them."""
    if file.size < 32:
        raise Bad(file.size, "cut in the file header")
    magic, major, _minor, reserved = struct.unpack("<12sHH16s", file.read(0, 32))
    if magic != MAGIC:
        raise Bad(0, "not the magic of a snapshot")
    if major != 1:
        raise Bad(12, f"major version {major}")
    if any(reserved):
        raise Bad(16, "reserved bytes of the file header are not zero")
    chunks: list[_Chunk] = []
    names: set[tuple[bytes, bytes]] = set()
    at, total = 32, 0
    while True:
        chunk = _header(file, at)
        chunks.append(chunk)
        end = chunk.start + chunk.length
        if chunk.kind == b"END ":
            if end != file.size:
                raise Bad(end, "something after END")
            return chunks
        if len(chunks) > CHUNKS:
            raise Bad(at, f"more than {CHUNKS} chunks")
        if (chunk.kind, chunk.name) in names:
            raise Bad(at, "two chunks of the same kind and name")
        names.add((chunk.kind, chunk.name))
        total += 0 if chunk.kind in LIMITS else chunk.length
        if total > PAYLOADS:
            raise Bad(at + 16, "payloads together longer than 2 MiB")
        at = _up(end, 16)
        if at > file.size:
            raise Bad(file.size, "cut in padding")
        file.zeros(end, at, "padding is not zero")


def _up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _header(file: _File, at: int) -> _Chunk:
    if file.size - at < HEADER.size:
        raise Bad(at, "the file ends without END")
    raw = file.read(at, HEADER.size)
    kind, version, flags, alignment, reserved, length, field, digest, reserved_2 = HEADER.unpack(raw)
    if not all(0x20 <= byte <= 0x7E for byte in kind):
        raise Bad(at, "the kind is not printable ASCII")
    if flags > 1:
        raise Bad(at + 6, "reserved flags are not zero")
    if alignment not in (16, PAGE):
        raise Bad(at + 8, f"alignment {alignment}")
    if reserved or reserved_2:
        raise Bad(at + (12 if reserved else 88), "reserved bytes of the header are not zero")
    name = field.rstrip(b"\0")
    if kind != b"END " and not re.fullmatch(rb"[a-z0-9._-]{1,32}", name):
        raise Bad(at + 24, "no good name")
    known = kind in KINDS and version == 1
    if known:
        _as_in_table(at, kind, flags, alignment, name)
    elif not flags:
        raise Bad(at, f"unknown kind {kind!r}, version {version}, and not optional")
    elif kind in KINDS and kind != b"META":
        raise Bad(at + 6, f"{kind.decode()} is optional")
    start = _up(at + HEADER.size, alignment)
    if length > LIMITS.get(kind, PAYLOAD):
        raise Bad(at + 16, "the payload is longer than its limit")
    if start + length > file.size:
        raise Bad(at + 16, "the payload is longer than the file")
    file.zeros(at + HEADER.size, start, "padding is not zero")
    return _Chunk(raw, at, kind, known, name, digest, start, length)


def _as_in_table(at: int, kind: bytes, flags: int, alignment: int, name: bytes) -> None:
    its_flags, its_alignment, its_name = KINDS[kind]
    if flags != its_flags:
        raise Bad(at + 6, f"{kind.decode()} is {'optional' if flags else 'not optional'}")
    if alignment != its_alignment:
        raise Bad(at + 8, f"{kind.decode()} is aligned to {alignment}")
    if its_name is not None and name != its_name:
        raise Bad(at + 24, f"{kind.decode()} has another name")


def _order(chunks: list[_Chunk]) -> None:
    if (chunks[0].kind, chunks[0].name) != (b"PART", b"config"):
        raise Bad(chunks[0].at, "the first chunk is not PART config")
    for before, chunk in pairwise(chunks):
        if before.stage > chunk.stage:
            raise Bad(chunk.at, f"{chunk.kind.decode()} comes after {before.kind.decode()}")
        if (before.kind == b"RAMD") != (chunk.kind == b"RAMI") or (chunk.kind == b"RAMI" and before.name != chunk.name):
            raise Bad(chunk.at, "RAMD and RAMI are not in pairs")


def _end(file: _File, chunks: list[_Chunk]) -> bytes:
    *others, end = chunks
    if end.length != END.size:
        raise Bad(end.at + 16, "END is not 48 bytes long")
    count, size, digest = END.unpack(file.read(end.start, END.size))
    if count != len(others):
        raise Bad(end.start, "END tells another number of chunks")
    if size != file.size:
        raise Bad(end.start + 8, "END tells another length of the file")
    hasher = blake3(file.read(0, 32))
    for chunk in others:
        hasher.update(chunk.raw)
    if digest != hasher.digest():
        raise Bad(end.start + 16, "END tells another digest of the headers")
    return hasher.digest()


def _canonical(text: bytes) -> Any:
    """Decode, encode, compare. The depth is found first: the decoder is recursive."""
    # A string goes to its end or, where it has none, to that of the text: each byte is looked at once.
    outside = re.sub(rb'(?s)"[^"\\]*+(?:\\.[^"\\]*+)*+"?', b"", text)
    depth = 0
    for byte in re.sub(rb"[^][{}]+", b"", outside):
        depth += 1 if byte in b"[{" else -1
        if depth > DEPTH:
            raise ValueError(f"JSON nests deeper than {DEPTH}")
    del outside
    value = json.loads(text.decode("ascii"), parse_int=_number, parse_float=_fraction, parse_constant=_fraction)
    if json.dumps(value, sort_keys=True, separators=(",", ":")).encode() != text:
        raise ValueError("JSON is not in its canonical form")
    if rb"\ud" in text:
        marked = re.sub(rb"\\ud[89ab]..\\ud[c-f]..", b"_", text.replace(rb"\\", b"__"))
        if re.search(rb"\\ud[89a-f]", marked):
            raise ValueError("JSON has a lone surrogate")
    return value


def _number(digits: str) -> int:
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 64:
        raise ValueError("JSON has a number out of range")
    return int(digits)


def _fraction(text: str) -> None:
    raise ValueError("JSON has a number that is not an integer")


def _object(value: Any, *keys: str) -> list[Any]:
    if not isinstance(value, dict) or value.keys() != set(keys):
        raise ValueError(f"not an object of the keys {', '.join(keys)}")
    return [value[key] for key in keys]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not text")
    return value


def _part(value: Any) -> None:
    schema, state = _object(value, "schema", "state")
    name, version, doc, fields = _object(schema, "name", "version", "doc", "fields")
    _text(name, "name of a schema")
    if type(version) is not int or version < 1:
        raise ValueError("version of a schema is not an integer from 1")
    if re.search(r"[\r\n]", _text(doc, "doc of a schema")):
        raise ValueError("doc of a schema is more than one line")
    checks = _fields(fields)
    if not isinstance(state, dict) or state.keys() != checks.keys():
        raise ValueError("the keys of the state are not the names of the fields")
    for name, check in checks.items():
        if not check(state[name]):
            raise ValueError(f"the value of {ascii(name)[:80]} is not of its type")


Check = Callable[[Any], bool]


def _fields(fields: Any) -> dict[str, Check]:
    if not isinstance(fields, list):
        raise ValueError("fields are not a list")
    checks: dict[str, Check] = {}
    for field in fields:
        name, described, doc = _object(field, "name", "type", "doc")
        _text(doc, "doc of a field")
        if _text(name, "name of a field") in checks:
            raise ValueError("two fields of one name")
        checks[name] = _type(described)
    return checks


def _type(described: Any) -> Check:
    """What tells whether a value is of the type. Made once for a type, as a list may hold a million values of it."""
    if described == "bool":
        return lambda value: isinstance(value, bool)
    if described == "i64":
        return _between(-(1 << 63), (1 << 63) - 1)
    if isinstance(described, str) and re.fullmatch(r"u([1-9]|[1-5][0-9]|6[0-4])", described):
        return _between(0, (1 << int(described[1:])) - 1)
    if isinstance(described, dict):
        key = next(iter(described), "")
        if key in _TYPES and described.keys() == {key}:
            return _TYPES[key](described[key])
        if described.keys() == {"count", "list"}:
            return _list(_type(described["list"]), _amount(described["count"]), exact=True)
        if described.keys() == {"max", "list"}:
            return _list(_type(described["list"]), _amount(described["max"]), exact=False)
    raise ValueError("there is no such type")


def _between(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _amount(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a size in a type is not an integer from 0")
    return value


def _range(ends: Any) -> Check:
    if not isinstance(ends, list) or [type(end) for end in ends] != [int, int]:
        raise ValueError("a range is not two integers")
    if ends[0] > ends[1]:
        raise ValueError("a range ends before it begins")
    return _between(*ends)


def _one_of(texts: Any) -> Check:
    if not isinstance(texts, list):
        raise ValueError("one_of is not a list")
    these = frozenset(_text(text, "a choice of one_of") for text in texts)
    return lambda value: isinstance(value, str) and value in these


def _text_max(most: Any) -> Check:
    limit = _amount(most)
    return lambda value: isinstance(value, str) and len(value) <= limit and value.isascii() and value.isprintable()


def _bytes(length: Any) -> Check:
    size = _amount(length)
    return lambda value: _hex(value) and len(value) == 2 * size


def _bytes_max(most: Any) -> Check:
    limit = _amount(most)
    return lambda value: _hex(value) and len(value) <= 2 * limit


def _hex(value: Any) -> bool:
    return isinstance(value, str) and len(value) % 2 == 0 and bool(re.fullmatch("[0-9a-f]*", value))


def _list(check: Check, size: int, exact: bool) -> Check:
    def is_list(value: Any) -> bool:
        if not isinstance(value, list) or len(value) > size or (exact and len(value) < size):
            return False
        return all(map(check, value))

    return is_list


def _optional(described: Any) -> Check:
    check = _type(described)
    return lambda value: value is None or check(value)


def _struct(fields: Any) -> Check:
    checks = _fields(fields)

    def is_struct(value: Any) -> bool:
        if not isinstance(value, dict) or value.keys() != checks.keys():
            return False
        return all(check(value[name]) for name, check in checks.items())

    return is_struct


_TYPES: dict[str, Callable[[Any], Check]] = {
    "range": _range,
    "one_of": _one_of,
    "text_max": _text_max,
    "bytes": _bytes,
    "bytes_max": _bytes_max,
    "optional": _optional,
    "struct": _struct,
}


def _base(value: Any) -> tuple[str, bytes]:
    digest, name = _object(value, "digest", "file")
    if not _hex(digest) or len(digest) != 64:
        raise ValueError("digest of the parent is not 64 hex digits")
    if not isinstance(name, str) or not re.fullmatch("[ -.0-~]{1,255}", name) or name in (".", ".."):
        raise ValueError("no good name of a parent's file")
    return name, bytes.fromhex(digest)


def _ram(file: _File, data: _Chunk, index: _Chunk, below: Region | None) -> tuple[Region, int]:
    """Check index and RAM of a region; the region, and how many blocks are present."""
    if index.length < INDEX.size:
        raise Bad(index.at + 16, "RAMI is shorter than 32 bytes")
    base, size, block, codec, present = INDEX.unpack(file.read(index.start, INDEX.size))
    if base % PAGE:
        raise Bad(index.start, "base is not a multiple of 4096")
    if not size or size % PAGE or size > REGION:
        raise Bad(index.start + 8, "size is not from 4096 to 2^40 in steps of 4096")
    if base + size > 1 << 64:
        raise Bad(index.start, "the region ends above 2^64")
    if below and base < below.base + below.size:
        raise Bad(index.start, "the region is not above the one before")
    if block != BLOCK:
        raise Bad(index.start + 16, "size of a block is not 65536")
    if codec > 1:
        raise Bad(index.start + 20, f"codec {codec}")
    if present > -(-size // BLOCK) or index.length != INDEX.size + ENTRY.size * present:
        raise Bad(index.start + 24, "the number of present blocks does not fit")
    if codec == 0 and data.length != size:
        raise Bad(data.at + 16, "RAMD is not as long as the region")
    end = (_raw if codec == 0 else _packed)(file, data, index, size)
    if codec == 0:
        file.zeros(end, data.start + size, "a block that is not present is not zero")
    elif end != data.start + data.length:
        raise Bad(data.at + 16, "RAMD is not as long as the stored forms")
    if data.digest != (bytes(32) if codec == 0 else file.digest(data.start, data.length)):
        raise Bad(data.at + 56, "the digest of RAMD is not zero" if codec == 0 else "the digest of RAMD is another")
    return Region(data.name.decode(), base, size), present


def _entries(file: _File, index: _Chunk, size: int) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Of each present block: offset of its entry, offset in the region, length, second field, digest."""
    at, last = index.start + INDEX.size, -1
    for piece in file.pieces(at, index.length - INDEX.size):
        for number, field, digest in ENTRY.iter_unpack(piece):
            if number <= last or number * BLOCK >= size:
                raise Bad(at, "numbers of blocks do not ascend" if number <= last else "no such block in the region")
            yield at, number * BLOCK, min(BLOCK, size - number * BLOCK), field, digest
            at, last = at + ENTRY.size, number


def _raw(file: _File, data: _Chunk, index: _Chunk, size: int) -> int:
    """Codec 0; the offset behind the last present block."""
    end = data.start
    nothing = blake3(bytes(BLOCK)).digest()
    for at, offset, length, reserved, digest in _entries(file, index, size):
        if reserved:
            raise Bad(at + 4, "reserved bytes of an entry are not zero")
        start = data.start + offset
        file.zeros(end, start, "a block that is not present is not zero")
        end = start + length
        hole = length == BLOCK and file.data(start, end) == end
        if (nothing if hole else file.digest(start, length)) != digest:
            raise Bad(start, "the digest of a block is another")
    return end


def _packed(file: _File, data: _Chunk, index: _Chunk, size: int) -> int:
    """Codec 1; the offset behind the last stored form."""
    start, end = data.start, data.start + data.length
    for at, _, length, stored, digest in _entries(file, index, size):
        if not 1 <= stored <= length:
            raise Bad(at + 4, "a stored form is empty or longer than its block")
        if stored > end - start:
            raise Bad(at + 4, "RAMD is not as long as the stored forms")
        form = file.read(start, stored)
        if blake3(form if stored == length else _frame(form, start, length)).digest() != digest:
            raise Bad(start, "the digest of a block is another")
        start += stored
    return start


def _frame(form: bytes, at: int, length: int) -> bytes:
    try:
        told = zstandard.get_frame_parameters(form)
        if not form.startswith(ZSTD_MAGIC) or told.dict_id:
            raise Bad(at, "a stored form is not a zstd frame without a dictionary")
        if told.content_size != length:  # also when it is not told; asked before that much is allocated
            raise Bad(at, "content size of a zstd frame is not that of the block")
        return zstandard.ZstdDecompressor().decompress(form, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Bad(at, f"zstd: {error}") from None


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m snapshot.verify FILE", file=sys.stderr)
        return 2
    shown = ascii(arguments[0])[1:-1]  # one line, whatever the name holds
    try:
        found = verify(Path(arguments[0]))
    except (Bad, CannotTell) as error:
        print(f"{shown}: {error}", file=sys.stderr)
        return 1 if isinstance(error, Bad) else 2
    counts = ((found.parts, "part"), (len(found.regions), "region"), (found.blocks, "block"))
    told = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts)
    chain = f", difference, chain of {found.files} files" if found.parent else ""
    print(f"{shown}: good, {told}{chain}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
