"""docs/device-authors-guide.md, run: the device is whole, small, versioned, passes the generic properties, and can be
put on a board, from pip to a guest's driver that reads it."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import types
from importlib.metadata import EntryPoint

import pytest

from anyhyve import DeviceConfig, MachineConfig
from snapshot import schema, versions
from tests.conftest import ROOT
from vmm.board import kinds
from vmm.board.config import named
from vmm.qtest.board import OurBoard, parse

TEXT = (ROOT / "docs" / "device-authors-guide.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.fixture(scope="module")
def guide():
    """The page's Python, run once: a state can be declared once only."""
    module = types.ModuleType("guide")
    sys.modules["guide"] = module
    for block in PYTHON:
        exec(compile(block, "guide", "exec"), module.__dict__)
    yield module
    del sys.modules["guide"]


def test_the_device_is_small():
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) < 60


def test_a_state_of_version_1_is_read(guide):
    old = schema.encode(guide.WatchdogV1(fed_ns=7, seconds=3))
    new = versions.decode("watchdog", 1, old, guide.WatchdogState)
    assert new == guide.WatchdogState(fed_ns=7, period_ms=255)


def test_the_way_by_a_function(guide):
    (call,) = re.findall(r"`(check_device\(lambda .*?)`\.", TEXT)
    exec(call, guide.__dict__)


def test_it_is_put_on_a_board_as_shown(guide, monkeypatch):
    (toml,) = re.findall(r"```toml\n(.*?)```", TEXT, re.S)
    ((name, _),) = tomllib.loads(toml)["project"]["entry-points"][kinds.GROUP].items()
    monkeypatch.setattr(kinds, "_theirs", lambda: {name: EntryPoint(name, "guide:KIND", kinds.GROUP)})
    (spec,) = re.findall(r"--device (\S+)", TEXT)
    try:
        board = OurBoard(MachineConfig(devices=named([DeviceConfig.parse(spec)])))
        answers = [board.play(command) for _, command in parse("outb 0x2a9 5\nclock_step 5000000\ninb 0x2a8")]
    finally:
        kinds.kind.cache_clear()
    assert answers[-1] == 1, "it barks"
    assert board.board.pics.master.state.lines == 1 << 5


@pytest.mark.no_roundtrip("it runs in other processes")
def test_from_pip_to_a_guests_driver(tmp_path):
    """The package as it is shown is built and installed, without a network and into a folder of its own; then the
    commands are given, and say what is shown."""
    pytest.importorskip("hatchling", reason="no hatchling here: pip install 'anyhyve[dev]'")
    for tool in ("as", "objcopy"):
        if shutil.which(tool) is None or platform.machine() != "x86_64":
            pytest.skip(f"no {tool} for x86-64 here (Debian: binutils)")
    device, _, kind = PYTHON
    blocks = {"acme_watchdog.py": f"{device}\n\n{kind}"}
    (blocks["pyproject.toml"],) = re.findall(r"```toml\n(.*?)```", TEXT, re.S)
    (blocks["driver.S"],) = re.findall(r"```asm\n(.*?)```", TEXT, re.S)
    for name, text in blocks.items():
        (tmp_path / name).write_text(text)
    site = tmp_path / "site"
    offline = ["--no-index", "--no-build-isolation", "--no-deps", "--target", str(site)]
    commands = {
        "pip": [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"],
        "anyhyve": [sys.executable, "-m", "anyhyve"],
    }
    where = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}
    (shown,) = re.findall(r"```console\n(\$ pip.*?)```", TEXT, re.S)
    for step in shown.removeprefix("$ ").split("\n$ "):
        command, _, wanted = step.partition("\n")
        name, *words = command.partition("#")[0].split()
        words += offline if name == "pip" else []
        done = subprocess.run(
            [*commands.get(name, [name]), *words], cwd=tmp_path, env=where, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        if name == "anyhyve" and words[0] == "devices":
            assert done.stdout.startswith("## watchdog\n\nA watchdog timer.\n") and "set_period" in done.stdout
        elif wanted:
            assert (done.stdout + done.stderr).split() == wanted.split()
