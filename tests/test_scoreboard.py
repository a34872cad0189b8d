"""docs/scoreboard.md is whole: every field has its row, and something found it."""

from __future__ import annotations

import re

import pytest

from tests import known_bugs, scoreboard
from tests.conftest import ROOT
from vmm.board.isapc import CHIPS
from vmm.cpu.protocol import CpuState
from vmm.testing import device_machine

TEXT = (ROOT / "docs" / "scoreboard.md").read_text()
ROWS = re.findall(r"^\| (\w+) \| ([\w.]+) \| ([^|]+) \| ([\d.]+) \|$", TEXT, re.M)


def test_every_field_has_its_row_and_is_found():
    states = {slot.device.__name__: slot.device.State for slot in CHIPS} | {"CPU": CpuState}
    fields = {(part, ".".join(path)) for part, state in states.items() for path in scoreboard.paths(state)}
    assert {(part, field) for part, field, _, _ in ROWS} == fields
    assert not [row for row in ROWS if row[2] == scoreboard.MISSED]


@pytest.mark.parametrize(("device", "field"), [("Uart", "scr"), ("Pic", "imr")])
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


RARE = "an interrupt appears: THR empty"  # it takes many examples


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, id=bug.what, marks=pytest.mark.slow if bug.what == RARE else ()) for bug in known_bugs.BUGS],
)
def test_a_bug_others_had_is_found(bug):
    assert known_bugs.find(bug) is not None


OF_MACHINES = sorted(
    {bug.property for bug in known_bugs.BUGS if not bug.property.__name__.startswith("device_machine")},
    key=lambda p: p.__name__,
)


@pytest.mark.parametrize("property", OF_MACHINES, ids=lambda p: p.__name__)
def test_without_a_bug_nothing_is_found(property):
    property()


@pytest.mark.slow
def test_the_whole_board():
    assert not [row for row in (*scoreboard.devices(), *scoreboard.cpu()) if row.caught == scoreboard.MISSED]
