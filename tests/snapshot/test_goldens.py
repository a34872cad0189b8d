"""Snapshots of every release wake in this one, and what a release promised is still kept."""

from __future__ import annotations

import json
import re

import pytest
from blake3 import blake3

from snapshot import promises as lock
from snapshot import unpack
from snapshot.chain import Chain
from snapshot.field_types import Json
from snapshot.reader import Reader
from tests.conftest import ROOT
from vmm.errors import RequestError
from vmm.machine.machine import Machine, Stopped, StopReason
from vmm.saving import releases

SNAPSHOTS = ROOT / "fixtures" / "snapshots"
GOLDENS = {
    name: entry for file in sorted(SNAPSHOTS.glob("*.json")) for name, entry in json.loads(file.read_text()).items()
}


@pytest.mark.parametrize("name", GOLDENS)
def test_a_golden_is_as_it_was_made(name):
    assert blake3((SNAPSHOTS / name).read_bytes()).hexdigest() == GOLDENS[name]["blake3"], "goldens never change"


@pytest.mark.parametrize("name", GOLDENS)
def test_a_golden_wakes_and_runs_on(name):
    with Machine.restore(SNAPSHOTS / name, verify=True, bind=GOLDENS[name].get("bind")) as woken:
        if (line := GOLDENS[name]["prints"]) is not None:
            assert woken.run(until=re.escape(line)) == Stopped(StopReason.PATTERN)
        assert woken.run(position=woken.position + 10_000) == Stopped(StopReason.POSITION)


@pytest.mark.parametrize("name", GOLDENS)
def test_a_golden_apart_and_together_is_the_same(name, tmp_path):
    unpack.unpack(SNAPSHOTS / name, tmp_path / "u")
    unpack.pack(tmp_path / "u", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (SNAPSHOTS / name).read_bytes()


def test_every_release_has_goldens_of_all_its_states():
    for release in releases.names():
        found: dict[str, Json] = {}
        for name in GOLDENS:
            if name.startswith(release):
                with Chain(SNAPSHOTS / name) as chain:
                    found |= {str(part.schema["name"]): part.schema["version"] for part in chain.parts.values()}
        assert found
        for state, version in found.items():
            assert releases.versions(release)[state] == version


def this_program() -> lock.Dump:
    """The states this program declares; those of the tests in this process are left out."""
    found = lock.dump()
    return {**found, "states": [state for state in found["states"] if not state["name"].startswith("test.")]}


@pytest.mark.parametrize("release", releases.names())
def test_no_released_state_was_changed(release):
    promised = lock.load(releases.SCHEMAS / f"{release}.json")
    assert lock.complaints(promised, this_program()) == []


def test_an_unversioned_change_is_found():
    """Planted: the newest release's lock against one with a field too many."""
    promised = lock.load(releases.SCHEMAS / f"{releases.names()[-1]}.json")
    changed = json.loads(json.dumps(promised))
    changed["states"][0]["fields"].append({"name": "more", "type": "u8", "doc": ""})
    assert lock.complaints(promised, changed)


def test_a_release_there_is_not():
    with pytest.raises(RequestError, match="there is no release"):
        releases.versions("9.9.9")


@pytest.mark.parametrize("release", releases.names())
def test_saving_for_a_release_writes_its_versions(release, boot_own, tmp_path):
    with boot_own(tsc_khz=1_000_000) as running:
        running.run(position=1_000_000)
        running.save(tmp_path / "a", versions=releases.versions(release))
        running.save(tmp_path / "b")
    with Reader(tmp_path / "a") as reader:
        for part in reader.parts.values():
            assert part.schema["version"] == releases.versions(release)[str(part.schema["name"])]
