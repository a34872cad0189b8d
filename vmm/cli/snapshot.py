"""`anyhyve snapshot`: look into saved machines, compare them, take them apart, change them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from snapshot import diff as differences
from snapshot import edit as editing
from snapshot import promises as lock
from snapshot import rewrite
from snapshot import unpack as unpacking
from snapshot.chain import Chain
from snapshot.children import standing_on
from snapshot.container import BLOCK, Part
from snapshot.errors import SnapshotError
from snapshot.field_types import Json
from snapshot.reader import RamImage, decode_part
from vmm.board import kinds
from vmm.cli import show as view
from vmm.cli.options import FILE, PARENT, allow_option, backend_option, chosen, force_option, json_option, pack_option
from vmm.cpu.disassembly import ahead
from vmm.cpu.protocol import CpuState
from vmm.debug import selftest
from vmm.errors import BackendError
from vmm.guest.symbols import Symbols
from vmm.machine.machine import Machine
from vmm.saving.parts import with_state
from vmm.saving.saved import Saved


@click.group()
def snapshot() -> None:
    """Look into saved machines."""


@snapshot.command()
@click.argument("file", type=FILE)
@json_option
def show(file: Path, as_json: bool) -> None:
    """Print every field of a snapshot, by the schema in the file, and the code at RIP."""
    with Chain(file) as chain:
        codes = {part.name: _code(chain, part) for part in with_state(chain.parts, CpuState)}
        if as_json:
            view.as_json(_tree(chain, codes))
            return
        for name, part in chain.parts.items():
            view.line(f"{name}  ({part.schema['name']} version {part.schema['version']})")
            view.table(("field", "value", "meaning"), _rows(part))
        for i, image in enumerate(chain.rams):
            stored = "packed" if image.places is not None else "raw"
            blocks = f"{len(chain.digests(i))} blocks of {BLOCK >> 10} KiB, {len(image.blocks)} of them here, {stored}"
            view.line(f"{image.name}: {image.size >> 10} KiB at {image.base:#x}, {blocks}")
        for reader in chain.readers[1:]:
            view.line(f"on parent {reader.identity.hex()[:16]}")
        for name, code in codes.items():
            if code:
                view.line("code at RIP:" if len(codes) == 1 else f"code at RIP of {name}:")
                for line in code:
                    view.line(f"  {line}")


def _tree(chain: Chain, codes: dict[str, list[str]]) -> dict[str, Any]:
    leaf = chain.readers[0]
    return {
        "identity": chain.identity.hex(),
        "parent": None if leaf.parent is None else leaf.parent.to_json(),
        "parts": {name: {"schema": part.schema, "state": part.state} for name, part in chain.parts.items()},
        "ram": [
            {"name": r.name, "base": r.base, "size": r.size, "blocks": len(r.blocks), "packed": r.places is not None}
            for r in chain.rams
        ],
        "meta": chain.meta,
        "code": next(iter(codes.values()), []),  # of the first CPU
        "codes": codes,
    }


def _rows(part: Part) -> Iterator[tuple[str, str, str]]:
    fields: Any = part.schema["fields"]
    for field in fields:
        yield field["name"], _value(part.state[field["name"]]), field["doc"]


def _value(value: Json) -> str:
    return f"{value:#x}" if type(value) is int and value > 9 else json.dumps(value)


def _code(chain: Chain, part: Part, count: int = 6) -> list[str]:
    """The next instructions of a CPU; none where it is not the CPU we know, or its code is not in RAM."""
    try:
        state: CpuState = decode_part(part, CpuState)
    except SnapshotError:
        return []

    def read(address: int, size: int) -> bytes:
        for i, image in enumerate(chain.rams):
            at = address - image.base
            if 0 <= at < image.size:
                block = chain.block(i, at // BLOCK)
                return block[at % BLOCK : at % BLOCK + size]
        return b""

    return ahead(state, read, count)


@snapshot.command()
@click.argument("file", type=FILE)
def verify(file: Path) -> None:
    """Check all of a file and of its parents against their own digests, RAM included. Nothing is woken.

    `restore --verify` checks RAM the same way; `python -m snapshot.verify` is a second opinion, by other code."""
    with Chain(file) as chain:
        chain.verify_ram()
        blocks = sum(len(chain.digests(i)) for i in range(len(chain.rams)))
        parents = f"; on {len(chain.readers) - 1} parents, good too" if len(chain.readers) > 1 else ""
        view.line(f"{file}: good; {len(chain.parts)} parts, {blocks} RAM blocks{parents}")


@snapshot.command()
@click.argument("file", type=FILE)
@backend_option
@allow_option
@click.option("--quick", is_flag=True, help="Do not read RAM: it may be damaged all the same.")
def check(file: Path, backend: str, allow: tuple[str, ...], quick: bool) -> None:
    """Say whether a snapshot will load here, and if not why. Nothing is made or changed."""
    backend = chosen(backend)
    Machine.check(file, backend, verify=not quick, allow=allow)
    view.line(f"{file}: will load on {backend}")
    if (why_not := selftest.findings(backend).runs) is not None:
        view.note(f"warning: {why_not}")


@snapshot.command()
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@click.option("--symbols", type=FILE, help="The kernel's System.map, to name what lies where in RAM.")
@json_option
def diff(first: Path, second: Path, symbols: Path | None, as_json: bool) -> None:
    """Compare two snapshots: state by field name, RAM by runs of pages. Exit status 1 when something differs."""
    names = Symbols.load(symbols) if symbols is not None else Symbols([])
    with Chain(first) as a, Chain(second) as b:
        states, runs = list(differences.state(a, b)), list(differences.ram(a, b))
    if as_json:
        view.as_json({
            "state": [vars(d) for d in states],
            "ram": [{**vars(run), "symbol": names.at(run.at)} for run in runs],
        })  # fmt: skip
    else:
        for d in states:
            field = f"{d.part}.{d.field}" if d.field else d.part
            view.line(f"{field}: {_value(d.first)} -> {_value(d.second)}")
        for run in runs:
            pages = (run.end - run.start) // 4096
            where = names.at(run.at)
            view.line(f"{run.region}: {pages} page{'s' if pages > 1 else ''} at {run.start:#x}, first byte {run.at:#x}"
                       + (f" ({where})" if where else ""))  # fmt: skip
    sys.exit(1 if states or runs else 0)


@snapshot.command()
@click.argument("file", type=FILE)
@click.argument("folder", type=FILE)
def unpack(file: Path, folder: Path) -> None:
    """Take a snapshot apart: all state as text."""
    unpacking.unpack(file, folder)


@snapshot.command()
@click.argument("folder", type=FILE)
@click.argument("file", type=FILE)
@force_option
def pack(folder: Path, file: Path, force: bool) -> None:
    """Make a snapshot of what `unpack` wrote, byte for byte the same if nothing was changed."""
    unpacking.pack(folder, file, force=force)


@snapshot.command()
@click.argument("file", type=FILE)
@click.option("--set", "assignments", multiple=True, required=True, metavar="PART.FIELD=VALUE", help="May be repeated.")
@click.option("--out", type=FILE, help="Write here; by default FILE is replaced.")
@force_option
def edit(file: Path, assignments: tuple[str, ...], out: Path | None, force: bool) -> None:
    """Change fields, such as --set com1.lcr=0x83, checked against the schema in the file. What would not load any more
    is refused; a file that others stand on is replaced with --force, and they cannot be woken then."""
    with Chain(file) as chain:
        parts, rams = dict(chain.parts), chain.rams
        before = _why_not(parts, rams)
        for assignment in assignments:
            part = editing.set_field(parts, assignment)
            parts[part.name] = part
    if (why_not := _why_not(parts, rams)) is not None:
        if before is None:
            raise SnapshotError(f"it would not load any more: {why_not}").of(file)
        view.note(f"warning: {file} does not load here: {why_not}")
    out = out or file
    orphans = standing_on(out) if force and out.exists() else []
    rewrite.with_parts(file, out, parts, force=force)
    for orphan in orphans:
        view.note(f"warning: {out.with_name(orphan)} stood on {out}, and cannot be woken any more")


def _why_not(parts: Mapping[str, Part], rams: Sequence[RamImage]) -> str | None:
    """Why a file with these would not load here."""
    try:
        Saved.of(parts, rams)
    except (SnapshotError, BackendError) as error:
        return str(error)
    return None


@snapshot.command()
@click.argument("file", type=FILE)
@click.argument("out", type=FILE)
@pack_option
@force_option
def merge(file: Path, out: Path, packed: bool, force: bool) -> None:
    """Make a snapshot that stands alone of one that stands on parents."""
    rewrite.merge(file, out, packed=packed, force=force)


@snapshot.command()
@click.argument("file", type=FILE)
@click.argument("out", type=FILE)
@click.option("--parent", required=True, type=FILE, help=PARENT)
@pack_option
@force_option
def rebase(file: Path, out: Path, parent: Path, packed: bool, force: bool) -> None:
    """Save the same machine as a difference to another snapshot."""
    rewrite.rebase(file, parent, out, packed=packed, force=force)


@snapshot.command()
def schemas() -> None:
    """Print the schemas of this version, as one JSON object; those of other packages' devices, too."""
    for name in kinds.names():
        try:
            kinds.kind(name)
        except BackendError as error:
            view.note(error)  # one broken package hides no other
    view.as_json(lock.dump(), indent=1)


@snapshot.command("check-schemas")
@click.argument("old", type=FILE)
@click.argument("new", type=FILE)
def check_schemas(old: Path, new: Path) -> None:
    """Compare two dumps of schemas; name each change that would orphan a snapshot. Exit status 1 if there is one."""
    complaints = lock.complaints(lock.load(old), lock.load(new))
    for complaint in complaints:
        view.line(complaint)
    sys.exit(1 if complaints else 0)
