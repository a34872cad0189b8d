"""`anyhyve replay`: accesses to devices from a file, here and on another machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from vmm import qtest
from vmm.errors import GuestError


@click.command()
@click.option(
    "--qtest", "file", required=True, type=click.Path(path_type=Path), help="Commands, as QEMU's qtest has them."
)
@click.option("--against", type=click.Choice(["qemu"]), help="Play them there too, and find the first difference.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def replay(file: Path, against: str | None, as_json: bool) -> None:
    """Play accesses to the board's devices, and print what the reads answer. Exit status 1 when the other machine
    answers otherwise."""
    try:
        commands = [command for _, command in qtest.parse(file.read_text())]
    except UnicodeDecodeError:
        raise GuestError(f"{file}: not text") from None
    if against is None:
        board = qtest.OurBoard()
        answers = [(command, answer) for command in commands if (answer := board.play(command)) is not None]
        if as_json:
            click.echo(json.dumps([[str(command), answer] for command, answer in answers]))
            return
        for command, answer in answers:
            click.echo(f"{command}: {answer:#x}")
        return
    with qtest.Qemu() as qemu:
        found = qtest.compare(commands, qtest.OurBoard(), qemu)
    if as_json:
        click.echo(json.dumps(None if found is None else {**vars(found), "command": str(found.command)}))
    elif found is None:
        click.echo(f"the same answers to {len(commands)} commands")
    else:
        click.echo(f"command {found.at + 1}, {found}")
    sys.exit(0 if found is None else 1)
