"""Make one snapshot of another: some state changed, a chain merged into one file, RAM put on another parent.

What is not asked to change is kept to the byte, chunks this program does not know among it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from snapshot.chain import Chain
from snapshot.container import Parent, Part
from snapshot.errors import SnapshotError
from snapshot.mapped import FileMemory
from snapshot.reader import Reader
from snapshot.writer import Writer


def with_parts(source: Path, target: Path, parts: Mapping[str, Part], *, force: bool = False) -> None:
    """Copy `source`, some of its parts replaced; `target` may be `source`. Raises SnapshotError, also for a difference
    that would not lie beside what it stands on; OSError."""
    with Reader(source) as reader, Writer(target, minor=reader.minor, force=force) as writer:
        _parts(reader, writer, parts)
        if reader.parent is not None:
            stands_on(target, reader.parent)
            writer.base(reader.parent)
        for image in reader.rams:
            packed = image.places is not None
            entries = reader.entries(image)
            writer.stored_ram(image.name, image.base, image.size, packed, entries, reader.fileno(), image.file_offset)
        optional(reader, writer)
        writer.commit()


def stands_on(child: Path, parent: Parent) -> None:
    """Raises SnapshotError unless `parent` lies where the difference `child` is to be."""
    beside = child.with_name(parent.file)
    try:
        with Reader(beside) as found:
            if found.identity == parent.digest:
                return
            why = "is another snapshot"
    except (SnapshotError, OSError):
        why = "is not there"
    raise SnapshotError(f"it is a difference to {parent.file}, which {why} in the folder of {child}")


def merge(source: Path, target: Path, *, packed: bool = False, force: bool = False) -> None:
    """A snapshot that stands alone, of a chain. Raises SnapshotError, OSError."""
    _with_ram(source, target, None, packed, force)


def rebase(source: Path, parent: Path, target: Path, *, packed: bool = False, force: bool = False) -> None:
    """`source` as a difference to `parent`, which lies in the folder of `target`. Raises SnapshotError, OSError."""
    _with_ram(source, target, parent, packed, force)


def _with_ram(source: Path, target: Path, parent: Path | None, packed: bool, force: bool) -> None:
    with ExitStack() as stack:
        chain = stack.enter_context(Chain(source))
        base = None
        if parent is not None:
            layout = [(image.name, image.base, image.size) for image in chain.rams]
            base = stack.enter_context(Chain.for_child(parent, target, layout))
        leaf = chain.readers[0]
        writer = stack.enter_context(Writer(target, minor=leaf.minor, force=force))
        chain.verify_ram()  # its digests are about to be made anew: damage must not become good
        _parts(leaf, writer, {})
        if base is not None:
            writer.base(base.as_parent())
        for i, image in enumerate(chain.rams):
            known = None if base is None else base.digests(i)
            extents = [image.span(number) for number in chain.digests(i)]
            memory = chain.map_ram(i)
            try:
                writer.ram(image.name, image.base, memoryview(memory), extents, packed=packed, parent=known)
                if isinstance(memory, FileMemory):
                    memory.check()
            finally:
                with contextlib.suppress(BufferError):  # an error on its way still holds a piece, and the memory
                    memory.close()
        optional(leaf, writer)
        writer.commit()


def _parts(reader: Reader, writer: Writer, changed: Mapping[str, Part]) -> None:
    for name, part in reader.parts.items():
        part = changed.get(name, part)
        writer.raw_part(name, part.schema, part.state)


def optional(reader: Reader, writer: Writer) -> None:
    """META and unknown optional chunks, in their order."""
    for i, extra in enumerate(reader.extras):
        if i == reader.meta_at and reader.meta is not None:
            writer.meta(reader.meta)
        writer.extra(extra)
    if reader.meta_at == len(reader.extras) and reader.meta is not None:
        writer.meta(reader.meta)
