"""Moments and rewinding: whatever happened in between, everything is as it was, as often as one likes."""

from __future__ import annotations

import dataclasses
import random
import resource
import threading

import pytest

from snapshot.verify import verify
from tests.conftest import BACKENDS, OWN
from vmm.errors import BackendError, GuestError, RequestError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason


def boot(backend="emu", code=None, mib=8) -> Machine:
    image = Image.from_files(OWN, flat=True) if code is None else Image(code, flat=True)
    return Machine.boot(MachineConfig(memory_bytes=mib << 20), image, backend)


def run_some(machine, draw):
    if machine.backend == "emu":
        machine.run(position=machine.position + draw.randrange(1, 300_000))
        return
    timer = threading.Timer(draw.uniform(0, 0.01), machine.post, (lambda _: Stopped(StopReason.COMMAND),))
    timer.start()
    machine.run()
    timer.join()


def test_run_roll_back_and_roll_back_again():
    """From moments at random places: each run from one ends the same, whatever other runs there were from it."""
    draw = random.Random("mark")
    with boot() as machine:
        for _ in range(25):
            run_some(machine, draw)
            before = machine.digests()
            moment = machine.moment()
            assert machine.digests() == before, "a moment changes nothing"
            goal = machine.position + draw.randrange(1, 200_000)
            ends = []
            for _ in range(3):
                machine.run(position=goal)
                ends.append(machine.digests())
                run_some(machine, draw)
                machine.send(b"xyz")
                run_some(machine, draw)
                machine.rewind(moment, verify=True)
                assert machine.digests() == before
            assert ends[0] == ends[1] == ends[2]


def test_on_kvm(crossing):
    draw = random.Random("mark")
    written = 0  # by some of the runs: one that is stopped at once writes nothing
    with boot(crossing) as machine:
        for _ in range(5):
            run_some(machine, draw)
            moment = machine.moment()
            for _ in range(5):
                run_some(machine, draw)
                written += machine.rewind(moment, verify=True)
    assert written > 0


SELF_MODIFYING = bytes.fromhex("b0 07 fe 05 f9ffffff 66ba0105 ee f4".replace(" ", ""))
"""mov al, 7; inc byte [that 7]; mov dx, 0x501; out dx, al; hlt"""


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_code_that_changed_itself_is_the_old_code_again(backend):
    with boot(backend, SELF_MODIFYING) as machine:
        moment = machine.moment()
        for _ in range(3):
            assert machine.run() == Stopped(StopReason.EXIT, 7 << 1 | 1)
            assert machine.rewind(moment, verify=True) > 0


@pytest.mark.parametrize("scans", [True, False])
def test_ram_beyond_the_hole_and_without_the_fast_scan(scans):
    with boot(mib=3074) as machine:  # two regions
        machine.run(position=500_000)
        moment = machine.moment()
        baseline = machine._moments._baseline
        assert baseline is not None
        for scanner in baseline.scanners:
            scanner._scans = scans
        high = machine.ram.regions[1]
        high.view[5000] = 7
        machine.run(position=600_000)
        assert machine.rewind(moment) >= 8192
        assert high.view[5000] == 0
        machine.rewind(moment, verify=False)


def test_a_woken_machine_and_a_save_after_the_moment(tmp_path):
    with boot() as machine:
        machine.run(position=1_000_000)
        machine.save(tmp_path / "before")
    with Machine.restore(tmp_path / "before") as machine:
        moment = machine.moment()
        machine.run(position=1_200_000)
        machine.rewind(moment, verify=True)
        machine.save(tmp_path / "stop")
        checkpoint = machine.checkpoint(tmp_path / "live")
        machine.run(position=1_200_000)
        checkpoint.wait()
    for file in ("before", "stop", "live"):
        verify(tmp_path / file)
        assert (tmp_path / file).read_bytes() == (tmp_path / "before").read_bytes()


def test_many_moments_of_one_machine():
    """Kept as little differs or as much, gone back to in any order, once and again."""
    draw = random.Random("many")
    with boot() as machine:
        kept = []
        for position in (100_000, 100_400, 300_000, 1_500_000, 1_500_100, 3_000_000):
            machine.run(position=position)
            kept.append((machine.moment(), machine.digests()))
        machine.run(position=4_000_000)
        for _ in range(30):
            moment, then = draw.choice(kept)
            machine.rewind(moment, verify=True)
            assert machine.digests() == then
            run_some(machine, draw)
        assert len({id(moment.copies) for moment, _ in kept}) < len(kept), "none is kept as what differs from another"


