"""The properties every device owes, from its declarations alone.

A Hypothesis state machine does to a device whatever can be done to it: reads and writes of its registers and of what is
none, in every width; time, to its deadlines and past them; what comes from outside (methods marked @outside); and at
any point it saves the device and wakes a twin, which from then on gets the same. What must hold all the while stands in
vmm/testing/twins.py.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snapshot import schema, versions
from snapshot.errors import SnapshotError
from vmm.board.slot import At
from vmm.device import Device
from vmm.qtest.board import Command
from vmm.testing.actions import Action, Call, Wake
from vmm.testing.case import Case, smallest
from vmm.testing.rig import Build
from vmm.testing.strategies import WAITS, accesses, calls, states
from vmm.testing.subject import BANK, Subject
from vmm.testing.twins import Twins

_BETWEEN = {
    *(f"vmm.testing.{name}" for name in ("case", "devices", "rig", "subject", "twins", "watched")),
    "vmm.board.declared",
    "vmm.bus",
    "vmm.wires",
}
Tested = type[Device[Any]] | Build | Subject


def check_device(device: Tested, *, examples: int | None = None, steps: int = 40) -> None:
    """Run the properties, on as many examples as Hypothesis' profile says. Raises what the device raised, or
    AssertionError for what does not hold, the shortest way there in its note; TypeError for what is declared wrongly.
    Its traceback is of the device's code."""
    try:
        _check(device, examples, steps)
    except Exception as error:
        error.__traceback__ = _theirs(error)
        raise


def _theirs(error: Exception) -> TracebackType | None:
    """An error's traceback without what is between the test and the device."""
    found = None
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] != "hypothesis" and module not in _BETWEEN:
            found = TracebackType(found, frame, frame.f_lasti, line)
    return found


def _check(device: Tested, examples: int | None, steps: int) -> None:
    subject = device if isinstance(device, Subject) else Subject.of(device)
    _check_upgrades(subject.device.State, examples)
    machine: Any = device_machine(subject)
    # A way that is found is made short by us, as a case: steps of a state machine shrink a hundred times slower.
    how = settings(
        max_examples=examples or settings().max_examples, stateful_step_count=steps, phases=(Phase.generate,),
        deadline=None, database=None, report_multiple_bugs=False,
    )  # fmt: skip
    try:
        run_state_machine_as_test(machine, settings=how)
        return
    except Exception as error:
        found = error
    case: Case | None = machine.played
    if case is None or (why := case.failure(subject=subject)) is None:
        raise found
    lines, shown = smallest(case, why, subject=subject).told(subject=subject)
    if shown is None:
        raise found
    shown.add_note("\n".join(("The shortest way there:", *lines)))
    raise shown


def _check_upgrades(state: type[Any], examples: int | None) -> None:
    """Whatever an older version of the state held comes to be one of this version."""
    newest = schema.schema_of(state)
    versions_of = {v: cls for (name, v), cls in schema.declared().items() if name == newest.name}
    older = {version: cls for version, cls in versions_of.items() if version < newest.version}
    if newest.version > 1 and not older:
        raise TypeError(
            f"{newest.name} version {newest.version}: older versions are not declared: no snapshot of them would load"
        )
    how = settings(max_examples=examples or settings().max_examples, deadline=None, database=None)

    def upgrades(value: Any) -> None:
        version = schema.schema_of(type(value)).version
        try:
            versions.decode(newest.name, version, schema.encode(value), state)
        except SnapshotError as error:
            raise AssertionError(f"a state of version {version} is not upgraded: {error}") from None

    for cls in older.values():
        how(given(states(cls))(upgrades))()


def device_machine(
    device: Tested,
    *,
    spoil: Callable[[Any], Any] = lambda state: state,
    same_state: bool = True,
) -> type[RuleBasedStateMachine]:
    """The state machine of a device: of a class whose constructor says what its wires are, or of a function that builds
    one from a Rig. Its `TestCase` attribute is a unittest.TestCase, as for every such machine. `spoil` changes what the
    twin wakes with: a planted fault, to see whether it is found. Without `same_state` only what can be seen from
    outside is compared."""
    subject = device if isinstance(device, Subject) else Subject.of(device)
    cls = subject.device
    rules: dict[str, Any] = {}
    anywhere = st.tuples(st.sampled_from(subject.at), st.integers(-4, BANK), st.integers(0, 3))
    anything = st.integers(0, (1 << 64) - 1)

    def near(place: tuple[At, int, int]) -> tuple[At, int, int]:
        """A place, an address near it, and a size."""
        at, offset, size = place
        return at, max(0, at.base + offset), subject.sizes(at)[size % len(subject.sizes(at))]

    if any(register.kind == "read" for register in cls.registers):

        @rule(access=accesses(subject, "read"))
        def read(self: Any, access: tuple[At, int, int]) -> None:
            self.do(subject.read(*access))

        rules["read"] = read
    if any(register.kind == "write" for register in cls.registers):

        @rule(access=accesses(subject, "write"), value=st.integers(0, 0xFF) | anything)
        def write(self: Any, access: tuple[At, int, int], value: int) -> None:
            self.do(subject.write(*access, value))

        rules["write"] = write
    for method in subject.calls:

        @rule(call=calls(subject, method))
        def outside(self: Any, call: Call) -> None:
            self.do(call)

        rules[f"outside_{method}"] = outside

    class Machine(RuleBasedStateMachine):
        twins: Twins
        played: ClassVar[Case | None] = None  # by the last one there was

        def do(self, action: Action) -> None:
            played = type(self).played
            assert played is not None
            type(self).played = replace(played, actions=(*played.actions, action))
            self.twins.do(action)

        @initialize(state=states(cls.State) if schema.schema_of(cls.State).fields else st.builds(cls.State),
                    now=st.integers(0, 1 << 50))  # fmt: skip
        def begin(self, state: Any, now: int) -> None:
            golden, fields = schema.encode(cls.State()), schema.encode(state)
            changed = {name: value for name, value in fields.items() if value != golden[name]}
            type(self).played = Case(subject.name, golden, now, changed, ())
            self.twins = Twins(subject, state, now, spoil=spoil, same_state=same_state)

        if subject.at:

            @rule(place=anywhere)
            def read_anywhere(self, place: tuple[At, int, int]) -> None:
                self.do(subject.read(*near(place)))

            @rule(place=anywhere, value=anything)
            def write_anywhere(self, place: tuple[At, int, int], value: int) -> None:
                self.do(subject.write(*near(place), value))

        @rule(ns=WAITS)
        def wait(self, ns: int) -> None:
            self.do(Command("clock_step", value=ns))

        if cls.deadline is not Device.deadline:

            @precondition(lambda self: self.twins.first.device.deadline() is not None)
            @rule(early=st.integers(-1, 1))
            def wait_to_its_deadline(self, early: int) -> None:
                self.do(Command("clock_set", value=max(0, (self.twins.first.device.deadline() or 0) + early)))

        @rule()
        def save_and_wake_a_twin(self) -> None:
            self.do(Wake())

        @invariant()
        def holds(self) -> None:
            if hasattr(self, "twins"):
                self.twins.check()

    for name, found in rules.items():
        setattr(Machine, name, found)
    Machine.__name__ = Machine.__qualname__ = f"{cls.__name__}Machine"
    return Machine
