"""The pytest plugin: machines as fixtures (docs/testing.md). pytest loads this file wherever anyhyve is installed, so
nothing that takes long, or is an extra, is imported before a test asks for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmm.host.shown import shown
from vmm.testing.boots import Boots, Told
from vmm.testing.options import BACKENDS, CACHE
from vmm.testing.options import pytest_addoption as pytest_addoption
from vmm.testing.options import pytest_configure as pytest_configure
from vmm.testing.options import pytest_report_header as pytest_report_header

if TYPE_CHECKING:
    from vmm.guest.image import Image
    from vmm.machine.machine import Machine
    from vmm.testing.expect import Expect
    from vmm.testing.guests import Guest, Marked

MACHINES = pytest.StashKey[list["Machine"]]()  # of a test, for when it fails
TALKS = pytest.StashKey["Expect"]()
TOLD = pytest.StashKey[Told]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vm_backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("backend")
        asked = marker.args if marker else (metafunc.config.getoption("--vm-backend"),)
        names = [name for one in asked for name in (BACKENDS if one == "all" else (one,))]
        if wrong := [str(name) for name in names if name not in (*BACKENDS, "auto")]:
            where = metafunc.definition.nodeid
            pytest.fail(f"{where}: no backend {', '.join(wrong)}; there are {', '.join(BACKENDS)}", pytrace=False)
        if len(names) > 1 or marker:
            metafunc.parametrize("vm_backend", names, indirect=True, scope="session")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("requires_kvm"):
        _demand_kvm(item.config)
    if item.get_closest_marker("slow_guest") and not item.config.getoption("--vm-slow"):
        pytest.skip("a slow guest: --vm-slow runs it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Round trips are of every machine there is, also of those no fixture of ours made."""
    every_ms = item.config.getoption("--vm-roundtrip")
    if every_ms is None or item.get_closest_marker("no_roundtrip"):
        return (yield)
    from vmm.testing.roundtrip import round_trips

    with round_trips(int(every_ms * 1_000_000)):
        return (yield)


def _demand_kvm(config: pytest.Config) -> None:
    """Skip, or fail if it was required, with this host's reason."""
    from vmm.debug import selftest
    from vmm.errors import BackendError

    try:
        why_not = selftest.findings("kvm").runs
    except BackendError as error:
        why_not = str(error)
    if why_not is None:
        return
    if config.getoption("--require-kvm"):
        pytest.fail(f"{why_not} (--require-kvm)", pytrace=False)
    pytest.skip(f"no KVM: {why_not}")


# --- fixtures


@pytest.fixture(scope="session")
def vm_backend(request: pytest.FixtureRequest) -> str:
    """The name of the CPU the machines run on: emu or kvm."""
    name: str = getattr(request, "param", request.config.getoption("--vm-backend"))
    if name == "auto":
        from vmm.debug import selftest

        name, _ = selftest.choose()
    if name == "kvm":
        _demand_kvm(request.config)
    return name


@pytest.fixture
def backend(vm_backend: str) -> str:
    """The same, by a shorter name."""
    return vm_backend


@pytest.fixture(scope="session")
def vm_image(pytestconfig: pytest.Config) -> Image:
    """The guest, as the ini options vm_kernel, vm_initrd, vm_append say. Override it for another."""
    from vmm.errors import GuestError
    from vmm.guest.image import Image

    kernel, initrd = (_guest_file(pytestconfig, name) for name in ("vm_kernel", "vm_initrd"))
    if kernel is None:
        pytest.fail("no guest: set vm_kernel in pytest's ini file (anyhyve guest fetch gets Debian's)", pytrace=False)
    try:
        return Image.from_files(kernel, initrd, pytestconfig.getini("vm_append"), flat=pytestconfig.getini("vm_flat"))
    except (GuestError, OSError) as error:
        why_not = str(error)
    pytest.fail(f"no guest: {why_not}", pytrace=False)


def _guest_file(config: pytest.Config, name: str) -> Path | None:
    given = config.getini(name)
    return config.rootpath / given if given else None


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest, vm_backend: str) -> Iterator[Callable[..., Machine]]:
    """`make(image=None, *, snapshot=None, backend=None, **config)`: a machine with the guest loaded, or woken from a
    snapshot. `config` are fields of MachineConfig. All are closed after the test."""
    from vmm.machine.machine import Machine, MachineConfig

    with ExitStack() as open_machines:
        made: list[Machine] = request.node.stash.setdefault(MACHINES, [])

        def make(
            image: Image | None = None, *, snapshot: Path | None = None, backend: str | None = None, **config: Any
        ) -> Machine:
            if snapshot is not None:
                machine = Machine.restore(snapshot, backend or vm_backend)
            else:
                config.setdefault("memory_bytes", int(request.config.getini("vm_memory")) << 20)
                config.setdefault("board", request.config.getini("vm_board"))
                config.setdefault("cpus", int(request.config.getini("vm_cpus")))
                guest = request.getfixturevalue("vm_image") if image is None else image
                machine = Machine.boot(MachineConfig(**config), guest, backend or vm_backend)
            made.append(open_machines.enter_context(machine))
            return machine

        yield make


