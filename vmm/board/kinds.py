"""Kinds of devices that a machine can be given: ours, and those of other packages.

A package adds a kind by an entry point of the group `anyhyve.devices`, whose object is a Kind:

    [project.entry-points."anyhyve.devices"]
    thermometer = "acme.thermometer:KIND"

How a constructor's argument is wired for a device that is put on a board by its config: one that an option is named
after takes it, a Line as the interrupt of that number, anything else as it is; a PCI function's `intx` goes where its
slot leads; all others go by their annotations (vmm.wires).
"""

from __future__ import annotations

import functools
import inspect
import re
import traceback
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

from snapshot.field_types import Range, u8
from snapshot.schema import schema_of
from vmm.board import declared, options
from vmm.board.config import PLACES, DeviceConfig
from vmm.board.slot import At, Fixed, Irq, Lead, Nowhere, Pirq, Slot
from vmm.device import Device
from vmm.devices.isa.debug_exit import DebugExit
from vmm.devices.isa.debugcon import Debugcon
from vmm.devices.isa.uart import Uart
from vmm.devices.pci.function import Function
from vmm.errors import BackendError, RequestError
from vmm.wires import Line

GROUP = "anyhyve.devices"
_PORTS, _MEMORY = 1 << 16, 1 << 40
_SLOT = re.compile(r"slot=(\d{1,2})(?:\.([0-7]))?")


@dataclass(frozen=True)
class Kind:
    """What a `--device` of this name makes. `banks` says how far each bank lies from the place that is given (`place`
    by default, such as "port=0x501"), in windows of `width` among the ports or in memory. In `space` "pci" it is a
    Function, its banks are where the guest puts them, and it is given a slot, by default the first that is free."""

    name: str
    device: type[Device[Any]]
    options: type = options.NoOptions
    space: Literal["port", "memory", "pci"] = "port"
    banks: Mapping[str, int] = field(default_factory=lambda: {"": 0})
    width: int = 1
    place: str = ""

    @property
    def doc(self) -> str:
        """The first line of what the device's class says of itself, else its state."""
        said = inspect.getdoc(self.device) or ""
        return schema_of(self.device.State).doc if said == inspect.getdoc(Device) else said.partition("\n")[0]

    def wrong(self) -> str | None:
        """What does not fit together in it, if anything: a device could not be made."""
        if (said := declared.wrong(self.device)) is not None:
            return said
        if (self.space == "pci") != issubclass(self.device, Function):
            return f"{self.device.__name__} is {'no' if self.space == 'pci' else 'a'} PCI function"
        if self.space != "pci" and (unknown := [bank for bank in self.banks if bank not in self.device.banks]):
            return f"{self.device.__name__} has no bank {unknown[0]!r}"
        hints = typing.get_type_hints(self.device.__init__)
        named = set(options.options_of(self.options))
        if unused := sorted(named - hints.keys()):
            return f"{self.device.__name__} takes no {unused[0]!r}, which is an option"
        lines = sorted(name for name, hint in hints.items() if hint is Line and name not in (*named, "intx"))
        return f"no option says which interrupt {lines[0]!r} is" if lines else None

    def slot(self, config: DeviceConfig) -> Slot:
        """Raises RequestError for options or a place it cannot have."""
        chosen = options.read(
            self.options, [(option.name, option.value) for option in config.options], besides=("id", self._word)
        )
        if issubclass(self.device, Function):
            function = self._function(config.place or self.place)
            intx = Pirq((function >> 3) + self.device.pin - 2 & 3) if self.device.pin else Nowhere()
            return Slot(config.id, self.device, {**self._wires(chosen), "intx": intx}, function=function)
        space: Literal["port", "memory"] = "port" if self.space == "port" else "memory"
        base = self._base(config.place or self.place)
        end = max(base + offset + self.device.banks[bank].size for bank, offset in self.banks.items())
        if end > (_PORTS if space == "port" else _MEMORY):
            raise RequestError(f"{config.place}: it ends at {end:#x}, beyond the last address")
        at = tuple(At(base + offset, bank, space, self.width) for bank, offset in self.banks.items())
        return Slot(config.id, self.device, self._wires(chosen), at)

    @property
    def _word(self) -> str:
        return "slot" if self.space == "pci" else self.space

    def _function(self, place: str) -> int:
        """From slot=DEVICE[.FUNCTION]."""
        found = _SLOT.fullmatch(place)
        if found is None or int(found[1]) > 31:
            raise RequestError(f"{place}: it is put at slot=DEVICE[.FUNCTION], 0..31 and 0..7")
        return int(found[1]) << 3 | int(found[2] or 0)

    def _wires(self, chosen: Any) -> dict[str, Lead]:
        hints = typing.get_type_hints(self.device.__init__)
        named = {name: getattr(chosen, name) for name in options.options_of(self.options) if name in hints}
        return {name: Irq(value) if hints[name] is Line else Fixed(value) for name, value in named.items()}

    def _base(self, place: str) -> int:
        word, _, at = place.partition("=")
        if word != self.space:
            found = f", not {word}=" if word in PLACES else ""
            raise RequestError(f"it is put at {self.space}=ADDRESS{found}")
        try:
            base = int(at, 0)
        except ValueError:
            raise RequestError(f"{place}: not an address") from None
        most = (_PORTS if self.space == "port" else _MEMORY) - 1
        if not 0 <= base <= most:
            raise RequestError(f"{place}: not within 0..{most:#x}")
        return base


@dataclass(frozen=True, kw_only=True)
class IsaOptions:
    """A device with an interrupt."""

    irq: Annotated[int, Range(0, 15), "ISA interrupt"] = 4


@dataclass(frozen=True, kw_only=True)
class DebugconOptions:
    """A debug console."""

    readback: Annotated[u8, "what a read answers"] = 0xE9


OURS = (
    Kind("uart", Uart, IsaOptions),
    Kind("debugcon", Debugcon, DebugconOptions, place="port=0xe9"),
    Kind("debug-exit", DebugExit, place="port=0x501"),
)


@functools.cache
def _theirs() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """Of all kinds there are here."""
    ours = [kind.name for kind in OURS]
    return [*ours, *sorted(_theirs().keys() - set(ours))]


def at_fault(error: BaseException) -> str | None:
    """What to say of an error in the code of another package's device, in a line; None where it is not there."""
    theirs = {point.value.partition(":")[0].partition(".")[0] for point in _theirs().values()}
    ours = {"anyhyve", "emu", "kvmbackend", "snapshot", "vmm"}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in theirs:
            code = frame.f_code
            return f"{code.co_filename}:{line}: {code.co_name}: {type(error).__name__}: {error}"
        if package in ours:
            return None
    return None


@functools.cache
def kind(name: str) -> Kind:
    """Raises BackendError where no package here has the kind, or its package cannot be used."""
    for ours in OURS:
        if ours.name == name:
            return ours
    point = _theirs().get(name)
    if point is None:
        raise BackendError(f"there is no kind of device {name!r} here; there are {', '.join(names())}")
    try:
        found = point.load()
    except Exception as error:  # it is somebody's code
        raise BackendError(f"device {name}: {point.value}: {type(error).__name__}: {error}") from None
    if not isinstance(found, Kind):
        raise BackendError(f"device {name}: {point.value} is no Kind")
    if found.name != name:
        raise BackendError(f"device {name}: {point.value} is of the kind {found.name!r}: one of the two names is wrong")
    if (wrong := found.wrong()) is not None:
        raise BackendError(f"device {name}: {point.value}: {wrong}")
    return found
