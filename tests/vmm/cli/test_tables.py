"""A table says all of it: on a terminal of 80 columns it wraps, and where nobody looks a row is one line."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from pathlib import Path

import click
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import vmm.control.catalog
import vmm.control.place
from tests.conftest import ROOT
from vmm.cli import catalog, control, doctor, lockstep, show
from vmm.cli.main import main
from vmm.control.catalog import Entry
from vmm.cpu.protocol import CpuState
from vmm.debug.lockstep import Divergence

LONG = "a-machine-whose-name-says-what-it-is-for-where-it-runs-and-who-looks-after-it.snapshot"
FILE = Path("/srv/ci/builds/2026-11-28/of-the-long-night/on-the-cluster") / LONG


class Stream(io.StringIO):
    """Standard output, at a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def drawn(draw, terminal: bool) -> list[str]:
    """The lines that `draw` writes: on a terminal of 80 columns, or elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        stream = Stream(terminal)
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "xterm")
        draw()
    return re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()


def cells(lines: list[str]) -> list[str]:
    """What stands in a table's columns, their lines joined; blanks, at which lines are broken, are left out."""
    rows = [[cell.replace(" ", "") for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[:1] in "│┃"]
    return ["".join(column) for column in zip(*rows, strict=True)]


WORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=120)
TABLES = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(WORDS, min_size=n, max_size=n),
        st.lists(st.lists(WORDS, min_size=n, max_size=n), min_size=1, max_size=3),
    )
)


@given(TABLES)
@example((["machine", "snapshot", "parent", "problem"], [["box", LONG, LONG, "no-parent"]]))
def test_nothing_is_left_out(table):
    names, rows = table
    wrapped = drawn(lambda: show.table(names, rows), terminal=True)
    assert max(map(len, wrapped)) <= 80
    assert cells(wrapped) == ["".join(column) for column in zip(names, *rows, strict=True)]
    piped = drawn(lambda: show.table(names, rows), terminal=False)
    assert [line.split() for line in piped] == [names, *rows], "a line a row"


def test_one_long_cell_makes_no_other_line_long():
    """A register of 512 bits beside a flag."""
    rows = [["zmm0", "0x" + "f" * 128, "a register"], ["cf", "1", "a flag"]]
    long, short = drawn(lambda: show.table(("field", "value", "meaning"), rows), terminal=False)[1:]
    assert long.endswith("ff  a register") and len(short) < 60 and short.split() == ["cf", "1", "a", "flag"]


@pytest.fixture
def long(monkeypatch):
    """Long names and paths, wherever the commands take theirs from."""
    entry = Entry(LONG, FILE, 0.0, 1 << 20, 1, 0, f"parent-of-{LONG}", True, f"{FILE}: it is cut short")
    monkeypatch.setattr(vmm.control.catalog, "entries", lambda name: [entry])
    monkeypatch.setattr(vmm.control.place, "rundir", lambda folder: FILE.parent)
    monkeypatch.setattr(vmm.control.place, "names", lambda folder: [LONG[:64]])
    monkeypatch.setattr(doctor, "examine", lambda names: {"emu": f"ready: {FILE}", LONG: "not there"})


DIVERGENCE = Divergence(1, 2, 3, "nop", {LONG: (str(FILE), b"0" * 64)}, [], [], CpuState())
DRAWN = {
    "catalog": (lambda: catalog.catalog_group.main([], standalone_mode=False), {LONG, f"parent-of-{LONG}", str(FILE)}),
    "list": (lambda: control.list_machines.main([], standalone_mode=False), {LONG[:64]}),
    "ctl": (lambda: control._show([{"id": LONG, "kind": "uart", "file": str(FILE)}]), {LONG, str(FILE)}),
    "doctor": (lambda: doctor.doctor.main([], standalone_mode=False), {LONG, str(FILE)}),
    "lockstep": (lambda: lockstep._show(DIVERGENCE, "emu", "kvm"), {LONG, str(FILE), "30" * 64}),
}


@pytest.mark.parametrize("what", DRAWN)
def test_ours(long, what):
    def draw():
        with contextlib.suppress(SystemExit):
            run()

    run, names = DRAWN[what]
    wrapped_lines = drawn(draw, terminal=True)
    wrapped = cells(wrapped_lines)
    assert all(any(name in column for column in wrapped) for name in names), wrapped
    assert all(len(line) <= 80 for line in wrapped_lines if line[0] in "┏┃┡│└")
    piped = "\n".join(drawn(draw, terminal=False))
    assert all(name in piped for name in names), piped


@pytest.mark.slow  # mutmut is an extra, which `make test-full` installs
def test_mutants():
    """What `python -m tests.mutants` says."""
    from tests.mutants import __main__ as tool
    from tests.mutants.campaign import LIVED, Verdict
    from tests.mutants.mutate import Mutant

    mutant = Mutant(str(FILE), LONG, "operator", str(FILE), LONG, "")
    verdicts = [Verdict(mutant, LIVED)]
    lines = drawn(lambda: tool.say(tool.console(), verdicts[0]), terminal=False)
    assert lines == [f"{LIVED} {FILE}::{LONG} (operator)", f"  - {FILE}", f"  + {LONG}"]
    for terminal in (True, False):
        lines = drawn(lambda: tool.sum_up(verdicts), terminal)
        assert str(FILE.parent) in (cells(lines)[0] if terminal else lines[1])


def test_one_place_draws_tables():
    for package in ("anyhyve", "vmm", "bench", "tests"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "rich.table":
                    assert file == ROOT / "vmm" / "cli" / "show.py", f"{file} draws a table by itself"


def commands(command, path=()):
    """Every command there is, those of groups too, by what is typed for it."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"), list(commands(main)), ids=lambda each: " ".join(each) if isinstance(each, tuple) else ""
)
def test_help_fits_a_terminal_of_80_columns(path, command):
    with click.Context(command, info_name=" ".join(("anyhyve", *path)), terminal_width=80) as context:
        said = command.get_help(context)
    assert max(map(len, said.splitlines())) <= 80
