"""From a snapshot to a machine's pieces: every state decoded and found to fit together before anything is made."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from snapshot.chain import Chain
from snapshot.errors import SnapshotError
from snapshot.reader import Part as FilePart
from snapshot.reader import RamImage, decode_part
from vmm.board.config import MAX_MEMORY, MachineConfig
from vmm.clock import LARGEST_BLOCK, ClockState
from vmm.cpu import backends, validity
from vmm.cpu.protocol import CpuState
from vmm.cpu.turns import TurnState
from vmm.errors import BackendError, GuestError, RequestError
from vmm.ram import Region, layout
from vmm.saving.parts import parts_of


@dataclass(frozen=True)
class Saved:
    """A snapshot's states, by part, all decoded and found to fit together."""

    config: MachineConfig
    states: dict[str, Any]

    @classmethod
    def decode(cls, chain: Chain) -> Saved:
        """As `of`, what a file has."""
        return cls.of(chain.parts, chain.rams)

    @classmethod
    def of(cls, parts: Mapping[str, FilePart], rams: Sequence[RamImage]) -> Saved:
        """Raises SnapshotError, naming the part or field that cannot be used here; BackendError for a kind of device
        that is not here."""
        found = dict(parts)

        def take(name: str, want: type) -> Any:
            if name not in found:
                raise SnapshotError(f"the snapshot has no part {name}")
            return decode_part(found.pop(name), want)

        config: MachineConfig = take("config", MachineConfig)
        try:
            wanted = parts_of(config)
            regions = layout(config.memory_bytes)
        except (GuestError, RequestError) as error:
            raise SnapshotError(f"config: {error}") from None
        states = {"config": config, **{part.name: take(part.name, part.State) for part in wanted[1:]}}
        for state in states.values():
            if isinstance(state, CpuState) and (why := validity.refusal(state)) is not None:
                raise SnapshotError(f"no CPU can be in this state: {why}")
            if isinstance(state, TurnState) and state.current >= config.cpus:
                raise SnapshotError(f"smp.current: there is no CPU {state.current}")
            if isinstance(state, ClockState) and state.prepaid > min(LARGEST_BLOCK, state.position):
                raise SnapshotError(f"clock.prepaid: {state.prepaid} bytes are more than a block can be, or than ran")
        if found:
            raise SnapshotError(f"the snapshot has a part this machine does not know: {next(iter(found))}")
        if [(image.base, image.size) for image in rams] != regions:
            raise SnapshotError("the RAM in the snapshot is not laid out as its config says")
        return cls(config, states)

    @property
    def cpus(self) -> list[CpuState]:
        return [state for state in self.states.values() if isinstance(state, CpuState)]


ALLOWABLE = ("tsc-rate",)  # what a host may give otherwise than it was saved, if the user says so


def admit(saved: Saved, backend: str, allow: Collection[str] = ()) -> Saved:
    """What can be woken here: the same, or with what is allowed to differ as this host gives it. Raises BackendError
    when the backend is not here or cannot take a CPU's state, RequestError for what cannot be allowed."""
    for word in allow:
        if word not in ALLOWABLE:
            raise RequestError(f"nothing is called {word!r} that may differ; there is {', '.join(ALLOWABLE)}")
    cpu = backends.factory(backend)
    for state in saved.cpus:
        if (why := cpu.refusal(state)) is not None:
            raise BackendError(why)
    try:
        cpu.tsc_khz(saved.config.tsc_khz)
    except BackendError as error:
        if "tsc-rate" not in allow:
            raise BackendError(f"config.tsc_khz: {error} (--allow tsc-rate takes this host's)") from None
        return replace(saved, config=replace(saved.config, tsc_khz=cpu.tsc_khz()))
    return saved


def map_ram(chain: Chain) -> list[Region]:
    """The RAM of a snapshot, mapped privately. Raises BackendError when the host has not the memory."""
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
