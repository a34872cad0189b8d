"""The console blocks of all pages but the README's (tests/test_readme.py): each page's lines are run in their order."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs import shell
from tests.vmm.conftest import eventually

pytestmark = pytest.mark.no_roundtrip("it runs in other processes")
IN_A_CLONE = ("CONTRIBUTING.md", "docs/completion.md", "docs/release.md")
WITH_A_GUEST = ("docs/control.md", "docs/machine.md", "docs/testing.md")
ELSEWHERE = {
    "README.md": "tests/test_readme.py",
    "docs/device-authors-guide.md": "tests/docs/test_authors_guide.py",
    "docs/recipes.md": "tests/docs/test_recipes.py",
}


def text(page):
    return (ROOT / page).read_text()


def lines(page):
    return [line for block in shell.blocks(text(page)) for line in block.lines]


PAGES = [page.relative_to(ROOT).as_posix() for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]
WITH_LINES = sorted(page for page in PAGES if lines(page))
MARKED = [
    pytest.param(page, line, id=f"{page}: {line.plain}", marks=pytest.mark.kvm if "kvm" in line.needs else ())
    for page in WITH_LINES
    for line in lines(page)
    if line.needs
]


def test_no_page_is_forgotten():
    assert sorted((*IN_A_CLONE, *WITH_A_GUEST, *ELSEWHERE)) == WITH_LINES
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


@pytest.mark.parametrize("page", WITH_LINES)
def test_every_mark_is_of_a_line(page):
    for block in shell.blocks(text(page)):
        for mark in block.marks:
            assert any(mark in line.marks for line in block.lines), f"{page}: {mark.of}"
            assert mark.needs is None or mark.needs in shell.NEEDS, f"{page}: {mark.needs}"


@pytest.mark.parametrize("page", IN_A_CLONE)
def test_a_page_about_a_clone(page, tmp_path):
    clone = shell.clone(tmp_path / "anyhyve")
    with shell.Shell(clone, tmp_path / "aside") as sh:
        (clone / ".venv").mkdir()
        (clone / ".venv" / "bin").symlink_to(sh.tools)
        wrong = shell.follow(text(page), sh)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.debian
@pytest.mark.parametrize("page", WITH_A_GUEST)
def test_a_page_with_a_guest(page, debian, tmp_path):
    """As its pictures of folders are: guests/debian, and its files beside it."""
    own = tmp_path / "own"
    shutil.copytree(debian, own / "guests" / "debian")
    for file in debian.iterdir():
        (own / file.name).symlink_to(own / "guests" / "debian" / file.name)
    for name, content in shell.files(text(page)).items():
        (own / name).write_text(content)
    with shell.Shell(own, tmp_path / "aside") as sh:
        wrong = shell.follow(text(page), sh)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize(("page", "line"), MARKED)
def test_what_a_line_needs(page, line):
    """Is it here? Else the line is left out above, and this says so. What is for a reader's hand is no skip."""
    if line.needs != ["hand"] and (reason := shell.why_not(line)) is not None:
        pytest.skip(f"{page}: {line.plain}: {reason}")


# --- the shell itself


@pytest.fixture
def sh(tmp_path):
    (tmp_path / "own").mkdir()
    with shell.Shell(tmp_path / "own", tmp_path / "aside") as sh:
        yield sh


PAGE = """
<!-- exits 3: false * -->
<!-- needs kvm: anyhyve restore * -->
```console
$ echo one; \\
  echo two      # a remark
one
two
$ false it
$ anyhyve restore b --backend kvm
```
text
1. a list

   <!-- at "here" types ^]q: cat -->
   ```console
   $ cat
   ```
"""


def test_a_page_is_read():
    first, second = shell.blocks(PAGE)
    one, two, three = first.lines
    assert one.plain == "echo one; echo two" and one.wanted == "one\ntwo" and one.exits == 0
    assert two.exits == 3 and three.needs == ["kvm"] and not two.needs
    (cat,) = second.lines
    assert (cat.command, cat.marks[0].at, cat.marks[0].types) == ("cat", "here", "^]q")


@pytest.mark.parametrize(
    ("block", "wrong"),
    [
        ("$ cd / && a=7\n$ echo $a $PWD\n7 /", ""),
        ("$ echo 1 passed in 2.50s\n1 passed in 0.01s", ""),
        ("$ printf 'a\\nb\\nc'\na\n...\nc", ""),
        ("$ echo 7\n8", "$ echo 7\nit says:\n7\n"),
        ("$ false", "$ false\nexit status 1, not 0:\n"),
        ("$ exit 4\n$ true", "it ended the shell"),
        ("$ anyhyve run --name box &", "Missing option '--kernel'"),
        ("$ python --version && anyhyve --version && pytest --version\nPython 3...\nanyhyve...\npytest...", ""),
    ],
)
def test_lines_are_run_and_compared(sh, block, wrong):
    found = shell.follow(f"```console\n{block}\n```\n", sh)
    assert bool(found) == bool(wrong) and wrong in "\n".join(found)


def test_it_is_typed_on_a_terminal(sh):
    what = f'{sys.executable} -c "import sys; print(sys.stdin.isatty()); print(input()); sys.exit(5)"'
    marks = f'<!-- at "True" types a_b^M: {what} -->\n<!-- exits 5: {what} -->'
    assert shell.follow(f"{marks}\n```console\n$ {what}\nTrue...a b\n...\n```\n", sh) == []


def test_nothing_of_a_page_stays(sh, tmp_path):
    assert shell.follow("```console\n$ sleep 1000 & echo $! >pid\n```\n", sh) == []
    process = Path("/proc", (tmp_path / "own" / "pid").read_text().strip(), "stat")
    assert process.exists()
    sh.close()
    eventually(lambda: not process.exists() or process.read_text().rpartition(")")[2].split()[0] == "Z")
