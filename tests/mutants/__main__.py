"""Plants random faults, one at a time, and says which of them the tests of their own folder find.

    python -m tests.mutants [--count N] [--seed S] [--only PATTERN]... [--jobs N] [--seconds N] [--json]

A fault is found when a test fails or hangs. One that lives is shown: it needs a test, or an entry in equivalent.toml
that says why no test can see it. The exit status is 1 when fewer than `--least` percent of those tried were found.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutants.campaign import FOUND, KNOWN, LIVED, NOT_HERE, NOT_TRIED, Broken, Verdict, campaign
from tests.mutants.mutate import Mutant as Mutant
from tests.mutants.mutate import Site, Source, sample
from tests.mutants.suites import files
from vmm.cli import show

ROOT = Path(__file__).parent.parent.parent


def options() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=40, metavar="N", help="so many mutants (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16), metavar="S",
                        help="the same sample again, of the same files")  # fmt: skip
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN",
                        help="FILE or FILE::FUNCTION, as fnmatch has it: 'snapshot/*', '*::Uart.*'")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="at a time (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="N", help="begin none after that")
    parser.add_argument("--least", type=float, default=95.0, metavar="PERCENT", help="to be found (%(default)s)")
    parser.add_argument("--json", action="store_true", help="verdicts as JSON, a line each")
    return parser.parse_args()


def sites(patterns: list[str]) -> list[Site]:
    """Where to plant: in all that is measured, or where a pattern says."""
    patterns = [pattern if "::" in pattern else f"{pattern}::*" for pattern in patterns or ["*"]]
    chosen = [f for f in files(ROOT) if any(fnmatch(f, pattern.split("::")[0]) for pattern in patterns)]
    return [
        site
        for file in chosen
        for site in Source(ROOT, file).sites
        if any(fnmatch(site.where, pattern) for pattern in patterns)
    ]


def console() -> Console:
    """Standard error; it cuts no line."""
    return Console(stderr=True, soft_wrap=True)


def say(out: Console, verdict: Verdict) -> None:
    mutant = verdict.mutant
    out.print(f"[bold]{verdict.what}[/] {escape(f'{mutant.file}::{mutant.function} ({mutant.operator})')}")
    out.print(escape(f"  - {mutant.before}\n  + {mutant.after}"), highlight=False)


def sum_up(verdicts: list[Verdict]) -> None:
    """A table: a row a folder, and all of them."""
    kinds = FOUND, LIVED, KNOWN, NOT_HERE, NOT_TRIED
    rows: list[tuple[str, ...]] = []
    folders: dict[str, list[Verdict]] = {}
    for verdict in sorted(verdicts, key=lambda v: v.mutant.file):
        folders.setdefault(str(Path(verdict.mutant.file).parent), []).append(verdict)
    for name, some in [*folders.items(), ("all", verdicts)]:
        counts = Counter(verdict.what for verdict in some)
        tried = [v.seconds for v in some if v.what in (FOUND, LIVED)]
        mean = f"{sum(tried) / len(tried):.1f}" if tried else ""
        rows.append((name, *(str(counts[what]) for what in kinds), f"{percent(some):.1f}", mean))
    show.table(("", *kinds, "% found", "s a mutant"), rows, err=True)


def percent(verdicts: list[Verdict]) -> float:
    """How many of those that a test could see were found."""
    counts = Counter(verdict.what for verdict in verdicts)
    return 100 * counts[FOUND] / ((counts[FOUND] + counts[LIVED]) or 1) if counts[LIVED] else 100.0


def main() -> int:
    asked, out = options(), console()
    mutants = sample(sites(asked.only), asked.seed, asked.count)
    out.print(f"{len(mutants)} mutants, --seed {asked.seed}")
    verdicts: list[Verdict] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=out) as progress:
        task = progress.add_task("mutants", total=len(mutants))
        try:
            for verdict in campaign(ROOT, mutants, asked.jobs, asked.seconds):
                verdicts.append(verdict)
                progress.advance(task)
                if asked.json:
                    line = asdict(verdict)
                    del line["mutant"]["code"]
                    print(json.dumps(line), flush=True)
                if verdict.what == LIVED:
                    say(progress.console, verdict)
        except Broken as error:
            sys.exit(str(error))
    sum_up(verdicts)
    return int(percent(verdicts) < asked.least)


if __name__ == "__main__":
    sys.exit(main())
