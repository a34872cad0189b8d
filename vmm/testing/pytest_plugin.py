"""The pytest plugin: machines as fixtures (docs/testing.md). pytest loads this file wherever anyhyve is installed, so
nothing that takes long, or is an extra, is imported before a test asks for it."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vmm.guest.lost import LOST

if TYPE_CHECKING:
    from vmm.guest.image import Image
    from vmm.machine.machine import Machine
    from vmm.machine.moment import Moment
    from vmm.testing.expect import Expect

BACKENDS = ("emu", "kvm")
MACHINES = pytest.StashKey[list["Machine"]]()  # of a test, for when it fails
TALKS = pytest.StashKey["Expect"]()

_INI = {
    "vm_kernel": "guest: a bzImage, a vmlinux, or with vm_flat any code",
    "vm_initrd": "guest: the initial RAM disk",
    "vm_append": "guest: kernel command line",
    "vm_memory": "guest: MiB of RAM",
    "vm_ready": "regular expression for the console's line at which the guest is up",
    "vm_patience": "guest seconds to wait for what the console is to show",
    "vm_wall_patience": "the same in seconds of this computer's clock: no wait is longer",
    "vm_lost": "regular expression for a console line of a guest that goes no further: a panic",
}
_DEFAULTS = {
    "vm_append": "console=ttyS0 mitigations=off",
    "vm_memory": "256",
    "vm_ready": "shell ready",
    "vm_patience": "60",
    "vm_wall_patience": "300",
    "vm_lost": LOST,
}
_CHECKS: dict[str, tuple[Callable[[str], object], str]] = {
    "vm_memory": (lambda given: 1 <= int(given) < 1 << 24, "a number of MiB"),
    "vm_patience": (lambda given: 0 < float(given) < math.inf, "a number of seconds"),
    "vm_wall_patience": (lambda given: 0 < float(given) < math.inf, "a number of seconds"),
    "vm_ready": (re.compile, "a regular expression"),
    "vm_lost": (re.compile, "a regular expression"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("anyhyve")
    group.addoption(
        "--vm-backend", default="emu", choices=(*BACKENDS, "auto", "all"),
        help="the CPU of the machines: emu (default), kvm, auto (kvm where it is), all (each test on each)",
    )  # fmt: skip
    group.addoption("--require-kvm", action="store_true", help="a test skipped for want of KVM is a failure")
    group.addoption(
        "--vm-roundtrip", type=float, metavar="N",
        help="save every machine each N guest ms, and go on from what was saved",
    )  # fmt: skip
    group.addoption(
        "--vm-artifacts", type=Path, metavar="DIR", help="snapshot, console and trace of the machines of a failed test"
    )
    group.addoption("--vm-slow", action="store_true", help="run tests marked slow_guest, too")
    for name, text in _INI.items():
        parser.addini(name, text, default=_DEFAULTS.get(name, ""))
    parser.addini("vm_flat", "guest: vm_kernel is code for 0x100000, run in 64-bit mode", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "requires_kvm: needs a KVM; where there is none the test is skipped, and the reason named",
        "backend(*names): the machines' CPU, whatever --vm-backend says: emu, kvm",
        "slow_guest: only with --vm-slow",
        "no_roundtrip(reason): its machines make no round trips",
    ):
        config.addinivalue_line("markers", line)
    every_ms = config.getoption("--vm-roundtrip")
    if every_ms is not None and not 1e-3 <= every_ms < math.inf:
        raise pytest.UsageError("--vm-roundtrip takes a number of guest ms, of at least 0.001")
    for name, (right, what) in _CHECKS.items():
        try:
            good = right(config.getini(name))
        except (ValueError, re.error):
            good = False
        if not good:
            raise pytest.UsageError(f"{name} = {config.getini(name)}: not {what}")


def pytest_report_header(config: pytest.Config) -> str:
    version = importlib.metadata.version
    parts = [f"backend {config.getoption('--vm-backend')}", f"unicorn {version('unicorn')}", f"CPU {_processor()}"]
    if (every_ms := config.getoption("--vm-roundtrip")) is not None:
        parts.append(f"a round trip every {every_ms:g} guest ms")
    return f"anyhyve {version('anyhyve')}: " + ", ".join(parts)


def _processor() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(errors="replace"), re.M)
        if found:
            return found[1]
    return platform.machine()


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
        pytest.fail(f"no guest: {error}", pytrace=False)


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
                guest = request.getfixturevalue("vm_image") if image is None else image
                machine = Machine.boot(MachineConfig(**config), guest, backend or vm_backend)
            made.append(open_machines.enter_context(machine))
            return machine

        yield make


@pytest.fixture
def vm(vm_factory: Callable[..., Machine]) -> Machine:
    """A machine with the guest loaded, which has run nothing yet."""
    return vm_factory()


def _boot(backend: str, image: Image, config: pytest.Config) -> Machine:
    """The guest, up."""
    from vmm.machine.machine import Machine, MachineConfig

    machine = Machine.boot(MachineConfig(memory_bytes=int(config.getini("vm_memory")) << 20), image, backend)
    try:
        _until_ready(machine, config)
    except BaseException:
        machine.close()
        raise
    return machine


@pytest.fixture(scope="session")
def vm_snapshot(
    vm_backend: str, vm_image: Image, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The guest when it is up, saved. It is booted once for all tests."""
    file = tmp_path_factory.mktemp("vm") / "booted.snapshot"
    with _boot(vm_backend, vm_image, pytestconfig) as machine:
        machine.save(file)
    return file


