"""The cache of guests that are up: what is one guest, who boots it, what is trusted, what is removed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot.container import MAGIC
from snapshot.errors import SnapshotError
from tests.conftest import OWN, ROOT
from tests.vmm.conftest import eventually
from vmm.board.config import DeviceConfig, MachineConfig
from vmm.control import place
from vmm.cpu import backends
from vmm.errors import BackendError, GuestError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, Stopped, StopReason
from vmm.testing import boots
from vmm.testing.boots import Boots, Told

pytestmark = pytest.mark.no_roundtrip("boots are counted, and kept from one process to the next")
IMAGE = Image(b"kernel", b"initrd", "cmdline")
KEY, OTHER = "0" * 32, "1" * 32
ENOUGH = 1 << 30


# --- the key


def key(config=MachineConfig(), image=IMAGE, backend="emu", ready="ready", code="code"):  # noqa: B008
    return boots.key(config, image, backend, ready, code)


@pytest.mark.parametrize(
    "other",
    [
        {"image": replace(IMAGE, kernel=b"Kernel")},
        {"image": replace(IMAGE, initrd=b"")},
        {"image": replace(IMAGE, cmdline="quiet")},
        {"image": replace(IMAGE, flat=True)},
        {"ready": "login:"},
        {"code": "codes"},
    ],
)
def test_another_guest_has_another_key(other):
    assert key(**other) != key() == key()


CONFIGS: dict[str, Any] = {
    "memory_bytes": 8 << 20,
    "cpus": 2,
    "cpu_model": None,  # there is one only
    "tsc_khz": 2_000_000,
    "board": "q35",
    "epoch_ns": 1,
    "devices": (DeviceConfig(id="com5", kind="uart"),),
    "bound": ("com1",),
}


@pytest.mark.parametrize("name", [field.name for field in fields(MachineConfig)])
def test_another_machine_has_another_key(name):
    if CONFIGS[name] is not None:
        assert key(replace(MachineConfig(), **{name: CONFIGS[name]})) != key()


def test_another_engine_has_another_key(monkeypatch):
    before = key()
    monkeypatch.setattr(backends, "probe", lambda name: f"another {name}")
    after = key()
    assert after != before and key(backend="kvm") != after


@given(st.binary(max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_where_a_part_ends_makes_a_difference(data, one, other):
    images = [Image(data[:at], data[at:]) for at in (one, other)]
    assert (key(image=images[0]) == key(image=images[1])) == (images[0] == images[1])


@pytest.fixture
def sources(tmp_path):
    """A copy of our packages, and a function that asks it for its digest, as of `since_ns`."""
    for package in boots._PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def digest(since_ns=time.time_ns() + 10**15):  # noqa: B008
        source = f"from vmm.testing import boots; print(boots.__file__, boots.code({since_ns}))"
        done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        if done.returncode:
            return done.stderr.splitlines()[-1]
        file, found = done.stdout.split()
        assert Path(file).is_relative_to(tmp_path)
        return found

    return digest


@pytest.mark.parametrize("name", ["emu/cpu.py", "vmm/devices/isa/uart.py", "snapshot/reader.py", "kvmbackend/new.py"])
def test_a_changed_source_of_ours_changes_the_digest(sources, tmp_path, name):
    before = sources()
    os.utime(tmp_path / "vmm" / "ram.py")
    assert sources() == before
    with open(tmp_path / name, "a") as file:
        file.write("# changed\n")
    after = sources()
    assert after != before and len(after) == len(before)
    (tmp_path / name).rename(tmp_path / "vmm" / "moved.py")
    assert sources() not in (before, after)


def test_a_source_that_was_written_since_is_not_what_was_imported(sources, tmp_path):
    since = time.time_ns()
    os.utime(tmp_path / "vmm" / "ram.py", ns=(since + 1, since + 1))
    assert sources(since) == f"vmm.errors.BackendError: {tmp_path}/vmm/ram.py was changed after the session had begun"


def test_a_source_that_cannot_be_read(sources, tmp_path):
    """As an editor leaves one while a file is open."""
    (tmp_path / "vmm" / ".#ram.py").symlink_to("nowhere")
    assert sources() == f"vmm.errors.BackendError: {tmp_path}/vmm/.#ram.py: No such file or directory"


# --- the cache


class Cache:
    """One process's part in it, as it were; `booted` counts."""

    def __init__(self, base: Path, boot_own, most_bytes: int = ENOUGH, patience_s: float = 60, run: str = "") -> None:
        self.folder, spare = base / "boots", base / f"spare{len(list(base.iterdir()))}"
        spare.mkdir()
        self.told, self.booted, self._boot_own = Told(), 0, boot_own
        self.boots = Boots(self.folder, spare, self.told, most_bytes=most_bytes, patience_s=patience_s, run=run)

    def boot(self) -> Machine:
        self.booted += 1
        machine: Machine = self._boot_own()
        assert machine.run(until="own guest") == Stopped(StopReason.PATTERN)
        return machine

    def get(self, key: str = KEY, boot=None) -> Path:
        def load(file: Path) -> Path:
            Machine.restore(file, verify=True).close()
            return file

        return self.boots.get(key, boot or self.boot, load)


