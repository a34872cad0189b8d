"""A snapshot as a folder of text, and back, byte for byte.

    DIR/snapshot.json    the chunks in order, and how RAM is stored
    DIR/parts/NAME.json  schema and state of each part
    DIR/ram/NAME         the RAM of a region as it is stored: sparse, or packed blocks one after the other
    DIR/extra/N          optional chunks this program does not know

Digests are not written down: packing works them out, so state and RAM can be edited in between. What was packed is read
back before it gets its name.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from snapshot.container import BLOCK, MAX_JSON, MAX_REGION, Extra, Parent, good_name
from snapshot.errors import SnapshotError, check_path
from snapshot.pages import present_extents
from snapshot.reader import RamImage, Reader, block_of
from snapshot.writer import Writer

_COPY = 1 << 20
_MAX_TEXT = 1 << 28  # the manifest names every block


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
    check_path(folder)
    for each in ("parts", "ram", "extra"):
        if (folder / each).is_symlink():
            raise SnapshotError(f"{folder / each}: a link, and no folder")
    manifest = _read_json(folder / "snapshot.json")
    try:
        major, minor = manifest["format"]
        if major != 1:
            raise ValueError("format is not 1.x")
        with Writer(target, minor=_number(minor, 0xFFFF), force=force) as writer:
            for name in manifest["parts"]:
                _good(name)
                part = _read_json(folder / "parts" / f"{name}.json")
                writer.raw_part(name, part["schema"], part["state"])
            if manifest["parent"] is not None:
                writer.base(Parent.from_json(manifest["parent"]))
            for ram in manifest["ram"]:
                _pack_ram(folder, ram, writer)
            _pack_optional(folder, manifest, writer)
            writer.commit(partial(_read_back, folder))
    except (LookupError, TypeError, ValueError, AssertionError, ArithmeticError, AttributeError, struct.error) as error:
        why = " ".join(f"{type(error).__name__} {error}".split())
        raise SnapshotError(f"{folder / 'snapshot.json'}: not what unpack writes ({why:.200})") from None


def _read_back(folder: Path, packed: Path) -> None:
    """Raises SnapshotError for what could not be read again: it never gets its name."""
    try:
        with Reader(packed) as reader:
            reader.verify_ram()
    except SnapshotError as error:
        why = str(error).removeprefix(f"{packed}: ")
        raise SnapshotError(f"{folder}: what it says is no snapshot: {why}") from None


def _pack_ram(folder: Path, ram: dict[str, Any], writer: Writer) -> None:
    _good(ram["name"])
    path = folder / "ram" / ram["name"]
    size, base, packed = _number(ram["size"], MAX_REGION), _number(ram["base"], (1 << 64) - 1), ram["packed"]
    with _opened(path) as file:
        fd = file.fileno()
        entries = _packed_entries(fd, ram, path) if packed else _raw_entries(fd, ram, path)
        writer.stored_ram(ram["name"], base, size, packed, entries, fd, 0)


def _raw_entries(fd: int, ram: dict[str, Any], path: Path) -> list[tuple[int, int, bytes]]:
    size = ram["size"]
    if os.fstat(fd).st_size != size:
        raise SnapshotError(f"{path}: it is not {size} bytes long")
    last = (size - 1) // BLOCK
    listed = {_number(number, last) for number in ram["blocks"]}
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
    entries, at, first, last = [], 0, 0, (ram["size"] - 1) // BLOCK
    for number, stored in ram["blocks"]:
        if _number(number, last) < first:
            raise ValueError(f"block {number} is not above the one before")
        first = number + 1
        data = os.pread(fd, _number(stored, BLOCK), at)
        at += stored
        size = min(BLOCK, ram["size"] - number * BLOCK)
        data = block_of(data, size, f"{path}: block {number}")
        entries.append((number, stored, blake3(data).digest()))
    if os.fstat(fd).st_size != at:
        raise SnapshotError(f"{path}: it is not {at} bytes long")
    return entries


def _pack_optional(folder: Path, manifest: dict[str, Any], writer: Writer) -> None:
    extras = []
    for i, (kind, version, name, alignment) in enumerate(manifest["extra"]):
        _good(name)
        payload = _read(folder / "extra" / str(i), MAX_JSON)
        extras.append(Extra(kind.encode("ascii"), _number(version, 0xFFFF), name, alignment, payload))
    meta = folder / "meta.json"
    for i in range(len(extras) + 1):
        if i == manifest["meta_at"] and os.path.lexists(meta):
            writer.meta(_read_json(meta))
        if i < len(extras):
            writer.extra(extras[i])


def _good(name: object) -> None:
    if not isinstance(name, str) or not good_name(name):
        raise ValueError(f"bad name {name!r}")


def _number(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!a:.50} is no number from 0 to {most}")
    return value


def _write_json(path: Path, value: Any) -> None:
    with _new(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def _new(path: Path) -> BinaryIO:
    """A file that was not there before, and that only this user may read, whatever the umask. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    file = os.fdopen(fd, "wb")
    os.fchmod(fd, 0o600)
    return file


def _opened(path: Path) -> BinaryIO:
    """A regular file of the folder's own. Raises SnapshotError for anything else, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SnapshotError(f"{path}: not a regular file")
    return os.fdopen(fd, "rb")


def _read(path: Path, most: int) -> bytes:
    with _opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise SnapshotError(f"{path}: more than {most} bytes")
    return data


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path, _MAX_TEXT))
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{path}: not JSON: {error}") from None
