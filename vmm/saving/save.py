"""From a machine's states and RAM to a snapshot."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot.chain import Chain
from snapshot.errors import Refused
from snapshot.field_types import Json
from snapshot.schema import schema_of
from snapshot.target import refuse
from snapshot.versions import lower
from snapshot.writer import Writer
from vmm.errors import BackendError, RequestError
from vmm.ram import Ram


@dataclass(frozen=True)
class Contents:
    """What is to be written: states by part, of one instant, and the RAM, which is read when it is written. `packed`
    packs RAM with zstd; with `parent`, a snapshot in the folder of `path`, only blocks of RAM that differ from its are
    written; `versions` (by state name) writes what an older release reads; `meta` is for people, and not part of the
    machine."""

    path: Path
    states: Mapping[str, Any]
    ram: Ram
    packed: bool = False
    parent: Path | None = None
    versions: Mapping[str, int] | None = None
    meta: Json = None

    def fill(self, writer: Writer) -> None:
        """Write all but the end. Raises SnapshotError for a parent that cannot be one, a state an older version cannot
        say, or RAM whose file was changed; OSError."""
        for name, value in self.states.items():
            wanted = None if self.versions is None else self.versions.get(schema_of(type(value)).name, 0)
            writer.part(name, value if wanted is None else lower(value, wanted))
        known: list[dict[int, bytes]] = []
        if self.parent is not None:
            with Chain.for_child(self.parent, self.path, _layout(self.ram)) as chain:
                known = [chain.digests(i) for i in range(len(chain.rams))]
                writer.base(chain.as_parent())
        try:
            for i, region in enumerate(self.ram.regions):
                before = known[i] if known else None
                writer.ram(region.name, region.base, region.view, region.touched(), packed=self.packed, parent=before)
        finally:
            self.ram.check()  # also the better reason: the kernel calls a page that is gone a bad address
        if self.meta is not None:
            writer.meta(self.meta)


def cannot(path: Path, error: OSError) -> RequestError | BackendError:
    """Say which file could not be written, and why: what was asked for is at fault, or the host."""
    kind = RequestError if isinstance(error, Refused) else BackendError
    return kind(f"cannot save to {path}: {error.strerror or error}")


def preflight(path: Path, parent: Path | None, ram: Ram, *, force: bool = False) -> None:
    """Raises what a save would raise, as far as it can be told before: RequestError, BackendError, SnapshotError."""
    try:
        refuse(path, force)
        if not path.parent.is_dir():
            raise RequestError(f"cannot save to {path}: {path.parent} is not a folder")
        if not os.access(path.parent, os.W_OK):
            raise BackendError(f"cannot save to {path}: permission denied")
        if parent is not None:
            Chain.for_child(parent, path, _layout(ram)).close()
    except OSError as error:
        raise cannot(path, error) from None


def _layout(ram: Ram) -> list[tuple[str, int, int]]:
    return [(region.name, region.base, region.size) for region in ram.regions]
