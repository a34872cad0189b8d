"""Debian's unmodified cloud kernel on board "pc": its interrupts come by APICs, its devices by PCI and ACPI."""

from __future__ import annotations

import random
from functools import partial

import pytest

from tests.vmm.machine.test_cut import cut_at
from vmm.errors import GuestError
from vmm.guest.debian import extract_vmlinux, kernel_files
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason
from vmm.testing.cuts import cut_anywhere
from vmm.testing.expect import Expect

pytestmark = pytest.mark.debian
CMDLINE = "console=ttyS0 mitigations=off"
SHELL = 4_600_000_000  # bytes of code to its shell, near enough to draw positions from


def boot(folder, more=""):
    image = Image.from_files(folder / "vmlinux", folder / "initrd.img", f"{CMDLINE} {more}")
    return Machine.boot(MachineConfig(memory_bytes=256 << 20, board="pc"), image)


# What a 440FX cannot have: its configuration space ends at 256 bytes.
NO_ECAM = "can't access extended PCI configuration space"


def warnings(log):
    """Of `dmesg -r`: what is a warning or worse."""
    return [
        line for line in log.splitlines() if line[:3] in ("<0>", "<1>", "<2>", "<3>", "<4>") and NO_ECAM not in line
    ]


def lines_of(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_a_pc_of_this_century(debian, tmp_path):
    with boot(debian) as machine:
        console = Expect(machine)
        console.expect("shell ready")
        interrupts, log = console.run("cat /proc/interrupts"), console.run("dmesg -r")
        for words in (("IO-APIC", "2-edge", "timer"), ("IO-APIC", "4-edge", "ttyS0"), ("IO-APIC", "9-fasteoi", "acpi")):
            assert lines_of(interrupts, *words), interrupts
        (local,) = lines_of(interrupts, "Local timer interrupts")
        assert int(local.split()[1]) > 50, "time goes on by the local APIC's timer"
        for said in (
            "ACPI: Interpreter enabled", "PM: (supports S0 S5)", "TSC deadline timer available",
            "hpet0: 3 comparators, 64-bit 100.000000 MHz counter", "Using IOAPIC for interrupt routing",
            "[8086:1237]", "[8086:7000]", "[8086:7113]",
        ):  # fmt: skip
            assert said in log, said
        assert not warnings(log)
        for file, identity in (("00:00.0", "0x12378086"), ("00:01.0", "0x70008086"), ("00:01.3", "0x71138086")):
            there = console.run(f"cat /sys/bus/pci/devices/0000:{file}/device /sys/bus/pci/devices/0000:{file}/vendor")
            device, vendor = there.split()
            assert device + vendor[2:] == identity
        assert (
            console.run("cd /sys/class/dmi/id; cat sys_vendor product_name bios_vendor; cd")
            == "anyhyve\nanyhyve pc\nanyhyve\n"
        )
        console.run("sleep 1")
        machine.save(tmp_path / "shell")
        console.send("poweroff -f\n")
        assert machine.run() == Stopped(StopReason.EXIT, 0)
    with Machine.restore(tmp_path / "shell", verify=True) as machine:
        woken = Expect(machine)
        assert woken.run("cat /proc/uptime") and woken.run("sleep 1; echo on") == "on\n"
        woken.send("reboot -f\n")
        assert machine.run() == Stopped(StopReason.RESET)


def packaged(debian, package):
    """The vmlinux of a kernel's package, fetched beside the guest."""
    folder = debian.parent / package
    try:
        kernel_files(folder, ["boot/vmlinuz-*"], kernels=[package])
    except GuestError as error:
        pytest.skip(f"no {package}: {error}")
    return extract_vmlinux((folder / "vmlinuz").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("package", ["linux-image-amd64", "linux-image-rt-amd64"])
def test_debians_other_kernels(debian, package):
    """The one for any computer, and the one that runs all interrupts as threads."""
    kernel = packaged(debian, package)
    image = Image(kernel, initrd=(debian / "initrd.img").read_bytes(), cmdline=CMDLINE)
    with Machine.boot(MachineConfig(memory_bytes=512 << 20, board="pc"), image) as machine:
        console = Expect(machine, seconds=240)
        console.expect("shell ready")
        assert not warnings(console.run("dmesg -r"))
        assert lines_of(console.run("cat /proc/interrupts"), "IO-APIC", "ttyS0")
        assert console.run("sleep 1; echo $((6*7))") == "42\n"
        console.send("poweroff -f\n")
        assert machine.run() == Stopped(StopReason.EXIT, 0)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["noapic", "nolapic", "acpi=off", "hpet=force", "nohpet", "nolapic_timer", "notsc"])
def test_with_less_of_it(debian, more):
    with boot(debian, more) as machine:
        console = Expect(machine, seconds=120)
        console.expect("shell ready")
        assert console.run("sleep 1; echo $((6*7))") == "42\n"


def test_cut_over_the_boot(debian, tmp_path):
    pick = random.Random(16)
    cut_at(partial(boot, debian), [pick.randrange(SHELL) for _ in range(2)], tmp_path, fresh={0, 1})


@pytest.mark.slow
def test_no_trace_at_three_hundred_cuts(debian, tmp_path):
    report = cut_anywhere(partial(boot, debian), end=SHELL, points=300, folder=tmp_path, seed="pc")
    print(f"{report.points} cuts, {report.wall_s / report.points * 1e3:.0f} ms each")
