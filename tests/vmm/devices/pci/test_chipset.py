"""The chips of a PC with PCI: 440FX, PIIX3, PIIX4's power management."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.bus import Bus
from vmm.devices.pci.i440fx import I440fx
from vmm.devices.pci.piix3 import PIRQS, ROUTABLE, Piix3
from vmm.devices.pci.piix4_pm import HZ, Piix4Pm
from vmm.testing import Rig, check_device
from vmm.testing.rig import wiring

PMSTS, PMEN, PMCNTRL, PMTMR = 0, 2, 4, 8
TMROF, PWRBTN, SCI_EN = 0x001, 0x100, 1


class Chip:
    def __init__(self, cls: type) -> None:
        self.rig = Rig()
        self.device: Any = wiring(cls)(self.rig)
        self.device.restored()
        self.bus = Bus()

    def __getitem__(self, offset: int) -> int:
        return int(self.device.read_config(offset, 1))

    def __setitem__(self, offset: int, value: int) -> None:
        self.device.write_config(offset, 1, value)

    def high(self) -> set[str]:
        return {name for name, level in self.rig.lines.items() if level}


@pytest.mark.parametrize("cls", [I440fx, Piix3, Piix4Pm])
def test_any_guest(cls):
    check_device(cls)


@pytest.mark.parametrize(
    ("cls", "id", "class_and_revision", "header"),
    [
        (I440fx, 0x1237_8086, 0x0600_0002, 0),
        (Piix3, 0x7000_8086, 0x0601_0000, 0),
        (Piix4Pm, 0x7113_8086, 0x0680_0003, 0),
    ],
)
def test_who_they_are(cls, id, class_and_revision, header):
    device = Chip(cls).device
    assert device.read_config(0, 4) == id and device.read_config(8, 4) == class_and_revision
    assert device.read_config(0x0E, 1) == header and device.read_config(0x2C, 4) == 0x1100_1AF4


SPACES = {  # rows of 16 bytes: what they are at reset, and which bits a guest can write
    I440fx: {
        0x00: "86 80 37 12 06 00 80 02 02 00 00 06 00 00 00 00 | 00 00 00 00 40 01 00 00 00 00 00 00 ff 00 00 00",
        0x20: "00 00 00 00 00 00 00 00 00 00 00 00 f4 1a 00 11 | 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00",
        0x30: "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 | 00 00 00 00 00 00 00 00 00 00 00 00 ff 00 00 00",
        0x50: "00 01 00 80 00 00 00 01 10 00 00 00 00 00 00 00 | ff ff ff c8 ff ff ff ff ff 30 33 33 33 33 33 33",
        0x60: "01 01 01 01 01 01 01 01 00 00 00 00 00 00 00 00 | ff ff ff ff ff ff ff ff c0 00 00 00 00 00 00 00",
        0x70: "10 00 02 00 00 00 00 00 00 00 00 00 00 00 00 00 | f0 ff 38 00 00 00 00 00 00 00 00 00 00 00 00 00",
        0x90: "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 | ff 00 00 0d 00 00 00 00 00 00 00 00 00 00 00 00",
    },
    Piix3: {
        0x00: "86 80 00 70 07 00 00 02 00 00 01 06 00 00 00 00 | 00 00 00 00 08 01 00 00 00 00 00 00 ff 00 00 00",
        0x20: "00 00 00 00 00 00 00 00 00 00 00 00 f4 1a 00 11 | 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00",
        0x30: "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 | 00 00 00 00 00 00 00 00 00 00 00 00 ff 00 00 00",
        0x40: "00 00 00 00 00 00 00 00 00 00 00 00 4d 00 03 00 | 00 00 00 00 00 00 00 00 00 00 00 00 7f 00 ff 01",
        0x60: "80 80 80 80 00 00 00 00 00 02 00 00 00 00 00 00 | 8f 8f 8f 8f 00 00 00 00 00 fe 90 00 00 00 00 00",
        0x70: "80 00 00 00 00 00 0c 0c 02 00 00 00 00 00 00 00 | ef 00 00 00 00 00 ff ff 03 ff 00 00 00 00 00 00",
        0x80: "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 | 7f 00 0f 00 00 00 00 00 00 00 00 00 00 00 00 00",
        0xA0: "08 00 00 00 00 00 00 00 0f 00 00 00 00 00 00 00 | 1f 00 ff 01 ff ff ff ff ff 00 ff 01 ff 00 ff 00",
    },
    Piix4Pm: {
        0x00: "86 80 13 71 00 00 80 02 03 00 80 06 00 00 00 00 | 00 00 00 00 01 00 00 00 00 00 00 00 ff 00 00 00",
        0x20: "00 00 00 00 00 00 00 00 00 00 00 00 f4 1a 00 11 | 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00",
        0x30: "00 00 00 00 00 00 00 00 00 00 00 00 00 01 00 00 | 00 00 00 00 00 00 00 00 00 00 00 00 ff 00 00 00",
        0x40: "01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 | c0 ff 00 00 ff ff ff ff ff ff ff ff ff ff ff ff",
        0x50: "00 00 00 00 00 00 00 00 00 00 00 02 00 00 00 00 | ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff",
        0x60: "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 | ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff",
        0x70: "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 | ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff",
        0x80: "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 | 01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00",
    },
}


@pytest.mark.parametrize("cls", SPACES)
def test_what_is_in_configuration_space(cls):
    """A second writing of the datasheets' register tables (290549-001, 3.2; 290550-002, 2.1; 290562-001, 7.1)."""
    for at in range(0, 256, 16):
        first, writable = SPACES[cls].get(at, f"{bytes(16).hex()} | {bytes(16).hex()}").split("|")
        assert bytes(Chip(cls)[at + i] for i in range(16)) == bytes.fromhex(first)
        found = bytearray()
        for offset in range(at, at + 16):
            ones, zeros = Chip(cls), Chip(cls)
            ones[offset], zeros[offset] = 0xFF, 0
            found.append(ones[offset] & ~zeros[offset])
        assert found == bytes.fromhex(writable), hex(at)


