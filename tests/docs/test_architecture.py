"""docs/architecture.md and the pages about working here name what there is: files, functions, rooms, pages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.test_house import FLOORS

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PAGES = ("docs/architecture.md", "docs/README.md", "docs/release.md", "CONTRIBUTING.md", "SECURITY.md")
DOCS = [file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md")]
FILE = re.compile(r"[\w./-]*\w\.py\b")
NAME = re.compile(r"`([\w./-]+\.py):\s+([\w.]+)`")  # file, and what is defined in it
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(?:#[^)]*)?\)")
QUOTED = re.compile(r"`([^`\n]+)`")


def missing_files(text: str) -> list[str]:
    """Python files a page names that there are not."""
    return sorted({name for name in FILE.findall(text) if not (ROOT / name).is_file()})


def broken_links(page: str, text: str) -> list[str]:
    """Links of a page to what is not there."""
    return [link for link in LINK.findall(text) if not ((ROOT / page).parent / link).exists()]


def targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def defined(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """What a module or a class defines: names, and where. Attributes set by methods count as the class'."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, node
        for target in targets(node):
            if isinstance(target, ast.Name):
                yield target.id, node
        if isinstance(node, ast.FunctionDef):
            for inner in (each for each in ast.walk(node) if isinstance(each, ast.stmt)):
                for target in targets(inner):
                    if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self":
                        yield target.attr, inner


def missing_names(text: str) -> list[str]:
    """What a page says is defined in a file, and is not."""
    found = []
    for file, dotted in NAME.findall(text):
        body = ast.parse((ROOT / file).read_text()).body if (ROOT / file).is_file() else []
        for name in dotted.split("."):
            node = dict(defined(body)).get(name)
            if node is None:
                found.append(f"{file}: {dotted}")
                break
            body = node.body if isinstance(node, ast.ClassDef) else []
    return found


def homeless(text: str) -> list[str]:
    """Names of code that are written without their file."""
    return [quoted for quoted in QUOTED.findall(text) if re.fullmatch(r"_?[A-Z]\w+\.\w+(\(.*\))?", quoted)]


def floors(text: str) -> list[str]:
    """The picture's lines, without their numbers."""
    (picture,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    return [re.sub(r"^ *\d+  ", "", line) for line in picture.splitlines()]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_is_there(page):
    assert missing_files((ROOT / page).read_text()) == []


def test_every_name_is_defined_where_it_says():
    assert len(NAME.findall(ARCHITECTURE)) > 80
    assert missing_names(ARCHITECTURE) == []
    assert homeless(ARCHITECTURE) == []


def test_the_picture_is_the_table():
    assert floors(ARCHITECTURE) == FLOORS.split("\n")[1:-1]


def test_every_room_is_explained():
    rooms = re.findall(r"^\| `([\w.]+)` \| \S", ARCHITECTURE, re.MULTILINE)
    assert rooms == FLOORS.split()


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.removeprefix("docs/") for page in DOCS if page != "docs/README.md"]
    assert len(pages) > 10
    assert [page for page in pages if f"({page})" not in index] == []


@pytest.mark.parametrize("page", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("*.md")) + sorted(DOCS))
def test_every_link_leads_somewhere(page):
    assert broken_links(page, (ROOT / page).read_text()) == []


def test_what_is_not_there_is_found():
    links = "[a](README.md) [b](https://a.example/b) [c](../README.md#use) [d](attic.md#box)"
    assert broken_links("docs/README.md", links) == ["attic.md"]
    assert missing_files("see `vmm/attic.py` and vmm/bus.py.") == ["vmm/attic.py"]
    right = (
        "`vmm/bus.py: Bus.port_in` `vmm/clock.py: GuestClock.prepaid` `vmm/clock.py: Word.TIME` `emu/state.py: load`"
    )
    assert missing_names(right) == []
    wrong = "`vmm/bus.py: Bus.port_into` `vmm/bus.py: Buses` `vmm/attic.py: Box` `vmm/bus.py: Bus.port_in.size`"
    assert len(missing_names(wrong)) == 4
    assert homeless("`Bus.port_in` `Bus.port_in(1)` `vmm.bus` `(1).x`") == ["Bus.port_in", "Bus.port_in(1)"]
    assert floors("```text\n 1  a\n10  b  c\n```") == ["a", "b  c"]
