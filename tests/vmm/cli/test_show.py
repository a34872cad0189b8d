"""What files and sockets say is data to every command: no control character, no markup, and one line stays one line."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import io
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from snapshot import canon, verify
from tests.conftest import OWN, ROOT
from tests.snapshot.hostile import File
from vmm.cli.main import main
from vmm.control import protocol
from vmm.guest.image import Image
from vmm.host.shown import shown
from vmm.machine.machine import Machine, MachineConfig

PIECES = (
    "\x1b[2J",
    "\x1b]0;owned\x07",
    "\r",
    "\n",
    "\nanyhyve: all is well",
    "\t",
    "\x00",
    "\x7f",
    "\x9b31m",
    "\u2028",
    "\x85",
    "\u202e",
    "\u2066",
    "\u200b",
    "\ufeff",
    "[bold red]",
    "[/b]",
    "[link=file:///]",
    ":smile:",
    "%s",
    "{0}",
    "\\",
    "é",
    "x",
)
EVIL = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
WIDE = {"COLUMNS": "20000"}  # a table's row is one line


def harmless(text: str) -> str:
    """As many characters, and none that does anything."""
    return re.sub(r"[^ -~]|[\[\]\\:%{}/]", "x", shown(text))


# --- every command there is, and what it is given


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        if isinstance(found, click.Group) and name != "ctl":
            yield from commands(found, (*path, name))
            if found.invoke_without_command:
                yield (*path, name), click.Command(name)
        else:
            yield (*path, name), found


COMMANDS = dict(commands(main))
NOT_HERE = {
    ("guest", "fetch"),  # it downloads
    ("fuzz",), ("doctor",), ("devices",),  # they are shown what is installed
}  # fmt: skip
SHORT = {"--at": "1100", "--instructions": "2", "--seconds": "0.1"}  # a file with nothing wrong in it is run
GIVEN = {"name": "box", "id": "0", "assignments": "config.x=1"}


def calls(command: click.Command, file: Path, fresh: Path) -> Iterator[list[str]]:
    """Ways to call it with a file wherever it takes one."""
    words, options = list[str](), list[list[str]]()
    paths = 0
    for param in command.params:
        path = isinstance(param.type, click.Path)
        value = str(file if path and not paths else fresh) if path else GIVEN.get(str(param.name), "x")
        if isinstance(param, click.Argument):
            if param.callback is not None:  # NAME/SNAPSHOT
                value = str(file)
            words += [value] if param.required else []
            paths += path
        elif param.required or param.opts[0] in SHORT:
            words += [param.opts[0], SHORT.get(param.opts[0], value)]
        elif path and param.opts[0] not in ("--save", "--rundir"):
            options.append([param.opts[0], str(file)])
    words += ["--against", "emu"] if command.name == "lockstep" else []
    yield [*words, str(file)] if paths == 2 else words
    for option in options:
        yield [*words, *option]
    if any(param.name == "as_json" for param in command.params):
        yield [*words, "--json"]


def invoke(*words: str) -> Result:
    done = CliRunner().invoke(main, words, env=WIDE, prog_name="anyhyve", catch_exceptions=False)
    said(done.stdout_bytes)
    said(done.stderr_bytes)
    return done


def said(output: bytes) -> None:
    text = output.decode()
    does = [each for each in text if each != "\n" and not each.isprintable()]
    assert not does, (does, text)


def lines(done: Result) -> tuple[int, ...]:
    return done.exit_code, done.stdout.count("\n"), done.stderr.count("\n")


# --- files


@pytest.fixture(scope="module")
def spoil(tmp_path_factory):
    """A function: `spoilt` of a machine's file."""
    file = tmp_path_factory.mktemp("saved") / "own"
    with Machine.boot(MachineConfig(memory_bytes=2 << 20), Image.from_files(OWN, flat=True)) as machine:
        machine.run(position=1000)
        machine.save(file)
    whole = File.parse(file.read_bytes())
    return lambda evil, how: spoilt(whole, evil, how)


