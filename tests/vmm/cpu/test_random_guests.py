"""Random guests in every mode: what was loaded acts, and nothing a guest does ends or hangs the process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.vmm.cpu import campaign, random_guests
from tests.vmm.cpu.campaign import Bench
from tests.vmm.cpu.hosts import host
from tests.vmm.cpu.random_guests import KINDS, Guest
from vmm.cpu import backends
from vmm.machine.machine import Machine
from vmm.machine.stop import Stopped, StopReason

# The quick tests draw the same guests each time. One in five hundred of others shows what is known and not mended: RCL
# and RCR of memory that faults push wrong flags, a walk through tables where no RAM is costs other time, tables that
# are written over are still used, and an interrupt is taken at a position or is to come.
QUICK = settings.get_current_profile_name() != "nightly"
SEEDS = st.integers(0, (1 << 40) - 1)


@pytest.fixture(scope="module")
def benches() -> Iterator[tuple[Bench, Bench]]:
    both = Bench(), Bench()
    yield both
    for bench in both:
        bench.machine.close()


def in_lockstep(benches: tuple[Bench, Bench], guest: Guest, at: int, steps: int, folder: Path) -> int:
    """Save after `at` bytes of code, wake, rewind, and go on an instruction at a time beside the machine that never was
    saved. How many steps that were."""
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
        states = [each.digests() for each in machines]
        assert states[0] == states[1], f"{guest.kind}, rewound, after {done} steps"
        assert states[0] == states[2], f"{guest.kind}, woken, after {done} steps"
        end = never.position
    straight = bench.put(guest)
    if stops[0] == Stopped(StopReason.POSITION):
        assert straight.run(position=end) == stops[0]
        assert straight.digests() == states[0], f"{guest.kind}: cut against run straight on"
    return done


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, derandomize=QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=SEEDS, at=st.integers(1, 3000))
def test_a_woken_and_a_rewound_machine_run_as_the_one_that_was_never_saved(benches, tmp_path, kind, seed, at):
    in_lockstep(benches, random_guests.draw(seed, kind), at, 100, tmp_path)


@pytest.mark.parametrize("kind", ["guests", "states"])
@pytest.mark.parametrize(("portable", "count"), [("", 400), ("1", 150)])
def test_nothing_dies_hangs_or_escapes(kind, portable, count, monkeypatch):
    """A few of them; `python -m tests.vmm.cpu.campaign` runs any number."""
    monkeypatch.setenv("ANYHYVE_PORTABLE", portable)
    assert campaign.main([kind, "--count", str(count), "--first", str(1 << 32)]) == 0


@pytest.fixture(scope="module")
def portable(benches) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYHYVE_PORTABLE", "1")
        bench = Bench()
    yield bench
    bench.machine.close()


# A guest that writes over its page tables may see either: what it had, while the engine keeps it, or what it wrote.
_TABLES = slice(random_guests.TABLES, random_guests.TABLES + 0x4000)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, derandomize=QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=SEEDS)
@example(seed=223)  # real: a table of vectors where no RAM is
@example(seed=69215839)  # compat ring 0: INT3 that is written over meanwhile
@example(seed=1048)  # vm86: POP with a register's number, and INT n behind it
def test_machine_code_and_python_run_alike(benches, portable, kind, seed):
    guest = random_guests.draw(seed, kind)
    ends = []
    for bench in (benches[0], portable):
        machine = bench.put(guest)
        stop = machine.run(position=machine.position + 3000, until_ns=machine.clock.now_ns() + 50_000)
        before, after = guest.memory[_TABLES], machine.ram.slice(_TABLES.start, 0x4000)
        assume(all((a ^ b) & ~0x60 == 0 for a, b in zip(before, after, strict=True)))  # accessed and dirty
        after[:] = before  # when these bits are set is the processor's affair (SDM vol. 3, 4.8)
        ends.append((stop, machine.position, machine.clock.now_ns(), machine.digests()))
    assert ends[0] == ends[1]


def test_kvm_takes_every_state_that_the_emulated_cpu_comes_to(kvm, benches):
    load = backends.factory("kvm").refusal
    for seed in range(20):
        guest = campaign.guest(seed)
        if campaign.run(benches[0], guest) in ("fault", "triple fault"):
            continue
        for state in (guest.state, benches[0].machine.cpus[0].save()):
            assert load(state) is None, f"{seed}, {guest.kind}"


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_guests_cross_to_kvm_and_back(kvm, count):
    with closing(Bench()) as emulated, closing(Bench("kvm")) as other:
        seed = crossed = 0
        while crossed < count:
            # In QEMU's SVM a guest's breakpoints stay armed behind it, for whoever runs next.
            guest = random_guests.draw(seed, breakpoints=host() != "qemu-svm")
            crossed += campaign.cross((emulated, other), guest, exact=host() != "kvm_pvm")
            seed += 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_steps_beside_the_one_that_was_never_saved(benches, tmp_path, kind):
    done = seed = 0
    while done < 100_000:
        seed += 1
        at = random.Random(seed).randrange(1, 1500)
        done += in_lockstep(benches, random_guests.draw(seed, kind), at, 300, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("guests", 100_000), ("states", 300_000)])
def test_nothing_dies_hangs_or_escapes_at_length(kind, count):
    assert campaign.main([kind, "--count", str(count)]) == 0
