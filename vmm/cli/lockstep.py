"""The command `anyhyve lockstep`: where two CPUs stop agreeing."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vmm.cli import show
from vmm.cli.options import FILE, backend_option, chosen, json_option
from vmm.debug import selftest
from vmm.debug.lockstep import Divergence, Lockstep
from vmm.errors import BackendError


@click.command()
@click.argument("file", type=FILE)
@backend_option
@click.option(
    "--against", default="kvm", show_default=True, metavar="emu|kvm", help="The other CPU; one of the two must be emu."
)
@click.option(
    "--instructions",
    type=click.IntRange(1),
    default=100_000,
    show_default=True,
    help="How far to go; some thousands take a second.",
)
@click.option(
    "--save-pair",
    type=FILE,
    metavar="PREFIX",
    help="Save both machines just before they differ: PREFIX.leader, PREFIX.follower.",
)
@json_option
def lockstep(file: Path, backend: str, against: str, instructions: int, save_pair: Path | None, as_json: bool) -> None:
    """Run a snapshot on two CPUs, instruction by instruction, and report the first that differs.

    Exit status 0: they agree so far; 1: they differ, which standard output tells, or they cannot be compared, which
    standard error tells."""
    if backend == "auto":
        backend = chosen(backend)
    for name in {backend, against} - {"emu"} if "emu" in (backend, against) else ():
        if (why_not := selftest.findings(name).stepping) is not None:
            raise BackendError(f"{name}: {why_not}: what differs would be this host's, not the guest's")
    with Lockstep(file, backend, against) as pair, show.progress(instructions, "instructions") as progress:
        found = pair.run(instructions, lambda count: progress(done=count))
        if found is not None and save_pair is not None:
            pair.save_pair(found, save_pair)
        count = pair.count
    if as_json:
        show.as_json({"instructions": count, "divergence": None if found is None else _plain(found)})
    elif found is None:
        show.line(f"no difference in {count} instructions")
    else:
        _show(found, backend, against)
    sys.exit(0 if found is None else 1)


def _plain(found: Divergence) -> dict[str, Any]:
    plain = asdict(found)
    del plain["before"]
    plain["fields"] = {name: [_text(value) for value in values] for name, values in found.fields.items()}
    plain["memory"] = [[address, ours.hex(), theirs.hex()] for address, ours, theirs in found.memory]
    plain["pair"] = [str(path) for path in found.pair]
    return plain


def _text(value: Any) -> str:
    return f"{value:#x}" if type(value) is int else value.hex() if isinstance(value, bytes) else str(value)


def _show(found: Divergence, backend: str, against: str) -> None:
    show.line(f"they differ after instruction {found.instruction}, at position {found.position}:")
    show.line(f"    {found.rip:#018x}  {found.disassembly}")
    leader, follower = (backend, against) if backend == "emu" else (against, backend)
    fields = [(name, _text(ours), _text(theirs)) for name, (ours, theirs) in found.fields.items()]
    memory = [(f"RAM {address:#x}", mine.hex(" "), other.hex(" ")) for address, mine, other in found.memory]
    show.table(("what", leader, follower), fields + memory)
    for line in ["last I/O:", *(f"    {access}" for access in found.io)] if found.io else []:
        show.line(line)
    for path in found.pair:
        show.line(f"saved just before it: {path}")
