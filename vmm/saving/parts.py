"""What is saved of a machine: one list. Saving, restoring, checking, digests, moments, lockstep and cuts go through it,
and nothing else knows what a machine's parts are called.

RAM is not a part: its bytes are chunks of their own (docs/snapshot-format.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from snapshot.reader import Part as FilePart
from snapshot.schema import schema_of
from vmm.board.board import Board, BoardState, slots
from vmm.board.config import MachineConfig
from vmm.clock import ClockState, GuestClock
from vmm.cpu.protocol import Cpu, CpuState
from vmm.cpu.turns import TurnState


class Whole(Protocol):
    """A machine, as far as its parts go."""

    @property
    def config(self) -> MachineConfig: ...
    @property
    def clock(self) -> GuestClock: ...
    @property
    def board(self) -> Board: ...
    @property
    def cpus(self) -> Sequence[Cpu]: ...
    @property
    def turns(self) -> Holder: ...


class Holder(Protocol):
    """What keeps its state in one attribute, as devices do."""

    state: Any


@dataclass(frozen=True)
class Part:
    """One: its name in the file, its class of states, and how a machine gives it and takes it. `holder` finds what
    keeps the state as an attribute; None where it is made when asked for."""

    name: str
    State: type
    get: Callable[[Whole], Any]
    put: Callable[[Whole, Any], None]
    holder: Callable[[Whole], Holder] | None = None

    @classmethod
    def held(cls, name: str, State: type, holder: Callable[[Whole], Holder]) -> Part:
        def put(machine: Whole, state: Any) -> None:
            holder(machine).state = state

        return cls(name, State, lambda machine: holder(machine).state, put, holder)


def parts_of(config: MachineConfig) -> list[Part]:
    """The parts of a machine, in the order of the file, which is that of restoring: a CPU's time-stamp counter counts
    from the clock. After the last one the board drives its wires. Raises RequestError, BackendError as
    vmm.board.board.slots does."""
    return [
        Part("config", MachineConfig, lambda machine: machine.config, lambda machine, state: None),
        Part.held("board", BoardState, lambda machine: machine.board),
        Part("clock", ClockState, lambda machine: machine.clock.save(), lambda machine, s: machine.clock.load(s)),
        *([Part.held("smp", TurnState, lambda machine: machine.turns)] if config.cpus > 1 else []),
        *(Part(f"cpu.{i}", CpuState, partial(_save_cpu, i), partial(_load_cpu, i)) for i in range(config.cpus)),
        *(Part.held(slot.id, slot.device.State, partial(_device, slot.id)) for slot in slots(config)),
    ]


def _save_cpu(number: int, machine: Whole) -> CpuState:
    return machine.cpus[number].save()


def _load_cpu(number: int, machine: Whole, state: CpuState) -> None:
    machine.cpus[number].load(state)


def _device(id: str, machine: Whole) -> Holder:
    return machine.board.devices[id]


def with_state(parts: Mapping[str, FilePart], State: type) -> Iterator[FilePart]:
    """The parts of a file whose states are of this class, whatever their version."""
    wanted = schema_of(State).name
    return (part for part in parts.values() if part.schema["name"] == wanted)