def spoilt(whole: File, evil: str, how: str) -> bytes:
    """The file with `evil` in every name, text and value, or as its parent's, or in one place of a good file."""
    chunks = []
    for raw in whole.chunks:
        value = canon.decode(raw.payload) if raw.kind == b"PART" else None
        if isinstance(value, dict):
            schema: Any = value["schema"]
            state: Any = value["state"]
            if how == "names":
                schema["name"] += evil
                schema["doc"] = re.sub(r"[\r\n]", "", evil)
                for field in schema["fields"]:
                    state[field["name"] + evil] = state.pop(field["name"])
                    field["name"] += evil
                    field["doc"] = schema["doc"]
            elif how == "values" and raw.name == b"config":
                schema["fields"].append({"name": "evil", "type": {"text_max": 4096}, "doc": ""})
                state["evil"] = evil
            elif how == "types" and schema["fields"]:
                schema["fields"][0]["type"] = {"one_of": [evil]}
                state[schema["fields"][0]["name"]] = evil
            elif how == "broken":
                state["no " + evil] = 1
            raw = replace(raw, payload=canon.encode(value))
        chunks.append(raw)
    if how == "parent":
        name = re.sub(r"[^ -.0-~]", "?", evil)
        payload = canon.encode({"digest": "00" * 32, "file": name})
        at = next(n for n, raw in enumerate(chunks) if raw.kind == b"RAMD")
        chunks.insert(at, replace(chunks[0], kind=b"BASE", name=b"parent", payload=payload))
    if how == "meta":
        payload = canon.encode({evil: evil})
        chunks.insert(-1, replace(chunks[0], kind=b"META", flags=1, name=b"meta", payload=payload))
    return File(whole.header, chunks).build()


HOW = ("names", "values", "types", "broken", "parent", "meta", "path")


@pytest.mark.parametrize("words", [words for words in COMMANDS if words not in NOT_HERE], ids=" ".join)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(evil="".join(PIECES), how="names")
@example(evil="".join(PIECES), how="path")
@given(evil=EVIL, how=st.sampled_from(HOW))
def test_every_command_shows_a_file_as_data(spoil, tmp_path_factory, monkeypatch, words, evil, how):
    """It says as much, in as many lines, as where there is nothing evil."""
    outcomes: list[list[tuple[bool, tuple[int, ...]]]] = []
    for text in (evil, harmless(evil)):
        folder = tmp_path_factory.mktemp("files")
        monkeypatch.setenv("XDG_STATE_HOME", str(folder))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        home = folder / "anyhyve" / "box"
        home.mkdir(parents=True, mode=0o700)
        home.parent.chmod(0o700)
        name = (
            (text.replace("/", "").replace("\0", "") + os.fsdecode(b"\xff") * (text is evil))
            if how == "path"
            else "own"
        )
        file = home / f"{name}.snapshot"
        file.write_bytes(spoil(text, how))
        outcomes.append([])
        for n, given_words in enumerate(calls(COMMANDS[words], file, folder / f"fresh{name}")):
            arguments = [each.replace(str(folder / "fresh"), f"{folder}/{n}") for each in given_words]
            outcomes[-1].append((given_words[-1:] == ["--json"], lines(invoke(*words, *arguments))))
    for evils, goods in zip(*outcomes, strict=True):
        assert evils[1] in (goods[1], (1, 0, 1)), "the same, or refused in a line: text in a file has its own rules"


@given(evil=EVIL, how=st.sampled_from(HOW))
def test_the_second_verifier(spoil, tmp_path_factory, evil, how):
    file = tmp_path_factory.mktemp("files") / "own"
    file.write_bytes(spoil(evil, how))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        verify.main([str(file)])
    said(out.getvalue().encode())
    assert out.getvalue().count("\n") == 1


# --- sockets


