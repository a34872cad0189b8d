"""A machine at one moment: a value, to come back to as often as one likes. Many may be kept of one machine.

    moment = machine.moment()
    while ...:
        machine.run(...)
        machine.rewind(moment)

RAM: what it held becomes a file in memory that every region maps privately, at the address it had; then the kernel
knows which pages were written since (PAGEMAP_SCAN; before Linux 6.7 by reading all of /proc/self/pagemap), and giving
those up shows the old contents again. A later moment at which little more had been written is kept as the pages that
differ. CPUs: by the backend's fast way. All other parts: those whose state changed. What this computer holds (console
output, what was typed and not taken) is not the machine's, and stays.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

from snapshot.field_types import ListType, OptionalType, Type
from snapshot.schema import StructType, schema_of
from vmm.board.config import MachineConfig
from vmm.cpu.protocol import CpuState
from vmm.dirty_pages import Scanner
from vmm.errors import BackendError, RequestError
from vmm.ram import Ram, RamCopy
from vmm.saving.parts import Part, Whole

_MOST_DELTA = 64 << 10  # bytes written since another moment, up to which a moment is kept as what differs from that

Delta = tuple[tuple[int, bytes], ...]  # (offset in the region, bytes)


class Subject(Whole, Protocol):
    """What a moment is of."""

    ram: Ram

    @property
    def parts(self) -> list[Part]: ...


@dataclass
class Baseline:
    """What a machine's regions show where nothing was written since, and what tells where something was."""

    copies: tuple[RamCopy, ...]
    scanners: tuple[Scanner, ...]

    @classmethod
    def make(cls, ram: Ram, copies: tuple[RamCopy, ...]) -> Baseline:
        """Make the RAM show the copies. Raises OSError."""
        ram.regions = tuple(region.showing(kept) for region, kept in zip(ram.regions, copies, strict=True))
        return cls(copies, tuple(Scanner(region.address, region.size) for region in ram.regions))

    def close(self) -> None:
        for scanner in self.scanners:
            scanner.close()


class Moments:
    """The moments of one machine: makes them and goes back to them."""

    def __init__(self, machine: Subject) -> None:
        self._machine = machine
        self._baseline: Baseline | None = None
        self._ram: Ram | None = None  # which the baseline is of

    def make(self) -> Moment:
        """Raises BackendError when the host has not the memory."""
        machine, baseline = self._machine, self._baseline
        try:
            if baseline is None or self._ram is not machine.ram or self._written(baseline) > _MOST_DELTA:
                baseline = self._show(tuple(region.kept() for region in machine.ram.regions))
        except OSError as error:
            raise BackendError(f"cannot keep the guest's RAM: {error.strerror}") from None
        deltas = tuple(
            tuple((start, bytes(region.view[start:end])) for start, end in scanner.extents())
            for region, scanner in zip(machine.ram.regions, baseline.scanners, strict=True)
        )
        return Moment(machine, baseline.copies, deltas)

    def back_to(self, moment: Moment) -> int:
        """How many bytes of RAM had been written since the moment, or since another that it is kept beside. Raises
        RequestError for a moment of another machine, BackendError when the host has not the memory."""
        machine, baseline = self._machine, self._baseline
        discard_code = machine.cpus[0].discard_code
        written = 0
        if [region.size for region in machine.ram.regions] != [kept.size for kept in moment.copies]:
            raise RequestError("that moment is of a machine with other RAM")
        if baseline is None or self._ram is not machine.ram or baseline.copies is not moment.copies:
            written += sum(end - start for region in machine.ram.regions for start, end in region.touched())
            try:
                baseline = self._show(moment.copies)
            except OSError as error:
                raise BackendError(f"cannot show the guest's RAM as it was: {error.strerror}") from None
            for region in machine.ram.regions:
                discard_code(region.base, region.base + region.size)
        for region, scanner, delta in zip(machine.ram.regions, baseline.scanners, moment.deltas, strict=True):
            give_up = region.memory.madvise
            for start, end in scanner.extents():
                give_up(mmap.MADV_DONTNEED, start, end - start)
                discard_code(region.base + start, region.base + end)
                written += end - start
            for start, data in delta:
                region.view[start : start + len(data)] = data
                discard_code(region.base + start, region.base + start + len(data))
        moment.put_states(machine)
        return written

    def _show(self, copies: tuple[RamCopy, ...]) -> Baseline:
        """Make the RAM show these, and tell from then on what is written. Raises OSError."""
        self.close()
        self._baseline, self._ram = Baseline.make(self._machine.ram, copies), self._machine.ram
        return self._baseline

    def close(self) -> None:
        """Give up what tells what was written; moments that were made can still be gone back to."""
        if self._baseline is not None:
            self._baseline.close()
        self._baseline = self._ram = None

    @staticmethod
    def _written(baseline: Baseline) -> int:
        return sum(end - start for scanner in baseline.scanners for start, end in scanner.extents())


