"""Which engine finds bugs in devices sooner: ours (lines reached, inputs kept and changed), it without its corpus,
Hypothesis' targeting (of the lines an input reaches), Atheris (libFuzzer, coverage of the device's bytecode)?

The bugs are planted, from one any access meets to ones behind a sequence of commands. Each run is a process of its own;
the time is that to the first failure, start-up left out. `python -m bench.fuzz_engines [--seeds N] [--limit SECONDS]`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import track

from snapshot.schema import encode
from vmm.cli import show
from vmm.testing import draw, fuzz
from vmm.testing.case import Case
from vmm.testing.subject import Subject

# part: class, method, and what of the state (s) and the value written (v) must hold for it to fail
BUGS = {
    "index at the end": ("rtc", "read_data", "s.index == 0x7F"),
    "FIFO full at trigger 14": ("com1", "read_data", "s.fifo and s.trigger == 3 and len(s.received) == 16"),
    "overrun in loopback": ("com1", "read_lsr", "s.overrun and s.mcr & 0x10"),
    "poll in special mask mode": ("pic0", "read_command", "s.poll and s.special_mask"),
    "rotation on AEOI": ("pic1", "acknowledge", "s.rotate_on_auto_eoi and s.auto_eoi and s.lowest == 3"),
    "BCD in mode 3, latched": ("pit", "write_control", "any(c.bcd and c.mode == 3 and c.latch for c in s.counters)"),
    "binary 12-hour calendar": ("rtc", "read_data", "s.index == 4 and s.ram[11] & 6 == 4 and s.ram[4] & 0x80"),
    "password's end": ("i8042", "write_data", "s.awaiting == 0xA5 and v == 0"),
    "wheel mouse, remote": ("i8042", "write_data", "s.mouse.id == 3 and s.mouse.remote"),
    "scan set 3, translated": ("i8042", "read_data", "s.keyboard.scan_set == 3 and s.command_byte & 0x40"),
}
ENGINES = ("ours", "random", "hypothesis", "atheris")


def plant(bug: str) -> Subject:
    """The device, failing where the bug says."""
    part, method, when = BUGS[bug]
    subject = Subject.named(part)
    right = getattr(subject.device, method)
    condition = compile(when, bug, "eval")

    def wrong(self: Any, *values: int) -> Any:
        if eval(condition, {"s": self.state, "v": values[-1] if values else None}):
            raise AssertionError("planted")
        return right(self, *values)

    wrong.__dict__.update(right.__dict__)
    setattr(subject.device, method, wrong)
    return subject


def fails(case: Case) -> bool:
    return "planted" in (case.failure(bounded=False) or "")


def ours(subject: Subject, start: fuzz.Start, seed: int, limit: float) -> None:
    corpus: tuple[bytes, ...] = ()
    for n in itertools.count():
        task = fuzz.Task(start, False, f"{seed} {n}", fuzz.SLICE_S, corpus, frozenset())
        result = fuzz.explore(task, stop_at_find=True)
        if result.finds:
            return
        corpus = (*corpus, *(data for data in result.reached if data not in corpus))


def without_corpus(subject: Subject, start: fuzz.Start, seed: int, limit: float) -> None:
    draws = random.Random(seed)
    while not fails(draw.case(subject, start.golden, start.now, draws.randbytes(draws.choice((16, 64, 200, 400))))):
        pass


def hypothesis(subject: Subject, start: fuzz.Start, seed: int, limit: float) -> None:
    from hypothesis import Phase, given, settings, target
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    class Found(Exception):
        pass

    for n in itertools.count():

        @seeded(seed * 1000 + n)
        @settings(max_examples=2000, deadline=None, database=None, phases=(Phase.generate, Phase.target))
        @given(st.binary(max_size=400))
        def run(data: bytes) -> None:
            coverage = fuzz._Coverage(subject)
            with coverage:
                failed = fails(draw.case(subject, start.golden, start.now, data))
            if failed:
                raise Found
            target(float(len(coverage.take())))

        try:
            run()
        except Found:
            return


def atheris(subject: Subject, start: fuzz.Start, seed: int, limit: float) -> None:
    import atheris as engine

    for module in subject.modules:
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                for name, member in list(vars(cls).items()):
                    if hasattr(member, "__code__"):
                        kept = dict(member.__dict__)
                        changed = engine.instrument_func(member)
                        changed.__dict__.update(kept)
                        setattr(cls, name, changed)
    began = time.monotonic()

    def one(data: bytes) -> None:
        if fails(draw.case(subject, start.golden, start.now, data)):
            print(f"\nfound {time.monotonic() - began:.3f}", flush=True)
            os._exit(0)

    keep = f"-artifact_prefix={tempfile.gettempdir()}/"  # else what fails is left in the current folder
    engine.Setup([sys.argv[0], f"-seed={seed + 1}", "-max_len=400", f"-max_total_time={int(limit)}", keep], one)
    engine.Fuzz()


RUN: dict[str, Callable[[Subject, fuzz.Start, int, float], None]] = {
    "ours": ours, "random": without_corpus, "hypothesis": hypothesis, "atheris": atheris,
}  # fmt: skip


def one_run(engine: str, bug: str, seed: int, limit: float) -> float | None:
    """Seconds to the find, None when the limit came first."""
    command = [sys.executable, "-m", "bench.fuzz_engines", "--one", engine, bug, str(seed), "--limit", str(limit)]
    with tempfile.TemporaryFile("w+") as out:
        try:
            subprocess.run(command, stdout=out, stderr=subprocess.DEVNULL, timeout=limit + 3)
        except subprocess.TimeoutExpired:
            return None
        out.seek(0)
        found = re.search(r"^found (.*)$", out.read(), re.M)
    return None if found is None or float(found[1]) > limit else float(found[1])


def runs(seeds: int, limit: float) -> Iterator[tuple[str, str, float | None]]:
    todo = [(bug, seed, engine) for bug in BUGS for seed in range(seeds) for engine in ENGINES]
    for bug, seed, engine in track(todo, console=Console(stderr=True), disable=not sys.stderr.isatty()):
        yield bug, engine, one_run(engine, bug, seed, limit)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20.0)
    parser.add_argument("--one", nargs=3)
    options = parser.parse_args()
    if options.one:
        engine, bug, seed = options.one
        subject = plant(bug)
        start = fuzz.Start(subject.name, encode(subject.device.State()), 0)
        began = time.monotonic()
        RUN[engine](subject, start, int(seed), options.limit)
        print(f"found {time.monotonic() - began:.3f}")
        return
    found: dict[tuple[str, str], list[float | None]] = {}
    for bug, engine, seconds in runs(options.seeds, options.limit):
        found.setdefault((bug, engine), []).append(seconds)
    rows = []
    for bug in BUGS:
        medians = [statistics.median(options.limit if s is None else s for s in found[bug, e]) for e in ENGINES]
        rows.append((bug, *(f"{m:.2f}" if m < options.limit else "-" for m in medians)))
    sums = [sum(options.limit if s is None else s for b in BUGS for s in found[b, e]) for e in ENGINES]
    finds = [sum(s is not None for b in BUGS for s in found[b, e]) for e in ENGINES]
    rows.append(("all runs: found, seconds", *(f"{n}, {s:.0f}" for n, s in zip(finds, sums, strict=True))))
    title = f"seconds to the find, median of {options.seeds}; limit {options.limit:g} s"
    show.table(("bug", *ENGINES), rows, title=title)


if __name__ == "__main__":
    main()
