"""Random guests in every mode: what was loaded acts, and nothing a guest does ends or hangs the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vmm.cpu import random_guests
from tests.vmm.cpu.random_guests import KINDS, SIZE, Guest
from vmm.cpu import validity
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig
from vmm.machine.stop import Stopped, StopReason

SEEDS = st.integers(0, (1 << 40) - 1)


class Bench:
    """A machine that runs one guest after another. Its timer ticks every two microseconds and needs no EOI."""

    def __init__(self, backend: str = "emu") -> None:
        self.machine = Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xf4", flat=True), backend)
        for port, value in (
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 4),
            (0x21, 3),
            (0x21, 0xFE),
            (0x43, 0x34),
            (0x40, 3),
            (0x40, 0),
        ):
            self.machine.board.bus.port_out(port, 1, value)
        self._empty = self.machine.moment()

    def put(self, guest: Guest) -> Machine:
        machine = self.machine
        machine.rewind(self._empty)
        machine.ram.write(0, guest.memory)
        machine.cpus[0].discard_code(0, SIZE)
        machine.cpus[0].load(guest.state)
        return machine


@pytest.fixture(scope="module")
def benches() -> Iterator[tuple[Bench, Bench]]:
    both = Bench(), Bench()
    yield both
    for bench in both:
        bench.machine.close()


def everything(machine: Machine) -> object:
    return machine.digests()


def in_lockstep(benches: tuple[Bench, Bench], guest: Guest, at: int, steps: int, folder: Path) -> int:
    """Saves after `at` bytes of code, wakes, rewinds, and goes on an instruction at a time beside the machine that never
    was saved. How many steps that were."""
    other, bench = benches
    machine = bench.put(guest)
    start = machine.position
    if machine.run(position=start + at) != Stopped(StopReason.POSITION):
        return 0
    never = other.put(guest)
    never.run(position=start + at)
    moment = machine.moment()
    machine.save(folder / "s")
    machine.run(position=machine.position + 300)
    machine.rewind(moment)
    with Machine.restore(folder / "s") as woken:
        machines = never, machine, woken
        done = 0
        while done < steps:
            target = never.position + 1
            stops = [each.run(position=target) for each in machines]
            seen = [(each.position, each.clock.now_ns(), each.cpus[0].registers()) for each in machines]
            assert stops[0] == stops[1] == stops[2], f"{guest.kind}, step {done}: {stops}"
            assert seen[0] == seen[1], f"{guest.kind}, rewound, step {done}"
            assert seen[0] == seen[2], f"{guest.kind}, woken, step {done}"
            done += 1
            if stops[0] != Stopped(StopReason.POSITION):
                break
        states = [everything(each) for each in machines]
        assert states[0] == states[1], f"{guest.kind}, rewound, after {done} steps"
        assert states[0] == states[2], f"{guest.kind}, woken, after {done} steps"
        end = never.position
    straight = bench.put(guest)
    if stops[0] == Stopped(StopReason.POSITION):
        assert straight.run(position=end) == stops[0]
        assert everything(straight) == states[0], f"{guest.kind}: cut against run straight on"
    return done


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=SEEDS, at=st.integers(1, 3000))
def test_a_woken_and_a_rewound_machine_run_as_the_one_that_was_never_saved(benches, tmp_path, kind, seed, at):
    in_lockstep(benches, random_guests.draw(seed, kind), at, 100, tmp_path)
