"""A command at a guest's shell: what it writes comes back to the byte, whatever else the console shows meanwhile."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.errors import GuestError, RequestError
from vmm.guest.image import Image
from vmm.host.console import NO_TEXT, Console
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason
from vmm.testing import shell
from vmm.testing.expect import Expect

KERNEL = b"[   12.345678] usb 1-1: new device\r\n"


class Computer:
    """A machine whose guest is a shell of this computer, at a terminal. What it writes is cut by a kernel's lines,
    after each so many bytes of `cuts`."""

    def __init__(self, words: list[str], folder: object, path: str | None = None) -> None:
        self.board, self.clock = SimpleNamespace(console=Console()), SimpleNamespace(now_ns=lambda: 0)
        self.cuts: list[int] = []
        self._posted: list[Any] = []
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(str(folder))
            environment = {"PATH": os.environ["PATH"] if path is None else path, "HOME": str(folder), "PS1": "# "}
            os.execvpe(words[0], words, {**environment, "TERM": "dumb"})

    def send(self, data: bytes) -> None:
        assert all(len(line) < 255 for line in data.split(b"\n")), "MAX_CANON"
        os.write(self._fd, data)

    def post(self, command: Any) -> None:
        self._posted.append(command)

    def run(self, *, until: str | None, since: int, seconds: float, **_: Any) -> Any:
        console, ends_at = self.board.console, time.monotonic() + seconds
        console.watch(until, since)
        while time.monotonic() < ends_at:
            if self._posted:
                return self._posted.pop(0)(self)
            if console.found:
                return Stopped(StopReason.PATTERN)
            if select.select([self._fd], [], [], 0.05)[0]:
                try:
                    self._show(os.read(self._fd, 4096))
                except OSError:
                    return Stopped(StopReason.HALTED)
        return Stopped(StopReason.TIMEOUT)

    def _show(self, data: bytes) -> None:
        for byte in data:
            if self.cuts:
                self.cuts[0] -= 1
                if self.cuts[0] <= 0:
                    self.cuts.pop(0)
                    for each in KERNEL:
                        self.board.console.transmit(each)
            self.board.console.transmit(byte)

    def close(self) -> None:
        os.close(self._fd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def talking(computer: Computer, *, wall_seconds: float = 20.0) -> Expect:
    return Expect(cast(Machine, computer), wall_seconds=wall_seconds)


SHELLS = {"dash": ["dash", "-i"], "bash": ["bash", "--norc", "--noprofile", "-i"], "mksh": ["mksh", "-i"],
          "busybox": ["busybox", "sh", "-i"]}  # fmt: skip
HERE = [name for name in SHELLS if shutil.which(name)]


@pytest.fixture(scope="module", params=HERE or ["dash"])
def computer(request, tmp_path_factory):
    if not HERE:
        pytest.skip("none of dash, bash, mksh and busybox is here")
    made = Computer(SHELLS[request.param], tmp_path_factory.mktemp("home"))
    yield made
    made.close()


@pytest.fixture
def console(computer):
    return talking(computer)


OUTPUT = st.binary(max_size=300) | st.text(max_size=60).map(str.encode) | st.just(bytes(NO_TEXT))


@given(OUTPUT, st.lists(st.integers(1, 400), max_size=20), st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_what_goes_in_comes_out(computer, given, cuts, status):
    """In any shell: bytes of any kind, and a kernel's lines cut into what is typed and what is answered anywhere."""
    console = talking(computer)
    computer.cuts = cuts
    done = console.execute(f"cat; (exit {status})", input=given)
    assert (done.output, done.status) == (given, status)
    left = done.kernel_log.replace(KERNEL.decode().replace("\r\n", "\n"), "")
    assert left.strip("\n") == "", "nothing that was typed is the kernel's"
    computer.cuts = []


def test_what_it_writes(console):
    assert console.run("seq 3") == "1\n2\n3\n"
    assert console.run("printf 'no end'") == "no end"
    assert console.run("true") == console.run("") == ""
    assert console.run("printf '\\r\\n\\r\\n\\n'") == "\r\n\r\n\n"
    assert console.run("echo 'any-end=7'; echo \"won't\" >&2") == "any-end=7\nwon't\n"
    assert console.run("printf '\\377é'") == "\ufffdé"
    assert console.execute("printf '\\377é'").output == b"\xff\xc3\xa9"


