"""Where a named machine's socket lies, who holds it, and who may not be followed there.

    RUNDIR/NAME.sock    the socket, mode 0600, in a folder of mode 0700
    RUNDIR/NAME.lock    locked (flock) as long as the machine lives: a socket without that lock is stale

Rules
* Nothing is followed and nothing foreign is removed: what is at the socket's path is unlinked only when the lock is
  ours and it is a socket of our user's.
* All goes through the folder's descriptor: a path of any length will do, and nobody can exchange the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from vmm.control.lifecycle import check_name
from vmm.errors import BackendError, RequestError

_BACKLOG = 256


def rundir(explicit: Path | None = None) -> Path:
    """The folder of sockets: as asked for, else by the XDG base directory specification, else one of ours in /tmp."""
    if explicit is not None:
        return explicit
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base, "anyhyve")
    return Path(f"/tmp/anyhyve-{os.getuid()}")


def open_folder(path: Path, *, create: bool) -> int:
    """A descriptor of the folder, found to be ours and nobody else's. Raises BackendError."""
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700, parents=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise BackendError(f"{path}: {error.strerror}") from None
    info = os.fstat(folder)
    owners = (os.geteuid(),) if create or os.geteuid() else (info.st_uid,)  # root may ask anybody's machine
    if info.st_uid not in owners or info.st_mode & 0o077:
        os.close(folder)
        found = f"owner {info.st_uid}, mode {info.st_mode & 0o777:o}"
        raise BackendError(f"{path}: not a folder of this user alone ({found})")
    return folder


class Place:
    """A machine's place in the folder of sockets. Context manager: gives it up at the end."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises RequestError when a machine of this name runs, BackendError when what lies there is not ours."""
        self.name = check_name(name)
        self.path = folder / f"{name}.sock"
        self._folder = open_folder(folder, create=True)
        try:
            self._lock = self._take_lock()
        except BaseException:
            os.close(self._folder)
            raise
        try:
            self._clear(self.path.name)
            self.socket = self._bind()
        except BaseException:
            self._give_up_lock()
            raise

    def withdraw(self) -> None:
        """Remove the socket's name, if it is still ours: nobody new finds it, and who is cut off from here on can tell
        that the machine has not been killed (`withdrawn`)."""
        with contextlib.suppress(OSError):
            found = os.stat(self.path.name, dir_fd=self._folder, follow_symlinks=False)
            if (found.st_dev, found.st_ino) == self._bound:
                os.unlink(self.path.name, dir_fd=self._folder)

    def close(self) -> None:
        """Remove the socket, if it is still ours."""
        self.withdraw()
        self.socket.close()
        self._give_up_lock()

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_lock(self) -> int:
        name = f"{self.name}.lock"
        while True:
            try:
                lock = _open_lock(name, self._folder, os.O_CREAT)
            except OSError as error:
                raise BackendError(f"{self.path.with_name(name)}: not a lock of ours: {error.strerror}") from None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = os.fstat(lock)
                named = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
                if (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino):
                    return lock
            except FileNotFoundError:  # between open and lock its last owner has ended
                pass
            except BlockingIOError:
                os.close(lock)
                raise RequestError(f"a machine named {self.name} runs already") from None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def _give_up_lock(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(f"{self.name}.lock", dir_fd=self._folder)
        os.close(self._lock)
        os.close(self._folder)

    def _clear(self, name: str) -> None:
        """Remove a stale socket: we have the lock, so its machine is no more."""
        try:
            found = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise BackendError(f"{self.path.with_name(name)}: in the way, and not a socket of ours")
        os.unlink(name, dir_fd=self._folder)

    def _bind(self) -> socket.socket:
        """It gets its name when it listens: who sees it can connect."""
        unnamed = f"{self.name}.new"
        self._clear(unnamed)
        bound = socket.socket(socket.AF_UNIX)
        try:
            bound.bind(_through(self._folder, unnamed))
            os.chmod(unnamed, 0o600, dir_fd=self._folder)
            bound.listen(_BACKLOG)
            os.rename(unnamed, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except OSError as error:
            bound.close()
            raise BackendError(f"{self.path}: {error.strerror}") from None
        found = os.stat(self.path.name, dir_fd=self._folder, follow_symlinks=False)
        self._bound = found.st_dev, found.st_ino
        return bound


def connect(folder: Path, name: str) -> socket.socket:
    """A connection to a machine's socket. Raises RequestError when no such machine runs."""
    try:
        directory = open_folder(folder, create=False)
    except BackendError as error:
        raise RequestError(f"no machine named {check_name(name)} runs here: {error}") from None
    found = socket.socket(socket.AF_UNIX)
    try:
        if os.path.islink(folder / f"{name}.sock"):
            raise BackendError(f"{folder / name}.sock: a symbolic link, which we do not follow")
        found.connect(_through(directory, f"{check_name(name)}.sock"))
    except OSError as error:
        found.close()
        why = "stale" if error.errno == errno.ECONNREFUSED else error.strerror
        raise RequestError(f"no machine named {name} runs here: {folder / name}.sock: {why}") from None
    except BaseException:
        found.close()
        raise
    finally:
        os.close(directory)
    return found


def withdrawn(folder: Path, name: str) -> bool:
    """Whether a machine that was there has come to its end in order: one that is killed leaves its socket."""
    return not os.path.lexists(folder / f"{name}.sock")


def names(folder: Path) -> Iterator[str]:
    """The names of the machines whose sockets are in the folder, stale ones not counted; none when there is no such
    folder of ours."""
    try:
        directory = open_folder(folder, create=False)
    except BackendError:
        return
    try:
        for entry in sorted(os.listdir(directory)):
            if entry.endswith(".lock") and _is_locked(entry, directory):
                yield entry.removesuffix(".lock")
    finally:
        os.close(directory)


def _is_locked(name: str, folder: int) -> bool:
    try:
        lock = _open_lock(name, folder)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _open_lock(name: str, folder: int, flags: int = 0) -> int:
    return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600, dir_fd=folder)


def _through(folder: int, name: str) -> str:
    """A path of few characters: a socket's has 107 at most (unix(7))."""
    return f"/proc/self/fd/{folder}/{name}"
