"""What the host has not got is one clear BackendError that names it, and nothing stays open."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re

import pytest

from kvmbackend import abi, vm
from kvmbackend.cpu import KvmCpu
from tests.vmm.cpu.hosts import host
from vmm.cpu import backends
from vmm.cpu import model as cpu_model
from vmm.cpu.protocol import CpuState
from vmm.debug import selftest
from vmm.errors import BackendError, RequestError
from vmm.machine.machine import Machine, MachineConfig


def descriptors():
    """What KVM's open files lead to; other tests' machines may go at any time, none may come."""
    gc.collect()
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum("kvm" in target for target in found)


@pytest.fixture(autouse=True)
def nothing_stays_open():
    before = descriptors()
    yield
    assert descriptors() <= before


def test_no_device(monkeypatch, tmp_path):
    monkeypatch.setattr(vm, "DEVICE", str(tmp_path / "kvm"))
    with pytest.raises(BackendError, match=r"^kvm: there is no .*kvm \(no virtualization here"):
        backends.probe("kvm")
    name, why = selftest.choose()
    assert name == "emu" and "there is no" in why


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "no permission to read and write"),
        (errno.EROFS, "Read-only file system"),
        (errno.ENXIO, "No such device"),
    ],
)
def test_a_device_that_cannot_be_opened(monkeypatch, number, words):
    def refuse(path, *_):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BackendError, match=f"^kvm: .*{words}"):
        backends.probe("kvm")


def test_something_else_in_its_place(monkeypatch, tmp_path):
    (tmp_path / "kvm").write_bytes(b"")
    monkeypatch.setattr(vm, "DEVICE", str(tmp_path / "kvm"))
    with pytest.raises(BackendError, match=r"KVM_GET_API_VERSION: Inappropriate ioctl"):
        backends.probe("kvm")


def test_another_interface(kvm, monkeypatch):
    monkeypatch.setattr(abi, "API_VERSION", 13)
    with pytest.raises(BackendError, match="speaks version 12 of the interface, not 13"):
        backends.probe("kvm")


@pytest.mark.parametrize("name", sorted(abi.REQUIRED))
def test_a_missing_capability_is_named(kvm, monkeypatch, name):
    monkeypatch.setitem(abi.REQUIRED, name, 0x7FFFFFFF)
    with pytest.raises(BackendError, match=f"has not got KVM_CAP_{name}$"):
        backends.probe("kvm")


def test_a_processor_that_lacks_a_feature_of_the_model(kvm, monkeypatch):
    monkeypatch.setattr(cpu_model, "lacking", lambda host: ["popcnt"])
    monkeypatch.setattr(vm, "_processor_flags", set)
    with pytest.raises(BackendError, match="has not got popcnt of x86-64-v2"):
        Machine.boot(MachineConfig(memory_bytes=1 << 20), None, "kvm")  # type: ignore[arg-type]  # no image is looked at


def test_a_refused_request_names_itself_and_the_reason(kvm, monkeypatch):
    monkeypatch.setattr(abi, "SET_CPUID2", abi.SET_CPUID2 ^ 0xFF)
    with pytest.raises(BackendError, match=r"^kvm: KVM_SET_CPUID2: "):
        Machine.boot(MachineConfig(memory_bytes=1 << 20), None, "kvm")  # type: ignore[arg-type]  # no image is looked at


def test_a_state_that_cannot_be_names_what_is_wrong(kvm):
    assert "segments and control registers" in (KvmCpu.refusal(CpuState(cr0=0x80000000)) or "")
    assert "x87 and SSE" in (KvmCpu.refusal(CpuState(fpu=_reserved_mxcsr())) or "")
    assert KvmCpu.refusal(CpuState()) is None


def _reserved_mxcsr():
    from vmm.cpu.protocol import FpuState

    return FpuState(mxcsr=0xFFFF_0000)


def test_auto_takes_a_kvm_that_runs_guests_and_says_why(kvm):
    name, why = selftest.choose()
    if host() == "kvm_pvm":
        assert name == "emu" and re.match(r"this host's KVM fails \d+ of \d+ checks: .*SYSCALL", why)
    else:
        assert name == "kvm" and "TSC at" in why


def test_a_position_cannot_be_reached(kvm):
    with pytest.raises(RequestError, match="does not count the code it runs"):
        KvmCpu.stop_at(None, 5)  # type: ignore[arg-type]