def test_what_is_run_may_be_of_any_kind(console):
    assert console.run("printf '%s|' 'a\tb' '\x01\x03\x04\x15' 'é!!' \"$((6 * 7))\"") == "a\tb|\x01\x03\x04\x15|é!!|42|"
    assert console.run("cat <<E\none\ntwo\nE\nprintf three") == "one\ntwo\nthree"
    assert console.run(f"echo {'x' * 5000} '-n'") == "x" * 5000 + " -n\n"
    assert console.run("-n 2>/dev/null || echo none") == "none\n"


def test_what_it_reads(console):
    assert console.run("cat") == "", "there is nothing"
    assert console.run("cat", input="é\nend") == "é\nend"
    many = bytes(range(256)) * 40
    assert console.execute("cat", input=many).output == many, "more than a terminal takes at once"
    assert console.run("read a; read b; echo $b$a", input="1\n2\n") == "21\n"


def test_it_is_the_shell_itself(console):
    console.run("mkdir -p in/side; cd in/side; kept=$((6 * 7)); asked() { echo asked $1; }")
    assert console.run("pwd").endswith("/in/side\n") and console.run("asked $kept") == "asked 42\n"
    console.run("cd; rm -r in; unset kept")


def test_its_status(console):
    with pytest.raises(GuestError) as failed:
        console.run("echo because; false")
    assert str(failed.value) == "'echo because; false' ended with status 1:\nbecause\n"
    assert console.execute("exit_with() { return 77; }; exit_with").status == 77
    for wrong in ("if", "'", ")", "no-such-command"):
        done = console.execute(wrong)
        assert done.status not in (0, None) and done.output
    assert console.run("echo still here") == "still here\n"


def test_what_it_leaves_running_holds_nothing_up(console):
    console.run("sleep 1000 & left=$!")
    console.run("kill $left; wait $left || true")
    done = console.execute("while :; do echo on and on; done & left=$!; sleep 0.1; echo last")
    assert done.status == 0 and b"on and on" in done.output
    assert "no more\n" in console.run("kill $left; wait $left || true; echo no more")  # and what the shell says of it


def test_nothing_is_left_of_it(console):
    console.run("cat", input="given")
    mine = console.run("echo $$").strip()
    during = console.run("ls /tmp/anyhyve.$$.*").split()
    assert during == [f"/tmp/{name.replace('$$', mine)}" for name in (shell.OUTPUT, shell.SOURCE)]
    assert not any(os.path.exists(name) for name in (*during, f"/tmp/{shell.INPUT.replace('$$', mine)}"))
    assert "anyhyve=" not in console.run("set")


def test_what_comes_then_is_looked_at_from_there(computer):
    console = talking(computer)
    console.run("echo one")
    console.send("echo t''wo\n")
    assert console.expect("two")  # behind the prompt, where that comes late
    assert "\ufffd" not in console.output
    assert list(console.log)[-4:] == ["run 'echo one'", "status 0, 4 bytes", "send \"echo t''wo\\n\"", "expect 'two'"]


@pytest.mark.parametrize("missing", [*shell.TOOLS])
def test_a_tool_that_is_missing_is_named(tmp_path, missing):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in (*shell.TOOLS, "cat"):
        if tool != missing:
            (tools / tool).symlink_to(str(shutil.which(tool)))
    computer = Computer([str(shutil.which("sh")), "-i"], tmp_path, str(tools))
    try:
        console = talking(computer)
        if missing == "rm":
            assert console.run("echo hello") == "hello\n"
        else:
            with pytest.raises(GuestError, match=rf"^cannot run 'echo hello': the guest has no {missing}$"):
                console.run("echo hello")
    finally:
        computer.close()


def test_a_guest_without_a_folder(computer, monkeypatch):
    monkeypatch.setattr(shell, "FOLDERS", ("/nowhere", "/nowhere/else"))
    with pytest.raises(GuestError, match=r"^cannot run 'ls': the guest has no folder to write to$"):
        talking(computer).run("ls")
    monkeypatch.setattr(shell, "FOLDERS", ("/nowhere", "$HOME"))
    assert talking(computer).run("echo hello") == "hello\n"


