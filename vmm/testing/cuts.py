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
from vmm.machine import Machine, Stopped

_CUTS = 20  # of one stretch of the run
_STRETCH = 200_000  # bytes of code

WAKE = """
import json, sys
from pathlib import Path
from vmm.machine import Machine
with Machine.restore(Path(sys.argv[1])) as machine:
    machine.run(position=int(sys.argv[2]))
    print(json.dumps(machine.digests()))
"""

REPRODUCER = '''"""Left by cut_anywhere: the machine saved at {cut} is not, at {first}, what the one never saved was.

First to differ: {fields}
"""

from pathlib import Path

from vmm.machine import Machine

HERE = Path(__file__).parent


def test_the_cut_leaves_no_trace():
    with Machine.restore(HERE / "{snapshot}") as woken:
        woken.run(position={first})
        assert woken.digests() == {digests}
'''


class Trace(AssertionError):
    """A cut left one."""

    def __init__(self, cut: int, first: int, fields: dict[str, tuple[Any, Any]], files: list[Path]) -> None:
        self.cut, self.first, self.fields, self.files = cut, first, fields, files
        shown = ", ".join(f"{name}: {old!r} became {new!r}" for name, (old, new) in list(fields.items())[:4])
        super().__init__(f"saved at {cut}, it first differs at {first}: {shown}; to see it again: {files[0]}")


@dataclass(frozen=True)
class Report:
    points: int
    wall_s: float


def cut_anywhere(
    boot: Callable[[], Machine], *, end: int, points: int, folder: Path, seed: object = 0, fresh: int = 50
) -> Report:
    """So many cuts at random instructions before position `end`, every `fresh`th woken in a new process. Raises
    Trace."""
    draw, began = random.Random(f"cuts {seed}"), time.monotonic()
    with boot() as machine:
        for stretch, start in enumerate(sorted(draw.randrange(end) for _ in range(-(-points // _CUTS)))):
            assert machine.run(position=start) == Stopped("position"), "the guest ends before `end`"
            machine.mark()
            stop = machine.position + _STRETCH
            cuts = [draw.randrange(machine.position, stop) for _ in range(min(_CUTS, points - stretch * _CUTS))]
            machine.run(position=stop)
            expected = machine.digests()
            for n, cut in enumerate(cuts, stretch * _CUTS + 1):
                machine.reset()
                machine.run(position=cut)
                file = folder / "cut.snapshot"
                machine.save(file)
                woken = _wake(file, stop, in_new_process=n % fresh == 0)
                machine.run(position=stop)
                if woken != expected or machine.digests() != expected:
                    raise _explain(machine, file, cut, stop, folder)
            machine.reset()
    return Report(points, time.monotonic() - began)


def _wake(file: Path, stop: int, in_new_process: bool) -> dict[str, Any]:
    if in_new_process:
        command = [sys.executable, "-c", WAKE, str(file), str(stop)]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return found
    with Machine.restore(file) as woken:
        woken.run(position=stop)
        return woken.digests()


def _explain(machine: Machine, file: Path, cut: int, stop: int, folder: Path) -> Trace:
    """The first position at which the woken machine is not what the marked one was, by halving."""

    def at(position: int) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
        machine.reset()
        machine.run(position=position)
        with Machine.restore(file) as woken:
            woken.run(position=position)
            return machine.digests(), _apart(machine, woken)

    low, high = cut - 1, stop
    while high - low > 1:
        middle = (low + high) // 2
        if at(middle)[1]:
            high = middle
        else:
            low = middle
    digests, fields = at(high)
    if not fields:  # the woken one is right: it is the saved one that the save changed
        fields = {"the machine that was saved": ("as if never saved", "changed")}
    first = machine.position
    machine.save(folder / "expected.snapshot")
    test = folder / f"test_cut_{cut}.py"
    test.write_text(
        REPRODUCER.format(cut=cut, first=first, fields=", ".join(fields), snapshot=file.name, digests=digests)
    )
    return Trace(cut, first, fields, [test, file, folder / "expected.snapshot"])


def _apart(ours: Machine, theirs: Machine) -> dict[str, tuple[Any, Any]]:
    """What differs between two machines: fields by name, and the first bytes of RAM."""
    found: dict[str, tuple[Any, Any]] = {}
    others = theirs.parts()
    for part, state in ours.parts().items():
        if state != others[part]:
            mine, other = encode(state), encode(others[part])
            found |= {f"{part}.{name}": (mine[name], other[name]) for name in mine if mine[name] != other[name]}
    for region, other_region in zip(ours.ram.regions, theirs.ram.regions, strict=True):
        if region.view != other_region.view:
            at = next(i for i in range(0, region.size, 8) if region.view[i : i + 8] != other_region.view[i : i + 8])
            place = slice(at, at + 8)
            found[f"{region.name}+{at:#x}"] = bytes(region.view[place]).hex(), bytes(other_region.view[place]).hex()
    return found
