"""Cuts at each of many instructions in a row: none leaves a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmm.machine.machine import Machine


def cut_at_each(boot: Callable[[], Machine], first: int, count: int, every: int, folder: Path) -> Machine:
    """Run to the position `first`, then over `count` instructions; at every so many of them the run is stopped, saved,
    and the woken machine and the stopped one run on to the same end. Returns the undisturbed machine there, which the
    caller closes."""
    machine = boot()
    machine.run(position=first)
    begin = machine.moment()
    places = []
    for _ in range(count):
        machine.run(position=machine.position + 1)
        places.append(machine.position)
    end = machine.position + 500
    machine.rewind(begin)
    machine.run(position=end)
    right = machine.digests()
    for place in places[::every]:
        machine.rewind(begin)
        machine.run(position=place)
        machine.save(folder / "cut")
        machine.run(position=end)
        assert machine.digests() == right, f"stopped at {place}"
        with Machine.restore(folder / "cut", verify=True) as woken:
            woken.run(position=end)
            assert woken.digests() == right, f"saved at {place}"
    return machine
