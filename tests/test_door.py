"""The package `anyhyve`: every name is there, costs nothing until it is asked for, and is what the pages import."""

from __future__ import annotations

import ast
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_import_from_the_door_only(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        for module in re.findall(r"^\s*(?:from|import) ([\w.]+)", block, re.M):
            assert module.split(".")[0] not in ("snapshot", "vmm", "emu", "kvmbackend"), module
