"""Machines saved as differences: a chain of them wakes bit for bit, and an idle guest's difference is small."""

from __future__ import annotations

import json

import pytest

from snapshot import rewrite, unpack
from snapshot.chain import Chain
from snapshot.errors import SnapshotError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason


@pytest.mark.parametrize("packed", [False, True])
def test_a_chain_of_eight_wakes_bit_for_bit(boot_own, tmp_path, packed):
    machine, parent = boot_own(), None
    for generation in range(9):
        machine.run(position=3_000_000 * (generation + 1))
        file = tmp_path / f"{generation}"
        machine.save(file, packed=packed, parent=parent)
        machine.close()
        machine, parent = Machine.restore(file, verify=True), file
    assert parent is not None
    with Chain(parent) as chain:
        assert len(chain.readers) == 9
    with machine, boot_own() as undisturbed:
        for each in (machine, undisturbed):
            assert each.run(position=30_000_000) == Stopped(StopReason.POSITION)
        assert machine.digests() == undisturbed.digests()


def test_a_difference_holds_what_changed(boot_own, tmp_path):
    with boot_own() as machine:
        machine.run(position=3_000_000)
        machine.save(tmp_path / "a")
        machine.save(tmp_path / "same", parent=tmp_path / "a")
        machine.run(position=4_000_000)
        machine.save(tmp_path / "b", parent=tmp_path / "a")
        digests = machine.digests()
    with Chain(tmp_path / "same") as chain:
        assert chain.rams[0].blocks == {}
    with Chain(tmp_path / "b") as chain:
        assert 0 < len(chain.rams[0].blocks) < len(chain.digests(0))
    with Machine.restore(tmp_path / "b") as woken:
        assert woken.digests() == digests


def test_save_restore_save_of_a_difference_is_byte_equal(boot_own, tmp_path):
    with boot_own() as machine:
        machine.run(position=3_000_000)
        machine.save(tmp_path / "a", packed=True)
        machine.run(position=4_000_000)
        machine.save(tmp_path / "b", parent=tmp_path / "a", packed=True)
    with Machine.restore(tmp_path / "b") as woken:
        woken.save(tmp_path / "again", parent=tmp_path / "a", packed=True)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_parent_of_another_machine_is_refused_before_anything_is_written(boot_own, tmp_path):
    with boot_own(memory_bytes=8 << 20) as small, boot_own() as machine:
        small.save(tmp_path / "small")
        with pytest.raises(SnapshotError, match="laid out otherwise"):
            machine.save(tmp_path / "b", parent=tmp_path / "small")
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


def test_more_memory_than_allowed_is_refused(boot_own, tmp_path):
    with boot_own() as machine:
        machine.save(tmp_path / "a")
    with pytest.raises(SnapshotError, match="over the limit"):
        Machine.restore(tmp_path / "a", max_memory=8 << 20)


@pytest.mark.debian
def test_a_booted_debian(debian, tmp_path):
    """A second of an idle guest is under a tenth of the whole; packing is lossless; apart and together is the same."""
    image = Image.from_files(debian / "vmlinux", debian / "initrd.img", "console=ttyS0 mitigations=off")
    with Machine.boot(MachineConfig(memory_bytes=256 << 20), image) as machine:
        assert machine.run(until="shell ready") == Stopped(StopReason.PATTERN)
        a_second(machine)  # the shell starts
        machine.save(tmp_path / "full")
        machine.save(tmp_path / "packed", packed=True)
        a_second(machine)
        machine.save(tmp_path / "idle", parent=tmp_path / "full")
        digests = machine.digests()
    size = {name: (tmp_path / name).stat().st_blocks * 512 for name in ("full", "packed", "idle")}
    assert size["idle"] < size["full"] / 10
    assert size["packed"] < size["full"] / 2
    with Machine.restore(tmp_path / "idle") as woken:
        assert woken.digests() == digests
    for name in ("full", "packed", "idle"):
        unpack.unpack(tmp_path / name, tmp_path / f"{name}.d")
        unpack.pack(tmp_path / f"{name}.d", tmp_path / "again")
        assert same(tmp_path / "again", tmp_path / name)
    rewrite.merge(tmp_path / "packed", tmp_path / "merged")
    assert same(tmp_path / "merged", tmp_path / "full")
    print(json.dumps(size))


def a_second(machine):
    started = machine.clock.now_ns()
    while machine.clock.now_ns() < started + 10**9:
        assert machine.run(position=machine.position + 10_000) == Stopped(StopReason.POSITION)


def same(first, second) -> bool:
    with first.open("rb") as a, second.open("rb") as b:
        while (x := a.read(1 << 20)) == b.read(1 << 20):
            if not x:
                return True
    return False
