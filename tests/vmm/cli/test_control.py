"""ctl, list, attach, and what saves by itself: as a user meets them."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from snapshot.verify import verify
from tests.conftest import OWN
from tests.vmm.conftest import LAST_GOOD, MAIN, OnTerminal, children, eventually, sessions
from vmm.control.client import Client
from vmm.machine.machine import Machine, Stopped, StopReason


def sockets(environment) -> Path:
    return Path(environment["XDG_RUNTIME_DIR"], "anyhyve")


def catalog(environment, name="box") -> Path:
    return Path(environment["XDG_STATE_HOME"], "anyhyve", name)


def answer(done: subprocess.CompletedProcess[bytes]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refusal(done: subprocess.CompletedProcess[bytes], status: int = 1) -> str:
    lines = [line for line in done.stderr.decode().splitlines() if line]
    assert done.returncode == status and len(lines) == 1 and lines[0].startswith("anyhyve: "), lines
    return lines[0]


def test_list(named, anyhyve):
    assert answer(anyhyve("list", "--json")) == []
    named("box")
    named("other", "--paused")
    found = answer(anyhyve("list", "--json"))
    assert [(each["name"], each["state"]) for each in found] == [("box", "running"), ("other", "paused")]
    assert b"box" in anyhyve("list").stdout


def test_list_and_a_machine_that_does_not_answer(named, anyhyve):
    box = named("box")
    box.send_signal(signal.SIGSTOP)
    (found,) = answer(anyhyve("list", "--json"))
    box.send_signal(signal.SIGCONT)
    assert found["name"] == "box" and found["state"].startswith("does not answer")


def test_a_name_is_taken_once(named, anyhyve, environment):
    named("box")
    assert "a machine named box runs already" in refusal(anyhyve("run", "--kernel", OWN, "--flat", "--name", "box"))
    assert "cannot name a machine" in refusal(anyhyve("run", "--kernel", OWN, "--flat", "--name", "../box"))


def test_another_folder_of_sockets(named, anyhyve, tmp_path, environment):
    folder = tmp_path / "here"
    named("box", "--rundir", folder, wait=False)
    eventually(lambda: (folder / "box.sock").exists())
    assert answer(anyhyve("ctl", "--rundir", folder, "box", "status", "--json"))["name"] == "box"
    assert "no machine named box" in refusal(anyhyve("ctl", "box", "status"))


def test_the_answer_is_the_result(named, anyhyve, tmp_path, environment):
    named("box")
    saved = answer(anyhyve("ctl", "box", "checkpoint", tmp_path / "cut", "--json"))
    assert saved["path"] == str(tmp_path / "cut")
    verify(tmp_path / "cut")
    assert "is not a folder" in refusal(anyhyve("ctl", "box", "checkpoint", tmp_path / "no" / "cut"))
    assert answer(anyhyve("ctl", "box", "pause", "--json")) == {"changed": True}
    assert anyhyve("ctl", "box", "console.write", "hello").returncode == 0
    assert anyhyve("ctl", "box", "console.read").stdout.startswith(b"anyhyve own guest")
    (uart,) = answer(anyhyve("ctl", "box", "devices", "--name", "com1", "--json"))
    assert uart["schema"] == "uart.16550a"
    saved = answer(anyhyve("ctl", "box", "checkpoint", "--json"))
    assert Path(saved["path"]).parent == catalog(environment), "without a path: into the catalog"
    relative = answer(anyhyve("ctl", "box", "checkpoint", "here", "--json", cwd=tmp_path))
    assert relative["path"] == str(tmp_path / "here"), "relative to the one who asks"


@pytest.mark.parametrize("arguments", [("ctl",), ("ctl", "box"), ("ctl", "box", "dance"), ("ctl", "--vm=box")])
def test_wrong_usage(anyhyve, arguments):
    done = anyhyve(*arguments)
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_events_are_lines_of_json(named, anyhyve, environment):
    named("box")
    follower = subprocess.Popen(
        [sys.executable, "-c", MAIN, "ctl", "box", "events"], stdout=subprocess.PIPE, env=environment
    )
    assert follower.stdout is not None
    time.sleep(0.5)
    anyhyve("ctl", "box", "pause", check=True)
    assert json.loads(follower.stdout.readline()) == {"kind": "state", "state": "paused"}
    anyhyve("ctl", "box", "stop", check=True)
    assert json.loads(follower.stdout.readline()) == {"kind": "state", "state": "stopped"}
    assert follower.wait(10) == 0
    follower.stdout.close()


def test_ctrl_c_cancels_and_the_machine_runs_on(box, gate, tmp_path, environment):
    client = subprocess.Popen(
        [sys.executable, "-c", MAIN, "ctl", "--rundir", box.folder, "box", "suspend", tmp_path / "cut"],
        stderr=subprocess.PIPE, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert client.stderr is not None
    eventually(lambda: children() - {client.pid})
    client.send_signal(signal.SIGINT)
    assert client.wait(10) == 130 and b"was cancelled" in client.stderr.read()
    client.stderr.close()
    assert not list(tmp_path.iterdir())
    before = box.call("status")
    assert before["state"] == "running"
    eventually(lambda: box.call("status")["position"] > before["position"])


def test_a_long_save_shows_how_far_it_is(box, gate, tmp_path, environment):
    terminal = OnTerminal(environment, "ctl", "--rundir", box.folder, "box", "checkpoint", tmp_path / "cut")
    terminal.until(b"checkpoint box")
    terminal.until(b"iB")
    gate()
    terminal.until(b"path: ")
    assert terminal.wait() == 0


# --- attach


def test_attach_and_leave(named, anyhyve, environment):
    named("box")
    first = OnTerminal(environment, "attach", "box")
    first.until(b"anyhyve own guest")
    first.type(b"a")
    first.until(b"[a]")
    second = OnTerminal(environment, "attach", "box")
    second.until(b"[a]")  # what was shown before is shown again
    second.type(b"b")
    first.until(b"[b]")
    first.type(b"\x1d\x1d")  # the key itself
    second.until(b"[\x1d]")
    second.type(b"\x1dq")
    second.until(b"Ctrl-] then d leaves it running")  # and q is nothing here
    second.type(b"\x1dd")
    assert second.wait() == 0
    assert answer(anyhyve("ctl", "box", "status", "--json"))["state"] == "running"
    first.type(b"\x03")  # Ctrl-C is the guest's
    first.until(b"[\x03]")
    anyhyve("ctl", "box", "stop", check=True)
    first.until(b"the machine has ended")
    assert first.wait() == 0


def test_attach_without_a_terminal_follows(named, anyhyve, environment):
    named("box")
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "attach", "box"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    assert process.stdin is not None and isinstance(process.stdout, io.BufferedReader)
    process.stdin.write(b"z")
    process.stdin.close()
    seen = b""
    while b"[z]" not in seen:
        seen += process.stdout.read1(4096)
    anyhyve("ctl", "box", "stop", check=True)
    assert process.wait(10) == 0
    process.stdout.close()
    assert "no machine named box" in refusal(anyhyve("attach", "box"))


def test_a_line_without_an_end_is_seen_on_every_way(named, anyhyve, environment, tmp_path):
    (tmp_path / "prompt").write_bytes(bytes.fromhex("66baf803 b041 ee ebfe"))  # mov dx, 3F8h; mov al, 'A'; out; jmp $
    written = tmp_path / "written"
    named("box", "--bind", f"com1=file:{written}", command=("run", "--kernel", tmp_path / "prompt", "--flat"))
    eventually(lambda: written.read_bytes() == b"A")
    assert anyhyve("ctl", "box", "console.read").stdout == b"A"
    words = [sys.executable, "-c", MAIN, "attach", "box"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as attached:
        assert attached.stdout is not None and attached.stdout.read(1) == b"A"
        attached.kill()


def test_the_monitors_save_goes_on_beside_the_guest(environment, tmp_path):
    terminal = OnTerminal(environment, "run", "--kernel", OWN, "--flat", "--memory", "16M", "--save", tmp_path / "cut")
    terminal.until(b"round")
    terminal.type(b"\x1ds")
    terminal.until(b"saved to")
    terminal.type(b"\x1dq")
    assert terminal.wait() == 0
    verify(tmp_path / "cut")


def test_attach_waits_for_a_machine(named, anyhyve, environment):
    words = [sys.executable, "-c", MAIN, "attach", "box", "--wait"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as attached:
        assert isinstance(attached.stdout, io.BufferedReader)
        named("box")
        seen = b""
        while b"anyhyve own guest" not in seen:
            seen += attached.stdout.read1(4096)
        anyhyve("ctl", "box", "stop", check=True)
        assert attached.wait(10) == 0


def test_attach_waits_no_longer(anyhyve):
    said = anyhyve("attach", "box", "--wait", 0.1).stderr.decode().rstrip()
    assert "no machine named box runs here" in said and said.endswith(" (waited 0.1 s)")
    assert said.startswith("anyhyve: waiting for box, 0.1 s at most\n")
    assert "waited" not in refusal(anyhyve("attach", "box"))
    assert "cannot name a machine" in refusal(anyhyve("attach", "../box", "--wait")), "at once"
    for wrong in ("0", "-1", "soon", "nan"):
        assert anyhyve("attach", "box", "--wait", wrong).returncode == 2


def test_what_is_typed_may_have_escapes(boxes, anyhyve):
    box = boxes(paused=True)
    write = ("ctl", "--rundir", box.folder, "box", "console.write")
    assert answer(anyhyve(*write, "--json", "--escape", r"a\n\r\t\\n\x00\xfF\x1b[")) == {"taken": 10}
    assert answer(anyhyve(*write, "--json", r"a\n")) == {"taken": 3}
    typed = b"a\n\r\t\\n\0\xff\x1b[" + rb"a\n"
    assert bytes(box.machine.board.console.typed) == typed
    for wrong, told in ((r"a\q", r"\q"), ("a\\", "\\"), (r"\xg0", r"\x"), (r"\x1", r"\x"), ("\\\n", r"\\n")):
        done = anyhyve(*write, "--escape", wrong)
        last = done.stderr.decode().splitlines()[-1]
        assert done.returncode == 2 and last == rf"Error: {told} is no escape: there are \n, \r, \t, \\ and \xHH"
    assert bytes(box.machine.board.console.typed) == typed


# --- saves nobody asks for at the time


def test_autosave(named, anyhyve, environment):
    box = named("box", "--autosave", 1, "--memory", "16M")
    file = catalog(environment) / "autosave.snapshot"
    eventually(file.exists)
    first = file.stat().st_ino
    eventually(lambda: file.stat().st_ino != first)
    anyhyve("ctl", "box", "stop", check=True)
    assert box.wait(10) == 0
    verify(file)
    assert os.listdir(catalog(environment)) == ["autosave.snapshot"]


def test_sigterm_ends_it(named, environment):
    box = named("box")
    box.terminate()
    assert box.wait(10) == 128 + signal.SIGTERM
    assert not os.listdir(sockets(environment)) and not catalog(environment).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_suspended_by_a_signal_and_woken(named, anyhyve, environment, number):
    """As before and after a reboot of this computer: the guest goes on from where it was."""
    box = named("box", "--suspend-on-term", "--memory", "16M")
    box.send_signal(number)
    assert box.wait(20) == 0 and b"suspended, at position" in box.stderr.read()
    file = catalog(environment) / "suspended.snapshot"
    verify(file)
    with Machine.restore(file) as machine:
        saved_at = machine.position
        assert machine.run(position=saved_at + 1_000_000) == Stopped(StopReason.POSITION)
        expected = machine.digests()
    at = ("--at", saved_at + 1_000_000, "--json", "--pace", "max")
    woken = answer(anyhyve("wake", "box", *at))
    assert woken["digest"] == expected
    assert "there is no snapshot of nobody" in refusal(anyhyve("wake", "nobody"))


@pytest.mark.parametrize("how", ["signal", "ctl", "suspend-all"])
def test_suspended_though_a_difference_stands_on_the_last(named, anyhyve, environment, how):
    """Which stays. A path that was asked for is refused."""
    home = catalog(environment)
    box = named("box", "--suspend-on-term", "--autosave", 1, "--memory", "16M")
    for name in ("suspended", "autosave"):
        for words in ((f"{name}.snapshot",), (f"{name}-child.snapshot", "--parent", home / f"{name}.snapshot")):
            while (done := anyhyve("ctl", "box", "checkpoint", home / words[0], *words[1:])).returncode:
                assert b"is under way" in done.stderr  # an autosave
    eventually((home / "autosave-1.snapshot").exists)
    assert "differences to the file" in refusal(anyhyve("ctl", "box", "suspend", home / "suspended.snapshot"))
    match how:
        case "signal":
            box.terminate()
        case "ctl":
            anyhyve("ctl", "box", "suspend", check=True)
        case "suspend-all":
            anyhyve("suspend-all", check=True)
    assert box.wait(20) == 0
    names = {f"{name}{tail}.snapshot" for name in ("suspended", "autosave") for tail in ("", "-child", "-1")}
    assert set(os.listdir(home)) == names
    for name in names:
        Machine.restore(home / name, verify=True).close()
    done = anyhyve("wake", "box", "--at", 0)
    assert b"suspended-1.snapshot" in done.stderr


@pytest.mark.parametrize("milliseconds", [0, 50, 150, 250, 300, 350, 400, 500, 700, 1000])
def test_sigterm_at_any_time(named, environment, milliseconds):
    """Ended before it began, or suspended whole: never a part, never a socket or a process left."""
    box = named("box", "--suspend-on-term", "--autosave", 1, "--memory", "16M", wait=False)
    time.sleep(milliseconds / 1000)
    box.terminate()
    status = box.wait(20)
    file = catalog(environment) / "suspended.snapshot"
    assert status in (0, -signal.SIGTERM), box.stderr.read()
    assert file.exists() == (status == 0)
    if file.exists():
        Machine.restore(file, verify=True).close()
    assert not sockets(environment).exists() or not os.listdir(sockets(environment))
    eventually(lambda: box.pid not in sessions())


def test_sigterm_while_a_checkpoint_is_written(named, anyhyve, environment, tmp_path):
    """Both are done: first what was asked for, then the suspend."""
    box = named("box", "--suspend-on-term", "--memory", "256M")
    with Client(sockets(environment), "box") as client:
        for n in range(5):
            client.ask("checkpoint", path=str(tmp_path / f"{n}"))
        box.terminate()
        for _ in range(5):
            client.read()
    assert box.wait(20) == 0
    verify(catalog(environment) / "suspended.snapshot")
    for file in tmp_path.iterdir():
        verify(file)


NO_MORE = f"""
import errno, os, signal, threading
def none(*_):
    def thread(self): raise RuntimeError("can't start new thread")
    def fork(): raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    threading.Thread.start, os.fork = (thread, fork)
