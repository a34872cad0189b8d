"""Whatever is typed: an answer of one line and an exit status, never a traceback. Over every command there is."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.cli.main import main
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig


def commands(command: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that is no group, by its words."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    with click.Context(command) as context:
        name = ("nobody",) if path == ("ctl",) else ()  # of the machine that is asked
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            yield from commands(found, (*path, *name, each))


COMMANDS = dict(commands())
PATHS = ["", ".", "..", "/", "\0", "a\0b", "\ud800", "\udcff", "x" * 256, "/x" * 3000, "absent/s", "text/s",
         "loop", "folder", "text", "empty", "cut", "fifo",
         "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/maps", "-"]  # fmt: skip
GOOD = {"file": "good", "out": "out", "folder": "unpacked", "first": "good", "second": "good", "old": "schemas",
        "new": "schemas", "parent": "good", "name": "nobody", "path": "/nowhere/s", "data": "x"}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a bit of everything."""
    folder: Path = tmp_path_factory.mktemp("place")
    with Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xfa\xf4", flat=True)) as machine:
        machine.save(folder / "good")
    (folder / "cut").write_bytes((folder / "good").read_bytes()[:5000])
    (folder / "text").write_text("mine")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    return folder


def anyhyve(place: Path, words: list[str]) -> Any:
    """Run a command in this process; its result. Fails unless it ended as a command may."""
    folders = {"XDG_RUNTIME_DIR": str(place / "run"), "XDG_STATE_HOME": str(place / "state")}
    before = os.getcwd()
    os.chdir(place)
    try:
        with patch("vmm.guest.debian.fetch"):
            result = CliRunner().invoke(main, words, env=folders)
    finally:
        os.chdir(before)
    error = result.exception
    assert error is None or isinstance(error, SystemExit), f"{words}: {type(error).__name__}: {error}"
    assert result.exit_code in (0, 1, 2, 3), words
    assert "Traceback" not in result.output and "our own" not in result.output, words
    if result.exit_code == 1 and result.stderr:
        assert result.stderr.startswith("anyhyve: "), result.stderr
    return result


def is_path(param: click.Parameter) -> bool:
    return isinstance(param.type, click.Path)


TAKING = [(words, param.name) for words, command in COMMANDS.items() for param in command.params if is_path(param)]


def test_commands_are_found():
    assert len(COMMANDS) > 30 and len(TAKING) > 30 and ("snapshot", "merge") in COMMANDS


@pytest.mark.parametrize(("words", "name"), TAKING, ids=[f"{' '.join(words)} {name}" for words, name in TAKING])
def test_every_path_of_every_command(place, words, name):
    """All else that is needed is given, and good."""
    command = COMMANDS[words]
    for path in PATHS:
        given = list(words)
        for param in command.params:
            value = path if param.name == name else GOOD.get(param.name, "x")
            if isinstance(param, click.Argument):
                given.append(value)
            elif param.required or param.name == name:
                given += [param.opts[0], value]
        if words == ("run",) and name != "kernel":
            given += ["--kernel", "text"]
        if words[0] in ("run", "restore", "wake"):
            given += ["--at", "1", "--json"]
        before = {each: each.lstat().st_ino for each in place.iterdir()}
        anyhyve(place, given)
        for each, ino in before.items():
            assert each.lstat().st_ino == ino or each.name == "cut", f"{given} replaced {each.name}"
        for made in set(place.iterdir()) - set(before):
            if made.is_dir():
                shutil.rmtree(made)
            else:
                made.unlink()


VALUES = st.one_of(
    st.sampled_from([*PATHS, "good", "0", "-1", "1", "99999999999999999999", "1e999", "nan", "{}", "[", "=",
                     '{"kind": 1}', "a=b", "com1=file:", "com1=file:/", "com1=file:\0", "com2=socket:" + "x" * 200,
                     "cpu.0.rip=1", "uart", "uart,port=", "uart,port=1,irq=99", "(", "0.2.0", "tsc-rate", "\x1b[2J",
                     "é", "4G", "1" * 5000]),
    st.text(max_size=20),
)  # fmt: skip


@st.composite
def argvs(draw: Any) -> list[str]:
    words = draw(st.sampled_from(sorted(COMMANDS)))
    options = [opt for param in COMMANDS[words].params for opt in param.opts if opt.startswith("-")]
    rest = draw(st.lists(st.one_of(VALUES, st.sampled_from(options)) if options else VALUES, max_size=6))
    return [*words, *rest]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(argvs())
def test_any_words(place, words):
    if words[0] == "fuzz":  # runs for as long as it is told
        words = [words[0], "--nothing", *words[1:]]
    if words[0] in ("run", "restore", "wake"):
        words = [*words, "--at", "1000"]
    anyhyve(place, words)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Context manager: no file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


TOOLS = {
    "merge": ["child", "out"],
    "rebase": ["child", "out", "--parent", "other"],
    "edit": ["child", "--out", "out", "--set", "com1.lcr=0x83"],
    "pack": ["apart", "out"],
    "unpack": ["child", "out"],
}


@pytest.mark.parametrize("room", [0, 100, 5000, 50_000])
@pytest.mark.parametrize("tool", TOOLS)
def test_no_room_on_the_disk(tmp_path, tool, room):
    with Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xeb\xfe", flat=True)) as machine:
        for name, parent in (("root", None), ("other", None), ("child", tmp_path / "root")):
            machine.ram.write(0x180000, os.urandom(0x20000))
            machine.save(tmp_path / name, parent=parent)
    assert anyhyve(tmp_path, ["snapshot", "unpack", "child", "apart"]).exit_code == 0
    before = set(tmp_path.iterdir())
    with room_for(room):
        result = anyhyve(tmp_path, ["snapshot", tool, *TOOLS[tool]])
    assert result.exit_code == 1 and result.stderr.startswith("anyhyve: ") and "File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert set(tmp_path.iterdir()) - before <= ({tmp_path / "out"} if tool == "unpack" else set())
