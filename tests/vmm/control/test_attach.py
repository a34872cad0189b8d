"""Joined to a console: all the guest writes is shown, all that is typed reaches it, and who leaves ends nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from tests.vmm.conftest import MAIN, OnTerminal, eventually
from vmm.control import attach, protocol
from vmm.control.methods import MAX_TYPED

MONITOR = b"\x1d"
LEAVE = b"dD"
ALL = bytes(range(256))


def words(box):
    return "attach", "--rundir", box.folder, "box"


@pytest.mark.parametrize("key", [LEAVE[n : n + 1] for n in range(len(LEAVE))])
def test_on_a_terminal(boxes, key):
    """Every key goes to the guest as it is but the monitor's, and the one behind that, of which four leave."""
    box = boxes(paused=True)
    console = box.machine.board.console
    terminal = OnTerminal(os.environ, *words(box))
    terminal.until(b"Ctrl-] then d leaves it running")
    for half in ALL[:128], ALL[128:]:
        for byte in half:
            console.transmit(byte)
        terminal.until(half)
    plain = ALL.replace(MONITOR, b"")
    terminal.type(plain)
    eventually(lambda: bytes(console.typed) == plain)
    terminal.type(b"".join(MONITOR + bytes([byte]) for byte in ALL if byte not in LEAVE))
    eventually(lambda: bytes(console.typed) == plain + MONITOR)
    terminal.type(MONITOR + key)
    assert terminal.wait() == 0
    assert box.call("status")["state"] == "paused"


def test_the_monitor_says_its_keys(boxes):
    box = boxes(paused=True)
    terminal = OnTerminal(os.environ, *words(box))
    for key in (b"", MONITOR + b"?", MONITOR + b"x"):
        terminal.type(key)
        terminal.until(b"Ctrl-] then d leaves it running, Ctrl-] sends it, ? says this\r\n")
        terminal.seen = b""
    terminal.type(MONITOR + b"d")
    assert terminal.wait() == 0
    assert not box.machine.board.console.typed


@pytest.mark.parametrize("typed", [b"last words", bytes([65]) * 1000])
def test_what_was_typed_before_it_is_left_is_sent(boxes, typed):
    """In the same read."""
    box = boxes(paused=True)
    terminal = OnTerminal(os.environ, *words(box))
    terminal.until(b"leaves it running")
    terminal.type(typed + MONITOR + b"d" + b"not this")
    assert terminal.wait() == 0
    assert bytes(box.machine.board.console.typed) == typed


def test_what_was_typed_while_the_machine_is_slow_to_answer_is_sent(boxes):
    """Only part of it had been sent when the user left."""
    box = boxes(paused=True)
    for byte in b"shown before":
        box.machine.board.console.transmit(byte)
    terminal = OnTerminal(os.environ, *words(box))
    terminal.until(b"shown before")
    box._server._loop.call_soon_threadsafe(time.sleep, 0.5)
    terminal.type(b"a")
    time.sleep(0.2)
    terminal.type(b"b" + MONITOR + b"d")
    assert terminal.wait() == 0
    assert bytes(box.machine.board.console.typed) == b"ab"


def test_it_can_be_left_though_the_guest_takes_no_more(boxes):
    box = boxes(paused=True)
    box.machine.board.console.typed.extend(bytes(MAX_TYPED))
    terminal = OnTerminal(os.environ, *words(box))
    terminal.until(b"leaves it running")
    terminal.type(b"x" + MONITOR + b"d")
    assert terminal.wait() == 0
    assert len(box.machine.board.console.typed) == MAX_TYPED


def test_it_can_be_left_though_the_machine_does_not_answer(named, environment):
    box = named("box")
    terminal = OnTerminal(environment, "attach", "box")
    terminal.until(b"leaves it running")
    terminal.until(b"round")
    box.send_signal(signal.SIGSTOP)
    try:
        terminal.type(b"x" + MONITOR + b"d")
        assert terminal.wait() == 0
    finally:
        box.send_signal(signal.SIGCONT)


def test_without_a_terminal_there_is_no_monitor(boxes):
    """All is the guest's, and the end of what is typed is no end: what the guest writes is shown on."""
    box = boxes(paused=True)
    console = box.machine.board.console
    command = [sys.executable, "-c", MAIN, *map(str, words(box))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as attached:
        assert attached.stdin is not None and attached.stdout is not None and attached.stderr is not None
        attached.stdin.write(MONITOR + b"d" + ALL)
        attached.stdin.close()
        eventually(lambda: bytes(console.typed) == MONITOR + b"d" + ALL)
        for byte in ALL:
            console.transmit(byte)
        assert attached.stdout.read(len(ALL)) == ALL
        box.close()
        assert b"box: the machine has ended" in attached.stderr.read()
        assert attached.wait() == 0


def test_a_machine_that_is_not_there_yet_is_waited_for(boxes, monkeypatch):
    before = boxes()
    before.close()
    looked = []
    monkeypatch.setattr(
        attach, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: looked.append(boxes()))
    )
    with attach._client(before.folder, "box", 60) as client:
        assert client.call("status")["name"] == "box"
    assert len(looked) == 1


def test_a_machine_that_takes_no_more_is_said(boxes):
    box = boxes(paused=True)
    terminal = OnTerminal(os.environ, *words(box))
    terminal.until(b"leaves it running")
    box.call("stop")
    eventually(lambda: box.end)
    terminal.type(b"x")
    terminal.until(b"box: console.write: the machine is stopped")
    assert terminal.wait() == 1


def test_an_error_that_answers_no_question_is_said(boxes):
    box = boxes(paused=True)
    terminal = OnTerminal(os.environ, *words(box))
    terminal.until(b"leaves it running")
    (client,) = eventually(lambda: list(box._server._clients))  # it has connected; it may not have been met
    told = protocol.pack_error(protocol.RpcError(protocol.REFUSED, "no more of you"), None)
    asyncio.run_coroutine_threadsafe(client._say(told), box._server._loop)
    terminal.until(b"box: no more of you")
    assert terminal.wait() == 1


def test_the_end_of_what_is_typed_is_read_once(boxes, monkeypatch, capfdbinary):
    """It is there for whoever reads again, for ever."""
    box, reads = boxes(paused=True), []

    def read(fd, _most):
        reads.append(fd)
        return b""

    monkeypatch.setattr(attach, "os", SimpleNamespace(read=read))
    monkeypatch.setattr("select.select", lambda sources, *_: (sources, [], []))
    joined = threading.Thread(target=attach.attach, args=(box.folder, "box"))
    joined.start()
    eventually(lambda: reads)
    box.close()
    joined.join()
    assert reads == [0]
