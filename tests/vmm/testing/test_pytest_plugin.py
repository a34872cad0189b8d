"""The pytest plugin as its users run it: a project of their own, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapshot.chain import Chain
from snapshot.verify import verify
from tests.conftest import OWN

pytestmark = pytest.mark.no_roundtrip("it runs pytest in other processes")
INI = f"""[pytest]
vm_kernel = {OWN}
vm_flat = true
vm_memory = 16
vm_ready = own guest
addopts = -p no:cacheprovider
"""


class Project:
    """`project(source, *arguments)`: pytest on a project with this one test file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder.with_name(f"{folder.name}-cache")  # the user's own is not for tests
        (folder / "pytest.ini").write_text(INI)

    def __call__(self, source: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        (self.folder / "test_it.py").write_text(source)
        command = [sys.executable, "-m", "pytest", "-rA", *map(str, arguments)]
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.cache)}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def outcome(done, **expected):
    """The counts in pytest's closing line."""
    line = done.stdout.splitlines()[-1] if done.stdout else done.stderr
    for name, count in expected.items():
        assert f"{count} {name}" in line, done.stdout + done.stderr
    return done.stdout


FIXTURES = """
def test_a_fresh_machine(vm, console):
    assert vm.position == 0
    console.expect("own (guest)")
    assert "anyhyve own guest" in console.output

def test_one_that_is_up(vm_booted):
    assert vm_booted.position > 0 and not vm_booted.board.devices["com1"].state.scr
    vm_booted.board.devices["com1"].state.scr = 0x5A

def test_one_that_is_up_is_reset_for_each_test(vm_booted):
    assert vm_booted.board.devices["com1"].state.scr == 0

def test_a_woken_one(vm_restored, backend):
    assert vm_restored.backend == backend

def test_both(vm_any, console):
    console.send("xx")
    assert console.expect(r"\\[(x)\\]")[1] == "x"
    vm_any.save.__name__

def test_many(vm_factory, vm_snapshot):
    first, second, third = vm_factory(), vm_factory(memory_bytes=8 << 20), vm_factory(snapshot=vm_snapshot)
    assert second.config.memory_bytes == 8 << 20 and third.position > first.position
"""


def test_fixtures(project):
    said = outcome(project(FIXTURES), passed=7)
    assert "anyhyve 0." in said and "backend emu, unicorn 2." in said and "CPU " in said
    assert "test_both[booted]" in said and "test_both[restored]" in said


def test_round_trips_under_any_test(project):
    source = FIXTURES + "    assert third.loop.hooks[0].every_ns == 500_000\n"
    said = outcome(project(source, "--vm-roundtrip=0.5"), passed=7)
    assert "a round trip every 0.5 guest ms" in said


TRIPS = """
from vmm.machine.machine import Machine, MachineConfig

def test_it(vm_image):
    with Machine.boot(MachineConfig(memory_bytes=16 << 20), vm_image) as machine:
        machine.run(position=8_000_000)
        print("made", sum(hook.made for hook in machine.loop.hooks), machine.digests())
"""


def test_round_trips_leave_no_trace(project):
    """Of machines no fixture made, either."""
    digests = {}
    for every in (0, 0.1, 0.7):
        said = project(TRIPS, *([f"--vm-roundtrip={every}"] if every else [])).stdout
        line = next(line for line in said.splitlines() if line.startswith("made "))
        _, made, digests[every] = line.split(" ", 2)
        assert (int(made) > 2) == bool(every), line
    assert len(set(digests.values())) == 1


def test_round_trips_find_what_a_save_forgets(project):
    """Planted: the serial port's scratch register is not saved. Without round trips nothing sees it."""
    source = """
from vmm.devices.isa.uart import Uart

def restored(self, restored=Uart.restored):
    self.state.scr = 0
    restored(self)

def test_it(vm_factory, vm_image, monkeypatch):
    machine = vm_factory()
    monkeypatch.setattr(Uart, "restored", restored)
    machine.board.devices["com1"].state.scr = 7
    machine.run(until_ns=2_000_000)
    assert machine.board.devices["com1"].state.scr == 7
"""
    outcome(project(source), passed=1)
    outcome(project(source, "--vm-roundtrip=1"), failed=1)


