"""Debian's unmodified kernels on several CPUs of board "pc"."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial

import pytest

from tests.vmm.machine import stress
from tests.vmm.machine.test_debian_pc import CMDLINE, packaged, warnings
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason
from vmm.testing.cuts import cut_anywhere
from vmm.testing.expect import Expect

pytestmark = pytest.mark.debian
STRESSORS = {"cpu": 40, "matrix": 400, "fork": 200, "futex": 4000, "pipe": 20_000, "switch": 4000}
SHELL = 4_560_000_000  # bytes of code to its shell, near enough to draw positions from
CPUS = 4


def boot(folder, cpus=CPUS, kernel="vmlinux", more=""):
    image = Image.from_files(folder / kernel, folder / "initrd.img", f"{CMDLINE} {more}")
    return Machine.boot(MachineConfig(memory_bytes=256 << 20, board="pc", cpus=cpus), image)


def counted(console, name):
    """A row of /proc/interrupts, by CPU."""
    text = console.run("cat /proc/interrupts")
    row = next(line for line in text.splitlines() if line.strip().startswith(f"{name}:"))
    return [int(word) for word in row.split()[1:] if word.isdigit()]


def test_four_cpus(debian, tmp_path):
    """They are brought up, get their timers' and each other's interrupts, can be taken down, and the machine is saved
    and woken as one."""
    with boot(debian) as machine:
        console = Expect(machine)
        console.expect("shell ready")
        assert console.run("nproc") == "4\n"
        assert not warnings(console.run("dmesg -r"))
        assert all(count > 50 for count in counted(console, "LOC")) and len(counted(console, "LOC")) == CPUS
        assert sum(counted(console, "RES")) > 20 and sum(counted(console, "CAL")) > 50
        machine.save(tmp_path / "four")
        position = machine.position
    with Machine.restore(tmp_path / "four") as machine:
        assert machine.position == position
        console = Expect(machine)
        console.run("echo 0 > /sys/devices/system/cpu/cpu2/online")
        assert console.run("nproc; grep -c ^processor /proc/cpuinfo") == "3\n3\n"
        console.run("echo 1 > /sys/devices/system/cpu/cpu2/online")
        assert console.run("nproc") == "4\n"
        console.run("echo l > /proc/sysrq-trigger")
        assert sum(counted(console, "NMI")) >= CPUS - 1
        for cpu in range(CPUS):
            assert console.run(f"taskset {1 << cpu:x} grep -c processor /proc/cpuinfo") == "4\n"
        console.send("poweroff -f\n")
        assert machine.run(until_ns=machine.clock.now_ns() + 5_000_000_000) == Stopped(StopReason.EXIT, 0)


def test_a_guest_that_resets(debian):
    """All begin again, and the others wait for the first."""
    with boot(debian) as machine:
        assert machine.run(until="shell ready") == Stopped(StopReason.PATTERN)
        Expect(machine).send("reboot -f\n")
        assert machine.run(until_ns=machine.clock.now_ns() + 5_000_000_000) == Stopped(StopReason.RESET)
        machine.restart()
        assert machine.run(until="shell ready") == Stopped(StopReason.PATTERN)
        assert Expect(machine).run("nproc") == "4\n"


TWICE = """
import sys
from pathlib import Path
from tests.vmm.machine.test_debian_smp import boot
with boot(Path(sys.argv[1])) as machine:
    machine.run(until="shell ready")
    print(machine.position, machine.digests())
