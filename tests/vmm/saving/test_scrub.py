"""RAM is checked while the guest runs: damage is found without `--verify`, and never saved as if it were good."""

from __future__ import annotations

import os

import pytest

from snapshot.errors import SnapshotError
from vmm.machine.machine import Machine, Stopped, StopReason


@pytest.fixture(params=["raw", "difference"])
def damaged(request, boot_own, tmp_path):
    """One byte of RAM, far from what the guest uses, is not what it was."""
    with boot_own() as machine:
        machine.run(position=1_000_000)
        machine.save(tmp_path / "a")
        machine.run(position=2_000_000)
        machine.save(tmp_path / "b", parent=tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    at = data.index(b"anyhyve own guest")
    data[at] ^= 1
    (tmp_path / "a").write_bytes(data)
    return tmp_path / ("a" if request.param == "raw" else "b")


def test_damage_is_found_while_the_guest_runs(damaged):
    with Machine.restore(damaged) as woken:
        with pytest.raises(SnapshotError, match=r"the RAM of the snapshot is damaged: .*digest"):
            for _ in range(10_000):
                assert woken.run(position=woken.position + 100_000) == Stopped(StopReason.POSITION)
        with pytest.raises(SnapshotError, match="damaged"):
            woken.run(position=woken.position + 1)


def test_damage_is_not_saved(damaged, tmp_path):
    with Machine.restore(damaged) as woken, pytest.raises(SnapshotError, match="damaged"):
        woken.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_with_verify_nothing_is_woken(damaged):
    with pytest.raises(SnapshotError, match="digest"):
        Machine.restore(damaged, verify=True)


def test_good_ram_is_good_and_the_file_is_let_go(boot_own, tmp_path):
    with boot_own() as machine:
        machine.run(position=1_000_000)
        machine.save(tmp_path / "a")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with Machine.restore(tmp_path / "a") as woken:
            woken.save(tmp_path / "b")  # waits for the check
        with Machine.restore(tmp_path / "a"):
            pass  # closed before the check is through
    assert len(os.listdir("/proc/self/fd")) == before
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
