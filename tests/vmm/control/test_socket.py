"""The socket itself: hand-written bytes, crowds, broken and slow clients, foreign users, what lies in the way."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.conftest import LAST_GOOD, children, eventually
from vmm.control import place, protocol, server
from vmm.control.client import Client, Failed
from vmm.control.place import Place
from vmm.control.server import Server, _Client
from vmm.control.supervisor import Supervisor
from vmm.errors import BackendError, RequestError
from vmm.machine.machine import Machine


def raw(box) -> socket.socket:
    """Bytes by hand, as `nc -U` sends them."""
    found = socket.socket(socket.AF_UNIX)
    found.settimeout(30)
    found.connect(str(box.folder / "box.sock"))
    return found


def say(box, data, *, half_close=True):
    """All that is answered to `data`, as messages."""
    with raw(box) as wire:
        wire.sendall(data)
        if half_close:
            wire.shutdown(socket.SHUT_WR)
        heard = b""
        while piece := wire.recv(1 << 16):
            heard += piece
    return [json.loads(line) for line in heard.splitlines()]


STATUS = b'{"jsonrpc":"2.0","id":7,"method":"status"}\n'


def test_a_request_by_hand(box):
    (answer,) = say(box, STATUS)
    assert answer["jsonrpc"] == "2.0" and answer["id"] == 7 and answer["result"]["name"] == "box"


def test_many_requests_in_one_piece_and_one_in_many_pieces(box):
    assert {answer["id"] for answer in say(box, b"".join(STATUS.replace(b"7", b"%d" % i) for i in range(100)))} == set(
        range(100)
    )
    with raw(box) as wire:
        for byte in STATUS:
            wire.sendall(bytes((byte,)))
        assert json.loads(wire.recv(1 << 16))["id"] == 7


def test_a_notification_is_done_and_not_answered(box):
    assert say(box, b'{"jsonrpc":"2.0","method":"pause"}\n{"jsonrpc":"2.0","method":"dance"}\n') == []
    assert box.call("status")["state"] == "paused"


@pytest.mark.parametrize(
    ("line", "code", "call"),
    [
        (b"\n", protocol.PARSE, None),
        (b"hello\n", protocol.PARSE, None),
        (b"\xff\xfe\x00\x01junk\n", protocol.PARSE, None),
        (b'{"jsonrpc":"2.0","id":1,"method":"status"', protocol.PARSE, None),
        (b'{"jsonrpc":"2.0","id":1,"method":"stats","params":{"a":NaN}}\n', protocol.PARSE, None),
        (b"[" * 200_000 + b"\n", protocol.PARSE, None),
        (b"1" * 100_000 + b"\n", protocol.PARSE, None),
        (b"[]\n", protocol.INVALID_REQUEST, None),
        (b"[" + STATUS.strip() + b"]\n", protocol.INVALID_REQUEST, None),
        (b'"status"\n', protocol.INVALID_REQUEST, None),
        (b'{"id":1,"method":"status"}\n', protocol.INVALID_REQUEST, 1),
        (b'{"jsonrpc":"1.0","id":1,"method":"status"}\n', protocol.INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","id":"a"}\n', protocol.INVALID_REQUEST, "a"),
        (b'{"jsonrpc":"2.0","id":1,"method":5}\n', protocol.INVALID_REQUEST, 1),
        (b'{"jsonrpc":"2.0","id":[1],"method":"status"}\n', protocol.INVALID_REQUEST, None),
        (b'{"jsonrpc":"2.0","id":1,"method":"status","params":[1]}\n', protocol.INVALID_PARAMS, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"dance"}\n', protocol.UNKNOWN_METHOD, 1),
        (b'{"jsonrpc":"2.0","id":1,"method":"__init__"}\n', protocol.UNKNOWN_METHOD, 1),
        (b"x" * (10 << 20) + b"\n", protocol.INVALID_REQUEST, None),
        (b"x" * (10 << 20), protocol.INVALID_REQUEST, None),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else str(value),
)
def test_what_is_no_request_is_answered_so(box, line, code, call):
    with raw(box) as wire:

        def send() -> None:
            try:
                wire.sendall(line)
                wire.shutdown(socket.SHUT_WR)
            except OSError:  # it was cut off in the middle of too much
                pass

        sender = threading.Thread(target=send)
        sender.start()
        answer = json.loads(wire.makefile("rb").readline())
        sender.join()
    assert answer["error"]["code"] == code and answer["id"] == call, answer
    assert box.call("status")["state"] == "running"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | JSON,
        "id": JSON,
        "method": st.sampled_from(("status", "devices", "checkpoint")) | JSON,
        "params": JSON,
    },
)


@given(st.binary(max_size=60) | (JSON | REQUEST).map(lambda value: json.dumps(value).encode()))
def test_any_line_is_a_request_or_one_error(line):
    try:
        request = protocol.parse(line)
    except protocol.RpcError as error:
        assert error.code in protocol.CODES
        json.loads(protocol.pack_error(error, protocol.id_of(line)))
    else:
        assert isinstance(request.method, str) and isinstance(request.params, dict)


def test_junk_is_answered_line_by_line(box):
    box.call("pause")

    @given(st.lists(st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"")), max_size=20))
    def check(lines):
        answers = say(box, b"".join(line + b"\n" for line in [*lines, STATUS.strip()]))
        assert len(answers) == len(lines) + 1
        assert sum("result" in answer for answer in answers) == 1

    check()


# --- crowds


def test_two_hundred_clients_at_once(box):
    clients = [box.client() for _ in range(200)]
    try:
        for client in clients:
            client.ask("status")
        assert all(client.read()["result"]["name"] == "box" for client in clients)
        before = box.call("status")["position"]
        eventually(lambda: box.call("status")["position"] > before)
    finally:
        for client in clients:
            client.close()


def test_one_client_too_many_is_told_so(box, monkeypatch):
    monkeypatch.setattr(server, "MAX_CLIENTS", 2)
    with box.client() as first, box.client() as second:
        first.call("status")
        second.call("status")
        with box.client() as third, pytest.raises(Failed, match="there are 2 clients already") as failed:
            third.call("status")
        assert failed.value.code == protocol.REFUSED
    eventually(lambda: not box._server._clients)
    box.call("status")


def test_who_does_not_read_keeps_nobody_waiting(box):
    """It asks for a megabyte of answers a hundred times over, and takes none: what waits for it stays bounded."""
    with raw(box) as wire:
        wire.settimeout(0.2)
        wire.sendall(b'{"jsonrpc":"2.0","id":0,"method":"events"}\n')
        with pytest.raises(TimeoutError):
            while True:
                wire.sendall(b'{"jsonrpc":"2.0","id":1,"method":"devices"}\n' * 100)
        for _ in range(2 * server.MAX_EVENTS):  # two megabytes: more than the ways to it hold, whatever came before
            box.vm.tell("warning", text="x" * 4000)
        before = box.call("status")["position"]
        eventually(lambda: box.call("status")["position"] > before)
        (slow,) = [each for each in box._server._clients if each.events]
        assert slow._news.qsize() <= server.MAX_EVENTS and slow._lost
        assert slow._writer.transport.get_write_buffer_size() < 1 << 20
        assert len(slow._calls) <= server.MAX_CALLS


def test_lost_events_are_counted(box):
    with box.client() as client:
        client.call("events", kinds=["warning"])
        box.call("pause")
        done = threading.Event()

        def flood() -> None:  # in the server's thread: nobody is told in between
            for i in range(server.MAX_EVENTS + 10):
                box._server._spread("warning", {"text": str(i)})
            done.set()

        box._server._loop.call_soon_threadsafe(flood)
        done.wait()
        got = [client.read()["params"]["text"] for _ in range(server.MAX_EVENTS)]
        assert got == [str(i) for i in range(server.MAX_EVENTS)]
        box.vm.tell("warning", text="last")
        assert client.read()["params"] == {"kind": "warning", "text": "last", "lost": 10}
        box.vm.tell("warning", text="since")
        assert client.read()["params"] == {"kind": "warning", "text": "since"}, "told once"


def test_a_long_answer_is_searched_once(tmp_path, monkeypatch):
    """For its end: what was searched before is searched no more."""
    searched = [0]

    class Counting(bytearray):
        def find(self, what, start=0, *end):
            searched[0] += len(self) - start
            return super().find(what, start, *end)

        def __contains__(self, what):
            searched[0] += len(self)
            return super().__contains__(what)

    answer = b'{"id":1,"result":"%s"}\n' % (b"x" * (4 << 20))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "box.sock"))
        tmp_path.chmod(0o700)
        listener.listen()
        with Client(tmp_path, "box") as client:
            client._heard = Counting()
            end, _ = listener.accept()
            sending = threading.Thread(target=lambda: end.sendall(answer + b'{"id":2}\n'))
            sending.start()
            assert len(client.read()["result"]) == 4 << 20 and client.read() == {"id": 2}
            sending.join()
            end.close()
    assert searched[0] < 3 * len(answer)


def test_a_client_that_cannot_be_served_is_cut_off(box, monkeypatch):
    """For want of memory, say: it hears the end, the next is served, and no descriptor stays."""
    box.call("status")
    eventually(lambda: not box._server._clients)
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr("asyncio.open_connection", lambda **_: (_ for _ in ()).throw(MemoryError))
        with raw(box) as wire:
            assert wire.recv(1) == b""
    assert box.call("status")["state"] == "running"
    eventually(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_nobody_is_told_anything_any_more_when_it_has_ended(boxes):
    box = boxes()
    box.call("status")
    box.close()
    assert not box.vm.listeners and not box.machine.board.console._listeners


def test_who_has_left_is_not_told_of_anything(box):
    for _ in range(5):
        with box.client() as client:
            client.call("events")
            client.call("console.read", offset=None)
    eventually(lambda: not box._server._clients)
    eventually(lambda: len(asyncio.all_tasks(box._server._loop)) == 2)  # the server, and who waits for the next
    box.vm.tell("warning", text="to nobody")
    assert box.call("status")["state"] == "running"


def test_a_machine_that_leaves_with_a_question_unread(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "box.sock"))
        listener.listen()
        with Client(tmp_path, "box") as client:
            end, _ = listener.accept()
            end.sendall(b'{"id":1}\n')
            client.ask("status")
            end.close()
            assert client.read() == {"id": 1}, "what it said before"
            with pytest.raises(BackendError, match="box: the machine has ended"):
                client.read()


SAVE_AND_WAIT = """
import sys
from pathlib import Path
from vmm.control.client import Client
Client(Path(sys.argv[1]), "box").call(sys.argv[2], path=sys.argv[3])
"""


@pytest.mark.parametrize("method", ["checkpoint", "suspend"])
def test_the_client_is_killed_in_mid_save(box, tmp_path, gate, method):
    """What it asked for is done."""
    file = tmp_path / "cut"
    client = subprocess.Popen([sys.executable, "-c", SAVE_AND_WAIT, box.folder, method, file])
    (helper,) = eventually(lambda: children() - {client.pid})
    client.send_signal(signal.SIGKILL)
    client.wait()
    gate()
    eventually(lambda: file.exists())
    eventually(lambda: helper not in children())
    Machine.restore(file, verify=True).close()
    if method == "checkpoint":
        before = box.call("status")["position"]
        eventually(lambda: box.call("status")["position"] > before)
    else:
        eventually(lambda: box.end)
    assert [each.name for each in tmp_path.iterdir()] == ["cut"]


@pytest.mark.parametrize("method", ["checkpoint", "suspend"])
def test_the_process_that_writes_is_killed(box, tmp_path, gate, method):
    """The client is told, the machine runs on, the last good snapshot is still there; the next save succeeds."""
    file = tmp_path / "cut"
    file.write_bytes(LAST_GOOD)
    with box.client() as client:
        call = client.ask(method, path=str(file))
        (helper,) = eventually(children)
        os.kill(helper, signal.SIGKILL)
        answer = client.read()
        assert answer["id"] == call and answer["error"]["code"] == protocol.HOST
        assert "the process writing it was ended by signal 9" in answer["error"]["message"]
        assert [each.name for each in tmp_path.iterdir()] == ["cut"] and file.read_bytes() == LAST_GOOD
        before = client.call("status")["position"]
        eventually(lambda: client.call("status")["position"] > before)
        gate()
        client.call("checkpoint", path=str(file))
    Machine.restore(file, verify=True).close()


def test_a_terminals_or_managers_signals_do_not_reach_who_writes(box, tmp_path, gate):
    with box.client() as client:
        call = client.ask("checkpoint", path=str(tmp_path / "cut"))
        (helper,) = eventually(children)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            os.kill(helper, number)
        gate()
        assert "result" in (answer := client.read()) and answer["id"] == call


def test_who_writes_holds_nothing_of_the_machine_open(box, tmp_path, gate):
    with box.client() as client:
        client.ask("checkpoint", path=str(tmp_path / "cut"))
        (helper,) = eventually(children)
        allowed = ("/dev/null", "pipe:", f"{tmp_path}/.")  # the temporary

        def clean():
            with contextlib.suppress(FileNotFoundError):  # closed while we look
                links = [os.readlink(f"/proc/{helper}/fd/{fd}") for fd in os.listdir(f"/proc/{helper}/fd")]
                return all(link.startswith(allowed) for link in links)

        eventually(clean)
        gate()
        client.read()


def test_the_end_of_the_machine_takes_no_save_back(box, tmp_path, gate):
    file = tmp_path / "cut"
    with box.client() as client:
        call = client.ask("checkpoint", path=str(file))
        eventually(children)
        box.call("stop")
        eventually(lambda: box.end)
        closing = threading.Thread(target=box.close)
        closing.start()
        time.sleep(1.5 * server._FAREWELL_S)  # longer than what is left unanswered otherwise
        assert not file.exists()
        gate()
        answer = client.read()
        assert answer["id"] == call and answer["result"]["path"] == str(file)
        closing.join()
    Machine.restore(file, verify=True).close()


def test_a_machine_that_comes_to_no_safe_point_is_not_saved(box, tmp_path):
    """Whoever reads its console is stuck: the save fails within its limit, and the machine runs on."""
    box.vm.quiesce_s = 0.2
    entered, stuck = threading.Event(), threading.Event()

    def listener(_byte: int) -> None:
        entered.set()
        stuck.wait(30)

    box.machine.board.console.listen(listener)
    assert entered.wait(30)
    for method in ("checkpoint", "suspend"):
        with pytest.raises(Failed, match=r"no safe point came in 0.2 s; the machine runs on") as failed:
            box.call(method, path=str(tmp_path / "cut"))
        assert failed.value.code == protocol.HOST
    with pytest.raises(Failed, match=r"no safe point came in 0.2 s; nothing was done"):
        box.call("pause")
    stuck.set()
    before = box.call("status")
    assert before["state"] == "running"
    eventually(lambda: box.call("status")["position"] > before["position"])
    assert not list(tmp_path.iterdir())
    box.call("checkpoint", path=str(tmp_path / "cut"))


# --- whose socket it is


AS_SOMEBODY_ELSE = """
import json, os, socket, sys
os.setuid(65534)
wire = socket.socket(socket.AF_UNIX)
wire.connect(sys.argv[1])
try:
    wire.sendall(b'{"jsonrpc":"2.0","id":1,"method":"stop"}\\n')
