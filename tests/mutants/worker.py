"""Plants one fault after another in a copy of the tree, and lets pytest look for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutate import Mutant
from tests.mutants.suites import Suite

_PARENT_DIES, _SUBREAPER = 1, 36  # linux/prctl.h: PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER
_prctl = ctypes.CDLL(None).prctl
_NO_TESTS = 5


@dataclass(frozen=True)
class Outcome:
    """What became of a run of tests: "passed", "failed", "hung" or "empty"."""

    what: str
    seconds: float
    output: str


class Worker:
    """A copy of the tree, without a fault between two calls. A process has one: all its children end after a run."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._tree = self._folder / "tree"
        self._planted = 0
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (root / name).is_file():
                (self._tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self._tree / name)
        if (root / "guests").is_dir():
            (self._tree / "guests").symlink_to(root / "guests")
        _prctl(_SUBREAPER, 1, 0, 0, 0)
        _prctl(_PARENT_DIES, signal.SIGKILL, 0, 0, 0)

    def whole(self, suite: Suite, times: Path) -> Outcome:
        """The suite without a fault, to see that it passes; how long each test takes is written to `times`."""
        return self._run(suite, times, "-", 0, 3600)

    def plant(self, mutant: Mutant, suite: Suite, times: Path, spare_s: int, limit_s: float) -> Outcome:
        """The suite with the fault, to the first test that fails, or takes `spare_s` more than five times as long."""
        file = self._tree / mutant.file
        right, at = file.read_bytes(), file.stat().st_mtime
        self._planted += 1
        try:
            file.write_text(mutant.code)
            # compiled code is kept by time and size: no two texts may share them
            os.utime(file, (at, at + 10 * self._planted))
            return self._run(suite, times, f"test_{file.stem}.py", spare_s, limit_s)
        finally:
            file.write_bytes(right)
            os.utime(file, (at, at))

    def _run(self, suite: Suite, times: Path, first: str, spare_s: int, limit_s: float) -> Outcome:
        environment = {
            **os.environ, "PYTHONPATH": str(self._tree), "MUTANTS_TIMES": str(times), "MUTANTS_FIRST": first,
            "MUTANTS_SPARE_S": str(spare_s), "TMPDIR": str(self._folder), "COLUMNS": "120",
            "PYTHONUNBUFFERED": "",  # else what is not flushed is seen all the same
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "tests.mutants.order",
                   "--hypothesis-profile=mutants", *suite.options, *suite.paths]  # fmt: skip
        started = time.monotonic()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, cwd=self._tree, env=environment, stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                       preexec_fn=_alone)  # fmt: skip
            try:
                status = process.wait(limit_s)
                what = {0: "passed", _NO_TESTS: "empty", -signal.SIGALRM: "hung"}.get(status, "failed")
            except subprocess.TimeoutExpired:
                what = "hung"
            finally:
                _end_children()
                process.wait()
            output.seek(0)
            return Outcome(what, time.monotonic() - started, output.read().decode(errors="replace"))


def _alone() -> None:
    _prctl(_PARENT_DIES, signal.SIGKILL, 0, 0, 0)
    # A fault may ask for all memory there is: then this is ended, and nobody else. No limit of addresses would do: each
    # engine of `emu` reserves a gibibyte and more that it never touches.
    Path("/proc/self/oom_score_adj").write_text("1000")


def _end_children() -> None:
    """End what the run left: it comes to us when its parent is gone, machines that put themselves in the background,
    too."""
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(child), 0)
