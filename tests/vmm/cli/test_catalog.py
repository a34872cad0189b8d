"""The catalog from the command line: what is in it, what stays, and every machine suspended into it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    assert "the file is cut" in found["problem"]
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


def test_suspend_all_and_one_that_cannot(named, anyhyve, environment):
    named("box")
    catalog(environment).parent.mkdir(parents=True)
    catalog(environment).touch()
    done = anyhyve("suspend-all")
    assert done.returncode == 1 and b"box: runs on" in done.stdout and b"File exists" in done.stderr
    assert answer(anyhyve("ctl", "box", "status", "--json"))["state"] == "running"