except BrokenPipeError:  # it was cut off already; what was said before can be read
    pass
print(wire.makefile().readline())
"""


def test_another_user_is_refused(box):
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    run = [sys.executable, "-S", "-c", AS_SOMEBODY_ELSE, str(box.folder / "box.sock")]
    kept_out = subprocess.run(run, capture_output=True, text=True)
    assert kept_out.returncode == 1 and "PermissionError" in kept_out.stderr, "by the folder"
    folder = box.folder
    while folder.parent != folder:  # then by us, were the folder open
        os.chmod(folder, folder.stat().st_mode | 0o055)
        folder = folder.parent
    os.chmod(box.folder / "box.sock", 0o777)
    heard = subprocess.run(run, capture_output=True, text=True)
    assert json.loads(heard.stdout) == {
        "jsonrpc": "2.0", "id": None,
        "error": {"code": protocol.REFUSED, "message": "uid 65534 may not control this machine"},
    }  # fmt: skip
    os.chmod(box.folder, 0o700)
    assert box.call("status")["state"] == "running"


def test_root_may_ask_anybodys_machine(box, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can be root")
    with raw(box) as wire:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)  # the machine is somebody else's
        wire.sendall(STATUS)
        assert json.loads(wire.makefile("rb").readline())["result"]["name"] == "box"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "run"
    made.mkdir(mode=0o700)
    return made


class Deaf(socket.socket):
    """It ends before it listens."""

    def listen(self, *_):
        raise OSError(28, "No space left on device")


def test_a_socket_has_its_name_when_it_listens(tmp_path, monkeypatch):
    """Who sees it can connect: there is no moment at which a machine that starts looks like one that has ended."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(BackendError, match="No space left"):
        patched.setattr(socket, "socket", Deaf)
        Place(folder, "box")
    assert not (folder / "box.sock").exists()
    with Place(folder, "box"):
        assert sorted(path.name for path in folder.iterdir()) == ["box.lock", "box.sock"]


