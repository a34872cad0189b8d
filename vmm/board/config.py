"""What a machine is built from: all a boot chooses, and all a restore needs. Never what this computer gives it: a far
end of a serial port is a binding (vmm.host.bindings)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import count
from typing import Annotated, Any

from snapshot.errors import SnapshotError
from snapshot.field_types import MaxSize, OneOf, Range, u64
from snapshot.schema import state
from snapshot.versions import downgrade, upgrade
from vmm.cpu.model import MODEL_NAME, TSC_KHZ
from vmm.errors import RequestError

MAX_MEMORY = 1 << 38
MAX_CPUS = 256
MAX_DEVICES = 64
DEFAULT_EPOCH_NS = 1_577_836_800 * 10**9  # 2020-01-01: a fixed wall clock, so that boots are equal
GIVEN_BOARD = "pc"  # what `run` and the pytest plugin say where nobody says another
RESERVED = ("config", "board", "clock", "smp")  # no devices; the other parts that are none have a dot in their names
PLACES = ("port", "memory", "slot")  # the words that say where a device is put
ID = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@state("machine", version=1)
class MachineConfigV1:
    """What the machine is built from; its TSC runs at 1 GHz."""

    memory_bytes: Annotated[int, Range(4096, MAX_MEMORY), "RAM, a multiple of 4096"] = 256 << 20
    cpus: Annotated[int, Range(1, 1), "number of CPUs"] = 1
    cpu_model: Annotated[str, OneOf((MODEL_NAME,)), "CPUID model"] = MODEL_NAME
    board: Annotated[str, OneOf(("isapc",)), "which board"] = "isapc"
    epoch_ns: Annotated[u64, "wall clock at guest time zero, Unix ns"] = DEFAULT_EPOCH_NS


@state("machine", version=2)
class MachineConfigV2:
    """What the machine is built from, and all a restore needs."""

    memory_bytes: Annotated[int, Range(4096, MAX_MEMORY), "RAM, a multiple of 4096"] = 256 << 20
    cpus: Annotated[int, Range(1, 1), "number of CPUs"] = 1
    cpu_model: Annotated[str, OneOf((MODEL_NAME,)), "CPUID model"] = MODEL_NAME
    tsc_khz: Annotated[int, Range(100_000, 100_000_000), "rate of the time-stamp counter"] = TSC_KHZ
    board: Annotated[str, OneOf(("isapc",)), "which board"] = "isapc"
    epoch_ns: Annotated[u64, "wall clock at guest time zero, Unix ns"] = DEFAULT_EPOCH_NS


@state("machine.option", version=1)
class OptionConfig:
    """One option of a device that is not as by default."""

    name: Annotated[str, MaxSize(64), "name, as its kind declares it"]
    value: Annotated[str, MaxSize(1024), "value, as the command line has it"]


@state("machine.device", version=1)
class DeviceConfig:
    """One device more than the board has by itself."""

    id: Annotated[str, MaxSize(32), "name of its part"]
    kind: Annotated[str, MaxSize(64), "what it is: `anyhyve devices` lists the kinds"]
    place: Annotated[str, MaxSize(64), "where it is: port=0x2a8, memory=0xd0000000, slot=3.1"] = ""
    options: Annotated[tuple[OptionConfig, ...], MaxSize(64), "what is not as by default"] = ()

    @classmethod
    def parse(cls, text: str) -> DeviceConfig:
        """From `KIND,option=value,...`, or a JSON object with "kind". Raises RequestError."""
        if text.lstrip().startswith("{"):
            try:
                given = json.loads(text)
                return cls.of(str(given.pop("kind", "")), given.items())
            except (ValueError, AttributeError, RecursionError):
                raise RequestError(f"device {text!r}: not a JSON object") from None
        kind, *rest = text.split(",")
        pairs = [each.partition("=") for each in rest]
        return cls.of(kind, [(name, value if equals else "on") for name, equals, value in pairs])

    @classmethod
    def of(cls, kind: str, given: Iterable[tuple[str, Any]]) -> DeviceConfig:
        """`given`: its id, its place and its options, in any order. What the kind makes of them is checked when the
        board is built. Raises RequestError."""
        pairs = list(given)
        places = [f"{name}={_spelt(value)}" for name, value in pairs if name in PLACES]
        ids = [_spelt(value) for name, value in pairs if name == "id"]
        if not kind:
            raise RequestError("a device has a kind: `--device KIND,option=value`")
        if len(places) > 1 or len(ids) > 1:
            raise RequestError(f"device {kind}: {'place' if len(places) > 1 else 'id'} is given twice")
        options = [OptionConfig(name=name, value=_spelt(value)) for name, value in pairs if name not in (*PLACES, "id")]
        return cls(id="".join(ids), kind=kind, place="".join(places), options=tuple(options))


def named(devices: Iterable[DeviceConfig]) -> tuple[DeviceConfig, ...]:
    """The same, each with an id: where none was given its kind and the first free number."""
    given = list(devices)
    taken = {device.id for device in given}
    for i, device in enumerate(given):
        if not device.id:
            id = next(f"{device.kind}{n}" for n in count() if f"{device.kind}{n}" not in taken)
            given[i] = replace(device, id=id)
            taken.add(id)
    return tuple(given)


def _spelt(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@state("machine", version=3)
class MachineConfig:
    """What the machine is built from, and all a restore needs. How many CPUs there may be, and which boards there are,
    is a program's affair and not its file's: one that lacks them says so."""

    memory_bytes: Annotated[int, Range(4096, MAX_MEMORY), "RAM, a multiple of 4096"] = 256 << 20
    cpus: Annotated[int, Range(1, MAX_CPUS), "number of CPUs"] = 1
    cpu_model: Annotated[str, OneOf((MODEL_NAME,)), "CPUID model"] = MODEL_NAME
    tsc_khz: Annotated[int, Range(100_000, 100_000_000), "rate of the time-stamp counter"] = TSC_KHZ
    board: Annotated[str, MaxSize(32), "which board"] = "isapc"
    epoch_ns: Annotated[u64, "wall clock at guest time zero, Unix ns"] = DEFAULT_EPOCH_NS
    devices: Annotated[tuple[DeviceConfig, ...], MaxSize(MAX_DEVICES), "devices besides the board's own"] = ()
    bound: Annotated[
        tuple[Annotated[str, MaxSize(32)], ...], MaxSize(MAX_DEVICES), "parts that had somebody at their far end"
    ] = ()


_V1_TSC_KHZ = 1_000_000


def _fields(config: object, cls: type) -> Mapping[str, Any]:
    """Those that a version has too."""
    return {name: getattr(config, name) for name in cls.__dataclass_fields__ if hasattr(config, name)}  # type: ignore[attr-defined]


@upgrade
def machine_v1_to_v2(old: MachineConfigV1) -> MachineConfigV2:
    return MachineConfigV2(**_fields(old, MachineConfigV1), tsc_khz=_V1_TSC_KHZ)


@upgrade
def machine_v2_to_v3(old: MachineConfigV2) -> MachineConfig:
    return MachineConfig(**_fields(old, MachineConfigV2))


@downgrade
def machine_v2_to_v1(new: MachineConfigV2) -> MachineConfigV1:
    if new.tsc_khz != _V1_TSC_KHZ:
        raise SnapshotError(f"machine.tsc_khz: version 1 has a TSC of {_V1_TSC_KHZ} kHz only, not {new.tsc_khz}")
    return MachineConfigV1(**_fields(new, MachineConfigV1))


@downgrade
def machine_v3_to_v2(new: MachineConfig) -> MachineConfigV2:
    if new.cpus != 1:
        raise SnapshotError(f"machine.cpus: version 2 has one, not {new.cpus}")
    if new.devices:
        raise SnapshotError(f"machine.devices: version 2 has no devices but the board's own, not {new.devices[0].id}")
    return MachineConfigV2(**_fields(new, MachineConfigV2))
