"""The lane never takes silence for success."""

import pytest

from tests.lane.__main__ import Console, Phases, script


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
