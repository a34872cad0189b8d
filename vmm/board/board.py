"""The board: the chips its config says, wired. `devices` has them in the order of restoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, assert_never

from snapshot.field_types import OneOf, u32
from snapshot.schema import state
from vmm.board import isapc, pc
from vmm.board.alarms import Alarms
from vmm.board.apics import IO_APIC_PINS, Apics, BoardTsc
from vmm.board.config import MachineConfig
from vmm.board.declared import made
from vmm.board.dma import RamDma
from vmm.board.pci import PciBus
from vmm.board.platform import Platform
from vmm.board.slot import A20, At, Cascade, Event, Fixed, Input, Irq, Irqs, Nowhere, Pirq, Serial, Slot
from vmm.board.slot import Intr as IntrLead
from vmm.bus import Bus, Window
from vmm.clock import GuestClock
from vmm.cpu.protocol import Intr
from vmm.device import Device
from vmm.devices.apic.ioapic import IoApic
from vmm.devices.apic.messages import EndOfInterrupt, Send
from vmm.devices.isa.pic import CASCADE, Pic, PicPair
from vmm.devices.pci.function import Function
from vmm.devices.pci.piix3 import PIRQS, Piix3
from vmm.errors import BackendError, RequestError
from vmm.host.console import Console
from vmm.ram import Ram
from vmm.wires import (
    UNWIRED,
    Alarm,
    Clock,
    Configuration,
    CpuPins,
    Dma,
    ExitRequest,
    Inta,
    Junction,
    Msi,
    Placement,
    Posting,
    ResetRequest,
    Transmit,
    Tsc,
    wire,
)

BOARDS = {"isapc": isapc.slots, "pc": pc.slots}
MOST_CPUS = {"pc": 64}  # else one


@state("board", version=1)
class BoardState:
    """What the guest asked of the board and has not been done yet."""

    request: Annotated[str, OneOf(("none", "reset", "exit")), "stop at the end of this block"] = "none"
    exit_status: Annotated[u32, "status of an exit request"] = 0


def slots(config: MachineConfig) -> list[Slot]:
    """The chips of a machine, a function of its config. Raises RequestError for a machine that cannot be built, and
    BackendError for a kind of device that is not here."""
    if config.board not in BOARDS:
        raise RequestError(f"there is no board {config.board!r} here; there are {', '.join(BOARDS)}")
    most = MOST_CPUS.get(config.board, 1)
    if not 1 <= config.cpus <= most:
        has = "one CPU" if most == 1 else f"1 to {most} CPUs"
        raise RequestError(f"board {config.board} has {has}, not {config.cpus}")
    return BOARDS[config.board](config)


def _nobody(cpu: int, level: bool) -> None: ...


class NoPins:
    """Where no CPU is."""

    def intr(self, level: bool) -> None: ...
    def apic_event(self, level: bool) -> None: ...
    def tsc(self) -> int:
        return 0

    def tsc_reaches(self, value: int) -> int | None:
        return None

    def set_a20(self, enabled: bool) -> None: ...
    def defer_writes(self, port: int, on: bool) -> None: ...
    def discard_code(self, start: int, end: int) -> None: ...
    def kick(self) -> None: ...


class Board:
    """All chips of one machine. It drives nothing until a CPU is attached."""

    def __init__(self, config: MachineConfig, clock: GuestClock, ram: Ram | None = None) -> None:
        """Raises RequestError for a device that cannot be put on it, BackendError for one that is not here, or of a
        kind whose code fails."""
        self.clock = clock
        self.bus = Bus()
        self.buses = tuple(Bus(self.bus) for _ in range(config.cpus))  # what each CPU sees
        self.state = BoardState()
        self.alarms = Alarms(self._kick)
        self.consoles: dict[str, Console] = {"com1": Console(), "debug": Console()}
        self.devices: dict[str, Device[Any]] = {}
        self.receivers: list[tuple[Console, Callable[[bytes], int]]] = []  # devices that take what is typed
        self.windows: dict[tuple[str, str], Window] = {}  # by slot and bank
        self.slots = slots(config)
        self._config, self._ram = config, ram
        self._pins: Sequence[CpuPins] = [NoPins()] * config.cpus
        self._intr = [False] * config.cpus
        self._woken: Callable[[int, bool], None] = _nobody
        self._a20 = Junction(lambda level: self._pins[0].set_a20(level))
        self._irqs = [Junction(partial(self._drive_irq, irq)) for irq in range(16)]
        self._pirqs = [Junction() for _ in range(PIRQS)]
        self._posting: dict[int, bool] = {}
        self.apics = Apics()
        self.pci = PciBus(self.bus)
        given = {device.id for device in config.devices}
        for slot in self.slots:
            try:
                self._put(slot)
            except Exception as error:
                if slot.id not in given or isinstance(error, RequestError):
                    raise
                # A kind may be of somebody's package.
                raise BackendError(f"device {slot.id}: {type(error).__name__}: {error}") from error
        pics = [device for device in self.devices.values() if isinstance(device, Pic)]
        self.pics = PicPair(*pics)
        for device in self.devices.values():
            if isinstance(device, IoApic):
                for irq, junction in enumerate(self._irqs):
                    junction.listen(partial(device.set_line, IO_APIC_PINS.get(irq, irq)))
            elif isinstance(device, Piix3):
                for pirq, junction in enumerate(self._pirqs):
                    junction.listen(partial(device.set_pirq, pirq))

    @property
    def console(self) -> Console:
        """The far end of the first serial port."""
        return self.consoles["com1"]

    @property
    def intrs(self) -> Sequence[Intr]:
        """What is behind each CPU's interrupt pins."""
        return self.apics.locals or (self.pics,)

    @property
    def platform(self) -> Platform | None:
        """What a firmware's tables are to tell of it; None where it has none."""
        return pc.platform(self._config) if self._config.board == "pc" else None

    # --- building

    def _put(self, slot: Slot) -> None:
        alarms = len(self.alarms)
        device = made(partial(wire, slot.device, partial(self._wire, slot)))
        if len(self.alarms) > alarms:
            self.alarms.belongs(device)
        elif type(device).deadline is not Device.deadline:
            raise TypeError(f"{slot.device.__name__} has deadlines, and no Alarm to tell them to")
        self.devices[slot.id] = device
        if slot.id in self.consoles and "receive" in device.outside:
            receive: Callable[[bytes], int] = device.receive  # type: ignore[attr-defined]
            self.receivers.append((self.consoles[slot.id], receive))
        self.apics.add(device)
        if slot.function is not None:
            assert isinstance(device, Function)
            found = self.pci.put(slot.function, device)
            self.windows |= {(slot.id, bank): window for bank, window in found.items()}
        bus = self.bus if slot.cpu is None else self.buses[slot.cpu]
        for at in slot.at:
            space = bus.ports if at.space == "port" else bus.memory
            window = self.windows[slot.id, at.bank] = space.window(device, at.bank, width=at.width)
            window.map(at.base)

    def _wire(self, slot: Slot, name: str, annotation: Any) -> Any:
        lead = slot.wires.get(name)
        match lead:
            case Irq(number):
                return self._irqs[number].driver()
            case Cascade(other):
                return partial(_input(self.devices[other]), CASCADE)
            case Pirq(number):
                return self._pirqs[number].driver()
            case Irqs(numbers):
                drivers = {number: self._irqs[number].driver() for number in numbers}
                return lambda number, level: drivers[number](level)
            case Input(other, method, arguments):
                return partial(getattr(self.devices[other], method), *arguments)
            case Nowhere():
                return lambda level: None
            case IntrLead():
                return partial(self._drive_intr, slot.cpu or 0)
            case Event():
                return partial(self._drive_event, slot.cpu or 0)
            case A20():
                return self._a20.driver()
            case Serial(far_end):
                return self._far_end(far_end)
            case Fixed(value):
                return value
            case None:
                return self._by_annotation(slot, annotation)
        assert_never(lead)

    def _by_annotation(self, slot: Slot, annotation: Any) -> Any:
        if annotation is Clock:
            return self.clock
        if annotation is Alarm:
            return self.alarms.alarm()
        if annotation is Transmit:
            return self._far_end(slot.id)
        if annotation is Posting:
            port = next((at for at in slot.at if at.space == "port"), None)
            return UNWIRED if port is None else partial(self._drive_posting, port)
        if annotation is Send:
            return self.apics.send
        if annotation is EndOfInterrupt:
            return self.apics.end_of_interrupt
        if annotation is Inta:
            return lambda: self.pics.acknowledge()
        if annotation is Msi:
            return self.apics.message
        if annotation is Tsc:
            return BoardTsc(lambda: self._pins[slot.cpu or 0])
        if annotation is Configuration:
            return self.pci
        if annotation is Placement:
            return partial(self._place, slot.id)
        if annotation is Dma:
            return RamDma(lambda: self._ram, lambda start, end: self._pins[0].discard_code(start, end))
        if annotation is ResetRequest:
            return self.request_reset
        if annotation is ExitRequest:
            return self.request_exit
        return UNWIRED

    def _far_end(self, name: str) -> Callable[[int], None]:
        return self.consoles.setdefault(name, Console()).transmit

    # --- what the wires lead to

    def _drive_irq(self, irq: int, level: bool) -> None:
        chip, pin = (self.pics.slave, irq - 8) if irq >= 8 else (self.pics.master, irq)
        chip.set_line(pin, level)

    def _drive_intr(self, cpu: int, level: bool) -> None:
        if level != self._intr[cpu]:
            self._intr[cpu] = level
            self._pins[cpu].intr(level)
            self._woken(cpu, level)

    def _drive_event(self, cpu: int, level: bool) -> None:
        self._pins[cpu].apic_event(level)
        self._woken(cpu, level)

    def _place(self, slot: str, bank: str, base: int | None) -> None:
        window = self.windows[slot, bank]
        if base is None:
            window.unmap()
        else:
            window.map(base)

    def _drive_posting(self, at: At, level: bool) -> None:
        if self._posting.get(at.base, False) != level:
            self._posting[at.base] = level
            self._pins[0].defer_writes(at.base, level)

    def _kick(self) -> None:
        for pins in self._pins:
            pins.kick()

    def request_reset(self) -> None:
        self.state.request = "reset"
        self._kick()

    def request_exit(self, status: int) -> None:
        self.state.request = "exit"
        self.state.exit_status = status & 0xFFFFFFFF
        self._kick()

    # --- whole state

    def attach(self, pins: Sequence[CpuPins], ram: Ram | None, woken: Callable[[int, bool], None] = _nobody) -> None:
        """CPUs, to which nothing has been driven yet, are on the other ends of the wires, and the machine's RAM behind
        them. `woken` is called when what one waits for has come, or is gone. To be followed by `restored()`."""
        self._pins, self._ram, self._woken = pins, ram, woken
        if ram is not None:
            ram.on_change = self._kick
        self._intr = [False] * len(pins)
        self._posting.clear()

    def power_on(self) -> None:
        """Each chip as at guest time zero."""
        self.state = BoardState()
        for slot in self.slots:
            if slot.power_on is not None:
                self.devices[slot.id].state = slot.power_on(self._config)
        self.restored()

    def restored(self) -> None:
        """Every state was assigned: all lines and alarms are driven from them."""
        self._a20.forget()
        for junction in (*self._irqs, *self._pirqs):
            junction.forget()
        for device in self.devices.values():
            device.restored()

    def reset(self) -> None:
        """RESET#."""
        self.state = BoardState()
        for device in self.devices.values():
            device.reset()
        self.power_on()


def _input(device: Device[Any]) -> Callable[[int, bool], None]:
    assert isinstance(device, Pic)
    return device.set_line