"""


def test_two_processes_boot_alike(debian):
    first, second = (
        subprocess.run([sys.executable, "-c", TWICE, debian], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first == second != ""


@pytest.mark.no_roundtrip("it cuts by itself")
@pytest.mark.parametrize("points", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_cut_over_the_boot(debian, tmp_path, points):
    report = cut_anywhere(partial(boot, debian), end=SHELL, points=points, folder=tmp_path, seed="smp", fresh=10)
    assert report.points == points


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [2, 8])
@pytest.mark.parametrize("package", ["", "linux-image-amd64", "linux-image-rt-amd64"])
def test_other_kernels_and_numbers(debian, package, cpus):
    kernel = packaged(debian, package) if package else (debian / "vmlinux").read_bytes()
    image = Image(kernel, initrd=(debian / "initrd.img").read_bytes(), cmdline=CMDLINE)
    with Machine.boot(MachineConfig(memory_bytes=512 << 20, board="pc", cpus=cpus), image) as machine:
        console = Expect(machine, seconds=240)
        console.expect("shell ready")
        assert console.run("nproc") == f"{cpus}\n"
        assert not warnings(console.run("dmesg -r"))
        console.send("poweroff -f\n")
        assert machine.run() == Stopped(StopReason.EXIT, 0)


@pytest.mark.slow
def test_code_that_the_kernel_writes_over(debian):
    """ftrace puts a call into each function of the kernel and takes it out again, and every CPU runs what is there."""
    with boot(debian) as machine:
        console = Expect(machine, seconds=600)
        console.expect("shell ready")
        console.run("mount -t tracefs none /sys/kernel/tracing")
        assert int(console.run("wc -l < /sys/kernel/tracing/available_filter_functions")) > 20_000
        for _ in range(2):
            console.run("cd /sys/kernel/tracing && echo function > current_tracer")
            console.run("for mask in 1 2 4 8; do taskset $mask ls / > /dev/null; done")
            console.run("echo 0 > /sys/kernel/tracing/tracing_on")
            for cpu in range(CPUS):
                assert int(console.run(f"grep -c '\\[00{cpu}\\]' /sys/kernel/tracing/trace")) > 1000
            console.run("cd /sys/kernel/tracing && echo nop > current_tracer && echo 1 > tracing_on && echo > trace")
            console.run("for mask in 1 2 4 8; do taskset $mask ls / > /dev/null; done")
            assert console.run("grep -vc '^#' /sys/kernel/tracing/trace; true") == "0\n"
        assert not warnings(console.run("dmesg -r"))


@pytest.mark.slow
def test_programs_that_check_what_they_compute(debian, tmp_path):
    """stress-ng on four CPUs: arithmetic, new processes, locks, pipes and changes of context."""
    more = stress.archive(tmp_path / "stress")
    initrd = (debian / "initrd.img").read_bytes() + more
    image = Image((debian / "vmlinux").read_bytes(), initrd=initrd, cmdline=CMDLINE)
    with Machine.boot(MachineConfig(memory_bytes=512 << 20, board="pc", cpus=CPUS), image) as machine:
        console = Expect(machine, seconds=3000)
        console.expect("shell ready")
        console.run("mkdir -p /lib64 && ln -s /stress/lib/ld-linux-x86-64.so.2 /lib64/")
        for stressor, ops in STRESSORS.items():
            done = console.run(
                f"cd /tmp && LD_LIBRARY_PATH=/stress/lib /stress/stress-ng --{stressor} {CPUS} --{stressor}-ops {ops}"
                " --verify --metrics-brief 2>&1; echo status $?"
            )
            assert "status 0" in done and "successful run completed" in done, done
        assert not warnings(console.run("dmesg -r"))


COUNT = "i=0; s=0; while :; do i=$((i+1)); s=$((s+i)); echo cpu$0 $i $s; done"
SUMS = f"for c in 0 1; do taskset $((1 << c)) sh -c '{COUNT}' $c & done"


@pytest.mark.slow
@pytest.mark.no_roundtrip("it goes from one backend to the other")
@pytest.mark.parametrize("start", ["emu", "kvm"])
def test_two_cpus_cross_to_the_other_backend_and_back(crossing, debian, tmp_path, start):
    """Booted on one, saved at the shell and among two running sums, each on a CPU of its own."""
    image = Image.from_files(debian / "vmlinux", debian / "initrd.img", CMDLINE)
    config = MachineConfig(memory_bytes=256 << 20, board="pc", cpus=2)
    machine = Machine.boot(config, image, start)
    assert machine.run(until="shell ready") == Stopped(StopReason.PATTERN)
    shown = bytearray()
    for life, backend in enumerate((crossing, "emu", crossing, "emu")):
        backend = backend if start == "emu" else "emu" if backend != "emu" else crossing
        machine.save(tmp_path / f"{life}")
        machine.close()
        machine = Machine.restore(tmp_path / f"{life}", backend, allow=("tsc-rate",))
        if not life:
            assert Expect(machine, seconds=3000).run("nproc") == "2\n"
            machine.send(f"{SUMS}\n")
        for cpu in (0, 1, 0, 1):
            assert machine.run(until=f"cpu{cpu} [0-9]+ [0-9]+\r") == Stopped(StopReason.PATTERN)
        shown += machine.board.console.output
    machine.close()
    for cpu in (0, 1):
        said = re.findall(rb"cpu%d (\d+) (\d+)\r" % cpu, shown)
        numbers = [int(number) for number, _ in said]
        assert numbers == sorted(numbers) and len(numbers) > 4
        assert all(int(total) == int(number) * (int(number) + 1) // 2 for number, total in said)