threading_start, os_fork = threading.Thread.start, os.fork
def more(*_):
    threading.Thread.start, os.fork = (threading_start, os_fork)
signal.signal(signal.SIGUSR1, none)
signal.signal(signal.SIGUSR2, more)
{MAIN}"""


def test_suspended_by_a_signal_without_threads_and_processes(named, environment):
    box = named("box", "--suspend-on-term", "--memory", "16M", main=NO_MORE)
    box.send_signal(signal.SIGUSR1)
    box.terminate()
    assert box.wait(20) == 0 and b"suspended, at position" in box.stderr.read()
    verify(catalog(environment) / "suspended.snapshot")


def test_autosave_goes_on_after_a_moment_without_processes(named, anyhyve, environment):
    box = named("box", "--autosave", 1, "--suspend-on-term", "--memory", "16M", main=NO_MORE)
    box.send_signal(signal.SIGUSR1)
    while b"not saved: cannot save to" not in box.stderr.readline():
        pass
    box.send_signal(signal.SIGUSR2)
    file = catalog(environment) / "autosave.snapshot"
    file.unlink(missing_ok=True)
    eventually(file.exists)
    anyhyve("ctl", "box", "stop", check=True)
    assert box.wait(10) == 0


def test_a_signal_to_a_machine_that_comes_to_no_safe_point_is_answered(named, environment, tmp_path):
    """Whoever reads its console is stuck. It is not saved, and says so."""
    flood = tmp_path / "flood"
    flood.write_bytes(bytes.fromhex("66baf803 b00a ee ebfd"))  # mov dx, 3F8h; mov al, 10; out dx, al; jmp
    impatient = (
        f"from vmm.control.supervisor import Supervisor as S; S.__init__.__kwdefaults__['quiesce_s'] = 0.5; {MAIN}"
    )
    reader, writer = os.pipe()
    how = {"main": impatient, "command": ("run", "--kernel", flood, "--flat"), "stdout": writer}
    box = named("box", "--suspend-on-term", "--memory", "16M", **how)
    os.close(writer)
    with Client(sockets(environment), "box") as client:

        def stuck() -> bool:
            before = client.call("status")["position"]
            time.sleep(0.2)
            return bool(before == client.call("status")["position"])

        eventually(stuck)
    box.terminate()
    assert b"not suspended, the machine runs on: cannot save to" in box.stderr.readline()
    os.close(reader)  # and so ends it
    box.wait(20)


def little_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_costs_nothing(named, anyhyve, environment, tmp_path):
    """Checkpoint, suspend, autosave, SIGTERM: each is refused in one line, each leaves the old file, all go on."""
    catalog(environment).mkdir(parents=True)
    files = [tmp_path / "cut", *(catalog(environment) / f"{name}.snapshot" for name in ("suspended", "autosave"))]
    for file in files:
        file.write_bytes(LAST_GOOD)
    box = named("box", "--suspend-on-term", "--autosave", 1, "--memory", "16M", before=little_disk)
    busy = "is under way"  # an autosave
    for method in ("checkpoint", "suspend"):
        while busy in (said := refusal(anyhyve("ctl", "box", method, files[0]))):
            pass
        assert "File too large" in said
    box.terminate()
    wanted = {"not suspended, the machine runs on", "not saved"}
    while wanted:
        line = box.stderr.readline().decode()
        wanted = {words for words in wanted if words not in line}
        assert "File too large" in line or busy in line
        if busy in line:
            box.terminate()
    assert answer(anyhyve("ctl", "box", "status", "--json"))["state"] == "running"
    assert all(file.read_bytes() == LAST_GOOD for file in files)
    anyhyve("ctl", "box", "stop", check=True)
    assert box.wait(10) == 0
    assert not list(tmp_path.glob("*.tmp")) and not list(catalog(environment).glob("*.tmp"))
