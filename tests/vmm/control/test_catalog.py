"""The catalog: nothing that is kept, and nothing that others stand on, is ever deleted."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.chain import Chain
from snapshot.errors import Refused, SnapshotError
from snapshot.field_types import Json
from snapshot.meta import peek
from snapshot.reader import Reader
from snapshot.writer import Writer
from tests.conftest import OWN
from vmm.control import catalog
from vmm.control.client import Failed
from vmm.errors import BackendError, RequestError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig


@pytest.fixture(scope="module")
def machine():
    with Machine.boot(MachineConfig(memory_bytes=2 << 20), Image.from_files(OWN, flat=True)) as made:
        yield made


PARENTS = st.lists(st.integers(1, 3), min_size=3, max_size=6)  # of each: how many before it its parent is, if so many
KEPT = st.sets(st.integers(0, 5), max_size=1)


def fill(machine: Machine, parents: list[int]) -> list[Path]:
    made: list[Path] = []
    for n, parent in enumerate(parents):
        machine.run(position=machine.position + 1000)
        path = catalog.new("box")
        assert path not in made
        meta: Json = {"sequence": catalog.last_sequence("box") + 1}
        machine.save(path, parent=made[n - parent] if parent <= n else None, meta=meta)
        made.append(path)
    return made


def stands_on(path: Path) -> set[Path]:
    parent = catalog.entry(path).parent
    return {path} if parent is None else {path} | stands_on(path.with_name(parent))


@settings(max_examples=30)
@given(parents=PARENTS, kept=KEPT, leave=st.integers(0, 3))
def test_prune(machine, parents, kept, leave):
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", scratch)
        made = fill(machine, parents)
        order = [entry.path for entry in catalog.entries("box")]
        for n in kept & set(range(len(made))):
            catalog.keep(made[n])
        protected = {path for path in made if catalog.entry(path).kept}
        assert all(stands_on(path) <= protected for path in protected), "with all it stands on"
        needed = set().union(*(stands_on(path) for path in {*order[max(0, len(order) - leave) :], *protected}), set())
        gone = catalog.prune("box", leave)
        assert set(gone) == set(made) - needed
        assert {entry.path for entry in catalog.entries()} == needed
        for path in needed:
            Machine.check(path)
        assert not catalog.prune("box", leave) or leave < len(needed)


@settings(max_examples=20)
@given(parents=PARENTS, kept=KEPT)
def test_delete(machine, parents, kept):
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", scratch)
        made = fill(machine, parents)
        for n in kept & set(range(len(made))):
            catalog.keep(made[n])
        for path in reversed(made):
            needed = any(path in stands_on(other) for other in made if other != path and other.exists())
            if needed or catalog.entry(path).kept:
                with pytest.raises(RequestError, match=r"it is kept|is a difference to it"):
                    catalog.delete(path)
            else:
                catalog.delete(path)
                assert not path.exists()


def test_a_kept_snapshot_is_not_replaced(machine, tmp_path):
    machine.save(tmp_path / "cut.snapshot")
    catalog.keep(tmp_path / "cut.snapshot")
    before = (tmp_path / "cut.snapshot").read_bytes()
    machine.run(position=machine.position + 1000)
    for save in (machine.save, machine.checkpoint, machine.can_save):
        with pytest.raises(RequestError, match="the file there is read-only"):
            save(tmp_path / "cut.snapshot")
    assert (tmp_path / "cut.snapshot").read_bytes() == before
    catalog.keep(tmp_path / "cut.snapshot", False)
    machine.save(tmp_path / "cut.snapshot")


def test_a_parent_that_is_gone_is_no_loop(machine, tmp_path):
    machine.save(tmp_path / "a.snapshot")
    machine.save(tmp_path / "b.snapshot", parent=tmp_path / "a.snapshot")
    (tmp_path / "a.snapshot").unlink()
    catalog.keep(tmp_path / "b.snapshot")
    assert catalog.entry(tmp_path / "b.snapshot").kept
    with pytest.raises(SnapshotError):
        Machine.check(tmp_path / "b.snapshot")


def test_the_newest_that_can_be_read(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(RequestError, match="no snapshot of box"):
        catalog.newest("box")
    (good,) = fill(machine, [5])
    (catalog.folder("box") / "later.snapshot").write_bytes(b"junk")
    assert catalog.newest("box") == good


# --- the order is the machine's own


@given(st.permutations(range(4)), st.permutations(range(4)), st.booleans())
@settings(max_examples=15)
def test_the_newest_is_the_one_saved_last(machine, names, times, said):
    """Whatever this computer's clock was, and whatever the files are called: by sequence, else by guest time."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", scratch)
        made = []
        for n, (name, time_s) in enumerate(zip(names, times, strict=True)):
            if said:
                machine.restart()  # the guest begins anew: its time is no help
            machine.run(position=machine.position + 1000 * (8 - n if said else 1))
            made.append(catalog.folder("box") / f"{name}.snapshot")
            machine.save(made[-1], meta={"sequence": n + 1} if said else None)
            os.utime(made[-1], (1 + time_s, 1 + time_s))
        assert [each.path for each in catalog.entries("box")] == made
        assert catalog.newest("box") == made[-1]
        assert catalog.last_sequence("box") == (4 if said else 0)


