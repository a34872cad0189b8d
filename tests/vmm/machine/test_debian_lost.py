"""A real kernel that goes no further: it ends what waits for it, and the line that says why is named."""

from __future__ import annotations

import pytest

from vmm.errors import GuestError
from vmm.guest.image import Image
from vmm.guest.lost import LOST
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason
from vmm.testing.expect import Expect

pytestmark = [pytest.mark.debian, pytest.mark.no_roundtrip("its machines end")]
APPEND = "console=ttyS0 mitigations=off"
PANIC = "Kernel panic - not syncing: "


def boot(debian, append="", initrd=True):
    image = Image.from_files(debian / "vmlinux", debian / "initrd.img" if initrd else None, f"{APPEND} {append}")
    return Machine.boot(MachineConfig(memory_bytes=256 << 20), image)


@pytest.mark.parametrize(
    ("append", "initrd", "why"),
    [
        ("", False, PANIC + "VFS: Unable to mount root fs on unknown-block"),
        ("rdinit=/nowhere/init", True, PANIC + "VFS: Unable to mount root fs on unknown-block"),
        ("rdinit=/bin/busybox -- false", True, PANIC + "Attempted to kill init! exitcode=0x00000100"),
    ],
    ids=["no initrd", "no init in it", "init is killed"],
)
def test_a_boot_that_comes_to_nothing(debian, append, initrd, why):
    with boot(debian, append, initrd) as machine:
        stop = machine.run(until="never", lost=LOST)
        assert isinstance(stop, Stopped) and stop.reason is StopReason.PANIC and why in stop.why


@pytest.fixture(scope="module")
def booted(debian):
    with boot(debian, "reboot=t") as machine:
        Expect(machine).expect("shell ready")
        yield machine, machine.moment()


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("echo c >/proc/sysrq-trigger", "it is lost: .*sysrq|it is lost: .*Kernel panic|it is lost: .*Oops"),
        ("echo b >/proc/sysrq-trigger", "it ended with triple fault"),
        ("halt -f", "it halted with interrupts off"),
        ("echo 'BUG: this is a test' >/dev/kmsg", "it is lost: .*BUG: this is a test"),
    ],
    ids=["a crash", "a triple fault", "CLI and HLT", "a bug"],
)
def test_a_guest_that_was_up(booted, typed, why):
    machine, moment = booted
    machine.rewind(moment)
    talk = Expect(machine)
    talk.send(typed + "\n")
    with pytest.raises(GuestError, match=f"the guest never said 'never': (?:{why})"):
        talk.expect("never")
