"""CPU state in and out of a backend: nothing lost, nothing invented."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snapshot import schema
from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program
from vmm.cpu.compare import comparable, differences
from vmm.cpu.protocol import CpuState, EventState, FpuState, SegmentState, TableState
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


each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture
def paused(backend):
    """A machine in 64-bit mode, and its state."""
    with Program("pause; jmp done", backend).pause().machine as machine:
        yield machine, machine.cpu.save()


@each_backend
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STATES)
def test_load_then_save_is_the_identity(paused, fields):
    machine, base = paused
    wanted = dataclasses.replace(base, **fields)
    machine.cpu.load(wanted)
    assert not differences(machine.cpu.save(), wanted)
    if machine.backend == "emu":
        assert schema.encode(machine.cpu.save()) == schema.encode(wanted)


@each_backend
def test_saving_changes_nothing(paused):
    machine, base = paused
    assert not differences(machine.cpu.save(), base)
    assert not differences(machine.cpu.save(), machine.cpu.save())


def test_every_field_of_the_state_is_free_above_or_held_here():
    """A new field must be put to the test."""
    held = {"cs", "ss", "ldtr", "tr", "cr0", "cr3", "cr4", "efer", "event"}  # legal only together
    drawn = set(FREE) | {"ds", "es", "fs", "gs", "fpu", "gdtr", "idtr"}
    assert held | drawn == {field.name for field in dataclasses.fields(CpuState)}
    fields = {field.name: values(field.type) for field in schema.schema_of(FpuState).fields}
    assert set(fields) == {field.name for field in dataclasses.fields(FpuState)}


@each_backend
@pytest.mark.parametrize("forgotten", ["rbx", "cr2", "kernel_gs_base", "interrupt_shadow", "dr1", "sfmask"])
def test_a_forgotten_field_is_seen(paused, forgotten):
    """Planted: a load that leaves one field at what it was."""
    machine, base = paused
    old = getattr(base, forgotten)
    changed = dataclasses.replace(base, **{forgotten: not old if type(old) is bool else old ^ 0x10})
    machine.cpu.load(base)
    assert list(differences(machine.cpu.save(), changed)) == [f"cpu.{forgotten}"]
    machine.cpu.load(changed)
    assert not differences(machine.cpu.save(), changed)


def test_what_is_left_out_of_a_comparison():
    base = CpuState()
    for other in (
        dataclasses.replace(base, tsc=5),
        dataclasses.replace(base, ds=dataclasses.replace(base.ds, granular=True)),
        dataclasses.replace(base, fpu=dataclasses.replace(base.fpu, fip=1)),
    ):
        assert not differences(base, other)
    absent = dataclasses.replace(base.es, present=False)
    moved = dataclasses.replace(absent, base=1, dpl=3)
    assert not differences(dataclasses.replace(base, es=absent), dataclasses.replace(base, es=moved))
    assert differences(dataclasses.replace(base, gs=absent), dataclasses.replace(base, gs=moved))
    assert len(comparable(base)) > 130


EVENTS = {
    "interrupt": (EventState(kind="interrupt", vector=0x33), 0x33, 0),
    "page fault": (EventState(kind="exception", vector=14, error_code=2), 14, 2),
    "divide error": (EventState(kind="exception", vector=0), 0, 0),
    "nmi": (EventState(kind="nmi", vector=2), 2, 0),
}


@each_backend
@pytest.mark.parametrize("name", EVENTS)
def test_an_accepted_event_is_delivered_before_anything_runs(backend, name):
    event, vector, error = EVENTS[name]
    program = Program("lea after(%rip), %r15; pause; at: inc %rbx; after: jmp done", backend).pause()
    machine = program.machine
    state = dataclasses.replace(machine.cpu.save(), rip=program.labels["at"], rbx=5, event=event, rsp=0x80000)
    if name == "interrupt":
        state.rflags |= 0x200  # or it were not accepted
    machine.cpu.load(state)
    assert machine.cpu.save().event == event
    program.finish()
    assert [(t.vector, t.error, t.rip) for t in program.traps] == [(vector, error, program.labels["at"])]
    assert machine.cpu.save().rbx == (6 if name == "interrupt" else 5)  # the log's handler leaves a fault by R15
    assert machine.cpu.save().event is None


@each_backend
def test_an_event_that_cannot_be_delivered(backend):
    """The IDT ends before its gate: #GP, whose error code names the gate."""
    program = Program("lea next(%rip), %r15; pause; next: jmp done", backend).pause()
    machine = program.machine
    event = EventState(kind="interrupt", vector=0x70)
    machine.cpu.load(dataclasses.replace(machine.cpu.save(), event=event, rflags=0x202))
    program.finish()
    assert [(t.vector, t.error & ~1) for t in program.traps] == [(13, 0x70 * 8 + 2)]


@each_backend
def test_the_tsc_of_a_cpu_that_stands_still_is_the_guests_time(paused):
    """Asked twice it says the same; what guest time skips, it skips."""
    machine, before = paused
    assert machine.cpu.save() == before
    machine.clock.skip(123_456)
    assert machine.cpu.save().tsc - before.tsc == 123_456 * machine.config.tsc_khz // 1_000_000


def test_fstenv_stores_no_segments():
    """They are kept by no 64-bit system, and are no part of the state: a woken machine would store others."""
    program = Program("fld1; fstp 0x200100; fnstenv 0x200000; fnsave 0x200200; jmp done").finish()
    for at in (0x200000, 0x200200):
        assert program.word(at + 16) & 0xFFFF == program.word(at + 24) & 0xFFFF == 0
