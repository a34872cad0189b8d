"""`anyhyve replay`: a find of `anyhyve fuzz`, or accesses to devices from a file; here and on another machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from snapshot.files import read_file
from vmm.board.config import GIVEN_BOARD, MachineConfig
from vmm.cli import show
from vmm.cli.fuzz import finds_option
from vmm.cli.options import FILE, board_option, json_option
from vmm.errors import BackendError, RequestError
from vmm.qtest import board as qtest
from vmm.qtest.qemu import Qemu


@click.command()
@click.argument("id", required=False)
@finds_option
@click.option("--qtest", "file", type=FILE, help="Commands, as QEMU's qtest has them.")
@click.option("--against", type=click.Choice(["qemu"]), help="Play them there too, and find the first difference.")
@board_option
@json_option
def replay(
    id: str | None, folder: Path, file: Path | None, against: str | None, board: str | None, as_json: bool
) -> None:
    """Play a find again, by its ID: exit status 1 when it still fails. Or play the accesses in a file to the board's
    devices, and print what the reads answer: exit status 1 when the other machine answers otherwise."""
    if (id is None) == (file is None):
        raise click.UsageError("give an ID, or --qtest FILE")
    if file is None:
        if against:
            raise click.UsageError("--against compares accesses: give the find's own --qtest FILE")
        if board:
            raise click.UsageError("--board does nothing without --qtest.")
        _find(folder, str(id), as_json)
        return
    try:
        commands = [command for _, command in qtest.parse(read_file(file).decode())]
    except UnicodeDecodeError:
        raise RequestError(f"{file}: not text") from None
    ours = qtest.OurBoard(MachineConfig(board=board or GIVEN_BOARD))
    if against is None:
        _here(commands, ours, as_json)
    else:
        _there(commands, ours, as_json)


def _find(folder: Path, id: str, as_json: bool) -> None:
    try:
        from vmm.testing import fuzz
        from vmm.testing.case import cause, told
    except ImportError as error:
        raise BackendError(f"{error.name} is not installed: pip install 'anyhyve[test]'") from None
    if (path := fuzz.find(folder, id)) is None:
        raise RequestError(f"no find {id} in {folder}")
    sys.path.insert(0, "")  # for MODULE:CLASS
    case = fuzz.load(path)
    lines, raised = case.told()
    said = told(raised) if raised else ["fails no more"]
    if as_json:
        show.as_json({**case.to_json(), "cause": raised and cause(raised), "played": lines, "said": said})
    else:
        for line in [*lines, f"{case.device}: {said[0]}", *said[1:]]:
            show.line(line)
    sys.exit(0 if raised is None else 1)


def _here(commands: list[qtest.Command], board: qtest.OurBoard, as_json: bool) -> None:
    answers = [(command, answer) for command in commands if (answer := board.play(command)) is not None]
    if as_json:
        show.as_json([[str(command), answer] for command, answer in answers])
        return
    for command, answer in answers:
        show.line(f"{command}: {answer:#x}")


def _there(commands: list[qtest.Command], board: qtest.OurBoard, as_json: bool) -> None:
    with Qemu() as qemu:
        found = qtest.compare(commands, board, qemu)
    if as_json:
        show.as_json(None if found is None else {**vars(found), "command": str(found.command)})
    elif found is None:
        show.line(f"the same answers to {len(commands)} commands")
    else:
        show.line(f"command {found.at + 1}, {found}")
    sys.exit(0 if found is None else 1)
