"""The properties every device owes, from its declarations alone. Needs the `test` extra (Hypothesis).

    from vmm.testing import Rig, check_device

    def test_thermometer():
        check_device(lambda rig: Thermometer(rig.clock, rig.line("irq")))

What is checked, from any state the schema allows:
* no access, declared or not, at any time raises, and its answer fits its width;
* saving changes nothing, and a twin made from the saved state answers the same, drives the same lines and ends in the
  same state;
* `restored()` changes no state; a deadline that expires does not stay in the past.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot import schema
from vmm.bus import Bus
from vmm.device import Device

_BASE = 0x100  # banks are put this far apart on the rig's bus
_MAX_EXPIRIES = 64


@dataclass
class Rig:
    """A device's surroundings: a clock that stands still until moved, lines and sinks that remember."""

    now: int = 0
    lines: dict[str, bool] = field(default_factory=dict)
    events: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    @property
    def clock(self) -> Rig:
        return self

    def now_ns(self) -> int:
        return self.now

    def line(self, name: str) -> Callable[[bool], None]:
        """An output line; its last level is kept in `lines`."""

        def drive(level: bool) -> None:
            self.lines[name] = bool(level)

        return drive

    def sink(self, name: str) -> Callable[..., None]:
        """A sink for whatever the device calls it with; every call is kept in `events`."""

        def take(*values: Any) -> None:
            self.events.append((name, values))

        return take


Build = Callable[[Rig], Device[Any]]
Step = tuple[str, int, int, int]  # read/write/wait, address or ns, size, value


def values(kind: schema.Type) -> st.SearchStrategy[Any]:
    """Any value a field type allows."""
    match kind:
        case schema.IntType(low, high):
            edges = [v for v in (low, low + 1, high - 1, high) if low <= v <= high]
            return st.integers(low, high) | st.sampled_from(edges)
        case schema.BoolType():
            return st.booleans()
        case schema.WordType(words):
            return st.sampled_from(words)
        case schema.TextType(most):
            return st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=min(most, 64))
        case schema.BytesType(least, most):
            return st.binary(min_size=least, max_size=max(least, min(most, 64)))
        case schema.ListType(item, least, most):
            return st.lists(values(item), min_size=least, max_size=max(least, min(most, 16))).map(tuple)
        case schema.OptionalType(item):
            return st.none() | values(item)
        case schema.StructType(cls):
            return states(cls)
    raise AssertionError(f"no strategy for {kind}")


def states(cls: type) -> st.SearchStrategy[Any]:
    """Any value of a @state class: its defaults with some fields replaced, or every field drawn."""
    fields = {f.name: values(f.type) for f in schema.schema_of(cls).fields}
    some = st.fixed_dictionaries({}, optional=fields).map(lambda given: cls(**given))
    return some | st.fixed_dictionaries(fields).map(lambda given: cls(**given))


def check_device(build: Build, *, examples: int = 60) -> None:
    """Run the properties above over generated states and accesses. Raises AssertionError with the smallest example."""
    cls = type(build(Rig()))
    banks = sorted({r.bank for r in cls.registers})
    addresses = sorted({banks.index(r.bank) * _BASE + r.offset for r in cls.registers}) or [0]
    address = st.sampled_from(addresses) | st.integers(0, len(banks) * _BASE)
    size, value = st.sampled_from((1, 2, 4)), st.integers(0, 0xFF) | st.integers(0, 0xFFFFFFFF)
    wait = st.sampled_from((1, 1000, 10**6, 10**9)) | st.integers(0, 10**15)
    steps: st.SearchStrategy[list[Step]] = st.lists(
        st.tuples(st.just("read"), address, size, st.just(0))
        | st.tuples(st.just("write"), address, size, value)
        | st.tuples(st.just("wait"), wait, st.just(0), st.just(0)),
        max_size=30,
    )

    @settings(max_examples=examples, deadline=None, database=None, print_blob=True)
    @given(state=states(cls.State), now=st.integers(0, 1 << 50), before=steps, after=steps)
    def holds(state: Any, now: int, before: list[Step], after: list[Step]) -> None:
        _bisimulate(build, banks, state, now, before, after)

    holds()


def _bisimulate(build: Build, banks: list[str], state: Any, now: int, before: list[Step], after: list[Step]) -> None:
    first = _Bench(build, banks, now, state)
    first.run(before)
    kept = copy.deepcopy(first.device.state)
    saved = schema.encode(first.device.state)
    assert first.device.state == kept, "saving changed the state"
    name = schema.schema_of(type(state))
    twin = _Bench(build, banks, first.rig.now, schema.decode(name.name, name.version, saved, type(state)))
    assert schema.encode(twin.device.state) == saved, "restored() changed the state"
    for line, level in twin.rig.lines.items():
        assert first.rig.lines.get(line, level) == level, f"line {line} differs after the restore"
    first.rig.events.clear()
    assert not twin.rig.events, "restored() acted on the outside"
    assert first.run(after) == twin.run(after), "the twin answers differently"
    assert first.device.state == twin.device.state, "the twin ends in another state"
    assert first.rig.events == twin.rig.events, "the twin acts differently on the outside"
    for line in first.rig.lines.keys() & twin.rig.lines.keys():
        assert first.rig.lines[line] == twin.rig.lines[line], f"line {line} differs at the end"


class _Bench:
    """One device on a bus of its own."""

    def __init__(self, build: Build, banks: list[str], now: int, state: Any) -> None:
        self.rig = Rig(now=now)
        self.device = build(self.rig)
        self.bus = Bus()
        for i, bank in enumerate(banks):
            self.bus.claim_ports(self.device, i * _BASE, bank)
        self.device.state = copy.deepcopy(state)
        self.device.restored()
        self.rig.events.clear()

    def run(self, steps: list[Step]) -> list[int]:
        answers = []
        for kind, where, size, value in steps:
            if kind == "wait":
                self.rig.now += where
                self._expire()
            elif kind == "read":
                answer = self.bus.port_in(where, size)
                assert 0 <= answer < 1 << 8 * size, f"a read of {size} bytes answered {answer:#x}"
                answers.append(answer)
            else:
                self.bus.port_out(where, size, value & (1 << 8 * size) - 1)
            schema.encode(self.device.state)  # what a guest does stays within the schema
        return answers

    def _expire(self) -> None:
        for _ in range(_MAX_EXPIRIES):
            deadline = self.device.deadline()
            if deadline is None or deadline > self.rig.now:
                return
            self.device.expire()
        raise AssertionError("the deadline stays in the past")
