"""Far ends of serial ports: given at boot and at restore, never saved, and no trouble to the machine."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time

import pytest

from snapshot.chain import Chain
from tests.vmm.conftest import eventually
from tests.vmm.cpu.program import Program, echo_program
from vmm.board.config import MachineConfig
from vmm.errors import BackendError, RequestError
from vmm.guest.image import Image
from vmm.host.bindings import Bindings
from vmm.host.console import Console
from vmm.machine.machine import Machine

pytestmark = pytest.mark.no_roundtrip("far ends are looked at between")

COM2 = 0x2F8


@pytest.fixture
def echo():
    """A function that boots a guest which sends back each character of COM2, one on, until a full stop comes."""
    code = Program(echo_program(COM2)).machine.image

    def boot(**bind: str) -> Machine:
        assert code is not None
        return Machine.boot(MachineConfig(memory_bytes=4 << 20), code, bind=bind)

    return boot


def in_a_thread(machine: Machine) -> threading.Thread:
    thread = threading.Thread(target=machine.run, daemon=True)
    thread.start()
    return thread


def test_a_socket_speaks_with_one_client_after_the_other(echo, tmp_path):
    path = tmp_path / "com2"
    with echo(com2=f"socket:{path}") as machine:
        assert machine.far_ends == {"com2": str(path)} and machine.loop.awaits_input
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        running = in_a_thread(machine)
        for said in (b"HAL", b"IBM"):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(20)
                client.connect(str(path))
                time.sleep(0.05)
                client.sendall(said)
                heard = b""
                while len(heard) < len(said):
                    heard += client.recv(10)
                assert heard == bytes(byte + 1 for byte in said)
        machine.board.consoles["com2"].send(b".")
        running.join(20)
        assert not running.is_alive()
    assert not path.exists()


def test_a_pseudo_terminal(echo):
    with echo(com2="pty") as machine:
        running = in_a_thread(machine)
        terminal = os.open(machine.far_ends["com2"], os.O_RDWR | os.O_NOCTTY)
        os.write(terminal, b"HAL")
        heard = b""
        while len(heard) < 3:
            heard += os.read(terminal, 10)
        assert heard == b"IBM"
        os.write(terminal, b".")
        running.join(20)
        os.close(terminal)
        assert not running.is_alive()


def test_a_file_is_appended_to(echo, tmp_path):
    path = tmp_path / "com2"
    path.write_bytes(b"before ")
    for said in (b"HAL.", b"xyz."):
        with echo(com2=f"file:{path}") as machine:
            machine.board.consoles["com2"].send(said)
            assert str(machine.run()).startswith("exit")
    assert path.read_bytes() == b"before IBMyz{"


def test_what_had_somebody_there_has_to_be_given_again(echo, tmp_path):
    saved = tmp_path / "saved"
    with echo(com2=f"file:{tmp_path / 'first-end'}", com1="null") as machine:
        machine.board.consoles["com2"].send(b"A")
        machine.run(position=20_000)
        machine.save(saved)
        with Chain(saved) as chain:
            assert chain.parts["config"].state["bound"] == ["com1", "com2"]
    assert b"first-end" not in saved.read_bytes(), "who it was is not saved"
    with pytest.raises(RequestError, match=r"com1 had something at its far end: .*--bind com1="):
        Machine.restore(saved)
    with pytest.raises(RequestError, match=r"com2 had something at its far end"):
        Machine.restore(saved, bind={"com1": "null"})
    Machine.check(saved)  # the file is good
    with Machine.restore(saved, bind={"com1": "null", "com2": f"file:{tmp_path / 'two'}"}) as woken:
        woken.board.consoles["com2"].send(b"B.")
        woken.run()
    assert (tmp_path / "two").read_bytes() == b"C"
    assert (tmp_path / "first-end").read_bytes() == b"B"


@pytest.mark.parametrize(
    ("name", "spec", "error", "why"),
    [
        ("com9", "null", RequestError, "com9: no part with a far end; there are com1"),
        ("com2", "nobody", RequestError, "not one of console, null, file:PATH, pty, socket:PATH"),
        ("com2", "file:", RequestError, "not one of"),
        ("com2", "pty:x", RequestError, "not one of"),
        ("com2", "file:/dev/null", RequestError, "no regular file"),
        ("com2", "file:/nowhere/at/all", BackendError, "No such file or directory"),
        ("com2", "socket:/nowhere/at/all", BackendError, "No such file or directory"),
        ("com2", "socket:/tmp/" + "x" * 200, BackendError, "too long"),
    ],
)
def test_a_far_end_that_cannot_be_had(name, spec, error, why):
    with pytest.raises(error, match=why):
        Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xf4", flat=True), bind={name: spec})


def test_what_lies_in_a_sockets_place_stays(tmp_path):
    consoles = {"com2": Console()}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BackendError, match="Address already in use"):
        Bindings(consoles, {"com2": f"socket:{tmp_path / 'file'}"})
    assert (tmp_path / "file").read_text() == "mine"
    ours = Bindings(consoles, {"com2": f"socket:{tmp_path / 'socket'}"})
    with pytest.raises(BackendError, match="Address already in use"):
        Bindings(consoles, {"com2": f"socket:{tmp_path / 'socket'}"})
    ours.close()
    gone = socket.socket(socket.AF_UNIX)
    gone.bind(str(tmp_path / "stale"))
    gone.close()
    Bindings(consoles, {"com2": f"socket:{tmp_path / 'stale'}"}).close()
    assert not (tmp_path / "stale").exists()


def test_one_that_cannot_be_had_gives_the_others_up(tmp_path):
    consoles = {"com1": Console(), "com2": Console()}
    before = set(threading.enumerate())
    with pytest.raises(RequestError):
        Bindings(consoles, {"com1": f"socket:{tmp_path / 'socket'}", "com2": "nobody"})
    assert set(threading.enumerate()) == before and not (tmp_path / "socket").exists()


def test_a_client_that_never_reads_does_not_stop_the_machine(tmp_path):
    console = Console()
    ends = Bindings({"com2": console}, {"com2": f"socket:{tmp_path / 'socket'}"})
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "socket"))
        eventually(lambda: ends._ends["com2"]._stream is not None)  # type: ignore[attr-defined]
        for _ in range(3 << 20):
            console.transmit(0x55)
        assert len(ends._ends["com2"]._waiting) <= 1 << 20  # type: ignore[attr-defined]
    ends.close()


def test_nothing_is_left(echo, tmp_path):
    before, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with echo(com1="pty", com2=f"socket:{tmp_path / 'socket'}", com3=f"file:{tmp_path / 'file'}") as machine:
            machine.run(position=10_000)
    assert set(threading.enumerate()) == before and len(os.listdir("/proc/self/fd")) == files


def test_who_has_said_all_may_still_listen(echo, tmp_path):
    path = tmp_path / "com2"
    with echo(com2=f"socket:{path}") as machine, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        running = in_a_thread(machine)
        time.sleep(0.05)
        client.sendall(b"HAL.")
        client.shutdown(socket.SHUT_WR)
        heard = b""
        while len(heard) < 3:
            heard += client.recv(10)
        assert heard == b"IBM"
        running.join(20)


def test_what_is_typed_waits_where_it_comes_from(tmp_path):
    """A guest that takes nothing: what comes is left with the client, and memory does not grow."""
    console = Console()
    ends = Bindings({"com2": console}, {"com2": f"socket:{tmp_path / 'socket'}"})
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "socket"))
        client.setblocking(False)
        sent = 0
        for _ in range(200):
            try:
                sent += client.send(bytes(1 << 16))
            except BlockingIOError:
                time.sleep(0.005)
        assert console.full and len(console.typed) < 1 << 17 and sent < 1 << 20
        before = len(console.typed)
        console.take(lambda data: min(len(data), 100))
        assert len(console.typed) == before - 100
    ends.close()


def test_a_second_machine_does_not_wait_for_the_firsts_socket(tmp_path):
    path, waiting = tmp_path / "socket", []
    ours = Bindings({"com2": Console()}, {"com2": f"socket:{path}"})
    for _ in range(6):  # more than may wait
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        waiting.append(client)
        with contextlib.suppress(BlockingIOError):
            client.connect(str(path))
    with pytest.raises(BackendError, match="Address already in use"):
        Bindings({"com2": Console()}, {"com2": f"socket:{path}"})
    for client in waiting:
        client.close()
    ours.close()
