"""Saves nobody asks for at the time leave signals as they were, and need nothing that may be wanting when they come."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from vmm.control import catalog
from vmm.control.automatic import Automatic
from vmm.control.supervisor import Supervisor
from vmm.errors import BackendError
from vmm.machine.machine import Machine, Stopped, StopReason

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def test_signals_are_as_before(boot_own, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = [signal.getsignal(number) for number in SIGNALS]
    with boot_own() as machine:
        with Automatic(Supervisor(machine), "box", suspend=True):
            assert [signal.getsignal(number) for number in SIGNALS] != before
        assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("name", ["box", None])
def test_a_signal_that_is_ignored_stays_so(boot_own, monkeypatch, name):
    """As under nohup."""
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with boot_own() as machine, Automatic(Supervisor(machine), name):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_without_a_thread_it_is_not_begun(boot_own, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    before = [signal.getsignal(number) for number in SIGNALS]
    with boot_own() as machine:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with (
            pytest.raises(BackendError, match="no thread for automatic"),
            Automatic(Supervisor(machine), "box", suspend=True),
        ):
            pass
        assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("suspend", [False, True])
def test_a_signal_ends_it_and_saves_if_it_shall(boot_own, tmp_path, monkeypatch, suspend, number):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with boot_own() as machine:
        vm = Supervisor(machine)

        def stop(kind, _details):
            if kind == "saved":
                vm.stop()  # in vain, where it has ended

        vm.listeners.append(stop)
        vm.at_safe_point(lambda: os.kill(os.getpid(), number))
        with Automatic(vm, "box", suspend=suspend):
            assert vm.run() == Stopped(StopReason.SUSPENDED if suspend else StopReason(number.name))
        vm.close()
        if not suspend:
            assert catalog.entries("box") == []
            return
        with Machine.restore(catalog.newest("box")) as woken:
            assert woken.digests() == machine.digests()


def test_it_saves_every_so_often_and_the_machine_runs_on(boot_own, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    saved = []
    with boot_own() as machine:
        vm = Supervisor(machine)

        def listen(kind, details):
            if kind == "saved":
                saved.append(details["path"])
                if len(saved) == 2:
                    vm.stop()

        vm.listeners.append(listen)
        with Automatic(vm, "box", autosave_s=0.01):
            assert vm.run() == Stopped(StopReason.STOPPED)
        vm.close()
    assert set(saved) == {str(catalog.folder("box") / catalog.AUTOSAVED)}
