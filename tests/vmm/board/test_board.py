"""The board: alarms, DMA, and that it drives nothing before a CPU is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot.field_types import Range
from tests.vmm.devices.pci.card import Card
from vmm.board import isapc, kinds
from vmm.board.alarms import Alarms
from vmm.board.board import Board, BoardState
from vmm.board.config import RESERVED, DeviceConfig, MachineConfig, named
from vmm.board.dma import RamDma
from vmm.board.isapc import CHIPS
from vmm.board.kinds import OURS, Kind
from vmm.board.slot import Slot
from vmm.clock import GuestClock
from vmm.device import Device
from vmm.devices.isa.debugcon import Debugcon
from vmm.devices.isa.pit import Pit
from vmm.errors import BackendError, RequestError
from vmm.ram import Ram
from vmm.registers import reads, span
from vmm.saving.parts import parts_of
from vmm.wires import Alarm

WHENS = st.none() | st.integers(0, 50)
PUSHES = st.lists(st.tuples(st.integers(0, 3), WHENS), max_size=40)


class Sleeper:
    """Expires once, and sleeps on."""

    def __init__(self, alarms: Alarms, told: list[int], number: int) -> None:
        self.alarm, self.told, self.number = alarms.alarm(), told, number
        alarms.belongs(self)  # type: ignore[arg-type]

    def expire(self) -> None:
        self.told.append(self.number)
        self.alarm(None)


@given(PUSHES, st.integers(0, 50))
def test_alarms_are_the_earliest_of_what_was_pushed(pushes, now):
    kicks: list[int | None] = []
    told: list[int] = []
    alarms = Alarms(lambda: kicks.append(alarms.next_ns))
    sleepers = [Sleeper(alarms, told, number) for number in range(4)]
    due: dict[int, int | None] = dict.fromkeys(range(4))
    for number, when in pushes:
        before = min((each for each in due.values() if each is not None), default=None)
        kicked = len(kicks)
        sleepers[number].alarm(when)
        due[number] = when
        after = min((each for each in due.values() if each is not None), default=None)
        assert alarms.next_ns == after
        earlier = after is not None and (before is None or after < before)
        assert len(kicks) == kicked + earlier, "a CPU is kicked when something comes before what it runs towards"
    alarms.expire_due(now)
    served = [(when, number) for number, when in due.items() if when is not None and when <= now]
    assert told == [number for _, number in sorted(served)], "earliest first, then in the order of the board"
    assert alarms.next_ns is None or alarms.next_ns > now


def test_a_deadline_that_does_not_move_on_is_found():
    alarms = Alarms(lambda: None)
    stuck = Sleeper(alarms, [], 0)
    stuck.expire = lambda: None  # type: ignore[method-assign]
    stuck.alarm(1)
    with pytest.raises(AssertionError, match="stays in the past"):
        alarms.expire_due(2)


def test_dma_is_ram_and_nothing_else():
    ram, dropped, allowed = Ram.fresh(1 << 16), [], [True]
    dma = RamDma(lambda: ram, lambda start, end: dropped.append((start, end)), lambda: allowed[0])
    assert dma.write(0x100, b"abc") and dropped == [(0x100, 0x103)]
    view = dma.view(0x100, 3)
    assert view is not None and bytes(view) == b"abc" and view.readonly
    for address, size in ((0xFFFF, 2), (1 << 40, 1), (-1, 2), (0, -1)):
        assert dma.view(address, size) is None
    assert not dma.write(0xFFFE, b"abc") and len(dropped) == 1
    allowed[0] = False
    assert dma.view(0x100, 3) is None and not dma.write(0x100, b"x"), "it may not master the bus"
    assert RamDma(lambda: None, lambda start, end: None).view(0, 1) is None
    ram.close()


class Pins:
    """A CPU's, noting what is driven."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.seen.append((name, *values))


