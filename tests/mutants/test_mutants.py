"""The tool itself, on trees made for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow  # mutmut is an extra, which `make test-full` installs

WEAK = '''
"""A module whose tests look away."""
from __future__ import annotations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    WIDTH = 3 + 4

def clamp(value: int | None = None) -> int:
    """At most 10."""
    assert value is not None
    if value < 0:
        raise ValueError("below " + str(0))
    if value > 10:
        return 10
    return value
'''
TESTS = """
from weak.weak import clamp

def test_clamp():
    assert (clamp(0), clamp(3), clamp(50)) == (0, 3, 10)
"""
CONFTEST = """
from hypothesis import settings
settings.register_profile("mutants")
"""


@pytest.fixture
def mutate():
    return pytest.importorskip("tests.mutants.mutate", exc_type=ImportError)


@pytest.fixture
def weak(tmp_path):
    """A tree of one module and its test, with the tool in it."""
    tool = {file.name: file.read_text() for file in Path(__file__).parent.glob("[!t]*.py")}
    tool["campaign.py"] += "\nSPARE_S = 1\n"
    tool["suites.py"] += '\nSUITES = {"weak/": Suite(("tests/weak",))}\n'
    for name, text in (
        *((f"{package}/__init__.py", "") for package in ("weak", "tests")),
        ("weak/weak.py", WEAK),
        ("tests/weak/test_weak.py", TESTS),
        ("tests/conftest.py", CONFTEST),
        *((f"tests/mutants/{name}", text) for name, text in tool.items()),
        ("tests/mutants/equivalent.toml", ""),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def measure(tree, *arguments):
    ended = subprocess.run(
        [sys.executable, "-m", "tests.mutants", "--json", "--jobs", "2", *arguments],
        cwd=tree, capture_output=True, text=True,
    )  # fmt: skip
    verdicts = [json.loads(line) for line in ended.stdout.splitlines()]
    return ended, {(v["mutant"]["operator"], v["mutant"]["after"]): v["what"] for v in verdicts}


def test_what_lives_is_reported_and_fails(mutate, weak):
    ended, verdicts = measure(weak, "--seed", "1", "--count", "100")
    assert ended.returncode == 1, ended.stderr
    assert {after for (_, after), what in verdicts.items() if what == "lived"} == {
        "pass",  # in the place of the raise
        "if value > 11:",
        "if value >= 10:",
    }


def test_what_is_named_does_not_count(mutate, weak):
    (weak / "tests/mutants/equivalent.toml").write_text(
        """[[mutant]]
        file = "weak/weak.py"
        function = "clamp"
        operator = "swap_op"
        before = "if value > 10:"
        after = "if value >= 10:"
        reason = "10 either way"
        """
    )
    _, verdicts = measure(weak, "--seed", "1", "--count", "100")
    assert verdicts["swap_op", "if value >= 10:"] == "equivalent"


def test_nothing_is_said_of_tests_that_fail_by_themselves(mutate, weak):
    (weak / "tests/weak/test_weak.py").write_text("def test_wrong():\n    assert False\n")
    ended, verdicts = measure(weak, "--count", "3")
    assert ended.returncode == 1 and not verdicts
    assert "with nothing planted" in ended.stderr


def test_a_hang_is_found(mutate, weak):
    (weak / "weak/weak.py").write_text("def down(v):\n    while v > 0:\n        v -= 1\n    return v\n")
    (weak / "tests/weak/test_weak.py").write_text(
        "from weak.weak import down\n\ndef test_down():\n    assert down(3) == 0\n"
    )
    ended, verdicts = measure(weak, "--count", "100")
    assert (verdicts["statement", "pass"], verdicts["swap_op", "v += 1"]) == ("found", "found")
    assert '"why": "hung"' in ended.stdout


def test_what_a_run_leaves_behind_ends_with_it(mutate, weak):
    (weak / "tests/weak/test_weak.py").write_text(
        f"import os, subprocess, sys, time\n{TESTS}\n"
        "def test_daemon():\n"
        "    daemon = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"    open('{weak}/daemons', 'a').write(f'{{daemon.pid}}\\n')\n"
    )
    measure(weak, "--count", "1")
    daemons = (weak / "daemons").read_text().split()
    assert daemons
    assert not [pid for pid in daemons if Path(f"/proc/{pid}").exists()]


def test_the_same_seed_plants_the_same(mutate):
    def names(seed):
        sites = mutate.Source(ROOT, "snapshot/canon.py").sites
        return [mutant.name for mutant in mutate.sample(sites, seed, 10)]

    assert names(1) == names(1) != names(2)


def test_every_name_is_still_that_of_a_mutant(mutate):
    """Else the code has moved on, and the reason with it."""
    from tests.mutants.campaign import reasons

    for name in reasons():
        source = mutate.Source(ROOT, name[0])
        sites = [site for site in source.sites if (site.function, site.operator) == name[1:3]]
        made = [source.mutant(site, instead) for site in sites for instead in site.instead]
        assert name in [mutant.name for mutant in made if mutant is not None], f"no such mutant: {name}"
