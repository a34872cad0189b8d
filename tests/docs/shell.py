"""The ```console blocks of a page, and a shell that runs their lines in their order, as a reader would.

A line begins with `$ `; what follows it up to the next is its output, compared where there is any, `...` standing for
anything. It must end with status 0. Above a block a comment says what else is so of the lines that look like this,
`*` standing for anything:

    <!-- needs kvm: anyhyve restore * -->                       run where that is, of NEEDS below
    <!-- exits 1: anyhyve fuzz * -->                            the status it ends with
    <!-- at "shell ready" types ^]q: anyhyve run * -->          run on a terminal; typed once that is seen

A machine with a name that is started with `&` is waited for until it runs, and its end before another takes the name:
who reads the page is slower than both.
"""

from __future__ import annotations

import contextlib
import doctest
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.vmm.cpu.hosts import host

_MARK = re.compile(r'<!-- (?:needs (\w+)|exits (\d+)|at "(.*?)" types (\S+)): (.*) -->')
_COMMENT = re.compile(r"\s+# .*$", re.M)
TYPIST = Path(__file__).with_name("typist.py")
_LINE_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Mark:
    """What a comment says of the lines that look like `of`."""

    of: str
    needs: str | None
    exits: int
    at: str | None
    types: str | None

    def fits(self, command: str) -> bool:
        return re.fullmatch(re.escape(self.of).replace(r"\*", ".*"), command) is not None


@dataclass(frozen=True)
class Line:
    """A command, what it prints as far as the page says, and its marks."""

    command: str
    wanted: str
    marks: tuple[Mark, ...]

    @property
    def needs(self) -> list[str]:
        return [mark.needs for mark in self.marks if mark.needs]

    @property
    def exits(self) -> int:
        return max((mark.exits for mark in self.marks), default=0)

    @property
    def plain(self) -> str:
        """The command without its remark, on one line."""
        return " ".join(_COMMENT.sub("", self.command).replace("\\\n", " ").split())


@dataclass(frozen=True)
class Block:
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]


def blocks(text: str) -> list[Block]:
    """The console blocks of a page."""
    found, marks, at = [], list[Mark](), iter(text.splitlines())
    for row in at:
        if mark := _MARK.fullmatch(row.strip()):
            needs, exits, seen, types, of = mark.groups()
            marks.append(Mark(of, needs, int(exits or 0), seen, types))
        elif row.strip() == "```console":
            indent = len(row) - len(row.lstrip())
            found.append(_block(_inside(at, indent), tuple(marks)))
            marks = []
        elif row.strip() and not row.startswith("<!--"):
            marks = []
    return found


def _inside(at: Iterator[str], indent: int) -> Iterator[str]:
    for row in at:
        if row.strip() == "```":
            return
        yield row[indent:]


def _block(rows: Iterator[str], marks: tuple[Mark, ...]) -> Block:
    said: list[tuple[list[str], list[str]]] = []
    for row in rows:
        if row.startswith("$ "):
            said.append(([row[2:]], []))
        elif said and said[-1][0][-1].endswith("\\"):
            said[-1][0].append(row)
        else:
            said[-1][1].append(row)
    lines = []
    for command, wanted in said:
        line = Line("\n".join(command), "\n".join(wanted), ())
        lines.append(Line(line.command, line.wanted, tuple(mark for mark in marks if mark.fits(line.plain))))
    return Block(tuple(lines), marks)


def files(text: str) -> dict[str, str]:
    """Files that a page shows: blocks whose first line is a comment with a name."""
    found = re.findall(r"^```\w+\n(#![^\n]*\n|)# (\S+\.\w+)\n(.*?)^```$", text, re.M | re.S)
    return {name: interpreter + body for interpreter, name, body in found}


# --- what a line may need


def _kvm() -> str | None:
    from vmm.cpu import backends
    from vmm.errors import BackendError

    try:
        backends.probe("kvm")
    except BackendError as error:
        return str(error)
    return "kvm_pvm runs no Linux of ours" if host() == "kvm_pvm" else None


