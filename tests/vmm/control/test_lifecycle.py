"""Commands change how a machine runs, never what it computes."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot.errors import SnapshotError
from snapshot.verify import verify
from tests.conftest import OWN
from tests.vmm.conftest import children, eventually
from vmm.control.lifecycle import ALIVE, MOVES, Lifecycle, State
from vmm.control.supervisor import Supervisor, WrongState
from vmm.errors import BackendError, Cancelled
from vmm.guest.image import Image
from vmm.machine.machine import Fault, Machine, MachineConfig, Stopped, StopReason
from vmm.machine.run import Goal

END = 6_000_000  # position; some hundred rounds of the guest's


def boot() -> Machine:
    return Machine.boot(MachineConfig(memory_bytes=8 << 20), Image.from_files(OWN, flat=True))


@pytest.fixture(scope="module")
def undisturbed():
    with boot() as machine:
        assert machine.run(position=END) == Stopped(StopReason.POSITION)
        return machine.digests(), bytes(machine.board.console.output)


COMMANDS = st.lists(
    st.sampled_from(("pause", "resume", "checkpoint", "pack", "stand", "difference", "nowhere", "cancel", "read")),
    min_size=5,
    max_size=30,
)


def command(vm: Supervisor, what: str, folder: Path, saved: list[Path]) -> None:
    file = folder / f"{len(saved)}"
    parent = saved[-1] if what == "difference" and saved else None
    try:
        match what:
            case "pause":
                vm.pause().result()
            case "resume":
                vm.resume().result()
            case "read":
                vm.at_safe_point(vm.machine.encoded_states).result()
            case "nowhere":
                with pytest.raises(BackendError, match="cannot save to"):
                    vm.save(Path("/proc/nowhere")).result()
            case "cancel":
                giving_up = vm.save(file)
                vm.cancel()
                giving_up.exception()
            case _:
                vm.save(file, packed=what == "pack", hold=what == "stand", parent=parent).result()
                saved.append(file)
    except WrongState as error:
        assert "the machine" in str(error), error  # it came to its end


@settings(max_examples=25)
@given(COMMANDS)
def test_whatever_is_commanded_the_result_is_the_same(undisturbed, commands):
    with tempfile.TemporaryDirectory() as scratch, boot() as machine:
        vm, saved, stop = Supervisor(machine), list[Path](), list[object]()
        runner = threading.Thread(target=lambda: stop.append(vm.run(Goal(END), paused=True)))
        runner.start()
        eventually(lambda: vm.state is State.PAUSED)
        try:
            vm.resume().result()
            for what in commands:
                command(vm, what, Path(scratch), saved)
                assert vm.state in (State.RUNNING, State.PAUSED, State.STOPPED)
        finally:
            if vm.state is State.PAUSED:
                vm.resume()
            runner.join()
            vm.close()
        assert stop == [Stopped(StopReason.POSITION)] and vm.state is State.STOPPED
        assert (machine.digests(), bytes(machine.board.console.output)) == undisturbed
        for file in saved:
            verify(file)
        if saved:
            with Machine.restore(saved[-1], verify=True) as woken:
                assert woken.run(position=END) == Stopped(StopReason.POSITION)
                assert woken.digests() == undisturbed[0]
    assert not children()


def test_what_is_aimed_at_survives_every_stop_on_the_way():
    """A command comes with each byte of output: the text waited for is half written at most of them."""
    with boot() as machine:
        machine.board.console.listen(lambda _: machine.post(lambda _: Stopped(StopReason.COMMAND)))
        machine.loop.aim(Goal(until="round 0002 sum"))
        stops = 0
        while (stop := machine.loop.go_on()) == Stopped(StopReason.COMMAND):
            stops += 1
        assert stop == Stopped(StopReason.PATTERN) and stops > 50
        assert b"round 0003" not in machine.board.console.output


def test_damaged_ram_is_not_saved_again(tmp_path):
    """A checkpoint right after waking waits for the check of what was mapped, and finds what it finds."""
    with boot() as machine:
        machine.run(position=1_000_000)
        machine.save(tmp_path / "good")
    data = bytearray((tmp_path / "good").read_bytes())
    place = data.index(OWN.read_bytes()[:64])
    data[place + 8] ^= 1
    (tmp_path / "bad").write_bytes(data)
    with Machine.restore(tmp_path / "bad") as woken, pytest.raises(SnapshotError, match="digest"):
        woken.checkpoint(tmp_path / "again")
    assert not (tmp_path / "again").exists() and not children()


def test_a_bad_parent_is_found_out_in_the_copy(tmp_path):
    (tmp_path / "parent").write_bytes(b"no snapshot")
    with boot() as machine:
        checkpoint = machine.checkpoint(tmp_path / "cut", parent=tmp_path / "parent")
        with pytest.raises(SnapshotError, match="parent"):
            checkpoint.wait()
        assert [file.name for file in tmp_path.iterdir()] == ["parent"]


def test_our_own_fault_in_the_copy_is_told(tmp_path, monkeypatch):
    with boot() as machine:
        monkeypatch.setattr("snapshot.writer.Writer.commit", lambda _: 1 // 0)
        checkpoint = machine.checkpoint(tmp_path / "cut")
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            checkpoint.wait()
        assert not list(tmp_path.iterdir())


def test_cancel_comes_too_late_for_what_is_in_place(tmp_path):
    with boot() as machine:
        checkpoint = machine.checkpoint(tmp_path / "cut")
        eventually(lambda: (tmp_path / "cut").exists())
        checkpoint.cancel()
        checkpoint.wait()
        verify(tmp_path / "cut")
        checkpoint.cancel()


def test_who_stops_waiting_for_a_save_does_not_cancel_it(box, tmp_path, gate):
    waiting = box.vm.save(tmp_path / "cut")
    assert not waiting.cancel()
    gate()
    assert waiting.result()["path"] == str(tmp_path / "cut")


def test_cancel_in_mid_save(tmp_path, gate):
    with boot() as machine:
        checkpoint = machine.checkpoint(tmp_path / "cut")
        checkpoint.cancel()
        with pytest.raises(Cancelled):
            checkpoint.wait()
        assert not list(tmp_path.iterdir()) and not children()


def test_two_saves_to_one_name(tmp_path, gate):
    with boot() as machine:
        first = machine.checkpoint(tmp_path / "cut")
        with pytest.raises(BackendError, match="another is writing a snapshot of this name"):
            machine.checkpoint(tmp_path / "cut")
        gate()
        first.wait()


def test_the_same_suspend_asked_twice_is_one(box, tmp_path, gate):
    first, second = box.vm.save(tmp_path / "cut", end=True), box.vm.save(tmp_path / "cut", end=True)
    with pytest.raises(WrongState, match=r"a save to .*cut is under way"):
        box.vm.save(tmp_path / "other", end=True)
    gate()
    assert first.result() == second.result() and first.result()["path"] == str(tmp_path / "cut")
    eventually(lambda: box.end)
    assert box.end == Stopped(StopReason.SUSPENDED)
    assert box.vm.save(tmp_path / "cut", end=True).result() == first.result(), "also when it has ended"
    for path, end in ((tmp_path / "other", True), (tmp_path / "cut", False)):
        with pytest.raises(WrongState, match="the machine is stopped"):
            box.vm.save(path, end=end)


def test_a_suspend_waits_for_the_save_under_way(box, tmp_path, gate):
    checkpoint, suspend = box.vm.save(tmp_path / "first"), box.vm.save(tmp_path / "second", end=True)
    with pytest.raises(WrongState, match=r"a save to .*second is under way"):
        box.vm.save(tmp_path / "third")
    assert box.vm.saving() == tmp_path / "first" and not suspend.done()
    gate()
    assert checkpoint.result()["position"] < suspend.result()["position"]
    eventually(lambda: box.end)
    for file in ("first", "second"):
        verify(tmp_path / file)


def test_cancel_gives_up_what_waits_too(box, tmp_path, gate):
    saves = [box.vm.save(tmp_path / "first"), box.vm.save(tmp_path / "second", end=True)]
    assert box.vm.cancel() == tmp_path / "first"
    for each in saves:
        with pytest.raises(Cancelled):
            each.result()
    assert box.vm.cancel() is None and box.vm.state is State.RUNNING and not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["save", "checkpoint"])
def test_ctrl_c_in_the_middle_of_a_command_leaves_nobody_waiting(tmp_path, monkeypatch, method):
    """It comes when it comes: here, in the instant of a save."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with boot() as machine:
        vm, end = Supervisor(machine), list[BaseException]()

        def run() -> None:
            try:
                vm.run()
            except BaseException as error:
                end.append(error)

        monkeypatch.setattr(machine, "checkpoint", interrupted)
        runner = threading.Thread(target=run)
        runner.start()
        with pytest.raises(WrongState, match="the machine has ended: interrupted"):
            if method == "save":
                vm.save(tmp_path / "cut").result(20)
            else:
                vm.at_safe_point(lambda: machine.checkpoint(tmp_path / "cut")).result(20)
        runner.join()
        vm.close()
        assert isinstance(end[0], KeyboardInterrupt) and vm.state is State.STOPPED