@pytest.fixture
def caches(tmp_path, boot_own):
    """A function that makes a Cache, of one folder."""
    made = []

    def make(**options):
        made.append(Cache(tmp_path, boot_own, **options))
        return made[-1]

    yield make
    for cache in made:
        cache.boots.close()


def test_a_guest_is_booted_once(caches):
    first, second = caches(), caches()
    file = first.get()
    assert file.stat().st_mode & 0o777 == 0o400 and first.folder.stat().st_mode & 0o777 == 0o700
    assert second.get() == second.get() == file
    assert (first.booted, second.booted) == (1, 0)
    assert str(first.told) == "1 booted and kept" and str(second.told) == "2 from the cache"
    assert b"anyhyve own guest" in boots.shown(file)
    assert boots.usage(first.folder) == (1, file.stat().st_blocks * 512)


def test_other_guests_are_other_files(caches):
    cache = caches()
    assert cache.get() != cache.get(OTHER) and cache.booted == 2


def of_another(file: Path) -> None:
    """The other guest's file under this one's name."""
    os.unlink(file)
    os.link(file.with_name(f"{OTHER}.snapshot"), file)


def flipped(file: Path) -> None:
    """A bit of RAM's."""
    file.chmod(0o600)
    with open(file, "r+b") as opened:
        data = opened.read()
        at = data.index(OWN.read_bytes()[:64])
        opened.seek(at)
        opened.write(bytes([data[at] ^ 1]))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def a_link(file: Path) -> None:
    os.unlink(file)
    file.symlink_to(file.with_name(f"{OTHER}.snapshot"))


@pytest.mark.parametrize("spoil", [flipped, cut, emptied, of_another, a_link])
def test_what_is_not_the_guest_is_removed_and_booted_again(caches, spoil):
    first = caches()
    first.get(OTHER)
    file = first.get()
    first.boots.close()
    spoil(file)
    second = caches()
    assert second.get() == file and not file.is_symlink()
    assert second.booted == 1 and "1 booted and kept" in str(second.told)
    assert caches().get() == file
    assert boots.meta(file)["key"] == KEY and boots.meta(first.get(OTHER))["key"] == OTHER


def test_what_another_put_in_the_place_of_what_was_damaged_stays(caches, tmp_path):
    first, second = caches(), caches()
    file, copy = first.get(), tmp_path / "copy"
    first.boots.close()
    shutil.copy(file, copy)
    loads = []

    def load(path):
        loads.append(path)
        if len(loads) == 1:
            copy.rename(file)
            raise SnapshotError("damaged")

    second.boots.get(KEY, second.boot, load)
    assert loads == [file, file] and second.booted == 0


