"""The board: which chips, at which ports, on which interrupt lines. One table; nothing else knows an address.

A device is built by a function of its wiring and claims its banks on the bus. Names are the snapshot's part names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Protocol

from snapshot.schema import state
from snapshot.types import OneOf, u32
from vmm.bus import Bus
from vmm.clock import GuestClock
from vmm.device import Device
from vmm.devices.debug_exit import DebugExit
from vmm.devices.debugcon import Debugcon
from vmm.devices.i8042 import I8042
from vmm.devices.pic import Pic, PicPair
from vmm.devices.pit import Pit
from vmm.devices.port92 import Port92
from vmm.devices.reset_control import ResetControl
from vmm.devices.rtc import Rtc
from vmm.devices.uart import Uart
from vmm.host.console import Console
from vmm.wires import Line


@state("board", version=1)
class BoardState:
    """What the guest asked of the board and has not been done yet."""

    request: Annotated[str, OneOf(("none", "reset", "exit")), "stop at the end of this block"] = "none"
    exit_status: Annotated[u32, "status of an exit request"] = 0


class Host(Protocol):
    """What the board drives outside itself."""

    def intr(self, level: bool) -> None: ...
    def set_a20(self, enabled: bool) -> None: ...
    def post_writes(self, port: int, on: bool) -> None: ...  # byte writes of `port` may come late, in order
    def attention(self) -> None: ...  # look at the board at the next boundary


@dataclass(frozen=True)
class Slot:
    """One chip: its part name, its class, how it is built, and (port, bank) of each bank it claims."""

    name: str
    device: type[Device[Any]]
    build: Callable[[Board], Device[Any]]
    ports: tuple[tuple[int, str], ...]


def _uart(name: str, base: int, irq: int) -> Slot:
    def build(board: Board) -> Device[Any]:
        return Uart(board.pics.line(irq), board.serial(name).transmit, board.posting(base))

    return Slot(name, Uart, build, ((base, ""),))


SLOTS: tuple[Slot, ...] = (
    Slot("pic0", Pic, lambda b: b.pics.master, ((0x20, ""), (0x4D0, "elcr"))),
    Slot("pic1", Pic, lambda b: b.pics.slave, ((0xA0, ""), (0x4D1, "elcr"))),
    Slot("pit", Pit, lambda b: Pit(b.clock, b.pics.line(0)), ((0x40, ""), (0x61, "portb"))),
    Slot("rtc", Rtc, lambda b: Rtc(b.clock, b.pics.line(8)), ((0x70, ""),)),
    Slot("i8042", I8042, lambda b: I8042(b.pics.line(1), b.pics.line(12), b.a20("i8042"), b.request_reset),
         ((0x60, ""), (0x64, "command"))),
    _uart("com1", 0x3F8, 4),
    _uart("com2", 0x2F8, 3),
    _uart("com3", 0x3E8, 4),
    _uart("com4", 0x2E8, 3),
    Slot("port92", Port92, lambda b: Port92(b.a20("port92"), b.request_reset), ((0x92, ""),)),
    Slot("reset", ResetControl, lambda b: ResetControl(b.request_reset), ((0xCF9, ""),)),
    Slot("debugcon", Debugcon, lambda b: Debugcon(b.debug.transmit, 0xE9), ((0xE9, ""),)),
    Slot("biosdebug", Debugcon, lambda b: Debugcon(b.debug.transmit, 0xE9), ((0x402, ""),)),
    Slot("debugexit", DebugExit, lambda b: DebugExit(b.request_exit), ((0x501, ""),)),
)  # fmt: skip


class Board:
    """All chips of one machine, wired. `devices` keeps the table's order, which is the order of restoring."""

    clock: GuestClock
    pics: PicPair
    console: Console  # com1
    debug: Console  # ports 0xe9 and 0x402

    def __init__(self, clock: GuestClock, host: Host) -> None:
        self.clock = clock
        self.bus = Bus()
        self.console = Console()
        self.debug = Console()
        self.state = BoardState()
        self._host = host
        self._others: dict[str, Console] = {}
        self._a20: dict[str, bool] = {}
        self._posting: dict[int, bool] = {}
        self.pics = PicPair(host.intr)
        self.devices: dict[str, Device[Any]] = {}
        self._next_deadline: int | None = None
        self._deadlines: dict[Device[Any], int | None] = {}
        for slot in SLOTS:
            device = slot.build(self)
            self.devices[slot.name] = device
            for port, bank in slot.ports:
                self.bus.claim_ports(device, port, bank)
        self._timed = [d for d in self.devices.values() if type(d).deadline is not Device.deadline]
        for slot in SLOTS:
            if self.devices[slot.name] in self._timed:
                for port, bank in slot.ports:
                    device = self.devices[slot.name]
                    self.bus.watch_ports(device, port, bank, partial(self._rearm, device))

    # --- wiring

    def serial(self, name: str) -> Console:
        """The host's end of a serial port: com1 is the console."""
        return self.console if name == "com1" else self._others.setdefault(name, Console())

    def a20(self, source: str) -> Callable[[bool], None]:
        """Each source has its own A20 output; the board ORs them."""

        def drive(level: bool) -> None:
            self._a20[source] = level
            self._host.set_a20(any(self._a20.values()))

        return drive

    def posting(self, port: int) -> Line:
        """Tells the CPU whether writes of `port` may come late, when it changes."""

        def drive(level: bool) -> None:
            if self._posting.get(port, False) != level:
                self._posting[port] = level
                self._host.post_writes(port, level)

        return drive

    def request_reset(self) -> None:
        self.state.request = "reset"
        self._host.attention()

    def request_exit(self, status: int) -> None:
        self.state.request = "exit"
        self.state.exit_status = status & 0xFFFFFFFF
        self._host.attention()

    # --- time

    def next_deadline(self) -> int | None:
        """Guest ns of the earliest pending event."""
        earliest = None
        for device in self._timed:
            deadline = self._deadlines[device] = device.deadline()
            if deadline is not None and (earliest is None or deadline < earliest):
                earliest = deadline
        self._next_deadline = earliest
        return earliest

    def expire_due(self) -> None:
        """Let every event that is due happen, earliest first."""
        now = self.clock.now_ns()
        for _ in range(1000):  # a device whose deadline does not move on is at fault, not a reason to hang
            due = [(d, i) for i, t in enumerate(self._timed) if (d := t.deadline()) is not None and d <= now]
            if not due:
                return
            self._timed[min(due)[1]].expire()
        raise AssertionError("a device's deadline stays in the past")

    def _rearm(self, device: Device[Any]) -> None:
        """A timed device was accessed: the CPU may be running towards a deadline that is no longer the first."""
        if device.deadline() == self._deadlines.get(device):
            return
        before = self._next_deadline
        after = self.next_deadline()
        if after is not None and (before is None or after < before):
            self._host.attention()

    # --- whole state

    def unplug(self) -> None:
        """Another CPU will be on the other ends of the wires: what it was told is forgotten."""
        self._a20.clear()
        self._posting.clear()
        self.pics.unplug()

    def restored(self) -> None:
        self.pics.forget_wires()
        for device in self.devices.values():
            device.restored()

    def reset(self) -> None:
        self.state = BoardState()
        for device in self.devices.values():
            device.reset()