# --- 440FX


def test_shadow_ram_is_a_register_of_attributes():
    chip = Chip(I440fx)
    for offset in range(0x59, 0x60):
        chip[offset] = 0xFF
        assert chip[offset] == (0x30 if offset == 0x59 else 0x33)


def test_smram_is_locked_until_reset():
    chip = Chip(I440fx)
    assert chip[0x72] == 0x02
    chip[0x72] = 0x7A
    assert chip[0x72] == 0x3A, "D_LCK closes it"
    chip[0x72] = 0x00
    assert chip[0x72] == 0x3A
    chip.device.reset()
    assert chip[0x72] == 0x02


# --- PIIX3


@given(
    st.lists(
        st.tuples(st.integers(0, PIRQS - 1), st.booleans() | st.sampled_from(ROUTABLE) | st.integers(0, 255)),
        max_size=20,
    )
)
def test_each_pirq_is_the_interrupt_its_route_says(steps):
    chip = Chip(Piix3)
    routes, levels = [0x80] * PIRQS, [False] * PIRQS
    for pirq, step in steps:
        if isinstance(step, bool):
            levels[pirq] = step
            chip.device.set_pirq(pirq, step)
        else:
            routes[pirq] = chip[0x60 + pirq] = step & 0x8F
            assert chip[0x60 + pirq] == step & 0x8F
        expected = {f"irqs {routes[i]}" for i in range(PIRQS) if levels[i] and routes[i] in ROUTABLE}
        assert chip.high() == expected


def test_reset_control_acts_when_it_rises():
    chip = Chip(Piix3)
    chip.bus.ports.window(chip.device, "reset").map(0xCF9)
    for value, resets in ((0x02, 0), (0x06, 1), (0x06, 1), (0x02, 1), (0x04, 2)):
        chip.bus.port_out(0xCF9, 1, value)
        assert len(chip.rig.events) == resets and chip.bus.port_in(0xCF9, 1) == value


# --- PIIX4


@pytest.fixture
def pm() -> Chip:
    chip = Chip(Piix4Pm)
    chip.bus.ports.window(chip.device, "pm", width=2).map(0x600)
    chip.bus.ports.window(chip.device, "apm").map(0xB2)
    return chip


