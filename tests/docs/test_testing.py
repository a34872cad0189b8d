"""docs/testing.md is followed, word for word, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.no_roundtrip("it runs in other processes")
TEXT = (ROOT / "docs" / "testing.md").read_text()
FILES = dict(re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```$", TEXT, re.M | re.S))
MENDS = re.findall(r"^```python\n# mend thermostat.py\n(.*?)^```$", TEXT, re.M | re.S)[0].split("    ...\n")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
ANYHYVE = [sys.executable, "-m", "anyhyve"]


def run(folder, command, timeout=120):
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.with_name(f"{folder.name}-cache"))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def write(folder, *names):
    for name in names:
        (folder / name).write_text(FILES[name])


def mended(source):
    """With the page's mends in place of what they mend, found by how their first lines begin."""
    imports, field, write, expire = MENDS
    source = re.sub(r"from anyhyve import .*\n", lambda _: imports, source)
    source = re.sub(r"    index: .*\n", lambda _: field, source)
    source = source.replace("        self.state.index = value\n", write)
    return re.sub(r"    def expire\(self\).*?(?=\n    def )", lambda _: expire, source, flags=re.S)


def test_the_first_bug_of_a_device_of_ones_own(tmp_path):
    write(tmp_path, "thermostat.py", "test_thermostat.py")
    found = run(tmp_path, [*PYTEST, "test_thermostat.py"])
    assert found.returncode == 1 and "1 failed" in found.stdout, found.stdout
    shown = found.stdout.replace("E   ", "").replace(" ", "")
    assert "IndexError:indexoutofrange" in shown or "AssertionError:thedeadlinestaysinthepast" in shown
    assert "Theshortestwaythere:\n" in shown

    (command,) = re.findall(r"^\$ anyhyve (fuzz .*)$", TEXT, re.M)
    fuzzed = run(tmp_path, [*ANYHYVE, *command.split()])
    assert fuzzed.returncode == 1, fuzzed.stderr
    ids = re.findall(r"^  anyhyve replay (\w+)$", fuzzed.stdout, re.M)
    assert len(ids) >= 2
    for id in ids:
        assert run(tmp_path, [*ANYHYVE, "replay", id]).returncode == 1
        failed = run(tmp_path, [*PYTEST, f"anyhyve-fuzz/findings/test_{id}.py"])
        assert failed.returncode == 1 and "1 failed" in failed.stdout

    (tmp_path / "thermostat.py").write_text(mended(FILES["thermostat.py"]))
    right = run(tmp_path, [*PYTEST, "test_thermostat.py"])
    assert right.returncode == 0, right.stdout
    again = run(tmp_path, [*ANYHYVE, *command.split()])
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("fails no more") == len(ids)


def test_a_guest(debian, tmp_path):
    (tmp_path / "guests").mkdir()
    os.symlink(debian, tmp_path / "guests" / "debian")
    write(tmp_path, "pytest.ini", "test_guest.py", "test_shell.py")
    done = run(tmp_path, [*PYTEST, "test_guest.py", "test_shell.py"])
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


@pytest.mark.slow
def test_in_a_virtual_environment_of_its_own(tmp_path):
    """What is installed is the wheel, with what it says it needs."""
    built = run(ROOT, [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path])
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    run(tmp_path, [sys.executable, "-m", "venv", "venv"])
    python = tmp_path / "venv" / "bin" / "python"
    installed = run(tmp_path, [python, "-m", "pip", "install", "-q", f"{wheel}[test]"], timeout=600)
    if installed.returncode:
        pytest.skip(f"no package index here: {installed.stderr.strip().splitlines()[-1]}")
    project = tmp_path / "project"
    project.mkdir()
    write(project, "thermostat.py", "test_thermostat.py")
    found = run(project, [python, "-m", "pytest", "-p", "no:cacheprovider"])
    assert found.returncode == 1 and "anyhyve 0." in found.stdout and "1 failed" in found.stdout, found.stdout
    fuzzed = run(project, [tmp_path / "venv" / "bin" / "anyhyve", "fuzz", "thermostat:Thermostat", "--seconds", "5"])
    assert fuzzed.returncode == 1 and "anyhyve replay" in fuzzed.stdout, fuzzed.stderr
    (project / "thermostat.py").write_text(mended(FILES["thermostat.py"]))
    right = run(project, [python, "-m", "pytest", "-p", "no:cacheprovider"])
    assert right.returncode == 0 and " passed" in right.stdout, right.stdout  # the finds' own tests are among them
