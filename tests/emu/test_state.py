"""CPU state in and out of the engine: nothing lost, nothing invented; refused when the engine is another."""

from __future__ import annotations

import dataclasses

import pytest
import unicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from emu import engine as engine_module
from emu import layout
from snapshot import schema
from vmm.cpu import CpuState, EventState, FpuState, SegmentState, TableState
from vmm.errors import BackendError
from vmm.testing import values

CANONICAL = st.integers(0, (1 << 47) - 1) | st.integers((1 << 64) - (1 << 47), (1 << 64) - 1)
WORD = st.integers(0, (1 << 64) - 1) | st.sampled_from((0, 1, 1 << 63, (1 << 64) - 1))
FLAGS = 0x40CD5  # CF PF AF ZF SF DF OF AC

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{i}" for i in range(8, 16)))
ADDRESSES = ("lstar", "cstar", "kernel_gs_base", "sysenter_esp", "sysenter_eip", "dr0", "dr1", "dr2", "dr3")
FREE = {
    **dict.fromkeys(GENERAL, WORD),
    **dict.fromkeys(ADDRESSES, CANONICAL),
    "rip": CANONICAL,
    "cr2": WORD,
    "cr8": st.integers(0, 15),
    "star": WORD,
    "sfmask": st.integers(0, 0xFFFFFFFF),
    "sysenter_cs": st.integers(0, 0xFFFF),
    "tsc_aux": st.integers(0, 0xFFFFFFFF),
    "tsc": WORD,
    "pat": st.sampled_from((0x0007040600070406, 0x0407050600070106)),
    "rflags": st.integers(0, 0xFFFFFFFF).map(lambda bits: bits & FLAGS | 2 | bits & 0x200),
    "dr7": st.sampled_from((0x400, 0x401, 0x455)),
    "dr6": st.sampled_from((0xFFFF0FF0, 0xFFFF4FF1)),
    "interrupt_shadow": st.booleans(),
    "nmi_blocked": st.booleans(),
    "halted": st.booleans(),
}
SEGMENT = st.builds(
    SegmentState,
    selector=st.integers(0, 0xFFFF),
    base=CANONICAL,
    limit=st.integers(0, 0xFFFFFFFF),
    type=st.sampled_from((1, 3, 7)),
    dpl=st.integers(0, 3),
    avl=st.booleans(),
    db=st.booleans(),
    granular=st.booleans(),
)
FPU = st.builds(
    FpuState,
    fcw=st.sampled_from((0x37F, 0x27F, 0xF7F, 0x340)),
    fsw=st.integers(0, 7).map(lambda top: top << 11),
    ftw=st.integers(0, 0xFF),
    fop=st.integers(0, 0x7FF),
    fip=WORD,
    fdp=WORD,
    st=st.tuples(*[st.binary(min_size=10, max_size=10)] * 8),
    mxcsr=st.sampled_from((0x1F80, 0x9FC0, 0x3F80)),
    xmm=st.tuples(*[st.binary(min_size=16, max_size=16)] * 16),
)
TABLE = st.builds(TableState, base=CANONICAL, limit=st.integers(0, 0xFFFF))
STATES = st.fixed_dictionaries(
    {**FREE, **dict.fromkeys(("ds", "es", "fs", "gs"), SEGMENT), "fpu": FPU, "gdtr": TABLE, "idtr": TABLE}
)


@settings(max_examples=100)
@given(STATES)
def test_load_then_save_is_the_identity(boot_own_once, fields):
    machine, base = boot_own_once
    wanted = dataclasses.replace(base, **fields)
    machine.cpu.load(wanted)
    assert machine.cpu.save() == wanted
    assert schema.encode(machine.cpu.save()) == schema.encode(wanted)


@pytest.fixture(scope="module")
def boot_own_once():
    from tests.conftest import OWN
    from vmm.boot import Image
    from vmm.machine import Machine, MachineConfig

    with Machine.boot(MachineConfig(memory_bytes=16 << 20), Image.from_files(OWN, flat=True)) as machine:
        machine.run(position=1_000_000)
        yield machine, machine.cpu.save()


def test_saving_changes_nothing(boot_own):
    with boot_own() as machine:
        machine.run(position=1_000_000)
        assert machine.cpu.save() == machine.cpu.save()


def test_every_field_of_the_state_is_free_above_or_held_here():
    """A new field must be put to the test."""
    held = {"cs", "ss", "ldtr", "tr", "cr0", "cr3", "cr4", "efer", "event"}  # legal only together
    drawn = set(FREE) | {"ds", "es", "fs", "gs", "fpu", "gdtr", "idtr"}
    assert held | drawn == {field.name for field in dataclasses.fields(CpuState)}
    fields = {field.name: values(field.type) for field in schema.schema_of(FpuState).fields}
    assert set(fields) == {field.name for field in dataclasses.fields(FpuState)}


@pytest.mark.parametrize("forgotten", ["rbx", "cr2", "kernel_gs_base", "interrupt_shadow", "dr1", "sfmask"])
def test_a_forgotten_field_is_seen(boot_own_once, forgotten):
    """Planted: a load that leaves one field at what it was."""
    machine, base = boot_own_once
    old = getattr(base, forgotten)
    changed = dataclasses.replace(base, **{forgotten: not old if type(old) is bool else old ^ 0x10})
    machine.cpu.load(base)
    assert machine.cpu.save() != changed
    machine.cpu.load(changed)
    assert machine.cpu.save() == changed


def test_an_event_in_delivery_is_refused_in_words(boot_own_once):
    machine, base = boot_own_once
    with pytest.raises(BackendError, match="event in delivery"):
        machine.cpu.load(dataclasses.replace(base, event=EventState(kind="exception", vector=14, error_code=2)))


@pytest.mark.parametrize("name", sorted(engine_module._ENV))
def test_another_layout_is_refused(monkeypatch, name):
    monkeypatch.setitem(engine_module._ENV, name, engine_module._ENV[name] + 8)
    with pytest.raises(BackendError, match=r"laid out|does not run as it should"):
        layout.check_running.__wrapped__()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(unicorn, "__version__", "2.2.0")
    with pytest.raises(BackendError, match=r"needs unicorn 2\.1\.4, this is 2\.2\.0"):
        engine_module.Engine()
