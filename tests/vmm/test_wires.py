"""Junctions against a slow model, and wiring by annotations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.wires import UNWIRED, Clock, Junction, Line, wire

DRIVES = st.lists(st.tuples(st.integers(0, 3), st.booleans() | st.none()), max_size=30)


@given(DRIVES)
def test_a_junction_is_the_or_of_its_drivers(drives):
    """None forgets what all drove: until each has driven again the wire may rise, and not fall."""
    seen: list[bool] = []
    other: list[bool] = []
    junction = Junction(seen.append)
    junction.listen(other.append)
    drivers = [junction.driver() for _ in range(4)]
    known: dict[int, bool] = {}
    for driver, level in drives:
        told = len(seen)
        if level is None:
            junction.forget()
            known.clear()
            assert len(seen) == told
            continue
        drivers[driver](level)
        if known.get(driver) is level:
            assert len(seen) == told, "it is as it was"
        known[driver] = level
        if any(known.values()) and level:
            assert seen[-1] is True
        elif len(known) == 4:
            assert seen[-1] is any(known.values())
        else:
            assert len(seen) == told, "another may be holding it up"
    assert seen == other


class Wired:
    def __init__(self, clock: Clock, irq: Line, size: int = 4) -> None:
        self.given: tuple[object, ...] = clock, irq, size


def test_each_argument_by_name_and_annotation():
    asked = []

    def source(name, annotation):
        asked.append((name, annotation))
        return UNWIRED if annotation is int else name.upper()

    assert wire(Wired, source).given == ("CLOCK", "IRQ", 4)
    assert asked == [("clock", Clock), ("irq", Line), ("size", int)]


def test_what_has_no_wire_and_no_default_is_named():
    with pytest.raises(TypeError, match="Wired: nothing is wired to 'irq'"):
        wire(Wired, lambda name, annotation: UNWIRED if name == "irq" else 1)
