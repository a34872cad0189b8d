"""A failed save costs nothing: one line says why, the machine runs on, the last good snapshot is still there."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmm.errors import BackendError, RequestError
from vmm.machine.machine import Machine, Stopped, StopReason


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_the_host_refuses(boot_own, tmp_path, monkeypatch, call, code):
    file = tmp_path / "kept"
    with boot_own() as machine, boot_own() as undisturbed:
        machine.run(position=2_000_000)
        machine.save(file)
        kept = file.read_bytes()
        machine.run(position=3_000_000)
        before = machine.digests()

        def refuse(*_: object, **__: object) -> int:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(BackendError, match=f"cannot save to .*kept: {os.strerror(code)}"):
                machine.save(file)
        assert file.read_bytes() == kept and machine.digests() == before
        for each in (machine, undisturbed):
            assert each.run(position=5_000_000) == Stopped(StopReason.POSITION)
        assert machine.digests() == undisturbed.digests(), "it runs on as if nobody had tried"
        machine.save(file)
        assert file.read_bytes() != kept
        assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_a_folder_the_kernel_lets_nobody_write_to(boot_own):
    with boot_own() as machine:
        with pytest.raises(BackendError, match="cannot save to /sys/kernel/here"):
            machine.save(Path("/sys/kernel/here"))
        assert machine.run(position=1_000_000) == Stopped(StopReason.POSITION)


SAVE_FOR_EVER = """
import sys
from pathlib import Path
from vmm.machine.machine import Machine
file = Path(sys.argv[1])
with Machine.restore(file) as machine:
    print("ready", flush=True)
    while True:
        machine.run(position=machine.position + 100_000)
        machine.save(file)
"""


@pytest.mark.parametrize("milliseconds", [0, 3, 7, 13, 29, 61])
def test_kill_9_while_saving(boot_own, tmp_path, milliseconds):
    """Over the same name, again and again: whenever it dies, a whole snapshot is there, and it wakes."""
    file = tmp_path / "kept"
    with boot_own() as machine:
        machine.run(position=2_000_000)
        machine.save(file)
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(file)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(milliseconds / 1000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Machine.restore(file, verify=True) as woken:
        assert woken.run(position=woken.position + 1_000_000) == Stopped(StopReason.POSITION)


@pytest.mark.parametrize("what", ["fifo", "socket", "link", "folder", "device"])
def test_what_is_no_file_is_not_replaced(boot_own, tmp_path, what):
    path = tmp_path / "there"
    match what:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        case "link":
            (tmp_path / "elsewhere").write_text("mine")
            path.symlink_to(tmp_path / "elsewhere")
        case "folder":
            path.mkdir()
        case _:
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
            except PermissionError:
                return  # only root makes one, and only root could lose one
    before = path.lstat()
    with boot_own() as machine:
        for save in (machine.save, machine.checkpoint, machine.can_save):
            with pytest.raises(RequestError, match="what lies there is no regular file"):
                save(path)
    after = path.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert not list(tmp_path.glob("*.tmp"))
