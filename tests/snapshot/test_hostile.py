"""Hostile files, in a process of their own: a crash of the engine would otherwise take the tests with it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from snapshot.errors import SnapshotError
from snapshot.reader import Reader
from tests.conftest import ROOT
from tests.snapshot.hostile import File, Raw, originals


def run(module: str, *arguments: object, folder: Path, timeout: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def hostile(count: int, seed: int, folder: Path, timeout: int) -> dict[str, int]:
    report = json.loads(run("tests.snapshot.hostile", count, seed, folder=folder, timeout=timeout))
    assert report["files"] == count == sum(report["outcomes"].values())
    assert report["grown_kib"] < 64 << 10
    outcomes: dict[str, int] = report["outcomes"]
    return outcomes


def test_mutated_files_are_refused_or_run(tmp_path):
    outcomes = hostile(800, 1, tmp_path, timeout=300)
    # the mutations reach every depth
    assert outcomes["structure: ran"] > 25 and outcomes["structure: refused by the machine"] > 5
    assert outcomes["structure: refused"] > 100 and outcomes["bytes: refused"] > 250


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_two_hundred_thousand_mutated_files(tmp_path, seed):
    hostile(25_000, 100 + seed, tmp_path, timeout=3000)


def test_the_mutator_writes_what_it_read(tmp_path):
    for file in originals(tmp_path):
        assert File.parse(file.read_bytes()).build() == file.read_bytes()


def test_a_crash_would_be_seen(tmp_path):
    """Planted: the driver itself must not swallow what is neither a refusal nor a machine."""
    script = "from tests.snapshot import hostile; hostile.Machine.restore = lambda *a, **k: 1 / 0; hostile.main(50, 1)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode != 0 and b"ZeroDivisionError" in done.stderr


def test_nothing_is_created_from_a_file_that_is_bad_at_its_end(tmp_path, monkeypatch):
    from vmm import ram
    from vmm.machine.machine import Machine

    file = originals(tmp_path)[0]
    whole = File.parse(file.read_bytes())
    parts = [i for i, raw in enumerate(whole.chunks) if raw.kind == b"PART"]
    last = whole.chunks[parts[-1]]
    broken = Raw(**{**vars(last), "payload": last.payload.replace(b'"version":1', b'"version":9')})
    chunks = [broken if i == parts[-1] else raw for i, raw in enumerate(whole.chunks)]
    file.write_bytes(File(whole.header, chunks).build())
    made: list[object] = []
    monkeypatch.setattr(Reader, "map_ram", lambda *a: made.append(a))
    monkeypatch.setattr(ram, "Ram", lambda *a: made.append(a))
    monkeypatch.setattr(Machine, "__init__", lambda *a: made.append(a))
    with pytest.raises(SnapshotError, match="version 9 is not known here"):
        Machine.restore(file)
    assert not made


@pytest.mark.slow
def test_coverage_guided(tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("no atheris here: pip install atheris")
    report = run("tests.snapshot.fuzz_reader", "-runs=200000", "-max_total_time=120", "-rss_limit_mb=2048",
                 folder=tmp_path, timeout=600)  # fmt: skip
    assert "Done" in report and "ERROR" not in report


WIDE = """
import resource, sys
from pathlib import Path
from snapshot import verify
from snapshot.chain import Chain
from snapshot.errors import SnapshotError
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    Chain(Path(sys.argv[1])).close()
except SnapshotError:
    pass
read = peak()
try:
    verify.verify(Path(sys.argv[1]))
except verify.Bad:
    pass
print(read - before, peak() - before)
"""


@pytest.mark.parametrize("item", [b"[]", b"{}", b"0", b'""', b"[[]]"])
def test_the_widest_json_does_not_fill_memory(tmp_path, item):
    """As much as the limits allow, of what takes the most memory for its length."""
    from tests.snapshot import test_container
    from tests.snapshot.test_container import build, part

    def full(name: str) -> test_container.Raw:
        head, tail = b'{"schema":[],"state":[', b"]}"
        count = ((1 << 20) - 2000 - len(head) - len(tail)) // (len(item) + 1)
        return part(name, head + b",".join([item] * count) + tail)

    (tmp_path / "wide").write_bytes(build([part(), full("a")]))
    done = subprocess.run(
        [sys.executable, "-c", WIDE, str(tmp_path / "wide")], cwd=ROOT, capture_output=True, text=True
    )
    grown = [int(word) for word in done.stdout.split()]
    assert len(grown) == 2 and max(grown) < 64 << 10, done.stdout + done.stderr
