"""Which property finds it, when a field is forgotten? Every field of every device's and the CPU's state is dropped from
what a save holds, one at a time; docs/scoreboard.md is the table this makes.

    python -m tests.scoreboard > docs/scoreboard.md

A device's field is looked for by vmm.testing's state machine, but without comparing states: only by what a guest or the
outside can see (answers, lines, acts). What it cannot see so is found by the comparison of states, and named as such.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from tests import acting
from tests.fields import forget, paths
from tests.vmm.cpu.program import Program
from tests.vmm.cpu.test_state import STATES
from vmm.cpu.protocol import CpuState, EventState, SegmentState
from vmm.testing import Subject, device_machine
from vmm.testing.subject import chips

EXAMPLES = 150
HOW = settings(
    max_examples=EXAMPLES, stateful_step_count=40, phases=[Phase.generate], report_multiple_bugs=False, deadline=None,
    database=None, derandomize=True,
)  # fmt: skip


MISSED = "NOT CAUGHT"
# What a running program cannot have in all combinations, but a register can hold.
SEGMENT = st.builds(
    SegmentState, selector=st.integers(0, 0xFFFF), base=st.integers(0, (1 << 47) - 1), limit=st.integers(0, 0xFFFFFFFF),
    type=st.integers(0, 15), s=st.booleans(), dpl=st.integers(0, 3), present=st.booleans(), avl=st.booleans(),
    long=st.booleans(), db=st.booleans(), granular=st.booleans(),
)  # fmt: skip
HIDDEN = st.fixed_dictionaries(
    {
        **dict.fromkeys(("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"), SEGMENT),
        "event": st.none() | st.builds(EventState, kind=st.just("interrupt"), vector=st.integers(32, 255)),
    }
)


def possible(state: CpuState) -> CpuState:
    """As loading marks it: a task busy, a segment accessed; and what has no meaning in the mode is not there."""
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"):
        segment = getattr(state, name)
        marks = 2 if name == "tr" else segment.s and segment.present
        setattr(state, name, dataclasses.replace(segment, type=segment.type | marks))
    if state.cs.long:
        state.cs.db = False
    else:
        state.rip &= 0xFFFFFFFF
    return state


@dataclasses.dataclass
class Row:
    part: str
    field: str
    caught: str
    seconds: float


# Of a chip that is on a board more than once, one.
SUBJECTS = {slot.device.__name__: Subject.named(slot.id) for slot in reversed(chips().values())}


def seen(machine: type[Any], examples: int = EXAMPLES) -> str | None:
    """What the state machine says of it, in its own words."""
    try:
        run_state_machine_as_test(machine, settings=settings(HOW, max_examples=examples))
    except Exception as error:
        return str(error).splitlines()[0]
    return None


def devices() -> Iterator[Row]:
    for name, subject in sorted(SUBJECTS.items()):
        state = subject.device.State
        for path in paths(state):
            began, spoil = time.monotonic(), forget(state, path)
            caught = seen(device_machine(subject, spoil=spoil, same_state=False))
            if caught is None:
                caught = seen(device_machine(subject, spoil=spoil))
            what = MISSED if caught is None else "the twin answers otherwise" if " answers " in caught else caught
            yield Row(name, ".".join(path), what, time.monotonic() - began)


def cpu() -> Iterator[Row]:
    """By the identity of load and save, over random states."""
    with Program("pause; jmp done", "emu").pause().machine as machine:
        base = machine.cpu.save()

        def identity(spoil: Callable[[Any], Any]) -> str:
            @settings(max_examples=EXAMPLES, phases=[Phase.generate], database=None, deadline=None, derandomize=True)
            @given(STATES, HIDDEN)
            def holds(fields: dict[str, Any], hidden: dict[str, Any]) -> None:
                wanted = possible(dataclasses.replace(base, **{**fields, **hidden}))
                machine.cpu.load(spoil(wanted))
                assert machine.cpu.save() == wanted, "what is saved is not what was loaded"

            try:
                holds()
            except AssertionError as error:
                return str(error).splitlines()[0]
            return MISSED

        assert identity(lambda state: state) == MISSED, "the property itself is wrong"
        for path in paths(type(base)):
            began = time.monotonic()
            yield Row("CPU", ".".join(path), identity(forget(type(base), path)), time.monotonic() - began)
        machine.cpu.load(base)


def fields() -> int:
    """Print the table of fields. Returns how many were missed."""
    rows = []
    for row in chain(devices(), cpu()):
        rows.append(row)
        print(f"{row.part}.{row.field}: {row.caught}, {row.seconds:.2f} s", file=sys.stderr, flush=True)
    print("| state | field | found by | seconds |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.part} | {row.field} | {row.caught} | {row.seconds:.2f} |")
    missed = sum(row.caught == MISSED for row in rows)
    print(f"\n{len(rows) - missed} of {len(rows)} fields are found. No field is derived from others.\n")
    return missed


def bugs() -> int:
    """Print the table of bugs. Returns how many were missed."""
    from tests import known_bugs

    print("## Bugs that others had\n\n| bug | whose | property | found by | seconds |\n|---|---|---|---|---|")
    missed = 0
    for bug in known_bugs.BUGS:
        began = time.monotonic()
        found = known_bugs.find(bug)
        missed += found is None
        name = bug.property.__name__.replace("_", " ")
        print(f"| {bug.what} | {bug.whose} | {name} | {found or MISSED} | {time.monotonic() - began:.2f} |", flush=True)
    print(f"\n{known_bugs.ABSENT}")
    return missed


HEAD = """# Scoreboard

Made by `python -m tests.scoreboard`: each field is left out of what is saved, and wakes as in a fresh machine. Which
property finds it, within how many seconds:
"""


def main() -> int:
    print(HEAD)
    return fields() + acting.table() + bugs()


if __name__ == "__main__":
    sys.exit(main() > 0)
