"""cut_anywhere finds what a save forgets or changes; and finds nothing in ours."""

from __future__ import annotations

import dataclasses
import runpy
import subprocess
import sys

import pytest

from tests.conftest import OWN
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig
from vmm.saving.saved import Saved
from vmm.testing import cuts
from vmm.testing.cuts import Trace, cut_anywhere

END = 6_000_000


def boot(mib=8) -> Machine:
    return Machine.boot(MachineConfig(memory_bytes=mib << 20), Image.from_files(OWN, flat=True))


def test_no_trace_at_a_hundred_cuts(tmp_path):
    assert cut_anywhere(boot, end=END, points=100, folder=tmp_path).points == 100


@pytest.mark.slow
def test_no_trace_at_ten_thousand_cuts(tmp_path):
    report = cut_anywhere(boot, end=END, points=10_000, folder=tmp_path, seed="many")
    print(f"{report.points} cuts, {report.wall_s / report.points * 1e3:.1f} ms each")


def forget(monkeypatch, change):
    """Let every restore come out changed, as if a field had not been saved."""
    decode = Saved.decode.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Saved, "decode", classmethod(lambda cls, chain: change(decode(cls, chain))))


def without_xmm3(saved):
    (cpu,) = saved.cpus
    xmm = list(cpu.fpu.xmm)
    xmm[3] = bytes(16)
    cpu.fpu.xmm = tuple(xmm)
    return saved


def with_another_divisor(saved):
    saved.states["com1"].divisor = 0
    return saved


def with_time_lost(saved):
    saved.states["clock"].skipped_ns += 1
    return saved


@pytest.mark.parametrize(
    ("change", "name"),
    [(without_xmm3, "cpu.0.fpu"), (with_another_divisor, "com1.divisor"), (with_time_lost, "clock.skipped_ns")],
)
def test_what_is_forgotten_is_named(monkeypatch, tmp_path, change, name):
    forget(monkeypatch, change)
    with pytest.raises(Trace) as found:
        cut_anywhere(boot, end=END, points=100, folder=tmp_path, fresh=10**9)
    assert name in found.value.fields and name in str(found.value)
    assert found.value.first - found.value.cut < 16, "to the instruction: it differs from the first on"


def test_a_difference_that_shows_late_is_bisected(monkeypatch, tmp_path):
    """Planted: a woken machine changes a byte, not at once but when it has run on for a while."""
    run = Machine.run
    cut = 0

    def late(self, **aim):
        stop = run(self, **aim)
        if self._scrub is not None and self.position >= cut + 5000:
            self.ram.slice(0x3F_F000, 1)[0] = 1
        return stop

    restore = Machine.restore.__func__  # type: ignore[attr-defined]

    def woken(cls, *arguments, **options):
        nonlocal cut
        machine = restore(cls, *arguments, **options)
        cut = machine.position
        return machine

    monkeypatch.setattr(Machine, "run", late)
    monkeypatch.setattr(Machine, "restore", classmethod(woken))
    with pytest.raises(Trace, match=r"ram.0.0x3ff000: '00.* became '01") as found:
        cut_anywhere(boot, end=END, points=20, folder=tmp_path, fresh=10**9)
    assert found.value.cut + 5000 <= found.value.first < found.value.cut + 5016


def test_a_save_that_changes_the_machine_is_found(monkeypatch, tmp_path):
    save = Machine.save

    def clumsy(self, path, **options):
        save(self, path, **options)
        self.board.devices["com1"].state.thr_empty ^= True  # as bhyve's did

    monkeypatch.setattr(Machine, "save", clumsy)
    with pytest.raises(Trace, match="the machine that was saved") as found:
        cut_anywhere(boot, end=END, points=20, folder=tmp_path, fresh=10**9)
    assert list(found.value.fields) == ["com1.thr_empty"]
    left = runpy.run_path(str(found.value.files[0]))["test_the_cut_leaves_no_trace"]
    with pytest.raises(AssertionError):
        left(tmp_path)
    monkeypatch.undo()
    left(tmp_path)


def test_a_difference_only_a_new_process_shows_is_found(monkeypatch, tmp_path):
    """Planted: what it is to run there changes a byte of RAM."""
    spoils = "run = Machine.run\ndef spoiled(self, **how):\n    self.ram.slice(0x3F_F000, 1)[0] = 1\n"
    spoils += "    return run(self, **how)\nMachine.run = spoiled\n"
    monkeypatch.setattr(cuts, "WAKE", f"from vmm.machine.machine import Machine\n{spoils}{cuts.WAKE}")
    with pytest.raises(Trace, match="woken in a new process") as found:
        cut_anywhere(boot, end=END, points=3, folder=tmp_path, fresh=1)
    assert list(found.value.fields) == ["ram"] and found.value.first - found.value.cut < 16
    left = runpy.run_path(str(found.value.files[0]))["test_the_cut_leaves_no_trace"]
    with pytest.raises(AssertionError):
        left(tmp_path)


def test_a_byte_too_many_on_the_console_is_found(monkeypatch, tmp_path):
    """Planted: it says something when it wakes, and nothing in its state tells."""
    assign = Machine.assign

    def talkative(self, saved):
        assign(self, saved)
        for byte in b"{!":
            self.board.console.transmit(byte)

    monkeypatch.setattr(Machine, "assign", talkative)
    with pytest.raises(Trace, match=r"console: '.*' became '.*{!") as found:
        cut_anywhere(boot, end=END, points=1, folder=tmp_path, fresh=10**9)
    assert list(found.value.fields) == ["console"]


def test_a_woken_machine_that_ends_is_a_trace(monkeypatch, tmp_path):
    assign = Machine.assign

    def lame(self, saved):
        assign(self, saved)
        self.board.state.request = "reset"

    monkeypatch.setattr(Machine, "assign", lame)
    with pytest.raises(Trace, match="the machine that was woken first differs") as found:
        cut_anywhere(boot, end=END, points=1, folder=tmp_path, fresh=10**9)
    assert found.value.first - found.value.cut < 16


def test_a_guest_that_ends_too_early(tmp_path):
    with pytest.raises(AssertionError, match="the guest ends before"):
        cut_anywhere(lambda: Machine.boot(MachineConfig(memory_bytes=8 << 20), Image(b"\xfa\xf4", flat=True)),
                     end=100, points=10, folder=tmp_path)  # fmt: skip


def test_every_cut_lies_before_the_end(monkeypatch, tmp_path):
    run, furthest = Machine.run, list[int]()

    def noted(self, position):
        furthest.append(position)
        return run(self, position=position)

    monkeypatch.setattr(Machine, "run", noted)
    cut_anywhere(boot, end=10_000, points=25, folder=tmp_path, fresh=10**9)
    assert max(furthest) == 10_000


def test_the_test_that_is_left_fails_by_itself(monkeypatch, tmp_path):
    """The planted fault is in the file: what was saved there is wrong for ever."""
    states = Machine.states

    def forgetful(self):
        found = states(self)
        if sys._getframe(1).f_code.co_name == "_contents":
            found["cpu.0"] = dataclasses.replace(found["cpu.0"], r15=0)
        return found

    monkeypatch.setattr(Machine, "states", forgetful)
    with pytest.raises(Trace) as found:
        cut_anywhere(boot, end=END, points=20, folder=tmp_path, fresh=10**9)
    assert "cpu.0.r15" in found.value.fields
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", found.value.files[0]], capture_output=True, text=True)
    assert run.returncode == 1 and "1 failed" in run.stdout, run.stdout
