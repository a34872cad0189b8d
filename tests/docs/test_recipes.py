"""docs/recipes.md is followed: each patch is applied to a copy of the project, what stands under it is done, and the
files it touches are counted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import OWN, ROOT

pytestmark = pytest.mark.no_roundtrip("it runs in other processes")
TEXT = (ROOT / "docs" / "recipes.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
PACKAGES = ("anyhyve", "snapshot", "vmm", "emu", "kvmbackend")
PLACES = {
    "A device on ISA ports": 2,
    "A device in memory, with registers of eight bytes": 2,
    "A wire": 3,
    "A part that is saved and is no device": 1,
    "A control method": 1,
    "A command": 2,
    "The next version of a state": 1,
    "A field of the CPU": 3,
    "A board": 2,
}


class Copy:
    """The project, to be changed; and what is run runs there."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.work = folder / "tree", folder / "work"
        self.work.mkdir()
        for package in PACKAGES:
            shutil.copytree(ROOT / package, self.tree / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(OWN, self.work / "own.bin")
        shutil.copy(ROOT / "fixtures" / "snapshots" / "0.3.0-own.snapshot", self.work / "golden.snapshot")
        self.paths = [str(self.tree)]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(self.paths)}
        return subprocess.run(command, cwd=self.work, env=environment, capture_output=True, text=True, timeout=120)

    def patch(self, patch: str) -> set[str]:
        """Apply it: the files it touches."""
        subprocess.run(["git", "init", "-q"], cwd=self.tree, check=True)
        done = subprocess.run(
            ["git", "apply", "--unidiff-zero", "-"], cwd=self.tree, input=patch, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"^\+\+\+ b/(.*)$", patch, re.M))

    def follow(self, section: str) -> None:
        """Do what it shows: commands, and Python."""
        for kind, block in re.findall(r"^```(console|python)\n(.*?)^```", section, re.M | re.S):
            if kind == "python" and not block.startswith("# "):
                done = self.run(sys.executable, "-c", block)
                assert done.returncode == 0, done.stderr
            for command in re.findall(r"^\$ anyhyve (.*)$", block, re.M):
                done = self.anyhyve(*command.split())
                assert done.returncode == 0, (command, done.stdout, done.stderr)

    def anyhyve(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "anyhyve", *words)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_every_recipe_is_counted():
    assert {name for name, section in SECTIONS.items() if "```diff" in section} == set(PLACES)


@pytest.mark.parametrize("name", PLACES)
def test_a_recipe(copy, name):
    section = SECTIONS[name]
    (patch,) = re.findall(r"^```diff\n(.*?)^```", section, re.M | re.S)
    touched = copy.patch(patch)
    assert len(touched) == PLACES[name], touched
    words = {1: "One place", 2: "Two places", 3: "Three places"}
    assert section.strip().startswith(words[PLACES[name]])
    copy.follow(section)
    if name == "A device on ISA ports":
        assert "0x4d" in copy.anyhyve("snapshot", "show", "later.snapshot").stdout, "what it held is what it holds"


def test_a_package_of_ones_own(copy):
    """Put on a board, saved, woken, fuzzed, drawn; and without the package one line says which kind is missing."""
    section = SECTIONS["A device of a package of your own"]
    files = dict(re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```$", section, re.M | re.S))
    site = copy.work / "site"
    site.mkdir()
    (site / "acme_thermometer.py").write_text(files["acme_thermometer.py"])
    (group, name, where) = re.findall(r'entry-points."(.*)"\]\n(\S+) = "(.*)"', files["pyproject.toml"])[0]
    installed = site / "acme_thermometer-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-thermometer\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{group}]\n{name} = {where}\n")
    copy.paths.append(str(site))
    copy.follow(section)
    drawn = copy.anyhyve("devices", name).stdout
    assert '| `offset` | `"u8"` | `0` | added to what is measured |' in drawn and "read_degrees" in drawn
    assert name in copy.anyhyve("devices").stdout
    copy.paths.remove(str(site))
    refused = copy.anyhyve("restore", "acme.snapshot")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert f"there is no kind of device '{name}' here" in refused.stderr
    shown = copy.anyhyve("snapshot", "show", "acme.snapshot")
    assert shown.returncode == 0 and "it warns above" in shown.stdout and "acme.thermometer" in shown.stdout


def test_a_recipe_that_is_stale_is_found(copy):
    with pytest.raises(AssertionError, match="does not apply"):
        copy.patch("--- a/vmm/clock.py\n+++ b/vmm/clock.py\n@@ -1,2 +1,3 @@\n not a line of it\n+new\n nor this\n")
