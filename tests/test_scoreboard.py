"""docs/scoreboard.md is whole: every field has its row, and something found it."""

from __future__ import annotations

import re

import pytest

from tests import scoreboard
from tests.conftest import ROOT
from vmm.board import SLOTS
from vmm.cpu import CpuState
from vmm.testing import device_machine

ROWS = re.findall(
    r"^\| (\w+) \| ([\w.]+) \| (.*?) \| ([\d.]+) \|$", (ROOT / "docs" / "scoreboard.md").read_text(), re.M
)


def test_every_field_has_its_row_and_is_found():
    states = {slot.device.__name__: slot.device.State for slot in SLOTS} | {"CPU": CpuState}
    fields = {(part, ".".join(path)) for part, state in states.items() for path in scoreboard.paths(state)}
    assert {(part, field) for part, field, _, _ in ROWS} == fields
    assert not [row for row in ROWS if row[2] == scoreboard.MISSED]


@pytest.mark.parametrize(
    ("device", "field"), [("Pit", "counters.latch"), ("Uart", "scr"), ("Rtc", "index"), ("Pic", "imr")]
)
def test_a_row_is_true(device, field):
    subject, path = scoreboard.SUBJECTS[device], tuple(field.split("."))
    assert path in scoreboard.paths(subject.device.State)
    assert scoreboard.seen(device_machine(subject, spoil=scoreboard.forget(subject.device.State, path)))
    assert scoreboard.seen(device_machine(subject)) is None


@pytest.mark.slow
def test_the_whole_board():
    assert not [row for row in (*scoreboard.devices(), *scoreboard.cpu()) if row.caught == scoreboard.MISSED]