def test_no_roundtrip_is_heard(project):
    source = "import pytest\n@pytest.mark.no_roundtrip('why')\ndef test_it(vm):\n    assert not vm.loop.hooks\n"
    outcome(project(source, "--vm-roundtrip=1"), passed=1)


FAILS = """
def test_fails(vm_booted, console):
    console.send("xy")
    vm_booted.run(position=vm_booted.position + 100_000)
    assert False, "for a reason"
"""


def test_what_a_failed_test_leaves(project):
    said = outcome(project(FAILS, "--vm-artifacts=left"), failed=1)
    (place,) = (project.folder / "left").iterdir()
    assert {path.name for path in place.iterdir()} == {"vm0.snapshot", "vm0.console", "vm0.trace", "said.txt"}
    verify(place / "vm0.snapshot")
    with Chain(place / "vm0.snapshot") as chain:
        assert all(image.places is not None for image in chain.rams), "not packed"
    assert b"anyhyve own guest" in (place / "vm0.console").read_bytes()
    assert (place / "said.txt").read_text() == "send 'xy'\n"
    trace = (place / "vm0.trace").read_text().splitlines()
    assert trace[0].startswith("position ") and any(line.startswith("rip ") for line in trace)
    assert len([line for line in trace if ": " in line]) == 64
    assert "anyhyve restore left/" in said


def test_two_cpus(project):
    """Each machine has them, and what is left of one shows both."""
    source = """
def test_fresh(vm):
    assert len(vm.cpus) == 2

def test_up(vm_booted):
    assert vm_booted.config.cpus != 2
"""
    outcome(project(source, "-o", "vm_cpus=2", "--vm-artifacts=left"), passed=1, failed=1)
    (place,) = (project.folder / "left").iterdir()
    trace = (place / "vm0.trace").read_text().splitlines()
    assert "cpu.0, whose turn it is" in trace and "cpu.1" in trace
    assert len([line for line in trace if line.startswith("rip ")]) == 2


def test_a_test_that_passes_leaves_nothing(project):
    outcome(project("def test_it(vm):\n    pass\n", "--vm-artifacts=left"), passed=1)
    assert not (project.folder / "left").exists()


def test_a_guest_that_never_says_it(project):
    source = """
def test_waits(vm, console):
    console.expect("never", seconds=0.01)

def test_ends(vm_factory, vm_image):
    from vmm.guest.image import Image
    from vmm.testing.expect import Expect
    Expect(vm_factory(Image(b"\\xfa\\xf4", flat=True))).expect("never")
"""
    said = outcome(project(source), failed=2)
    assert "the guest never said 'never': waited 0.01 guest seconds; its last lines:" in said
    assert "the guest never said 'never': it halted" in said


CLOSES = """
import pytest

def test_closes(vm_factory):
    with vm_factory() as machine:
        machine.run(until="own guest")
        assert False

@pytest.fixture
def readied(vm):
    vm.run(until="own guest")
    assert False

def test_of_a_fixture_that_fails(readied):
    pass

def test_passes():
    pass
"""


def test_what_is_left_of_a_machine_that_is_closed_and_of_one_of_a_fixture(project):
    said = outcome(project(CLOSES, "--vm-artifacts=left"), failed=1, error=1, passed=1)
    assert "vm0: it is closed, and leaves no more" in said
    left = {path.name for path in (project.folder / "left").rglob("test_it.py_test_of*/*")}
    assert left == {"vm0.snapshot", "vm0.console", "vm0.trace"}


def test_what_is_left_of_a_guest_that_does_not_come_up(project):
    (project.folder / "pytest.ini").write_text(INI.replace("own guest", "never\nvm_patience = 0.001"))
    said = outcome(project("def test_it(vm_booted):\n    pass\n", "--vm-artifacts=left"), error=1)
    assert "vm0: anyhyve restore " in said and (project.folder / "left" / "boot" / "vm0.snapshot").exists()


def test_nothing_can_be_left(project):
    (project.folder / "left").write_text("a file")
    said = outcome(project(FAILS + "\ndef test_passes():\n    pass\n", "--vm-artifacts=left"), failed=1, passed=1)
    assert "vm0: " in said and "said.txt: " in said


