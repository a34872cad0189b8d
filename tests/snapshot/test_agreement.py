"""Reader and verifier were written apart: they must say the same of every file we know how to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshot import verify
from snapshot.chain import Chain
from snapshot.errors import SnapshotError
from tests.conftest import ROOT
from tests.snapshot import test_container, test_verify

GOLDENS = sorted((ROOT / "fixtures" / "snapshots").glob("*.snapshot"))


def reader(path: Path) -> str:
    try:
        with Chain(path) as chain:
            chain.verify_ram()
    except SnapshotError as error:
        assert "\n" not in str(error)
        return "bad"
    return "good"


def verifier(path: Path) -> str:
    try:
        verify.verify(path)
    except verify.Bad as error:
        assert "\n" not in str(error)
        return "bad"
    except verify.CannotTell:
        return "bad"  # a parent is not here: the reader says so too
    return "good"


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.name)
def test_goldens(golden):
    assert reader(golden) == verifier(golden) == "good"


@pytest.mark.parametrize("name", test_verify.GOOD)
def test_good(tmp_path, name):
    (tmp_path / "file").write_bytes(test_verify.GOOD[name][0])
    assert reader(tmp_path / "file") == verifier(tmp_path / "file")


@pytest.mark.parametrize("name", test_verify.BAD)
def test_bad_by_the_page(tmp_path, name):
    (tmp_path / "file").write_bytes(test_verify.BAD[name][0])
    assert reader(tmp_path / "file") == verifier(tmp_path / "file") == "bad"


@pytest.mark.parametrize("name", test_container.HOSTILE)
def test_bad_by_the_reader(tmp_path, name):
    (tmp_path / "file").write_bytes(test_container.HOSTILE[name][0])
    assert reader(tmp_path / "file") == verifier(tmp_path / "file") == "bad"