def test_saves_of_a_machine_are_counted_on(boxes, boot_own, tmp_path, monkeypatch):
    """Over its ends and beginnings, resets, and copies of files."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    made = []
    for _ in range(2):
        box = boxes()
        box.vm.last_sequence = lambda: catalog.last_sequence("box")
        for _ in range(2):
            made.append(catalog.new("box"))
            box.call("checkpoint", path=str(made[-1]))
            box.call("reset")
        box.close()
    assert [(each.path, each.sequence) for each in catalog.entries("box")] == list(zip(made, (1, 2, 3, 4), strict=True))


@pytest.mark.parametrize("meta", [None, 7, {}, *({"sequence": n} for n in (-1, True, 1 << 62, "9", None))])
def test_a_sequence_that_is_none(machine, tmp_path, monkeypatch, meta):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    machine.save(catalog.new("box"), meta=meta)
    (entry,) = catalog.entries()
    assert (
        entry.sequence == catalog.last_sequence("box") == 0 and entry.problem is None and entry.guest_unix_ns > 1 << 60
    )


def test_what_is_no_snapshot_says_nothing(tmp_path, monkeypatch, machine):
    machine.save(tmp_path / "good", meta={"sequence": 3})
    whole = (tmp_path / "good").read_bytes()
    assert peek(tmp_path / "good") == {"sequence": 3, "boot": machine.know_origin().to_json()}
    for size in (0, 31, 32, 100, 128, 4000):
        (tmp_path / "cut").write_bytes(whole[:size])
        assert peek(tmp_path / "cut") is None
    (tmp_path / "long").write_bytes(whole[:48] + b"\xff" * 8 + whole[56:])
    os.mkfifo(tmp_path / "fifo")
    assert peek(tmp_path / "long") is None and peek(tmp_path / "fifo") is None


def test_many_snapshots_are_each_read_once(machine, tmp_path, monkeypatch):
    """Also where most are kept, and all stand on one another."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    home = catalog.folder("box")
    machine.save(home / "0.snapshot")
    for n in range(1, 40):
        machine.run(position=machine.position + 100)
        machine.save(home / f"{n}.snapshot", parent=home / f"{n - 1}.snapshot")
    for each in home.iterdir():
        each.chmod(0o400)
    opened: list[Path] = []

    class Counted(Reader):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(catalog, "Reader", Counted)
    for action in (lambda: catalog.entries(), lambda: catalog.newest("box"), lambda: catalog.prune("box", 1)):
        opened.clear()
        action()
        assert len(opened) == 40


def test_what_a_killed_save_left_is_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    home = catalog.folder("box")
    (home / "notes.tmp").write_bytes(b"mine")
    with Writer(home / "now.snapshot"):
        (left,) = set(home.iterdir()) - {home / "notes.tmp"}
        catalog.clear("box")
        assert left.exists(), "it is being written"
    left.write_bytes(b"")
    left.chmod(0o600)
    catalog.clear("box")
    assert list(home.iterdir()) == [home / "notes.tmp"]
    catalog.clear("nobody")
    assert not (home.parent / "nobody").exists()


def saved(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with Writer(path) as writer:
        writer.part("config", MachineConfig())
        writer.commit()
    return path


def stays(path: Path, why: str) -> None:
    """Let something lie there that no save replaces."""
    match why:
        case "is kept":
            saved(path).chmod(0o400)
        case "another stands on it":
            saved(path)
            with Writer(path.with_name(f"on {path.name}")) as writer, Chain(path) as chain:
                writer.part("config", MachineConfig())
                writer.base(chain.as_parent())
                writer.commit()
        case "is no snapshot":
            path.touch()
        case "is no file":
            os.mkfifo(path)


STAYS = ["is kept", "another stands on it", "is no snapshot", "is no file"]


@pytest.mark.parametrize("meanwhile", [False, True], ids=["before", "meanwhile"])
@pytest.mark.parametrize("why", STAYS)
def test_a_save_goes_beside_what_stays(tmp_path, monkeypatch, why, meanwhile):
    """Of the same folder, and over the one before again as soon as it can."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    home = catalog.folder("box")
    tried: list[str] = []

    def save(path: Path) -> Path:
        tried.append(path.name)
        if meanwhile and len(tried) == 1:
            stays(home / "a.snapshot", why)
        try:
            return saved(path)
        except Refused as error:
            raise RequestError(str(error)) from None

    if not meanwhile:
        stays(home / "a.snapshot", why)
    assert catalog.over("box", "a.snapshot", save) == home / "a-1.snapshot"
    assert catalog.over("box", "a.snapshot", save) == home / "a-1.snapshot", "over the one before"
    stays(home / "a-1.snapshot", "is kept")
    assert catalog.over("box", "a.snapshot", save) == home / "a-2.snapshot"
    assert tried == ["a.snapshot"] * meanwhile + ["a-1.snapshot", "a-1.snapshot", "a-2.snapshot"]


@pytest.mark.parametrize("error", [RequestError("no"), Failed(7, "no"), BackendError("no")])
def test_a_save_that_fails_for_another_reason_fails(tmp_path, monkeypatch, error):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    tried: list[Path] = []

    def save(path: Path) -> None:
        tried.append(path)
        raise error

    with pytest.raises(type(error), match="no"):
        catalog.over("box", "a.snapshot", save)
    assert tried == [catalog.folder("box") / "a.snapshot"]


def test_one_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = catalog.new("box")
    path.write_bytes(b"no snapshot at all, but of some length")
    (entry,) = catalog.entries("box")
    assert entry.problem is not None and "file header" in entry.problem
    with pytest.raises(RequestError, match="there is no snapshot of box"):
        catalog.newest("box")