def test_a_boot_that_this_process_cannot_open_stays(caches, monkeypatch):
    first, second, open_ = caches(), caches(), os.open
    file = first.get()

    def opened(path, *arguments, **options):
        if path == file:
            raise OSError(errno.EMFILE, "too many open files")
        return open_(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", opened)
        assert second.get().parent != file.parent and "too many open files" in str(second.told)
    third = caches()
    assert third.get() == file and not third.booted


def test_what_cannot_be_removed_is_not_used(caches):
    """A folder lies there."""
    cache = caches()
    (cache.folder / f"{KEY}.snapshot").mkdir(parents=True)
    cache.folder.chmod(0o700)
    file = cache.get()
    assert file.parent != cache.folder and cache.booted == 1 and "not to be kept" in str(cache.told)


def test_a_guest_that_does_not_wake_right_after_its_boot_is_an_error(caches):
    cache = caches()

    def load(file):
        raise SnapshotError("damaged")

    with pytest.raises(SnapshotError, match="damaged"):
        cache.boots.get(KEY, cache.boot, load)
    assert cache.booted == 1


# --- the folder


def a_link_to_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def open_to_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o755)


def anothers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another = SimpleNamespace(**{**vars(os), "geteuid": lambda: os.geteuid() + 1})
    monkeypatch.setattr(place, "os", another)


def a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rmdir()
    folder.touch(0o700)


def in_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rmdir()
    folder.parent.rmdir()
    folder.parent.touch(0o700)


@pytest.mark.parametrize("spoil", [a_link_to_it, open_to_others, anothers, a_file, in_a_file])
def test_a_folder_that_is_not_ours_alone_is_not_used(tmp_path, monkeypatch, boot_own, spoil):
    base = tmp_path / "base"
    base.mkdir()
    cache = Cache(tmp_path, boot_own)
    cache.boots.folder = folder = base / "boots"
    folder.mkdir(0o700)
    boots.check(folder)
    spoil(folder, monkeypatch)
    with pytest.raises(BackendError):
        boots.check(folder)
    file = cache.get()
    assert cache.booted == 1 and file.is_relative_to(tmp_path) and not file.is_relative_to(base)
    assert cache.get() == file and cache.booted == 1
    assert not list(base.rglob(f"{KEY}*")) if base.is_dir() else True
    cache.boots.close()


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    folder = tmp_path / "boots"
    boots.check(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root everything can be written to
    with pytest.raises(BackendError, match=f"^{tmp_path}: nothing can be written there$"):
        boots.check(folder)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["lock", "snapshot"])
def test_where_there_is_no_room_a_guest_is_booted_all_the_same(caches, monkeypatch, name):
    cache, save, open_ = caches(), Machine.save, os.open

    def saved(self, path, **options):
        if path.parent == cache.folder:
            raise BackendError("no space")
        save(self, path, **options)

    def opened(path, *arguments, **options):
        if str(path).endswith(".lock"):
            raise OSError(errno.ENOSPC, "no space")
        return open_(path, *arguments, **options)

    if name == "lock":
        monkeypatch.setattr(os, "open", opened)
    else:
        monkeypatch.setattr(Machine, "save", saved)
    assert cache.get().parent != cache.folder
    assert cache.booted == 1 and "no space" in str(cache.told)


# --- what is removed


@pytest.fixture
def size(caches, tmp_path):
    """Bytes of one."""
    cache = caches()
    found = cache.get("f" * 32).stat().st_blocks * 512
    cache.boots.close()
    boots.evict(cache.folder, -1)
    assert not list(cache.folder.iterdir())
    return found


def keys(cache: Cache) -> set[str]:
    return {path.name[0] for path in cache.folder.glob("*.snapshot")}


def get_in_turn(cache: Cache, names: str) -> None:
    """Each by a process that ends; time passes between them."""
    for name in names:
        cache.get(name * 32)
        cache.boots.close()
        for lock in cache.folder.glob("*.lock"):
            then = lock.stat().st_mtime - 10
            os.utime(lock, (then, then))
            os.utime(lock.with_suffix(".snapshot"), (0, 0))  # when it was made does not matter