def test_a_cpu_that_cannot_go_on_is_a_failure(monkeypatch):
    with boot() as machine:
        vm = Supervisor(machine)
        monkeypatch.setattr(machine.loop, "go_on", lambda: Fault(0x1000, "planted"))
        assert vm.run() == Fault(0x1000, "planted") and vm.state is State.FAILED
        vm.close()


# --- a command that was posted is done, whatever the machine's thread is about


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_what_is_posted_ends_a_machine_that_waits(paused, before):
    """For its beginning, for somebody to type, for the clock on the wall, for nothing."""
    with Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xfb\xf4\xeb\xfd", flat=True)) as machine:
        machine.loop.awaits_input = machine.loop.pace_real = True
        vm, stop = Supervisor(machine), list[object]()
        runner = threading.Thread(target=lambda: stop.append(vm.run(paused=paused)))
        if before:
            machine.post(lambda _: Stopped(StopReason.SIGTERM))
        runner.start()
        if not before:
            eventually(lambda: vm.state is not State.CREATED)
            machine.post(lambda _: Stopped(StopReason.SIGTERM))
        runner.join(20)
        vm.close()
        assert stop == [Stopped(StopReason.SIGTERM)]


def test_it_can_be_stopped_while_it_stands_still_for_a_save(box, tmp_path, gate):
    saved = box.vm.save(tmp_path / "cut", hold=True)
    eventually(lambda: box.vm.state is State.SAVING)
    assert box.call("stop") == {}
    eventually(lambda: box.end)
    gate()
    assert saved.result()["path"] == str(tmp_path / "cut")
    assert box.end == Stopped(StopReason.STOPPED)
    verify(tmp_path / "cut")


# --- the table


def test_no_move_but_the_tables():
    for start in State:
        for to in State:
            life = Lifecycle(lambda _: None)
            life._state = start
            if to in MOVES[start]:
                life.move(to)
                assert life.state is to
            else:
                with pytest.raises(AssertionError, match=f"no move from {start} to {to}"):
                    life.move(to)


def test_every_state_can_be_reached_and_every_living_one_left():
    reached = {State.CREATED}
    while more := {to for state in reached for to in MOVES[state]} - reached:
        reached |= more
    assert reached == set(State) and {State.STOPPED, State.FAILED} == set(State) - ALIVE
    assert all(State.STOPPED in MOVES[state] and State.FAILED in MOVES[state] for state in ALIVE)