@pytest.fixture
def vm(vm_factory: Callable[..., Machine]) -> Machine:
    """A machine with the guest loaded, which has run nothing yet."""
    return vm_factory()


@pytest.fixture(scope="session")
def _vm_boots(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boots]:
    with Boots(
        pytestconfig.stash[CACHE].folder,
        tmp_path_factory.mktemp("vm"),
        pytestconfig.stash.setdefault(TOLD, Told()),
        most_bytes=int(pytestconfig.getini("vm_cache_mib")) << 20,
        patience_s=float(pytestconfig.getini("vm_wall_patience")),
        run=getattr(pytestconfig, "workerinput", {}).get("testrunuid", ""),
    ) as boots:
        yield boots


@pytest.fixture(scope="session")
def _vm_guest(vm_backend: str, vm_image: Image, pytestconfig: pytest.Config, _vm_boots: Boots) -> Guest:
    from vmm.testing.guests import Guest

    return Guest(vm_backend, vm_image, pytestconfig, _vm_boots)


@contextmanager
def _no_traceback() -> Iterator[None]:
    """Context manager: a guest that does not come up fails the test."""
    from vmm.errors import GuestError

    try:
        yield
    except GuestError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


@pytest.fixture(scope="session")
def vm_snapshot(_vm_guest: Guest) -> Path:
    """The guest when it is up, saved: a read-only file, which other processes may use, too."""
    with _no_traceback():
        return _vm_guest.file()


@pytest.fixture(scope="session")
def _vm_really_booted(_vm_guest: Guest, pytestconfig: pytest.Config) -> Iterator[Marked]:
    from vmm.testing.guests import Marked

    def boot() -> Machine:
        machine = _vm_guest.boot()
        pytestconfig.stash[TOLD].counts["booted"] += 1
        return machine

    with closing(Marked(boot)) as marked:
        yield marked


@pytest.fixture(scope="session")
def _vm_up(request: pytest.FixtureRequest, _vm_guest: Guest) -> Iterator[Marked]:
    from vmm.testing.guests import Marked

    if _vm_guest.cached:
        with closing(Marked(_vm_guest.wake)) as marked:
            yield marked
    else:
        yield request.getfixturevalue("_vm_really_booted")


def _up(request: pytest.FixtureRequest, marked: str) -> Machine:
    """What the fixture of that name has marked, at its mark."""
    with _no_traceback():
        if request.config.getoption("--vm-roundtrip") is not None:
            from vmm.testing.guests import until_ready

            machine: Machine = request.getfixturevalue("vm")
            until_ready(machine, request.config)
            return machine
        machine = request.getfixturevalue(marked).again()
    request.node.stash.setdefault(MACHINES, []).append(machine)
    return machine


@pytest.fixture
def vm_booted(request: pytest.FixtureRequest, vm_backend: str) -> Machine:
    """A machine whose guest is up. It is booted, or woken from the cache, once, and reset to that moment for each test;
    with round trips, which would be of another machine, it is booted for each."""
    return _up(request, "_vm_up")


@pytest.fixture
def vm_restored(vm_factory: Callable[..., Machine], vm_snapshot: Path) -> Machine:
    """A machine whose guest is up, woken from a snapshot."""
    return vm_factory(snapshot=vm_snapshot)


@pytest.fixture(params=["booted", "restored"])
def vm_any(request: pytest.FixtureRequest, vm_backend: str) -> Machine:
    """A machine whose guest is up: the test runs on one that was booted in this session and never saved, and on one
    woken."""
    if request.param == "booted":
        return _up(request, "_vm_really_booted")
    machine: Machine = request.getfixturevalue("vm_restored")
    return machine


@pytest.fixture
def console(request: pytest.FixtureRequest, vm_backend: str) -> Expect:
    """The console of the test's machine (`vm_any`, `vm_restored`, `vm`, else `vm_booted`): expect, send, run."""
    from vmm.testing.guests import talk

    names = [name for name in ("vm_any", "vm_restored", "vm") if name in request.fixturenames]
    machine = request.getfixturevalue(names[0] if names else "vm_booted")
    found = request.node.stash[TALKS] = talk(machine, request.config)
    return found


# --- what is left of a test that failed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    folder: Path | None = item.config.getoption("--vm-artifacts")
    machines = item.stash.get(MACHINES, [])
    if report.when in ("setup", "call") and report.failed and folder is not None and machines:
        from vmm.testing.artifacts import left

        place = folder / re.sub(r"[^\w.-]+", "_", item.nodeid)[-100:]
        report.sections.append(("anyhyve", "\n".join(left(machines, place, item.stash.get(TALKS, None)))))
    return report


# --- what became of the guests


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput") and (told := session.config.stash.get(TOLD, None)) is not None:
        session.config.workeroutput["anyhyve"] = dict(told.counts), told.waited_s


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Of pytest-xdist: a worker has ended."""
    if (output := getattr(node, "workeroutput", {}).get("anyhyve")) is not None:
        node.config.stash.setdefault(TOLD, Told()).add(*output)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if told := config.stash.get(TOLD, None):
        terminalreporter.write_line(f"anyhyve guests: {shown(told)}")
