"""What a machine is built from: all a boot chooses, and all a restore needs."""

from __future__ import annotations

from typing import Annotated

from snapshot.errors import SnapshotError
from snapshot.schema import state
from snapshot.types import OneOf, Range, u64
from snapshot.versions import downgrade, upgrade
from vmm.cpu.model import MODEL_NAME, TSC_KHZ

MAX_MEMORY = 1 << 38
DEFAULT_EPOCH_NS = 1_577_836_800 * 10**9  # 2020-01-01: a fixed wall clock, so that boots are equal


@state("machine", version=1)
class MachineConfigV1:
    """What the machine is built from; its TSC runs at 1 GHz."""

    memory_bytes: Annotated[int, Range(4096, MAX_MEMORY), "RAM, a multiple of 4096"] = 256 << 20
    cpus: Annotated[int, Range(1, 1), "number of CPUs"] = 1
    cpu_model: Annotated[str, OneOf((MODEL_NAME,)), "CPUID model"] = MODEL_NAME
    board: Annotated[str, OneOf(("isapc",)), "which board"] = "isapc"
    epoch_ns: Annotated[u64, "wall clock at guest time zero, Unix ns"] = DEFAULT_EPOCH_NS


@state("machine", version=2)
class MachineConfig:
    """What the machine is built from, and all a restore needs."""

    memory_bytes: Annotated[int, Range(4096, MAX_MEMORY), "RAM, a multiple of 4096"] = 256 << 20
    cpus: Annotated[int, Range(1, 1), "number of CPUs"] = 1
    cpu_model: Annotated[str, OneOf((MODEL_NAME,)), "CPUID model"] = MODEL_NAME
    tsc_khz: Annotated[int, Range(100_000, 100_000_000), "rate of the time-stamp counter"] = TSC_KHZ
    board: Annotated[str, OneOf(("isapc",)), "which board"] = "isapc"
    epoch_ns: Annotated[u64, "wall clock at guest time zero, Unix ns"] = DEFAULT_EPOCH_NS


_V1_TSC_KHZ = 1_000_000


@upgrade
def machine_v1_to_v2(old: MachineConfigV1) -> MachineConfig:
    return MachineConfig(
        memory_bytes=old.memory_bytes,
        cpus=old.cpus,
        cpu_model=old.cpu_model,
        tsc_khz=_V1_TSC_KHZ,
        board=old.board,
        epoch_ns=old.epoch_ns,
    )


@downgrade
def machine_v2_to_v1(new: MachineConfig) -> MachineConfigV1:
    if new.tsc_khz != _V1_TSC_KHZ:
        raise SnapshotError(f"machine.tsc_khz: version 1 has a TSC of {_V1_TSC_KHZ} kHz only, not {new.tsc_khz}")
    return MachineConfigV1(
        memory_bytes=new.memory_bytes,
        cpus=new.cpus,
        cpu_model=new.cpu_model,
        board=new.board,
        epoch_ns=new.epoch_ns,
    )
