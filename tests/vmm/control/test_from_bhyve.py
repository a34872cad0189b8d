"""Every row of docs/from-bhyve.md is run, and has the outcome it names."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.conftest import OWN, ROOT
from tests.vmm.conftest import eventually

ROW = re.compile(r"\| (.*?) \| `anyhyve (.*?)` \| exit (\d)(?:, `(.*?)`)? \|")
ROWS = [match.groups() for line in (ROOT / "docs" / "from-bhyve.md").open() if (match := ROW.match(line))]


def test_no_row_is_forgotten():
    table = [line for line in (ROOT / "docs" / "from-bhyve.md").open() if line.startswith("| ") and "`anyhyve" in line]
    assert len(ROWS) == len(table) > 15


@pytest.mark.parametrize(("bhyve", "command", "status", "words"), ROWS, ids=[row[1] for row in ROWS])
def test_row(named, anyhyve, tmp_path, bhyve, command, status, words):
    file = tmp_path / "saved"
    wakes = "-r " in command or " show " in f" {command} "
    machine = named("N", "--memory", "16M")
    if wakes:
        anyhyve("ctl", "N", "suspend", file, check=True)
        eventually(lambda: machine.poll() is not None)
    words_of = {"FILE": str(file), "/proc/FILE": "/proc/here", "KERNEL": str(OWN)}
    arguments = [
        re.sub(r"(/proc/)?\b(FILE|KERNEL)\b", lambda m: words_of[m[0]], argument) for argument in shlex.split(command)
    ]
    done = anyhyve(*arguments)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == int(status), said
    assert (words or "").replace("FILE", str(file)) in said
    ends = any(word in command for word in ("--suspend", "--destroy", "--force-poweroff", "stop"))
    if ends:
        assert eventually(lambda: machine.poll() is not None) and machine.returncode == 0
    elif not wakes:
        assert machine.poll() is None, "it runs on"
