"""An option has one text, in whatever command it stands; and a machine's name is NAME."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click

from tests.conftest import ROOT
from vmm.cli import run
from vmm.cli.main import main

OTHERS = {  # what is spelt alike and says something else
    ("ctl devices", "--name"),  # a part's
    ("catalog", "--name"),  # does not give it, as `run` does
    ("replay", "--against"),  # another machine, not another CPU
    ("ctl snapshot.preflight", "--parent"),  # nothing is saved
    *((command, name) for command in ("restore", "wake") for name in ("--kernel", "--initrd", "--append")),
}


def commands(group: click.Command = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command by its words."""
    yield " ".join(path), group
    if isinstance(group, click.Group):
        ctx = click.Context(group)
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            assert command is not None
            yield from commands(command, (*path, name))


def options() -> Iterator[tuple[str, str, click.Option]]:
    for name, command in commands():
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                yield from ((name, spelling, param) for spelling in param.opts)


def test_one_text():
    texts = defaultdict(set)
    for command, spelling, option in options():
        if (command, spelling) not in OTHERS:
            texts[spelling].add(option.help)
    assert {spelling: found for spelling, found in texts.items() if len(found) > 1} == {}


def test_every_option_has_a_text():
    for command, spelling, option in options():
        assert option.help and option.help[0].isupper(), f"{command} {spelling}"


def test_a_machines_name_is_spelt_one_way():
    for where, spelling, option in options():
        if spelling in ("--name", "--vm") and where != "ctl devices":
            assert option.metavar == "NAME" and "the machine NAME" in (option.help or "").replace("The", "the"), where
    for where, command in commands():
        for param in command.params:
            if isinstance(param, click.Argument) and param.name == "name":
                assert param.metavar == "NAME" and "the machine NAME" in (command.help or ""), where


def test_what_an_option_needs_is_in_its_text():
    texts = {(command, param.name): param.help or "" for command, _, param in options()}
    for name in set(run._NEED_A_NAME) - {"rundir"}:
        for command in ("run", "restore", "wake"):
            assert texts[command, name].startswith("Of a machine with a name: "), name
    for name in ("initrd", "append"):
        assert texts["restore", name].startswith("With --kernel: ")


# Of pytest, pip, git, make, QEMU, bhyve, and of `python -m` of ours: what the pages name besides.
FOREIGN = {
    *("--hypothesis-profile", "--no-skips", "--import-mode", "--durations", "--editable", "--quiet", "--64", "--count"),
    *("--oformat", "--seed", "--first", "--jobs", "--only", "--cov", "--no-deps", "--junitxml"),
    *("--force-poweroff", "--force-reset", "--create", "--get-stats", "--inject-nmi"),
}


def test_the_pages_name_only_options_there_are():
    known = {spelling for _, command in commands() for param in command.params for spelling in (*param.opts,
             *param.secondary_opts)} | {"--help", "--version"}  # fmt: skip
    plugin = re.findall(r"\"(--[a-z-]+)\"", Path(ROOT, "vmm", "testing", "options.py").read_text())
    for page in [*Path(ROOT).glob("*.md"), *Path(ROOT, "docs").rglob("*.md")]:
        if page.name == "CHANGELOG.md":
            continue  # it tells of what was
        named = set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*[a-z0-9]", page.read_text()))
        assert named - known - set(plugin) - FOREIGN == set(), page