def test_a_place_is_taken_once(folder):
    with Place(folder, "box"), pytest.raises(RequestError, match="a machine named box runs already"):
        Place(folder, "box")
    assert not os.listdir(folder)
    with Place(folder, "box"):
        assert (folder / "box.sock").stat().st_mode & 0o777 == 0o600
        assert list(place.names(folder)) == ["box"]


DIE = """
import os, sys
from pathlib import Path
from vmm.control.place import Place
Place(Path(sys.argv[1]), "box")
os._exit(0)
"""


def test_a_stale_socket_is_replaced(folder):
    subprocess.run([sys.executable, "-c", DIE, folder], check=True)
    assert sorted(os.listdir(folder)) == ["box.lock", "box.sock"]
    assert list(place.names(folder)) == []
    with pytest.raises(RequestError, match=r"no machine named box runs here: .*box.sock: stale"):
        Client(folder, "box")
    with Place(folder, "box"):
        assert list(place.names(folder)) == ["box"]
    assert not os.listdir(folder)


@pytest.mark.parametrize("what", ["file", "folder", "link", "link to a socket", "fifo", "dangling link"])
def test_what_is_not_ours_is_neither_followed_nor_removed(folder, tmp_path, what):
    there, target = folder / "box.sock", tmp_path / "target"
    match what:
        case "file":
            there.write_bytes(b"precious")
        case "folder":
            there.mkdir()
        case "fifo":
            os.mkfifo(there)
        case "link":
            target.write_bytes(b"precious")
            there.symlink_to(target)
        case "link to a socket":
            socket.socket(socket.AF_UNIX).bind(str(target))
            there.symlink_to(target)
        case "dangling link":
            there.symlink_to(target)
    before = there.lstat()
    with pytest.raises(BackendError, match=r"box.sock: in the way, and not a socket of ours"):
        Place(folder, "box")
    with pytest.raises(
        (BackendError, RequestError), match=r"no machine named box runs here|a symbolic link, which we do not follow"
    ):
        Client(folder, "box")
    assert there.lstat() == before and os.listdir(folder) == ["box.sock"]
    assert not target.is_file() or target.read_bytes() == b"precious"


