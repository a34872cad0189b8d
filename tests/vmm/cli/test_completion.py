"""What a shell proposes: commands, options and their values, in each shell; and what that costs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from click.shell_completion import BashComplete

from tests.conftest import ROOT
from vmm.cli.main import _COMMANDS, main

LINES = re.findall(r"^\| (bash|zsh|fish) \| `(.*?)` \|", (ROOT / "docs" / "completion.md").read_text(), re.M)


def proposed(words: str, incomplete: str = "") -> list[str]:
    found = BashComplete(main, {}, "anyhyve", "_ANYHYVE_COMPLETE").get_completions(words.split(), incomplete)
    return [item.value for item in found]


@pytest.fixture
def on_path(tmp_path):
    """An environment in which `anyhyve` is on PATH."""
    script = tmp_path / "anyhyve"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m anyhyve "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("words", "incomplete", "wanted"),
    [
        ("", "", list(_COMMANDS)),
        ("", "re", ["replay", "restore"]),
        ("", "resu", []),
        ("", "--v", ["--version"]),
        ("run", "--ba", ["--backend"]),
        ("restore", "--clo", ["--clock"]),
        ("restore --clock", "", ["freeze", "catch-up"]),
        ("snapshot", "ver", ["verify"]),
        ("ctl box", "sus", ["suspend"]),
        ("ctl box suspend", "--pa", ["--pack", "--parent"]),
    ],
)
def test_what_is_proposed(words, incomplete, wanted):
    assert proposed(words, incomplete) == wanted


def test_one_command_leaves_the_next_as_it_was():
    """With --vm there is no NAME; in the next command line of this process there is."""
    proposed("ctl --vm=box", "sus")
    assert proposed("ctl box suspend", "--pac") == ["--pack"]


def test_the_names_of_commands_are_had_without_importing_them():
    script = "import sys; from vmm.cli.main import main\ntry: main(prog_name='anyhyve')\nfinally: print(*sys.modules)"
    environment = {**os.environ, "_ANYHYVE_COMPLETE": "bash_complete", "COMP_WORDS": "anyhyve ", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    *names, modules = done.stdout.splitlines()
    assert names == [f"plain,{name}" for name in _COMMANDS]
    rooms = {module.split(".")[1] for module in modules.split() if module.startswith("vmm.")}
    assert rooms <= {"cli", "errors", "host"} and "unicorn" not in modules.split()
    assert {m for m in modules.split() if m.startswith("vmm.cli.")} == {"vmm.cli.main", "vmm.cli.show"}


@pytest.mark.parametrize(("shell", "line"), LINES, ids=[shell for shell, _ in LINES])
def test_the_line_of_a_shell(shell, line, on_path):
    assert len(LINES) == 3
    (source,) = re.findall(r"(_ANYHYVE_COMPLETE=\w+) anyhyve", line)
    given = subprocess.run(["env", source, "anyhyve"], env=on_path, capture_output=True, text=True, check=True).stdout
    assert "anyhyve" in given and f"{shell}_complete" in given
    if shutil.which(shell) is None:
        return  # its own syntax cannot be tried here; that there is a script for it is seen
    checked = subprocess.run([shell, "-n"], input=given, env=on_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_bash_proposes(on_path):
    (line,) = [line for shell, line in LINES if shell == "bash"]
    ask = f'{line}\nCOMP_WORDS=(anyhyve re) COMP_CWORD=1\n_anyhyve_completion anyhyve\necho "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "--norc", "-c", ask], env=on_path, capture_output=True, text=True)
    assert done.stdout.split() == ["replay", "restore"], done.stderr
