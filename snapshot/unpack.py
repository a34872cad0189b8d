"""A snapshot as a folder of text, and back, byte for byte.

    DIR/snapshot.json    the chunks in order, and how RAM is stored
    DIR/parts/NAME.json  schema and state of each part
    DIR/ram/NAME         the RAM of a region as it is stored: sparse, or packed blocks one after the other
    DIR/extra/N          optional chunks this program does not know

Digests are not written down: packing works them out, so state and RAM can be edited in between.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from blake3 import blake3

from snapshot.container import BLOCK, Extra, Parent, good_name
from snapshot.errors import SnapshotError, check_path
from snapshot.pages import present_extents
from snapshot.reader import RamImage, Reader
from snapshot.writer import Writer

_COPY = 1 << 20


def unpack(source: Path, folder: Path) -> None:
    """What is written is this user's alone. Raises SnapshotError for a bad snapshot, damaged RAM included; OSError,
    also where there is something at `folder` already."""
    check_path(folder)
    with Reader(source) as reader:
        reader.verify_ram()
        for each in (folder, *(folder / name for name in ("parts", "ram", "extra"))):
            each.mkdir(mode=0o700)
            each.chmod(0o700)
        for name, part in reader.parts.items():
            _write_json(folder / "parts" / f"{name}.json", {"schema": part.schema, "state": part.state})
        manifest: dict[str, Any] = {
            "format": [1, reader.minor],
            "parts": list(reader.parts),
            "parent": None if reader.parent is None else reader.parent.to_json(),
            "ram": [_unpack_ram(reader, image, folder / "ram" / image.name) for image in reader.rams],
            "extra": [],
            "meta_at": reader.meta_at,
        }
        for i, extra in enumerate(reader.extras):
            with _new(folder / "extra" / str(i)) as file:
                file.write(extra.payload)
            manifest["extra"].append([extra.kind.decode("ascii"), extra.version, extra.name, extra.alignment])
        if reader.meta is not None:
            _write_json(folder / "meta.json", reader.meta)
        _write_json(folder / "snapshot.json", manifest)


def _unpack_ram(reader: Reader, image: RamImage, target: Path) -> dict[str, Any]:
    entries = reader.entries(image)
    packed = image.places is not None
    length = sum(stored for _, stored, _ in entries) if packed else image.size
    with _new(target) as file:
        file.truncate(length)
        for start, end in present_extents(reader.fileno(), length, image.file_offset):
            for at in range(start, end, _COPY):
                piece = os.pread(reader.fileno(), min(_COPY, end - at), image.file_offset + at)
                os.pwrite(file.fileno(), piece, at)
    blocks = [[number, stored] for number, stored, _ in entries] if packed else [number for number, _, _ in entries]
    return {"name": image.name, "base": image.base, "size": image.size, "packed": packed, "blocks": blocks}


def pack(folder: Path, target: Path, *, force: bool = False) -> None:
    """Raises SnapshotError, naming the file, when the folder is not what unpack makes of a snapshot; OSError."""
    manifest = _read_json(folder / "snapshot.json")
    try:
        major, minor = manifest["format"]
        if major != 1 or not 0 <= minor <= 0xFFFF:
            raise ValueError("format is not 1.x")
        with Writer(target, minor=minor, force=force) as writer:
            for name in manifest["parts"]:
                _good(name)
                part = _read_json(folder / "parts" / f"{name}.json")
                writer.raw_part(name, part["schema"], part["state"])
            if manifest["parent"] is not None:
                writer.base(Parent.from_json(manifest["parent"]))
            for ram in manifest["ram"]:
                _pack_ram(folder, ram, writer)
            _pack_optional(folder, manifest, writer)
            writer.commit()
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise SnapshotError(f"{folder / 'snapshot.json'}: not what unpack writes ({error})") from None


def _pack_ram(folder: Path, ram: dict[str, Any], writer: Writer) -> None:
    _good(ram["name"])
    path = folder / "ram" / ram["name"]
    size, packed = ram["size"], ram["packed"]
    with ExitStack() as stack:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        entries = _packed_entries(fd, ram, path) if packed else _raw_entries(fd, ram, path)
        writer.stored_ram(ram["name"], ram["base"], size, packed, entries, fd, 0)


def _raw_entries(fd: int, ram: dict[str, Any], path: Path) -> list[tuple[int, int, bytes]]:
    size = ram["size"]
    if os.fstat(fd).st_size != size:
        raise SnapshotError(f"{path}: it is not {size} bytes long")
    listed = set(ram["blocks"])
    numbers = set(listed)
    for start, end in present_extents(fd, size):
        numbers.update(range(start // BLOCK, -(-end // BLOCK)))
    entries = []
    for number in sorted(numbers):
        data = os.pread(fd, min(BLOCK, size - number * BLOCK), number * BLOCK)
        if number in listed or any(data):
            entries.append((number, 0, blake3(data).digest()))
    return entries


def _packed_entries(fd: int, ram: dict[str, Any], path: Path) -> list[tuple[int, int, bytes]]:
    entries, at = [], 0
    for number, stored in ram["blocks"]:
        data = os.pread(fd, stored, at)
        at += stored
        size = min(BLOCK, ram["size"] - number * BLOCK)
        if len(data) != size:
            try:
                data = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
            except zstandard.ZstdError as error:
                raise SnapshotError(f"{path}: block {number}: {error}") from None
        if len(data) != size:
            raise SnapshotError(f"{path}: block {number} is not {size} bytes")
        entries.append((number, stored, blake3(data).digest()))
    if os.fstat(fd).st_size != at:
        raise SnapshotError(f"{path}: it is not {at} bytes long")
    return entries


def _pack_optional(folder: Path, manifest: dict[str, Any], writer: Writer) -> None:
    extras = [
        Extra(kind.encode("ascii"), version, name, alignment, (folder / "extra" / str(i)).read_bytes())
        for i, (kind, version, name, alignment) in enumerate(manifest["extra"])
    ]
    meta = folder / "meta.json"
    for i in range(len(extras) + 1):
        if i == manifest["meta_at"] and meta.exists():
            writer.meta(_read_json(meta))
        if i < len(extras):
            writer.extra(extras[i])


def _good(name: object) -> None:
    if not isinstance(name, str) or not good_name(name):
        raise ValueError(f"bad name {name!r}")


def _write_json(path: Path, value: Any) -> None:
    with _new(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def _new(path: Path) -> BinaryIO:
    """A file that was not there before, and that only this user may read, whatever the umask. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    file = os.fdopen(fd, "wb")
    os.fchmod(fd, 0o600)
    return file


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{path}: not JSON: {error}") from None