class Liar:
    """A machine's socket that answers everything with what it was told to."""

    def __init__(self, folder: Path, answer: bytes, once: bool) -> None:
        (folder / "anyhyve").mkdir(mode=0o700, exist_ok=True)
        self._answer, self._once = answer, once
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(folder / "anyhyve" / "box.sock"))
        self._socket.listen()
        (folder / "anyhyve" / "box.lock").touch()
        self._lock = (folder / "anyhyve" / "box.lock").open("r+")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._thread = threading.Thread(target=self._lie)
        self._thread.start()

    def _lie(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                for line in client.makefile("rb"):
                    asked = json.loads(line)
                    client.sendall(self._answer.replace(b'"ID"', str(asked["id"]).encode()))
                    if self._once or (asked["method"] == "events" and not asked["params"]):
                        break

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        self._lock.close()


def answers(evil: str) -> dict[str, bytes]:
    row = {evil: evil, "name": evil, "state": evil, "backend": evil, "pid": 1, "memory_bytes": 1, "guest_ns": 1}
    return {
        "a result": protocol.pack(id="ID", result={**row, "x" + evil: {evil: [evil]}}),
        "a list": protocol.pack(id="ID", result=[row, row]),
        "an error": protocol.pack(id="ID", error={"code": 1, "message": evil}),
        "an event": protocol.pack(method="event", params={"kind": evil, evil: evil, "done": 1, "total": 2})
        + protocol.pack(id="ID", error={"code": 5, "message": evil}),
    }


NONSENSE = (
    b"",
    b"\n",
    b"[]\n",
    b"nonsense\n",
    b'{"id":"ID"}\n',
    b'{"id":"ID","result":7}\n',
    b'{"id":"ID","result":[7]}\n',
    b'{"id":"ID","error":7}\n',
    b'{"id":"ID","error":{"code":"x","message":1}}\n',
    b"[" * 100_000 + b"\n",
    b"\xff\xfe\n",
    b'{"method":"event"}\n{"id":"ID","result":{"data":"\\u1234"}}\n',
    b'{"method":"event","params":7}\n{"id":"ID","result":{}}\n',
)
ASKING = [
    ("list",),
    ("list", "--json"),
    ("suspend-all",),
    ("attach", "box"),
    ("ctl", "box", "status"),
    ("ctl", "box", "devices"),
    ("ctl", "box", "checkpoint", "/x"),
    ("ctl", "box", "events"),
    ("ctl", "box", "stats", "--json"),
    ("ctl", "--vm=box", "--get-all"),
]


def ask(monkeypatch, folder: Path, words: tuple[str, ...], answer: bytes, once: bool = False) -> Result:
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setattr(os, "read", lambda *_: b"")  # nothing is typed
    liar = Liar(folder, answer, once)
    try:
        return invoke(*words)
    finally:
        liar.close()


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(evil="".join(PIECES))
@given(evil=EVIL)
def test_what_a_socket_says_is_data(tmp_path_factory, monkeypatch, words, evil):
    for what in answers(""):
        evils, goods = (
            ask(monkeypatch, tmp_path_factory.mktemp("run"), words, answers(text)[what])
            for text in (evil, harmless(evil))
        )
        assert lines(evils) == lines(goods), (what, evils.output, goods.output)


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: repr(answer[:30]))
def test_what_makes_no_sense_is_one_line(tmp_path, monkeypatch, words, answer):
    done = ask(monkeypatch, tmp_path, words, answer, once=True)
    assert done.stderr.count("anyhyve:") <= 2, done.stderr


# --- the one place


def test_only_one_place_writes_to_the_terminal():
    """What is said goes through vmm/cli/show.py."""
    for file in (ROOT / "vmm" / "cli").glob("*.py"):
        if file.name == "show.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "rich" for name in imported), f"{file.name} draws by itself"
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"), (
                file.name
            )


def test_json_is_ascii(capsysbinary):
    from vmm.cli import show

    show.as_json({"é\u202e\x7f\udc80": "\x9b\n"})
    out, _ = capsysbinary.readouterr()
    assert out == b'{"\\u00e9\\u202e\\u007f\\udc80": "\\u009b\\n"}\n'
