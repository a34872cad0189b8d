"""What the commands say. Here alone something is written to the terminal: what comes out of a file, a socket or a guest
is data there, one line stays one line, and JSON is ASCII. Only `console` passes bytes on as they are, a guest's."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import click

from vmm.host import streams
from vmm.host.shown import shown


def begin() -> None:
    """Have standard streams. Characters that a terminal has not are shown as \\u2192."""
    streams.have_all()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def line(text: object) -> None:
    with streams.writing():
        click.echo(shown(text))


def note(text: object) -> None:
    """A line on standard error."""
    streams.tell(f"anyhyve: {shown(text)}\n")


def note_after_console(text: object) -> None:
    """A line on standard error; the guest may have ended in the middle of one."""
    streams.tell("\n")
    note(text)


def as_json(value: Any, indent: int | None = None) -> None:
    with streams.writing():
        click.echo(json.dumps(value, indent=indent))


def console(data: bytes) -> None:
    """A guest's output, as it is."""
    streams.write(data)


def table(
    columns: Sequence[str], rows: Iterable[Iterable[object]], title: str | None = None, err: bool = False
) -> None:
    """A table, on standard error if `err`. On a terminal, cells that are too wide for it are broken into lines;
    anywhere else a row is one line, however long. Nothing is left out."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    drawn = Table(*(Column(Text(shown(name)), overflow="fold") for name in columns), title=title and Text(title))
    for row in rows:
        drawn.add_row(*(Text(shown(cell)) for cell in row))
    console = Console(stderr=err)
    if not console.file.isatty():
        console.width = sys.maxsize
    with nullcontext() if err else streams.writing():
        console.print(drawn)


@contextmanager
def progress(total: int | None, unit: str = "", quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Context manager: gives what is called to show how far something is: `done`, of `total`, and what it is. On a
    terminal only. `unit`: bytes, or a word."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    say = TextColumn("{task.description}", markup=False)
    count = TextColumn("{task.completed:,.0f} " + unit, markup=False)
    columns: dict[str, tuple[Any, ...]] = {
        "bytes": (say, BarColumn(), DownloadColumn(binary_units=True)),
        "": (SpinnerColumn(), say, TimeElapsedColumn()),
    }
    terminal = Console(stderr=True)
    off = quiet or not terminal.is_terminal
    with Progress(
        *columns.get(unit, (count, BarColumn(), TimeElapsedColumn())), console=terminal, disable=off, transient=True
    ) as bar:
        task = bar.add_task("", total=total)

        def show(what: object = "", done: float | None = None, of: float | None = None) -> None:
            bar.update(task, description=shown(what), completed=done, total=total if of is None else of)

        yield show
