"""What two CPUs of different make can agree on, and where two states differ, by field name.

Left out of a comparison, with the reason:
* the hidden part of a segment that is not present: loading a null selector leaves other bits on each processor. The
  base of FS and GS is used nevertheless, and is compared.
* a segment's granularity: the limit is kept in bytes, and SVM derives the bit from it (AMD APM vol. 2, 15.5).
* CS.L outside long mode, where it means nothing: KVM refuses it.
* FOP, FIP and FDP: some processors save them only while an x87 exception is pending (AMD APM vol. 2, 11.4.4.3).
* the high halves of SYSENTER_ESP and SYSENTER_EIP: the model's vendor has not got them (AMD APM vol. 2, 6.1.2).
* the TSC: it moves on while it is read.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from vmm.cpu.protocol import CpuState, SegmentState
from vmm.cpu.validity import LMA

_LEFT_OUT = {"cpu.tsc", "cpu.fpu.fop", "cpu.fpu.fip", "cpu.fpu.fdp"}


def comparable(state: CpuState) -> dict[str, Any]:
    """Every comparable field by its name in the schema, such as `cpu.cs.base`."""
    found = {name: value for name, value in _walk("cpu", state) if name not in _LEFT_OUT}
    if not state.efer & LMA:
        found.pop("cpu.cs.long", None)
    for name in ("cpu.sysenter_esp", "cpu.sysenter_eip"):
        found[name] &= 0xFFFFFFFF
    return found


def differences(a: CpuState, b: CpuState) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, with both values."""
    ours, theirs = comparable(a), comparable(b)
    return {name: (ours.get(name), theirs.get(name)) for name in ours | theirs if ours.get(name) != theirs.get(name)}


def _walk(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, SegmentState):
        return _segment(name, value)
    if is_dataclass(value):
        return [pair for field in fields(value) for pair in _walk(f"{name}.{field.name}", getattr(value, field.name))]
    if isinstance(value, tuple):
        return [pair for i, item in enumerate(value) for pair in _walk(f"{name}.{i}", item)]
    return [(name, value)]


def _segment(name: str, segment: SegmentState) -> list[tuple[str, Any]]:
    shown = [("selector", segment.selector), ("present", segment.present)]
    if segment.present or name in ("cpu.fs", "cpu.gs"):
        shown.append(("base", segment.base))
    if segment.present:
        shown += [(part, getattr(segment, part)) for part in ("limit", "type", "s", "dpl", "avl", "long", "db")]
    return [(f"{name}.{part}", value) for part, value in shown]
