"""What the commands say. Here alone something is written to the terminal: what comes out of a file, a socket or a guest
is data there, one line stays one line, and JSON is ASCII. Only `console` passes bytes on as they are, a guest's."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from typing import Any

import click

from vmm.host import streams
from vmm.host.shown import shown

_WIDEST = 40  # characters that a column of a table is as wide for all its rows


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
    cells = [[shown(cell) for cell in row] for row in ([*columns], *rows)]
    stream = sys.stderr if err else sys.stdout
    with nullcontext() if err else streams.writing():
        if stream.isatty():
            _draw(cells, title, err)
        else:
            click.echo("\n".join([*([title] if title else []), *_columns(cells)]), err=err)


def _draw(cells: list[list[str]], title: str | None, err: bool) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    heads, *rows = cells
    table = Table(*(Column(Text(head), overflow="fold") for head in heads), title=title and Text(title))
    for row in rows:
        table.add_row(*map(Text, row))
    Console(stderr=err).print(table)


def _columns(rows: list[list[str]]) -> Iterator[str]:
    """A line a row, the last of whose cells may be wanting. One long cell makes its own line long, and no other."""
    widths = [min(_WIDEST, max(map(len, column))) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


def markdown(text: str, raw: bool) -> None:
    """A page of Markdown: drawn on a terminal, else, or if `raw`, as it is."""
    lines = [shown(line) for line in text.split("\n")]
    with streams.writing():
        if raw or not sys.stdout.isatty():
            click.echo("\n".join(lines))
        else:
            from rich.console import Console
            from rich.markdown import Markdown

            Console().print(Markdown("\n".join(lines)))


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
