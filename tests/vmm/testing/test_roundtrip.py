"""Round trips: a machine that is saved and goes on from the file, as it runs, is as one that never was; and runs that
end at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapshot.errors import SnapshotError
from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program, echo_program
from vmm.errors import BackendError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason
from vmm.testing.expect import Expect
from vmm.testing.roundtrip import round_trips

pytestmark = pytest.mark.no_roundtrip("it makes its own")


def test_going_on_from_a_file_leaves_no_trace(boot_own, tmp_path):
    with boot_own() as machine, boot_own() as undisturbed:
        for position in range(500_000, 8_000_000, 777_777):
            machine.run(position=position)
            machine.save(tmp_path / "here")
            cpu, ram = machine.cpu, machine.ram
            machine.go_on_from(tmp_path / "here")
            assert machine.cpu is not cpu and machine.ram is not ram, "nothing is carried over"
        for each in (machine, undisturbed):
            assert each.run(position=9_000_000) == Stopped(StopReason.POSITION)
        assert machine.digests() == undisturbed.digests()
        assert {k: v for k, v in machine.exits().items() if k != "stop"} == {
            k: v for k, v in undisturbed.exits().items() if k != "stop"
        }
        assert machine.board.console.output == undisturbed.board.console.output


def test_an_interrupt_that_is_up_is_up_at_the_new_cpu(boot_own, tmp_path):
    """Trips fall on the timer's ticks, when the guest has halted and time has just skipped to one."""
    with boot_own() as machine, boot_own() as undisturbed:
        with round_trips(1_000_000):
            tripping = boot_own()
        with tripping:
            for each in (tripping, undisturbed):
                each.run(position=15_000_000)
            assert tripping.digests() == undisturbed.digests()
        machine.run(position=3_000_000)
        machine.board.devices["com1"].receive(b"x")
        assert machine.board.pics.pending()
        machine.save(tmp_path / "here")
        machine.go_on_from(tmp_path / "here")
        undone = Machine.restore(tmp_path / "here")
        with undone:
            for each in (machine, undone):
                each.run(position=3_100_000)
            assert machine.digests() == undone.digests()


def test_what_is_typed_and_what_is_awaited_goes_on(boot_own, tmp_path):
    with boot_own() as machine:
        Expect(machine).expect("own guest")
        answers(machine, r"\[y\]", tmp_path / "here")


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_port_that_is_polled_goes_on(backend, tmp_path):
    """Without a timer: where one KVM runs in another that is emulated, a tick may take longer than the next one waits,
    and no other interrupt is taken."""
    with Program(echo_program(0x3F8), backend).machine as machine:
        machine.run(until_ns=1_000_000)
        answers(machine, "yz", tmp_path / "here")


def answers(machine: Machine, answer: str, path: Path) -> None:
    """What was typed before two trips is answered after them."""
    talk = Expect(machine)
    talk.send("xy")
    for _ in range(2):
        machine.save(path)
        machine.go_on_from(path)
    talk.expect(answer)


def test_trips_are_made_as_it_runs(boot_own):
    with round_trips(100_000) as trips, boot_own() as machine:
        machine.run(until_ns=1_000_000)
    assert trips[0].machine is machine and trips[0].made > 2


def test_a_file_that_is_none_changes_nothing(boot_own, tmp_path):
    with boot_own() as machine:
        machine.run(position=1_000_000)
        machine.save(tmp_path / "good")
        before = machine.digests()
        (tmp_path / "bad").write_bytes((tmp_path / "good").read_bytes()[:-40])
        with pytest.raises(SnapshotError):
            machine.go_on_from(tmp_path / "bad")
        assert machine.digests() == before
        assert machine.run(position=2_000_000) == Stopped(StopReason.POSITION)


def test_a_moment_is_gone_back_to_between_trips(boot_own):
    with round_trips(100_000) as trips, boot_own() as machine, boot_own() as undisturbed:
        machine.run(position=1_000_000)
        moment = machine.moment()
        for _ in range(3):
            assert machine.run(position=2_500_000) == Stopped(StopReason.POSITION)
            end = machine.digests()
            machine.rewind(moment, verify=True)
        assert trips[0].made > 3
        undisturbed.loop.hooks.clear()
        undisturbed.run(position=2_500_000)
        assert undisturbed.digests() == end


def test_a_trip_the_host_refuses_is_its_fault(boot_own, tmp_path, monkeypatch):
    with round_trips(100_000), boot_own() as machine:
        monkeypatch.setattr("vmm.testing.roundtrip.tempfile.tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(BackendError, match="no place for a round trip: No such file"):
            machine.run(position=8_000_000)


def test_a_run_ends_at_a_time(boot_own):
    with boot_own() as machine:
        for until_ns in (1, 123_456, 1_000_000, 2_000_001):
            assert machine.run(until_ns=until_ns) == Stopped(StopReason.TIME)
            assert until_ns <= machine.clock.now_ns() < until_ns + 10_000
        assert machine.run(until_ns=5) == Stopped(StopReason.TIME), "a time that has passed"


def test_time_comes_to_a_guest_that_sleeps(tmp_path):
    """hlt with interrupts on and no timer: only the end of the run wakes the host."""
    with Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xfb\xf4\xeb\xfd", flat=True)) as machine:
        machine.loop.awaits_input = True
        assert machine.run(until_ns=5_000_000_000) == Stopped(StopReason.TIME)
        assert machine.clock.now_ns() == 5_000_000_000


def test_trips_are_made_while_the_guest_sleeps():
    """STI and HLT with the timer of the RTC far away: a hook is due all the same."""
    with round_trips(1_000_000) as trips:
        machine = Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xfb\xf4\xeb\xfd", flat=True))
        with machine:
            machine.run(until_ns=20_000_000)
            assert trips[0].made > 15 and machine.clock.now_ns() == 20_000_000
