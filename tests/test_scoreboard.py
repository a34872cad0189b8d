"""docs/scoreboard.md is whole: every field has its row, and something found it."""

from __future__ import annotations

import re

import pytest

from tests import known_bugs, scoreboard
from tests.conftest import ROOT
from vmm.board import SLOTS
from vmm.cpu import CpuState
from vmm.testing import device_machine

TEXT = (ROOT / "docs" / "scoreboard.md").read_text()
ROWS = re.findall(r"^\| (\w+) \| ([\w.]+) \| ([^|]+) \| ([\d.]+) \|$", TEXT, re.M)


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


BUGS = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| ([^|]+) \| [\d.]+ \|$", TEXT, re.M)


def test_every_bug_has_its_row_and_is_found():
    rows = [row for row in BUGS if row[0] != "bug"]
    assert [what for what, _ in rows] == [bug.what for bug in known_bugs.BUGS]
    assert not [row for row in rows if row[1] == scoreboard.MISSED]


@pytest.mark.parametrize("bug", known_bugs.BUGS, ids=lambda bug: bug.what)
def test_a_bug_others_had_is_found(bug):
    assert known_bugs.find(bug) is not None


@pytest.mark.parametrize(
    "property", {bug.property.__name__: bug.property for bug in known_bugs.BUGS}.values(), ids=lambda p: p.__name__
)
def test_without_it_nothing_is_found(property):
    property()


@pytest.mark.slow
def test_the_whole_board():
    assert not [row for row in (*scoreboard.devices(), *scoreboard.cpu()) if row.caught == scoreboard.MISSED]
