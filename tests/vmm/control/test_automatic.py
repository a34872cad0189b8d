"""Saves nobody asks for at the time leave signals as they were, and need nothing that may be wanting when they come."""

from __future__ import annotations

import signal
import threading

import pytest

from vmm.control.automatic import Automatic
from vmm.control.supervisor import Supervisor
from vmm.errors import BackendError

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def test_signals_are_as_before(boot_own, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = [signal.getsignal(number) for number in SIGNALS]
    with boot_own() as machine:
        with Automatic(Supervisor(machine), "box", suspend=True):
            assert [signal.getsignal(number) for number in SIGNALS] != before
        assert [signal.getsignal(number) for number in SIGNALS] == before


def test_without_a_thread_it_is_not_begun(boot_own, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    before = [signal.getsignal(number) for number in SIGNALS]
    with boot_own() as machine:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with (
            pytest.raises(BackendError, match="no thread for automatic"),
            Automatic(Supervisor(machine), "box"),
        ):
            pass
        assert [signal.getsignal(number) for number in SIGNALS] == before
