"""The properties every device owes, from its declarations alone.

A Hypothesis state machine does to a device whatever can be done to it: reads and writes of its registers and of what is
none, in every width; time, to its deadlines and past them; what comes from outside (methods marked @outside); and at
any point it saves the device and wakes a twin, which from then on gets the same. What must hold all the while:

* nothing raises, an answer fits its width, and an access does a bounded amount of work;
* the twin cannot be told from the original: same answers, same lines, same acts on the outside, same state;
* saving changes nothing; `restored()` changes no state, acts on nothing, and drives the lines as they were;
* the state stays within its schema, and a deadline that has been served does not lie in the past.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snapshot import schema
from vmm.bus import Bus
from vmm.device import Device, Register
from vmm.testing.rig import Build, Rig, wiring
from vmm.testing.strategies import WAITS, inputs, registers, states

_BASE = 0x100  # banks are put this far apart on the rig's bus
_MAX_EXPIRIES = 64
MAX_LINES = 20_000  # of Python that one access may run
LAST_NS = 1 << 55  # guest time fits 56 bits, and a device may look as far ahead again


def check_device(device: type[Device[Any]] | Build, *, examples: int = 60, steps: int = 40) -> None:
    """Run the properties above. Raises AssertionError after printing the shortest way there."""
    how = settings(max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=True)
    run_state_machine_as_test(device_machine(device), settings=how)


def device_machine(
    device: type[Device[Any]] | Build, *, spoil: Callable[[Any], Any] = lambda state: state
) -> type[RuleBasedStateMachine]:
    """The state machine of a device: of a class whose constructor says what its wires are, or of a function that builds
    one from a Rig. Its `TestCase` attribute is a unittest.TestCase, as for every such machine. `spoil` changes what the
    twin wakes with: a planted fault, to see whether it is found."""
    build = wiring(device) if isinstance(device, type) else device
    cls = type(build(Rig()))
    rules: dict[str, Any] = {}
    banks = sorted({register.bank for register in cls.registers})
    address, size = st.integers(0, max(1, len(banks)) * _BASE), st.sampled_from((1, 2, 4))

    def where(register: Register) -> int:
        return banks.index(register.bank) * _BASE + register.offset

    if any(register.kind == "read" for register in cls.registers):

        @rule(register=registers(cls, "read"))
        def read(self: Any, register: Register) -> None:
            self.both(lambda twin: twin.read(where(register), register.size))

        rules["read"] = read
    if any(register.kind == "write" for register in cls.registers):

        @rule(register=registers(cls, "write"), value=st.integers(0, 0xFF) | st.integers(0, 0xFFFFFFFF))
        def write(self: Any, register: Register, value: int) -> None:
            self.both(lambda twin: twin.bus.port_out(where(register), register.size, _cut(value, register.size)))

        rules["write"] = write
    for method in cls.outside:

        @rule(arguments=inputs(getattr(cls, method)))
        def outside(self: Any, arguments: dict[str, Any], method: str = method) -> None:
            self.both(lambda twin: getattr(twin.device, method)(**arguments))

        rules[f"outside_{method}"] = outside

    class Machine(_Properties):
        @initialize(state=states(cls.State) if schema.schema_of(cls.State).fields else st.builds(cls.State),
                    now=st.integers(0, 1 << 50))  # fmt: skip
        def wake(self, state: Any, now: int) -> None:
            self.twins = [Twin(build, banks, now, state)]

        @rule(address=address, size=size)
        def read_anywhere(self, address: int, size: int) -> None:
            self.both(lambda twin: twin.read(address, size))

        @rule(address=address, size=size, value=st.integers(0, 0xFFFFFFFF))
        def write_anywhere(self, address: int, size: int, value: int) -> None:
            self.both(lambda twin: twin.bus.port_out(address, size, _cut(value, size)))

        @rule(ns=WAITS)
        def wait(self, ns: int) -> None:
            self.move_to(self.twins[0].rig.now + ns)

        if cls.deadline is not Device.deadline:

            @precondition(lambda self: self.twins[0].device.deadline() is not None)
            @rule(early=st.integers(-1, 1))
            def wait_to_its_deadline(self, early: int) -> None:
                self.move_to((self.twins[0].device.deadline() or 0) + early)

        @rule()
        def save_and_wake_a_twin(self) -> None:
            first = self.twins[0]
            self.twins = [first, first.twin(build, banks, spoil)]

    for name, found in rules.items():
        setattr(Machine, name, found)
    Machine.__name__ = Machine.__qualname__ = f"{cls.__name__}Machine"
    return Machine


class _Properties(RuleBasedStateMachine):
    twins: list[Twin]
    same_state = True  # compare states too, not only what can be seen

    def both(self, action: Callable[[Twin], Any]) -> None:
        """Do the same to both. Their answers must be the same."""
        answers = []
        for twin in self.twins:
            with Bounded():
                answers.append(action(twin))
                twin.expire()
        assert all(answer == answers[0] for answer in answers), f"the twin answers {answers[1]!r}, not {answers[0]!r}"

    def move_to(self, now: int) -> None:
        for twin in self.twins:
            twin.rig.now = max(twin.rig.now, min(now, LAST_NS))

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "twins"):
            return
        for twin in self.twins:
            with Bounded():
                twin.expire()
            schema.encode(twin.device.state)  # what is done to it stays within the schema
        first, *rest = self.twins
        for twin in rest:
            assert not self.same_state or twin.device.state == first.device.state, "the twin is in another state"
            assert twin.rig.events == first.rig.events, "the twin acts differently on the outside"
            for line in first.rig.lines.keys() & twin.rig.lines.keys():
                assert first.rig.lines[line] == twin.rig.lines[line], f"line {line} of the twin differs"


class Twin:
    """One device on a bus of its own, woken in `state`."""

    def __init__(self, build: Build, banks: list[str], now: int, state: Any) -> None:
        self.rig = Rig(now=now)
        self.device = build(self.rig)
        self.bus = Bus()
        for i, bank in enumerate(banks):
            self.bus.claim_ports(self.device, i * _BASE, bank)
        self.device.state = copy.deepcopy(state)
        self.device.restored()
        self.acted = bool(self.rig.events)
        self.rig.events.clear()

    def twin(self, build: Build, banks: list[str], spoil: Callable[[Any], Any]) -> Twin:
        """Another, from what a snapshot would hold of this one."""
        state = self.device.state
        kept, declared = copy.deepcopy(state), schema.schema_of(type(state))
        saved = schema.encode(state)
        assert self.device.state == kept, "saving changed the state"
        woken = spoil(schema.decode(declared.name, declared.version, saved, type(state)))
        before = schema.encode(woken)
        made = Twin(build, banks, self.rig.now, woken)
        assert schema.encode(made.device.state) == before, "restored() changed the state"
        assert not made.acted, "restored() acted on the outside"
        for line, level in made.rig.lines.items():
            assert self.rig.lines.get(line, level) == level, f"line {line} differs after the restore"
        self.rig.events.clear()
        return made

    def read(self, address: int, size: int) -> int:
        answer = self.bus.port_in(address, size)
        assert 0 <= answer < 1 << 8 * size, f"a read of {size} bytes answered {answer:#x}"
        return answer

    def expire(self) -> None:
        """As the board does."""
        for _ in range(_MAX_EXPIRIES):
            deadline = self.device.deadline()
            if deadline is None or deadline > self.rig.now:
                return
            self.device.expire()
        raise AssertionError("the deadline stays in the past")


class Bounded:
    """Context manager. Raises AssertionError when more than so many lines of Python run in it: an access of a guest's
    does a bounded amount of work, whatever the state and however much time has passed."""

    def __init__(self, most: int = MAX_LINES) -> None:
        self._left = most

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise AssertionError("an access does not come to an end")
        return self._trace


def _cut(value: int, size: int) -> int:
    return value & (1 << 8 * size) - 1
