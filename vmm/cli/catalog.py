"""`anyhyve catalog` and `suspend-all`: the catalog of named machines' snapshots."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from vmm.cli import show
from vmm.cli.options import json_option, rundir_option
from vmm.control import catalog, place
from vmm.control.client import Client, Failed, sense
from vmm.errors import BackendError, RequestError


@click.group("catalog", invoke_without_command=True)
@click.option("--name", metavar="NAME", help="Of the machine NAME only.")
@click.option("--vm", hidden=True)  # what --name was called before
@json_option
@click.pass_context
def catalog_group(ctx: click.Context, name: str | None, vm: str | None, as_json: bool) -> None:
    """List the snapshots in the catalog, by machine, in the order of saving; or keep, delete and prune them."""
    if ctx.invoked_subcommand is not None:
        return
    found = catalog.entries(vm if name is None else name)
    if as_json:
        show.as_json([entry.to_json() for entry in found])
        return
    if not found:
        show.line("no snapshot was saved into the catalog")
        return
    rows = []
    for entry in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time_s))
        size, kept = f"{entry.size_bytes / 1e6:.1f}", "kept" if entry.kept else ""
        rows.append((entry.machine, entry.path.name, when, size, entry.parent or "", kept, entry.problem or ""))
    show.table(("machine", "snapshot", "time", "on disk MB", "parent", "kept", "problem"), rows)


def _file(ctx: click.Context, param: click.Parameter, value: str) -> Path:
    """The path of an argument: a path, or NAME/SNAPSHOT as the list shows them. Raises RequestError for neither."""
    path = Path(value)
    inside = catalog.root() / value
    if not path.exists() and inside.exists() and inside.parent.parent == catalog.root():
        return inside
    if not path.exists():
        raise RequestError(f"{value}: no such snapshot")
    return path


_argument = click.argument("file", metavar="NAME/SNAPSHOT", callback=_file)


@catalog_group.command()
@_argument
@click.option("--not", "off", is_flag=True, help="Let it be deleted and replaced again.")
def keep(file: Path, off: bool) -> None:
    """Make a snapshot, and what it stands on, read-only: it is neither pruned, deleted nor replaced."""
    catalog.keep(file, not off)


@catalog_group.command()
@_argument
def delete(file: Path) -> None:
    """Delete a snapshot that is not kept and that no difference stands on."""
    catalog.delete(file)


@catalog_group.command()
@click.argument("name", metavar="NAME")
@click.option("--leave", type=click.IntRange(0), default=3, show_default=True, help="How many of the newest stay.")
def prune(name: str, leave: int) -> None:
    """Delete older snapshots of the machine NAME, but those kept and those others stand on."""
    for path in catalog.prune(name, leave):
        show.line(f"deleted {path}")


def _suspend(client: Client, path: Path) -> Any:
    return client.call("suspend", path=str(path))


@click.command("suspend-all")
@rundir_option
@json_option
def suspend_all(rundir: Path | None, as_json: bool) -> None:
    """Suspend every machine that runs here into the catalog. Exit status 1 when one could not be."""
    folder, outcome = place.rundir(rundir), dict[str, str | None]()
    for name in place.names(folder):
        try:
            with Client(folder, name) as client:
                answer = catalog.over(name, catalog.SUSPENDED, partial(_suspend, client))
                with sense(name):
                    outcome[name] = str(answer["path"])
        except (BackendError, RequestError, Failed) as error:
            if place.withdrawn(folder, name):
                continue  # it has come to its end meanwhile
            outcome[name] = None
            show.note(f"{name}: {error}")
    if as_json:
        show.as_json(outcome)
    else:
        for name, saved in outcome.items():
            show.line(f"{name}: {saved or 'runs on'}")
        if not outcome:
            show.line("no machine with a name runs here")
    sys.exit(1 if None in outcome.values() else 0)