def test_another_cpu_is_told_all_there_is():
    board = Board(MachineConfig(memory_bytes=1 << 20), GuestClock(1_000_000))
    first, second = Pins(), Pins()
    board.attach([first], None)
    board.power_on()
    for port, value in ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0)):
        board.bus.port_out(port, 1, value)
    board.bus.port_out(0x3FC, 1, 0x08)
    board.bus.port_out(0x3F9, 1, 0x02)
    assert ("intr", True) in first.seen and ("defer_writes", 0x3F8, False) in first.seen
    count = len(first.seen)
    board.attach([second], None)
    board.restored()
    assert ("intr", True) in second.seen and ("set_a20", True) in second.seen and len(first.seen) == count
    assert ("defer_writes", 0x2F8, True) in second.seen and ("defer_writes", 0x3F8, True) not in second.seen


def test_names_of_parts_are_kept_from_devices():
    names = [part.name for part in parts_of(MachineConfig())]
    chips = [slot.id for slot in CHIPS]
    assert names[-len(chips) :] == chips and len(set(names)) == len(names)
    assert all(name in RESERVED or "." in name for name in names[: -len(chips)])


class Greedy(Device[Any]):
    State = Pit.State

    def __init__(self, first: Alarm, second: Alarm) -> None:
        super().__init__()


def test_a_device_has_one_alarm(monkeypatch):
    monkeypatch.setattr(isapc, "CHIPS", (*CHIPS, Slot("greedy", Greedy)))
    with pytest.raises(TypeError, match="a device has one alarm"):
        Board(MachineConfig(), GuestClock(1_000_000))


def test_what_cannot_be_declared():
    with pytest.raises(TypeError, match="two methods for the same register"):

        class Twice(Device[Any]):
            @reads(0)
            def one(self) -> int:
                return 1

            @reads(0)
            def two(self) -> int:
                return 2

    for start, count, step in ((0, 0, 1), (0, 1, 0), (-1, 1, 1)):
        with pytest.raises(ValueError, match="no family"):
            span(start, count, step)


@dataclass(frozen=True, kw_only=True)
class Unused:
    colour: Annotated[int, Range(0, 3), "of nothing"] = 0


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Kind("x", Pit), "no option says which interrupt 'irq0' is"),
        (Kind("x", Debugcon, Unused), "takes no 'colour', which is an option"),
        (Kind("x", Debugcon, banks={"other": 0}), "has no bank 'other'"),
        (Kind("x", Device), "has no State"),
    ],
)
def test_a_kind_that_does_not_fit_together(kind, why):
    assert why in (kind.wrong() or "")
    assert all(ours.wrong() is None for ours in OURS)


class Silent(Device[BoardState]):
    State = BoardState


class Spoken(Silent):
    """Of itself."""


@pytest.mark.parametrize(
    ("device", "doc"),
    [(Silent, "What the guest asked of the board and has not been done yet."), (Spoken, "Of itself.")],
)
def test_what_a_kind_says_of_itself(device, doc):
    assert Kind("x", device).doc == doc


class Unmade(Debugcon):
    def __init__(self) -> None:
        pass


class Raises(Debugcon):
    def __init__(self) -> None:
        raise ValueError("no such colour")


class NoAlarm(Debugcon):
    def __init__(self) -> None:
        super().__init__(lambda byte: None, 0)

    def deadline(self) -> int | None:
        return 1


class Unwired(Debugcon):
    def __init__(self, speed: int) -> None:
        super().__init__(lambda byte: None, speed)


class Deaf(Debugcon):
    @reads(1)
    def read_more(self, value: int) -> int:
        return value


@pytest.mark.parametrize(
    ("device", "why"),
    [
        (Unmade, r"TypeError: Unmade.__init__ \(test_board.py:\d+\) is to call super\(\).__init__\(\) .*"),
        (Raises, "ValueError: no such colour"),
        (NoAlarm, "TypeError: NoAlarm has deadlines, and no Alarm to tell them to"),
        (Unwired, "TypeError: Unwired: nothing is wired to 'speed'"),
        (Deaf, r"device theirs: .*: Deaf.read_more \(test_board.py:\d+\) is to take \(self\): it answers a read"),
    ],
)
def test_a_device_of_another_package_that_cannot_be_made(monkeypatch, device, why):
    """One line, which the command line shows as such."""
    monkeypatch.setitem(globals(), "KIND", Kind("theirs", device))
    monkeypatch.setattr(kinds, "_theirs", lambda: {"theirs": EntryPoint("theirs", f"{__name__}:KIND", kinds.GROUP)})
    kinds.kind.cache_clear()
    config = MachineConfig(devices=named([DeviceConfig.parse("theirs,port=0x300")]))
    with pytest.raises(BackendError, match=f"^device theirs0: {why}$"):
        Board(config, GuestClock(1_000_000))
    kinds.kind.cache_clear()


