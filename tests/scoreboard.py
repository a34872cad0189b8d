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
from contextlib import closing
from itertools import chain
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from snapshot import field_types as types
from snapshot import schema
from tests.vmm.cpu import random_guests
from tests.vmm.cpu.campaign import Bench
from tests.vmm.cpu.program import Program
from tests.vmm.cpu.test_state import STATES
from vmm.board.isapc import CHIPS
from vmm.cpu import validity
from vmm.cpu.protocol import CpuState, EventState, SegmentState
from vmm.machine.stop import Stopped, StopReason
from vmm.testing import Subject, device_machine

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


def paths(cls: type, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field, those of nested states one by one."""
    for field in schema.schema_of(cls).fields:
        match field.type:
            case schema.StructType(inner) | types.ListType(schema.StructType(inner)):
                yield from paths(inner, (*before, field.name))
            case _:
                yield (*before, field.name)


def forget(cls: type, path: tuple[str, ...]) -> Callable[[Any], Any]:
    """Set the field to what a fresh device has there."""

    def spoil(state: Any) -> Any:
        return _put(state, path, cls())

    return spoil


def _put(state: Any, path: tuple[str, ...], fresh: Any) -> Any:
    name, *rest = path
    mine, default = getattr(state, name), getattr(fresh, name)
    if rest and isinstance(mine, tuple):
        default = tuple(_put(item, tuple(rest), like) for item, like in zip(mine, default, strict=True))
    elif rest:
        default = _put(mine, tuple(rest), default)
    return dataclasses.replace(state, **{name: default})


# Of a chip that is on the board more than once, one.
SUBJECTS = {slot.device.__name__: Subject.named(slot.id) for slot in reversed(CHIPS)}


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


GUESTS = 200  # at most, for a field


def acting() -> Iterator[Row]:
    """Beside a machine that was never saved runs one whose CPU was loaded without the field: what else comes to differ?
    Random guests (tests.vmm.cpu.random_guests), a thousand bytes of code."""
    with closing(Bench()) as never, closing(Bench()) as woken:
        for path in paths(CpuState):
            began = time.monotonic()
            found = next(
                (seen for seed in range(GUESTS) if (seen := acts(never, woken, path, seed))), "nothing but itself"
            )
            yield Row("CPU", ".".join(path), found, time.monotonic() - began)


def acts(never: Bench, woken: Bench, path: tuple[str, ...], seed: int) -> str | None:
    guest = random_guests.draw(seed, spoil=0)
    machine = never.put(guest)
    begin, end = machine.position + 100 + seed % 400, machine.position + 1500
    if machine.run(position=begin) != Stopped(StopReason.POSITION) or machine.clock.prepaid:
        return None
    at = machine.cpus[0].save()
    forgotten = forget(CpuState, path)(at)
    if forgotten == at or validity.refusal(forgotten) is not None:
        return None
    other = woken.put(guest)
    other.run(position=begin)
    other.cpus[0].load(forgotten)
    stops = machine.run(position=end), other.run(position=end)
    if stops[0] != stops[1]:
        return "another end of the run"
    if (machine.position, machine.clock.now_ns()) != (other.position, other.clock.now_ns()):
        return "another path through the code"
    if machine.ram.slice(0, random_guests.SIZE) != other.ram.slice(0, random_guests.SIZE):
        return "other memory"
    ours, theirs = (forget(CpuState, path)(each.cpus[0].save()) for each in (machine, other))
    return None if ours == theirs else "other registers"


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


ACTING = """## What acts

A field that is saved and loaded can still do nothing. Each field of the CPU is left out of what is *loaded*, once a
random guest has come to have something in it; what is seen beside the field itself, and after how long:
"""


def acting_fields() -> int:
    """Print the table of what acts."""
    print(f"{ACTING}\n| field | seen by | seconds |\n|---|---|---|")
    for row in acting():
        print(f"| {row.field} | {row.caught} | {row.seconds:.2f} |", flush=True)
    print()
    return 0


def main() -> int:
    print(HEAD)
    return fields() + acting_fields() + bugs()


if __name__ == "__main__":
    sys.exit(main() > 0)
