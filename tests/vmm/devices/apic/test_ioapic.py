"""The 82093AA: what its datasheet says of edges, levels and masks."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.bus import Bus
from vmm.devices.apic.ioapic import PINS, IoApic
from vmm.testing import Rig, check_device
from vmm.testing.rig import wiring

LOGICAL, LEVEL, MASKED, REMOTE_IRR = 1 << 11, 1 << 15, 1 << 16, 1 << 14


class Chip:
    def __init__(self) -> None:
        self.rig = Rig()
        self.device: Any = wiring(IoApic)(self.rig)
        self.bus = Bus()
        self.bus.memory.window(self.device, width=4).map(0)

    def __getitem__(self, register: int) -> int:
        self.bus.mmio_write(0, 4, register)
        return self.bus.mmio_read(0x10, 4)

    def __setitem__(self, register: int, value: int) -> None:
        self.bus.mmio_write(0, 4, register)
        self.bus.mmio_write(0x10, 4, value)

    def route(self, pin: int, low: int, destination: int = 0) -> None:
        self[0x11 + 2 * pin] = destination << 24
        self[0x10 + 2 * pin] = low

    def sent(self) -> list[tuple[int, ...]]:
        events, self.rig.events = self.rig.events, []
        return [values[:5] for name, values in events if name == "send"]

    def pulse(self, pin: int) -> None:
        self.device.set_line(pin, True)
        self.device.set_line(pin, False)


@pytest.fixture
def chip() -> Chip:
    return Chip()


def test_any_guest():
    check_device(IoApic)


def test_registers(chip):
    assert chip[1] == 0x0017_0011
    chip[0] = 0xFFFF_FFFF
    assert chip[0] == chip[2] == 0x0F00_0000
    for pin in range(PINS):
        assert (chip[0x10 + 2 * pin], chip[0x11 + 2 * pin]) == (MASKED, 0)
        chip.route(pin, 0xFFFF_FFFF, 0xAB)
        assert (chip[0x10 + 2 * pin], chip[0x11 + 2 * pin]) == (0x1_AFFF, 0xAB00_0000)
    assert chip[0x10 + 2 * PINS] == chip[0x0F] == 0


def test_an_edge_is_sent_when_it_rises(chip):
    chip.route(4, 0x41 | LOGICAL | 1 << 8, 3)
    chip.pulse(4)
    assert chip.sent() == [(3, True, 1, 0x41, False)]
    chip.device.set_line(4, True)
    chip.device.set_line(4, True)
    assert len(chip.sent()) == 1


def test_an_edge_that_comes_while_masked_is_lost(chip):
    chip.route(4, 0x41 | MASKED)
    chip.device.set_line(4, True)
    chip.route(4, 0x41)
    assert chip.sent() == []


def test_a_level_is_sent_once_until_its_eoi(chip):
    chip.route(10, 0x51 | LEVEL)
    chip.device.set_line(10, True)
    chip.pulse(10)
    chip.device.set_line(10, True)
    assert chip.sent() == [(0, False, 0, 0x51, True)] and chip[0x10 + 20] & REMOTE_IRR
    chip.device.end_of_interrupt(0x52)
    assert chip.sent() == []
    chip.device.end_of_interrupt(0x51)
    assert len(chip.sent()) == 1, "it is still asserted"
    chip.device.set_line(10, False)
    chip.device.end_of_interrupt(0x51)
    assert chip.sent() == [] and not chip[0x10 + 20] & REMOTE_IRR


def test_a_level_waits_while_masked(chip):
    chip.route(10, 0x51 | LEVEL | MASKED)
    chip.device.set_line(10, True)
    assert chip.sent() == []
    chip.route(10, 0x51 | LEVEL)
    assert len(chip.sent()) == 1


def test_remote_irr_is_not_the_guests_but_for_the_way_around(chip):
    """Linux ends a level on old chips by an entry that is an edge for a moment."""
    chip.route(10, 0x51 | LEVEL)
    chip.device.set_line(10, True)
    chip[0x10 + 20] = 0x51 | LEVEL
    assert chip[0x10 + 20] & REMOTE_IRR and len(chip.sent()) == 1
    chip[0x10 + 20] = 0x51 | MASKED
    assert not chip[0x10 + 20] & REMOTE_IRR
    chip[0x10 + 20] = 0x51 | LEVEL
    assert len(chip.sent()) == 1


@pytest.mark.parametrize(("mode", "is_sent"), [(0, 1), (1, 1), (2, 0), (4, 1), (5, 1), (7, 0)])
def test_modes(chip, mode, is_sent):
    chip.route(4, 0x41 | mode << 8)
    chip.pulse(4)
    assert len(chip.sent()) == is_sent


def test_reset_leaves_the_lines(chip):
    chip.route(10, 0x51 | LEVEL)
    chip.device.set_line(10, True)
    chip.device.reset()
    assert chip[0x10 + 20] == MASKED
    chip.sent()
    chip.route(10, 0x51 | LEVEL)
    assert len(chip.sent()) == 1


def test_a_pin_that_is_not_there(chip):
    chip.device.set_line(31, True)
    assert chip.sent() == [] and chip.device.state.lines == 0
