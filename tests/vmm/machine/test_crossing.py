"""A snapshot belongs to no backend: saved on one CPU it wakes on the other, and nothing comparable is lost."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading

import pytest

from tests.conftest import OWN
from tests.vmm.machine.crossing import (
    BOARDS,
    CARRIED,
    COMMAND,
    boot_debian,
    build_floats,
    save_debian_at_its_shell,
    sums,
)
from vmm.cpu.compare import differences
from vmm.errors import BackendError, GuestError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason

OTHER = {"emu": "kvm", "kvm": "emu"}
each_board = pytest.mark.parametrize("board", BOARDS)


def cross(machine, file, backend):
    """Save, wake on the other backend, and find the two equal in all that can be compared."""
    machine.save(file)
    woken = Machine.restore(file, backend, allow=("tsc-rate",))
    assert not differences(machine.cpu.save(), woken.cpu.save())
    ours, theirs = machine.states(), woken.states()
    for part in ours.keys() - {"cpu.0", "config", "clock"}:
        assert ours[part] == theirs[part], part
    for mine, other in zip(machine.ram.regions, woken.ram.regions, strict=True):
        assert mine.view == other.view
    assert woken.clock.now_ns() == machine.clock.now_ns()
    machine.close()
    return woken


def run_a_little(machine, draw):
    """To some safe point: on emu any instruction, on KVM wherever the guest is when asked to stop."""
    if machine.backend == "emu":
        assert machine.run(position=machine.position + draw.randrange(1, 40_000)) == Stopped(StopReason.POSITION)
        return
    timer = threading.Timer(draw.uniform(0, 0.01), machine.post, (lambda _: Stopped(StopReason.COMMAND),))
    timer.start()
    assert machine.run() == Stopped(StopReason.COMMAND)
    timer.join()


def crossings(start, board, tmp_path, count):
    draw = random.Random(f"crossing {start}")
    config = MachineConfig(memory_bytes=8 << 20, board=board)
    machine = Machine.boot(config, Image.from_files(OWN, flat=True), start)
    rounds = bytearray()
    for crossed in range(2 * count):
        run_a_little(machine, draw)
        rounds += machine.board.console.output
        machine = cross(machine, tmp_path / f"cut.{crossed % 2}", OTHER[machine.backend])
    machine.close()
    numbers = [int(number) for number in re.findall(rb"round (\d+) sum [0-9a-f]{16} ticks", rounds)]
    assert numbers == list(range(1, len(numbers) + 1)) and b"trap" not in rounds


@each_board
@pytest.mark.parametrize("start", ["emu", "kvm"])
def test_the_own_guest_crosses_again_and_again(crossing, start, board, tmp_path):
    crossings(start, board, tmp_path, 10)


@pytest.mark.slow
@each_board
@pytest.mark.parametrize("start", ["emu", "kvm"])
def test_the_own_guest_crosses_at_two_hundred_points_each_way(crossing, start, board, tmp_path):
    crossings(start, board, tmp_path, 200)


# --- Debian, with a program that keeps values in x87 and SSE registers


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    try:
        return build_floats(tmp_path_factory.mktemp("floats"))
    except GuestError as error:
        pytest.skip(str(error))


def at_the_shell(backend, board, debian, floats, tmp_path):
    """Booted here, or on the emulated CPU of the computer that made this one."""
    if backend == "kvm":
        machine = boot_debian(debian, floats, "kvm", board)
        assert machine.run(until="shell ready") == Stopped(StopReason.PATTERN)
        return machine
    if CARRIED[board].exists():
        return Machine.restore(CARRIED[board])
    save_debian_at_its_shell(debian, "emu", board, tmp_path / "booted")
    return Machine.restore(tmp_path / "booted")


@pytest.mark.debian
@each_board
@pytest.mark.parametrize("start", ["emu", "kvm"])
def test_debian_crosses_with_its_registers_full(crossing, debian, floats, start, board, tmp_path):
    machine = at_the_shell(start, board, debian, floats, tmp_path)
    machine.send(COMMAND)
    assert machine.run(until="half=anyhyve") == Stopped(StopReason.PATTERN)
    output = bytearray()
    for crossed in range(4):
        for _ in range(3):
            assert machine.run(until="sum [0-9a-f]{16}\r") == Stopped(StopReason.PATTERN)
        output += machine.board.console.output
        machine = cross(machine, tmp_path / f"cut.{crossed}", OTHER[machine.backend])
    machine.send(b"echo still=$kept\n")
    assert machine.run(until="still=anyhyve") == Stopped(StopReason.PATTERN)
    output += machine.board.console.output
    machine.close()
    found = re.findall(rb"sum ([0-9a-f]{16})\r\n", output)
    assert len(found) >= 8 and found == sums(floats, len(found))


@pytest.mark.debian
@each_board
def test_cut_in_mid_boot_and_at_the_shell_each_life_in_a_new_process(crossing, debian, floats, board, tmp_path):
    """On KVM, to the emulated CPU and back in between; a shell variable survives."""

    def live(file, typed, until, save):
        subprocess.run(
            [sys.executable, "-m", "anyhyve", "restore", file, "--backend", crossing, "--until", until, "--save", save],
            input=typed, check=True, capture_output=True,
        )  # fmt: skip

    machine = boot_debian(debian, floats, "kvm", board)
    timer = threading.Timer(8, machine.post, (lambda _: Stopped(StopReason.COMMAND),))
    timer.start()
    assert machine.run() == Stopped(StopReason.COMMAND)
    machine = cross(machine, tmp_path / "there", "emu")
    assert machine.run(position=machine.position + 200_000) == Stopped(StopReason.POSITION)
    machine.save(tmp_path / "back")
    machine.close()
    live(tmp_path / "back", b"", "shell ready", tmp_path / "shell")
    live(tmp_path / "shell", b"secret=anyhyve; echo set=$?\n", "set=0", tmp_path / "again")
    live(tmp_path / "again", b"echo kept=$secret\n", "kept=anyhyve", tmp_path / "last")


def test_the_tsc_rate_a_host_cannot_give_is_refused_by_name(kvm, tmp_path):
    file = tmp_path / "slow"
    config = MachineConfig(memory_bytes=16 << 20, tsc_khz=100_000)
    with Machine.boot(config, Image.from_files(OWN, flat=True)) as machine:
        machine.run(position=100_000)
        machine.save(file)
    try:
        Machine.check(file, kvm)
    except BackendError as error:
        assert "config.tsc_khz: kvm: this host cannot run the TSC at 100000 kHz" in str(error)
    else:
        pytest.skip("this host scales its TSC: it can give any rate")
    Machine.check(file, kvm, allow=("tsc-rate",))
    with Machine.restore(file, kvm, allow=("tsc-rate",)) as woken:
        assert woken.config.tsc_khz != 100_000
