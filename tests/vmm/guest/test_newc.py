"""newc archives: Linux Documentation/driver-api/early-userspace/buffer-format.rst."""

import shutil
import stat
import subprocess
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.guest.newc import Archive


@dataclass
class Entry:
    name: str
    inode: int
    mode: int
    uid: int
    gid: int
    links: int
    mtime: int
    device: tuple[int, int]
    data: bytes


def entries(archive: bytes) -> list[Entry]:
    """A reader written from the kernel's page alone."""
    found: list[Entry] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701" and at % 4 == 0
        words = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        inode, mode, uid, gid, links, mtime, size, _, _, major, minor, name_size, check = words
        assert check == 0
        name_end = at + 110 + name_size
        assert archive[name_end - 1] == 0
        name = archive[at + 110 : name_end - 1].decode()
        start = name_end + 3 & ~3
        at = start + size + 3 & ~3
        if name == "TRAILER!!!":
            assert not archive[at:].strip(b"\0")
            return found
        found.append(Entry(name, inode, mode, uid, gid, links, mtime, (major, minor), archive[start : start + size]))


def sample() -> Archive:
    archive = Archive()
    archive.directory("bin")
    archive.file("bin/tool", b"\x7fELF odd", 0o755)
    archive.symlink("bin/sh", "tool")
    archive.character_device("console", 5, 1)
    archive.file("empty", b"")
    return archive


def test_each_kind():
    got = [(e.name, e.mode, e.links, e.device, e.data) for e in entries(bytes(sample()))]
    assert got == [
        ("bin", stat.S_IFDIR | 0o755, 2, (0, 0), b""),
        ("bin/tool", stat.S_IFREG | 0o755, 1, (0, 0), b"\x7fELF odd"),
        ("bin/sh", stat.S_IFLNK | 0o777, 1, (0, 0), b"tool"),
        ("console", stat.S_IFCHR | 0o600, 1, (5, 1), b""),
        ("empty", stat.S_IFREG | 0o644, 1, (0, 0), b""),
    ]


def test_no_trace_of_the_host():
    read = entries(bytes(sample()))
    assert {(e.uid, e.gid, e.mtime) for e in read} == {(0, 0, 0)}
    assert [e.inode for e in read] == [1, 2, 3, 4, 5]  # two of one number would be hard links
    assert bytes(sample()) == bytes(sample())
    archive = sample()
    assert bytes(archive) == bytes(archive)


@given(st.lists(st.tuples(st.from_regex(r"[a-zé]{1,9}", fullmatch=True), st.binary(max_size=20)), max_size=5))
def test_any_length_is_padded(files):
    archive = Archive()
    for name, data in files:
        archive.file(name, data)
    whole = bytes(archive)
    assert len(whole) % 512 == 0
    assert [(e.name, e.data) for e in entries(whole)] == files


@pytest.mark.parametrize("name", ["", "/bin", "a\0b"])
def test_names_are_relative(name):
    with pytest.raises(AssertionError):
        Archive().file(name, b"")


@pytest.fixture
def cpio():
    if shutil.which("cpio") is None:
        pytest.skip("no cpio on this machine (Debian: apt-get install cpio)")

    def run(*arguments, cwd, data):
        return subprocess.run(["cpio", "--quiet", *arguments], cwd=cwd, input=data, capture_output=True, check=True)

    return run


def test_cpio_lists_it(cpio, tmp_path):
    listed = cpio("-t", cwd=tmp_path, data=bytes(sample())).stdout.decode().split()
    assert listed == ["bin", "bin/tool", "bin/sh", "console", "empty"]


def test_cpio_unpacks_it(cpio, tmp_path):
    # the device is left out: only root may make one
    cpio("-i", "--no-absolute-filenames", "bin", "bin/*", "empty", cwd=tmp_path, data=bytes(sample()))
    assert (tmp_path / "bin/tool").read_bytes() == b"\x7fELF odd"
    assert stat.S_IMODE((tmp_path / "bin/tool").stat().st_mode) == 0o755
    assert (tmp_path / "bin/sh").readlink().name == "tool"
    assert (tmp_path / "empty").read_bytes() == b""
