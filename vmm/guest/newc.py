"""A writer of cpio "newc" archives, the format of a Linux initial RAM disk.

Linux Documentation/driver-api/early-userspace/buffer-format.rst. The same calls always give the same bytes: times
are 0, the owner is root, inodes count from 1.

Absent: hard links, owners, the checksummed variant (070702).
"""

from __future__ import annotations

import stat


class Archive:
    """Entries in the order they are added: a directory before what lies in it. `bytes(archive)` is the whole file."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        self._add(name, stat.S_IFDIR | mode, links=2)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(name, stat.S_IFCHR | mode, major=major, minor=minor)

    def __bytes__(self) -> bytes:
        whole = b"".join((*self._parts, _entry("TRAILER!!!", inode=0, mode=0, links=1)))
        return whole + bytes(-len(whole) % 512)  # cpio's block; the kernel skips zeros

    def _add(self, name: str, mode: int, data: bytes = b"", links: int = 1, major: int = 0, minor: int = 0) -> None:
        assert name and not name.startswith("/") and "\0" not in name, f"{name!r} is not a relative name"
        self._inode += 1
        self._parts.append(_entry(name, self._inode, mode, links, data, major, minor))


def _entry(name: str, inode: int, mode: int, links: int, data: bytes = b"", major: int = 0, minor: int = 0) -> bytes:
    path = name.encode() + b"\0"
    # ino mode uid gid nlink mtime filesize, the file's own device, rdev, namesize check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(path), 0)
    return _padded(b"070701" + b"".join(b"%08x" % field for field in fields) + path) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