class Moment:
    """What a machine was. Made by `Machine.moment`."""

    def __init__(self, machine: Subject, copies: tuple[RamCopy, ...], deltas: tuple[Delta, ...]) -> None:
        self.copies, self.deltas = copies, deltas
        self.states = {part.name: copy.deepcopy(part.get(machine)) for part in machine.parts}
        cpus = (part for part in machine.parts if part.State is CpuState)
        # In the backend's own shape, for these very CPUs, and by the schema.
        self._cpus = [(cpu, cpu.mark(), self.states[next(cpus).name]) for cpu in machine.cpus]
        self._made: list[tuple[Part, Any]] = []  # other parts whose state is made when asked for; a config is as it is
        self._held: list[tuple[Any, ...]] = []  # name, state, its fields, their values, what copies it
        for part in machine.parts:
            state = self.states[part.name]
            names = [field.name for field in schema_of(part.State).fields]
            if part.holder is None and part.State not in (CpuState, MachineConfig):
                self._made.append((part, state))
            elif part.holder is not None and names:
                fields = attrgetter(*names)
                self._held.append((part.name, state, fields, fields(state), _copier(part.State)))
        self._holders: tuple[Any, list[Any]] = (None, [])

    def put_states(self, machine: Subject) -> None:
        """Make all but RAM as it was."""
        changed = False
        for part, state in self._made:
            part.put(machine, state)
        for holder, state, fields, values, copied in self._of(machine):
            if fields(holder.state) != values:  # a third of what == of the states takes
                holder.state = copied(state)
                changed = True
        for cpu, (made_by, mark, state) in zip(machine.cpus, self._cpus, strict=True):
            if cpu is made_by:
                cpu.reset(mark)
            else:
                cpu.load(copy.deepcopy(state))
                changed = True
        if changed:
            machine.board.restored()

    def _of(self, machine: Subject) -> list[Any]:
        """What holds each state, found once."""
        if self._holders[0] is not machine:
            holders = {part.name: part.holder(machine) for part in machine.parts if part.holder is not None}
            self._holders = machine, [(holders[name], *rest) for name, *rest in self._held]
        return self._holders[1]

    def differences(self, machine: Subject) -> list[str]:
        """What of a machine is not as it was, by part or page."""
        found = [part.name for part in machine.parts if part.get(machine) != self.states[part.name]]
        for region, kept, delta in zip(machine.ram.regions, self.copies, self.deltas, strict=True):
            wanted: Any = memoryview(kept.contents)
            if delta:
                wanted = bytearray(wanted)
                for start, data in delta:
                    wanted[start : start + len(data)] = data
            if region.view != wanted:
                pages = range(0, region.size, mmap.PAGESIZE)
                found += [
                    f"{region.name}+{at:#x}"
                    for at in pages
                    if region.view[at : at + mmap.PAGESIZE] != wanted[at : at + mmap.PAGESIZE]
                ]
        return found


def _copier(State: type) -> Callable[[Any], Any]:
    """Copies a state: deeply only where it holds other states."""
    return copy.deepcopy if any(_nests(field.type) for field in schema_of(State).fields) else copy.copy


def _nests(kind: Type) -> bool:
    match kind:
        case StructType():
            return True
        case ListType(item) | OptionalType(item):
            return _nests(item)
    return False
