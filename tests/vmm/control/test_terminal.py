"""The terminal beside a run: what is held back is little, and nothing of it stays."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace

import pytest

from snapshot.verify import verify
from tests.conftest import OWN
from tests.vmm.conftest import OnTerminal, eventually
from vmm.control import terminal
from vmm.control.supervisor import Supervisor
from vmm.errors import BackendError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig


@pytest.fixture
def shown(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stdin=None))
    monkeypatch.setattr("vmm.host.streams.write", out.write)
    return out


def test_a_line_that_never_ends_is_not_kept(boot_own, shown):
    with boot_own() as machine, terminal.Terminal(Supervisor(machine), None) as shows:
        for n in range(100_000):
            machine.board.console.transmit(65)
            assert len(shows._line) <= terminal._AT_ONCE
            assert len(shown.getvalue()) >= n - terminal._AT_ONCE


def test_it_hears_no_more_when_it_is_left(boot_own, shown):
    with boot_own() as machine:
        with terminal.Terminal(Supervisor(machine), None):
            machine.board.console.transmit(65)
        assert shown.getvalue() == b"A"
        machine.board.console.transmit(66)
        assert shown.getvalue() == b"A" and not machine.board.console._listeners


def test_without_a_thread_it_is_not_begun(boot_own, shown, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with boot_own() as machine:
        monkeypatch.setattr("threading.Thread.start", refuse)
        with pytest.raises(BackendError, match="no thread for terminal"), terminal.Terminal(Supervisor(machine), None):
            pass
        assert not machine.board.console._listeners


def test_a_halted_machine_waits_for_what_may_be_typed(boot_own, shown, monkeypatch):
    """As long as there may be something."""
    stdin = SimpleNamespace(isatty=lambda: False, closed=False)
    monkeypatch.setattr("vmm.control.terminal.sys.stdin", stdin)
    waited_for = []

    def select(reading, *_):
        waited_for.append(reading)
        return [], [], []

    monkeypatch.setattr("select.select", select)
    with boot_own() as machine:
        assert not machine.loop.awaits_input
        with terminal.Terminal(Supervisor(machine), None):
            assert machine.loop.awaits_input
            eventually(lambda: waited_for)
    assert waited_for[0] == [0], "standard input"
    stdin.closed = True
    with boot_own() as machine, terminal.Terminal(Supervisor(machine), None):
        assert not machine.loop.awaits_input


@pytest.mark.parametrize(("save", "leave"), [(b"s", b"q"), (b"S", b"Q")])
def test_on_a_terminal(tmp_path, save, leave):
    """Every key is the guest's, Ctrl-C too, but the monitor's and the one behind that."""
    terminal = OnTerminal(
        os.environ, "run", "--kernel", OWN, "--flat", "--memory", "16M", "--save", tmp_path / "cut"
    )  # fmt: skip
    terminal.until(f"anyhyve: Ctrl-] then s saves to {tmp_path / 'cut'}, q quits".encode())
    terminal.until(b"round")
    for key in (b"\x03", b"\xff"):
        terminal.type(key)
        terminal.until(b"[" + key + b"]")
    terminal.type(b"\x1d\x1d")
    terminal.until(b"[\x1d]")
    terminal.type(b"\x1dxa")
    terminal.until(b"[a]")
    assert b"[x]" not in terminal.seen
    terminal.type(b"\x1d" + save)
    terminal.until(b"saving to ")
    terminal.until(b"saved to ")
    terminal.type(b"\x1d" + leave)
    terminal.until(f"; {tmp_path / 'cut'} is of position ".encode())  # and not "not saved"
    assert terminal.wait() == 0
    verify(tmp_path / "cut")


@pytest.fixture
def on_terminal(tmp_path):
    """A function that starts the own guest on a terminal, to save to a file. At the end it is quit."""
    made: list[OnTerminal] = []

    def start(file, *options):
        made.append(
            OnTerminal(os.environ, "run", "--kernel", OWN, "--flat", "--memory", "16M", "--save", file, *options)
        )
        made[-1].until(b"round")
        return made[-1]

    yield start
    for each in made:
        each.type(b"\x1dq")
        assert each.wait() == 0


@pytest.mark.parametrize("key", [b"?", b"x", b"\x03", b"\xff"])
def test_the_monitor_says_its_keys(on_terminal, tmp_path, key):
    terminal = on_terminal(tmp_path / "cut")
    said = f"anyhyve: Ctrl-] then s saves to {tmp_path / 'cut'}, q quits, Ctrl-] sends it, ? says this\r\n".encode()
    terminal.until(said)
    terminal.seen = b""
    terminal.type(b"\x1d" + key + b"a")
    terminal.until(b"\r\n" + said)
    terminal.until(b"[a]")
    assert b"[" + key + b"]" not in terminal.seen


def test_quitting_comes_behind_a_save(on_terminal, tmp_path):
    """Though both are typed at once."""
    terminal = on_terminal(tmp_path / "cut")
    terminal.type(b"\x1ds\x1dq")
    terminal.until(b"saved to ")
    terminal.until(b"quit, at position ")
    verify(tmp_path / "cut")


def test_the_monitors_key_is_an_answer_and_itself(on_terminal, tmp_path):
    (tmp_path / "cut").write_bytes(b"")
    Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xf4", flat=True)).save(tmp_path / "cut", force=True)
    terminal = on_terminal(tmp_path / "cut")
    terminal.type(b"\x1ds")
    terminal.until(b"y saves, any other key does not")
    terminal.type(b"\x1dq")
    terminal.until(b"not saved")
    terminal.until(b"quit, at position ")


def test_a_file_is_replaced_when_that_is_wanted(on_terminal, tmp_path):
    """Only the next key answers, and the guest does not have it; it runs on meanwhile."""
    file = tmp_path / "cut"
    terminal = on_terminal(file)
    terminal.type(b"\x1ds")
    terminal.until(b"saved to ")
    first = file.stat().st_ino
    for answer in (b"n", b"\r"):
        terminal.seen = b""
        terminal.type(b"\x1ds")
        terminal.until(f"anyhyve: replace {file}? y saves, any other key does not".encode())
        terminal.seen = b""
        terminal.until(b"round")
        terminal.type(answer + b"a")
        terminal.until(b"anyhyve: not saved\r\n")
        terminal.until(b"[a]")
        assert file.stat().st_ino == first and b"[" + answer + b"]" not in terminal.seen
    terminal.seen = b""
    terminal.type(b"\x1dsyb")  # in one read
    terminal.until(b"saved to ")
    terminal.until(b"[b]")
    assert file.stat().st_ino != first
    verify(file)


def test_what_cannot_be_replaced_is_not_asked_for(on_terminal, tmp_path):
    file = tmp_path / "notes"
    terminal = on_terminal(file)
    file.write_bytes(b"mine")
    terminal.type(b"\x1ds")
    terminal.until(b"not saved: cannot save to ")
    terminal.type(b"y")
    terminal.until(b"[y]")
    assert file.read_bytes() == b"mine"


def test_with_force_nothing_is_asked(on_terminal, tmp_path):
    file = tmp_path / "cut"
    file.write_bytes(b"old")
    terminal = on_terminal(file, "--force")
    terminal.type(b"\x1dsy")
    terminal.until(b"saved to ")
    terminal.until(b"[y]")
    verify(file)
