"""Which tests must find a fault: those that mirror the folder it is in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmm.cpu import backends
from vmm.errors import BackendError

GENERIC = "tests/vmm/devices/test_generic.py"


@dataclass(frozen=True)
class Suite:
    """Tests, in pytest's words."""

    paths: tuple[str, ...]
    options: tuple[str, ...] = ("-m", "not slow")
    backend: str = "emu"

    def hindrance(self) -> str | None:
        """Why these tests can measure nothing on this computer."""
        try:
            backends.probe(self.backend)
        except BackendError as error:
            return str(error)
        return None


# What is not here is not measured: what is above these floors is held by tests that go through all of them.
SUITES = {
    "snapshot/": Suite(("tests/snapshot",)),
    "vmm/devices/": Suite(("tests/vmm/devices",)),
    "vmm/saving/": Suite(("tests/vmm/saving",)),
    "vmm/control/": Suite(("tests/vmm/control",)),
    "vmm/bus.py": Suite(("tests/vmm/test_bus.py",)),
    "vmm/ram.py": Suite(("tests/vmm/test_ram.py",)),
    "vmm/registers.py": Suite(("tests/vmm/test_registers.py", "tests/vmm/test_bus.py", GENERIC)),
    "vmm/wires.py": Suite(("tests/vmm/test_wires.py", "tests/vmm/board", GENERIC)),
    "emu/": Suite(("tests/emu", "tests/vmm/cpu", "tests/vmm/machine/test_cut.py"), ("-m", "not slow and not kvm")),
    "kvmbackend/": Suite(("tests/kvmbackend", "tests/vmm/cpu"), ("-m", "not slow", "-k", "kvm"), "kvm"),
}


def suite_of(file: str) -> Suite:
    return next(suite for prefix, suite in SUITES.items() if file.startswith(prefix))


def files(root: Path) -> list[str]:
    """The files that are measured."""
    found = (
        path
        for prefix in SUITES
        for path in ([root / prefix] if prefix.endswith(".py") else (root / prefix).rglob("*.py"))
    )
    return sorted(str(path.relative_to(root)) for path in found)