SPOILS = """
import pytest

@pytest.fixture(autouse=True)
def as_booted(vm_booted):
    assert not vm_booted.board.console.typed and not vm_booted.closed
    if not hasattr(pytest, "first"):
        pytest.first = vm_booted.position
    assert vm_booted.position == pytest.first

def test_types(vm_booted):
    vm_booted.send(b"left over")

def test_remembers(vm_booted):
    vm_booted.run(position=vm_booted.position + 100_000)
    vm_booted.moment()

def test_closes(vm_booted):
    vm_booted.close()

def test_last():
    pass
"""


def test_what_a_test_does_to_the_booted_machine_the_next_does_not_see(project):
    outcome(project(SPOILS), passed=4)


SPEAKS = """
import pytest

@pytest.mark.parametrize("key", "abc")
def test_it(vm_booted, console, key):
    assert "anyhyve own guest" in console.output and not any(f"[{other}]" in console.output for other in "abc")
    console.send(key)
    console.expect(rf"\\[{key}\\]")
    assert f"[{key}]" in console.output
    assert key != "c"
"""


def test_what_a_guest_has_said_to_one_test_the_next_does_not_see(project):
    """Nor is it among what is left of it."""
    outcome(project(SPEAKS, "--vm-artifacts=left"), passed=2, failed=1)
    (file,) = (project.folder / "left").rglob("vm0.console")
    written = file.read_bytes()
    assert b"anyhyve own guest" in written and b"[c]" in written
    assert b"[a]" not in written and b"[b]" not in written


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vm_cache_mib", "0"),
        ("vm_memory", "much"),
        ("vm_memory", "0"),
        ("vm_board", "q35"),
        ("vm_cpus", "0"),
        ("vm_patience", "nan"),
        ("vm_patience", "-1"),
        ("vm_ready", "("),
    ],
)
def test_an_option_that_says_nothing(project, name, value):
    (project.folder / "pytest.ini").write_text(f"[pytest]\n{name} = {value}\n")
    done = project("def test_it():\n    pass\n")
    assert done.returncode == 4 and done.stderr.startswith(f"ERROR: {name} = {value}: not a ")


def test_a_backend_there_is_not(project):
    done = project("import pytest\n@pytest.mark.backend('nope')\ndef test_it(vm):\n    pass\n")
    assert "no backend nope; there are emu, kvm" in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("ini", "why"),
    [
        ("[pytest]\n", "no guest: set vm_kernel"),
        ("[pytest]\nvm_kernel = nowhere\n", "no guest: "),
        (INI.replace("own guest", "never\nvm_patience = 0.01"), "the guest never said 'never'"),
    ],
)
def test_a_project_set_up_wrongly(project, ini, why):
    (project.folder / "pytest.ini").write_text(ini)
    said = outcome(project("def test_it(vm_booted):\n    pass\n"), error=1)
    assert why in said and "Traceback" not in said


@pytest.mark.parametrize("every", ["0", "-1", "1e-9", "nan", "inf"])
def test_a_wrong_round_trip(project, every):
    done = project("def test_it():\n    pass\n", f"--vm-roundtrip={every}")
    assert done.returncode == 4 and "a number of guest ms, of at least 0.001" in done.stderr


def test_slow_guests_wait_to_be_asked_for(project):
    source = "import pytest\n@pytest.mark.slow_guest\ndef test_it(vm):\n    pass\n"
    assert "a slow guest: --vm-slow runs it" in outcome(project(source), skipped=1)
    outcome(project(source, "--vm-slow"), passed=1)


KVM = """
import pytest

@pytest.mark.requires_kvm
def test_required():
    pass

@pytest.mark.backend("kvm")
def test_chosen(vm, backend):
    assert vm.backend == backend == "kvm"

def test_as_asked(vm, backend):
    assert vm.backend == backend
"""
NO_KVM = "import kvmbackend.vm\n\nkvmbackend.vm.DEVICE = '/nowhere/kvm'\n"


def test_where_there_is_no_kvm(project):
    (project.folder / "conftest.py").write_text(NO_KVM)
    said = outcome(project(KVM), passed=1, skipped=2)
    assert "no KVM: " in said and "/nowhere/kvm" in said
    outcome(project(KVM, "--vm-backend=all"), passed=1, skipped=3)
    said = outcome(project(KVM, "--vm-backend=auto"), passed=1, skipped=2)
    assert "backend auto: emu (kvm: there is no /nowhere/kvm" in said
    said = outcome(project(KVM, "--require-kvm"), passed=1, errors=2)
    assert "/nowhere/kvm" in said and "(--require-kvm)" in said


