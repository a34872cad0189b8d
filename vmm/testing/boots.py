"""Guests that are up, kept for other processes: a cache of snapshots, so that a guest is booted once a computer and not
once a session of pytest (docs/testing.md).

    FOLDER/KEY.snapshot    the guest when it is up, read-only; META has KEY, and what the console had shown
    FOLDER/KEY.lock        locked (flock) by who looks for the file or boots; its time says when that was last

Rules
* The key is a digest over all that decides what a guest is when it is up: itself, the machine, the backend, our code.
* A file is the guest when it is whole, all of it checked against its digests, and says that it is this key's. What is
  not is removed, and the guest is booted again.
* Nobody boots what another is booting. A lock ends with its process.
* A file is locked (flock, shared) as long as it is used. What nobody uses is removed, the least recently used first,
  when all are more than a size.
* The folder is this user's alone, and no link. What cannot be kept costs nothing but the boot.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import os
import platform
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from snapshot.errors import SnapshotError
from vmm.control.place import open_folder
from vmm.errors import BackendError, GuestError, RequestError
from vmm.host import folders

if TYPE_CHECKING:
    from snapshot.field_types import Json
    from vmm.board.config import MachineConfig
    from vmm.guest.image import Image
    from vmm.machine.machine import Machine

SUFFIX = ".snapshot"
_PACKAGES = ("anyhyve", "snapshot", "vmm", "emu", "kvmbackend")
_SHOWN = 256 << 10  # bytes of the console that are kept
_LOOK_S = 0.02  # a lock of another's is looked at this often
_LONG_S = 1.0  # a wait that is worth a word
T = TypeVar("T")


# --- the folder


def place() -> Path:
    """The folder. It need not be there. Raises BackendError for a user who has none."""
    return folders.cache() / "boots"


def check(folder: Path) -> None:
    """Raises BackendError, saying why, where nothing can be kept. Makes nothing."""
    there = folder
    if os.path.lexists(folder):
        os.close(open_folder(folder, create=True))
    else:
        there = next(above for above in folder.parents if os.path.lexists(above))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise BackendError(f"{there}: nothing can be written there")


def usage(folder: Path) -> tuple[int, int]:
    """How many boots are kept, and the bytes they take on the disk: the files are sparse."""
    sizes = [found.size for found in _kept(folder)]
    return len(sizes), sum(sizes)


# --- the key


def key(config: MachineConfig, image: Image, backend: str, ready: str, code: str) -> str:
    """BLAKE3, in hexadecimal, of all that decides what a guest is once its console has shown `ready`. `code` is that
    of `code()`. Raises BackendError for a backend that is not here."""
    from blake3 import blake3

    from snapshot import canon
    from snapshot.schema import encode, schema_of

    schema = schema_of(type(config))
    parts = (
        canon.encode([schema.name, schema.version, encode(config)]),
        image.kernel, image.initrd, image.cmdline.encode(errors="surrogatepass"), bytes([image.flat]),
        backend.encode(), engine(backend).encode(), ready.encode(errors="surrogatepass"), code.encode(),
    )  # fmt: skip
    found = blake3()
    for part in parts:  # each by its own digest: where one ends and the next begins makes a difference
        found.update(blake3(part).digest())
    return found.hexdigest(length=16)


def engine(backend: str) -> str:
    """What runs the guest's code, with its version."""
    from vmm.cpu import backends

    how = backends.probe(backend)
    return f"{how}, {platform.release()}, {processor()}" if backend == "kvm" else how


