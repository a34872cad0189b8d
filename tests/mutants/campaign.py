"""Mutants and what becomes of each."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.mutate import Mutant
from tests.mutants.suites import Suite, suite_of
from tests.mutants.worker import Outcome, Worker

EQUIVALENT = Path(__file__).parent / "equivalent.toml"
SPARE_S = 30  # what tests may take besides, on a computer with other work

FOUND, LIVED, KNOWN, NOT_HERE, NOT_TRIED = "found", "lived", "equivalent", "not measurable", "not tried"


@dataclass(frozen=True)
class Verdict:
    """`why`: the test that found it, the reason it is equivalent or not measurable."""

    mutant: Mutant
    what: str
    why: str = ""
    seconds: float = 0.0


class Broken(Exception):
    """Tests fail where nothing is planted: they can find nothing."""


def reasons() -> dict[tuple[str, ...], str]:
    """Why a mutant does what the code does, by the mutant's name."""
    entries = tomllib.loads(EQUIVALENT.read_text()).get("mutant", [])
    return {(e["file"], e["function"], e["operator"], e["before"], e["after"]): e["reason"] for e in entries}


def campaign(root: Path, mutants: list[Mutant], jobs: int, seconds: float) -> Iterator[Verdict]:
    """The verdicts, each as soon as it is known. No run is begun after so many seconds. Raises Broken."""
    end = time.monotonic() + seconds
    named = reasons()
    waiting: dict[Suite, list[Mutant]] = {}
    for mutant in mutants:
        if mutant.name in named:
            yield Verdict(mutant, KNOWN, named[mutant.name])
        else:
            waiting.setdefault(suite_of(mutant.file), []).append(mutant)
    with (
        tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder,
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (root, Path(folder))) as pool,
    ):
        times = {suite: Path(folder) / f"times-{i}" for i, suite in enumerate(waiting)}
        whole: dict[Future[Outcome], Suite] = {}
        runs: dict[Future[Outcome | None], Mutant] = {}
        for suite, its_mutants in waiting.items():
            if (hindrance := suite.hindrance()) is None:
                whole[pool.submit(_whole, suite, times[suite])] = suite
            else:
                yield from (Verdict(mutant, NOT_HERE, hindrance) for mutant in its_mutants)
        for done in as_completed(whole):
            outcome, suite = done.result(), whole[done]
            if outcome.what == "empty":
                yield from (Verdict(mutant, NOT_HERE, "no test of the suite runs here") for mutant in waiting[suite])
            elif outcome.what != "passed":
                pool.shutdown(cancel_futures=True)
                raise Broken(f"{' '.join(suite.paths)}, with nothing planted:\n{outcome.output}")
            else:
                limit_s = 3 * outcome.seconds + SPARE_S
                for mutant in waiting[suite]:
                    runs[pool.submit(_plant, mutant, suite, times[suite], limit_s, end)] = mutant
        for ended in as_completed(runs):
            yield _verdict(runs[ended], ended.result())


def _verdict(mutant: Mutant, outcome: Outcome | None) -> Verdict:
    if outcome is None:
        return Verdict(mutant, NOT_TRIED)
    if outcome.what == "passed":
        return Verdict(mutant, LIVED, seconds=outcome.seconds)
    failed = [line for line in outcome.output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    why = failed[0] if failed and outcome.what != "hung" else outcome.what
    return Verdict(mutant, FOUND, why, outcome.seconds)


_worker: Worker


def _begin(root: Path, folder: Path) -> None:
    global _worker
    _worker = Worker(root, folder)


def _whole(suite: Suite, times: Path) -> Outcome:
    return _worker.whole(suite, times)


def _plant(mutant: Mutant, suite: Suite, times: Path, limit_s: float, end: float) -> Outcome | None:
    return _worker.plant(mutant, suite, times, SPARE_S, limit_s) if time.monotonic() < end else None
