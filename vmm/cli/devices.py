"""`anyhyve devices`: the kinds of devices a machine can be given, drawn from what they declare."""

from __future__ import annotations

import json
from typing import Any

import click

from snapshot.schema import schema_of
from vmm.board import kinds
from vmm.board.options import options_of
from vmm.cli import show
from vmm.cli.options import json_option
from vmm.errors import BackendError
from vmm.registers import Register


@click.command()
@click.argument("names", metavar="[KIND]...", nargs=-1)
@click.option("--markdown", is_flag=True, help="As a page of documentation, at a terminal, too.")
@json_option
def devices(names: tuple[str, ...], markdown: bool, as_json: bool) -> None:
    """The kinds of devices `--device` makes, those of other packages among them; of a KIND its options, registers and
    state, too."""
    found = []
    for name in names or kinds.names():
        try:
            found.append(kinds.kind(name))
        except BackendError as error:
            if names:
                raise
            show.note(error)  # one broken package hides no other
    if as_json:
        show.as_json({kind.name: describe(kind) for kind in found})
    elif names or markdown:
        show.markdown("\n".join(draw(kind) for kind in found).removesuffix("\n"), raw=markdown)
    else:
        for kind in found:
            show.line(f"{kind.name:16} {kind.doc}")


def describe(kind: kinds.Kind) -> dict[str, Any]:
    """All that a kind declares, as JSON has it."""
    return {
        "doc": kind.doc,
        "space": kind.space,
        "place": kind.place or None,
        "options": {
            name: {"type": option.type.describe(), "default": option.default, "doc": option.doc}
            for name, option in options_of(kind.options).items()
        },
        "registers": [str(register) for register in kind.device.registers],
        "state": schema_of(kind.device.State).describe(),
    }


def draw(kind: kinds.Kind) -> str:
    """A page of Markdown on all that a kind declares."""
    place = "slot=DEVICE[.FUNCTION]" if kind.space == "pci" else f"{kind.space}=ADDRESS"
    default = kind.place or ("the first that is free" if kind.space == "pci" else "")
    place += f", by default {default}" if default else ""
    lines = [f"## {kind.name}", "", kind.doc, "", f"Put at {place}.", ""]
    if options := options_of(kind.options):
        lines += ["| option | type | default | |", "|---|---|---|---|"]
        for name, option in options.items():
            default = "needed" if option.default is None else f"`{option.spell(option.default)}`"
            lines.append(f"| `{name}` | `{json.dumps(option.type.describe())}` | {default} | {option.doc} |")
        lines.append("")
    lines += ["| register | bytes | | |", "|---|---|---|---|", *map(_row, kind.device.registers), ""]
    schema = schema_of(kind.device.State)
    lines += [f"State `{schema.name}` version {schema.version}:" if schema.fields else "It has no state.", ""]
    if schema.fields:
        lines += ["| field | type | meaning |", "|---|---|---|"]
        lines += [f"| `{f.name}` | `{json.dumps(f.type.describe())}` | {f.doc} |" for f in schema.fields]
        lines.append("")
    return "\n".join(lines)


def _row(register: Register) -> str:
    bank = f"{register.bank} " if register.bank else ""
    family = f", {register.span.count} of them {register.span.step} apart" if register.span else ""
    return f"| {bank}+{register.offset:#x}{family} | {register.size or 'any'} | {register.kind} | {register.method} |"