def test_somebody_else_writes_such_bytes(console):
    assert console.run("printf '\\377' >/dev/tty; echo hello") == "hello\n"
    with pytest.raises(GuestError, match=r"^cannot run .*: what it wrote did not come whole$"):
        console.run("printf '\\301' >/dev/tty; echo hello")
    assert console.run("echo hello") == "hello\n"


def test_a_command_that_never_ends(computer):
    console = talking(computer, wall_seconds=0.5)
    with pytest.raises(GuestError, match=r"^'sleep 1000' never ended: waited 0.5 s on the clock on the wall; "):
        console.run("sleep 1000")
    console = talking(computer)
    console.send("\x03")
    assert console.run("echo hello") == "hello\n", "and not what the one before was answered late"
    assert not computer.board.console._listeners


def test_a_shell_that_ends(tmp_path):
    computer = Computer([str(shutil.which("sh")), "-i"], tmp_path)
    try:
        with pytest.raises(GuestError, match=r"^'exit 3' never ended: it halted.*; the console showed nothing"):
            talking(computer).run("exit 3")
    finally:
        computer.close()


# --- a real guest


@pytest.fixture(scope="module")
def shell_ready(debian, tmp_path_factory):
    """A snapshot of Debian's kernel at its shell."""
    file = tmp_path_factory.mktemp("debian") / "shell"
    image = Image.from_files(debian / "vmlinux", debian / "initrd.img", "console=ttyS0 mitigations=off")
    with Machine.boot(MachineConfig(memory_bytes=256 << 20), image) as machine:
        machine.run(until="shell ready")
        machine.save(file)
    return file


@pytest.fixture
def guest(shell_ready):
    with Machine.restore(shell_ready) as machine:
        yield Expect(machine)


@pytest.mark.debian
def test_more_than_a_console_keeps_beside_a_kernel_that_talks(guest, monkeypatch):
    """With the kernel's log all over it."""
    monkeypatch.setattr("vmm.host.console._KEEP", 1 << 18)
    count = 50_000
    console = guest.machine.board.console
    began = console.total
    done = guest.execute(
        f"( for n in $(seq 40); do echo hello $n >/dev/kmsg; sleep 0.1; done ) & seq {count}; printf '\\0\\377\\r\\n '"
    )
    written = b"".join(b"%d\n" % n for n in range(1, count + 1)) + b"\0\xff\r\n "
    assert done.output == written
    assert console.total - began > 2 << 18
    lines = done.kernel_log.splitlines()
    assert sum("hello" in line for line in lines) >= 10
    assert all(line.startswith("[") for line in lines if line), "each is whole"


@pytest.mark.debian
def test_the_shell_of_a_real_guest(guest):
    assert guest.run("cat", input="one\ntwo") == "one\ntwo"
    assert guest.run("cd /proc; sleep 1000 & pwd") == "/proc\n" and guest.run("pwd") == "/proc\n"
    assert guest.execute("if").status != 0
    assert guest.run(f"echo {'x' * 3000}") == "x" * 3000 + "\n", "a line longer than its editor takes"
    first, second = (guest.execute("dmesg | head -1; cat /proc/version").output for _ in range(2))
    assert first == second and b"Linux version" in first


@pytest.mark.debian
def test_a_command_that_never_ends_there(guest):
    """What is shown is what the kernel said meanwhile, and nothing of what is typed for it."""
    with pytest.raises(GuestError) as failed:
        guest.execute("echo hello >/dev/kmsg; sleep 1000", seconds=2)
    first, *rest = str(failed.value).splitlines()
    assert first.endswith("waited 2 guest seconds; the console showed meanwhile:")
    assert rest[0].endswith("hello") and all(line.startswith("[") for line in rest), rest


def test_what_is_no_expression(computer):
    with pytest.raises(RequestError, match=r"^not a regular expression: .*: \($"):
        talking(computer).expect("(")


@pytest.mark.debian
def test_a_guest_that_panics_in_the_middle(guest):
    command = "(sleep 0.5; echo c >/proc/sysrq-trigger) & seq 300000"
    with pytest.raises(GuestError, match=r"never ended: it is lost: .*Kernel panic - not syncing: "):
        guest.run(command)
