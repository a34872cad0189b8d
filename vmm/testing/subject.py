"""What is tested: a device, how it is built on a rig, and where its registers lie."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from snapshot import field_types as types
from snapshot.errors import SnapshotError
from vmm.board import declared, kinds
from vmm.board.board import BOARDS, MOST_CPUS, slots
from vmm.board.config import DeviceConfig, MachineConfig
from vmm.board.slot import At, Slot
from vmm.bus import Bus
from vmm.device import Device
from vmm.errors import RequestError
from vmm.qtest.board import Command
from vmm.registers import Register
from vmm.testing.actions import Call
from vmm.testing.rig import Build, Rig, on_a_board, wiring

BANK = 0x100  # banks of a device that is on no board are put this far apart, or twice, three times ...
MEMORY = 0xF000_0000  # and from here on in memory
MOST = max(MOST_CPUS.values())


@functools.cache
def chips(cpus: int = 1) -> dict[str, Slot]:
    """What is on the boards there are, by the names of their parts, with so many CPUs where they can have as many."""
    boards = (MachineConfig(board=board, cpus=min(cpus, MOST_CPUS.get(board, 1))) for board in BOARDS)
    return {slot.id: slot for board in boards for slot in slots(board)}


@dataclass(frozen=True)
class Subject:
    """`at` says where each bank lies."""

    name: str
    device: type[Device[Any]]
    build: Build
    at: tuple[At, ...]

    @classmethod
    def of(cls, device: type[Device[Any]] | Build, at: tuple[At, ...] | None = None) -> Subject:
        """A class whose constructor says what its wires are, or a function that builds a device from a Rig. Where `at`
        does not say it, the banks lie among the ports, or, if they are too large for that or have registers of eight
        bytes, in memory. Raises TypeError for what is no device or is declared wrongly, and what its constructor
        raises."""
        if isinstance(device, type) and (said := declared.wrong(device)):
            raise TypeError(said)
        if not callable(device):
            raise TypeError(f"{device!r} is neither a device's class nor a function that makes one of a Rig")
        build = wiring(device) if isinstance(device, type) else device
        made = type(declared.made(lambda: build(Rig())))
        if said := declared.wrong(made):
            raise TypeError(said)
        return cls(f"{made.__module__}:{made.__qualname__}", made, build, _places(made) if at is None else at)

    @classmethod
    @functools.cache
    def named(cls, name: str) -> Subject:
        """A part of the board ("com1"), a kind of device ("uart"), or somebody's class ("package.module:Class"). Raises
        RequestError, BackendError."""
        if (slot := chips(MOST).get(name)) is not None:
            # A function of PCI is where a guest puts it.
            at = slot.at if slot.function is None else _places(slot.device)
            return cls(name, slot.device, on_a_board(slot), at)
        module, _, attribute = name.partition(":")
        if not attribute:
            if name in kinds.names():
                return cls._of_kind(kinds.kind(name))
            known = ", ".join(dict.fromkeys([*chips(), *kinds.names()]))
            raise RequestError(f"no device {name!r}: there are {known}; or MODULE:CLASS")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # it is somebody's code
            raise RequestError(f"{name}: {type(error).__name__}: {error}") from None
        if not (isinstance(found, type) and issubclass(found, Device) and hasattr(found, "State")):
            raise RequestError(f"{name}: not a Device class with a State")
        try:
            return cls.of(found)
        except TypeError as error:
            raise RequestError(str(error)) from None
        except Exception as error:
            raise RequestError(f"{name}: {type(error).__name__}: {error}") from None

    @classmethod
    def _of_kind(cls, kind: kinds.Kind) -> Subject:
        place = kind.place or ("port=0x100" if kind.space == "port" else f"memory={MEMORY:#x}")
        slot = kind.slot(DeviceConfig(id=kind.name, kind=kind.name, place=place))
        return cls(kind.name, slot.device, on_a_board(slot), slot.at)

    def place(self, register: Register) -> tuple[At, int]:
        """Where this register is: its bank's place, and its address."""
        at = next(at for at in self.at if at.bank == register.bank)
        return at, at.base + register.offset

    def sizes(self, at: At) -> tuple[int, ...]:
        """Which sizes, in bytes, an access of a bank there may have."""
        return (1, 2, 4, 8) if at.space == "memory" else (1, 2, 4)

    @staticmethod
    def read(at: At, address: int, size: int) -> Command:
        return Command("read", size, address) if at.space == "memory" else Command("in", size, address & 0xFFFF)

    @staticmethod
    def write(at: At, address: int, size: int, value: int) -> Command:
        value &= (1 << 8 * size) - 1
        if at.space == "memory":
            return Command("write", size, address, value)
        return Command("out", size, address & 0xFFFF, value)

    def put(self, bus: Bus, device: Any) -> None:
        """Put a device's banks where they lie."""
        for at in self.at:
            space = bus.memory if at.space == "memory" else bus.ports
            space.window(device, at.bank, width=at.width).map(at.base)

    @functools.cached_property
    def calls(self) -> dict[str, Mapping[str, types.Type]]:
        """The @outside methods, with the types of their parameters; and RESET#, which every device has."""
        return {"reset": {}, **declared.outside(self.device)}

    @functools.cached_property
    def modules(self) -> tuple[ModuleType, ...]:
        """Find the modules a device is made of: those its classes are defined in, and those that these import from
        their own packages."""
        found: dict[str, None] = {}
        for base in self.device.__mro__[: self.device.__mro__.index(Device)]:
            package = base.__module__.rpartition(".")[0]
            near = {str(getattr(value, "__module__", "")) for value in vars(sys.modules[base.__module__]).values()}
            found[base.__module__] = None
            found |= dict.fromkeys(sorted(name for name in near if package and name.rpartition(".")[0] == package))
        return tuple(sys.modules[name] for name in found)

    @functools.cached_property
    def constants(self) -> tuple[int, ...]:
        """The numbers its code compares with and computes with: commands, masks, limits."""
        found: set[int] = set()
        for module in self.modules:
            found |= {value for value in vars(module).values() if type(value) is int and value >= 0}
            for value in vars(module).values():
                if isinstance(value, type) and value.__module__ == module.__name__:
                    for member in vars(value).values():
                        found.update(_constants(member.__code__) if inspect.isfunction(member) else ())
        return tuple(sorted(found))

    def arguments(self, call: Call) -> dict[str, Any]:
        """Decode the arguments of a call of an @outside method. Raises RequestError when the device has no such method,
        or it takes others."""
        wanted, given = self.calls.get(call.method), dict(call.arguments)
        if wanted is None:
            raise RequestError(f"{self.name} has no method {call.method!r} marked @outside")
        if wanted.keys() != given.keys():
            raise RequestError(f"{self.name}: {call.method} takes {', '.join(wanted) or 'nothing'}")
        try:
            return {name: kind.decode(given[name], name) for name, kind in wanted.items()}
        except SnapshotError as error:
            raise RequestError(f"{self.name}: {call.method}: {error}") from None


def _constants(code: CodeType) -> Iterator[int]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _constants(constant)
        elif type(constant) is int and constant >= 0:
            yield constant


def _places(device: type[Device[Any]]) -> tuple[At, ...]:
    """Lay a device's banks out one after the other, among the ports or, where they do not fit there, in memory."""
    largest = max((bank.size for bank in device.banks.values()), default=1)
    apart = -(-largest // BANK) * BANK
    wide = any(register.size == 8 for register in device.registers) or apart * len(device.banks) > 0xF000
    banks = enumerate(sorted(device.banks))
    if wide:
        return tuple(At(MEMORY + i * apart, bank, "memory", 8) for i, bank in banks)
    return tuple(At(i * apart, bank) for i, bank in banks)
