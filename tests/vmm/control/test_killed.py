"""The process of a named machine is killed at any moment of its saves: in a process of its own, which adopts what the
killed ones leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def killed(count: int, seed: int, folder: Path, timeout: int) -> dict[str, int]:
    words = [sys.executable, "-m", "tests.vmm.control.killed", str(count), str(seed), str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:] + (folder / "log").read_text()[-3000:]
    report: dict[str, int] = json.loads(done.stdout)
    assert report["kills"] == count == report.get("new", 0) + report.get("old", 0)
    return report


def test_a_few_kills(tmp_path):
    killed(20, 1, tmp_path, timeout=120)


@pytest.mark.slow
def test_a_thousand_kills(tmp_path):
    report = killed(1000, 2, tmp_path, timeout=3000)
    assert report["left a temporary"] and report["new"] and report["old"], "they came at all moments"
