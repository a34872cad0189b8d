"""Which states there are: each rule, in the modes it holds in (SDM vol. 3, 2.5, 17.2, 26.3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.cpu import random_guests
from tests.vmm.cpu.random_guests import KINDS
from vmm.cpu import validity
from vmm.cpu.protocol import CpuState, EventState, SegmentState

ABSENT = SegmentState(present=False)
HIGH = 1 << 47  # the first address that is not canonical
NMI, PAGE_FAULT = EventState(kind="nmi", vector=2), EventState(kind="exception", vector=14, error_code=2)


def base(kind: str) -> CpuState:
    """A state of that kind, with interrupts on and nothing under way."""
    state = random_guests.draw(1, kind, spoil=0).state
    return dataclasses.replace(state, rflags=state.rflags | validity.IF, interrupt_shadow=False, event=None)


def changed(state: Any, path: str, value: object) -> Any:
    """With one field otherwise; a value that can be called gets the one there is."""
    name, _, rest = path.partition(".")
    old = getattr(state, name)
    if rest:
        return dataclasses.replace(state, **{name: changed(old, rest, value)})
    return dataclasses.replace(state, **{name: value(old) if callable(value) else value})


def with_bit(bit: int) -> Any:
    return lambda old: old | 1 << bit


def without(bit: int) -> Any:
    return lambda old: old & ~(1 << bit)


EVERYWHERE = [
    ("cr0", with_bit(6), "cr0: bits 0x40 are reserved"),
    ("cr0", with_bit(17), "cr0"),
    ("cr0", with_bit(32), "cr0"),
    ("cr0", lambda old: old & ~validity.CD | validity.NW, "cr0: NW without CD"),
    ("cr3", with_bit(40), "cr3"),
    ("cr4", with_bit(11), "cr4"),
    ("cr4", with_bit(20), "cr4"),
    ("efer", with_bit(12), "efer"),
    ("efer", with_bit(1), "efer"),
    ("efer", lambda old: old ^ validity.LMA, "efer: LMA is not LME and cr0.PG"),
    ("rflags", with_bit(22), "rflags"),
    ("rflags", with_bit(15), "rflags"),
    ("rflags", with_bit(5), "rflags"),
    ("rflags", with_bit(3), "rflags"),
    ("rflags", without(1), "rflags"),
    ("dr6", with_bit(32), "dr6"),
    ("dr6", without(4), "dr6"),
    ("dr6", with_bit(12), "dr6"),
    ("dr7", with_bit(32), "dr7"),
    ("dr7", with_bit(14), "dr7"),
    ("dr7", without(10), "dr7"),
    ("fpu.mxcsr", with_bit(16), "fpu.mxcsr"),
    ("lstar", HIGH, "lstar"),
    ("cstar", HIGH, "cstar"),
    ("kernel_gs_base", 1 << 63, "kernel_gs_base"),
    ("sysenter_esp", HIGH, "sysenter_esp"),
    ("sysenter_eip", HIGH, "sysenter_eip"),
    ("pat", 2, "pat"),
    ("pat", 3 << 56, "pat"),
    ("pat", 8, "pat"),
    ("tsc_aux", 1 << 32, "tsc_aux"),
    ("gdtr.base", HIGH, "gdtr.base"),
    ("idtr.base", HIGH, "idtr.base"),
    ("tr.present", False, "tr.type"),
    ("tr.s", True, "tr.type"),
    ("tr.type", 2, "tr.type"),
    ("tr.base", HIGH, "tr.base"),
    ("ldtr", SegmentState(type=3, s=False, present=True), "ldtr.type"),
    ("ldtr", SegmentState(type=2, s=True, present=True), "ldtr.type"),
    ("ldtr", SegmentState(base=HIGH, type=2, s=False, present=True), "ldtr.base"),
    ("ldtr", SegmentState(limit=0x100000, type=2, s=False, present=True), "ldtr.limit"),
    ("ldtr", SegmentState(limit=0x1000, type=2, s=False, present=True, granular=True), "ldtr.limit"),
    ("cs.base", 1 << 32, "cs"),
    ("event", dataclasses.replace(NMI, vector=3), "event.vector"),
    ("event", EventState(kind="exception", vector=32), "event.vector"),
    ("event", EventState(kind="exception", vector=2), "event.vector"),
    ("event", EventState(kind="exception", vector=6, error_code=0), "event.error_code"),
    ("event", EventState(kind="interrupt", vector=0x30, error_code=0), "event.error_code"),
]
PROTECTED = [
    ("event", dataclasses.replace(PAGE_FAULT, error_code=None), "event.error_code"),
    ("event", dataclasses.replace(PAGE_FAULT, error_code=1 << 16), "event.error_code"),
]
SEGMENTED = [  # where a segment register holds what its descriptor says
    ("cs.present", False, "cs.type"),
    ("cs.s", False, "cs.type"),
    ("cs.type", 1, "cs.type"),
    ("cs.limit", 0x100FFE, "cs.limit"),
    ("ss", SegmentState(limit=0xFFFF, type=1, s=True, present=True), "ss.type"),
    ("ss", SegmentState(limit=0xFFFF, type=11, s=True, present=True), "ss.type"),
    ("ss", SegmentState(limit=0xFFFF, type=3, s=False, present=True), "ss.type"),
    ("ds", SegmentState(limit=0xFFFF, type=9, s=True, present=True), "ds.type"),
    ("es", SegmentState(limit=0xFFFF, type=3, s=False, present=True), "es.type"),
    ("fs", SegmentState(base=HIGH, limit=0xFFFF, type=3, s=True, present=True), "fs.base"),
    ("ds", SegmentState(base=1 << 32, limit=0xFFFF, type=3, s=True, present=True), "ds.base"),
]
OF_ONE: dict[str, list[tuple[str, object, str | None]]] = {
    "real": [
        ("rflags", with_bit(17), "rflags: VM in real mode"),
        ("cr0", with_bit(31), "cr0: PG without PE"),
        ("ss.dpl", 3, "ss.dpl"),
        ("rip", 1 << 32, "rip"),
        ("event", PAGE_FAULT, "event.error_code"),
    ],
    "vm86": [
        (f"{name}.{field}", value, f"{name}: not as virtual-8086 mode has it")
        for name in ("cs", "ss", "ds", "es", "fs", "gs")
        for field, value in (("base", 0x12340), ("selector", 0xFFFF), ("type", 1), ("dpl", 0), ("present", False),
                             ("s", False), ("limit", 0xFFFFF))
    ],
    "32-paged ring 0": [
        ("ss.dpl", 3, "cs.dpl"),
        ("cs.dpl", 3, "cs.dpl"),
        ("cs.type", 3, None),
        ("rip", 1 << 32, "rip"),
    ],
    "32-paged ring 3": [("ss.dpl", 0, "cs.dpl"), ("cs.dpl", 0, "cs.dpl"), ("cs.type", 3, "cs.type: 3 at level 3")],
    "64 ring 0": [
        ("rflags", with_bit(17), "rflags: VM in long mode"),
        ("cr4", without(5), "cr4: no PAE in long mode"),
        ("cs.db", True, "cs: L and D together"),
        ("rip", 1 << 48, "rip"),
        ("rip", (1 << 64) - (1 << 48), None),
        ("tr.type", 3, "tr.type"),
        ("gs", SegmentState(base=HIGH, limit=0xFFFF, type=3, s=True, present=True), "gs.base"),
        ("gs", dataclasses.replace(ABSENT, base=HIGH), None),
    ],
    "compat ring 3": [("rip", 1 << 32, "rip"), ("tr.type", 1, "tr.type"), ("rflags", with_bit(17), "rflags")],
}  # fmt: skip
CASES: list[tuple[str, str, object, str | None]] = [
    *((kind, *case) for kind in KINDS for case in EVERYWHERE),
    *((kind, *case) for kind in KINDS if kind != "real" for case in PROTECTED),
    *((kind, *case) for kind in KINDS if kind != "vm86" for case in SEGMENTED),
    *((kind, *case) for kind, cases in OF_ONE.items() for case in cases),
]


@pytest.mark.parametrize("kind", KINDS)
def test_rules(kind):
    state = base(kind)
    assert validity.refusal(state) is None
    for path, value, wanted in (case[1:] for case in CASES if case[0] == kind):
        told = validity.refusal(changed(state, path, value))
        assert told == wanted if wanted is None else (told or "").startswith(f"cpu.{wanted}"), (path, value, told)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1 << 40))
def test_what_random_guests_begin_with_can_be(kind, seed):
    assert validity.refusal(random_guests.draw(seed, kind).state) is None


@pytest.mark.parametrize(("flags", "shadow"), [(2, False), (0x202, True)])
def test_an_interrupt_is_accepted_only_where_one_can_be(flags, shadow):
    state = dataclasses.replace(base("64 ring 0"), event=EventState(kind="interrupt", vector=0x30))
    assert validity.refusal(state) is None
    refused = dataclasses.replace(state, rflags=flags, interrupt_shadow=shadow)
    assert "while none can be" in (validity.refusal(refused) or "")


@pytest.mark.parametrize("base_address", [HIGH - 1, HIGH, (1 << 64) - HIGH, (1 << 64) - HIGH - 1])
def test_canonical_addresses(base_address):
    assert validity.canonical(base_address) == (base_address < HIGH or base_address >= (1 << 64) - HIGH)
