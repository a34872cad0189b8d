"""From a snapshot to a machine's pieces: every state decoded and found to fit together before anything is made."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from snapshot.chain import Chain
from snapshot.errors import SnapshotError
from snapshot.reader import Part, decode_part
from vmm.board.board import SLOTS, BoardState
from vmm.board.config import MAX_MEMORY, MachineConfig
from vmm.clock import ClockState
from vmm.cpu import backends
from vmm.cpu.protocol import CpuState
from vmm.errors import BackendError, GuestError
from vmm.ram import Region, layout


@dataclass(frozen=True)
class Saved:
    """A snapshot's states, all decoded and found to fit together."""

    config: MachineConfig
    board: BoardState
    clock: ClockState
    cpu: CpuState
    devices: dict[str, Any]

    @classmethod
    def decode(cls, chain: Chain) -> Saved:
        """Raises SnapshotError, naming the part or field that cannot be used here."""
        parts: dict[str, Part] = dict(chain.parts)

        def take(name: str, want: type) -> Any:
            if name not in parts:
                raise SnapshotError(f"the snapshot has no part {name}")
            return decode_part(parts.pop(name), want)

        config = take("config", MachineConfig)
        saved = cls(
            config=config,
            board=take("board", BoardState),
            clock=take("clock", ClockState),
            cpu=take("cpu.0", CpuState),
            devices={slot.name: take(slot.name, slot.device.State) for slot in SLOTS},
        )
        if parts:
            raise SnapshotError(f"the snapshot has a part this machine does not know: {next(iter(parts))}")
        found = [(image.base, image.size) for image in chain.rams]
        try:
            wanted = layout(config.memory_bytes)
        except GuestError as error:
            raise SnapshotError(f"config: {error}") from None
        if found != wanted:
            raise SnapshotError("the RAM in the snapshot is not laid out as its config says")
        return saved


ALLOWABLE = ("tsc-rate",)  # what a host may give otherwise than it was saved, if the user says so


def admit(saved: Saved, backend: str, allow: Collection[str] = ()) -> Saved:
    """What can be woken here: the same, or with what is allowed to differ as this host gives it. Raises BackendError
    when the backend is not here or cannot take the CPU's state."""
    cpu = backends.factory(backend)
    if (why := cpu.refusal(saved.cpu)) is not None:
        raise BackendError(why)
    try:
        cpu.tsc_khz(saved.config.tsc_khz)
    except BackendError as error:
        if "tsc-rate" not in allow:
            raise BackendError(f"config.tsc_khz: {error} (--allow tsc-rate takes this host's)") from None
        return replace(saved, config=replace(saved.config, tsc_khz=cpu.tsc_khz()))
    return saved


def map_ram(chain: Chain) -> list[Region]:
    regions = []
    for i, image in enumerate(chain.rams):
        try:
            memory = chain.map_ram(i)
        except OSError as error:
            raise BackendError(f"cannot map {image.size} bytes of guest RAM: {error.strerror}") from None
        regions.append(Region(image.name, image.base, image.size, memory, memoryview(memory), stored=chain.stored(i)))
    return regions


def host_memory() -> int:
    """Bytes of RAM this computer has: a snapshot that declares more is refused rather than tried."""
    return min(MAX_MEMORY, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