def test_a_link_in_the_locks_place_is_not_followed(folder, tmp_path):
    (folder / "box.lock").symlink_to(tmp_path / "target")
    with pytest.raises(BackendError, match=r"box.lock: not a lock of ours"):
        Place(folder, "box")
    assert not (tmp_path / "target").exists() and (folder / "box.lock").is_symlink()


def test_a_socket_put_there_since_is_left_alone(folder):
    with Place(folder, "box"):
        (folder / "box.sock").unlink()
        (folder / "box.sock").write_bytes(b"precious")
    assert (folder / "box.sock").read_bytes() == b"precious"


def test_a_folder_open_to_others_is_refused(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(BackendError, match="not a folder of this user alone"):
        Place(tmp_path / "open", "box")
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(BackendError, match="link: "):
        Place(tmp_path / "link", "box")
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="file: Not a directory"):
        Place(tmp_path / "file", "box")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "x" * 65, "a\n", "ä"])
def test_what_cannot_name_a_machine(folder, name):
    with pytest.raises(RequestError, match="cannot name a machine"):
        Place(folder, name)
    assert not os.listdir(folder)


def test_a_folder_of_any_depth(tmp_path):
    deep = tmp_path / ("x" * 100) / ("y" * 100)
    with Place(deep, "box"):
        assert list(place.names(deep)) == ["box"]


def test_the_folder_by_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert str(place.rundir()) == "/run/user/7/anyhyve"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert str(place.rundir()) == f"/tmp/anyhyve-{os.getuid()}"


def test_its_name_is_gone_before_anybody_is_cut_off(boot_own, tmp_path, monkeypatch):
    """So that who is cut off can tell an end from a kill."""
    seen = []
    farewell = _Client.farewell

    async def watched(self):
        seen.append((tmp_path / "box.sock").exists())
        await farewell(self)

    monkeypatch.setattr(_Client, "farewell", watched)
    with boot_own() as machine, Server(Supervisor(machine), Place(tmp_path, "box")):
        assert (tmp_path / "box.sock").exists()
        client = Client(tmp_path, "box")
        client.call("status")
    client.close()
    assert seen == [False]


def test_events_that_come_before_the_answer(monkeypatch, tmp_path):
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(place, "connect", lambda *_: ours)
    event = protocol.pack(method="event", params={"kind": "saved", "path": "x"})
    theirs.sendall(event + protocol.pack(id=1, result=5))
    seen: list[object] = []
    with theirs, Client(tmp_path, "box") as client:
        assert client.call("status", seen.append) == 5
    assert seen == [{"kind": "saved", "path": "x"}]
