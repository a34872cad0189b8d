"""What was spelt otherwise before: the old spelling does the same, and neither help nor completion shows it."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from click.shell_completion import ShellComplete

from tests.vmm.cli.test_control import catalog
from vmm.cli.main import main

OLD_AND_NEW = [  # N is a machine that runs, saved has CUT in the catalog
    ("resume saved --at 1200000 --pace max --json", "wake saved --at 1200000 --pace max --json"),
    ("resume nobody", "wake nobody"),
    ("snapshots --json", "catalog --json"),
    ("snapshots --vm saved --json", "catalog --name saved --json"),
    ("snapshots keep saved/CUT", "catalog keep saved/CUT"),
    ("snapshots keep --not saved/CUT", "catalog keep --not saved/CUT"),
    ("snapshots delete saved/nothing", "catalog delete saved/nothing"),
    ("snapshots prune saved", "catalog prune saved"),
    ("catalog --vm saved --json", "catalog --name saved --json"),
    ("catalog --vm ../saved", "catalog --name ../saved"),
    ("ctl N checkpoint FILE --stop --json", "ctl N checkpoint FILE --hold --json"),
    ("ctl --vm=N checkpoint FILE --stop --json", "ctl --vm=N checkpoint FILE --hold --json"),
]
VOLATILE = ("wall_s", "pause_s")


@pytest.fixture
def machines(named, anyhyve, environment):
    """N, which stands still, and what is saved of another."""
    named("N", "--paused", "--memory", "16M")
    catalog(environment, "saved").mkdir(parents=True)
    anyhyve("ctl", "N", "checkpoint", catalog(environment, "saved") / "cut.snapshot", check=True)


@pytest.mark.parametrize(("old", "new"), OLD_AND_NEW)
def test_the_old_does_as_the_new(machines, anyhyve, tmp_path, old, new):
    outcomes = []
    for command in (old, new):
        words = {"FILE": str(tmp_path / "file"), "saved/CUT": "saved/cut.snapshot"}
        done = anyhyve(*(words.get(word, word) for word in shlex.split(command)))
        assert b"Traceback" not in done.stderr and done.returncode in (0, 1), done.stderr
        outcomes.append((done.returncode, told(done.stdout), done.stderr))
    assert outcomes[0] == outcomes[1]


def told(output: bytes):
    """The output, but for what differs each time."""
    found = json.loads(output) if output.startswith((b"{", b"[")) else output
    return {key: value for key, value in found.items() if key not in VOLATILE} if isinstance(found, dict) else found


@pytest.mark.parametrize(("old", "new"), OLD_AND_NEW)
def test_the_old_is_not_shown(anyhyve, old, new):
    before, words = 0, list(zip(shlex.split(old), shlex.split(new), strict=True))
    while words[before][0] == words[before][1]:
        before += 1
    context, (gone, here) = [word for word, _ in words[:before]], words[before]
    shown = anyhyve(*context, "--help").stdout.decode()
    offered = {item.value for item in ShellComplete(main, {}, "anyhyve", "_").get_completions(context, here[:3])}
    offered |= {item.value for item in ShellComplete(main, {}, "anyhyve", "_").get_completions(context, gone[:3])}
    assert re.search(rf"^  {here}\b", shown, re.MULTILINE) and here in offered
    assert not re.search(rf"^  {gone}\b", shown, re.MULTILINE) and gone not in offered