@pytest.mark.parametrize(
    ("board", "spec", "why"),
    [
        ("pc", "uart,port=0x400,irq=5", "biosdebug lies at port=0x402"),
        ("pc", "uart,port=0xcf2,irq=5", "piix3 lies at port=0xcf9"),
        ("pc", "uart,port=0x63f,irq=5", "pm lies at port=0x63f"),
        ("isapc", "uart,port=0xcf8,irq=5", "reset lies at port=0xcf8"),
    ],
)
def test_where_a_device_is_in_the_way(board, spec, why):
    config = MachineConfig(board=board, devices=named([DeviceConfig.parse(spec)]))
    with pytest.raises(RequestError, match=f"^device uart0: {why}$"):
        Board(config, GuestClock(1_000_000))


@pytest.mark.parametrize(
    ("places", "why"),
    [
        (["slot=1"], "device card0: piix3 lies at slot=1.0"),
        (["slot=3", "slot=3.0"], "device card1: card0 lies at slot=3.0"),
        (["slot=3.1"], "device card0: slot=3.0 is empty: no guest looks further"),
        (["slot=32"], "device card0: slot=32: it is put at slot=DEVICE.*"),
        (["slot=3.8"], "device card0: slot=3.8: it is put at slot=DEVICE.*"),
        (["port=0x300"], "device card0: port=0x300: it is put at slot=DEVICE.*"),
        ([""] * 31, "device card30: no PCI slot is free"),
    ],
)
def test_slots_that_cannot_be(cards, places, why):
    with pytest.raises(RequestError, match=f"^{why}$"):
        Board(cards(places), GuestClock(1_000_000))


def test_slots(cards):
    """The first that are free, and several functions of one device."""
    board = Board(cards(["", "slot=5", "slot=5.2", ""]), GuestClock(1_000_000))
    found = {slot.id: slot.function for slot in board.slots if slot.id.startswith("card")}
    assert found == {"card0": 2 << 3, "card1": 5 << 3, "card2": 5 << 3 | 2, "card3": 3 << 3}
    for at, many in ((0, 0), (1 << 3, 0x80), (2 << 3, 0), (5 << 3, 0x80), (5 << 3 | 2, 0)):
        assert board.pci.read(at, 0x0E, 1) == many
    assert board.pci.read(9 << 3, 0, 4) == 0xFFFF_FFFF


def test_lines_of_slots_are_shared_and_turned(cards):
    """Slots 2 and 6 have the same lines, 3 the next one."""
    board = Board(cards(["slot=2", "slot=6", "slot=3"]), GuestClock(1_000_000))
    board.restored()
    devices: dict[str, Any] = dict(board.devices)
    piix3 = devices["piix3"]
    for id, levels in (("card0", 0b0010), ("card1", 0b0010), ("card2", 0b0110)):
        devices[id].interrupt(True)
        assert piix3.state.levels == levels
    devices["card0"].interrupt(False)
    assert piix3.state.levels == 0b0110, "the other one still holds it"


def test_no_pci_no_slot(cards):
    config = replace(cards(["slot=3"]), board="isapc")
    with pytest.raises(RequestError, match=r"^device card0: this board has no PCI: --board pc has$"):
        Board(config, GuestClock(1_000_000))


@pytest.fixture
def cards(monkeypatch):
    monkeypatch.setattr(kinds, "OURS", (*kinds.OURS, Kind("card", Card, space="pci")))
    kinds.kind.cache_clear()

    def config(places):
        devices = named([DeviceConfig(id="", kind="card", place=place) for place in places])
        return MachineConfig(board="pc", devices=devices)

    yield config
    kinds.kind.cache_clear()
