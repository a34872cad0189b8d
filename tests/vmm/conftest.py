"""A machine that can be asked, in a thread of this process; and the check that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from snapshot.container import MAGIC
from tests.conftest import OWN
from vmm.control.client import Client
from vmm.control.lifecycle import State
from vmm.control.place import Place
from vmm.control.server import Server
from vmm.control.supervisor import Supervisor
from vmm.debug import selftest
from vmm.machine.machine import Machine
from vmm.saving.save import Contents

LAST_GOOD = MAGIC + b"the last good one"  # what a save is to replace, or to leave


def children() -> set[int]:
    """Processes of this one's threads."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended
            found.update(map(int, (task / "children").read_text().split()))
    return found


def eventually(what, timeout_s=20.0):
    """Until `what()` is true, and what that was."""
    limit = time.monotonic() + timeout_s
    while not (found := what()):
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.005)
    return found


class Box:
    """The own guest, served as `box`."""

    def __init__(self, machine: Machine, folder: Path, paused: bool, start: bool) -> None:
        self.machine = machine
        machine.loop.awaits_input = True
        self.vm = Supervisor(machine)
        self.folder = folder
        self.end: object = None
        self._closed = False
        self._server = Server(self.vm, Place(folder, "box"))
        self._server.__enter__()
        self._thread = threading.Thread(target=self._run, args=(paused,))
        if start:
            self.start()
            eventually(lambda: self.vm.state is not State.CREATED)

    def start(self) -> None:
        self._thread.start()

    def _run(self, paused: bool) -> None:
        try:
            self.end = self.vm.run(paused=paused)
        except BaseException as error:
            self.end = error

    def client(self) -> Client:
        return Client(self.folder, "box", timeout_s=30)

    def call(self, method, **params):
        with self.client() as client:
            return client.call(method, **params)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            self.vm.cancel()
            while self._thread.is_alive():
                self.vm.stop()
                self._thread.join(0.1)
        self._server.__exit__(None, None, None)
        self.machine.close()


@pytest.fixture
def boxes(boot_own, tmp_path_factory):
    """A function that makes a Box. At the end all are closed, and nothing stays: no process, file or thread."""
    before, threads = children(), set(threading.enumerate())
    folder = tmp_path_factory.mktemp("run") / "anyhyve"
    made: list[Box] = []

    def make(paused: bool = False, start: bool = True, machine: Machine | None = None) -> Box:
        made.append(Box(machine or boot_own(), folder, paused, start))
        return made[-1]

    yield make
    for box in made:
        box.close()
    assert children() == before, "a process was left"
    assert not set(threading.enumerate()) - threads, "a thread was left"
    assert not folder.exists() or not os.listdir(folder), "a socket or a lock was left"


@pytest.fixture
def box(boxes):
    return boxes()


@pytest.fixture
def gate(monkeypatch, tmp_path_factory):
    """Saves stand still until the function is called: the copy that writes waits for a file."""
    file = tmp_path_factory.mktemp("gate") / "open"
    fill = Contents.fill

    def wait_and_fill(self, writer):
        writer.progress(1)
        limit = time.monotonic() + 60
        while not file.exists() and time.monotonic() < limit:
            time.sleep(0.002)
        fill(self, writer)

    monkeypatch.setattr(Contents, "fill", wait_and_fill)
    return file.touch


# --- machines of the command line


MAIN = "from vmm.cli.main import main; main()"
PR_SET_PDEATHSIG = 1  # prctl(2)


@pytest.fixture
def environment(tmp_path_factory):
    """XDG folders of the test's own."""
    base = tmp_path_factory.mktemp("xdg")
    (base / "run").mkdir(mode=0o700)
    return {**os.environ, "XDG_RUNTIME_DIR": str(base / "run"), "XDG_STATE_HOME": str(base / "state")}


@pytest.fixture
def anyhyve(environment):
    """A function that runs one command to its end."""

    def run(*arguments, **options):
        command = [sys.executable, "-c", MAIN, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, timeout=60, env=environment, **options)

    return run


@pytest.fixture
def named(environment, anyhyve):
    """A function that starts the own guest under a name. At the end all are stopped, and left no socket behind."""
    made: list[subprocess.Popen[bytes]] = []

    def start(
        name, *arguments, command=("run", "--kernel", OWN, "--flat"), wait=True, main=MAIN, before=None, **options
    ):
        options.setdefault("stdout", subprocess.DEVNULL)  # a pipe nobody reads would stop it in the end

        def begin() -> None:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a test run that is killed leaves no machine
            if before is not None:
                before()

        words = [sys.executable, "-c", main, *map(str, command), "--name", name, *map(str, arguments)]
        made.append(
            subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
                preexec_fn=begin,
                **options,
            )
        )
        sockets = Path(environment["XDG_RUNTIME_DIR"], "anyhyve")
        if wait:
            eventually(lambda: made[-1].poll() is not None or (sockets / f"{name}.sock").exists())
            assert (stderr := made[-1].stderr) is not None
            assert made[-1].poll() is None, stderr.read()
            eventually(lambda: Client(sockets, name).call("status")["state"] in ("running", "paused"))
        return made[-1]

    yield start
    left = []
    for process in made:
        for _ in range(2):  # the first may be to suspend it
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        assert process.stderr is not None
        process.stderr.close()
        if process.pid in sessions():
            left.append(process.args)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    assert not left, "a process was left"
    sockets = Path(environment["XDG_RUNTIME_DIR"], "anyhyve")
    assert not sockets.exists() or not os.listdir(sockets), "a socket or a lock was left"
    assert not list(Path(environment["XDG_STATE_HOME"]).rglob("*.tmp")), "a temporary file was left"


class OnTerminal:
    """A command with a terminal of its own."""

    def __init__(self, environment, *arguments):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-c", MAIN, *map(str, arguments)], environment)
        self.seen = b""

    def until(self, text):
        def look():
            if select.select([self.fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.fd, 1 << 16)
            return text in self.seen

        try:
            eventually(look)
        except AssertionError:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
            raise AssertionError(f"{text!r} never came; seen: {self.seen[-1000:]!r}") from None

    def type(self, data):
        os.write(self.fd, data)

    def wait(self):
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return status


def sessions() -> set[int]:
    """Every session that has a living process."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found.add(int(fields[3]))
    return found


@pytest.fixture
def crossing(kvm: str) -> str:
    """KVM, where it runs our guests; else the test is skipped with the reason."""
    if (why_not := selftest.findings(kvm).runs) is not None:
        pytest.skip(why_not)
    return kvm