def processor() -> str:
    """This computer's, by name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.machine()


@cache
def code(since_ns: int) -> str:
    """A digest of our version and our sources: an editable install changes without its version. They are read, which
    takes ten milliseconds. Raises BackendError for a file that was written later than `since_ns` (Unix time): what was
    imported may not be what is there. So for one that cannot be read."""
    from importlib.metadata import version

    from blake3 import blake3

    found = blake3(version("anyhyve").encode())
    for package in _PACKAGES:
        spec = find_spec(package)
        for root in sorted((spec and spec.submodule_search_locations) or ()):
            for path in sorted(Path(root).rglob("*.py")):
                try:
                    changed_ns, data = path.stat().st_mtime_ns, path.read_bytes()
                except OSError as error:
                    raise BackendError(f"{path}: {error.strerror}") from None
                if changed_ns > since_ns:
                    raise BackendError(f"{path} was changed after the session had begun")
                for part in (f"{package}/{path.relative_to(root)}".encode(), data):
                    found.update(blake3(part).digest())
    return found.hexdigest()


# --- the cache


@dataclass
class Told:
    """What became of the guests of a session: how often each, and the longest wait for another process's boot."""

    counts: Counter[str] = field(default_factory=Counter)
    waited_s: float = 0.0

    def add(self, counts: dict[str, int], waited_s: float) -> None:
        """What became of another process's."""
        self.counts.update(counts)
        self.waited_s = max(self.waited_s, waited_s)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        said = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        wait = f"; waited {self.waited_s:.1f} s for another process to boot" if self.waited_s > _LONG_S else ""
        return said + wait


class Boots:
    """One process's part in the cache. Context manager: at its end what it used may be removed."""

    def __init__(
        self, folder: Path | None, spare: Path, told: Told, *, most_bytes: int, patience_s: float, run: str = ""
    ) -> None:
        """`spare` is a folder of this process's own, for what cannot be kept, or without a `folder`. `patience_s`: how
        long to wait for another process's boot. Processes of one `run` do not try again what failed in another."""
        self.folder, self._spare, self._told = folder, spare, told
        self._most_bytes, self._patience_s, self._run = most_bytes, patience_s, run
        self._used: list[int] = []  # descriptors, locked

    def get(self, key: str, boot: Callable[[], Machine], load: Callable[[Path], T]) -> T:
        """What `load` makes of the file of the guest, which is booted if it is not there. `load` must look at all of
        the file, and raise what Machine.restore raises. Raises what `boot` raises, and what `load` raises of a guest
        that was just booted; GuestError for one that another process of the run could not boot."""
        while True:
            with self._locked(key) as lock:
                file = (self._spare if lock is None or self.folder is None else self.folder) / f"{key}{SUFFIX}"
                try:
                    used = _use(file)
                except OSError as error:
                    self._give_up(error)
                    continue
                if new := used is None:
                    self._check_failure(lock)
                    file = self._boot(key, boot, file, lock)
                    used = _use(file)
                    assert used is not None
            try:
                if meta(file).get("key") != key:
                    raise SnapshotError(f"{file}: not the guest its name says")
                found = load(file)
            except BaseException as error:
                if not new and isinstance(error, (SnapshotError, BackendError, RequestError, OSError)):
                    self._told.counts[f"kept, but of no use ({error})"] += 1
                    self._remove(key, file, used)
                    continue
                os.close(used)
                raise
            self._used.append(used)
            if not new and file.parent != self._spare:
                self._told.counts["from the cache"] += 1
            return found

    def close(self) -> None:
        while self._used:
            os.close(self._used.pop())

    def __enter__(self) -> Boots:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def code(self, since_ns: int) -> str:
        """As the function. Where it would raise, nothing is kept."""
        try:
            return code(since_ns) if self.folder is not None else ""
        except BackendError as error:
            self._give_up(error)
            return ""

    def _give_up(self, why: OSError | BackendError) -> None:
        """From now on nothing is kept. Raises `why` where nothing was."""
        if self.folder is None:
            raise why
        self._told.counts[f"not to be kept ({why})"] += 1
        self.folder = None

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[int | None]:
        """Context manager: a descriptor that holds the key's lock; None where there is no cache."""
        lock = self._lock(key)
        try:
            yield lock
        finally:
            if lock is not None:
                os.close(lock)

    def _lock(self, key: str) -> int | None:
        if self.folder is None:
            return None
        began = time.monotonic()
        try:
            os.close(open_folder(self.folder, create=True))
            while (lock := _lock(self.folder / f"{key}.lock")) is None:
                if time.monotonic() > began + self._patience_s:
                    raise BackendError(f"another process has been booting for {self._patience_s:g} s")
                time.sleep(_LOOK_S)
            os.utime(lock)
        except (OSError, BackendError) as error:
            self._give_up(error)
            return None
        self._told.waited_s = max(self._told.waited_s, time.monotonic() - began)
        return lock

    def _boot(self, key: str, boot: Callable[[], Machine], file: Path, lock: int | None) -> Path:
        """Boot, and save; where there is no room, in the spare folder. The file it is in."""
        try:
            machine = boot()
        except GuestError as error:
            if lock is not None and self._run:
                with contextlib.suppress(OSError):
                    os.pwrite(lock, f"{self._run} {error}".partition("\n")[0].encode(errors="replace") + b"\n", 0)
            raise
        with machine:
            _, shown = machine.board.console.read(machine.board.console.total - _SHOWN)
            meta: dict[str, Json] = {"key": key, "console": base64.b64encode(shown).decode()}
            try:
                machine.save(file, meta=meta)
                self._told.counts["booted" if file.parent == self._spare else "booted and kept"] += 1
            except (BackendError, RequestError) as error:
                if file.parent == self._spare:
                    raise
                self._told.counts[f"booted, but not kept ({error})"] += 1
                file = self._spare / file.name
                machine.save(file, meta=meta)
        file.chmod(0o400)  # so that no test saves over it
        if self.folder is not None:
            evict(self.folder, self._most_bytes, keep=key)
        return file

    def _check_failure(self, lock: int | None) -> None:
        if lock is not None and self._run:
            run, _, why = os.pread(lock, 4096, 0).decode(errors="replace").partition("\n")[0].partition(" ")
            if run == self._run:
                raise GuestError(f"no guest, as in another process: {why}")

    def _remove(self, key: str, file: Path, used: int) -> None:
        """Remove what is of no use, if it is still there."""
        with self._locked(key) as lock:
            try:
                if lock is not None or file.parent == self._spare:
                    with contextlib.suppress(FileNotFoundError):
                        if os.path.samestat(os.fstat(used), file.lstat()):
                            file.unlink()
            except OSError as error:
                self._give_up(error)
            finally:
                os.close(used)


