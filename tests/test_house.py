"""The floors of the house, held as a table: imports go down only, no circle, and every room has its floor."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up; what stands in one line is one floor, whose rooms do not know each other. docs/architecture.md
# draws it.
FLOORS = """
snapshot
vmm.errors
vmm.dirty_pages  vmm.clock  vmm.registers  vmm.wires
vmm.ram  vmm.device
vmm.bus
vmm.devices
vmm.host
vmm.cpu
vmm.board
emu
kvmbackend
vmm.guest
vmm.saving
vmm.qtest
vmm.machine
vmm.control
vmm.debug
vmm.testing
vmm.cli
anyhyve
"""
PACKAGES = ("anyhyve", "snapshot", "vmm", "emu", "kvmbackend")
LEVEL = {room: level for level, line in enumerate(FLOORS.split("\n")) for room in line.split()}
MOST_FILES_IN_VMM = 10


def modules(root: Path) -> dict[str, Path]:
    """Every module by its dotted name, in every subfolder."""
    found = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a module imports, within functions and for type checkers, too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if full in known:
                    yield full
                elif module in known and module != name:
                    yield module


def room(module: str) -> str:
    """The room a module is in: the longest name in the table that it begins with."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (found := ".".join(parts[:end])) in LEVEL:
            return found
    raise AssertionError(f"{module} is in no room of the table")


def upward(root: Path) -> list[str]:
    """Imports that do not go down, or stay within a room."""
    known, found = modules(root), []
    for name, file in known.items():
        if name == "vmm":
            continue
        for other in set(imports(name, file, known)):
            if other != "vmm" and room(name) != room(other) and LEVEL[room(other)] >= LEVEL[room(name)]:
                found.append(f"{name} imports {other}")
    return sorted(found)


def circles(root: Path) -> list[str]:
    """Modules that import each other, however far around: what stands in one strongly connected component."""
    known = modules(root)
    # A package imports its modules for those who ask it (the lazy doors); they do not import it for that.
    arrows = {
        name: {other for other in imports(name, file, known) if not other.startswith(f"{name}.")}
        for name, file in known.items()
    }
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[str] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in arrows[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            circle = []
            while (top := stack.pop()) != name:
                circle.append(top)
            if circle:
                found.append(" <-> ".join(sorted([name, *circle])))

    for name in arrows:
        if name not in index:
            visit(name)
    return found


def test_imports_go_down():
    assert upward(ROOT) == []


def test_no_circle():
    assert circles(ROOT) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages, to plant something in."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            target = tmp_path / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(file.read_text())
    return tmp_path


@pytest.mark.parametrize(
    ("where", "line", "found"),
    [
        (
            "vmm/devices/isa/uart.py",
            "from vmm.board.board import Board",
            "vmm.devices.isa.uart imports vmm.board.board",
        ),
        ("vmm/board/slot.py", "    import vmm.machine.machine", "vmm.board.slot imports vmm.machine.machine"),
        ("snapshot/reader.py", "from vmm.errors import GuestError", "snapshot.reader imports vmm.errors"),
        ("emu/cpu.py", "from kvmbackend import abi", "emu.cpu imports kvmbackend.abi"),
        ("vmm/clock.py", "from vmm import wires", "vmm.clock imports vmm.wires"),
    ],
)
def test_a_planted_import_upward_is_found(copy, where, line, found):
    file = copy / where
    planted = f"def planted():\n{line}\n" if line.startswith(" ") else f"{line}\n"
    file.write_text(file.read_text() + "\n\n" + planted)
    assert found in upward(copy)


def test_a_planted_circle_is_found(copy):
    for one, other in (("pit", "rtc"), ("rtc", "uart"), ("uart", "pit")):
        file = copy / f"vmm/devices/isa/{one}.py"
        file.write_text(file.read_text() + f"\n\nfrom vmm.devices.isa import {other}\n")
    assert circles(copy) == ["vmm.devices.isa.pit <-> vmm.devices.isa.rtc <-> vmm.devices.isa.uart"]


def test_a_room_that_is_not_in_the_table_is_found(copy):
    (copy / "vmm" / "attic").mkdir()
    (copy / "vmm" / "attic" / "box.py").write_text("from vmm.cli import main\n")
    with pytest.raises(AssertionError, match=r"vmm.attic.box is in no room"):
        upward(copy)


def test_vmm_itself_holds_the_ground_floor_only():
    files = [file.name for file in (ROOT / "vmm").iterdir() if file.is_file()]
    assert len(files) <= MOST_FILES_IN_VMM, files


def test_only_engine_knows_unicorn_insides():
    for file in (ROOT / "emu").glob("*.py"):
        if file.name != "engine.py":
            assert "from_address" not in file.read_text(), f"{file.name} reads raw memory"


def test_no_device_reads_host_time():
    for file in (ROOT / "vmm" / "devices").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"time", "threading", "random", "os"} & set(names), file.name


def test_nothing_else_spells_a_cpus_part():
    """One list knows what the parts are called (vmm.saving.parts)."""
    for name, file in modules(ROOT).items():
        if name != "vmm.saving.parts":
            assert not re.search(r"\bcpu\.(\d|\{i\})", file.read_text()), name


def test_a_test_for_each_backend_runs_on_it():
    """One that takes `backend` and does not pass it on would run on the emulated CPU twice."""
    for file in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and "backend" in {argument.arg for argument in node.args.args}:
                used = {name.id for line in node.body for name in ast.walk(line) if isinstance(name, ast.Name)}
                assert "backend" in used, f"{file.name}: {node.name}"


def test_wheel_holds_the_import_packages_only(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert "vmm/devices/isa/uart.py" in names and any(name.startswith("vmm/saving/schemas/") for name in names)
