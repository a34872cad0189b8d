"""What a save touches: nothing that is not its own. Whatever lies under the name or under the temporary's, whatever
fails, and whenever the writer is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import children, rewrite, unpack
from snapshot.chain import Chain
from snapshot.container import BASE, BLOCK, MAGIC, PART, Extra
from snapshot.errors import Refused, SnapshotError
from snapshot.field_types import u8
from snapshot.reader import Reader
from snapshot.schema import state
from snapshot.target import Target, clear, refuse
from snapshot.writer import Writer

PAGE = 4096


@state("test.target.config", version=1)
class Config:
    number: u8 = 0


def save(path: Path, number: int = 0, *, parent: Path | None = None, force: bool = False, blocks: int = 1) -> Path:
    known = None
    with Writer(path, force=force) as writer:
        writer.part("config", Config(number=number))
        if parent is not None:
            with Chain.for_child(parent, path, [("ram.0", 0, blocks * BLOCK)]) as chain:
                writer.base(chain.as_parent())
                known = chain.digests(0)
        writer.ram("ram.0", 0, memoryview(bytes([number + 1]) * blocks * BLOCK), None, parent=known)
        writer.commit()
    return path


def number(path: Path) -> Any:
    with Reader(path) as reader:
        reader.verify_ram()
        return reader.parts["config"].state["number"]


def temporary(path: Path) -> Path:
    """The name of the file that a save to `path` is first written to."""
    target = Target(path, force=True)
    target.leave()
    return target.temporary


def seen(folder: Path) -> dict[str, Any]:
    """All there is in a folder, as exactly as can be told."""
    found = {}
    for path in folder.rglob("*"):
        info = path.lstat()
        held = path.read_bytes() if stat.S_ISREG(info.st_mode) else os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(folder))] = info.st_mode, info.st_ino, info.st_nlink, info.st_uid, held
    return found


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# --- what lies there


def plant(path: Path, what: str, elsewhere: Path) -> None:
    """Put something that is not ours at `path`; what it may lead to is in the folder `elsewhere`."""
    other = elsewhere / f"of {path.name[-8:]}"
    match what:
        case "fifo":
            os.mkfifo(path, 0o600)
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(elsewhere / "bound"))  # its own path would be too long
            (elsewhere / "bound").rename(path)
        case "folder":
            path.mkdir()
        case "link":
            other.write_text("mine")
            path.symlink_to(other)
        case "link to a snapshot":
            path.symlink_to(save(other))
        case "dangling link":
            path.symlink_to(other)
        case "device":
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        case "text":
            path.write_text("mine")
            path.chmod(0o600)
        case "empty":
            path.touch()
        case "zeros that all may write":
            path.write_bytes(bytes(PAGE))
            path.chmod(0o606)
        case "hard link":
            other.write_bytes(bytes(100))
            other.chmod(0o600)
            os.link(other, path)
        case "somebody else's":
            path.write_bytes(bytes(100))
            path.chmod(0o600)
            os.chown(path, 65534, 65534)
        case _:
            raise AssertionError(what)


ODD = ["fifo", "socket", "folder", "link", "link to a snapshot", "dangling link", "device"]
FILES = ["text", "empty", "zeros that all may write", "hard link", "somebody else's"]


def needs_root(what: str) -> None:
    if what in ("device", "somebody else's") and os.geteuid() != 0:
        pytest.skip("only root can make one, and only root could lose one")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ODD + FILES)
def test_what_lies_under_the_name(tmp_path: Path, what: str, force: bool) -> None:
    needs_root(what)
    (tmp_path / "in").mkdir()
    plant(tmp_path / "in" / "s", what, tmp_path)
    before = seen(tmp_path)
    if force and what in FILES:
        save(tmp_path / "in" / "s", force=True)
        assert number(tmp_path / "in" / "s") == 0 and os.listdir(tmp_path / "in") == ["s"]
        return
    with pytest.raises(Refused) as error:
        save(tmp_path / "in" / "s", force=force)
    assert error.value.filename == str(tmp_path / "in" / "s")
    assert seen(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", [*ODD, *FILES[:1], *FILES[2:]])
def test_what_lies_under_the_temporarys_name(tmp_path: Path, what: str, force: bool) -> None:
    needs_root(what)
    (tmp_path / "in").mkdir()
    place = temporary(tmp_path / "in" / "s")
    plant(place, what, tmp_path)
    before = seen(tmp_path)
    with pytest.raises(Refused, match="none of ours: remove it") as error:
        save(tmp_path / "in" / "s", force=force)
    assert error.value.filename == str(place)
    assert seen(tmp_path) == before


@pytest.mark.parametrize("what", [*ODD, *FILES])
def test_what_comes_to_lie_there_meanwhile(tmp_path: Path, what: str) -> None:
    """Found before it is replaced, at the last moment."""
    needs_root(what)
    (tmp_path / "in").mkdir()
    with Writer(tmp_path / "in" / "s") as writer:
        writer.part("config", Config())
        plant(tmp_path / "in" / "s", what, tmp_path)
        with pytest.raises(Refused):
            writer.commit()
        left = seen(tmp_path)
    assert {name: what for name, what in left.items() if ".tmp" not in name} == seen(tmp_path)


def test_files_of_the_users_that_are_called_like_temporaries(tmp_path: Path) -> None:
    (tmp_path / "s.tmp").write_text("mine")
    save(tmp_path / "s.tmp.snapshot")
    save(tmp_path / "s")
    assert (tmp_path / "s.tmp").read_text() == "mine"
    with pytest.raises(Refused, match="for temporaries"):
        save(temporary(tmp_path / "s"))


LEFT = [b"", bytes(PAGE), bytes(32) + PART + b"x" * 9999, MAGIC + bytes(20) + PART + b"x"]


@pytest.mark.parametrize("left", LEFT)
def test_what_a_killed_writer_left_is_reused(tmp_path: Path, left: bytes) -> None:
    place = temporary(tmp_path / "s")
    place.write_bytes(left)
    place.chmod(0o600)
    save(tmp_path / "s")
    assert number(tmp_path / "s") == 0 and os.listdir(tmp_path) == ["s"]


def test_what_killed_writers_left_is_cleared(tmp_path: Path) -> None:
    for i, left in enumerate(LEFT):
        place = temporary(tmp_path / str(i))
        place.write_bytes(left)
        place.chmod(0o600)
    save(tmp_path / "s")
    (tmp_path / "s.tmp").write_text("mine")
    with Writer(tmp_path / "now") as writer:
        writer.part("config", Config())
        clear(tmp_path)
        writer.commit()
    clear(tmp_path / "nothing")
    assert sorted(os.listdir(tmp_path)) == ["now", "s", "s.tmp"]


@pytest.mark.parametrize("what", [*ODD, *FILES[:1], *FILES[2:]])
def test_what_is_no_temporary_is_not_cleared(tmp_path: Path, what: str) -> None:
    needs_root(what)
    (tmp_path / "in").mkdir()
    plant(temporary(tmp_path / "in" / "s"), what, tmp_path)
    before = seen(tmp_path)
    clear(tmp_path / "in")
    assert seen(tmp_path) == before


def test_a_read_only_file_is_kept_even_from_force(tmp_path: Path) -> None:
    save(tmp_path / "s").chmod(0o400)
    for force in (False, True):
        with pytest.raises(Refused, match="read-only"):
            save(tmp_path / "s", 1, force=force)
    assert number(tmp_path / "s") == 0


@pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o277, 0o777])
def test_the_mode_is_0600_from_the_start_to_the_end(tmp_path: Path, mask: int) -> None:
    with umask(mask), Writer(tmp_path / "s") as writer:
        (made,) = tmp_path.iterdir()
        modes = {stat.S_IMODE(made.stat().st_mode)}
        writer.part("config", Config())
        writer.commit()
    assert modes | {stat.S_IMODE((tmp_path / "s").stat().st_mode)} == {0o600}


# --- names


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=255))
def test_any_name_the_folder_takes(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("any")
    path = folder / name
    if len(os.fsencode(name)) > 255 or name in (".", ".."):
        with pytest.raises(OSError):
            save(path)
        assert os.listdir(folder) == []
    else:
        assert number(save(path)) == 0 and os.listdir(folder) == [name]


@pytest.mark.parametrize("length", [250, 251, 252, 253, 254, 255, 256])
def test_long_names(tmp_path: Path, length: int) -> None:
    path = tmp_path / ("n" * length)
    if length <= 255:
        assert number(save(path)) == 0
        with Writer(path), pytest.raises(OSError) as error:
            Writer(path)
        assert error.value.errno == errno.EBUSY, "a long name has one writer, too"
    else:
        with pytest.raises(OSError, match="too long"):
            save(path)
    assert os.listdir(tmp_path) == [path.name] * (length <= 255)


NO_PATHS = ["", ".", "..", "/", "a/..", "\0", "a\0b", "\ud800", "x" * 256, "/x" * 3000, "absent/s", "file/s", "loop/s"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("path", NO_PATHS, ids=range(len(NO_PATHS)))
def test_what_cannot_be_a_name(tmp_path: Path, path: str, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    before = seen(tmp_path)
    for call in (save, lambda path, force: Chain.for_child(save(Path("p")), path, []).close()):
        with pytest.raises((OSError, SnapshotError)):
            call(Path(path), force=force)
        (tmp_path / "p").unlink(missing_ok=True)
    assert seen(tmp_path) == before


# --- whatever fails

SYSTEM_CALLS = ("open", "lstat", "fstat", "fchmod", "pread", "ftruncate", "pwrite", "preadv", "fsync", "scandir",
                "rename", "unlink")  # fmt: skip


def failing(at: int, number: int) -> tuple[list[Any], list[str]]:
    """Patches that make the system call `at` fail, of all there are; and which were made."""
    made: list[str] = []

    def wrap(module: Any, name: str) -> Any:
        real: Callable[..., Any] = getattr(module, name)

        def call(*args: Any, **more: Any) -> Any:
            made.append(name)
            if len(made) - 1 == at:
                raise OSError(number, os.strerror(number))
            return real(*args, **more)

        return patch.object(module, name, call)

    return [*(wrap(os, name) for name in SYSTEM_CALLS), wrap(fcntl, "flock")], made


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("left", [False, True], ids=["new", "over what a killed writer left"])
@pytest.mark.parametrize("number_", [errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_whatever_fails_nothing_is_left(tmp_path: Path, left: bool, number_: int) -> None:
    """At every system call: the old file is whole, no descriptor, lock or temporary stays, and the next save works."""
    from contextlib import ExitStack

    path = save(tmp_path / "s")
    place = temporary(path)
    at, before = 0, descriptors()
    while True:
        if left:
            place.write_bytes(bytes(PAGE))
            place.chmod(0o600)
        patches, made = failing(at, number_)
        with ExitStack() as stack:
            for each in patches:
                stack.enter_context(each)
            failed = False
            try:
                save(path, 1)
            except OSError as error:
                failed = True
                assert error.errno == number_
        assert descriptors() == before, f"{made[-1]} leaks a descriptor"
        assert number(path) == 0 or "fsync" in made[-2:], made[-1]
        if at >= len(made):
            break
        # What cannot be removed stays, and a call before it was ours leaves what the killed writer left.
        kept = ["s"] if failed and made.count("unlink") == 0 and not left else os.listdir(tmp_path)
        assert set(os.listdir(tmp_path)) <= {"s", place.name} and (left or sorted(os.listdir(tmp_path)) == sorted(kept))
        save(path, 0)
        assert os.listdir(tmp_path) == ["s"] and number(path) == 0
        at += 1
    assert at > 20 and number(path) == 1


def kill_writers(folder: Path, count: int, seed: int) -> int:
    """SIGKILL a writer at random moments, `count` times. Returns how many files it had put in place by then."""
    draw, path = random.Random(seed), save(folder / "s")
    (folder / "s.tmp").write_text("mine")
    foreign = seen(folder)["s.tmp"]
    written = 0
    for _ in range(count):
        before = path.stat()
        child = os.fork()
        if child == 0:
            try:
                while True:
                    save(path, draw.randrange(200), blocks=3)
            finally:
                os._exit(1)
        signal.sigtimedwait([], draw.random() ** 2 * 0.02)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "it ended by itself"
        number(path)
        written += (path.stat().st_ino, path.stat().st_mtime_ns) != (before.st_ino, before.st_mtime_ns)
        assert len(os.listdir(folder)) <= 3
        save(path)
        assert sorted(os.listdir(folder)) == ["s", "s.tmp"] and number(path) == 0
        assert seen(folder)["s.tmp"] == foreign
    return written


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, count: int) -> None:
    assert kill_writers(tmp_path, count, count) > count // 10, "some came to an end"


# --- links, and what others stand on


@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_a_file_is_not_its_own_parent(tmp_path: Path, how: str) -> None:
    real, latest = save(tmp_path / "real"), tmp_path / "latest"
    if how == "symbolic":
        latest.symlink_to("real")
    else:
        os.link(real, latest)
    for force in (False, True):
        with pytest.raises(SnapshotError, match="is part of its chain, and would be replaced"):
            save(real, 1, parent=latest, force=force)
    with pytest.raises(SnapshotError, match="is part of its chain"):
        rewrite.rebase(real, latest, real)
    assert number(real) == 0


def test_a_copy_of_its_parent_may_be_replaced(tmp_path: Path) -> None:
    save(tmp_path / "parent")
    (tmp_path / "copy").write_bytes((tmp_path / "parent").read_bytes())
    with Chain(save(tmp_path / "copy", 1, parent=tmp_path / "parent")) as chain:
        chain.verify_ram()


def test_a_difference_names_the_file_that_a_link_led_to(tmp_path: Path) -> None:
    save(tmp_path / "real")
    (tmp_path / "latest").symlink_to("real")
    child = save(tmp_path / "child", 1, parent=tmp_path / "latest")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to(save(tmp_path / "other", 2))
    with Chain(child) as chain:
        assert [reader.parent and reader.parent.file for reader in chain.readers] == ["real", None]


def family(folder: Path) -> Path:
    """A snapshot that two others stand on, one of them with a child; and files that look like more. Returns it."""
    root = save(folder / "root")
    a = save(folder / "a", 1, parent=root)
    save(folder / "b", 2, parent=root)
    save(folder / "c", 3, parent=a)
    (folder / "text").write_text('{"file": "root"}')
    (folder / "cut").write_bytes(a.read_bytes()[:200])
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to("a")
    return root


TOOLS: dict[str, Callable[[Path, Path, bool], object]] = {
    "save": lambda folder, out, force: save(out, 9, force=force),
    "merge": lambda folder, out, force: rewrite.merge(folder / "c", out, force=force),
    "rebase": lambda folder, out, force: rewrite.rebase(folder / "c", folder / "other", out, force=force),
    "edit": lambda folder, out, force: rewrite.with_parts(folder / "other", out, {}, force=force),
    "pack": lambda folder, out, force: unpack.pack(folder / "unpacked", out, force=force),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_others_stand_on_is_replaced_with_force_only(tmp_path: Path, tool: str) -> None:
    root = family(tmp_path)
    unpack.unpack(save(tmp_path / "other", 7), tmp_path / "unpacked")
    before = seen(tmp_path)
    for path, names in ((root, "a, b"), (tmp_path / "a", "c")):
        with pytest.raises(Refused, match=f"^.Errno {errno.EEXIST}. {names}: differences to the file there"):
            TOOLS[tool](tmp_path, path, False)
        assert seen(tmp_path) == before
    TOOLS[tool](tmp_path, tmp_path / "b", False)
    TOOLS[tool](tmp_path, tmp_path / "a", True)
    assert number(tmp_path / "a") != 1


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_no_snapshot_is_replaced_with_force_only(tmp_path: Path, tool: str) -> None:
    family(tmp_path)
    unpack.unpack(save(tmp_path / "other", 7), tmp_path / "unpacked")
    before = seen(tmp_path)
    for name in ("text", "fifo", "link", "unpacked"):
        with pytest.raises(Refused):
            TOOLS[tool](tmp_path, tmp_path / name, False)
    assert seen(tmp_path) == before
    TOOLS[tool](tmp_path, tmp_path / "text", True)
    number(tmp_path / "text")


def test_a_changed_parent_has_no_children(tmp_path: Path) -> None:
    root = family(tmp_path)
    save(root, 5, force=True)
    assert children.standing_on(root) == []
    save(root, 6)


def test_many_children_are_named_in_one_line(tmp_path: Path) -> None:
    root = save(tmp_path / "root")
    for i in range(5):
        save(tmp_path / f"{i}\n\x1b", 1, parent=root)
    with pytest.raises(Refused) as error:
        save(root)
    assert str(error.value.strerror).isprintable() and "and 2 more" in str(error.value.strerror)


def test_looking_for_children_reads_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = save(tmp_path / "root")
    for i in range(20):
        save(tmp_path / f"big{i}", i, blocks=20)
        save(tmp_path / f"child{i}", i + 1, parent=root)
    read, real = [], os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        read.append(data := real(fd, size, offset))
        return data

    monkeypatch.setattr(os, "pread", pread)
    assert len(children.standing_on(root)) == 20
    assert sum(map(len, read)) < 41 * 1000
    monkeypatch.setattr(children, "MAX_FILES", 10)
    read.clear()
    assert len(children.standing_on(root)) <= 10 and len(read) <= 50


def test_a_hostile_neighbour_does_not_stop_the_search(tmp_path: Path) -> None:
    """A header that says 2^64 bytes, no alignment, or a BASE that is no JSON."""
    root = save(tmp_path / "root")
    good = save(tmp_path / "child", 1, parent=root).read_bytes()
    base = good.index(BASE)
    for i, (at, new) in enumerate([(48, b"\xff" * 8), (40, bytes(4)), (base + 96, b"\xff" * 50), (32, b"\0" * 96)]):
        (tmp_path / f"bad{i}").write_bytes(good[:at] + new + good[at + len(new) :])
    assert children.standing_on(root) == ["child"]


# --- taken apart


@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_what_is_unpacked_is_this_users_alone(tmp_path: Path, mask: int) -> None:
    with Writer(tmp_path / "s") as writer:
        writer.part("config", Config())
        writer.ram("ram.0", 0, memoryview(bytes(PAGE)), None)
        writer.meta(1)
        writer.extra(Extra(b"NEW9", 1, "x", 16, b"x"))
        writer.commit()
    with umask(mask):
        unpack.unpack(tmp_path / "s", tmp_path / "u")
    found = list((tmp_path / "u").rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "u", *found] if path.is_dir()} == {0o700}
    assert len(found) == 8


@pytest.mark.parametrize("what", [*ODD, *FILES])
def test_nothing_is_unpacked_over_what_is_there(tmp_path: Path, what: str) -> None:
    needs_root(what)
    (tmp_path / "in").mkdir()
    save(tmp_path / "s")
    plant(tmp_path / "in" / "u", what, tmp_path)
    before = seen(tmp_path)
    with pytest.raises(FileExistsError):
        unpack.unpack(tmp_path / "s", tmp_path / "in" / "u")
    assert seen(tmp_path) == before


@pytest.mark.parametrize("path", ["/", "..", "somewhere/.."])
def test_a_folder_by_its_name(path):
    """Told before anything is asked of the disk: it may not be there."""
    with pytest.raises(Refused, match="that is a folder"):
        refuse(Path(path))
