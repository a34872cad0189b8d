"""The file a snapshot is written to: a temporary of our own making that gets the name when it is whole.

Rules
* What is replaced is a snapshot, by its magic: an empty file is none. `force` replaces any other regular file, too.
* What is no regular file (a device, a FIFO, a socket, a folder, a link) is never replaced, nor is a file that is
  read-only: so a snapshot is kept.
* A snapshot that others in its folder stand on is replaced with `force` only.
* The temporary is a regular file of this user with one link and mode 0600, whatever the umask. It lies in the same
  folder under a name made of the digest of the file's, `.*.anyhyve.tmp`, under which nothing else is saved. What a
  killed writer left there is reused, or removed by `clear`. Anything else under that name is not touched, and the save
  is refused.
* One writer to a name: a second is refused with EBUSY while the first is at work.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path

from blake3 import blake3

from snapshot.children import is_snapshot, standing_on
from snapshot.container import FILE_HEADER, MAGIC, PART
from snapshot.errors import Refused, check_path

_OURS = re.compile(rb"\.[0-9a-f]{32}\.anyhyve\.tmp")
_MODE = 0o600
_NAMED = 3  # children, in a message


class Target:
    """Holds the lock on the name, and the temporary open, until `leave`."""

    def __init__(self, path: Path, *, force: bool = False) -> None:
        """Raises Refused, or OSError where the host will not let us write."""
        self.path, self._force = Path(path), force
        refuse(self.path, force)
        digest = blake3(os.fsencode(self.path.name)).hexdigest(length=16)
        self.temporary = self.path.with_name(f".{digest}.anyhyve.tmp")
        self.fd = _take(self.temporary)

    def put(self) -> None:
        """Put it on disk and give it its name, if nothing lies there by now that is not to be replaced."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(self.fd)
            refuse(self.path, self._force)
            os.rename(self.temporary, self.path)
            os.fsync(folder)
        finally:
            os.close(folder)

    @property
    def in_place(self) -> bool:
        """Whether the file has its name: also when another process, a fork of this one, gave it that."""
        return _is(self.fd, self.path)

    def leave(self) -> None:
        """Let go of it. What has not got its name is removed."""
        try:
            with contextlib.suppress(OSError):  # the first error is the one to report
                if _is(self.fd, self.temporary):  # by now the name may be another writer's
                    os.unlink(self.temporary)
        finally:
            os.close(self.fd)


def clear(folder: Path) -> None:
    """Remove what killed writers left in a folder: temporaries of ours that nobody writes any more."""
    with contextlib.suppress(FileNotFoundError):
        for name in filter(_OURS.fullmatch, os.listdir(os.fsencode(folder))):
            path = folder / os.fsdecode(name)
            with contextlib.suppress(OSError):
                fd = _left(path)
                try:
                    if _alone(fd, path):
                        _check_contents(fd, path)
                        path.unlink()
                finally:
                    os.close(fd)


def refuse(path: Path, force: bool = False) -> None:
    """Raises Refused when no snapshot may be written to `path`, as far as can be told before; OSError where that
    cannot be told."""
    check_path(path)
    if not path.name or path.name == "..":
        raise _refused(path, "that is a folder")
    if _OURS.fullmatch(os.fsencode(path.name)):
        raise _refused(path, "names like this are for temporaries")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise _refused(path, "what lies there is no regular file")
    if not mode & 0o222:
        raise _refused(path, "the file there is read-only")
    if force:
        return
    if not is_snapshot(path):
        raise _refused(path, "the file there is no snapshot (--force replaces it)")
    if children := standing_on(path):
        shown = ", ".join(name if name.isprintable() else ascii(name) for name in children[:_NAMED])
        more = f" and {len(children) - _NAMED} more" if len(children) > _NAMED else ""
        raise _refused(path, f"{shown}{more}: differences to the file there (--force replaces it)")


def _refused(path: Path, why: str) -> Refused:
    return Refused(errno.EEXIST, why, str(path))


def _take(path: Path) -> int:
    """The temporary at `path`, empty, ours alone until it is closed."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
            made = True
        except FileExistsError:
            try:
                fd, made = _left(path), False
            except FileNotFoundError:
                continue
        try:
            if made:
                os.fchmod(fd, _MODE)
            if _alone(fd, path):
                if not made:
                    _check_contents(fd, path)
                    os.ftruncate(fd, 0)
                return fd
        except BaseException as error:
            if made and not (isinstance(error, OSError) and error.errno == errno.EBUSY):
                with contextlib.suppress(OSError):
                    os.unlink(path)
            os.close(fd)
            raise
        os.close(fd)


def _left(path: Path) -> int:
    """What a writer of ours may have left, opened. Raises Refused, OSError."""
    _check_ours(path, path.lstat())  # before it is opened: opening a device may do something
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _alone(fd: int, path: Path) -> bool:
    """Whether the open temporary is nobody else's from now on. Not so when its last owner gave it its name between open
    and lock: then it is a good snapshot. Raises OSError: EBUSY while another writes it."""
    _lock(fd, path)
    return _is(fd, path)


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another is writing a snapshot of this name", str(path)) from None


def _check_ours(path: Path, status: os.stat_result, head: bytes = b"") -> None:
    """Raises Refused unless it can only be what a killed writer of ours left; `head` is how it begins."""
    mine = stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == _MODE and status.st_nlink == 1
    magic, part = head[: FILE_HEADER.size], head[FILE_HEADER.size :]
    begun = (not any(magic) or magic.startswith(MAGIC)) and (not any(part) or part == PART)
    if not (mine and status.st_uid == os.geteuid() and begun):
        raise _refused(path, "a temporary is wanted there, and what lies there is none of ours: remove it")


def _check_contents(fd: int, path: Path) -> None:
    """The same, of what is open."""
    _check_ours(path, os.fstat(fd), os.pread(fd, FILE_HEADER.size + len(PART), 0))


def _is(fd: int, path: Path) -> bool:
    """Whether `path` names the open file."""
    try:
        named = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), named)
