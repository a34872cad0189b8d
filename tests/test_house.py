"""The order of imports, and what the wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("snapshot", "vmm", "emu", "kvmbackend")
MAY_IMPORT = {
    "snapshot": {"snapshot"},
    "vmm": {"snapshot", "vmm"},
    "emu": {"snapshot", "vmm", "emu"},
    "kvmbackend": {"snapshot", "vmm", "kvmbackend"},
}


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    for file in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name in imports(file)} & set(PACKAGES)
        assert ours <= MAY_IMPORT[package], f"{file.relative_to(ROOT)} imports {ours - MAY_IMPORT[package]}"


def test_only_engine_knows_unicorn_insides():
    for file in (ROOT / "emu").glob("*.py"):
        if file.name != "engine.py":
            assert "from_address" not in file.read_text(), f"{file.name} reads raw memory"


def test_no_device_reads_host_time():
    for file in (ROOT / "vmm" / "devices").glob("*.py"):
        assert not imports(file) & {"time", "threading", "random", "os"}, file.name


def test_wheel_holds_the_import_packages_only(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert any(name == "vmm/devices/uart.py" for name in names)


def test_strict_typing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