def meta(file: Path) -> dict[str, str]:
    """What a file of the cache says of itself; nothing, where it is none."""
    from snapshot.meta import peek

    found = peek(file)
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def shown(file: Path) -> bytes:
    """What the console of the guest had shown when it was up; the last of it. Raises SnapshotError."""
    try:
        return base64.b64decode(meta(file).get("console", ""))
    except ValueError:
        raise SnapshotError(f"{file}: what the console had shown is damaged") from None


@dataclass(frozen=True)
class _Kept:
    key: str
    size: int  # bytes on the disk
    used_s: float


def _kept(folder: Path) -> Iterator[_Kept]:
    with contextlib.suppress(OSError):
        for path in folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                found = path.lstat()
                used_s = found.st_mtime
                with contextlib.suppress(OSError):
                    used_s = max(used_s, path.with_suffix(".lock").lstat().st_mtime)
                yield _Kept(path.name.removesuffix(SUFFIX), found.st_blocks * 512, used_s)


def evict(folder: Path, most_bytes: int, keep: str = "") -> int:
    """Remove what was not used for longest, until the rest is `most_bytes` at most. What is in use stays, and `keep`.
    How many were removed."""
    from snapshot import target

    removed = 0
    with contextlib.suppress(OSError):
        target.clear(folder)
        for lock in folder.glob("*.lock"):
            if not os.path.lexists(lock.with_suffix(SUFFIX)):  # of a boot that failed
                _removed(folder, lock.stem)
    kept = sorted(_kept(folder), key=lambda found: found.used_s)
    total = sum(found.size for found in kept)
    for found in kept:
        if total <= most_bytes:
            break
        if found.key != keep and _removed(folder, found.key):
            total -= found.size
            removed += 1
    return removed


def _removed(folder: Path, key: str) -> bool:
    """Remove one, with its lock, if nobody uses it."""
    path = folder / f"{key}.lock"
    try:
        if (lock := _lock(path)) is None:
            return False
    except OSError:
        return False
    try:
        file = folder / f"{key}{SUFFIX}"
        if (used := _use(file, fcntl.LOCK_EX)) is not None:
            file.unlink()
            os.close(used)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _use(file: Path, how: int = fcntl.LOCK_SH) -> int | None:
    """A descriptor of the file, locked; None where there is none. What is there and can be none is removed. Raises
    BlockingIOError for one that is locked otherwise, OSError."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise
        file.unlink()
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            file.unlink()
            os.close(fd)
            return None
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None while another does. Raises OSError."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.lstat()):  # else it was removed between open and lock
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None