def test_where_there_is_a_kvm(crossing, project):
    said = outcome(project(KVM, "--vm-backend=all", "--require-kvm"), passed=4)
    assert "test_as_asked[emu]" in said and "test_as_asked[kvm]" in said and "test_chosen[kvm]" in said


def test_the_plugin_costs_others_nothing(project):
    """A project that has nothing to do with us: no engine and no property testing is loaded for it."""
    source = """
import sys

def test_it():
    assert not {"unicorn", "vmm.machine", "vmm.testing.subject", "emu"} & sys.modules.keys()
"""
    outcome(project(source), passed=1)


def test_a_guest_that_does_not_come_up_is_booted_once(project):
    ini = INI.replace("own guest", "never\nvm_patience = 0.001")
    (project.folder / "pytest.ini").write_text(ini)
    source = "def test_one(vm_booted):\n    pass\n\ndef test_two(console):\n    pass\n"
    said = outcome(project(source, "--vm-artifacts=left"), errors=2)
    said = said.partition("short test summary")[0]  # which, where CI is set, says all once more
    assert said.count("(vm_ready says what to wait for)") == 1
    assert "no guest, as before: the guest never said 'never': waited 0.001 guest seconds" in said


def test_a_guest_that_is_lost(project):
    (project.folder / "pytest.ini").write_text(INI.replace("own guest", "never\nvm_lost = anyhyve (own)"))
    said = outcome(project("def test_it(vm_booted):\n    pass\n"), error=1)
    assert "the guest never said 'never': it is lost: anyhyve own" in said


# --- boots that are kept

COUNTS = """
import os
from vmm.machine.machine import Machine

def boot(config, image, *arguments, boot=Machine.boot, **options):
    fd = os.open("booted", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"x")
    os.close(fd)
    return boot(config, image, *arguments, **options)

Machine.boot = boot
"""


class Counted(Project):
    """A project that counts the boots of its machines."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "conftest.py").write_text(COUNTS)

    @property
    def booted(self) -> int:
        marks = self.folder / "booted"
        return len(marks.read_bytes()) if marks.exists() else 0

    @property
    def kept(self) -> set[str]:
        """Names in the folder."""
        folder = self.cache / "anyhyve" / "boots"
        return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path)


UP = """
def test_booted(vm_booted, console):
    assert console.output == "anyhyve own guest"
    console.send("xx")
    console.expect("[[]x[]]")

def test_restored(vm_restored, console):
    assert console.output == ""
    console.send("xx")
    console.expect("[[]x[]]")

def test_again(vm_booted, vm_restored):
    assert vm_booted.digests() == vm_restored.digests()
    vm_booted.restart()
    assert vm_booted.position == 0
"""


def test_the_next_session_boots_nothing(counted):
    first = outcome(counted(UP), passed=3)
    assert counted.booted == 1 and len(counted.kept) == 2
    assert f"boots kept in {counted.cache}/anyhyve/boots: 0, 0 MiB" in first
    assert "anyhyve guests: 1 booted and kept, 1 from the cache\n" in first
    second = outcome(counted(UP), passed=3)
    assert counted.booted == 1 and "anyhyve guests: 2 from the cache\n" in second
    assert f"boots kept in {counted.cache}/anyhyve/boots: 1, " in second


def test_workers_boot_once(counted):
    """Each worker runs each test."""
    said = outcome(counted(UP, "-n", 8, "--dist=each"), passed=24)
    assert counted.booted == 1 and len(counted.kept) == 2
    assert "anyhyve guests: 1 booted and kept, 15 from the cache" in said


def test_workers_fail_once(counted):
    (counted.folder / "pytest.ini").write_text(INI.replace("own guest", "never\nvm_patience = 0.001"))
    said = outcome(counted(UP, "-n", 4, "--dist=each"), errors=12)
    assert counted.booted == 1 and "no guest, as in another process: the guest never said 'never'" in said


def test_a_machine_that_was_never_saved_is_really_booted(counted):
    source = """
def test_it(vm_any, request):
    assert (vm_any._scrub is None and vm_any.image is not None) == ("[booted]" in request.node.name)

def test_as_booted(vm_any, console, request):
    assert console.output == ("anyhyve own guest" if "[booted]" in request.node.name else "")
