"""Debian's unmodified cloud kernel: boots to a shell that answers, twice alike, and survives a cut anywhere."""

import json
import random
import subprocess
import sys
from functools import partial

import pytest

from tests.vmm.machine import where
from tests.vmm.machine.test_cut import cut_at
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason
from vmm.testing.cuts import cut_anywhere

pytestmark = pytest.mark.debian
CMDLINE = "console=ttyS0 mitigations=off"
SHELL = 4_600_000_000  # bytes of code from a vmlinux's start to its shell, near enough to draw positions from


def boot(folder, kernel="vmlinux"):
    image = Image.from_files(folder / kernel, folder / "initrd.img", CMDLINE)
    return Machine.boot(MachineConfig(memory_bytes=256 << 20), image)


def ask(machine, line, answer):
    machine.send(line.encode() + b"\n")
    assert machine.run(until=answer) == Stopped(StopReason.PATTERN)


@pytest.mark.parametrize("kernel", ["vmlinuz", "vmlinux"])
def test_boots_to_a_shell_that_answers(debian, kernel):
    with boot(debian, kernel) as machine:
        assert machine.run(until="shell ready") == Stopped(StopReason.PATTERN)
        ask(machine, "echo answer=$((6*7))", "answer=42")
        ask(machine, "uname -srm", r"Linux 6\.\d+.*x86_64")
        ask(machine, "seq 1 2000 | md5sum", "cd6fd5b81dce3eb9b29e1a1a5c2c2b15|[0-9a-f]{32}  -")
        ask(machine, "cat /proc/interrupts", "XT-PIC.*timer")
        machine.send(b"poweroff -f\n")
        assert machine.run() in (Stopped(StopReason.HALTED), Stopped(StopReason.RESET))


def test_saved_at_the_shell_it_answers_in_its_next_life(debian, tmp_path):
    with boot(debian) as machine:
        machine.run(until="shell ready")
        ask(machine, "secret=anyhyve; echo set=$?", "set=0")
        machine.save(tmp_path / "shell")
    for _ in range(2):
        with Machine.restore(tmp_path / "shell", verify=True) as machine:
            ask(machine, "echo kept=$secret", "kept=anyhyve")


@pytest.mark.parametrize("kernel", ["vmlinuz", pytest.param("vmlinux", marks=pytest.mark.slow)])
def test_two_processes_boot_alike(debian, kernel):
    command = [sys.executable, "-m", "anyhyve", "run", "--kernel", debian / kernel, "--initrd", debian / "initrd.img",
               "--append", CMDLINE, "--until", "shell ready", "--json"]  # fmt: skip
    first, second = (
        json.loads(subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL).stdout)
        for _ in range(2)
    )
    assert first["stopped"] == "pattern" and first["exits"]["port_in"] > 1000
    for volatile in (first, second):
        volatile.pop("wall_s")
    assert first == second


def test_cut_at_random_over_the_boot(debian, tmp_path):
    pick = random.Random(7)
    cut_at(partial(boot, debian), [pick.randrange(SHELL) for _ in range(2)], tmp_path, fresh={0, 1})


@pytest.mark.slow
def test_generation_three(debian, tmp_path):
    machine = boot(debian)
    for generation, position in enumerate((1_000_000_001, 2_000_000_001, 4_000_000_001)):
        assert machine.run(position=position) == Stopped(StopReason.POSITION)
        machine.save(tmp_path / f"{generation}")
        machine.close()
        machine = Machine.restore(tmp_path / f"{generation}")
    with machine, boot(debian) as undisturbed:
        for each in (machine, undisturbed):
            assert each.run(until="shell ready") == Stopped(StopReason.PATTERN)
        assert machine.digests() == undisturbed.digests() and machine.position == undisturbed.position


@pytest.mark.slow
def test_no_trace_at_five_hundred_cuts(debian, tmp_path):
    report = cut_anywhere(partial(boot, debian), end=SHELL, points=500, folder=tmp_path, seed="debian")
    print(f"{report.points} cuts, {report.wall_s / report.points * 1e3:.0f} ms each")


@pytest.mark.slow
def test_cut_fifty_times_over_the_boot(debian, tmp_path):
    """Of a bzImage, from its decompressor on, where copies are REP instructions, to the shell."""
    fresh = partial(boot, debian, "vmlinuz")
    with fresh() as machine:
        chosen = where.find(machine, where.rep, 4, 9_973)
        assert machine.run(until="Run /init") == Stopped(StopReason.PATTERN)
        chosen += where.find_handlers(machine, 4, 2) + where.find(machine, where.user, 12, 997)
    with fresh() as machine:
        assert machine.run(until="shell ready") == Stopped(StopReason.PATTERN)
        shell = machine.position
    chosen += where.find_halts(fresh, shell, 2)
    pick = random.Random(8)
    positions = [pick.randrange(shell) for _ in range(50 - len(chosen))] + chosen
    states = cut_at(fresh, positions, tmp_path, fresh=set(range(50)))
    assert sum(state.cs.selector & 3 == 3 for state in states) >= 10
    assert any(state.interrupt_shadow for state in states) and any(state.halted for state in states)
