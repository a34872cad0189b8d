"""docs/scoreboard.md is whole: every field has its row, and something found it."""

from __future__ import annotations

import re
from contextlib import closing

import pytest

from tests import acting, known_bugs, scoreboard
from tests.conftest import ROOT
from tests.fields import forget, paths
from tests.vmm.cpu.campaign import Bench
from vmm.cpu.protocol import CpuState
from vmm.testing import device_machine

TEXT = (ROOT / "docs" / "scoreboard.md").read_text()
ROWS = re.findall(r"^\| (\w+) \| ([\w.]+) \| ([^|]+) \| ([\d.]+) \|$", TEXT, re.M)


def test_every_field_has_its_row_and_is_found():
    states = {name: subject.device.State for name, subject in scoreboard.SUBJECTS.items()} | {"CPU": CpuState}
    fields = {(part, ".".join(path)) for part, state in states.items() for path in paths(state)}
    assert {(part, field) for part, field, _, _ in ROWS} == fields
    assert not [row for row in ROWS if row[2] == scoreboard.MISSED]


ACTING = re.findall(r"^\| ([\w.]+) \| ([^|]+) \| [\d.]+ \|$", TEXT, re.M)


def test_every_field_of_the_cpu_has_its_row_of_what_acts():
    assert [field for field, _ in ACTING] == [".".join(path) for path in paths(CpuState)]


@pytest.mark.parametrize("field", ["rip", "rflags", "cs.selector", "tr.base", "dr7", *acting.PROGRAMS])
def test_a_field_acts(field):
    assert dict(ACTING)[field] != acting.ALONE
    with closing(Bench()) as never, closing(Bench()) as woken:
        assert acting.acted(never, woken, tuple(field.split("."))) != acting.ALONE


@pytest.mark.parametrize(("device", "field"), [("Uart", "scr"), ("Pic", "imr")])
def test_a_row_is_true(device, field):
    subject, path = scoreboard.SUBJECTS[device], tuple(field.split("."))
    assert path in paths(subject.device.State)
    assert scoreboard.seen(device_machine(subject, spoil=forget(subject.device.State, path)))
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
