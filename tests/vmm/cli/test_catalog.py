"""The catalog from the command line: what is in it, what stays, and every machine suspended into it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapshot.verify import verify
from tests.vmm.cli.test_control import answer, catalog, refusal


def test_catalog(named, anyhyve, environment):
    named("box", "--memory", "16M")
    first, second = (answer(anyhyve("ctl", "box", "checkpoint", "--json"))["path"] for _ in range(2))
    third = str(catalog(environment) / "third.snapshot")
    anyhyve("ctl", "box", "checkpoint", third, "--parent", second, check=True)
    found = answer(anyhyve("catalog", "--json"))
    assert [(each["machine"], each["path"], each["parent"]) for each in found] == [
        ("box", first, None), ("box", second, None), ("box", third, Path(second).name),
    ]  # fmt: skip
    assert all(abs(each["time_s"] - time.time()) < 60 and each["size_bytes"] > 0 for each in found)
    assert found[2]["size_bytes"] < found[1]["size_bytes"]
    assert "third.snapshot is a difference to it" in refusal(anyhyve("catalog", "delete", second))
    anyhyve("catalog", "keep", "box/third.snapshot", check=True)
    assert "it is kept" in refusal(anyhyve("catalog", "delete", third))
    assert "read-only" in refusal(anyhyve("ctl", "box", "checkpoint", third))
    assert [each["kept"] for each in answer(anyhyve("catalog", "--json"))] == [False, True, True]
    assert first.encode() in anyhyve("catalog", "prune", "box", "--leave", 0, check=True).stdout
    assert [each["path"] for each in answer(anyhyve("catalog", "--json"))] == [second, third]
    for path in (third, second):
        anyhyve("catalog", "keep", "--not", path, check=True)
    anyhyve("catalog", "delete", third, check=True)
    anyhyve("catalog", "delete", f"box/{Path(second).name}", check=True)
    assert answer(anyhyve("catalog", "--json")) == []
    assert "no such snapshot" in refusal(anyhyve("catalog", "delete", third))
    assert "cannot name a machine" in refusal(anyhyve("catalog", "--name", "../box"))


def test_a_damaged_snapshot_is_listed_and_not_woken(named, anyhyve, environment):
    catalog(environment).mkdir(parents=True)
    (catalog(environment) / "bad.snapshot").write_bytes(b"junk")
    (found,) = answer(anyhyve("catalog", "--json"))
    assert "not an anyhyve snapshot" in found["problem"]
    assert b"bad.snapshot" in anyhyve("catalog").stdout
    assert "there is no snapshot of box" in refusal(anyhyve("wake", "box"))


def test_suspend_all(named, anyhyve, environment):
    boxes = [named("box"), named("other", "--paused")]
    outcome = answer(anyhyve("suspend-all", "--json"))
    assert outcome == {name: str(catalog(environment, name) / "suspended.snapshot") for name in ("box", "other")}
    assert [box.wait(10) for box in boxes] == [0, 0]
    for file in outcome.values():
        verify(Path(file))
    assert answer(anyhyve("suspend-all", "--json")) == {}


def test_suspend_all_twice_at_once(named, anyhyve, environment):
    """Whoever comes second says the same, or finds no machine any more."""
    box = named("box", "--memory", "16M")
    with ThreadPoolExecutor(4) as pool:
        outcomes = [answer(done) for done in pool.map(anyhyve, *zip(*[("suspend-all", "--json")] * 4, strict=True))]
    assert box.wait(10) == 0
    file = str(catalog(environment) / "suspended.snapshot")
    assert {"box": file} in outcomes and all(outcome in ({"box": file}, {}) for outcome in outcomes), outcomes
    verify(Path(file))


@pytest.mark.parametrize(("left", "status", "said"), [((), 0, {}), (("box.sock",), 1, {"box": None})])
def test_suspend_all_and_one_that_has_just_ended(anyhyve, environment, left, status, said):
    """Its lock is still held; in order it takes its socket away first, killed it leaves it."""
    folder = Path(environment["XDG_RUNTIME_DIR"]) / "anyhyve"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in left:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as stale:
            stale.bind(str(folder / name))
    with open(folder / "box.lock", "w") as lock:
        os.chmod(lock.fileno(), 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = anyhyve("suspend-all", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (status, said), done.stderr


def test_suspend_all_and_one_that_cannot(named, anyhyve, environment):
    named("box")
    catalog(environment).parent.mkdir(parents=True)
    catalog(environment).touch()
    done = anyhyve("suspend-all")
    assert done.returncode == 1 and b"box: runs on" in done.stdout and b"File exists" in done.stderr
    assert answer(anyhyve("ctl", "box", "status", "--json"))["state"] == "running"
