"""What a run of the tests says at its end."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.left_out import KVM, SLOW

pytestmark = pytest.mark.no_roundtrip("it runs pytest in other processes")
REASON = "a reason that is longer than a terminal of eighty columns is wide, as some of ours are, to its very end"
TESTS = f"""
import pytest

def test_quick(): pass

@pytest.mark.slow
@pytest.mark.parametrize("n", range(3))
def test_slow(n): pass

@pytest.mark.kvm
def test_on_kvm(): pytest.skip("no /dev/kvm here")

@pytest.mark.parametrize("n", range(2))
def test_with_a_tool(n): pytest.skip({REASON!r})
"""


def run(folder, *arguments):
    """The lines below "left out"."""
    (folder / "test_all.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.left_out", "-p", "no:cacheprovider", *arguments]
    where = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(command, cwd=folder, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.partition(" left out ")[2].splitlines()[1:-1]


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_what_was_left_out_and_how_to_run_it(tmp_path, workers):
    left = run(tmp_path, "-m", "not slow", *workers)
    assert left == [f"3 {SLOW}", f"2 skipped: {REASON}", f"1 skipped: no /dev/kvm here: {KVM}"]


def test_what_was_not_asked_for(tmp_path):
    assert run(tmp_path, "-k", "quick") == [f"3 {SLOW}", "3 deselected by -m, -k or --deselect"]


def test_nothing(tmp_path):
    assert run(tmp_path, "test_all.py::test_quick") == []


def test_make_test_says_it():
    """The tests of this tree have the plugin."""
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "tests/mutants"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f" {SLOW}\n" in done.stdout, done.stdout