def put(pm: Chip, register: int, value: int) -> None:
    pm.bus.port_out(0x600 + register, 2, value)


def get(pm: Chip, register: int) -> int:
    return pm.bus.port_in(0x600 + register, 2)


def test_its_ports_are_where_pmbase_says(pm):
    assert pm.device.read_config(0x40, 4) == 1
    pm.device.write_config(0x40, 4, 0xFFFF_FFFF)
    assert pm.device.read_config(0x40, 4) == 0xFFC1 and "place of pm" not in pm.high()
    pm.device.write_config(0x40, 4, 0x1_0601)
    pm[0x80] = 0xFF
    assert pm[0x80] == 1 and pm.rig.lines["place of pm"] == 0x600
    pm.device.write_config(0x40, 4, 0x801)
    assert pm.rig.lines["place of pm"] == 0x800, "they move at once"
    pm[0x80] = 0
    assert pm.rig.lines["place of pm"] is False


@given(st.integers(0, 1 << 50))
def test_the_timer_is_guest_time(ns):
    chip = Chip(Piix4Pm)
    chip.bus.ports.window(chip.device, "pm", width=2).map(0x600)
    chip.rig.now = ns
    ticks = ns * HZ // 10**9 & 0xFF_FFFF
    assert chip.bus.port_in(0x608, 4) == ticks
    assert [chip.bus.port_in(0x608 + i, 1) for i in range(4)] == list(ticks.to_bytes(4, "little"))


def test_the_timer_interrupts_when_its_top_bit_changes(pm):
    put(pm, PMEN, TMROF)
    put(pm, PMCNTRL, SCI_EN)
    first = -(-(1 << 23) * 10**9 // HZ)
    assert pm.device.deadline() == first == pm.rig.alarm_ns
    pm.rig.now = first - 1
    assert not get(pm, PMSTS) & TMROF
    pm.rig.now = first
    pm.device.expire()
    assert pm.high() == {"sci"} and pm.bus.port_in(0x608, 4) == 1 << 23
    put(pm, PMSTS, TMROF)
    assert not pm.high() and pm.device.deadline() == -(-(1 << 24) * 10**9 // HZ)


def test_the_status_is_set_without_an_interrupt(pm):
    pm.rig.now = 10**10
    assert get(pm, PMSTS) == TMROF and pm.device.deadline() is None and not pm.high()


def test_the_power_button(pm):
    put(pm, PMCNTRL, SCI_EN)
    pm.device.press_power_button()
    assert get(pm, PMSTS) == PWRBTN and not pm.high()
    put(pm, PMEN, PWRBTN)
    assert pm.high() == {"sci"}
    put(pm, PMSTS, TMROF)
    assert pm.high() == {"sci"}, "another bit"
    put(pm, PMSTS, PWRBTN)
    assert not pm.high()


def test_acpi_is_turned_on_by_the_apm_port(pm):
    pm.device.press_power_button()
    put(pm, PMEN, PWRBTN)
    pm.bus.port_out(0xB2, 1, 0xF1)
    assert get(pm, PMCNTRL) & SCI_EN and pm.high() == {"sci"}
    pm.bus.port_out(0xB2, 1, 0xF0)
    assert not get(pm, PMCNTRL) & SCI_EN and not pm.high()
    pm.bus.port_out(0xB3, 1, 0x5A)
    assert (pm.bus.port_in(0xB2, 1), pm.bus.port_in(0xB3, 1)) == (0xF0, 0x5A)


@pytest.mark.parametrize(("typ", "ends"), [(0, True), (1, False), (5, False)])
def test_soft_off(pm, typ, ends):
    put(pm, PMCNTRL, typ << 10 | SCI_EN)
    assert not pm.rig.events
    put(pm, PMCNTRL, typ << 10 | SCI_EN | 0x2000)
    assert pm.rig.events == ([("off", (0,))] if ends else [])
    assert get(pm, PMCNTRL) == typ << 10 | SCI_EN


def test_both_halves_of_four_bytes(pm):
    pm.bus.port_out(0x600, 4, PWRBTN << 16)
    assert get(pm, PMEN) == PWRBTN and pm.bus.port_in(0x600, 4) == PWRBTN << 16
