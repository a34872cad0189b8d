"""Write a snapshot: all of it or nothing.

    with Writer(path) as writer:
        writer.part("config", config)
        writer.ram("ram.0", 0, memory, None)    # the machine may run on after the last ram()
        writer.commit()                         # digests, index, END, fsync, rename, fsync of the folder

Rules
* The file appears under its name only when it is complete and on disk; until then it is a temporary in the same
  folder without even a magic. Leaving the block without commit(), by an exception or not, removes the temporary.
* ram() only finds and writes the blocks that are not zero. They are hashed in commit(), out of the file, when the
  machine no longer waits. The file is read, not mapped: a disk error is then an OSError and not a SIGBUS.
* A fork of this process may finish the file: the child calls ram() and commit(), the parent asks in_place() when the
  child has ended, and leaves the block, which removes what is not in place.
* What may be replaced, and that a name has one writer, is the affair of snapshot.target.
* Parts first, "config" before all others; then RAM in order of base; then optional chunks.
* What does not fit the format is SnapshotError; what the host refuses is OSError; calls out of order are our fault.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import zstandard
from blake3 import blake3

from snapshot import canon
from snapshot.container import (
    BASE,
    BLOCK,
    CHUNK_ALIGN,
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
    META,
    MINOR,
    NAMES,
    NO_DIGEST,
    OPTIONAL,
    OPTIONAL_RANK,
    PAGE,
    PART,
    RAMD,
    RAMI,
    Chunk,
    Extra,
    Parent,
    Part,
    align,
    good_name,
)
from snapshot.errors import SnapshotError
from snapshot.field_types import Json
from snapshot.pages import present_extents
from snapshot.schema import encode, schema_of
from snapshot.target import Target

_ZEROS = bytes(BLOCK)
_PACK = zstandard.ZstdCompressor(level=3)
_COPY = 1 << 20
_PIECE = 8 << 20  # written at a time, so that progress can be told
_HASH_BLOCKS = 16  # read at a time when hashing


@dataclass
class _Image:
    """A region whose blocks are written and whose index is still to come."""

    data: Chunk
    index: int  # of its RAMI in Writer._chunks
    base: int
    size: int
    codec: int
    blocks: list[int]
    known: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # stored length, digest; where already worked out


class Writer:
    """Builds one snapshot file and puts it in place with commit(). `progress` is called with the number of bytes of RAM
    just written or hashed."""

    def __init__(
        self,
        path: Path,
        *,
        minor: int = MINOR,
        progress: Callable[[int], None] = lambda _: None,
        force: bool = False,
    ) -> None:
        """`force` replaces what snapshot.target says. Raises Refused, OSError."""
        self.progress = progress
        self._minor = minor
        self._chunks: list[Chunk] = []
        self._names: set[tuple[bytes, str]] = set()
        self._images: list[_Image] = []
        self._end = FILE_HEADER.size
        self._json_total = 0
        self._open = True
        self._target = Target(path, force=force)
        self._fd = self._target.fd

    def part(self, name: str, value: object) -> None:
        """Write a @state value with its schema."""
        self.raw_part(name, schema_of(type(value)).describe(), encode(value))

    def raw_part(self, name: str, schema: Json, state: Json) -> None:
        """Write a part as it was read."""
        value: Json = {"schema": schema, "state": state}
        Part.from_json(name, value)
        self._write_chunk(PART, name, canon.encode(value))

    def base(self, parent: Parent) -> None:
        """The RAM that follows is a difference to this snapshot's."""
        self._write_chunk(BASE, NAMES[BASE], canon.encode(parent.to_json()))

    def ram(
        self,
        name: str,
        base: int,
        memory: memoryview,
        present: Iterable[tuple[int, int]] | None,
        *,
        packed: bool = False,
        parent: Mapping[int, bytes] | None = None,
    ) -> None:
        """Write the RAM region at guest physical `base`.

        `present` is every byte extent of it that may be non-zero, in any order; None is all of it, which reads, and so
        may make the kernel allocate, every page: give extents where they are known (snapshot.pages). `packed` packs
        each block with zstd. `parent` has the digests of the parent's blocks: only those that differ are written.
        """
        if memory.format != "B" or memory.ndim != 1:
            memory = memory.cast("B")
        size = memory.nbytes
        self._check_region(base, size)
        blocks = list(_nonzero_blocks(memory, [(0, size)] if present is None else present))
        nonzero, known = set(blocks), {}
        if parent is not None:
            digests = {n: blake3(memory[n * BLOCK : (n + 1) * BLOCK]).digest() for n in sorted(nonzero | set(parent))}
            zeros = {n: blake3(_ZEROS[: min(BLOCK, size - n * BLOCK)]).digest() for n in nonzero - set(parent)}
            blocks = [n for n in digests if digests[n] != (parent[n] if n in parent else zeros[n])]
            known = {n: (0, digests[n]) for n in blocks}
        place = align(self._end + CHUNK_HEADER.size, PAGE)
        length, digest = size, NO_DIGEST
        if packed:
            length, hashed = 0, blake3()
            for number in blocks:
                block = memory[number * BLOCK : (number + 1) * BLOCK]
                stored = _PACK.compress(block)
                stored = stored if len(stored) < len(block) else bytes(block)
                self._pwrite(stored, place + length)
                hashed.update(stored)
                known[number] = len(stored), blake3(block).digest()
                length += len(stored)
                self.progress(len(block))
            digest = hashed.digest()
        else:
            for first, stop in _runs([number for number in blocks if number in nonzero]):
                for at in range(first * BLOCK, min(stop * BLOCK, size), _PIECE):
                    piece = memory[at : min(at + _PIECE, stop * BLOCK, size)]
                    self._pwrite(piece, place + at)
                    self.progress(len(piece))
        data = self._add(RAMD, name, length, digest)
        self._pwrite(data.pack(), data.offset)
        codec = CODEC_ZSTD if packed else CODEC_RAW
        self._images.append(_Image(data, len(self._chunks), base, size, codec, blocks, known))
        self._add(RAMI, name, INDEX.size + ENTRY.size * len(blocks))

    def stored_ram(
        self, name: str, base: int, size: int, packed: bool, entries: list[tuple[int, int, bytes]], fd: int, offset: int
    ) -> None:
        """Write a region as it is stored at `offset` of another file: `entries` are (number, stored length, digest)."""
        self._check_region(base, size)
        length = sum(stored for _, stored, _ in entries) if packed else size
        place, hashed = align(self._end + CHUNK_HEADER.size, PAGE), blake3()
        for start, end in [(0, length)] if packed else present_extents(fd, length, offset):
            for at in range(start, end, _COPY):
                piece = os.pread(fd, min(_COPY, end - at), offset + at)
                hashed.update(piece)
                self._pwrite(piece, place + at)
        data = self._add(RAMD, name, length, hashed.digest() if packed else NO_DIGEST)
        self._pwrite(data.pack(), data.offset)
        known = {number: (stored, digest) for number, stored, digest in entries}
        codec = CODEC_ZSTD if packed else CODEC_RAW
        self._images.append(_Image(data, len(self._chunks), base, size, codec, list(known), known))
        self._add(RAMI, name, INDEX.size + ENTRY.size * len(known))

    def _check_region(self, base: int, size: int) -> None:
        assert base % PAGE == 0 and size % PAGE == 0, "RAM in whole pages"
        assert 0 < size <= MAX_REGION and base + size <= 1 << 64, f"RAM of {size} bytes at {base:#x}"
        assert not self._images or base >= self._images[-1].base + self._images[-1].size, "RAM in order of base"

    def meta(self, value: Json) -> None:
        """Write free information for people, which a restore does not look at."""
        self._write_chunk(META, NAMES[META], canon.encode(value), flags=OPTIONAL)

    def extra(self, extra: Extra) -> None:
        """Write an optional chunk as it was read."""
        assert extra.kind not in KINDS
        self._write_chunk(extra.kind, extra.name, extra.payload, extra.version, OPTIONAL, extra.alignment)

    def commit(self, check: Callable[[Path], None] = lambda _: None) -> None:
        """Complete the file, put it on disk and give it its name, unless `check`, given a path to the whole file before
        that, raises."""
        assert self._open and self._chunks, "nothing to commit"
        for image in self._images:
            self._write_index(image)
        header = FILE_HEADER.pack(MAGIC, MAJOR, self._minor, b"")
        seal = blake3(header)
        for chunk in self._chunks:
            seal.update(chunk.pack())
        count, offset = len(self._chunks), self._end
        end = Chunk(offset, END, KINDS[END].version, 0, CHUNK_ALIGN, END_PAYLOAD.size, "")
        payload = END_PAYLOAD.pack(count, end.end, seal.digest())
        self._write_payload(replace(end, digest=blake3(payload).digest()), payload)
        self._pwrite(header, 0)
        check(Path(f"/proc/self/fd/{self._fd}"))
        self._target.put()
        self._leave()

    @property
    def path(self) -> Path:
        return self._target.path

    @property
    def in_place(self) -> bool:
        """Whether the file has its name: also when another process, a fork of this one, gave it that."""
        return self._target.in_place

    def fileno(self) -> int:
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._open:
            self._leave()

    def _leave(self) -> None:
        self._open = False
        self._target.leave()

    def _write_chunk(
        self, kind: bytes, name: str, payload: bytes, version: int = 1, flags: int = 0, alignment: int = CHUNK_ALIGN
    ) -> None:
        self._json_total += len(payload)
        if len(payload) > MAX_JSON or self._json_total > MAX_JSON_TOTAL:
            raise SnapshotError(f"{kind.decode()} {name}: more than {MAX_JSON} bytes, or {MAX_JSON_TOTAL} in all")
        chunk = self._add(kind, name, len(payload), blake3(payload).digest(), version, flags, alignment)
        self._write_payload(chunk, payload)

    def _add(
        self,
        kind: bytes,
        name: str,
        length: int,
        digest: bytes = NO_DIGEST,
        version: int = 1,
        flags: int = 0,
        alignment: int = 0,
    ) -> Chunk:
        """The next chunk's header and its place, not written yet."""
        assert self._open and good_name(name), f"bad chunk name {name!r}"
        assert self._chunks or (kind, name) == (PART, FIRST_PART), f"the first part is {FIRST_PART}"
        assert (kind, name) not in self._names, f"two {kind!r} chunks named {name}"
        assert not self._chunks or _rank(self._chunks[-1].kind) <= _rank(kind), f"{kind!r} out of order"
        if len(self._chunks) == MAX_CHUNKS:
            raise SnapshotError(f"more than {MAX_CHUNKS} chunks")
        chunk = Chunk(self._end, kind, version, flags, alignment or KINDS[kind].alignment, length, name, digest)
        self._chunks.append(chunk)
        self._names.add((kind, name))
        self._end = chunk.next
        return chunk

    def _write_payload(self, chunk: Chunk, payload: bytes) -> None:
        gap = bytes(chunk.payload - chunk.offset - len(chunk.pack()))
        self._pwrite(chunk.pack() + gap + payload, chunk.offset)

    def _write_index(self, image: _Image) -> None:
        known = image.known or self._hash(image)
        entries = [INDEX.pack(image.base, image.size, BLOCK, image.codec, len(image.blocks))]
        entries += [ENTRY.pack(number, *known[number]) for number in image.blocks]
        payload = b"".join(entries)
        chunk = replace(self._chunks[image.index], digest=blake3(payload).digest())
        self._chunks[image.index] = chunk
        self._pwrite(chunk.pack() + payload, chunk.offset)

    def _hash(self, image: _Image) -> dict[int, tuple[int, bytes]]:
        """Stored length (none: raw) and digest of each block, out of the file."""
        buffer = bytearray(_HASH_BLOCKS * BLOCK)
        view = memoryview(buffer)
        known = {}
        for first, stop in _runs(image.blocks):
            for number in range(first, stop, _HASH_BLOCKS):
                start = number * BLOCK
                end = min(start + len(buffer), stop * BLOCK, image.size)
                if os.preadv(self._fd, [view[: end - start]], image.data.payload + start) != end - start:
                    raise OSError(errno.EIO, "short read of what was just written", str(self.path))
                self.progress(end - start)
                for at in range(0, end - start, BLOCK):
                    known[number + at // BLOCK] = 0, blake3(view[at : min(at + BLOCK, end - start)]).digest()
        return known

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written


def _rank(kind: bytes) -> int:
    return KINDS[kind].rank if kind in KINDS else OPTIONAL_RANK


def _nonzero_blocks(memory: memoryview, extents: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Numbers, ascending, of the blocks that an extent touches and that are not all zero."""
    following = 0
    for start, end in sorted(extents):
        assert 0 <= start <= end <= memory.nbytes, "extent outside the region"
        for number in range(max(start // BLOCK, following), -(-end // BLOCK)):
            following = number + 1
            # startswith() is a memcmp on the view: no copy, and it stops at the first difference
            if not _ZEROS.startswith(memory[number * BLOCK : following * BLOCK]):
                yield number


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Half-open runs of consecutive numbers."""
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[first], numbers[i - 1] + 1
            first = i
