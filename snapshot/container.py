"""The layout of a snapshot file: what the writer and the reader agree on. docs/snapshot-format.md is the norm.

    file header | chunk | chunk | ... | END

Little-endian throughout. A chunk is a header of 96 bytes, zero padding to the payload's alignment, the payload, and
zero padding to the next multiple of 16.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from snapshot.describe import record
from snapshot.errors import SnapshotError
from snapshot.field_types import Json

MAGIC = b"\x89ANYHYVE\r\n\x1a\n"
MAJOR, MINOR = 1, 0
FILE_HEADER = struct.Struct("<12sHH16s")  # magic, major, minor, reserved
CHUNK_HEADER = struct.Struct("<4sHHIIQ32s32s8s")  # kind .. reserved, the fields of Chunk in order
INDEX = struct.Struct("<QQIIQ")  # base, region size, block size, codec, count of present blocks
ENTRY = struct.Struct("<II32s")  # block number, stored length (0 when raw), digest
END_PAYLOAD = struct.Struct("<QQ32s")  # count of chunks before END, file length, digest of all headers before END
NO_DIGEST = bytes(32)

CHUNK_ALIGN, PAGE = 16, 4096
BLOCK = 65536
CODEC_RAW, CODEC_ZSTD = 0, 1
OPTIONAL = 1 << 0  # the only flag

MAX_CHUNKS = 4096  # before END
MAX_JSON = 1 << 20  # also of an optional chunk we do not know
MAX_JSON_TOTAL = 2 << 20  # all parts and optional chunks together
MAX_REGION = 1 << 40
MAX_CHAIN = 64  # files

PART, BASE, RAMD, RAMI, META, END = b"PART", b"BASE", b"RAMD", b"RAMI", b"META", b"END "
FIRST_PART = "config"
NAMES = {BASE: "parent", META: "meta"}  # kinds of which there is one


@dataclass(frozen=True)
class Kind:
    """What a known kind of chunk fixes; `rank` is its place in the file, which never falls."""

    rank: int
    version: int = 1
    flags: int = 0
    alignment: int = CHUNK_ALIGN


OPTIONAL_RANK = 3
KINDS = {
    PART: Kind(rank=0),
    BASE: Kind(rank=1),
    RAMD: Kind(rank=2, alignment=PAGE),
    RAMI: Kind(rank=2),
    META: Kind(rank=OPTIONAL_RANK, flags=OPTIONAL),
    END: Kind(rank=4),
}

_NAME = re.compile(r"[a-z0-9._-]{1,32}")


def align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def good_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Chunk:
    """A chunk header at `offset`."""

    offset: int
    kind: bytes
    version: int
    flags: int
    alignment: int
    length: int
    name: str
    digest: bytes = NO_DIGEST

    @property
    def payload(self) -> int:
        """Where the payload starts."""
        return align(self.offset + CHUNK_HEADER.size, self.alignment)

    @property
    def end(self) -> int:
        """Where the payload ends."""
        return self.payload + self.length

    @property
    def next(self) -> int:
        """Where the next chunk's header starts."""
        return align(self.end, CHUNK_ALIGN)

    @property
    def known(self) -> bool:
        return self.kind in KINDS and self.version == KINDS[self.kind].version

    def __str__(self) -> str:
        return f"offset {self.offset:#x}, {self.kind.decode('ascii')} {self.name}".rstrip()

    def pack(self) -> bytes:
        return CHUNK_HEADER.pack(
            self.kind,
            self.version,
            self.flags,
            self.alignment,
            0,
            self.length,
            self.name.encode("ascii"),
            self.digest,
            b"",
        )

    @classmethod
    def unpack(cls, offset: int, data: bytes) -> Chunk:
        """The header in `data`. Raises SnapshotError unless each field, by itself, is allowed."""
        kind, version, flags, alignment, zero, length, name, digest, zeros = CHUNK_HEADER.unpack(data)
        if not all(0x20 <= byte <= 0x7E for byte in kind):
            raise SnapshotError(f"offset {offset:#x}: chunk kind {kind.hex()} is not printable ASCII")
        where = f"offset {offset:#x}, {kind.decode('ascii')}".rstrip()
        if zero or any(zeros) or flags & ~OPTIONAL:
            raise SnapshotError(f"{where}: reserved bits of the chunk header are not zero")
        text = name.rstrip(b"\0").decode("latin-1")
        if not (good_name(text) or (kind == END and not text)):
            raise SnapshotError(f"{where}: the name is not 1..32 of a-z 0-9 . _ - followed by zeros")
        chunk = cls(offset, kind, version, flags, alignment, length, text, digest)
        known = KINDS.get(kind)
        if not chunk.known and not (flags and (known is None or known.flags)):
            raise SnapshotError(f"{chunk}: mandatory chunk of kind and version {version} unknown to this program")
        if chunk.known and known and (flags, alignment) != (known.flags, known.alignment):
            raise SnapshotError(f"{chunk}: flags {flags:#x} or alignment {alignment} are not those of the kind")
        if alignment not in (CHUNK_ALIGN, PAGE):
            raise SnapshotError(f"{chunk}: alignment {alignment} is neither {CHUNK_ALIGN} nor {PAGE}")
        if kind == END and text:
            raise SnapshotError(f"{chunk}: END has a name")
        return chunk


@dataclass(frozen=True)
class Part:
    """One declared state as the file has it: its schema and its fields."""

    name: str
    schema: dict[str, Json]
    state: dict[str, Json]

    @classmethod
    def from_json(cls, name: str, value: Json) -> Part:
        """The part in a PART payload. Raises SnapshotError unless the state is what the schema says."""
        if not isinstance(value, dict) or value.keys() != {"schema", "state"}:
            raise SnapshotError("not an object of exactly schema and state")
        schema, state = value["schema"], value["state"]
        if not isinstance(schema, dict) or schema.keys() != {"name", "version", "doc", "fields"}:
            raise SnapshotError("schema is not an object of exactly name, version, doc and fields")
        version, fields = schema["version"], schema["fields"]
        if type(schema["name"]) is not str or type(schema["doc"]) is not str:
            raise SnapshotError("schema name and doc are not text")
        if "\n" in schema["doc"] or "\r" in schema["doc"]:
            raise SnapshotError("schema doc is more than one line")
        if type(version) is not int or version < 1:
            raise SnapshotError("schema version is not a positive integer")
        record(fields).decode(state, name)
        assert isinstance(state, dict)
        return cls(name, schema, state)


@dataclass(frozen=True)
class Parent:
    """The snapshot a difference is to: its identity and the name of its file in the same folder."""

    digest: bytes
    file: str

    def to_json(self) -> Json:
        return {"digest": self.digest.hex(), "file": self.file}

    @classmethod
    def from_json(cls, value: Json) -> Parent:
        """Raises SnapshotError."""
        if not isinstance(value, dict) or value.keys() != {"digest", "file"}:
            raise SnapshotError("not an object of exactly digest and file")
        digest, file = value["digest"], value["file"]
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise SnapshotError("digest is not 64 lower-case hex digits")
        if not isinstance(file, str) or not re.fullmatch("[ -.0-~]{1,255}", file) or file in (".", ".."):
            raise SnapshotError("file is not the name of a file, 1 to 255 printable ASCII characters without /")
        return cls(bytes.fromhex(digest), file)


@dataclass(frozen=True)
class Extra:
    """An optional chunk this program does not know, kept to be written again."""

    kind: bytes
    version: int
    name: str
    alignment: int
    payload: bytes
