"""`anyhyve devices`: the kinds there are, of whatever package."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint

import pytest
from click.testing import CliRunner

from snapshot.field_types import u8
from snapshot.schema import state
from tests.vmm.cli.test_tables import Stream
from vmm.board import kinds
from vmm.cli.devices import devices
from vmm.cli.main import main
from vmm.device import Device
from vmm.registers import reads


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


@state("test.cli.theirs", version=1)
class TheirState:
    value: u8 = 0


class Theirs(Device[TheirState]):
    State = TheirState

    @reads(0)
    def read(self) -> int:
        return 1 // self.state.value


@pytest.fixture
def theirs(monkeypatch):
    """A package whose kind is made, and whose code fails."""
    monkeypatch.setitem(globals(), "KIND", kinds.Kind("theirs", Theirs))
    points = {name: EntryPoint(name, f"{__name__}:KIND", kinds.GROUP) for name in ("theirs", "mistyped")}
    monkeypatch.setattr(kinds, "_theirs", lambda: points)
    kinds.kind.cache_clear()
    yield
    kinds.kind.cache_clear()


def test_a_kind_by_two_names(theirs):
    done = CliRunner().invoke(main, ["devices", "mistyped"])
    assert done.exit_code == 1 and "is of the kind 'theirs': one of the two names is wrong" in done.stderr


def test_its_schemas_are_shown(theirs):
    done = CliRunner().invoke(main, ["snapshot", "schemas"])
    assert '"test.cli.theirs"' in done.stdout and "device mistyped" in done.stderr


def test_a_fault_in_its_code_is_one_line(theirs, tmp_path):
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes.fromhex("66ba0003eceb fe"))  # mov $0x300, %dx; in (%dx), %al; jmp .
    run = [
        "run",
        "--kernel",
        str(kernel),
        "--flat",
        "--memory",
        "4M",
        "--device",
        "theirs,port=0x300",
        "--backend",
        "emu",
    ]
    done = CliRunner().invoke(main, run)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1, done.stderr
    assert re.search(r"a device's code fails: \S+/test_devices.py:\d+: read: ZeroDivisionError: ", done.stderr)
