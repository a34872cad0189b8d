"""Every method of the socket while this computer gives no more: descriptors, threads, processes, memory, disk. Each
call has an answer that is declared, nothing is left behind, and all works again once there is more."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshot.verify import verify
from tests.vmm.conftest import LAST_GOOD, eventually
from vmm.control import protocol
from vmm.control.client import Client, Failed
from vmm.control.methods import METHODS
from vmm.control.place import Place
from vmm.control.server import Server
from vmm.control.supervisor import Supervisor
from vmm.errors import BackendError
from vmm.guest.image import Image
from vmm.machine.machine import Machine

Limit = Callable[[int], contextlib.AbstractContextManager[object]]  # of the process with this number


def params(name: str, folder: Path) -> dict[str, Any]:
    """What a method must be given: a new one finds its parameters here by their types."""
    given: dict[str, Any] = {}
    for key, param in METHODS[name].params.items():
        if param.needed:
            given[key] = str(folder / "cut") if Path in param.kinds else "x"
    return given


@contextlib.contextmanager
def lowered(pid: int, what: int, most: int) -> Iterator[None]:
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, what, before)


def descriptors(pid: int) -> dict[str, str]:
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


def no_descriptors(left: int) -> Limit:
    """The numbers that are free below the highest used are no help: the limit is at the lowest free one."""

    def limit(pid: int) -> contextlib.AbstractContextManager[object]:
        used = {int(fd) for fd in descriptors(pid)}
        free = [n for n in range(max(used) + 64) if n not in used]
        return lowered(pid, resource.RLIMIT_NOFILE, free[left])

    return limit


def no_memory(left: int) -> Limit:
    def limit(pid: int) -> contextlib.AbstractContextManager[object]:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        return lowered(pid, resource.RLIMIT_AS, pages * resource.getpagesize() + left)

    return limit


def no_disk(left: int) -> Limit:
    return lambda pid: lowered(pid, resource.RLIMIT_FSIZE, left)


FEW = {"descriptors": no_descriptors(0), "memory": no_memory(0), "disk": no_disk(4096)}
MANY = {
    **{f"descriptors {n}": no_descriptors(n) for n in range(8)},
    **{f"memory {n} KiB": no_memory(n << 10) for n in (0, 64, 256, 1024, 2048, 4096, 8192, 16384, 65536)},
    **{f"disk {n}": no_disk(n) for n in (0, 1, 4095, 65536, 300_000)},
}


def under(limit: Limit, named, environment, folder: Path, *arguments: str) -> None:
    """Each method in turn; a machine that it ended is started again."""
    sockets = Path(environment["XDG_RUNTIME_DIR"], "anyhyve")
    box = None
    for name in METHODS:
        if box is None:
            box = named("box", "--memory", "8M", *arguments)
            with Client(sockets, "box") as client:
                client.call("checkpoint", path=str(folder / "warm"))
        with Client(sockets, "box", timeout_s=60) as client:
            client.call("status")
            eventually(lambda client=client: client.call("status")["saving"] is None)
            before = descriptors(box.pid)
            with limit(box.pid):
                try:
                    client.call(name, **params(name, folder))
                    ended = name in ("stop", "suspend")
                except Failed as error:
                    assert error.code in protocol.CODES and error.code != protocol.INTERNAL, (name, error)
                    assert "\n" not in str(error)
                    ended = False
            if ended:
                assert box.wait(20) == 0, name
                box = None
            else:
                assert set(descriptors(box.pid)) == set(before), name
                if name == "pause":
                    client.call("resume")
                again = client.call("checkpoint", path=str(folder / "again"))
                verify(Path(again["path"]))
                assert client.call("status")["state"] in ("running", "paused")
        assert not list(folder.glob("*.tmp")), name


@pytest.mark.parametrize("what", list(FEW))
def test_every_method_where_there_is_no_more(what, named, environment, tmp_path):
    under(FEW[what], named, environment, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("paused", [(), ("--paused",)], ids=["running", "paused"])
@pytest.mark.parametrize("what", list(MANY))
def test_every_method_where_there_is_little_more(what, paused, named, environment, tmp_path):
    under(MANY[what], named, environment, tmp_path, *paused)


# --- threads and processes: a limit on them does not bind root, and so is planted


@pytest.fixture
def no_thread(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield patch


@pytest.fixture
def no_process(monkeypatch):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", refuse)
        yield patch


@pytest.fixture(params=["threads", "processes", "threads and processes"])
def neither(request):
    def limit():
        return [request.getfixturevalue(each) for each in ("no_thread", "no_process") if each[3:] in request.param]

    return limit


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_without_threads_and_processes(box, neither, tmp_path, name):
    with box.client() as client:
        client.call("status")
        limits = neither()
        before = descriptors(os.getpid())
        try:
            client.call(name, **params(name, tmp_path))
            assert name != "checkpoint" or len(limits) == 1, "it needs a process"
        except Failed as error:
            assert (error.code, name) == (protocol.HOST, "checkpoint"), error
            assert str(error) == f"cannot save to {tmp_path}/cut: Resource temporarily unavailable"
        for limit in limits:
            limit.undo()
        if name in ("stop", "suspend"):
            eventually(lambda: box.end)
        else:
            assert descriptors(os.getpid()) == before
            verify(Path(client.call("checkpoint", path=str(tmp_path / "again"))["path"]))
    if name == "suspend":
        verify(tmp_path / "cut")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_machine_that_cannot_have_what_saves_need_does_not_begin(boot_own, no_thread):
    with boot_own() as machine, pytest.raises(BackendError, match="no thread to save with"):
        Supervisor(machine).run()


def test_a_socket_nobody_can_serve_is_not_left_behind(boot_own, tmp_path, no_thread):
    with boot_own() as machine:
        before = descriptors(os.getpid())
        with (
            pytest.raises(BackendError, match="no thread for control"),
            Server(Supervisor(machine), Place(tmp_path, "b")),
        ):
            pass
        assert descriptors(os.getpid()) == before and not list(tmp_path.iterdir())


def test_ram_is_checked_without_a_thread_as_well(boot_own, tmp_path, no_thread):
    with boot_own() as machine:
        machine.save(tmp_path / "cut")
    with Machine.restore(tmp_path / "cut") as woken:
        woken.save(tmp_path / "again")


def test_a_far_end_that_has_no_thread_is_one_line(boot_own, tmp_path, no_thread):
    with boot_own() as machine:
        config, image = machine.config, machine.image
    before = descriptors(os.getpid())
    for end in ("pty", f"socket:{tmp_path}/wire"):
        with pytest.raises(BackendError, match="no thread for far end"):
            Machine.boot(config, image or Image(b""), bind={"com2": end})
    assert descriptors(os.getpid()) == before and not list(tmp_path.iterdir())


# --- a disk that is full at any moment of a save


@pytest.mark.parametrize("method", ["checkpoint", "suspend"])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "open", "pipe", "preadv"])
def test_the_host_refuses_at_any_step_of_a_save(box, tmp_path, monkeypatch, method, call):
    """The n-th call of it fails, for each n until a save gets through."""
    real = getattr(os, call)
    (tmp_path / "cut").write_bytes(LAST_GOOD)
    before = descriptors(os.getpid())
    for fail_at in range(200):
        count = 0

        def refuse(*arguments, fail_at=fail_at, **options):
            nonlocal count
            count += 1
            if count == fail_at + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        with box.client() as client:
            client.call("status")
            with monkeypatch.context() as patch:
                patch.setattr(os, call, refuse)
                try:
                    client.call(method, path=str(tmp_path / "cut"))
                    break
                except Failed as error:
                    assert error.code == protocol.HOST and "No space left on device" in str(error)
            assert (tmp_path / "cut").read_bytes() == LAST_GOOD
            assert [each.name for each in tmp_path.iterdir()] == ["cut"]
            assert client.call("status")["state"] == "running"
    else:
        pytest.fail("it never got through")
    assert fail_at > 0, "the step is none"
    verify(tmp_path / "cut")
    if method == "checkpoint":
        eventually(lambda: descriptors(os.getpid()) == before)
