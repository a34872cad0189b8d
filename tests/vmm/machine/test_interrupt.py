"""SIGINT while a machine runs: it is never dropped, and the machine stands between two instructions."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program
from vmm.machine.machine import Machine
from vmm.machine.stop import Stopped, StopReason

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)

COUNTS = "mov $0x3f8, %edx\nmov $'!', %al\nagain: inc %rcx\nout %al, %dx\njmp again"
SOON_NS = 50_000_000


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@each_backend
def test_one_that_comes_within_an_access_waits_until_that_is_done(backend):
    with Program(COUNTS, backend=backend).machine as machine:
        console, shown = machine.board.console, [0]

        def once() -> None:
            shown[0] += 1
            if shown[0] == 3:
                interrupted()

        console.listen(lambda _: once())
        with pytest.raises(KeyboardInterrupt):
            machine.run(until_ns=SOON_NS)
        assert not machine.clock.prepaid and shown[0] >= 3
        assert machine.cpu.save().rcx - console.total in (0, 1)  # no access was lost
        assert machine.run(until_ns=machine.clock.now_ns() + 100_000) == Stopped(StopReason.TIME)


def test_one_that_comes_where_the_engine_calls_is_not_dropped():
    def profile(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_name in ("on_out", "guarded"):  # called, and nothing in it is done yet
            sys.setprofile(None)
            interrupted()

    with Program(COUNTS, backend="emu").machine as machine:
        sys.setprofile(profile)
        try:
            with pytest.raises(KeyboardInterrupt):
                machine.run(until_ns=SOON_NS, seconds=10.0)
        finally:
            sys.setprofile(None)


def test_one_that_comes_with_the_end_of_a_run_is_raised():
    def stop(_machine: Machine) -> Stopped:
        interrupted()
        return Stopped(StopReason.COMMAND)

    with Program(COUNTS, backend="emu").machine as machine:
        machine.post(stop)
        with pytest.raises(KeyboardInterrupt):
            machine.run(until_ns=SOON_NS)
        assert machine.run(until_ns=SOON_NS) == Stopped(StopReason.TIME)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_somebody_elses_is_left_alone():
    heard = threading.Event()
    kept = signal.signal(signal.SIGINT, lambda *_: heard.set())
    try:
        with Program(COUNTS, backend="emu").machine as machine:
            machine.post(lambda _: interrupted())
            assert machine.run(until_ns=SOON_NS) == Stopped(StopReason.TIME)
    finally:
        signal.signal(signal.SIGINT, kept)
    assert heard.is_set()