@dataclass
class _Booted:
    """The guest when it is up, to come back to; booted again after a test that closed the machine."""

    boot: Callable[[], Machine]
    machine: Machine | None = None
    moment: Moment | None = None
    failed: str | None = None  # why it could not be booted: it is not tried again for every test

    def again(self) -> Machine:
        machine = self.machine
        if self.failed is not None:
            pytest.fail(f"no guest, as before: {self.failed}", pytrace=False)
        if machine is None or machine.closed or self.moment is None:
            try:
                machine = self.machine = self.boot()
            except BaseException as error:
                self.failed = str(error).split("\n")[0]
                raise
            self.moment = machine.moment()
        machine.rewind(self.moment)
        for console in machine.board.consoles.values():
            console.typed.clear()
        return machine

    def close(self) -> None:
        if self.machine is not None:
            self.machine.close()


@pytest.fixture(scope="session")
def _vm_marked(vm_backend: str, vm_image: Image, pytestconfig: pytest.Config) -> Iterator[_Booted]:
    with closing(_Booted(lambda: _boot(vm_backend, vm_image, pytestconfig))) as booted:
        yield booted


def _talk(machine: Machine, config: pytest.Config) -> Expect:
    from vmm.testing.expect import Expect

    patience, wall = (float(config.getini(name)) for name in ("vm_patience", "vm_wall_patience"))
    return Expect(machine, seconds=patience, wall_seconds=wall, lost=config.getini("vm_lost") or None)


def _until_ready(machine: Machine, config: pytest.Config) -> None:
    from vmm.errors import GuestError

    try:
        _talk(machine, config).expect(config.getini("vm_ready"))
    except GuestError as error:
        folder = config.getoption("--vm-artifacts")
        left = [] if folder is None else _left([machine], folder / "boot", None)
        pytest.fail("\n".join((f"{error}\n(vm_ready says what to wait for)", *left)), pytrace=False)


@pytest.fixture
def vm_booted(request: pytest.FixtureRequest, vm_backend: str) -> Machine:
    """A machine whose guest is up, and which was never saved. It is booted once, and reset to that moment for each
    test; with round trips, which would be of another machine, it is booted for each."""
    if request.config.getoption("--vm-roundtrip") is not None:
        machine: Machine = request.getfixturevalue("vm")
        _until_ready(machine, request.config)
        return machine
    machine = request.getfixturevalue("_vm_marked").again()
    request.node.stash.setdefault(MACHINES, []).append(machine)
    return machine


@pytest.fixture
def vm_restored(vm_factory: Callable[..., Machine], vm_snapshot: Path) -> Machine:
    """A machine whose guest is up, woken from a snapshot."""
    return vm_factory(snapshot=vm_snapshot)


@pytest.fixture(params=["booted", "restored"])
def vm_any(request: pytest.FixtureRequest, vm_backend: str) -> Machine:
    """A machine whose guest is up: the test runs on one never saved and on one woken."""
    machine: Machine = request.getfixturevalue(f"vm_{request.param}")
    return machine


@pytest.fixture
def console(request: pytest.FixtureRequest, vm_backend: str) -> Expect:
    """The console of the test's machine (`vm_any`, `vm_restored`, `vm`, else `vm_booted`): expect, send, run."""
    names = [name for name in ("vm_any", "vm_restored", "vm") if name in request.fixturenames]
    machine = request.getfixturevalue(names[0] if names else "vm_booted")
    found = request.node.stash[TALKS] = _talk(machine, request.config)
    return found


# --- what is left of a test that failed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    folder: Path | None = item.config.getoption("--vm-artifacts")
    machines = item.stash.get(MACHINES, [])
    if report.when in ("setup", "call") and report.failed and folder is not None and machines:
        place = folder / re.sub(r"[^\w.-]+", "_", item.nodeid)[-100:]
        report.sections.append(("anyhyve", "\n".join(_left(machines, place, item.stash.get(TALKS, None)))))
    return report


def _left(machines: list[Machine], place: Path, talk: Expect | None) -> list[str]:
    from vmm.testing.artifacts import leave

    lines = [line for i, machine in enumerate(machines) for line in leave(machine, place, f"vm{i}")]
    if talk is not None:
        try:
            (place / "said.txt").write_text("".join(f"{line}\n" for line in talk.log))
        except OSError as error:
            lines.append(f"said.txt: {error}")
    return lines
