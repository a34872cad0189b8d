"""Memory of a file that somebody changes: the process lives on, and the memory says so."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import pages, rewrite
from snapshot.chain import Chain
from snapshot.container import BLOCK
from snapshot.errors import SnapshotError
from snapshot.mapped import FileMemory
from snapshot.reader import Reader
from tests.snapshot.test_target import save

SIZE = 4 * BLOCK


def mapped(path: Path) -> FileMemory:
    with Reader(path) as reader:
        return reader.map_ram(reader.rams[0])


def overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def shrunk_and_grown(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, 0),
    "cut in a page": lambda path: os.truncate(path, path.stat().st_size // 2 + 5),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
    "cut and grown": shrunk_and_grown,
    "overwritten": overwritten,
    "another in its place": lambda path: path.write_bytes(save(path.with_name("other"), 9, blocks=4).read_bytes()),
}
NO_CHANGES: dict[str, Callable[[Path], object]] = {
    "touched": lambda path: os.utime(path),
    "written anew, the same": lambda path: path.write_bytes(path.read_bytes()),
    "removed": lambda path: path.unlink(),
    "replaced": lambda path: save(path, 9, blocks=4),
    "kept": lambda path: path.chmod(0o400),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_said(tmp_path: Path, change: str) -> None:
    memory = mapped(save(tmp_path / "s", blocks=4))
    memory.check()
    CHANGES[change](tmp_path / "s")
    assert len(bytes(memory)) == SIZE
    for _ in range(2):
        with pytest.raises(SnapshotError, match=f"^{tmp_path / 's'}: it was changed while its RAM was in use: .*"):
            memory.check()


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_is_no_change(tmp_path: Path, change: str) -> None:
    memory = mapped(save(tmp_path / "s", blocks=4))
    NO_CHANGES[change](tmp_path / "s")
    memory.check()
    assert bytes(memory) == b"\1" * SIZE


@given(cut=st.integers(0, SIZE), at=st.integers(0, SIZE - 1), write=st.booleans())
def test_an_access_beyond_the_end(tmp_path_factory, cut, at, write):
    """Of any byte, reading or writing: it is zero, or what was there; never a signal. And two do not mix."""
    folder = tmp_path_factory.mktemp("cut")
    memory, other = mapped(save(folder / "s", blocks=4)), mapped(save(folder / "t", blocks=4))
    os.truncate(folder / "s", cut + 65536)
    if write:
        memory[at] = 7
    assert memory[at] in ((7,) if write else (0, 1))
    with pytest.raises(SnapshotError):
        memory.check()
    other.check()
    assert bytes(other) == b"\1" * SIZE
    memory.close()
    other.close()


def test_a_look_now_is_a_look_now(tmp_path: Path) -> None:
    memory = mapped(save(tmp_path / "s", blocks=4))
    memory.check(every_s=1e9)
    os.truncate(tmp_path / "s", 0)
    memory.check(every_s=1e9)
    with pytest.raises(SnapshotError):
        memory.check()


def test_whoever_lies_there_later_is_meant(tmp_path: Path) -> None:
    """The addresses of a mapping that is gone are used again, while its object still lives."""
    gone = []
    for i in range(20):
        memory = mapped(save(tmp_path / f"{i}", blocks=4))
        os.truncate(tmp_path / f"{i}", 0)
        assert memory[0] == 0
        with pytest.raises(SnapshotError, match=f"/{i}: .* cannot be read"):
            memory.check(every_s=1e9)
        memory.close()
        gone.append(memory)


def test_a_file_that_was_cut_before_it_is_mapped(tmp_path: Path) -> None:
    with Reader(save(tmp_path / "s", blocks=4)) as reader, Chain(tmp_path / "s") as chain:
        os.truncate(tmp_path / "s", 70_000)
        for cut in (lambda: reader.map_ram(reader.rams[0]), lambda: chain.map_ram(0), lambda: chain.block(0, 3)):
            with pytest.raises(SnapshotError, match="the file is cut"):
                cut()


@pytest.mark.parametrize("tool", [rewrite.merge, lambda source, out: rewrite.rebase(source, source.parent / "p", out)])
@pytest.mark.parametrize("change", CHANGES)
def test_no_tool_makes_a_snapshot_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool, change: str) -> None:
    save(tmp_path / "p", 5, blocks=4)
    source, real = save(tmp_path / "s", blocks=4), Chain.map_ram

    def map_ram(self, index):
        memory = real(self, index)
        CHANGES[change](source)
        return memory

    monkeypatch.setattr(Chain, "map_ram", map_ram)
    with pytest.raises(SnapshotError, match="it was changed while its RAM was in use"):
        tool(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_no_descriptor_stays(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    memory = mapped(save(tmp_path / "s", blocks=4))
    memory.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    memory = mapped(tmp_path / "s")
    del memory
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


STRANGER = """
import ctypes, faulthandler, mmap, os, signal, sys
from pathlib import Path
from tests.snapshot.test_mapped import mapped
if sys.argv[2] == "faulthandler":
    faulthandler.enable()
memory = mapped(Path(sys.argv[1]))
if sys.argv[2] == "sent":
    os.kill(os.getpid(), signal.SIGBUS)
file = os.memfd_create("x")
os.truncate(file, 4096)
other = mmap.mmap(file, 4096)
os.truncate(file, 0)
other[0]
"""


@pytest.mark.parametrize("how", ["other memory", "faulthandler", "sent"])
def test_a_signal_that_is_not_ours_means_what_it_meant(tmp_path: Path, how: str) -> None:
    save(tmp_path / "s", blocks=4)
    done = subprocess.run([sys.executable, "-c", STRANGER, str(tmp_path / "s"), how], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGBUS
    assert (b"Fatal Python error: Bus error" in done.stderr) == (how == "faulthandler")


# --- core dumps


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def flags(address: int) -> set[str]:
    """VmFlags of the mapping at an address, out of proc_pid_smaps(5)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, _, stop = head.partition("-")
            inside = int(start, 16) <= address < int(stop, 16)
        elif inside and head == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError("nothing is mapped there")


def test_ram_is_in_no_core_dump(tmp_path: Path) -> None:
    memory, fresh = mapped(save(tmp_path / "s", blocks=4)), pages.zeros(SIZE)
    for each in (memory, fresh):
        assert "dd" in flags(address(each))
    os.truncate(tmp_path / "s", 0)
    assert memory[-1] == 0 and "dd" in flags(address(memory) + SIZE - 1), "nor are the zeros in its place"
    pages.map_over(address(fresh), SIZE, os.open(tmp_path / "s", os.O_RDONLY))
    assert "dd" in flags(address(fresh))
