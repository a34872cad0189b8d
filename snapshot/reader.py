"""Read a snapshot that nobody vouches for.

Rules
* A Reader that opened has checked everything but the contents of RAM: every header, reserved bit, padding byte,
  order, size and digest, and that each part is canonical JSON whose schema names exactly its fields.
* RAM is checked by verify_ram(), or not at all: it is the guest's own affair.
* Sizes are bounded before anything of that size is read or mapped.
* Every fault of the file is SnapshotError: one line with the offset, the chunk and the rule. A host that will not
  open or read the file is OSError.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import zstandard
from blake3 import blake3

from snapshot import canon
from snapshot.container import (
    BASE,
    BLOCK,
    CHUNK_HEADER,
    CODEC_RAW,
    CODEC_ZSTD,
    END,
    END_PAYLOAD,
    ENTRY,
    FILE_HEADER,
    FIRST_PART,
    INDEX,
    KINDS,
    MAGIC,
    MAJOR,
    MAX_CHUNKS,
    MAX_JSON,
    MAX_JSON_TOTAL,
    MAX_REGION,
    NAMES,
    NO_DIGEST,
    OPTIONAL_RANK,
    PAGE,
    PART,
    RAMD,
    RAMI,
    Chunk,
    Extra,
    Parent,
    Part,
)
from snapshot.errors import SnapshotError, check_path
from snapshot.field_types import Json
from snapshot.mapped import FileMemory, stamp
from snapshot.pages import present_extents
from snapshot.schema import schema_of, without_docs
from snapshot.versions import decode, find

__all__ = ["Part", "RamImage", "Reader", "decode_part"]

_ENTRIES = 16384  # of an index, read at a time
_UNPACK = zstandard.ZstdDecompressor()


@dataclass(frozen=True)
class RamImage:
    """One RAM region in the file; `blocks` has the digest of each present block by its number, `places` where it lies
    (offset in the payload, stored length) when the region is packed."""

    name: str
    base: int
    size: int
    file_offset: int
    blocks: Mapping[int, bytes]
    places: Mapping[int, tuple[int, int]] | None = None
    stored_digest: bytes = NO_DIGEST  # of the packed region as it is stored

    def span(self, number: int) -> tuple[int, int]:
        """(start, end) of a block in the region."""
        return number * BLOCK, min((number + 1) * BLOCK, self.size)


def block_of(stored: bytes, size: int, where: str) -> bytes:
    """A block of `size` bytes, from how it is stored in a packed region. Raises SnapshotError."""
    if len(stored) == size:
        return stored
    try:
        if zstandard.frame_content_size(stored) != size:  # asked before that much is made room for
            raise SnapshotError(f"{where} is not a zstd frame of {size} bytes")
        return _UNPACK.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError:
        raise SnapshotError(f"{where} is not one whole zstd frame") from None


class Reader:
    """An opened snapshot, wholly checked but for the contents of RAM."""

    identity: bytes
    minor: int
    parts: dict[str, Part]
    parent: Parent | None  # whose RAM this one's blocks replace
    rams: tuple[RamImage, ...]
    meta: Json
    extras: tuple[Extra, ...]  # optional chunks this program does not know, for a rewrite
    meta_at: int  # how many of them come before META

    def __init__(self, path: Path, *, max_ram: int = 1 << 40) -> None:
        check_path(path)
        self._path = Path(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # non-blocking: it may be a FIFO
        try:
            self._load(max_ram)
        except BaseException:
            self.close()
            raise

    def map_ram(self, image: RamImage) -> FileMemory:
        """A raw region as private memory: pages come in when touched, writes never reach the file. Outlives close().
        Its `check` tells when the file was changed since it was opened. Raises SnapshotError, OSError."""
        assert image.places is None, "a packed region cannot be mapped"
        still = functools.partial(_check_still, self.identity)
        try:
            return FileMemory(self._fd, image.file_offset, image.size, self._path, self._stamp, still)
        except ValueError:  # Python's mmap looks at the file's size
            self._fault(f"offset {image.file_offset:#x}, RAMD {image.name}", "the file is cut")

    def entries(self, image: RamImage) -> list[tuple[int, int, bytes]]:
        """(number, stored length or 0 when raw, digest) of each present block."""
        places = image.places or {}
        return [(number, places.get(number, (0, 0))[1], digest) for number, digest in image.blocks.items()]

    def fileno(self) -> int:
        return self._fd

    def block(self, image: RamImage, number: int) -> bytes:
        """The bytes of a present block, as stored: not compared with its digest. Raises SnapshotError."""
        start, end = image.span(number)
        offset, length = image.places[number] if image.places is not None else (start, end - start)
        data = self._read(image.file_offset + offset, length, f"RAMD {image.name}")
        where = f"offset {image.file_offset + offset:#x}, RAMD {image.name}"
        return block_of(data, end - start, f"{where}: block {number}")

    def verify_ram(self) -> None:
        """Check every block of every region against its digest, and the blocks without one to be zero."""
        for _ in self.verify_blocks():
            pass

    def verify_blocks(self) -> Iterator[None]:
        """The same, a block at a time."""
        for image in self.rams:
            stored = blake3()
            for number in _blocks_with_data(self._fd, image):
                start, end = image.span(number)
                want = image.blocks.get(number)
                where = f"offset {image.file_offset + start:#x}, RAMD {image.name}"
                if want is not None:
                    if image.places is not None:
                        offset, length = image.places[number]
                        stored.update(self._read(image.file_offset + offset, length, where))
                    wrong = blake3(self.block(image, number)).digest() != want
                    rule = "does not match its digest"
                else:
                    wrong = any(self._read(image.file_offset + start, end - start, where))
                    rule = "is absent and must be zero"
                if wrong:
                    self._fault(where, f"block {number} at address {image.base + start:#x} {rule}")
                yield
            if image.places is not None and stored.digest() != image.stored_digest:
                self._fault(
                    f"offset {image.file_offset:#x}, RAMD {image.name}", "the payload does not match its digest"
                )

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _fault(self, where: object, rule: str) -> NoReturn:
        raise SnapshotError(f"{where}: {rule}")

    def _read(self, offset: int, length: int, what: object) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            self._fault(what, f"the file is cut: {length} bytes at {offset:#x} go past its end")
        return data

    def _load(self, max_ram: int) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self._fault("offset 0x0", "not a regular file")
        self._size = status.st_size
        self._stamp = stamp(self._fd)
        chunks = self._load_structure()
        parts: dict[str, Part] = {}
        rams: list[RamImage] = []
        total = 0  # bytes of RAM
        extras: list[Extra] = []
        self.meta = self.parent = None
        self.meta_at = 0
        for chunk in chunks:
            if chunk.kind == RAMD:
                data = chunk
            elif chunk.kind == RAMI:
                rams.append(self._load_index(data, chunk, rams[-1] if rams else None))
                if (total := total + rams[-1].size) > max_ram:
                    self._fault(chunk, f"RAM of {rams[-1].size} bytes and before is over the limit of {max_ram}")
            else:
                payload = self._read(chunk.payload, chunk.length, chunk)
                if blake3(payload).digest() != chunk.digest:
                    self._fault(chunk, "the payload does not match its digest")
                if not chunk.known:
                    extras.append(Extra(chunk.kind, chunk.version, chunk.name, chunk.alignment, payload))
                    continue
                try:
                    value = canon.decode(payload)
                    if chunk.kind == PART:
                        parts[chunk.name] = Part.from_json(chunk.name, value)
                    elif chunk.kind == BASE:
                        self.parent = Parent.from_json(value)
                    else:
                        self.meta, self.meta_at = value, len(extras)
                except SnapshotError as error:
                    self._fault(chunk, str(error))
        self.parts, self.rams, self.extras = parts, tuple(rams), tuple(extras)

    def _load_structure(self) -> list[Chunk]:
        """Every chunk before END, all headers, padding, order and sizes checked. Reads no payload but END's."""
        if not MAGIC.startswith(os.pread(self._fd, len(MAGIC), 0)):
            self._fault("offset 0x0, file header", "not an anyhyve snapshot (bad magic)")
        header = self._read(0, FILE_HEADER.size, "offset 0x0, file header")
        magic, major, self.minor, reserved = FILE_HEADER.unpack(header)
        if magic != MAGIC:
            self._fault("offset 0x0, file header", "not an anyhyve snapshot (bad magic)")
        if major != MAJOR:
            self._fault("offset 0xc, file header", f"format major version {major} is not {MAJOR}")
        if any(reserved):
            self._fault("offset 0x10, file header", "reserved bytes are not zero")
        seal = blake3(header)
        chunks: list[Chunk] = []
        names: set[tuple[bytes, str]] = set()
        json_total = 0
        offset = FILE_HEADER.size
        while True:
            raw = self._read(offset, CHUNK_HEADER.size, f"offset {offset:#x}, chunk header")
            chunk = Chunk.unpack(offset, raw)
            self._check_order(chunks[-1] if chunks else None, chunk)
            self._check_zero(offset + CHUNK_HEADER.size, chunk.payload, chunk)
            if chunk.kind == END:
                break
            if len(chunks) == MAX_CHUNKS:
                self._fault(chunk, f"more than {MAX_CHUNKS} chunks")
            if (chunk.kind, chunk.name) in names:
                self._fault(chunk, "a second chunk of this kind and name")
            if chunk.kind == RAMD:
                if chunk.length > MAX_REGION:
                    self._fault(chunk, f"{chunk.length} bytes are over {MAX_REGION}")
            elif chunk.kind == RAMI:
                if chunk.length > INDEX.size + ENTRY.size * (MAX_REGION // BLOCK):
                    self._fault(chunk, "the index is longer than the largest region has blocks")
            else:
                json_total += chunk.length
                if chunk.length > MAX_JSON or json_total > MAX_JSON_TOTAL:
                    self._fault(chunk, f"{chunk.length} bytes are over {MAX_JSON}, or over {MAX_JSON_TOTAL} in all")
            if chunk.end > self._size:
                self._fault(chunk, f"the file is cut: {chunk.length} bytes at {chunk.payload:#x} go past its end")
            self._check_zero(chunk.end, chunk.next, chunk)
            names.add((chunk.kind, chunk.name))
            chunks.append(chunk)
            seal.update(raw)
            offset = chunk.next
        self._check_end(chunk, len(chunks), seal.digest())
        return chunks

    def _check_order(self, before: Chunk | None, chunk: Chunk) -> None:
        if chunk.known and chunk.name != NAMES.get(chunk.kind, chunk.name):
            self._fault(chunk, f"the name is not {NAMES[chunk.kind]}")
        if before is None:
            if (chunk.kind, chunk.name) != (PART, FIRST_PART):
                self._fault(chunk, f"the first chunk is not PART {FIRST_PART}")
            return
        if (before.kind == RAMD) != (chunk.kind == RAMI) or (chunk.kind == RAMI and chunk.name != before.name):
            self._fault(chunk, "RAMD is not followed by the RAMI of its name, or RAMI has no RAMD")
        if _rank(chunk) < _rank(before):
            self._fault(chunk, f"out of order after {before.kind.decode('ascii')}")

    def _check_zero(self, start: int, end: int, chunk: Chunk) -> None:
        if any(self._read(start, end - start, chunk)):
            self._fault(chunk, f"padding at {start:#x}..{end:#x} is not zero")

    def _check_end(self, chunk: Chunk, count: int, seal: bytes) -> None:
        if chunk.length != END_PAYLOAD.size:
            self._fault(chunk, f"length {chunk.length} is not {END_PAYLOAD.size}")
        payload = self._read(chunk.payload, chunk.length, chunk)
        if blake3(payload).digest() != chunk.digest:
            self._fault(chunk, "the payload does not match its digest")
        said_count, said_size, said_seal = END_PAYLOAD.unpack(payload)
        if said_count != count:
            self._fault(chunk, f"it counts {said_count} chunks, there are {count}")
        if not said_size == chunk.end == self._size:
            self._fault(chunk, f"the file is {self._size} bytes, END says {said_size} and ends at {chunk.end}")
        if said_seal != seal:
            self._fault(chunk, "the headers do not match their digest")
        self.identity = seal

    def _load_index(self, data: Chunk, chunk: Chunk, below: RamImage | None) -> RamImage:
        if chunk.length < INDEX.size:
            self._fault(chunk, f"{chunk.length} bytes are no index")
        head = self._read(chunk.payload, INDEX.size, chunk)
        base, size, block, codec, count = INDEX.unpack(head)
        if not 0 < size <= MAX_REGION or size % PAGE:
            self._fault(chunk, f"RAM region of {size} bytes is not whole pages up to {MAX_REGION}")
        if codec == CODEC_RAW and size != data.length:
            self._fault(chunk, f"it says {size} bytes of RAM, RAMD has {data.length}")
        if codec == CODEC_RAW and data.digest != NO_DIGEST:
            self._fault(data, "raw RAM data has a digest in its header")
        if block != BLOCK or codec not in (CODEC_RAW, CODEC_ZSTD):
            self._fault(chunk, f"block size {block} or codec {codec} is not {BLOCK} or known")
        if chunk.length != INDEX.size + ENTRY.size * count:
            self._fault(chunk, f"{chunk.length} bytes are not an index of {count} blocks")
        if count > -(-size // BLOCK):
            self._fault(chunk, f"an index of {count} blocks is longer than the region has blocks")
        if base % PAGE or base + size > 1 << 64:
            self._fault(chunk, f"RAM at {base:#x} of {size} bytes is not on a page or goes past 2^64")
        if below is not None and base < below.base + below.size:
            self._fault(chunk, f"RAM at {base:#x} is below the end of {below.name}")
        digest = blake3(head)
        blocks: dict[int, bytes] = {}
        places: dict[int, tuple[int, int]] = {}
        last, at = -1, 0
        for start in range(chunk.payload + INDEX.size, chunk.end, _ENTRIES * ENTRY.size):
            entries = self._read(start, min(_ENTRIES * ENTRY.size, chunk.end - start), chunk)
            digest.update(entries)
            for number, stored, block_digest in ENTRY.iter_unpack(entries):
                if number <= last or number * BLOCK >= size:
                    self._fault(chunk, f"block {number} is not above {last}, or past the region")
                if codec == CODEC_RAW:
                    if stored:
                        self._fault(chunk, f"reserved bytes of block {number} are not zero")
                elif not 0 < stored <= min(BLOCK, size - number * BLOCK):
                    self._fault(chunk, f"block {number} is stored in {stored} bytes")
                else:
                    places[number] = at, stored
                    at += stored
                blocks[number] = block_digest
                last = number
        if digest.digest() != chunk.digest:
            self._fault(chunk, "the payload does not match its digest")
        if codec == CODEC_ZSTD and at != data.length:
            self._fault(chunk, f"its blocks are {at} bytes, RAMD has {data.length}")
        if codec == CODEC_RAW:
            return RamImage(data.name, base, size, data.payload, blocks)
        return RamImage(data.name, base, size, data.payload, blocks, places, data.digest)


def _check_still(identity: bytes, path: Path) -> None:
    """Raises SnapshotError unless the snapshot of that identity lies at `path`, whole."""
    with Reader(path) as reader:
        if reader.identity != identity:
            raise SnapshotError("it is another snapshot now")
        reader.verify_ram()


def decode_part(part: Part, want: type) -> Any:
    """The state `want` in `part`, upgraded if it is older.

    The schema in the file must be the one this program has for that name and version, so that two programs which
    gave one version two meanings find out. Doc lines may differ: correcting one must not orphan old files.
    """
    name, version = part.schema["name"], part.schema["version"]
    assert isinstance(name, str) and isinstance(version, int)  # Part.from_json has seen to it
    cls = find(name, version)
    try:
        if cls is not None and (how := _first_difference(_fields(cls), part.schema["fields"])):
            raise SnapshotError(f"{name} version {version}: {how} in this program")
        return decode(name, version, part.state, want)
    except SnapshotError as error:
        raise SnapshotError(f"part {part.name}: {error}") from None


@functools.cache
def _fields(cls: type) -> list[Json]:
    """The fields of a state of ours, as a file has them."""
    return schema_of(cls).describe_fields()


def _first_difference(ours: list[Any], theirs: Any) -> str | None:
    """How ours differ from the file's, in words; None when they do not."""
    if ours == theirs:  # docs and all, as in most files
        return None
    our_names, their_names = ([field["name"] for field in fields] for fields in (ours, theirs))
    for name in their_names:
        if name not in our_names:
            return f"there is no field {name}"
    for name in our_names:
        if name not in their_names:
            return f"there is one field more, {name},"
    for our, their in zip(ours, theirs, strict=True):
        if without_docs(our) != without_docs(their):
            return f"field {their['name']} is declared otherwise"
    return None


def _rank(chunk: Chunk) -> int:
    return KINDS[chunk.kind].rank if chunk.kind in KINDS else OPTIONAL_RANK


def _blocks_with_data(fd: int, image: RamImage) -> Iterator[int]:
    """Blocks the index names or the file does not leave as holes; a hole reads as zeros."""
    numbers = set(image.blocks)
    if image.places is not None:
        return iter(sorted(numbers))
    for start, end in present_extents(fd, image.size, image.file_offset):
        numbers.update(range(start // BLOCK, -(-end // BLOCK)))
    return iter(sorted(numbers))