def test_a_moment_outlives_the_cpu_and_the_ram_it_was_made_of(tmp_path):
    with boot() as machine:
        machine.run(position=1_000_000)
        moment, then = machine.moment(), machine.digests()
        machine.run(position=1_300_000)
        goal = machine.digests()
        machine.save(tmp_path / "later")
        machine.go_on_from(tmp_path / "later")
        for _ in range(2):
            machine.run(position=1_400_000)
            machine.rewind(moment, verify=True)
            assert machine.digests() == then
            machine.run(position=1_300_000)
            assert machine.digests() == goal


def test_breakpoints_armed_since_are_gone():
    with boot() as machine:
        machine.run(position=200_000)
        moment = machine.moment()
        for armed in (0x401, 0x455):
            machine.cpu.load(dataclasses.replace(machine.cpu.save(), dr0=0x1234, dr7=armed))
            machine.run(position=300_000)
            machine.rewind(moment, verify=True)


# --- what would be forgotten is found


def plant(machine, moment, what):
    match what:
        case "ram":
            machine._moments._baseline.scanners[0].extents = lambda: []
        case "page":
            extents = machine._moments._baseline.scanners[0].extents
            machine._moments._baseline.scanners[0].extents = lambda: extents()[1:]
        case "cpu":
            machine.cpu.reset = lambda mark: None
        case "time":
            moment._made = []
        case "device":
            moment._held = [each for each in moment._held if each[0] != "pit"]


@pytest.mark.parametrize("what", ["ram", "page", "cpu", "time", "device"])
def test_verify_names_what_a_rewind_forgot(what):
    with boot() as machine:
        machine.run(position=20_000)
        moment = machine.moment()
        machine.run(position=2_000_000)
        plant(machine, moment, what)
        names = {"ram": "ram.0", "page": "ram.0", "cpu": "cpu.0", "time": "clock", "device": "pit"}
        with pytest.raises(AssertionError, match=rf"after the rewind differ: .*{names[what]}"):
            machine.rewind(moment, verify=True)


# --- for ever


def grows_by(count):
    """KiB that the process grew by over so many rewinds, the first tenth not counted."""
    with boot() as machine:
        machine.run(position=300_000)
        moment = machine.moment()
        for n in range(count):
            if n == count // 10:
                before = resident()
            machine.run(position=300_000 + 200 + n % 7)
            machine.rewind(moment)
        grown = resident() - before
        machine.rewind(moment, verify=True)
        return grown


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() // 1024


def test_memory_stays_flat():
    assert grows_by(20_000) < 2048


@pytest.mark.slow
def test_memory_stays_flat_over_a_million_rewinds():
    assert grows_by(1_000_000) < 2048


@pytest.mark.slow
def test_ten_thousand_verified():
    draw = random.Random("verified")
    with boot(mib=2) as machine:
        machine.run(position=1_000_000)
        moment = machine.moment()
        for _ in range(10_000):
            machine.run(position=machine.position + draw.randrange(1, 20_000))
            machine.rewind(moment, verify=True)


def test_a_moment_of_another_machine_is_refused():
    with boot(mib=2) as small, boot(mib=8) as large:
        moment = small.moment()
        for _ in range(2):
            with pytest.raises(RequestError, match="of a machine with other RAM"):
                large.rewind(moment)
            large.moment()
        large.run(position=100_000)


def test_a_closed_machine_says_so(tmp_path):
    machine = boot()
    machine.close()
    for use in (machine.run, lambda: machine.save(tmp_path / "x"), lambda: machine.checkpoint(tmp_path / "x")):
        with pytest.raises(RequestError, match="the machine is closed"):
            use()
    machine.send(b"x")
    machine.post(lambda _: None)


def test_going_on_that_cannot_be_changes_nothing(tmp_path, monkeypatch):
    with boot() as machine, boot() as undisturbed:
        for each in (machine, undisturbed):
            each.run(position=500_000)
        machine.save(tmp_path / "here")

        def cannot(*_: object) -> None:
            raise BackendError("no CPU to be had")

        with monkeypatch.context() as patched:
            patched.setattr(machine, "_make_cpu", cannot)
            with pytest.raises(BackendError, match="no CPU"):
                machine.go_on_from(tmp_path / "here")
        for each in (machine, undisturbed):
            each.run(position=900_000)
        assert machine.digests() == undisturbed.digests()


def test_guest_time_comes_to_its_end_in_one_line(tmp_path):
    """STI and HLT, and a timer whose next edge is as far away as its state can say."""
    with boot(code=bytes.fromhex("fbf4ebfd")) as machine:
        machine.board.devices["pit"].state.next_edge = (1 << 64) - 1
        machine.board.restored()
        with pytest.raises(GuestError, match="guest time has come to its end"):
            machine.run()
        machine.save(tmp_path / "last")
    with Machine.restore(tmp_path / "last") as woken, pytest.raises(GuestError, match="come to its end"):
        woken.run(until_ns=1 << 63)
