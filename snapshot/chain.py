"""A snapshot with all it stands on: itself, its parent, the parent's parent, to one that is whole.

RAM is loaded as it stands, without a merge step: the root is mapped, and each difference puts its blocks over it.
A parent that is missing, is another or was changed is SnapshotError, by name.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from snapshot.container import BLOCK, MAX_CHAIN, Parent
from snapshot.errors import SnapshotError, check_path
from snapshot.field_types import Json
from snapshot.pages import zeros
from snapshot.reader import Part, RamImage, Reader


class Chain:
    """Opened and checked but for the contents of RAM. Parts and META are the leaf's."""

    def __init__(self, path: Path, *, max_ram: int = 1 << 40) -> None:
        """Raises SnapshotError; OSError when the host will not open or read `path` itself."""
        self.path = Path(path)
        self.readers: list[Reader] = []  # from the leaf to the root
        try:
            self.readers.append(Reader(path, max_ram=max_ram))
            folder = Path(path).parent
            while (parent := self.readers[-1].parent) is not None:
                if len(self.readers) == MAX_CHAIN:
                    raise SnapshotError(f"a chain of more than {MAX_CHAIN} snapshots")
                self.readers.append(_open_parent(folder / parent.file, max_ram))
                self._check(parent.digest, parent.file)
        except BaseException as error:
            self.close()
            if isinstance(error, SnapshotError):
                error.of(self.path)
            raise

    @classmethod
    def for_child(cls, parent: Path, child: Path, regions: list[tuple[str, int, int]]) -> Chain:
        """The chain a difference `child`, with these (name, base, size) of RAM, is to stand on. Raises SnapshotError,
        naming why it cannot; OSError where that cannot be told of `child`."""
        check_path(child)
        try:
            chain = cls(parent)
        except OSError as error:
            raise SnapshotError(f"parent {parent}: {error.strerror or error}") from None
        except SnapshotError as error:
            raise SnapshotError(f"parent {parent}: {error}") from None
        try:
            if len(chain.readers) == MAX_CHAIN:
                raise SnapshotError(f"parent {parent}: the chain has {MAX_CHAIN} snapshots already")
            if _real(parent).parent != _real(child.parent):
                raise SnapshotError(f"parent {parent}: it is not in the folder of {child}")
            if chain.has(child):
                raise SnapshotError(f"parent {parent}: {child} is part of its chain, and would be replaced")
            if [(image.name, image.base, image.size) for image in chain.rams] != regions:
                raise SnapshotError(f"parent {parent}: its RAM is laid out otherwise")
            chain.as_parent()
        except BaseException:
            chain.close()
            raise
        return chain

    def _check(self, identity: bytes, file: str) -> None:
        child, parent = self.readers[-2:]
        if parent.identity != identity:
            raise SnapshotError(f"parent {file}: it is not the snapshot this one was made from, or was changed")
        if [(r.name, r.base, r.size) for r in parent.rams] != [(r.name, r.base, r.size) for r in child.rams]:
            raise SnapshotError(f"parent {file}: its RAM is laid out otherwise")

    def as_parent(self) -> Parent:
        """What a difference to it names as its parent: the file itself, also where a link led to it. Raises
        SnapshotError when its name cannot be written down."""
        return Parent.from_json(Parent(self.identity, _real(self.path).name).to_json())

    def has(self, path: Path) -> bool:
        """Whether the file at `path` is one of its own, by whatever name."""
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return False
        return any(os.path.samestat(status, os.fstat(reader.fileno())) for reader in self.readers)

    @property
    def parts(self) -> Mapping[str, Part]:
        return self.readers[0].parts

    @property
    def meta(self) -> Json:
        return self.readers[0].meta

    @property
    def identity(self) -> bytes:
        return self.readers[0].identity

    @property
    def rams(self) -> tuple[RamImage, ...]:
        """The leaf's regions: their blocks are those of the leaf alone."""
        return self.readers[0].rams

    def map_ram(self, index: int) -> mmap.mmap:
        """Region `index` whole, as private memory. Outlives close(). Raises SnapshotError, OSError."""
        *differences, root = self.readers
        image = root.rams[index]
        if image.places is None:
            memory: mmap.mmap = root.map_ram(image)
        else:
            memory = zeros(image.size)
            differences.append(root)
        for reader in reversed(differences):
            image = reader.rams[index]
            for number in image.blocks:
                start, end = image.span(number)
                memory[start:end] = reader.block(image, number)
        return memory

    def stored(self, index: int) -> list[tuple[int, int]]:
        """The extents of what `map_ram` maps from the root's file: all else in it was written, or is zero."""
        image = self.readers[-1].rams[index]
        return [] if image.places is not None else [image.span(number) for number in image.blocks]

    def digests(self, index: int) -> dict[int, bytes]:
        """The digest of each block of region `index` that is present anywhere in the chain."""
        found: dict[int, bytes] = {}
        for reader in reversed(self.readers):
            found |= reader.rams[index].blocks
        return found

    def block(self, index: int, number: int) -> bytes:
        """The bytes of one block, from the nearest that has it."""
        for reader in self.readers:
            image = reader.rams[index]
            if number in image.blocks:
                return reader.block(image, number)
        start, end = self.rams[index].span(number)
        return bytes(end - start)

    def pages(self, index: int, page: int = 4096) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of each page of the present blocks, in order of offset."""
        for number in sorted(self.digests(index)):
            data = self.block(index, number)
            for at in range(0, len(data), page):
                yield number * BLOCK + at, data[at : at + page]

    def verify_ram(self) -> None:
        """Check the RAM of every file of the chain. Raises SnapshotError."""
        for _ in self.verify_blocks():
            pass

    def verify_blocks(self) -> Iterator[None]:
        """The same, a block at a time."""
        for i, reader in enumerate(self.readers):
            try:
                yield from reader.verify_blocks()
            except SnapshotError as error:
                parent = self.readers[i - 1].parent if i else None
                raise SnapshotError(f"parent {parent.file}: {error}" if parent else str(error)) from None

    def close(self) -> None:
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(error, SnapshotError):
            error.of(self.path)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a loop of links


def _open_parent(path: Path, max_ram: int) -> Reader:
    try:
        return Reader(path, max_ram=max_ram)
    except SnapshotError as error:
        raise SnapshotError(f"parent {path.name}: {error}") from None
    except OSError as error:
        raise SnapshotError(f"parent {path.name}: {error.strerror or error}") from None
