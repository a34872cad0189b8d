"""What this host's CPUs can do is found by trying: each check can fail alone, and what was found is kept."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.vmm.cpu.hosts import host
from tests.vmm.cpu.program import assemble
from vmm.cli import options
from vmm.cpu import backends
from vmm.debug import selftest
from vmm.debug.selftest import CHECKS, Findings
from vmm.errors import RequestError

SOURCE = Path(selftest.__file__).with_name("selftest.S")
_BASE = 0x100000


def test_the_image_is_what_the_source_says():
    image, labels = assemble(SOURCE.read_text())
    assert image == SOURCE.with_suffix(".bin").read_bytes(), "see the commands at its head"
    assert labels["checks_end"] - labels["checks"] == 8 * len(CHECKS)


def test_the_emulated_cpu_passes():
    assert selftest.examine("emu") == Findings()
    assert selftest._stepping("emu") is None, "in lockstep with itself"


@pytest.mark.parametrize("number", [0, 9, len(CHECKS) - 1])
@pytest.mark.parametrize(
    "instead",
    ["0f0b", "f4ebfd", "ebfe", "31c00f22d8"],
    ids=["a trap", "a halt", "a loop", "a shutdown"],  # the last: no page tables
)
def test_a_check_that_fails_is_named_and_the_others_are_tried(monkeypatch, tmp_path, number, instead):
    code, labels = assemble(SOURCE.read_text())
    image = bytearray(code)
    at = labels["checks"] - _BASE + 8 * number
    place = int.from_bytes(image[at : at + 8], "little") - _BASE
    image[place : place + len(instead) // 2] = bytes.fromhex(instead)
    monkeypatch.setattr(selftest, "_IMAGE", tmp_path / "broken")
    monkeypatch.setattr(selftest, "_PATIENCE_S", 0.5)
    (tmp_path / "broken").write_bytes(image)
    assert selftest.examine("emu").failed == (CHECKS[number],)


def test_what_this_hosts_kvm_can_do(kvm):
    found = selftest.examine(kvm)
    if host() == "kvm_pvm":
        assert "SYSCALL" in found.failed and "SYSCALL" in (found.runs or "")
        assert "single step is not to be relied on" in (found.stepping or "")
    elif host() == "qemu-svm":  # its TSC is the host's, which is not stable on a busy one
        assert set(found.failed) <= {"the TSC as WRMSR sets it"}
    else:
        assert found.failed == ()
    if host() is None:  # in QEMU's SVM a page fault after a single step may count as the second of two
        assert found.stepping is None


def test_what_fails_once_is_tried_again(monkeypatch):
    """And what fails each time has failed."""
    last = len(selftest.CHECKS) - 1
    outcomes = [{*range(last), last} - {2, last}, {*range(last)} - {2}, {*range(last + 1)} - {2}]
    monkeypatch.setattr(selftest, "_passed", lambda backend: outcomes.pop(0))
    assert selftest._failed("emu") == [selftest.CHECKS[2]] and not outcomes
    outcomes = [set(range(last + 1))]
    assert selftest._failed("emu") == [] and not outcomes, "all is well: it is tried once"


# --- what was found is kept


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "anyhyve" / "kvm.json"


@pytest.fixture
def tried(monkeypatch, cache):
    """How often it was tried: a KVM that fails a check."""
    calls = []

    def failed(backend):
        calls.append(backend)
        return [CHECKS[3]]

    monkeypatch.setattr(backends, "probe", lambda name: "there")
    monkeypatch.setattr(selftest, "_failed", failed)
    monkeypatch.setattr(selftest, "_stepping", lambda backend: "it does not")
    return calls


def test_it_is_tried_once(tried, cache):
    wanted = Findings((CHECKS[3],), "it does not")
    assert [selftest.findings("kvm") for _ in range(3)] == [wanted] * 3 and len(tried) == 1
    assert selftest.examine("kvm") == wanted and len(tried) == 2, "doctor looks anew"
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_another_kernel_is_tried_anew(tried, monkeypatch):
    selftest.findings("kvm")
    monkeypatch.setattr(platform, "release", lambda: "99.0")
    selftest.findings("kvm")
    assert len(tried) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff", b'{"host": "%s"}', b'{"host": "%s", "failed": 3}'])
def test_a_file_that_says_nothing_is_passed_over(tried, cache, damage):
    selftest.findings("kvm")
    cache.write_bytes(damage.replace(b"%s", selftest._host().encode()))
    selftest.findings("kvm")
    assert len(tried) == 2


def test_no_room_to_keep_it(tried, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("in the way")
    assert [selftest.findings("kvm").failed for _ in range(2)] == [(CHECKS[3],)] * 2 and len(tried) == 2


def test_a_user_without_a_home(tried, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert [selftest.findings("kvm").failed for _ in range(2)] == [(CHECKS[3],)] * 2 and len(tried) == 2


# --- who asks


def test_auto_says_which_it_took(tried, capsys):
    assert options.chosen("auto") == "emu"
    assert (
        capsys.readouterr().err
        == f"anyhyve: backend emu: this host's KVM fails 1 of {len(CHECKS)} checks: {CHECKS[3]}\n"
    )
    assert [options.chosen(name) for name in ("kvm", "emu")] == ["kvm", "emu"] and capsys.readouterr().err == ""
    with pytest.raises(RequestError, match="there is no backend 'xen'"):
        options.chosen("xen")
