"""Fuzzing of devices: cases out of bytes, those that reach new lines kept and changed further.

`explore` is one slice of work, of one device for some seconds, and needs nothing but its Task: it runs in this process,
in a pool of them, or on another computer. `campaign` hands out slices to any concurrent.futures executor, gathers what
they bring, and keeps it in a folder: what reached what, and what was found.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import blake3

from snapshot.field_types import Json
from snapshot.files import read_file
from vmm.errors import BackendError, RequestError
from vmm.testing import draw
from vmm.testing.case import Case, Stale, as_pytest, as_qtest, smallest
from vmm.testing.subject import Subject

Line = tuple[str, int]  # of a device's code: file name, line number
SLICE_S = 2.0
_HANG_S = 5
_LOST_S = 120  # of CPU time; more than making a find small may take
_SIZES = (16, 64, 200, 400)  # bytes of a new input
_MOST = 1000  # bytes of one that grew
_EXACT = 16  # every so many-th case with its lines counted
_TRACED = 4  # every so many-th with the lines it reaches: that takes longer than the case itself
_HOSTILE = 8  # every so many-th slice is of states no schema allows


@dataclass(frozen=True)
class Start:
    """What is fuzzed, and from where: a device's state in a snapshot, and the guest time there."""

    device: str
    golden: dict[str, Json]
    now: int


@dataclass(frozen=True)
class Task:
    start: Start
    hostile: bool
    seed: str
    seconds: float
    corpus: tuple[bytes, ...]
    known: frozenset[str]  # causes that are not worth finding again


@dataclass
class Result:
    device: str
    executions: int = 0
    actions: int = 0
    seconds: float = 0.0
    reached: dict[bytes, frozenset[Line]] = field(default_factory=dict)  # inputs, and what each was the first to reach
    finds: dict[str, Case] = field(default_factory=dict)  # by cause


def explore(task: Task, *, stop_at_find: bool = False, alive: Callable[[], None] = lambda: None) -> Result:
    """Fuzz one device for a while. `alive` is called before each case."""
    subject, draws = Subject.named(task.start.device), random.Random(task.seed)
    result, coverage = Result(task.start.device), _Coverage(subject)
    pool, began = list(task.corpus), time.monotonic()
    for data in itertools.chain(task.corpus, _inputs(draws, pool)):
        if (elapsed := time.monotonic() - began) > task.seconds:
            break
        alive()
        case = draw.case(subject, task.start.golden, task.start.now, data, hostile=task.hostile)
        result.executions += 1
        result.actions += len(case.actions)
        n = result.executions
        traced = coverage if n % _TRACED == 1 or n <= len(task.corpus) else nullcontext()
        why = _failure(case, traced, exact=n % _EXACT == 0 and n > len(task.corpus))
        if why is not None and why not in task.known and why not in result.finds:
            result.finds[why] = case if stop_at_find else smallest(case, why)
            if stop_at_find:
                break
        if found := coverage.take():
            if data not in task.corpus:
                pool.append(data)
            result.reached[data] = found
    result.seconds = elapsed
    return result


class _Watch:
    """Ends this process, which is a worker's, when it has computed for long without saying that it is alive. An alarm
    does not reach what never returns to the interpreter, as sum(range(1 << 60)) does not; SIGPROF, which nobody
    handles, does."""

    def __init__(self) -> None:
        self._said = -math.inf

    def __call__(self) -> None:
        if (now := time.monotonic()) > self._said + 1:
            self._said = now
            signal.setitimer(signal.ITIMER_PROF, _LOST_S)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _slice(task: Task) -> Result:
    """Run a slice of a campaign; what a worker process is given to do."""
    with _Watch() as watch:
        return explore(task, alive=watch)


