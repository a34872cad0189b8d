"""A cut leaves no trace: run(n) equals run(k), save, wake, run(n - k), to the last bit of RAM, CPU and devices."""

import json
import random
import subprocess
import sys

import pytest

from tests.vmm.cpu.program import Program
from tests.vmm.machine import where
from vmm.machine.machine import Machine, Stopped, StopReason

ON = 5_000_000  # bytes of code run after each cut


def run_to(machine, position):
    assert machine.run(position=position) == Stopped(StopReason.POSITION)


def wake_elsewhere(file, position):
    """Digests after waking `file` in a new process and running to `position`."""
    done = subprocess.run(
        [sys.executable, "-m", "anyhyve", "restore", str(file), "--at", str(position), "--json"],
        check=True, capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads(done.stdout)["digest"]


def cut_at(boot, positions, tmp_path, fresh=frozenset(), on=ON):
    """Cut at each position; wake; run on; compare with a machine that was never saved."""
    saver, reference = boot(), boot()
    expected = {}
    for stop in sorted(position + on for position in positions):
        run_to(reference, stop)
        expected[stop] = (reference.position, reference.digests())
    seen = []
    for i, position in enumerate(sorted(positions)):
        run_to(saver, position)
        assert saver.position >= position
        state = saver.cpu.save()
        seen.append(state)
        file = tmp_path / "cut"
        saver.save(file)
        if i in fresh:
            assert wake_elsewhere(file, position + on) == expected[position + on][1], f"cut at {position}"
            continue
        with Machine.restore(file) as woken:
            assert woken.digests() == saver.digests(), f"woken at {position} differs before it ran"
            run_to(woken, position + on)
            assert woken.position == expected[position + on][0]
            assert woken.digests() == expected[position + on][1], f"cut at {position}"
    saver.close()
    reference.close()
    return seen


def places(boot, start, each):
    """Positions a random draw seldom meets: within REP, in the timer's handler, in the shadow of STI, halted."""
    with boot() as machine:
        machine.run(position=start)
        found = where.find(machine, where.rep, each, 997) + where.find_handlers(machine, each, 4)
    return found + where.find_halts(boot, start, -(-each // 2))


def test_cut_anywhere(boot_own, tmp_path):
    pick = random.Random(1)
    positions = [pick.randrange(1_000, 40_000_000) for _ in range(30)] + places(boot_own, 20_000_000, 4)
    states = cut_at(boot_own, positions, tmp_path, fresh={3, 33})
    assert {state.cs.selector & 3 for state in states} == {0, 3}
    assert any(state.interrupt_shadow for state in states) and any(state.halted for state in states)


def test_an_exact_stop_behind_a_deadline_in_the_same_block():
    """The deadline waits for the block's end, the stop does not."""
    passed = 0
    with Program("1: .rept 200; nop; .endr; jmp 1b").machine as machine:
        machine.run(position=10_000)
        for _ in range(40):
            goal, deadline = machine.position + 100, machine.clock.now_ns() + 15
            assert machine.run(position=goal, until_ns=deadline) == Stopped(StopReason.POSITION)
            assert goal <= machine.position < goal + 5, "the longest instruction here has five bytes"
            passed += machine.clock.now_ns() > deadline
    assert passed > 5


@pytest.mark.slow
def test_cut_anywhere_a_thousand_times(boot_own, tmp_path):
    pick = random.Random(2)
    positions = [pick.randrange(1_000, 400_000_000) for _ in range(760)] + places(boot_own, 100_000_000, 80)
    states = cut_at(boot_own, positions, tmp_path, fresh=set(range(0, 1000, 10)))
    assert len(states) == 1000


def test_every_instruction_of_a_stretch(boot_own, tmp_path):
    """Consecutive instructions: inside blocks, in REP, around interrupts and STI."""
    start = 30_000_000
    cut_at(boot_own, range(start, start + 400, 4), tmp_path, on=200_000)


def test_every_instruction_around_writes_of_msrs(boot_own, tmp_path):
    """Each leaves its block half-way, and the rest is charged as a block of its own. Ten thousand random cuts met it
    once."""
    with boot_own() as machine:
        machine.run(position=96_300)
        before = machine.exits()["msr"]
        machine.run(position=97_000)
        assert machine.exits()["msr"] > before, "they are here"
    cut_at(boot_own, range(96_300, 97_000, 4), tmp_path, on=20_000)


def test_generation_three(boot_own, tmp_path):
    with boot_own() as reference:
        run_to(reference, 40_000_000)
        expected = reference.digests()
    machine = boot_own()
    for generation, position in enumerate((11_111_111, 22_222_222, 33_333_333)):
        run_to(machine, position)
        machine.save(tmp_path / f"{generation}")
        machine.close()
        machine = Machine.restore(tmp_path / f"{generation}")
    run_to(machine, 40_000_000)
    assert machine.digests() == expected
    machine.close()


def test_a_save_changes_nothing(boot_own, tmp_path):
    with boot_own() as machine, boot_own() as other:
        run_to(machine, 12_345_678)
        before = machine.digests()
        machine.save(tmp_path / "a")
        assert machine.digests() == before
        machine.save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        run_to(machine, 20_000_000)
        run_to(other, 20_000_000)
        assert machine.digests() == other.digests()


def test_save_restore_save_is_byte_equal(boot_own, tmp_path):
    with boot_own() as machine:
        run_to(machine, 12_345_678)
        machine.save(tmp_path / "a")
    with Machine.restore(tmp_path / "a") as woken:
        woken.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_field_left_out_is_noticed(boot_own, tmp_path, monkeypatch):
    """The planted bug: the suite must see a save that forgets one field."""
    from emu import state

    real = state.load

    def forgetful(engine, saved):
        import copy

        saved = copy.copy(saved)
        saved.rbx ^= 1
        real(engine, saved)

    with boot_own() as machine:
        run_to(machine, 12_345_678)
        machine.save(tmp_path / "a")
        monkeypatch.setattr(state, "load", forgetful)
        with Machine.restore(tmp_path / "a") as woken:
            assert woken.digests() != machine.digests()


def test_portable_callbacks_give_the_same_run(boot_own, monkeypatch):
    with boot_own() as native:
        run_to(native, 3_000_000)
        expected = native.digests()
    monkeypatch.setenv("ANYHYVE_PORTABLE", "1")
    with boot_own() as portable:
        run_to(portable, 3_000_000)
        assert portable.digests() == expected
