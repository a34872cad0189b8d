"""`anyhyve devices`: the kinds there are, of whatever package."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest
from click.testing import CliRunner

from tests.vmm.cli.test_tables import Stream
from vmm.board import kinds
from vmm.cli.devices import devices
from vmm.cli.main import main


@pytest.fixture
def broken(monkeypatch):
    """A package whose kind cannot be had."""
    monkeypatch.setattr(kinds, "_theirs", lambda: {"acme": EntryPoint("acme", "no.such.module:KIND", kinds.GROUP)})
    kinds.kind.cache_clear()
    yield "anyhyve: device acme: no.such.module:KIND: ModuleNotFoundError: No module named 'no'\n"
    kinds.kind.cache_clear()


def test_a_broken_package_hides_no_other(broken):
    done = CliRunner().invoke(main, ["devices"])
    assert (done.exit_code, done.stderr) == (0, broken)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [kind.name for kind in kinds.OURS]


def test_one_that_is_asked_for_is_an_error(broken):
    done = CliRunner().invoke(main, ["devices", "acme"])
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", broken)


@pytest.mark.parametrize("options", [[], ["--markdown"]])
def test_a_page_is_drawn_on_a_terminal_and_markdown_elsewhere(monkeypatch, options):
    def page(terminal: bool) -> str:
        stream = Stream(terminal)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setenv("TERM", "xterm")
            devices.main(["uart", *options], standalone_mode=False)
        return stream.getvalue()

    assert page(terminal=False).startswith("## uart\n\nA serial port")
    at_a_terminal = page(terminal=True)
    assert ("## uart" in at_a_terminal) == bool(options) and "receiver FIFO" in at_a_terminal