"""
    for booted in (2, 3, 4):
        said = outcome(counted(source), passed=4)
        assert counted.booted == booted
    assert "anyhyve guests: 1 booted, 1 from the cache\n" in said


def test_another_guest_is_booted(counted):
    outcome(counted(UP), passed=3)
    (counted.folder / "pytest.ini").write_text(INI.replace("vm_memory = 16", "vm_memory = 17"))
    outcome(counted(UP), passed=3)
    assert counted.booted == 2 and len(counted.kept) == 4
    (counted.folder / "pytest.ini").write_text(INI.replace("own guest", "anyhyve own guest"))
    outcome(counted(UP), passed=3)
    assert counted.booted == 3
    (counted.folder / "pytest.ini").write_text(INI + "vm_patience = 50\n")
    outcome(counted(UP), passed=3)
    assert counted.booted == 3


@pytest.mark.parametrize(
    ("option", "why"), [("--vm-no-cache", "--vm-no-cache"), ("--vm-roundtrip=0.5", "--vm-roundtrip is of boots, too")]
)
def test_without_a_cache(counted, option, why):
    said = outcome(counted("def test_it(vm_booted, vm_restored):\n    pass\n", option), passed=1)
    assert f"no boots are kept: {why}" in said and counted.booted == 2 and not counted.kept


def test_a_cache_somewhere_else_and_cleared(counted):
    for _ in range(2):
        outcome(counted(UP, "--vm-cache=here"), passed=3)
    assert counted.booted == 1 and not counted.kept and len(list((counted.folder / "here").iterdir())) == 2
    said = outcome(counted(UP, "--vm-cache=here", "--vm-cache-clear", "-n", 2, "--dist=each"), passed=6)
    assert counted.booted == 2 and "here: 0, 0 MiB (1 removed)" in said


def test_workers_clear_nothing(counted):
    """Planted: a boot that is kept when the workers start."""
    (counted.folder / "conftest.py").write_text(f"""{COUNTS}
import pathlib, pytest

@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        pathlib.Path("here/kept.snapshot").touch()
""")
    (counted.folder / "here").mkdir(0o700)
    outcome(counted(UP, "--vm-cache=here", "--vm-cache-clear", "-n", 1), passed=3)
    assert (counted.folder / "here" / "kept.snapshot").exists()


def test_a_cache_that_is_not_ours_alone(counted):
    folder = counted.folder / "here"
    folder.mkdir(0o755)
    said = outcome(counted(UP, "--vm-cache=here"), passed=3)
    assert f"no boots are kept: {folder}: not a folder of this user alone (owner {os.getuid()}, mode 755)" in said
    assert counted.booted == 2 and not list(folder.iterdir())


def test_no_room_for_a_boot(counted):
    (counted.folder / "conftest.py").write_text(f"""{COUNTS}
from vmm.errors import BackendError

def save(self, path, *, save=Machine.save, **options):
    if "boots" in path.parts:
        raise BackendError("no space")
    save(self, path, **options)

Machine.save = save
""")
    said = outcome(counted("def test_it(vm_booted):\n    pass\n"), passed=1)
    assert "anyhyve guests: 1 booted, but not kept (no space)\n" in said


@pytest.mark.parametrize("fixture", ["vm_booted", "vm_restored"])
@pytest.mark.parametrize("what", ["its end", "its RAM"])
def test_a_boot_that_was_damaged(counted, fixture, what):
    source = f"def test_it({fixture}):\n    pass\n"
    outcome(counted(source), passed=1)
    (file,) = (counted.cache / "anyhyve" / "boots").glob("*.snapshot")
    if what == "its end":
        os.truncate(file, 5000)
    else:
        data = bytearray(file.read_bytes())
        data[data.index(OWN.read_bytes()[:64])] ^= 1
        file.chmod(0o600)
        file.write_bytes(data)
    said = outcome(counted(source), passed=1)
    assert counted.booted == 2 and "1 kept, but of no use (" in said
    outcome(counted(source), passed=1)
    assert counted.booted == 2


def test_a_session_whose_sources_change_keeps_nothing(counted):
    """Planted: a time of start long ago."""
    (counted.folder / "conftest.py").write_text(COUNTS + "\nfrom vmm.testing import options\noptions.STARTED_NS = 0\n")
    said = outcome(counted(UP), passed=3)
    assert "was changed after the session had begun" in said and not counted.kept
