"""A machine at one moment, to come back to again and again in one process.

    mark = Mark(machine)
    while ...:
        machine.run(...)
        mark.reset()

RAM: what it held becomes a file in memory that every region maps privately, at the address it had; then the kernel
knows which pages were written since (PAGEMAP_SCAN; before Linux 6.7 by reading all of /proc/self/pagemap), and giving
those up shows the old contents again. CPU: by the backend's fast way. Devices: those whose state changed. What the host
holds (console output, what was typed and not taken) is not the machine's, and stays.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from snapshot.schema import StructType, schema_of
from snapshot.types import ListType, OptionalType, Type
from vmm.board.board import SLOTS
from vmm.dirty_pages import Scanner
from vmm.errors import BackendError

if TYPE_CHECKING:
    from vmm.machine.machine import Machine


class Mark:
    """Raises SnapshotError when the RAM the machine was woken with is damaged, BackendError when the host has not the
    memory."""

    def __init__(self, machine: Machine) -> None:
        machine.await_checked()
        self._machine = machine
        self._contents: list[mmap.mmap] = []
        try:
            fixed = [region.fixed() for region in machine.ram.regions]
        except OSError as error:
            raise BackendError(f"cannot keep the guest's RAM: {error.strerror}") from None
        machine.ram.regions = tuple(region for region, _ in fixed)
        self._contents = [contents for _, contents in fixed]
        self._scanners = [Scanner(region.address, region.size) for region in machine.ram.regions]
        self._cpu = machine.cpu.mark()
        self._words = bytes(machine.clock.words)
        self._prepaid = machine.clock.prepaid
        self._board = copy.copy(machine.board.state)
        self._devices = []
        for device in machine.board.devices.values():
            state = copy.deepcopy(device.state)
            if names := [field.name for field in schema_of(type(state)).fields]:
                fields = attrgetter(*names)
                self._devices.append((device, state, fields, fields(state)))
        self._parts = copy.deepcopy(machine.parts())

    def reset(self) -> int:
        """Everything as it was. Returns how many bytes of RAM had been written."""
        machine, written = self._machine, 0
        discard_code = machine.cpu.discard_code
        for region, scanner in zip(machine.ram.regions, self._scanners, strict=True):
            give_up = region.memory.madvise
            for start, end in scanner.extents():
                give_up(mmap.MADV_DONTNEED, start, end - start)
                discard_code(region.base + start, region.base + end)
                written += end - start
        clock = machine.clock
        ctypes.memmove(clock.words, self._words, len(self._words))
        clock.prepaid = self._prepaid
        machine.board.state.request = self._board.request
        machine.board.state.exit_status = self._board.exit_status
        changed = False
        for device, state, fields, values in self._devices:
            if fields(device.state) != values:  # a third of what == of the states takes
                device.state = _copy(state)
                changed = True
        machine.cpu.reset(self._cpu)
        if changed:
            machine.board.restored()
        return written

    def differences(self) -> list[str]:
        """What is not as it was, by part or page: for a check that `reset` forgets nothing."""
        machine = self._machine
        found = [name for name, state in machine.parts().items() if state != self._parts[name]]
        for region, contents in zip(machine.ram.regions, self._contents, strict=True):
            if region.view != memoryview(contents):
                found += [
                    f"{region.name}+{at:#x}"
                    for at in range(0, region.size, mmap.PAGESIZE)
                    if region.view[at : at + mmap.PAGESIZE] != contents[at : at + mmap.PAGESIZE]
                ]
        return found

    def close(self) -> None:
        for scanner in self._scanners:
            scanner.close()
        for contents in self._contents:
            contents.close()


def _copy(state: Any) -> Any:
    """Deeply only where it holds other states."""
    return (copy.deepcopy if type(state) in _NESTED else copy.copy)(state)


def _nests(kind: Type) -> bool:
    match kind:
        case StructType():
            return True
        case ListType(item) | OptionalType(item):
            return _nests(item)
    return False


_NESTED = {slot.device.State for slot in SLOTS if any(_nests(f.type) for f in schema_of(slot.device.State).fields)}
