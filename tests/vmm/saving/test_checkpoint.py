"""A checkpoint changes nothing, and its file is the machine at one instant, while the guest runs on."""

from __future__ import annotations

import threading
import time

import pytest

from snapshot.verify import verify
from tests.conftest import OWN
from vmm.control.client import Client
from vmm.control.place import Place
from vmm.control.server import Server
from vmm.control.supervisor import Supervisor
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason
from vmm.machine.run import Goal


def run_on(machine: Machine) -> None:
    """So far that it dirties what is being written."""
    if machine.backend == "emu":
        machine.run(position=machine.position + 30_000)
        return
    timer = threading.Timer(0.01, machine.post, (lambda _: Stopped(StopReason.COMMAND),))
    timer.start()
    assert machine.run() == Stopped(StopReason.COMMAND)
    timer.join()


def live_is_full_stop(backend, tmp_path, count):
    with Machine.boot(MachineConfig(memory_bytes=8 << 20), Image.from_files(OWN, flat=True), backend) as machine:
        for n in range(count):
            run_on(machine)
            packed, parent = n % 3 == 1, tmp_path / "parent" if n % 3 == 2 else None
            live = machine.checkpoint(tmp_path / "live", packed=packed, parent=parent)
            machine.save(tmp_path / "stop", packed=packed, parent=parent)
            before = machine.clock.now_ns()
            run_on(machine)
            assert machine.clock.now_ns() > before
            live.wait()
            assert (tmp_path / "live").read_bytes() == (tmp_path / "stop").read_bytes(), n
            (tmp_path / "stop").rename(tmp_path / "parent")


def test_a_live_checkpoint_is_the_file_a_full_stop_writes(tmp_path):
    live_is_full_stop("emu", tmp_path, 100)


def test_a_live_checkpoint_is_the_file_a_full_stop_writes_on_kvm(crossing, tmp_path):
    live_is_full_stop(crossing, tmp_path, 12)


def boot(debian) -> Machine:
    image = Image.from_files(debian / "vmlinux", debian / "initrd.img", "console=ttyS0 mitigations=off quiet")
    return Machine.boot(MachineConfig(memory_bytes=128 << 20), image)


@pytest.mark.debian
@pytest.mark.parametrize("count", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_checkpoints_in_a_loop_during_a_boot(debian, tmp_path, count):
    """Over the socket; each is written while the guest boots on, verifies, wakes and comes to the shell. And the boot's
    own result is that of one nobody disturbed."""
    with boot(debian) as machine:
        assert machine.run(until="shell ready") == Stopped(StopReason.PATTERN)
        undisturbed = machine.digests(), bytes(machine.board.console.output)
    (tmp_path / "run").mkdir(mode=0o700)
    with boot(debian) as machine:
        vm, stops = Supervisor(machine), []
        runner = threading.Thread(target=lambda: stops.append(vm.run(Goal(until="shell ready"))))
        with Server(vm, Place(tmp_path / "run", "box")), Client(tmp_path / "run", "box") as client:
            runner.start()
            while client.call("status")["state"] == "created":  # the thread has not come to its run yet
                time.sleep(0.01)
            for n in range(count):
                file, position = tmp_path / "cut", client.call("status")["position"]
                call = client.ask("checkpoint", path=str(file))
                time.sleep(0.4 / count)
                client.ask("pause")  # the boot shall not be over before the last
                answers = {(message := client.read())["id"]: message for _ in range(2)}
                assert "result" in answers[call], answers
                assert answers[call]["result"]["position"] >= position, answers
                verify(file)
                with Machine.restore(file) as woken:
                    assert woken.run(until="shell ready") == Stopped(StopReason.PATTERN), n
                    assert woken.digests() == undisturbed[0], n
                assert client.call("resume") == {"changed": True}
                time.sleep(0.2 / count)
            runner.join()
        assert stops == [Stopped(StopReason.PATTERN)]
        assert (machine.digests(), bytes(machine.board.console.output)) == undisturbed
