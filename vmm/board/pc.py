"""Board "pc": i440fx, PIIX3 and PIIX4's power management, local APIC, I/O APIC and HPET beside the PC/AT's chips."""

from __future__ import annotations

import struct
from dataclasses import replace

from vmm.board import isapc
from vmm.board.config import MachineConfig
from vmm.board.platform import Platform
from vmm.board.slot import At, Cascade, Event, Fixed, Input, Intr, Irq, Irqs, Lead, Nowhere, Slot, ports
from vmm.devices import fw_cfg
from vmm.devices.apic.ioapic import IoApic
from vmm.devices.apic.lapic import BASE as LAPIC
from vmm.devices.apic.lapic import Lapic, LapicState
from vmm.devices.fw_cfg import FwCfg
from vmm.devices.hpet import FIRST_PIN, LAST_PIN, Hpet
from vmm.devices.isa.pic import PicState
from vmm.devices.pci.i440fx import I440fx
from vmm.devices.pci.piix3 import ROUTABLE, Piix3, Piix3State
from vmm.devices.pci.piix4_pm import PORTS, Piix4Pm, Piix4PmState
from vmm.errors import RequestError

_IO_APIC, _HPET = 0xFEC0_0000, 0xFED0_0000
_PM, _SCI = 0x600, 9
_PIRQS = (10, 10, 11, 11)
_TABLES_END = 1 << 20
_EXT_INT, _NMI = 0x700, 0x400  # of LVT entries


def _registers(base: int) -> At:
    return At(base, space="memory", width=4)


# What a firmware leaves, for a kernel that is started without one.


def _virtual_wire(config: MachineConfig) -> LapicState:
    return LapicState(software=True, lint0=_EXT_INT, lint1=_NMI)


def _waiting(config: MachineConfig) -> LapicState:
    return LapicState(waits=True)


def _local_apic(number: int, cpus: int) -> Slot:
    wires: dict[str, Lead] = {"number": Fixed(number), "cpus": Fixed(cpus), "intr": Intr(), "event": Event()}
    power_on = _waiting if number else _virtual_wire
    return Slot(f"lapic.{number}", Lapic, wires, (_registers(LAPIC),), power_on, cpu=number)


def _routes(config: MachineConfig) -> Piix3State:
    return Piix3State(routes=bytes(_PIRQS))


def _acpi_on(config: MachineConfig) -> Piix4PmState:
    return Piix4PmState(base=_PM, enabled=True, control=1)


def _levels(config: MachineConfig) -> PicState:
    return PicState(elcr=sum(1 << irq - 8 for irq in {_SCI, *_PIRQS}))


def slots(config: MachineConfig) -> list[Slot]:
    """As isapc.slots."""
    if config.memory_bytes < _TABLES_END:
        raise RequestError("a pc has at least 1M of memory: its tables lie below that")
    legacy = {slot.id: slot for slot in isapc.CHIPS}
    pins = {f"irq{pin}": Input("ioapic", "set_line", (pin,)) for pin in range(FIRST_PIN, LAST_PIN + 1)}
    configuration = {fw_cfg.CPUS: struct.pack("<H", config.cpus), fw_cfg.MOST_CPUS: struct.pack("<H", config.cpus)}
    chips = [
        *(_local_apic(number, config.cpus) for number in range(config.cpus)),
        Slot("ioapic", IoApic, {}, (_registers(_IO_APIC),)),
        replace(legacy["pic0"], wires={"output": Input("lapic.0", "set_lint0"), "master": Fixed(True)}),
        replace(legacy["pic1"], wires={"output": Cascade("pic0"), "master": Fixed(False)}, power_on=_levels),
        Slot("hpet", Hpet, {"irq0": Irq(0), "irq8": Irq(8), **pins}, (_registers(_HPET),)),
        replace(legacy["pit"], wires={"irq0": Input("hpet", "set_pit")}),
        replace(legacy["rtc"], wires={"irq8": Input("hpet", "set_rtc")}),
        *(legacy[id] for id in ("i8042", "com1", "com2", "com3", "com4", "port92")),
        Slot("piix3", Piix3, {"irqs": Irqs(ROUTABLE), "intx": Nowhere()}, (ports(0xCF9, "reset"),), _routes, 1 << 3),
        Slot("pm", Piix4Pm, {"sci": Irq(_SCI), "intx": Nowhere()}, (ports(0xB2, "apm"),), _acpi_on, 1 << 3 | 3),
        Slot("host", I440fx, {"intx": Nowhere()}, (ports(0xCF8, "address"), ports(0xCFC, "data")), function=0),
        Slot("fw_cfg", FwCfg, {"items": Fixed(configuration), "files": Fixed({})}, (ports(0x510),)),
        *(legacy[id] for id in ("debugcon", "biosdebug", "debugexit")),
    ]
    return isapc.with_devices(chips, config, {"pm": range(_PM, _PM + PORTS)})


def platform(config: MachineConfig) -> Platform:
    """What its tables are to tell."""
    serial = {1: (0x3F8, 4), 2: (0x2F8, 3), 3: (0x3E8, 4), 4: (0x2E8, 3)}
    return Platform(
        cpus=config.cpus, lapic=LAPIC, ioapic=_IO_APIC, hpet=_HPET, pm=_PM, sci=_SCI, pirqs=_PIRQS, serial=serial
    )