def _network() -> str | None:
    """Whether pip finds packages; here, not on some host by name."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, "click"]
        done = subprocess.run(pip, capture_output=True, text=True)
    return f"no package index here: {done.stderr.strip().splitlines()[-1]}" if done.returncode else None


def _tool(*names: str) -> Callable[[], str | None]:
    return lambda: next((f"no {name} here" for name in names if shutil.which(name) is None), None)


def _hand() -> str | None:
    return "it is for a reader's hand: it runs the tests, or changes this computer"


NEEDS: dict[str, Callable[[], str | None]] = {  # why not here, or None
    "kvm": _kvm,
    "network": _network,
    "qemu": _tool("qemu-system-x86_64"),
    "binutils": _tool("as", "ld"),
    "cpio": _tool("cpio"),
    "pipx": _tool("pipx"),
    "hand": _hand,
}


def why_not(line: Line) -> str | None:
    """The reason for which a line cannot be run here, if there is one."""
    return next((reason for need in line.needs if (reason := NEEDS[need]()) is not None), None)


# --- the shell


class Shell:
    """One bash in a folder: what a line sets, the next one has. `anyhyve`, `python`, `pytest` and `pip` are those of
    the tests until a line activates others."""

    def __init__(self, folder: Path, aside: Path) -> None:
        """`aside`: a folder for what a reader has elsewhere."""
        self.tools = tools = aside / "bin"
        run, state, cache = aside / "run", aside / "state", aside / "cache"
        for made in (aside, tools, run, state, cache):
            made.mkdir(mode=0o700)
        modules = {"anyhyve": "-m anyhyve", "python": "", "python3": "", "pytest": "-m pytest", "pip": "-m pip"}
        for name, words in modules.items():
            (tools / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
            (tools / name).chmod(0o755)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "VIRTUAL_ENV"))},
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "XDG_RUNTIME_DIR": str(run),
            "XDG_STATE_HOME": str(state),
            "XDG_CACHE_HOME": str(cache),
            "COLUMNS": "80",
            "TERM": "xterm",
        }
        self._process = subprocess.Popen(
            ["bash", "--norc"], cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._aside = aside

    def close(self) -> None:
        """End it and all it began."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, line: Line) -> str:
        """Run it; returns what is wrong, "" when nothing is."""
        terminal = next((mark for mark in line.marks if mark.at is not None), None)
        name = re.search(r"--name (\w+)", line.plain)
        if line.plain.endswith("&") and name:
            return self._background(line, name[1])
        command = line.command
        if terminal is not None:
            typist = [sys.executable, str(TYPIST), str(terminal.at), str(terminal.types)]
            command = shlex.join([*typist, line.plain])
        status, said = self._do(command)
        said = said if terminal is None else said.replace("\r\n", "\n")
        if status != line.exits:
            return f"exit status {status}, not {line.exits}:\n{said}"
        return "" if not line.wanted or same(line.wanted, said) else f"it says:\n{said}"

    def _background(self, line: Line, name: str) -> str:
        """Begin a machine, once an earlier one of its name has ended; until it runs."""
        log = shlex.quote(str(self._aside / f"{name}.log"))
        status, said = self._do(
            f"[ -z $pid_{name} ] || wait $pid_{name}\n"
            f"{{ {line.command}\n}} >{log} 2>&1\npid_{name}=$!\n"
            f"until anyhyve ctl {name} status 2>&1 | grep -q 'state: running'; do\n"
            f"kill -0 $pid_{name} 2>/dev/null || {{ cat {log}; break; }}\ndone\nkill -0 $pid_{name} 2>/dev/null"
        )
        return said if status else ""

    def _do(self, command: str) -> tuple[int, str]:
        process, mark = self._process, "-- status of the line:"
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(_LINE_TIMEOUT_S, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        said = list[str]()
        try:
            process.stdin.write(f"{{ {command}\n}} </dev/null\nstatus=$?; echo; echo '{mark}' $status\n".encode())
            process.stdin.flush()
            for row in process.stdout:
                text = row.decode(errors="replace")
                if text.startswith(mark):
                    return int(text.removeprefix(mark)), "".join(said).removesuffix("\n")
                said.append(text)
        except BrokenPipeError:
            pass  # an earlier line ended it
        finally:
            late.cancel()
        return -1, f"{''.join(said)}\nit did not end in {_LINE_TIMEOUT_S:.0f} s, or it ended the shell"


def same(wanted: str, said: str) -> bool:
    """Whether a page's output is what was said: `...` stands for anything, any space for any other, and how
    long a run of pytest took is not compared."""
    wanted, said = (re.sub(r" in [\d.]+s\b", " in a while", text) for text in (wanted, said))
    how = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(f"{wanted}\n", f"{said.rstrip()}\n", how)


PROJECT = ("anyhyve", "snapshot", "vmm", "emu", "kvmbackend", "fixtures", "docs")


def clone(folder: Path) -> Path:
    """What a clone of the project has in it, as far as it is needed to install and use it, in `folder`."""
    for name in PROJECT:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def follow(page: str, shell: Shell) -> list[str]:
    """Run a page's lines as far as they can be run here; returns what is wrong, with the line."""
    wrong = []
    for line in (line for block in blocks(page) for line in block.lines):
        if why_not(line) is None and (said := shell.run(line)):
            wrong.append(f"$ {line.command}\n{said}")
    return wrong
