"""Cuts: a run that is saved and woken anywhere equals the run that never was.

    cut_anywhere(boot, end=6_000_000, points=1000, folder=tmp_path)

Each cut is made three times over: the run as it is; rolled back, saved at the cut and woken, in this process or in a
new one; and the machine that was saved, which runs on. What differs first is named, down to the instruction after which
it does, and a test is left that shows it again.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapshot.schema import encode
from vmm.machine.machine import Machine
from vmm.machine.moment import Moment
from vmm.machine.stop import StopReason

_CUTS = 20  # of one stretch of the run
_STRETCH = 200_000  # bytes of code

WAKE = """
import json, sys
from pathlib import Path
from vmm.testing.cuts import wake
print(json.dumps(wake(Path(sys.argv[1]), int(sys.argv[2]))))
"""

REPRODUCER = '''"""Left by cut_anywhere: saved at {cut}, {what} is not at {first} what the one never saved was.

First to differ: {fields}
"""

from pathlib import Path

from vmm.testing import cuts

HERE = Path(__file__).parent


def test_the_cut_leaves_no_trace(tmp_path):
    assert cuts.{again} == {right!r}
'''

Outcome = dict[str, Any]  # why it stopped, digests by part's name, and what was written to the console
_REACHED = str(StopReason.POSITION)


class Trace(AssertionError):
    """A cut left one: in `what`, first seen at position `first`, in these fields (expected, found)."""

    def __init__(self, what: str, cut: int, first: int, fields: dict[str, tuple[Any, Any]], files: list[Path]) -> None:
        self.what, self.cut, self.first, self.fields, self.files = what, cut, first, fields, files
        shown = ", ".join(f"{name}: {old!r} became {new!r}" for name, (old, new) in list(fields.items())[:4])
        super().__init__(f"saved at {cut}, {what} first differs at {first}: {shown}; to see it again: {files[0]}")


@dataclass(frozen=True)
class Report:
    points: int
    wall_s: float


def cut_anywhere(
    boot: Callable[[], Machine], *, end: int, points: int, folder: Path, seed: object = 0, fresh: int = 50
) -> Report:
    """So many cuts at random instructions before position `end`, every `fresh`th woken in a new process. Raises
    Trace; AssertionError for a guest that ends before `end`."""
    draw, began = random.Random(f"cuts {seed}"), time.monotonic()
    with boot() as machine:
        for stretch, start in enumerate(sorted(draw.randrange(end) for _ in range(-(-points // _CUTS)))):
            _run_to(machine, start)
            begin = machine.moment()
            first = machine.position
            stop = max(first + 1, min(first + _STRETCH, end))
            right = _Cut(machine, begin, folder, first).never_saved(stop)
            for n in range(stretch * _CUTS + 1, min(stretch * _CUTS + _CUTS, points) + 1):
                cut = _Cut(machine, begin, folder, draw.randrange(first, stop))
                cut.check(stop, right, in_new_process=n % fresh == 0)
            machine.rewind(begin)
    return Report(points, time.monotonic() - began)


def wake(file: Path, at: int, written: str = "") -> Outcome:
    """Wake a machine and run to a position. `written` is what the console had shown before."""
    with Machine.restore(file) as woken:
        found = _outcome(woken, at, 0)
    return {**found, "console": written + found["console"]}


def wake_in_new_process(file: Path, at: int, written: str = "") -> Outcome:
    command = [sys.executable, "-c", WAKE, str(file), str(at)]
    found: Outcome = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {**found, "console": written + found["console"]}


def save_and_run_on(start: Path, cut: int, at: int, file: Path) -> Outcome:
    """Wake a machine, save it at `cut`, and run on."""
    with Machine.restore(start) as machine:
        _run_to(machine, cut)
        machine.save(file)
        return _outcome(machine, at, 0)


@dataclass
class _Cut:
    """One, of a machine and a moment of it: what it is at later positions, in each of the ways that must be equal."""

    machine: Machine
    moment: Moment
    folder: Path
    cut: int
    written: str = ""  # to the console, from the moment to the cut

    @property
    def file(self) -> Path:
        return self.folder / "cut.snapshot"

    def check(self, stop: int, right: Outcome, *, in_new_process: bool) -> None:
        """Raises Trace."""
        on = self.saved(stop)
        way = self.woken_in_new_process if in_new_process else self.woken
        if way(stop) != right:
            what = "the machine that was woken" + " in a new process" * in_new_process
            first, wrong, expected = self.bisect(way, stop)
            with Machine.restore(self.file) as woken:
                woken.run(position=first)
                fields = _apart(self.machine, woken) or _unlike(expected, wrong)
            function = "wake_in_new_process" if in_new_process else "wake"
            again = f"{function}(HERE / {self.file.name!r}, {first}, {self.written!r})"
            raise self.trace(what, first, fields, expected, again, self.file)
        if on != right:
            what, start = "the machine that was saved", self.folder / "start.snapshot"
            self.machine.rewind(self.moment)
            self.machine.save(start)
            first, wrong, expected = self.bisect(self.saved, stop)
            with Machine.restore(start) as never:
                never.run(position=first)
                self.saved(first)
                fields = _apart(never, self.machine) or _unlike(expected, wrong)
            again = f"save_and_run_on(HERE / {start.name!r}, {self.cut}, {first}, tmp_path / {self.file.name!r})"
            raise self.trace(what, first, fields, expected, again, start)

    def never_saved(self, at: int) -> Outcome:
        self.machine.rewind(self.moment)
        found = _outcome(self.machine, at, self.machine.board.console.total)
        assert found["stop"] == _REACHED, f"the guest ends before {at}: {found['stop']}"
        return found

    def saved(self, at: int) -> Outcome:
        """It runs on after it was saved to the file."""
        self.machine.rewind(self.moment)
        since = self.machine.board.console.total
        _run_to(self.machine, self.cut)
        self.written = _written(self.machine, since)
        self.machine.save(self.file)
        return _outcome(self.machine, at, since)

    def woken(self, at: int) -> Outcome:
        return wake(self.file, at, self.written)

    def woken_in_new_process(self, at: int) -> Outcome:
        return wake_in_new_process(self.file, at, self.written)

    def bisect(self, way: Callable[[int], Outcome], stop: int) -> tuple[int, Outcome, Outcome]:
        """The first position at which it is not what the one never saved is, by halving; and what both are there. The
        machine is then the one never saved."""
        low, high = self.cut - 1, stop
        while high - low > 1:
            middle = (low + high) // 2
            if way(middle) != self.never_saved(middle):
                high = middle
            else:
                low = middle
        wrong, right = way(high), self.never_saved(high)
        return self.machine.position, wrong, right

    def trace(
        self, what: str, first: int, fields: dict[str, tuple[Any, Any]], right: Outcome, again: str, file: Path
    ) -> Trace:
        """With a test of it left."""
        self.never_saved(first)
        self.machine.save(self.folder / "expected.snapshot")
        test = self.folder / f"test_cut_{self.cut}.py"
        named = ", ".join(fields)
        test.write_text(REPRODUCER.format(cut=self.cut, what=what, first=first, fields=named, again=again, right=right))
        return Trace(what, self.cut, first, fields, [test, file, self.folder / "expected.snapshot"])


def _run_to(machine: Machine, position: int) -> None:
    stop = machine.run(position=position)
    assert str(stop) == _REACHED, f"the guest ends before {position}: {stop}"


def _outcome(machine: Machine, at: int, since: int) -> Outcome:
    """At a position. The console's output from `since` on counts."""
    stop = machine.run(position=at)
    return {"stop": str(stop), **machine.digests(), "console": _written(machine, since)}


