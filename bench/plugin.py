"""What the cache of boots of the pytest plugin is worth: 20 tests on a Debian guest that is up, each session a process
of its own, from its start to the call of its first test and to its end; and the CPU time of its processes, which a
computer that is busy otherwise distorts less. Ratios are of sessions that are neighbours.

first     nothing is kept yet: the guest is booted, and kept
second    it is woken
-n        a worker against two, by pytest-xdist, the guest kept
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import track

from vmm.cli import show

TESTS = 20
INI = """[pytest]
vm_kernel = {guest}/vmlinux
vm_initrd = {guest}/initrd.img
addopts = -q -p no:cacheprovider
"""
CONFTEST = """
import os, time
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    with open("calls", "a") as file:
        file.write(f"{time.time()}\\n")
"""
SOURCE = f"""
import pytest

@pytest.mark.parametrize("n", range({TESTS}))
def test_it(vm_booted, console, n):
    assert console.run(f"i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done; echo $i {{n}}") == f"3000 {{n}}\\n"
"""


def session(folder: Path, *options: str) -> tuple[float, float, float]:
    """Seconds to the first test, to the end, and of CPU time."""
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    # As installed: compiled once, not at every start.
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": ""}
    before, started = cpu_s(), time.time()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=folder, env=environment, capture_output=True, text=True
    )
    took, used = time.time() - started, cpu_s() - before
    if done.returncode or f"{TESTS} passed" not in done.stdout:
        sys.exit(f"bench: the tests fail:\n{(done.stdout + done.stderr)[-1000:]}")
    return min(map(float, calls.read_text().split())) - started, took, used


def cpu_s() -> float:
    """Of processes of ours that have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guest", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    kinds = {"first": (), "second": (), "-n 1": ("-n1",), "-n 2": ("-n2",)}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        (folder / "pytest.ini").write_text(INI.format(guest=arguments.guest.absolute()))
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "test_it.py").write_text(SOURCE)
        session(folder)  # what is compiled and read from the disk once
        for _ in track(range(arguments.rounds), description="sessions", transient=True):
            shutil.rmtree(folder / "cache")
            for kind, options in kinds.items():
                found[kind].append(session(folder, *options))
    rows = []
    for kind, against in (("first", "first"), ("second", "first"), ("-n 1", "-n 1"), ("-n 2", "-n 1")):
        cells = []
        for i in range(3):
            cells.append(statistics.median(one[i] for one in found[kind]))
            cells.append(statistics.median(a[i] / b[i] for a, b in zip(found[kind], found[against], strict=True)))
        rows.append((kind, against, *(f"{value:.2f}" for value in cells)))
    columns = ("first test s", "ratio", f"{TESTS} tests s", "ratio", "CPU s", "ratio")
    show.table(("session", "against", *columns), rows)


if __name__ == "__main__":
    main()