def test_what_was_not_used_for_longest_is_removed(caches, size):
    cache = caches(most_bytes=3 * size)
    get_in_turn(cache, "abc")
    assert keys(cache) == set("abc") and cache.booted == 3
    get_in_turn(cache, "ad")
    assert keys(cache) == set("acd") and cache.booted == 4
    get_in_turn(cache, "ae")
    assert keys(cache) == set("ade") and len(list(cache.folder.iterdir())) == 6


def test_what_is_in_use_is_not_removed(caches, size):
    user, cache = caches(), caches(most_bytes=size)
    user.get("a" * 32)
    get_in_turn(cache, "bc")
    assert keys(cache) == set("ac")
    user.boots.close()
    get_in_turn(cache, "d")
    assert keys(cache) == set("d")


def test_what_is_larger_than_all_that_may_be_is_kept_while_it_is_used(caches):
    cache = caches(most_bytes=1)
    assert cache.get().exists() and cache.get(OTHER).exists()
    assert keys(cache) == {"0", "1"}


def test_what_a_killed_writer_left_is_removed(caches, size):
    cache = caches()
    left = cache.folder / f".{'a' * 32}.anyhyve.tmp"
    left.write_bytes(MAGIC)
    left.chmod(0o600)
    (cache.folder / f"{OTHER}.lock").touch(0o600)
    cache.get()
    assert {path.name for path in cache.folder.iterdir()} == {f"{KEY}.snapshot", f"{KEY}.lock"}


# --- who boots


BOOTS = f"""
import sys, time
from pathlib import Path
from vmm.testing.boots import Boots, Told

def boot():
    print("booting", flush=True)
    time.sleep(600)

base = Path(sys.argv[1])
Boots(base / "boots", base, Told(), most_bytes=1 << 30, patience_s=60).get("{KEY}", boot, str)
"""


@pytest.fixture
def booting(tmp_path):
    """A process that boots, and does not come to an end."""
    process = subprocess.Popen([sys.executable, "-c", BOOTS, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"booting\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_who_is_killed_while_it_boots_is_followed_by_who_waits(booting, caches, monkeypatch):
    cache, found, looked = caches(), [], []

    def lock(path, lock=boots._lock):
        looked.append(path)
        return lock(path)

    monkeypatch.setattr(boots, "_lock", lock)
    waits = threading.Thread(target=lambda: found.append(cache.get()))
    waits.start()
    eventually(lambda: len(looked) > 2)
    assert not cache.booted
    booting.send_signal(signal.SIGKILL)
    waits.join(60)
    assert found and cache.booted == 1 and found[0].parent == cache.folder


def test_nobody_waits_for_ever(booting, caches):
    cache = caches(patience_s=0.05)
    file = cache.get()
    assert cache.booted == 1 and file.parent != cache.folder
    assert "another process has been booting for 0.05 s" in str(cache.told)


def test_a_lock_that_was_removed_before_it_was_ours_is_none(tmp_path, monkeypatch):
    """As by one that has removed the boot meanwhile."""
    path, flock = tmp_path / "lock", fcntl.flock

    def locked(fd, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    assert boots._lock(path) is None
    lock = boots._lock(path)
    assert lock is not None and boots._lock(path) is None
    os.close(lock)


def test_a_long_wait_is_told():
    told = Told()
    told.add({"from the cache": 3}, 0.5)
    assert str(told) == "3 from the cache"
    told.add({"from the cache": 1, "booted and kept": 1}, 4.25)
    told.add({}, 1.5)
    assert str(told) == "1 booted and kept, 4 from the cache; waited 4.2 s for another process to boot"


def fails() -> Machine:
    raise GuestError("it panics\nits last lines")


def test_what_failed_in_a_run_is_not_tried_again_in_it(caches):
    with pytest.raises(GuestError, match=r"^it panics\nits last lines$"):
        caches(run="one").get(boot=fails)
    same, next_run, no_run = caches(run="one"), caches(run="two"), caches()
    with pytest.raises(GuestError, match=r"^no guest, as in another process: it panics$"):
        same.get()
    with pytest.raises(GuestError, match="it panics"):
        no_run.get(boot=fails)
    next_run.get()
    assert (same.booted, next_run.booted) == (0, 1)
    assert same.get().parent == same.folder  # it is there now