def _written(machine: Machine, since: int) -> str:
    """Byte for byte: a cut may lie within a character."""
    return machine.board.console.read(since)[1].decode("latin-1")


def _apart(ours: Machine, theirs: Machine) -> dict[str, tuple[Any, Any]]:
    """What differs between two machines: fields by name, and the first bytes of RAM."""
    found: dict[str, tuple[Any, Any]] = {}
    others = theirs.states()
    for part, state in ours.states().items():
        if state != others[part]:
            mine, other = encode(state), encode(others[part])
            found |= {f"{part}.{name}": (mine[name], other[name]) for name in mine if mine[name] != other[name]}
    for region, other_region in zip(ours.ram.regions, theirs.ram.regions, strict=True):
        if region.view != other_region.view:
            at = next(i for i in range(0, region.size, 8) if region.view[i : i + 8] != other_region.view[i : i + 8])
            place = slice(at, at + 8)
            found[f"{region.name}+{at:#x}"] = bytes(region.view[place]).hex(), bytes(other_region.view[place]).hex()
    return found


def _unlike(right: Outcome, wrong: Outcome) -> dict[str, tuple[Any, Any]]:
    """By part, where no live machine is there to look into."""
    flat = [{**outcome, **outcome["devices"]} for outcome in (right, wrong)]
    return {
        name: (flat[0][name], flat[1][name]) for name in flat[0] if name != "devices" and flat[0][name] != flat[1][name]
    }
