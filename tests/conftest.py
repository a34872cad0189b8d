"""Shared fixtures, and `--no-skips`, which turns every skip into a failure (CI)."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests import left_out
from tests.vmm.cpu.hosts import exception, host, unsteady

# Files that take longest: they come first, so that no worker is left with one at the end.
LONGEST = ("test_readme.py", "test_pytest_plugin.py", "test_random_guests.py", "test_control.py", "test_testing.py")
ROOT = Path(__file__).parent.parent
DEBIAN = ROOT / "guests" / "debian"

# dev: at the desk, and the default, other examples each time; ci: what must pass to land, the same ones each time, so
# that what fails there fails here; nightly: `make test-full`.
settings.register_profile("dev", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=1000, print_blob=True)
# For a computer ten times as slow, where shrinking a failure would take an hour.
settings.register_profile(
    "emulated", settings.get_profile("dev"), max_examples=10, phases=(Phase.explicit, Phase.generate)
)
# Faults are planted (tests/mutants): that there is one is all that is asked.
settings.register_profile("mutants", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("dev")


def pytest_configure(config: pytest.Config) -> None:
    left_out.pytest_configure(config)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: a program that is told of it would ignore it, too
        signal.signal(signal.SIGHUP, lambda *_: None)  # one that is not ignored is as by default in our children
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background command: Ctrl-C would be unheard, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # which has its environment from here
        caches = tempfile.mkdtemp(prefix="anyhyve-tests-")
        os.environ["XDG_CACHE_HOME"] = caches  # the user's own has nothing of ours in it, nor we of theirs
        config.add_cleanup(lambda: shutil.rmtree(caches, ignore_errors=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test is a failure")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "kvm" in getattr(item, "fixturenames", ()):
            item.add_marker("kvm")
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("--no-skips"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"skipped, and --no-skips was given: {reason}"


@pytest.fixture(scope="session")
def kvm(request: pytest.FixtureRequest) -> str:
    """The name of the KVM backend, where it runs; else the test is skipped with the host's reason."""
    from vmm.cpu import backends
    from vmm.errors import BackendError

    try:
        backends.probe("kvm")
    except BackendError as error:
        if request.config.getoption("--require-kvm"):
            pytest.fail(f"{error} (--require-kvm)")
        pytest.skip(str(error))
    return "kvm"


BACKENDS = ("emu", pytest.param("kvm", marks=pytest.mark.kvm))


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For @pytest.mark.parametrize("backend", BACKENDS, indirect=True): a backend's name, once it is known to run."""
    name, *how = request.param.split()
    if name == "kvm":
        request.getfixturevalue("kvm")
        if (reason := unsteady(request.node.name)) is not None:
            pytest.skip(reason)
        if (reason := exception(request.node.name)) is not None:
            request.applymarker(pytest.mark.xfail(reason=f"{host()}: {reason}", strict=True))
    if how:
        monkeypatch.setenv("ANYHYVE_PORTABLE", "1")
    return str(name)


@pytest.fixture(scope="session")
def debian() -> Path:
    """The folder with vmlinuz, vmlinux and initrd.img of a Debian kernel."""
    if not (DEBIAN / "initrd.img").exists():
        pytest.skip("no Debian guest in guests/debian: `make guest` could not fetch one")
    return DEBIAN


OWN = ROOT / "fixtures" / "guests" / "own" / "own.bin"


@pytest.fixture(scope="session")
def boot_own() -> Any:
    """A function that boots the repository's own guest: paging, timer interrupts, user mode, SSE, serial."""
    from vmm.guest.image import Image
    from vmm.machine.machine import Machine, MachineConfig

    image = Image.from_files(OWN, flat=True)

    def boot(**config: Any) -> Machine:
        return Machine.boot(MachineConfig(**{"memory_bytes": 16 << 20, **config}), image)

    return boot
