"""Is this a good snapshot? Written from docs/snapshot-format.md alone; shares no code with reader or writer.

    python -m snapshot.verify FILE

Exit status 0: good. 1: bad; one line names the offset and the rule. 2: cannot tell, and why.
A difference is checked with the chain of parents it stands on.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

MAGIC = b"\x89ANYHYVE\r\n\x1a\n"
BLOCK, PAGE = 65536, 4096
MAX_JSON, MAX_JSON_TOTAL, MAX_REGION = 1 << 20, 4 << 20, 1 << 40
MAX_CHUNKS, MAX_CHAIN, MAX_DEPTH = 4096, 64, 32
MAX_NUMBER_DIGITS = 20

# kind -> (place in the order, optional flag, alignment, fixed name)
KINDS: dict[bytes, tuple[int, int, int, str | None]] = {
    b"PART": (1, 0, 16, None),
    b"BASE": (2, 0, 16, "parent"),
    b"RAMD": (3, 0, PAGE, None),
    b"RAMI": (3, 0, 16, None),
    b"META": (4, 1, 16, "meta"),
    b"END ": (5, 0, 16, ""),
}
_NEVER_OPTIONAL = (b"PART", b"BASE", b"RAMD", b"RAMI", b"END ")


class BadError(Exception):
    """The file breaks a rule."""


class CannotTellError(Exception):
    """Something that is needed to know is not here."""


try:
    import zstandard
    from blake3 import blake3
except ImportError as missing:  # pragma: no cover - said in words when it is used
    _missing: ImportError | None = missing
else:
    _missing = None


@dataclass
class Region:
    """One RAM region as its index gives it: entries are (number, stored length, digest)."""

    name: str
    base: int
    size: int
    codec: int
    data: int  # where the payload starts
    entries: list[tuple[int, int, bytes]]


@dataclass
class Summary:
    """What a good file holds."""

    identity: bytes = b""
    parts: int = 0
    regions: list[Region] = field(default_factory=list)
    parent: tuple[bytes, str] | None = None

    def __str__(self) -> str:
        blocks = sum(len(region.entries) for region in self.regions)
        kind = "" if self.parent is None else f", a difference to {self.parent[1]}"
        return f"{self.parts} parts, {len(self.regions)} RAM regions, {blocks} blocks{kind}"


def verify(path: Path) -> Summary:
    """Check a snapshot and what it stands on. Raises BadError or CannotTellError, each in one line."""
    if _missing is not None:
        raise CannotTellError(str(_missing))
    summary = child = _File(path).check()
    name = ""
    for _ in range(MAX_CHAIN - 1):
        if child.parent is None:
            return summary
        identity, name = child.parent
        try:
            parent = _File(path.parent / name).check()
        except FileNotFoundError:
            raise CannotTellError(f"parent {name} is not here") from None
        except BadError as error:
            raise BadError(f"parent {name}: {error}") from None
        if parent.identity != identity:
            raise BadError(f"parent {name}: its identity is another")
        if [(r.name, r.base, r.size) for r in parent.regions] != [(r.name, r.base, r.size) for r in child.regions]:
            raise BadError(f"parent {name}: its regions are others")
        child = parent
    if child.parent is not None:
        raise BadError(f"parent {name}: a chain of more than {MAX_CHAIN} files")
    return summary


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        self.size = 0
        self.json_total = 0

    def check(self) -> Summary:
        self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(self.fd)
            if not stat.S_ISREG(status.st_mode):
                raise BadError("offset 0x0: not a regular file")
            self.size = status.st_size
            return self._check()
        finally:
            os.close(self.fd)

    def bad(self, offset: int, rule: str) -> NoReturn:
        raise BadError(f"offset {offset:#x}: {rule}")

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            self.bad(offset, "the file is cut")
        data = b""
        while len(data) < length:
            piece = os.pread(self.fd, length - len(data), offset + len(data))
            if not piece:
                self.bad(offset, "the file is cut")
            data += piece
        return data

    def zeros(self, start: int, end: int, what: str) -> None:
        if any(self.read(start, end - start)):
            self.bad(start, f"{what} is not zero")

    # --- the file

    def _check(self) -> Summary:
        header = self.read(0, 32)
        if header[:12] != MAGIC:
            self.bad(0, "the magic is not that of a snapshot")
        if header[12:14] != b"\1\0":
            self.bad(12, "the major version is not 1")
        if any(header[16:]):
            self.bad(16, "reserved bytes are not zero")
        seal = blake3(header)
        summary = Summary()
        names: set[tuple[bytes, bytes]] = set()
        data: tuple[bytes, int, int] | None = None  # the RAMD whose RAMI must follow: name, payload, length
        at, count, place = 32, 0, 0
        while True:
            raw = self.read(at, 96)
            kind, version, flags, alignment, zero, length, name, digest, tail = struct.unpack("<4sHHIIQ32s32s8s", raw)
            known = self._header(at, kind, version, flags, alignment, zero, name, tail)
            rank = KINDS[kind][0] if known or kind in KINDS else 4
            if count == 0 and (kind, name.rstrip(b"\0")) != (b"PART", b"config"):
                self.bad(at, "the first chunk is not PART config")
            if (kind == b"RAMI") != (data is not None) or (data is not None and data[0] != name):
                self.bad(at, "RAMD and RAMI of one name must follow each other")
            if rank < place:
                self.bad(at, "the chunk is out of order")
            place = rank
            start = _up(at + 96, alignment)
            if kind not in (b"RAMD", b"RAMI", b"END "):
                self.json_total += length
                if length > MAX_JSON or self.json_total > MAX_JSON_TOTAL:
                    self.bad(at, "the payload is over its limit")
            if (kind == b"END " and length != 48) or (kind == b"RAMD" and length > MAX_REGION):
                self.bad(at, "the length is not one of this kind")
            if start + length > self.size:
                self.bad(at, "the payload goes past the end of the file")
            self.zeros(at + 96, start, "padding")
            if kind == b"END ":
                self._end(at, start, self.read(start, 48), digest, count, seal.digest())
                summary.identity = seal.digest()
                return summary
            if count == MAX_CHUNKS:
                self.bad(at, f"more than {MAX_CHUNKS} chunks before END")
            if (kind, name) in names:
                self.bad(at, "a second chunk of this kind and name")
            names.add((kind, name))
            text = name.rstrip(b"\0").decode("ascii")
            if kind == b"RAMD":
                if any(digest):
                    self.bad(at + 56, "the digest of RAMD is not zero")
                data = (name, start, length)
            elif kind == b"RAMI":
                assert data is not None
                region = self._index(at, start, length, digest, text, data[1], data[2])
                self._regions(at, summary, region)
                data = None
            else:
                payload = self.read(start, length)
                if blake3(payload).digest() != digest:
                    self.bad(at + 56, "the digest is not that of the payload")
                if known:
                    self._payload(start, kind, payload, summary)
            after = _up(start + length, 16)
            self.zeros(start + length, after, "padding")
            seal.update(raw)
            at, count = after, count + 1

    def _header(
        self, at: int, kind: bytes, version: int, flags: int, alignment: int, zero: int, name: bytes, tail: bytes
    ) -> bool:
        """Each field by itself. True for a known kind and version."""
        if not all(0x20 <= byte <= 0x7E for byte in kind):
            self.bad(at, "the kind is not printable ASCII")
        if flags & ~1:
            self.bad(at + 6, "reserved flags are set")
        if zero or any(tail):
            self.bad(at + 12, "reserved bytes of the chunk header are not zero")
        if alignment not in (16, PAGE):
            self.bad(at + 8, "the alignment is neither 16 nor 4096")
        text = name.rstrip(b"\0")
        if not re.fullmatch(rb"[a-z0-9._-]{1,32}", text) and not (kind == b"END " and not text):
            self.bad(at + 24, "the name is not 1 to 32 of a-z 0-9 . _ -")
        known = kind in KINDS and version == 1
        if not known:
            if not flags & 1 or kind in _NEVER_OPTIONAL:
                self.bad(at, "an unknown chunk that is not optional")
            return False
        _, optional, wanted, fixed = KINDS[kind]
        if flags != optional or alignment != wanted:
            self.bad(at + 6, "the flags or alignment are not those of the kind")
        if fixed is not None and text != fixed.encode():
            self.bad(at + 24, "the name is not that of the kind")
        return True

    def _end(self, at: int, start: int, payload: bytes, digest: bytes, count: int, seal: bytes) -> None:
        if blake3(payload).digest() != digest:
            self.bad(at + 56, "the digest is not that of the payload")
        said_count, said_size, said_seal = struct.unpack("<QQ32s", payload)
        if said_count != count:
            self.bad(start, "the number of chunks is another")
        if said_size != self.size or start + 48 != self.size:
            self.bad(start + 8, "the length of the file is another")
        if said_seal != seal:
            self.bad(start + 16, "the digest of the headers is another")

    def _payload(self, start: int, kind: bytes, payload: bytes, summary: Summary) -> None:
        try:
            value = _json(payload)
            if kind == b"PART":
                _part(value)
                summary.parts += 1
            elif kind == b"BASE":
                summary.parent = _base(value)
        except _RuleError as error:
            self.bad(start, str(error))

    # --- RAM

    def _index(self, at: int, start: int, length: int, digest: bytes, name: str, data: int, data_length: int) -> Region:
        if length < 32:
            self.bad(at, "the index is shorter than its head")
        head = self.read(start, 32)
        base, size, block, codec, count = struct.unpack("<QQIIQ", head)
        if not 0 < size <= MAX_REGION or size % PAGE:
            self.bad(start + 8, "the region is not whole pages, at least one")
        if block != BLOCK:
            self.bad(start + 16, "the size of a block is not 65536")
        if codec not in (0, 1):
            self.bad(start + 20, "the codec is neither 0 nor 1")
        if base % PAGE or base + size > 1 << 64:
            self.bad(start, "the base is not at a page, or the region goes past 2^64")
        if length != 32 + 40 * count or count > -(-size // BLOCK):
            self.bad(start + 24, "the number of blocks is not that of the payload")
        region = Region(name, base, size, codec, data, [])
        hashed, last, stored_total = blake3(head), -1, 0
        for offset in range(start + 32, start + length, 40 << 10):
            piece = self.read(offset, min(40 << 10, start + length - offset))
            hashed.update(piece)
            for number, stored, block_digest in struct.iter_unpack("<II32s", piece):
                if number <= last or number * BLOCK >= size:
                    self.bad(offset, f"block {number} is not above the one before, or is outside the region")
                if (codec == 0 and stored) or (codec == 1 and not 1 <= stored <= min(BLOCK, size - number * BLOCK)):
                    self.bad(offset, f"the stored length of block {number} is not one it can have")
                region.entries.append((number, stored, block_digest))
                last = number
                stored_total += stored
        if hashed.digest() != digest:
            self.bad(at + 56, "the digest is not that of the payload")
        if data_length != (size if codec == 0 else stored_total):
            self.bad(at, "the length of RAMD is not what the index says")
        self._blocks(region)
        return region

    def _regions(self, at: int, summary: Summary, region: Region) -> None:
        if summary.regions and region.base < summary.regions[-1].base + summary.regions[-1].size:
            self.bad(at, "regions overlap or are out of order")
        summary.regions.append(region)

    def _blocks(self, region: Region) -> None:
        at = region.data
        for number, stored, digest in region.entries:
            size = min(BLOCK, region.size - number * BLOCK)
            offset = at if region.codec == 1 else region.data + number * BLOCK
            data = self.read(offset, stored if region.codec == 1 else size)
            at += stored
            if len(data) < size:
                data = self._unpacked(offset, number, data, size)
            if blake3(data).digest() != digest:
                self.bad(offset, f"block {number} of {region.name} does not match its digest")
        if region.codec == 0:
            self._absent(region)

    def _unpacked(self, offset: int, number: int, data: bytes, size: int) -> bytes:
        try:
            if data[:4] == b"\x28\xb5\x2f\xfd" and zstandard.frame_content_size(data) == size:
                plain = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
                if len(plain) == size and zstandard.get_frame_parameters(data).dict_id == 0:
                    return plain
        except zstandard.ZstdError:
            pass
        self.bad(offset, f"block {number} is not one zstd frame of {size} bytes")

    def _absent(self, region: Region) -> None:
        """Blocks that are not in the index are zero. Holes of the file are zero without looking."""
        present = {number for number, _, _ in region.entries}
        for start, end in self._extents(region.data, region.data + region.size):
            for number in range((start - region.data) // BLOCK, -(-(end - region.data) // BLOCK)):
                if number not in present:
                    at = region.data + number * BLOCK
                    self.zeros(
                        at, min(at + BLOCK, region.data + region.size), f"absent block {number} of {region.name}"
                    )

    def _extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        while start < end:
            try:
                data = os.lseek(self.fd, start, os.SEEK_DATA)
                hole = os.lseek(self.fd, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    yield start, end
                return
            if data < end:
                yield data, min(hole, end)
            start = hole


def _up(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment


# --- JSON, parts and parents


class _RuleError(Exception):
    pass


def _json(payload: bytes) -> Any:
    """The value of canonical JSON."""
    text = payload.decode("latin-1")
    depth = deepest = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]|-?[0-9]+', text):
        word = token[0]
        if word in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif word in "]}":
            depth -= 1
        elif word[0] != '"' and len(word) > MAX_NUMBER_DIGITS:
            raise _RuleError("a number of more digits than any allowed has")
    if deepest > MAX_DEPTH:
        raise _RuleError(f"JSON nests deeper than {MAX_DEPTH}")
    try:
        value = json.loads(text)
        again = _encode(value)
    except (ValueError, RecursionError):
        raise _RuleError("the payload is not JSON") from None
    if again != payload:
        raise _RuleError("the JSON is not canonical")
    return value


def _encode(value: Any) -> bytes:
    match value:
        case None | True | False:
            return {None: b"null", True: b"true", False: b"false"}[value]
        case int() if -(1 << 63) <= value < 1 << 64:
            return str(value).encode()
        case str():
            return _encode_text(value)
        case list():
            return b"[" + b",".join(map(_encode, value)) + b"]"
        case dict():
            pairs = (_encode_text(key) + b":" + _encode(value[key]) for key in sorted(value))
            return b"{" + b",".join(pairs) + b"}"
    raise _RuleError("a number that is not an integer from -(2^63) to 2^64-1")


_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _encode_text(text: str) -> bytes:
    found = []
    for character in text:
        code = ord(character)
        if character in _SHORT:
            found.append(_SHORT[character])
        elif 0x20 <= code <= 0x7E:
            found.append(character)
        elif 0xD800 <= code <= 0xDFFF:
            raise _RuleError("text has a lone surrogate")
        elif code > 0xFFFF:
            code -= 0x10000
            found.append(f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}")
        else:
            found.append(f"\\u{code:04x}")
    return ('"' + "".join(found) + '"').encode("ascii")


def _part(value: Any) -> None:
    _keys(value, {"schema", "state"}, "a part")
    schema = value["schema"]
    _keys(schema, {"name", "version", "doc", "fields"}, "a schema")
    if not isinstance(schema["name"], str) or not isinstance(schema["doc"], str):
        raise _RuleError("name or doc of the schema is not text")
    if type(schema["version"]) is not int or schema["version"] < 1:
        raise _RuleError("the version of the schema is not an integer from 1")
    _struct(schema["fields"])(value["state"])


Check = Callable[[Any], None]


def _struct(fields: Any) -> Check:
    if not isinstance(fields, list):
        raise _RuleError("fields are not a list")
    checks: dict[str, Check] = {}
    for one in fields:
        _keys(one, {"name", "type", "doc"}, "a field")
        if not isinstance(one["name"], str) or not isinstance(one["doc"], str) or one["name"] in checks:
            raise _RuleError("name or doc of a field is not text, or the name is there twice")
        checks[one["name"]] = _type(one["type"])

    def check(value: Any) -> None:
        _keys(value, set(checks), "the state")
        for name, of_type in checks.items():
            of_type(value[name])

    return check


def _type(description: Any) -> Check:
    """What checks a value of the type. Raises for what describes none."""
    if isinstance(description, str):
        if description == "bool":
            return _must(lambda v: type(v) is bool, description)
        if description == "i64":
            return _integer(-(1 << 63), (1 << 63) - 1)
        width = re.fullmatch("u([1-9][0-9]?)", description)
        if width and int(width[1]) <= 64:
            return _integer(0, (1 << int(width[1])) - 1)
    if isinstance(description, dict):
        keys = set(description)
        if keys == {"range"}:
            limits = description["range"]
            pair = isinstance(limits, list) and len(limits) == 2 and all(type(n) is int for n in limits)
            if pair and limits[0] <= limits[1]:
                return _integer(*limits)
        elif keys == {"one_of"}:
            words = description["one_of"]
            if isinstance(words, list) and all(isinstance(word, str) for word in words):
                return _must(lambda v: isinstance(v, str) and v in words, "one of")
        elif keys == {"text_max"} and _size(description["text_max"]):
            most = description["text_max"]
            return _must(lambda v: isinstance(v, str) and len(v) <= most and v.isprintable(), "text")
        elif keys in ({"bytes"}, {"bytes_max"}) and _size(most := next(iter(description.values()))):
            least = most if keys == {"bytes"} else 0
            return _must(lambda v: _is_hex(v, least, most), "bytes")
        elif keys in ({"list", "count"}, {"list", "max"}) and _size(
            most := description.get("count", description.get("max"))
        ):
            return _list(_type(description["list"]), most if "count" in keys else 0, most)
        elif keys == {"optional"}:
            inner = _type(description["optional"])
            return lambda v: None if v is None else inner(v)
        elif keys == {"struct"}:
            return _struct(description["struct"])
    raise _RuleError(f"an unknown type {json.dumps(description)[:80]}")


def _must(holds: Callable[[Any], bool], what: str) -> Check:
    def check(value: Any) -> None:
        if not holds(value):
            raise _RuleError(f"{json.dumps(value)[:80]} is not of its type ({what})")

    return check


def _integer(low: int, high: int) -> Check:
    return _must(lambda v: type(v) is int and low <= v <= high, f"{low}..{high}")


def _list(item: Check, least: int, most: int) -> Check:
    def check(value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise _RuleError(f"not a list of {least}..{most}")
        for one in value:
            item(one)

    return check


def _is_hex(value: Any, least: int, most: int) -> bool:
    if not isinstance(value, str) or len(value) % 2 or not 2 * least <= len(value) <= 2 * most:
        return False
    return re.fullmatch("[0-9a-f]*", value) is not None


def _size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _keys(value: Any, wanted: set[str], what: str) -> None:
    if not isinstance(value, dict) or set(value) != wanted:
        raise _RuleError(f"{what} is not an object of exactly {', '.join(sorted(wanted)) or 'nothing'}"[:200])


def _base(value: Any) -> tuple[bytes, str]:
    _keys(value, {"digest", "file"}, "BASE")
    digest, name = value["digest"], value["file"]
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise _RuleError("digest is not 64 lower-case hex digits")
    if not isinstance(name, str) or not re.fullmatch("[ -~]{1,255}", name) or "/" in name or name in (".", ".."):
        raise _RuleError("file is not the name of a file")
    return bytes.fromhex(digest), name


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m snapshot.verify FILE", file=sys.stderr)
        return 2
    try:
        print(f"{arguments[0]}: good, {verify(Path(arguments[0]))}")
        return 0
    except BadError as error:
        print(f"{arguments[0]}: bad: {error}", file=sys.stderr)
        return 1
    except CannotTellError as error:
        print(f"{arguments[0]}: cannot tell: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{arguments[0]}: cannot tell: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
