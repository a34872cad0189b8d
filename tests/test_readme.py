"""README.md: its commands are run in their order by one shell, in a fresh clone and beside it, as a newcomer would; its
picture is drawn again."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.docs import shell

pytestmark = pytest.mark.no_roundtrip("it runs in other processes")
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.debian
def test_its_commands_in_their_order(debian, tmp_path):
    clone, own = shell.clone(tmp_path / "anyhyve"), tmp_path / "try"
    shutil.copytree(debian, own / "guests" / "debian")
    for name, content in shell.files(TEXT).items():
        (own / name).write_text(content)
    with shell.Shell(clone, tmp_path / "aside") as sh:
        wrong = shell.follow(TEXT, sh)
    assert not wrong, "\n\n".join(wrong)


def test_the_demo_says_how_to_go_on(tmp_path):
    """Its last line is the next command: it boots what the demo booted, until somebody quits."""
    demo = [sys.executable, "-m", "bench.demo", "--guest", tmp_path / "none"]
    done = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, following = done.stdout.splitlines()[-2:]
    assert ". .venv/bin/activate" in where
    command = following.removeprefix("try").strip().replace(".venv/bin/anyhyve", f"{sys.executable} -m anyhyve")
    typist = [sys.executable, str(shell.TYPIST), "round 0001", "^]q", command]
    tried = subprocess.run(typist, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert tried.returncode == 0 and "anyhyve: quit, at position" in tried.stdout, tried.stdout


@pytest.fixture(scope="module")
def picture():
    """docs/picture/draw.py."""
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "picture" / "draw.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(lines):
    """Lines without what marks a column, which Pythons do otherwise."""
    return [line for line in lines if line.strip(" ^~")]


def test_the_picture_shows_what_is_so(picture):
    shown = picture.PICTURE.read_text()
    now = [" ".join(line.split()) for line in picture.run().splitlines() if line.strip()]
    assert words(picture.read(shown)) == words(now)
    assert "E index = 100, not 0" in now
    assert "http" not in shown.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")


def test_a_picture_is_read_as_it_was_drawn(picture):
    assert picture.read(picture.draw("$ a  <b>\n\nE   c & d")) == ["$ a <b>", "E c & d"]
