"""The lane never takes silence for success."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.emulated_kvm import __main__ as lane
from tests.emulated_kvm.__main__ import Console, Phases, script


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_tests_output_and_status_come_through(capsys, size):
    stream = "BIOS\r\nlane: up\r\nlane: kvm\r\n...F [100%]\r\n1 failed in 2 s\r\nlane: status 1\r\nreboot\r\n"
    console = Console(Phases())
    for at in range(0, len(stream), size):
        console.take(stream[at : at + size])
    assert console.status == 1
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("lane: ")]
    assert shown == ["...F [100%]", "1 failed in 2 s"]


@pytest.mark.parametrize("stream", ["", "lane: up\n", "lane: kvm\n5 passed\n", "lane: status", "lane: status \n"])
def test_a_status_that_never_came_is_none(stream):
    console = Console(Phases())
    console.take(stream)
    assert console.status is None


def test_the_command_asks_for_kvm():
    assert "--require-kvm" in script(["-m", "kvm"])


HANG = """
import sys
from pathlib import Path
from tests.emulated_kvm import __main__ as lane
lane.ALIVE = Path(sys.argv[1], "alive")
lane.QEMU = sys.argv[1] + "/qemu"
lane.leave_at_sigterm()
lane.run(Path("vmlinuz"), Path("initrd"), 600, lane.Phases())
"""


def test_sigterm_takes_the_computer_along(tmp_path):
    fake = tmp_path / "qemu"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 600\n")
    fake.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", HANG, tmp_path]) as process:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_status_counts_though_the_computer_then_stands_still(tmp_path, monkeypatch):
    fake = tmp_path / "qemu"
    fake.write_text("#!/bin/sh\necho lane: up; echo lane: kvm; echo lane: status 1; exec sleep 600\n")
    fake.chmod(0o755)
    monkeypatch.setattr(lane, "QEMU", str(fake))
    monkeypatch.setattr(lane, "ALIVE", tmp_path / "alive")
    monkeypatch.setattr(lane, "STILL_S", 1)
    assert lane.run(Path("vmlinuz"), Path("initrd"), 600, Phases()) == 1
