"""The catalog: nothing that is kept, and nothing that others stand on, is ever deleted."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.errors import SnapshotError
from tests.conftest import OWN
from vmm.control import catalog
from vmm.errors import RequestError
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
        machine.save(path, parent=made[n - parent] if parent <= n else None)
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
