"""What a machine is built from: all a boot chooses, and all a restore needs."""

from __future__ import annotations

from typing import Annotated

from snapshot.schema import OneOf, Range, state, u64
from vmm import cpu_model

MAX_MEMORY = 1 << 38
DEFAULT_EPOCH_NS = 1_577_836_800 * 10**9  # 2020-01-01: a fixed wall clock, so that boots are equal


@state("machine", version=1)
class MachineConfig:
    """What the machine is built from, and all a restore needs."""

    memory_bytes: Annotated[int, Range(4096, MAX_MEMORY), "RAM, a multiple of 4096"] = 256 << 20
    cpus: Annotated[int, Range(1, 1), "number of CPUs"] = 1
    cpu_model: Annotated[str, OneOf((cpu_model.MODEL_NAME,)), "CPUID model"] = cpu_model.MODEL_NAME
    board: Annotated[str, OneOf(("isapc",)), "which board"] = "isapc"
    epoch_ns: Annotated[u64, "wall clock at guest time zero, Unix ns"] = DEFAULT_EPOCH_NS
