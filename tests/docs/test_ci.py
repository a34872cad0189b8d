"""docs/ci.md: both snippets are read as YAML, and their script lines are run in a small project of the page's files."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.docs import shell

pytestmark = pytest.mark.no_roundtrip("it runs in other processes")
TEXT = (ROOT / "docs" / "ci.md").read_text()
FILES = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", TEXT, re.M | re.S))
GITHUB, GITLAB = ".github/workflows/guests.yml", ".gitlab-ci.yml"


def snippet(name) -> Any:
    yaml = pytest.importorskip("yaml", reason="no PyYAML here: pip install 'anyhyve[dev]'")
    return yaml.safe_load(FILES[name])


def scripts() -> dict[str, list[str]]:
    """The commands of each."""
    steps = snippet(GITHUB)["jobs"]["guests"]["steps"]
    return {
        GITHUB: [line for step in steps for line in step.get("run", "").splitlines()],
        GITLAB: snippet(GITLAB)["guests"]["script"],
    }


@pytest.fixture
def project(debian, tmp_path):
    """A checkout with a cached guest, and a shell in it."""
    own = tmp_path / "project"
    shutil.copytree(debian, own / "guests" / "debian")
    for name in ("requirements.txt", "pytest.ini", "test_guest.py"):
        (own / name).write_text(FILES[name])
    with shell.Shell(own, tmp_path / "aside") as sh:
        yield own, sh


def run(sh, command, exits=0):
    mark = shell.Mark(command, None, exits, None, None)
    return sh.run(shell.Line(command, "", (mark,)))


@pytest.mark.debian
@pytest.mark.parametrize("name", [GITHUB, GITLAB])
def test_its_lines(project, name):
    own, sh = project
    lines = scripts()[name]
    assert len(lines) == 4
    for line in lines:
        assert run(sh, line) == "", line
    if name == GITLAB:
        assert 'failures="0"' in (own / snippet(name)["guests"]["artifacts"]["reports"]["junit"]).read_text()


@pytest.mark.debian
def test_what_a_failed_test_leaves(project):
    own, sh = project
    source = FILES["test_guest.py"].replace("seq 3", "seq 4")
    (own / "test_guest.py").write_text(source)
    tests = next(line for line in scripts()[GITHUB] if line.startswith("pytest"))
    assert run(sh, tests, exits=1) == ""
    (uploaded,) = [step["with"]["path"] for step in snippet(GITHUB)["jobs"]["guests"]["steps"] if "if" in step]
    assert [uploaded] == snippet(GITLAB)["guests"]["artifacts"]["paths"]
    (saved,) = (own / uploaded).rglob("*.snapshot")
    assert run(sh, f"anyhyve restore {saved} --until-time 0.001") == ""


def test_what_is_cached_is_what_is_fetched():
    steps = snippet(GITHUB)["jobs"]["guests"]["steps"]
    (cached,) = [step["with"]["path"] for step in steps if "cache" in step.get("uses", "")]
    assert [cached] == snippet(GITLAB)["guests"]["cache"]["paths"]
    for name, lines in scripts().items():
        assert f"anyhyve guest fetch --dir {cached}/debian" in lines, name
    assert f"vm_kernel = {cached}/debian/" in FILES["pytest.ini"]