def _inputs(draws: random.Random, pool: list[bytes]) -> Iterator[bytes]:
    """Draw inputs without end: new ones, and changed ones of those that reached a line before."""
    while True:
        data = draws.randbytes(draws.choice(_SIZES))
        if pool and draws.random() < 0.6:
            kept = bytearray(draws.choice(pool))
            at = draws.randrange(len(kept) + 1)
            match draws.randrange(4):
                case 0:
                    kept[at:] = data
                case 1:
                    kept[at : at + 8] = data[:8]
                case 2:
                    kept[at:] = draws.choice(pool)[at:]
                case _:
                    kept += data
            data = bytes(kept[:_MOST])
        yield data


def _failure(case: Case, traced: AbstractContextManager[None], *, exact: bool) -> str | None:
    if exact:
        return case.failure()
    with _alarm(), traced:
        return case.failure(bounded=False)


@contextmanager
def _alarm() -> Iterator[None]:
    """Raise AssertionError in what runs here for too long. Where there are no signals (a thread of somebody's pool) it
    does not: only cases whose lines are counted end then."""

    def ring(*_: object) -> None:
        raise AssertionError("an access does not come to an end")

    try:
        before = signal.signal(signal.SIGALRM, ring)
    except ValueError:
        yield
        return
    signal.alarm(_HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Coverage:
    """Which lines of the device's own modules ran, by the interpreter's tracing. Code whose lines were all seen is
    traced no more, so that it costs less the longer it runs."""

    def __init__(self, subject: Subject) -> None:
        self._files = {module.__file__ for module in subject.modules}
        self._missing: dict[CodeType, set[int]] = {}
        self._new: set[Line] = set()

    def take(self) -> frozenset[Line]:
        """Take the lines that ran since this was last called, and for the first time."""
        found, self._new = frozenset(self._new), set()
        return found

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        missing = self._missing.get(code)
        if missing is None:
            ours = code.co_filename in self._files
            missing = {line for _, _, line in code.co_lines() if line} - {code.co_firstlineno} if ours else set()
            self._missing[code] = missing
        return self._line if missing else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        missing, line = self._missing[frame.f_code], frame.f_lineno
        if line in missing:
            missing.discard(line)
            self._new.add((os.path.basename(frame.f_code.co_filename), line))
        return self._line


@dataclass
class Report:
    """What a campaign did, so far."""

    executions: dict[str, int] = field(default_factory=dict)
    actions: int = 0
    seconds: float = 0.0  # of work, all processes together
    lines: dict[str, set[Line]] = field(default_factory=dict)
    finds: dict[str, tuple[str, Case]] = field(default_factory=dict)  # cause and case by id
    fixed: list[str] = field(default_factory=list)  # ids of older finds that fail no more
    stale: dict[str, str] = field(default_factory=dict)  # and of those that cannot be played, with why

    @property
    def per_second(self) -> float:
        """Cases run in a second by one process."""
        return sum(self.executions.values()) / self.seconds if self.seconds else 0.0

    @property
    def covered(self) -> int:
        return len(set().union(*self.lines.values())) if self.lines else 0


def campaign(
    starts: list[Start],
    executor: Executor,
    *,
    jobs: int,
    seconds: float,
    folder: Path,
    seed: object = 0,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """`seconds` of work for each device, `jobs` slices at a time. KeyboardInterrupt ends it early; what was gathered is
    in the folder in any case. Raises RequestError for a folder that holds something else, BackendError when a process
    of the executor's is lost."""
    kept = {start.device: Corpus(folder / start.device.replace(":", ".")) for start in starts}
    report, pending = Report(), dict[Future[Result], Task]()
    for case in findings(folder):
        if case.device not in kept:
            continue
        try:
            why = case.failure()
        except Stale as error:
            report.stale[case.id] = str(error)
            continue
        if why is None:
            report.fixed.append(case.id)
        else:
            report.finds[case.id] = why, case
    tasks = _slices(starts, kept, seconds, seed, report)
    try:
        for first in itertools.islice(tasks, jobs):
            pending[executor.submit(_slice, first)] = first
        while pending:
            for future in wait(pending, timeout=1, return_when=FIRST_COMPLETED).done:
                _gather(future.result(), kept, report, folder)
                del pending[future]
                if (task := next(tasks, None)) is not None:
                    pending[executor.submit(_slice, task)] = task
            progress(report)
    except BrokenExecutor:
        whose = ", ".join(sorted({task.start.device for task in pending.values()}))
        raise BackendError(
            f"a process that fuzzed one of {whose} has ended: it was killed, or a device never came back from C code"
        ) from None
    except KeyboardInterrupt:
        for future in pending:
            if not future.cancel():  # it is under way, and ends with its slice
                with suppress(BrokenExecutor):
                    _gather(future.result(), kept, report, folder)
    finally:
        for corpus in kept.values():
            corpus.minimise()
    return report


def _slices(
    starts: list[Start], kept: dict[str, Corpus], seconds: float, seed: object, report: Report
) -> Iterator[Task]:
    """Deal out slices of work, one device after the other, until each has had its time."""
    rounds = max(1, round(seconds / SLICE_S))
    for n in range(rounds):
        for start in starts:
            yield Task(
                start,
                hostile=n % _HOSTILE == _HOSTILE - 1,
                seed=f"{seed} {start.device} {n}",
                seconds=min(SLICE_S, seconds),
                corpus=tuple(kept[start.device].reached),
                known=frozenset(why for why, case in report.finds.values() if case.device == start.device),
            )


def _gather(result: Result, kept: dict[str, Corpus], report: Report, folder: Path) -> None:
    report.executions[result.device] = report.executions.get(result.device, 0) + result.executions
    report.actions += result.actions
    report.seconds += result.seconds
    lines = report.lines.setdefault(result.device, set())
    for data, reached in result.reached.items():
        kept[result.device].add(data, reached)
        lines |= reached
    known = {why for why, case in report.finds.values() if case.device == result.device}
    for why, case in result.finds.items():
        if why not in known:
            report.finds[case.id] = why, case
            keep(folder, case, why)


class Corpus:
    """Inputs that reached something, one file each, named by what is in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.reached: dict[bytes, set[Line]] = {
            path.read_bytes()[:_MOST]: set() for path in sorted(folder.iterdir()) if path.is_file()
        }
        self._seen: set[Line] = set()

    def add(self, data: bytes, lines: Iterable[Line]) -> None:
        new = set(lines)
        if data in self.reached:
            self.reached[data] |= new
        elif new - self._seen:
            self.reached[data] = new
            self._path(data).write_bytes(data)
        self._seen |= new

    def minimise(self) -> None:
        """Give up those that reach nothing another does not: the ones that reach most stay."""
        seen: set[Line] = set()
        for data, lines in sorted(self.reached.items(), key=lambda item: (-len(item[1]), len(item[0]))):
            if lines and not lines - seen:
                self._path(data).unlink(missing_ok=True)
                del self.reached[data]
            seen |= lines

    def _path(self, data: bytes) -> Path:
        return self._folder / blake3.blake3(data).hexdigest()[:16]


FINDINGS = "findings"


def keep(folder: Path, case: Case, why: str) -> None:
    """A find, as three files: to be replayed, as a pytest file, as qtest text."""
    place = folder / FINDINGS
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{case.id}.json").write_text(json.dumps(case.to_json(), indent=1) + "\n")
    (place / f"test_{case.id}.py").write_text(as_pytest(case, why))
    (place / f"{case.id}.qtest").write_text(as_qtest(case, why))


def findings(folder: Path) -> Iterator[Case]:
    """Read the finds a folder holds."""
    for path in sorted((folder / FINDINGS).glob("*.json")):
        yield load(path)


def find(folder: Path, id: str) -> Path | None:
    """Find the file of a find by its id, or by the beginning of that."""
    found = [path for path in (folder / FINDINGS).glob("*.json") if path.stem.startswith(id)]
    return found[0] if len(found) == 1 else None


def load(path: Path) -> Case:
    """Read a find's case from its file. Raises RequestError when it holds none."""
    try:
        return Case.from_json(read_file(path).decode())
    except (UnicodeDecodeError, RequestError):
        raise RequestError(f"{path}: not a finding of `anyhyve fuzz`") from None
