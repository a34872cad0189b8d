"""The PCI bus, proved by a card that has all a function can have."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.devices.pci.card import VECTORS, Bridge, Card
from vmm.board.pci import PciBus
from vmm.bus import Bus, Window
from vmm.devices.pci.header import Field, Space
from vmm.testing import Rig, check_device
from vmm.wires import Configuration, Placement, wire

IO, MEMORY, MASTER, INTX_OFF = 1, 2, 4, 0x400
AT = 3 << 3
BARS, ROM, CAPABILITIES = 0x10, 0x30, 0x34
ADDRESS, DATA = 0xCF8, 0xCFC


class System:
    """A bridge at 0 and the card at device 3, on a bus."""

    def __init__(self) -> None:
        self.rig, self.bus = Rig(), Bus()
        self.pci = PciBus(self.bus)
        self.windows: dict[str, Window] = {}
        self.bridge: Any = self._made(Bridge)
        self.card: Any = self._made(Card)
        self.pci.put(0, self.bridge)
        self.windows |= self.pci.put(AT, self.card)
        for bank, port in (("address", ADDRESS), ("data", DATA)):
            self.bus.ports.window(self.bridge, bank).map(port)

    def _made(self, cls: type) -> Any:
        ours = {Placement: self._place, Configuration: self.pci}
        return wire(cls, lambda name, annotation: ours.get(annotation) or self.rig.wire({}, name, annotation))

    def _place(self, bank: str, base: int | None) -> None:
        window = self.windows[bank]
        if base is None:
            window.unmap()
        else:
            window.map(base)

    def read(self, register: int, size: int = 4, at: int = AT) -> int:
        self.bus.port_out(ADDRESS, 4, 1 << 31 | at << 8 | register & 0xFC)
        return self.bus.port_in(DATA + (register & 3), size)

    def write(self, register: int, value: int, size: int = 4, at: int = AT) -> None:
        self.bus.port_out(ADDRESS, 4, 1 << 31 | at << 8 | register & 0xFC)
        self.bus.port_out(DATA + (register & 3), size, value)

    def capability(self, id: int) -> int:
        at = self.read(CAPABILITIES, 1)
        while at:
            if self.read(at, 1) == id:
                return at
            at = self.read(at + 1, 1)
        raise AssertionError(f"no capability {id:#x}")

    def messages(self) -> list[tuple[int, int]]:
        events, self.rig.events = self.rig.events, []
        return [values for name, values in events if name == "msi"]


@pytest.fixture
def system() -> System:
    return System()


def test_any_guest():
    check_device(Card)


def test_the_header(system):
    assert system.read(0) == 0x5678_1234 and system.read(8) == 0xFF00_0002
    assert system.read(0x2C) == 0x1100_1AF4 and system.read(0x3C) == 0x100
    assert system.read(6, 2) == 0x10, "it has capabilities"
    assert system.read(0, at=0) == 0x1237_8086
    assert system.read(0, at=4 << 3) == system.read(0, at=1 << 8) == 0xFFFF_FFFF
    system.write(0, 0, at=4 << 3)


def test_the_mechanism(system):
    for size in (1, 2):
        system.bus.port_out(ADDRESS, size, 0xFF)
    assert system.bus.port_in(ADDRESS, 4) == 0, "four bytes, or not at all"
    system.bus.port_out(ADDRESS, 4, 0xFFFF_FFFF)
    assert system.bus.port_in(ADDRESS, 4) == 0x80FF_FFFC
    system.bus.port_out(ADDRESS, 4, AT << 8)
    assert system.bus.port_in(DATA, 4) == 0xFFFF_FFFF, "not enabled"
    assert system.read(1, 1) == 0x12 and system.read(2, 2) == 0x5678
    system.write(0x3C, 11, 1)
    system.write(0x3D, 7, 1)
    assert system.read(0x3C) == 0x10B


def test_bars_say_their_size(system):
    for index in range(6):
        system.write(BARS + 4 * index, 0xFFFF_FFFF)
    assert [system.read(BARS + 4 * i) for i in range(6)] == [
        0xFFFF_FF00, 0xFFFF_F000, 0xFFFF_FFE1, 0, 0x0000_000C, 0xFFFF_FFFF,
    ]  # fmt: skip
    system.write(ROM, 0xFFFF_FFFE)
    assert system.read(ROM) == 0xFFFF_F800


def expected(system: System, register: int) -> int | None:
    """Where the scratch register is seen by way of a BAR, worked out from what the guest wrote."""
    command, low = system.read(4, 2), system.read(BARS + 4 * register)
    match register:
        case 0:
            base = low & 0xFFFF_FF00
            return base if command & MEMORY and base and base + 0x100 < 1 << 32 else None
        case 2:
            base = low & 0xFFFF_FFE0
            return base + 0x10 if command & IO and base and base + 0x20 < 1 << 16 else None
        case _:
            base = system.read(BARS + 20) << 32
            return base + 0x8000_0000 if command & MEMORY and base and base + (1 << 32) < 1 << 64 else None


WRITES = st.lists(
    st.tuples(
        st.sampled_from([0x04, *range(BARS, BARS + 24)]),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([0, 3, 7, 0x1000, 0xC0, 0xFFFF_FFFF, 0xFEBF_1000, 0x8000_0001]) | st.integers(0, (1 << 32) - 1),
    ),
    max_size=12,
)


@given(WRITES)
def test_bars_are_where_they_were_put(writes):
    """However they were put there: what is seen follows from what is in the registers."""
    system = System()
    for register, size, value in writes:
        if register & 3 <= 4 - size:
            system.write(register, value & (1 << 8 * size) - 1, size)
    system.card.state.scratch = 0x5CA7_C4AB
    for register, bank in ((0, "registers"), (2, "ports"), (4, "wide")):
        base = expected(system, register)
        assert system.windows[bank].base == base
        if base is not None and bank == "registers" and system.bus.memory.top(base) is system.windows[bank]:
            assert system.bus.mmio_read(base, 4) == 0x5CA7_C4AB
    again = System()
    again.card.state = system.card.state
    again.card.restored()
    assert {b: w.base for b, w in again.windows.items()} == {b: w.base for b, w in system.windows.items()}


def test_an_address_of_64_bits(system):
    system.write(4, MEMORY, 2)
    system.write(BARS + 20, 0x12)
    assert system.windows["wide"].base == 0x12_8000_0000
    system.card.state.scratch = 7
    assert system.bus.mmio_read(0x12_8000_0000, 4) == 7


def test_banks_share_a_bar(system):
    system.write(BARS + 4, 0xFEBF_0000)
    system.write(4, MEMORY, 2)
    assert system.bus.mmio_read(0xFEBF_000C, 4) == 1, "a vector is masked at first"
    assert system.bus.mmio_read(0xFEBF_0800, 8) == 0, "nothing is pending"
    assert system.bus.mmio_read(0xFEBF_07FC, 4) == 0, "the table's end: the pending bits are behind it"


def test_the_rom(system):
    system.write(4, MEMORY, 2)
    system.write(ROM, 0xFEB0_0000)
    assert system.bus.mmio_read(0xFEB0_0000, 2) == 0xFFFF
    system.write(ROM, 0xFEB0_0001)
    assert system.bus.mmio_read(0xFEB0_0000, 2) == 0xAA55


def test_only_a_master_has_dma(system):
    system.write(BARS, 0xFEBF_1000)
    system.write(4, MEMORY, 2)
    for register, value in ((0, 0x1234_5678), (4, 0x100), (8, 0)):
        system.bus.mmio_write(0xFEBF_1000 + register, 4, value)
    assert system.bus.mmio_read(0xFEBF_1008, 4) == 0xDEAD_DEAD and not any(system.rig.ram)
    system.write(4, MEMORY | MASTER, 2)
    system.bus.mmio_write(0xFEBF_1000, 4, 0x1234_5678)
    system.bus.mmio_write(0xFEBF_1008, 4, 0)
    assert system.rig.ram[0x100:0x104] == bytes.fromhex("78563412")
    assert system.bus.mmio_read(0xFEBF_1008, 4) == 0x1234_5678


def test_its_line(system):
    system.card.interrupt(True)
    assert system.rig.lines["intx"] and system.read(6, 2) & 8
    system.write(4, INTX_OFF, 2)
    assert not system.rig.lines["intx"] and system.read(6, 2) & 8, "it is asked for, and not driven"
    system.write(4, 0, 2)
    assert system.rig.lines["intx"]
    system.write(system.capability(0x05) + 2, 1, 2)
    assert not system.rig.lines["intx"], "messages take its place"


def test_msi(system):
    at = system.capability(0x05)
    assert system.read(at + 2, 2) == 0x0184, "four vectors, 64 bits, masks"
    system.write(at + 16, 0xFFFF_FFFF)
    assert system.read(at + 16) == 0xF, "a mask for each of them"
    system.write(at + 16, 0)
    system.write(4, MASTER, 2)
    system.write(at + 4, 0xFEE0_1003)
    system.write(at + 8, 0)
    system.write(at + 12, 0x4043, 2)
    system.write(at + 2, 0x71, 2)
    assert system.read(at + 2, 2) == 0x01A5, "no more vectors than it has"
    system.card.vector(2)
    assert system.messages() == [(0xFEE0_1000, 0x4042)]
    system.write(at + 16, 4)
    system.card.vector(2)
    system.card.vector(2)
    assert system.messages() == [] and system.read(at + 20) == 4
    system.write(at + 16, 0)
    assert system.messages() == [(0xFEE0_1000, 0x4042)] and system.read(at + 20) == 0
    system.write(4, 0, 2)
    system.card.vector(2)
    assert system.messages() == [], "it may not write memory"


def test_msix(system):
    at = system.capability(0x11)
    assert system.read(at + 2, 2) == VECTORS - 1 and system.read(at + 4) == 1 and system.read(at + 8) == 0x801
    system.write(BARS + 4, 0xFEBF_0000)
    system.write(4, MEMORY | MASTER, 2)
    entry = 0xFEBF_0010
    system.bus.mmio_write(entry, 8, 0xFEE0_2000)
    system.bus.mmio_write(entry + 8, 4, 0x51)
    system.bus.mmio_write(entry + 4, 4, 1)
    system.bus.mmio_write(entry, 4, 0xFEE0_1003)
    assert system.bus.mmio_read(entry, 8) == 1 << 32 | 0xFEE0_1000, "aligned, and each half is its own"
    system.bus.mmio_write(entry + 4, 4, 0)
    system.bus.mmio_write(entry, 4, 0xFEE0_2000)
    assert system.bus.mmio_read(entry, 8) == 0xFEE0_2000 and system.bus.mmio_read(entry + 8, 8) == 1 << 32 | 0x51
    system.write(at + 2, 0xC000, 2)
    system.card.vector(1)
    system.bus.mmio_write(entry + 12, 4, 0)
    assert system.messages() == [] and system.bus.mmio_read(0xFEBF_0800, 4) == 2
    system.bus.mmio_write(0xFEBF_0800, 4, 0)
    assert system.bus.mmio_read(0xFEBF_0800, 4) == 2, "pending bits are not the guest's"
    system.write(at + 2, 0x8000, 2)
    assert system.messages() == [(0xFEE0_2000, 0x51)] and system.bus.mmio_read(0xFEBF_0800, 4) == 0
    system.card.vector(1)
    system.card.vector(200)
    assert system.messages() == [(0xFEE0_2000, 0x51)]


def test_a_reset_of_the_function_alone(system):
    system.write(BARS, 0xFEBF_1000)
    system.write(4, MEMORY | MASTER, 2)
    system.card.interrupt(True)
    at = system.capability(0x13)
    assert system.read(at + 2, 2) == 0x0306
    system.write(at + 4, 1, 1)
    assert system.windows["registers"].base is None and not system.rig.lines["intx"]
    assert system.read(BARS) == 0 and system.read(4, 2) == 0 and system.read(at + 4, 1) == 0


def test_two_fields_at_one_byte():
    with pytest.raises(ValueError, match="two fields at 0x3e"):
        Space.of([Field.fixed(0x3C, 4, 0), Field.fixed(0x3E, 1, 0)])
