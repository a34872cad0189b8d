"""The package `anyhyve`: every name is there, costs nothing until it is asked for, and is what the pages import."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys

import pytest

import anyhyve
import anyhyve.testing
import vmm.testing
from tests.conftest import ROOT

# The recipes change the inside, and import from it.
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "recipes.md"]
PAGES += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
IMPORT = re.compile(r"^\s*from (anyhyve[\w.]*) import (\([^)]*\)|[^#\n]*)", re.M)


def imported(text: str) -> list[tuple[str, str]]:
    """What Markdown's Python imports from the door: modules and names."""
    return [
        (module, name.split(" as ")[0].strip())
        for block in BLOCK.findall(text)
        for module, names in IMPORT.findall(block)
        for name in names.strip("()").split(",")
        if name.strip()
    ]


def typed_names(module: str) -> dict[str, str]:
    """What a type checker sees: each name and where it is from."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module not in (None, "__future__", "importlib", "typing"):
            found |= {alias.asname or alias.name: str(node.module) for alias in node.names}
    return found


def test_type_checkers_and_programs_see_the_same():
    assert typed_names("anyhyve/__init__.py") == anyhyve._WHERE
    assert set(typed_names("anyhyve/testing.py")) == set(anyhyve.testing.__all__) == set(vmm.testing._WHERE)


@pytest.mark.parametrize("name", anyhyve.__all__)
def test_a_name_is_there(name):
    assert getattr(anyhyve, name) is not None and name in dir(anyhyve)


@pytest.mark.parametrize("name", anyhyve.testing.__all__)
def test_a_name_for_tests_is_there(name):
    assert getattr(anyhyve.testing, name) is not None


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="module 'anyhyve' has no attribute 'Hypervisor'"):
        anyhyve.Hypervisor  # noqa: B018


def test_the_door_costs_nothing():
    script = "import sys, anyhyve, anyhyve.testing; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"unicorn", "hypothesis", "emu", "kvmbackend", "blake3", "rich"} & set(loaded)


def test_the_names_of_a_page_are_found():
    text = "```python\nfrom anyhyve import (\n    a as x,\n    b,\n)\nfrom anyhyve.testing import c, d  # e\n```\n"
    assert imported(text) == [("anyhyve", "a"), ("anyhyve", "b"), ("anyhyve.testing", "c"), ("anyhyve.testing", "d")]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "recipes.md"], ids=lambda page: page.name)
def test_what_pages_import_is_there(page):
    for module, name in imported(page.read_text()):
        assert hasattr(importlib.import_module(module), name), f"{page.name}: {module} has no {name}"


def test_who_writes_a_device_needs_nothing_but_the_door():
    guide = (ROOT / "docs" / "device-authors-guide.md").read_text()
    modules = {m for block in BLOCK.findall(guide) for m in re.findall(r"^\s*(?:from|import) ([\w.]+)", block, re.M)}
    assert "anyhyve" in modules and modules - {"anyhyve"} <= sys.stdlib_module_names
    for file in (ROOT / "vmm" / "devices").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and re.match(r"snapshot|vmm\.(?!devices)", node.module or ""):
                assert {alias.name for alias in node.names} <= set(anyhyve.__all__), f"{file.name}: {node.module}"


def test_without_hypothesis():
    script = "import sys; sys.modules['hypothesis'] = None\nfrom anyhyve import Rig\nfrom anyhyve import check_device"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("check_device: no Hypothesis here: pip install 'anyhyve[test]'")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_import_from_the_door_only(page):
    for block in BLOCK.findall(page.read_text()):
        for module in re.findall(r"^\s*(?:from|import) ([\w.]+)", block, re.M):
            assert module.split(".")[0] not in ("snapshot", "vmm", "emu", "kvmbackend"), module
