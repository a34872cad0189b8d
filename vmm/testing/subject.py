"""What is tested: a device, how it is built on a rig, and at which ports its registers lie."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

from snapshot import schema, types
from snapshot.errors import SnapshotError
from vmm.board.board import SLOTS, Slot
from vmm.bus import Bus
from vmm.device import Device
from vmm.devices.pic import Pic
from vmm.errors import GuestError
from vmm.qtest.board import Command
from vmm.registers import Register
from vmm.testing.actions import Call
from vmm.testing.rig import Build, Rig, wiring

BANK = 0x100  # banks of a device that is on no board are put this far apart, or twice, three times ...
MEMORY = 0xF000_0000  # and from here on in memory


@dataclass(frozen=True)
class Subject:
    """`ports`: (port, bank) of each bank; physical addresses for a device that is meant for memory."""

    name: str
    device: type[Device[Any]]
    build: Build
    ports: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, device: type[Device[Any]] | Build) -> Subject:
        """A class whose constructor says what its wires are, or a function that builds a device from a Rig."""
        build = wiring(device) if isinstance(device, type) else device
        made = type(build(Rig()))
        banks = sorted({register.bank for register in made.registers})
        name = f"{made.__module__}:{made.__qualname__}"
        first = MEMORY if made.mmio else 0
        largest = max((register.offset + register.size for register in made.registers), default=1)
        apart = -(-largest // BANK) * BANK
        return cls(name, made, build, tuple((first + i * apart, bank) for i, bank in enumerate(banks)))

    @classmethod
    @functools.cache
    def named(cls, name: str) -> Subject:
        """A part of the board ("com1"), or somebody's class ("package.module:Class"). Raises GuestError."""
        if (slot := next((slot for slot in SLOTS if slot.name == name), None)) is not None:
            return cls(name, slot.device, partial(_build, slot), slot.ports)
        module, _, attribute = name.partition(":")
        if not attribute:
            raise GuestError(f"no device {name!r}: the board has {', '.join(s.name for s in SLOTS)}; or MODULE:CLASS")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # it is somebody's code
            raise GuestError(f"{name}: {type(error).__name__}: {error}") from None
        if not (isinstance(found, type) and issubclass(found, Device) and hasattr(found, "State")):
            raise GuestError(f"{name}: not a Device class with a State")
        try:
            return cls.of(found)
        except TypeError as error:
            raise GuestError(str(error)) from None
        except Exception as error:
            raise GuestError(f"{name}: {type(error).__name__}: {error}") from None

    def port(self, register: Register) -> int:
        """Where this register is."""
        return next(port for port, bank in self.ports if bank == register.bank) + register.offset

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of accesses there are, in bytes."""
        return (1, 2, 4, 8) if self.device.mmio else (1, 2, 4)

    def read(self, address: int, size: int) -> Command:
        return Command("read", size, address) if self.device.mmio else Command("in", size, address & 0xFFFF)

    def write(self, address: int, size: int, value: int) -> Command:
        value &= (1 << 8 * size) - 1
        if self.device.mmio:
            return Command("write", size, address, value)
        return Command("out", size, address & 0xFFFF, value)

    def claim(self, bus: Bus, device: Device[Any]) -> None:
        """Put its banks where they lie."""
        for port, bank in self.ports:
            (bus.claim_mmio if self.device.mmio else bus.claim_ports)(device, port, bank)

    @functools.cached_property
    def calls(self) -> dict[str, dict[str, types.Type]]:
        """The @outside methods, with the types of their parameters; and RESET#, which every device has."""
        found: dict[str, dict[str, types.Type]] = {"reset": {}}
        for method in self.device.outside:
            function = getattr(self.device, method)
            hints = typing.get_type_hints(function, include_extras=True)
            names = list(inspect.signature(function).parameters)[1:]
            found[method] = {name: schema.type_of(hints[name], f"{method}.{name}") for name in names}
        return found

    @functools.cached_property
    def modules(self) -> tuple[ModuleType, ...]:
        """Those the device is made of: those of its classes, and what they take from their own packages."""
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
        """Of a call of an @outside method, decoded. Raises GuestError when the device has no such method, or it takes
        others."""
        wanted, given = self.calls.get(call.method), dict(call.arguments)
        if wanted is None:
            raise GuestError(f"{self.name} has no method {call.method!r} marked @outside")
        if wanted.keys() != given.keys():
            raise GuestError(f"{self.name}: {call.method} takes {', '.join(wanted) or 'nothing'}")
        try:
            return {name: kind.decode(given[name], name) for name, kind in wanted.items()}
        except SnapshotError as error:
            raise GuestError(f"{self.name}: {call.method}: {error}") from None


def _constants(code: CodeType) -> Iterator[int]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _constants(constant)
        elif type(constant) is int and constant >= 0:
            yield constant


def _build(slot: Slot, rig: Rig) -> Device[Any]:
    """As on the board, with its wires ending in a rig."""

    def console(name: str) -> Any:
        return SimpleNamespace(transmit=rig.sink(name))

    def line(name: str) -> Callable[..., Any]:
        return lambda which: rig.line(f"{name}{which}")

    board: Any = SimpleNamespace(
        clock=rig.clock,
        pics=SimpleNamespace(
            line=line("irq"), master=Pic(rig.line("intr")), slave=Pic(rig.line("intr"), master=False)
        ),
        serial=console,
        debug=console("debug"),
        posting=line("posting "),
        a20=line("a20 "),
        request_reset=rig.sink("reset"),
        request_exit=rig.sink("exit"),
    )  # fmt: skip
    return slot.build(board)
