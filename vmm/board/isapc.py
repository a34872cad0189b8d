"""Board "isapc": the PC/AT's chips as released in 0.1.0, and what the config adds to them. Nothing else knows an
address."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from vmm.board.config import ID, RESERVED, MachineConfig
from vmm.board.kinds import kind
from vmm.board.slot import A20, At, Cascade, Fixed, Intr, Irq, Serial, Slot, ports
from vmm.devices.isa import rtc
from vmm.devices.isa.debug_exit import DebugExit
from vmm.devices.isa.debugcon import Debugcon
from vmm.devices.isa.i8042 import I8042
from vmm.devices.isa.pic import Pic
from vmm.devices.isa.pit import Pit
from vmm.devices.isa.port92 import Port92
from vmm.devices.isa.reset_control import ResetControl
from vmm.devices.isa.rtc import Rtc
from vmm.devices.isa.uart import Uart
from vmm.errors import BackendError, RequestError
from vmm.ram import layout


def _rtc(config: MachineConfig) -> rtc.RtcState:
    sizes = dict(layout(config.memory_bytes))
    return rtc.power_on(config.epoch_ns, sizes.pop(0), sum(sizes.values()))


CHIPS: tuple[Slot, ...] = (
    Slot("pic0", Pic, {"output": Intr(), "master": Fixed(True)}, (ports(0x20), ports(0x4D0, "elcr"))),
    Slot("pic1", Pic, {"output": Cascade("pic0"), "master": Fixed(False)}, (ports(0xA0), ports(0x4D1, "elcr"))),
    Slot("pit", Pit, {"irq0": Irq(0)}, (ports(0x40), ports(0x61, "portb"))),
    Slot("rtc", Rtc, {"irq8": Irq(8)}, (ports(0x70),), power_on=_rtc),
    Slot("i8042", I8042, {"irq1": Irq(1), "irq12": Irq(12), "a20": A20()}, (ports(0x60), ports(0x64, "command"))),
    Slot("com1", Uart, {"irq": Irq(4)}, (ports(0x3F8),)),
    Slot("com2", Uart, {"irq": Irq(3)}, (ports(0x2F8),)),
    Slot("com3", Uart, {"irq": Irq(4)}, (ports(0x3E8),)),
    Slot("com4", Uart, {"irq": Irq(3)}, (ports(0x2E8),)),
    Slot("port92", Port92, {"a20": A20()}, (ports(0x92),)),
    Slot("reset", ResetControl, {}, (ports(0xCF8),)),
    Slot("debugcon", Debugcon, {"transmit": Serial("debug"), "readback": Fixed(0xE9)}, (ports(0xE9),)),
    Slot("biosdebug", Debugcon, {"transmit": Serial("debug"), "readback": Fixed(0xE9)}, (ports(0x402),)),
    Slot("debugexit", DebugExit, {}, (ports(0x501),)),
)
CASCADE_IRQ = 2


def slots(config: MachineConfig) -> list[Slot]:
    """Every chip of the machine, in the order of restoring. Raises RequestError for a device that cannot be put there,
    BackendError for one of a kind that is not here."""
    return with_devices(CHIPS, config)


def with_devices(
    chips: Iterable[Slot], config: MachineConfig, taken: Mapping[str, range] = MappingProxyType({})
) -> list[Slot]:
    """A board's own chips, and those of the config. `taken` are ports where a chip will be, by its part. Raises as
    `slots`."""
    found = list(chips)
    for device in config.devices:
        name = device.id or device.kind
        if not ID.fullmatch(device.id) or device.id in (*RESERVED, *(slot.id for slot in found)):
            raise RequestError(f"device {name}: its id is taken, or is no name: {device.id!r}")
        try:
            made = kind(device.kind)
            if made.space == "pci" and not device.place:
                device = replace(device, place=_free(found))
            slot = made.slot(device)
            _check(slot, found, config.memory_bytes)
            for at in slot.at:
                for other, there in taken.items():
                    _apart("port", other, _range(at, slot) if at.space == "port" else range(0), there)
        except RequestError as error:
            raise RequestError(f"device {name}: {error}") from None
        except BackendError as error:
            raise BackendError(f"device {name}: {error}") from None
        found.append(slot)
    functions = {slot.function: slot for slot in found if slot.function is not None}
    for function, slot in functions.items():
        if function & ~7 not in functions:
            raise RequestError(f"device {slot.id}: slot={function >> 3}.0 is empty: no guest looks further")
    return found


def _free(others: list[Slot]) -> str:
    """The first slot that nothing is in."""
    taken = {slot.function >> 3 for slot in others if slot.function is not None}
    free = next((slot for slot in range(1, 32) if slot not in taken), None)
    if free is None:
        raise RequestError("no PCI slot is free")
    return f"slot={free}"


def _check(slot: Slot, others: list[Slot], memory_bytes: int) -> None:
    for at in slot.at:
        for base, size in layout(memory_bytes):
            if at.space == "memory" and at.base < base + size and base < at.base + slot.device.banks[at.bank].size:
                raise RequestError(f"RAM lies at memory={at.base:#x}")
    if slot.function is not None:
        functions = {other.function: other.id for other in others if other.function is not None}
        if not functions:
            raise RequestError("this board has no PCI: --board pc has")
        if slot.function in functions:
            where = f"slot={slot.function >> 3}.{slot.function & 7}"
            raise RequestError(f"{functions[slot.function]} lies at {where}")
    for lead in slot.wires.values():
        if lead == Irq(CASCADE_IRQ):
            raise RequestError("interrupt 2 is where the second controller is connected")
    for at in slot.at:
        for other in others:
            for there in other.at:
                if at.space == there.space:
                    _apart(at.space, other.id, _range(at, slot), _range(there, other))


def _range(at: At, slot: Slot) -> range:
    return range(at.base, at.base + slot.device.banks[at.bank].size)


def _apart(space: str, other: str, here: range, there: range) -> None:
    if (first := max(here.start, there.start)) < min(here.stop, there.stop):
        raise RequestError(f"{other} lies at {space}={first:#x}")
