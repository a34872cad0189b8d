"""`anyhyve fuzz`: what devices do in any state and at any access."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from snapshot.chain import Chain
from snapshot.reader import decode_part
from snapshot.schema import encode
from vmm.board.config import MachineConfig
from vmm.cli import show
from vmm.cli.options import FILE, FOLDER, json_option
from vmm.clock import ClockState, GuestClock
from vmm.errors import BackendError
from vmm.saving.parts import with_state

FINDS = Path("anyhyve-fuzz")

finds_option = click.option(
    "--in", "folder", type=FOLDER, default=FINDS, show_default=True, help="The folder of the corpus and the finds."
)


@click.command()
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE...|all")
@click.option("--from", "snapshot", type=FILE, help="Begin with the states in this snapshot "
              "(else with those after power-on).")  # fmt: skip
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1),
    default=60.0,
    show_default=True,
    help="How long each device is worked on, by all processes together.",
)
@click.option("--jobs", type=click.IntRange(1, 1024), help="Processes (default: one for each CPU).")
@click.option("--dask", "scheduler", help="Address of a Dask scheduler, whose workers do it.")
@finds_option
@click.option("--seed", default="0", help="A text; with another one other cases are drawn.")
@json_option
def fuzz(
    devices: tuple[str, ...],
    snapshot: Path | None,
    seconds: float,
    jobs: int | None,
    scheduler: str | None,
    folder: Path,
    seed: str,
    as_json: bool,
) -> None:
    """Fuzz devices: parts of the board (com1, rtc, ...; all), kinds (`anyhyve devices`), or Device classes of yours as
    MODULE:CLASS.

    Fields of a device's saved state are changed, and whatever a guest can do is done to it. Each find is made as small
    as it gets, and kept as a case to replay, a pytest file and qtest text. Exit status 1 when there are finds. Ctrl-C
    ends it early, and leaves what it has."""
    try:
        from vmm.testing import fuzz as engine
    except ImportError as error:
        raise BackendError(f"{error.name} is not installed: pip install 'anyhyve[test]'") from None
    sys.path.insert(0, os.getcwd())  # for MODULE:CLASS
    starts = _starts(devices, snapshot)
    try:
        with _workers(scheduler, jobs) as (executor, count), _progress(as_json) as progress:
            report = engine.campaign(
                starts, executor, jobs=count, seconds=seconds, folder=folder, seed=seed, progress=progress
            )
    except OSError as error:
        raise BackendError(f"{error.filename or folder}: {error.strerror}") from None
    where = "" if folder == FINDS else f" --in {folder}"
    if as_json:
        finds = [{"id": i, "device": case.device, "cause": why} for i, (why, case) in report.finds.items()]
        show.as_json({
            "executions": report.executions, "actions": report.actions, "per_second": round(report.per_second, 1),
            "lines": {name: len(lines) for name, lines in report.lines.items()}, "finds": finds,
            "fixed": report.fixed, "stale": report.stale,
        })  # fmt: skip
    else:
        show.line(f"{_said(report)} of {len(starts)} devices")
        for i in report.fixed:
            show.line(f"{i} fails no more")
        for i, why in report.stale.items():
            show.line(f"{i} cannot be played: {why}")
        for i, (why, case) in report.finds.items():
            show.line(f"{case.device}: {why}")
            show.line(f"  anyhyve replay {i}{where}")
        if any(re.search(r"\bN\b", why) for why, _ in report.finds.values()):
            show.line("N stands for a number, which `replay` tells.")
    sys.exit(1 if report.finds else 0)


def _starts(names: Sequence[str], snapshot: Path | None) -> list[Any]:
    """Where each device begins: its state in the snapshot, found by its part's name, for somebody's class by the
    state's; else its state after power-on. "all" are those of the boards, and of each CPU in the snapshot. Raises
    RequestError, BackendError, SnapshotError."""
    from vmm.testing.fuzz import Start
    from vmm.testing.subject import MOST, Subject, chips

    parts, now = {}, 0
    if snapshot is not None:
        with Chain(snapshot) as chain:
            parts = dict(chain.parts)
            clock = GuestClock(MachineConfig().tsc_khz)
            clock.load(decode_part(next(with_state(parts, ClockState)), ClockState))
            now = clock.now_ns()
    if tuple(names) == ("all",):
        names = [*chips(), *(name for name in parts if name in chips(MOST))]
    starts = []
    for subject in (Subject.named(name) for name in dict.fromkeys(names)):
        wanted = subject.device.State
        part = parts.get(subject.name) or next(with_state(parts, wanted), None)
        state = wanted() if part is None else decode_part(part, wanted)
        starts.append(Start(subject.name, encode(state), now))
    return starts


@contextmanager
def _workers(scheduler: str | None, jobs: int | None) -> Iterator[tuple[Executor, int]]:
    """Context manager: gives what runs the work, processes here or somebody's Dask, and how many. Raises
    BackendError."""
    if scheduler is None:
        count = jobs or os.cpu_count() or 1
        with ProcessPoolExecutor(count, initializer=_leave_interrupts) as pool:
            yield pool, count
        return
    try:
        from distributed import Client
    except ImportError:
        raise BackendError("Dask is not installed: pip install 'anyhyve[dask]'") from None
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise BackendError(f"no Dask scheduler at {scheduler}: {error}") from None
    with client:
        yield client.get_executor(), jobs or max(1, sum(client.nthreads().values()))


def _leave_interrupts() -> None:
    """Ignore Ctrl-C, which is for the process that gathers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    with show.progress(None, quiet=quiet) as progress:
        yield lambda report: progress(f"{_said(report)}, {len(report.finds)} finds")


def _said(report: Any) -> str:
    cases, rate = sum(report.executions.values()), report.per_second
    return f"{cases:,} cases, {report.actions:,} actions, {rate:,.0f} cases/s and process, {report.covered} lines"
