"""The terminal beside a run: what is held back is little, and nothing of it stays."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from vmm.control import terminal
from vmm.control.supervisor import Supervisor
from vmm.errors import BackendError


@pytest.fixture
def shown(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stdout=SimpleNamespace(buffer=out), stdin=None))
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
