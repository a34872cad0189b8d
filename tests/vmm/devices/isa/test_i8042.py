"""The keyboard controller with its keyboard and mouse, against the IBM PS/2 reference and Linux's drivers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot.field_types import BoolType, BytesType, IntType, OptionalType, Type
from snapshot.schema import StructType, encode, schema_of
from snapshot.versions import decode
from vmm.bus import Bus
from vmm.devices.isa.i8042 import I8042, I8042State
from vmm.devices.isa.ps2 import SET_2_TO_1
from vmm.wires import Line

OBF, SYS, A2, NOT_INHIBITED, AUX_OBF = 0x01, 0x04, 0x08, 0x10, 0x20
ACK = 0xFA


class Rig:
    """A controller on a bus, and everything that left it."""

    def __init__(self) -> None:
        self.levels = {"irq1": False, "irq12": False, "a20": False}
        self.edges: list[str] = []
        self.resets = 0
        self.device = I8042(self._line("irq1"), self._line("irq12"), self._line("a20"), self._reset)
        self.bus = Bus()
        self.bus.ports.window(self.device).map(0x60)
        self.bus.ports.window(self.device, "command").map(0x64)

    def _line(self, name: str) -> Line:
        def drive(level: bool) -> None:
            assert type(level) is bool
            if level and not self.levels[name]:
                self.edges.append(name)
            self.levels[name] = level

        return drive

    def _reset(self) -> None:
        self.resets += 1

    @property
    def state(self) -> I8042State:
        return self.device.state

    def status(self) -> int:
        return self.bus.port_in(0x64, 1)

    def data(self) -> int:
        return self.bus.port_in(0x60, 1)

    def command(self, command: int, *data: int) -> None:
        self.bus.port_out(0x64, 1, command)
        self.write(*data)

    def write(self, *data: int) -> None:
        for byte in data:
            self.bus.port_out(0x60, 1, byte)

    def drain(self, aux: bool = False) -> list[int]:
        """Everything to be read, all of it from the keyboard's side or all from the mouse's."""
        out: list[int] = []
        while self.status() & OBF:
            assert bool(self.status() & AUX_OBF) == aux
            out.append(self.data())
            assert len(out) < 100
        return out

    def ask(self, command: int, *data: int) -> list[int]:
        self.command(command, *data)
        return self.drain()

    def keyboard(self, *data: int) -> list[int]:
        """What libps2 does: each byte's answer is read before the next byte."""
        out: list[int] = []
        for byte in data:
            self.write(byte)
            out += self.drain()
        return out

    def mouse(self, *data: int) -> list[int]:
        out: list[int] = []
        for byte in data:
            self.command(0xD4, byte)
            out += self.drain(aux=True)
        return out


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def untranslated(rig: Rig) -> Rig:
    rig.command(0x60, 0x01)
    return rig


# --- the controller: IBM, "Keyboard and Auxiliary Device Controller" ---


def test_power_on_is_quiet(rig: Rig) -> None:
    assert rig.status() == NOT_INHIBITED
    rig.device.restored()
    assert rig.levels == {"irq1": False, "irq12": False, "a20": True}


def test_status_tells_commands_from_data(rig: Rig) -> None:
    rig.command(0xAD)
    assert rig.status() & A2
    rig.write(0xED)
    assert not rig.status() & A2


def test_self_test_sets_the_system_flag(rig: Rig) -> None:
    assert not rig.status() & SYS
    assert rig.ask(0xAA) == [0x55]
    assert rig.status() & SYS
    assert rig.ask(0x20) == [0x65]


def test_internal_ram_is_all_there(rig: Rig) -> None:
    for at in reversed(range(1, 32)):
        rig.command(0x60 + at, 0xFF - at)
    rig.command(0x60, 0x47)
    assert [rig.ask(0x20 + at) for at in range(32)] == [[0x47], *([0xFF - at] for at in range(1, 32))]


@pytest.mark.parametrize(
    ("command", "answer"),
    [(0xA4, [0xF1]), (0xA6, []), (0xA9, [0x00]), (0xAB, [0x00]), (0xC0, [0xB3]), (0xD0, [0xCF]), (0xE0, [0x01])],
)
def test_answers(rig: Rig, command: int, answer: list[int]) -> None:
    assert rig.ask(command) == answer


@pytest.mark.parametrize(("off", "on", "bit"), [(0xAD, 0xAE, 0x10), (0xA7, 0xA8, 0x20)])
def test_disables_are_bits_of_the_command_byte_and_stop_clocks(rig: Rig, off: int, on: int, bit: int) -> None:
    rig.command(off)
    (there,) = rig.ask(0x20)
    assert there & bit
    assert not rig.ask(0xE0)[0] & bit >> 4
    rig.command(on)
    assert rig.ask(0x20) == [there & ~bit]
    assert rig.ask(0xE0)[0] & bit >> 4


def test_password_text_is_taken_to_its_zero_and_forgotten(rig: Rig) -> None:
    rig.command(0xA5, 0x1E, 0xFF, 0x00)
    assert rig.drain() == []  # FF was not a reset of the keyboard
    assert rig.keyboard(0xEE) == [0xEE]


def test_a_command_ends_the_wait_for_data(rig: Rig) -> None:
    rig.command(0xD1)
    rig.command(0xAE, 0xEE)
    assert rig.state.a20 and not rig.resets
    assert rig.drain() == [0xEE]  # the keyboard's echo


def test_output_port_has_a20_and_reset(rig: Rig) -> None:
    rig.command(0xD1, 0xDD)
    assert not rig.levels["a20"]
    assert rig.ask(0xD0) == [0xCD]
    rig.command(0xD1, 0xDF)
    assert rig.levels["a20"] and rig.resets == 0
    rig.command(0xD1, 0xFE)
    assert rig.resets == 1


def test_output_port_shows_the_interrupt_pins(rig: Rig) -> None:
    rig.device.key(b"\x1c")
    rig.command(0xD0)
    assert [rig.data(), rig.data()] == [0x1E, 0xDF]


@pytest.mark.parametrize("command", range(0xF0, 0x100))
def test_pulse_resets_by_bit_0(rig: Rig, command: int) -> None:
    rig.command(command)
    assert rig.resets == (not command & 1)
    assert rig.state.a20


def test_d2_and_d3_come_back_as_from_the_devices_untranslated(rig: Rig) -> None:
    rig.command(0x60, 0x43)
    rig.command(0xD2, 0x1C)
    assert (rig.levels["irq1"], rig.levels["irq12"]) == (True, False)
    assert rig.drain() == [0x1C]
    rig.command(0xD3, 0x1C)
    assert (rig.levels["irq1"], rig.levels["irq12"]) == (False, True)
    assert rig.drain(aux=True) == [0x1C]
    assert (rig.levels["irq1"], rig.levels["irq12"]) == (False, False)


def test_irq_levels_follow_the_enable_bits(rig: Rig) -> None:
    rig.command(0x60, 0x40)
    rig.device.key(b"\x1c")
    assert not rig.levels["irq1"]
    rig.command(0x60, 0x41)
    assert rig.levels["irq1"]
    rig.command(0x60, 0x40)
    assert not rig.levels["irq1"]


def test_each_byte_is_an_edge(rig: Rig) -> None:
    rig.device.key(b"\xe0\xf0\x75")
    assert rig.edges == ["irq1"]
    assert rig.drain() == [0xE0, 0xC8]
    assert rig.edges == ["irq1"] * 2


def test_controller_before_keyboard_before_mouse(rig: Rig) -> None:
    rig.command(0x60, 0x03)
    rig.mouse(0xF4)
    rig.device.key(b"\x1c")
    rig.device.move(1, 0, 0)
    rig.device.key(b"\x1d")
    rig.command(0xAB)
    assert [(rig.status() & AUX_OBF, rig.data()) for _ in range(6)] == [
        (0, 0x1C),
        (0, 0x00),
        (0, 0x1D),
        (AUX_OBF, 0x08),
        (AUX_OBF, 0x01),
        (AUX_OBF, 0x00),
    ]


def test_an_empty_buffer_keeps_its_byte(rig: Rig) -> None:
    rig.device.key(b"\x1c")
    assert [rig.data(), rig.data()] == [0x1E, 0x1E]


def test_a_disabled_keyboard_waits_with_its_bytes(rig: Rig) -> None:
    rig.command(0xAD)
    rig.device.key(b"\x1c")
    assert rig.drain() == []
    rig.command(0xAE)
    assert rig.drain() == [0x1E]


def test_a_disabled_mouse_waits_with_its_bytes(rig: Rig) -> None:
    rig.mouse(0xF4)
    rig.command(0xA7)
    rig.device.move(1, 2, 0)
    assert rig.drain() == []
    rig.command(0xA8)
    assert rig.drain(aux=True) == [0x08, 1, 2]


def test_answers_nobody_reads_are_bounded(rig: Rig) -> None:
    rig.command(0x60, 0x01)
    rig.write(*[0xEE] * 40)
    assert rig.drain() == [0xEE] * 17  # sixteen behind the one in the output buffer
    for _ in range(40):
        rig.command(0xD4, 0xE6)
    assert rig.drain(aux=True) == [ACK] * 17


def test_writing_to_a_device_enables_its_interface(rig: Rig) -> None:
    rig.command(0x60, 0x30)
    assert rig.keyboard(0xEE) == [0xEE]
    assert rig.mouse(0xE6) == [ACK]
    assert rig.ask(0x20) == [0x00]


# --- translation: Microsoft scan code specification, appendix A ---


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("1c", "1e"),  # A
        ("f0 1c", "9e"),
        ("5a", "1c"),  # Enter
        ("83", "41"),  # F7
        ("f0 84", "d4"),  # SysRq
        ("e0 12 e0 7c", "e0 2a e0 37"),  # PrintScreen
        ("e1 14 77 e1 f0 14 f0 77", "e1 1d 45 e1 9d c5"),  # Pause
    ],
)
def test_translation(rig: Rig, sent: str, seen: str) -> None:
    rig.device.key(bytes.fromhex(sent))
    assert bytes(rig.drain()) == bytes.fromhex(seen)


def test_every_make_code_of_set_1_comes_from_one_of_set_2() -> None:
    assert len(SET_2_TO_1) == 256
    assert sorted(SET_2_TO_1[1:0x80] + SET_2_TO_1[:1]) == [*range(0x01, 0x80), 0xFF]


def test_a_break_prefix_waits_for_its_code(rig: Rig) -> None:
    rig.device.key(b"\xf0")
    assert rig.drain() == []
    rig.device.key(b"\x1c")
    rig.device.key(b"\x1c")
    assert rig.drain() == [0x9E, 0x1E]


def test_responses_are_translated_too(rig: Rig) -> None:
    assert rig.keyboard(0xF2) == [ACK, 0xAB, 0x41]
    assert rig.keyboard(0xF0, 0x00) == [ACK, ACK, 0x41]


# --- the keyboard: IBM, "Keyboards (101- and 102-Key)" ---


def test_keyboard_commands(untranslated: Rig) -> None:
    k = untranslated.keyboard
    assert k(0xEE) == [0xEE]
    assert k(0xF2) == [ACK, 0xAB, 0x83]
    assert k(0xED, 0x07) == [ACK, ACK]
    assert k(0xF3, 0x7F) == [ACK, ACK]
    assert (untranslated.state.keyboard.leds, untranslated.state.keyboard.typematic) == (7, 0x7F)
    assert k(0xFF) == [ACK, 0xAA]
    assert (untranslated.state.keyboard.leds, untranslated.state.keyboard.typematic) == (0, 0x2B)
    assert k(0xF7, 0xF8, 0xF9, 0xFA) == [ACK] * 4
    assert k(0xFB, 0x1C, 0x1D, 0xEE) == [ACK, ACK, ACK, 0xEE]
    assert k(0xEF, 0x00) == [0xFE, 0xFE]


def test_a_command_in_place_of_an_argument_is_a_command(untranslated: Rig) -> None:
    assert untranslated.keyboard(0xED, 0xF2) == [ACK, ACK, 0xAB, 0x83]
    assert untranslated.keyboard(0x02) == [0xFE]


def test_a_wrong_argument_is_asked_for_again(untranslated: Rig) -> None:
    assert untranslated.keyboard(0xF0, 0x04, 0x03) == [ACK, 0xFE, ACK]
    assert untranslated.state.keyboard.scan_set == 3


def test_resend_is_the_last_byte(untranslated: Rig) -> None:
    assert untranslated.keyboard(0xF2, 0xFE, 0xFE) == [ACK, 0xAB, 0x83, 0x83, 0x83]


def test_disable_enable_and_defaults(untranslated: Rig) -> None:
    rig = untranslated
    assert rig.keyboard(0xF5) == [ACK]
    rig.device.key(b"\x1c")
    assert rig.drain() == []
    assert rig.keyboard(0xF4) == [ACK]
    rig.device.key(b"\x1c")
    assert rig.drain() == [0x1C]
    assert rig.keyboard(0xF0, 0x01, 0xF6, 0xF0, 0x00) == [ACK, ACK, ACK, ACK, ACK, 0x02]


@pytest.mark.parametrize(
    ("scan_set", "sent", "seen"),
    [
        (1, "e0 f0 75", "e0 c8"),
        (1, "e1 14 77 e1 f0 14 f0 77", "e1 1d 45 e1 9d c5"),
        (2, "e0 f0 75", "e0 f0 75"),
        (3, "1c", "1c"),  # A
        (3, "f0 76", "f0 08"),  # Esc
        (3, "05", "07"),  # F1
        (3, "e0 f0 75", "f0 63"),  # Up
        (3, "75", "75"),  # keypad 8
        (3, "e0 12 e0 7c", "57"),  # PrintScreen
        (3, "e0 f0 7c e0 f0 12", "f0 57"),
        (3, "e1 14 77 e1 f0 14 f0 77", "62"),  # Pause
    ],
)
def test_scan_code_sets(untranslated: Rig, scan_set: int, sent: str, seen: str) -> None:
    assert untranslated.keyboard(0xF0, scan_set, 0xF0, 0x00) == [ACK, ACK, ACK, ACK, scan_set]
    untranslated.device.key(bytes.fromhex(sent))
    assert bytes(untranslated.drain()) == bytes.fromhex(seen)


@pytest.mark.parametrize(("scan_set", "overrun"), [(1, 0xFF), (2, 0x00), (3, 0x00)])
def test_overrun_stands_once_after_sixteen_bytes(untranslated: Rig, scan_set: int, overrun: int) -> None:
    rig = untranslated
    rig.keyboard(0xF0, scan_set)
    rig.command(0xAD)
    for _ in range(20):
        rig.device.key(b"\x29")
    rig.command(0xAE)
    assert rig.drain() == [SET_2_TO_1[0x29] if scan_set == 1 else 0x29] * 16 + [overrun]
    rig.device.key(b"\x5a")
    assert len(rig.drain()) == 1


def test_a_key_that_does_not_fit_whole_is_discarded_whole(untranslated: Rig) -> None:
    rig = untranslated
    rig.command(0xAD)
    for _ in range(15):
        rig.device.key(b"\x29")
    rig.device.key(b"\xe0\x75")
    rig.device.key(b"\xe0\x75")
    rig.command(0xAE)
    assert rig.drain() == [0x29] * 15 + [0x00]


def test_a_key_buffer_full_to_its_seventeenth_byte_takes_no_more(untranslated: Rig) -> None:
    """A valid state, though no keyboard comes to it."""
    rig = untranslated
    rig.command(0xAD)
    rig.state.keyboard.fifo = b"\x29" * 17
    rig.device.key(b"\x29")
    encode(rig.state)
    rig.command(0xAE)
    assert rig.drain() == [0x29] * 17


def test_responses_take_no_place_in_the_key_buffer_and_go_first(untranslated: Rig) -> None:
    rig = untranslated
    rig.command(0xD2, 0x77)  # the output buffer is full: everything waits
    for _ in range(16):
        rig.device.key(b"\x29")
    rig.write(0xEE)
    assert rig.drain() == [0x77, 0xEE] + [0x29] * 16


# --- the mouse: IBM PS/2 Mouse Technical Reference ---


def status(rig: Rig) -> list[int]:
    return rig.mouse(0xE9)


def test_mouse_reset_and_defaults(rig: Rig) -> None:
    rig.mouse(0xF3, 40, 0xE8, 0, 0xE7, 0xF4, 0xF0)
    rig.device.move(0, 0, 0b001)
    assert status(rig) == [ACK, 0x74, 0, 40]
    rig.device.move(0, 0, 0b010)
    assert status(rig)[1] == 0x71
    rig.device.move(0, 0, 0b100)
    assert status(rig)[1] == 0x72
    rig.device.move(0, 0, 0)
    assert rig.mouse(0xF6) == [ACK]
    assert status(rig) == [ACK, 0x00, 2, 100]
    rig.mouse(0xF3, 200, 0xF3, 100, 0xF3, 80, 0xE8, 3, 0xE7, 0xF4)
    assert rig.mouse(0xFF) == [ACK, 0xAA, 0x00]
    assert rig.mouse(0xF2) == [ACK, 0x00]
    assert status(rig) == [ACK, 0x00, 2, 100]


def test_mouse_stream_mode(rig: Rig) -> None:
    rig.device.move(5, 5, 0)
    assert rig.drain(aux=True) == []
    rig.mouse(0xF4)
    rig.device.move(5, -3, 0b001)
    assert rig.drain(aux=True) == [0x29, 5, 0xFD]
    rig.device.move(0, 0, 0b001)
    assert rig.drain(aux=True) == []  # nothing new, no packet
    rig.device.move(0, 0, 0)
    assert rig.drain(aux=True) == [0x08, 0, 0]


def test_mouse_overflow_bits(rig: Rig) -> None:
    rig.mouse(0xF4)
    rig.device.move(300, -300, 0)
    assert rig.drain(aux=True) == [0x08 | 0x20 | 0x40 | 0x80, 0xFF, 0x00]


def test_mouse_remote_mode(rig: Rig) -> None:
    assert rig.mouse(0xF0) == [ACK]
    rig.device.move(2, 3, 0)
    rig.device.move(2, 3, 0b100)
    assert rig.drain(aux=True) == []
    assert rig.mouse(0xEB) == [ACK, 0x0C, 4, 6]
    assert rig.mouse(0xEB) == [ACK, 0x0C, 0, 0]
    rig.mouse(0xEA, 0xF4)
    rig.device.move(1, 0, 0)
    assert rig.drain(aux=True) == [0x08, 1, 0]


def test_mouse_wrap_mode(rig: Rig) -> None:
    rig.mouse(0xF4)
    assert rig.mouse(0xEE, 0xF5, 0x12, 0xFE) == [ACK, 0xF5, 0x12, 0xFE]
    rig.device.move(1, 1, 0)
    assert rig.drain(aux=True) == []
    assert rig.mouse(0xEC) == [ACK]
    assert status(rig)[1] & 0x20
    assert rig.mouse(0xEE, 0xFF, 0xF2) == [ACK, ACK, 0xAA, 0x00, ACK, 0x00]


def test_mouse_scaling_is_for_stream_mode(rig: Rig) -> None:
    rig.mouse(0xE7, 0xF4)
    seen = []
    for dx in range(8):
        rig.device.move(dx, 1, 0)
        seen.append(rig.drain(aux=True)[1])
    assert seen == [0, 1, 1, 3, 6, 9, 12, 14]
    rig.device.move(-200, 0, 0)
    assert rig.drain(aux=True) == [0x58, 0x00, 0]
    rig.mouse(0xF0)
    rig.device.move(7, 0, 0)
    assert rig.mouse(0xEB) == [ACK, 0x08, 7, 0]


def test_mouse_wrong_arguments_and_commands(rig: Rig) -> None:
    assert rig.mouse(0xE8, 4, 3) == [ACK, 0xFE, ACK]
    assert rig.mouse(0xF3, 81, 0xF2) == [ACK, 0xFE, ACK, 0x00]
    assert rig.mouse(0xE1) == [0xFE]


def test_mouse_resends_what_it_sent_last(rig: Rig) -> None:
    rig.mouse(0xF4)
    rig.device.move(1, 2, 0)
    assert rig.drain(aux=True) == rig.mouse(0xFE) == rig.mouse(0xFE) == [0x08, 1, 2]


def test_mouse_resends_a_response_too(rig: Rig) -> None:
    """Mouse, "Resend": what was sent last, whether it was a packet or a response."""
    rig.mouse(0xF4)
    rig.device.move(1, 2, 0)
    rig.drain(aux=True)
    assert rig.mouse(0xE9) == rig.mouse(0xFE) == [ACK, 0x20, 2, 100]
    assert rig.mouse(0xE1) == rig.mouse(0xFE) == [0xFE]


@pytest.mark.parametrize(
    ("rates", "identity", "packet"),
    [
        ((200, 100, 80), 3, [0x09, 1, 2, 0xFD]),
        ((200, 200, 80), 4, [0x09, 1, 2, 0x3D]),
        ((100, 200, 80), 0, [0x09, 1, 2]),
    ],
)
def test_mouse_knocks(rig: Rig, rates: tuple[int, ...], identity: int, packet: list[int]) -> None:
    for rate in rates:
        assert rig.mouse(0xF3, rate) == [ACK, ACK]
    assert rig.mouse(0xF2) == [ACK, identity]
    rig.mouse(0xF4)
    rig.device.move(1, 2, 0b11001, -3)
    assert rig.drain(aux=True) == packet


@pytest.mark.parametrize("defaults", [0xF6, 0xFF])
def test_a_knock_is_three_rates_set_one_after_another(rig: Rig, defaults: int) -> None:
    """The default rate of 100 is none that was set."""
    rig.mouse(0xF3, 200, 0xF3, 60, defaults, 0xF3, 80)
    assert rig.mouse(0xF2) == [ACK, 0]
    rig.mouse(0xF3, 200, defaults, 0xF3, 80)
    assert rig.mouse(0xF2) == [ACK, 0]


def test_packets_are_whole_and_no_movement_is_lost(rig: Rig) -> None:
    rig.mouse(0xF4)
    for i in range(20):
        rig.device.move(1, 0, i & 1)
    rig.device.move(0, 0, 0)
    seen = rig.drain(aux=True)
    packets = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert all(len(packet) == 3 and packet[0] & 0x08 for packet in packets)
    assert sum(packet[1] for packet in packets) == 20
    assert packets[-1][0] == 0x08  # the button is up at the end
    assert len(packets) < 20


def test_the_queue_of_packets_is_filled_to_its_last_byte(rig: Rig) -> None:
    """Sixteen bytes: four packets with a wheel, each a movement of its own, and the rest in one."""
    rig.mouse(0xF3, 200, 0xF3, 100, 0xF3, 80, 0xF2, 0xF4)
    rig.command(0xA7)
    for _ in range(10):
        rig.device.move(1, 0, 0)
    rig.command(0xA8)
    assert rig.drain(aux=True)[1::4] == [1, 1, 1, 1, 6]


def test_a_mouse_command_stops_a_packet(rig: Rig) -> None:
    rig.mouse(0xF4)
    rig.device.move(1, 2, 0)
    assert rig.data() == 0x08
    rig.command(0xD4, 0xF5)
    assert rig.drain(aux=True) == [1, ACK]  # one byte was already in the output buffer


# --- what Linux does at probe: drivers/input/serio/i8042.c, keyboard/atkbd.c, mouse/psmouse-base.c ---


def test_linux_i8042_probe(rig: Rig) -> None:
    assert rig.drain() == []  # i8042_controller_check: flush
    assert rig.ask(0xAA) == [0x55]  # i8042_controller_selftest
    control = rig.ask(0x20)[0]  # i8042_controller_init reads it till two agree
    assert rig.ask(0x20) == [control]
    assert rig.status() & NOT_INHIBITED  # else "Warning: Keylock active"
    control = (control | 0x10) & ~0x01
    rig.command(0x60, control)
    assert control & 0x40  # else the keyboard port would be "direct"

    rig.command(0xD3, 0x5A)  # i8042_check_aux: the loop, the answer on the mouse's side
    assert rig.drain(aux=True) == [0x5A]
    rig.command(0xA7)
    assert rig.ask(0x20)[0] & 0x20
    rig.command(0xA8)
    assert not rig.ask(0x20)[0] & 0x20
    for byte in (0xF0, 0x56, 0xA4):  # i8042_set_mux_mode: A4 echoed means no multiplexing
        rig.command(0xD3, byte)
        assert rig.drain(aux=True) == [byte]

    rig.edges.clear()  # i8042_check_aux: does IRQ 12 arrive
    rig.command(0x60, (control & ~0x20) | 0x02)
    rig.command(0xD3, 0xA5)
    assert rig.edges == ["irq12"]
    assert rig.drain(aux=True) == [0xA5]


def test_linux_atkbd_probe(rig: Rig) -> None:
    rig.command(0x60, 0x47)
    assert rig.keyboard(0xF2) == [ACK, 0xAB, 0x41]  # atkbd_probe; translated ids are known to it
    assert rig.keyboard(0xF5) == [ACK]  # atkbd_deactivate
    assert rig.keyboard(0xED, 0x00) == [ACK, ACK]  # atkbd_reset_state
    assert rig.keyboard(0xF3, 0x00) == [ACK, ACK]
    assert rig.keyboard(0xF4) == [ACK]  # atkbd_activate
    rig.edges.clear()
    rig.device.key(b"\x1c")
    rig.device.key(b"\xf0\x1c")
    assert rig.drain() == [0x1E, 0x9E]
    assert rig.edges == ["irq1", "irq1"]


def test_linux_psmouse_probe(rig: Rig) -> None:
    rig.command(0x60, 0x47)
    m = rig.mouse
    assert m(0xF2) == [ACK, 0x00]  # psmouse_probe
    assert m(0xF5) == [ACK]
    assert m(0xFF) == [ACK, 0xAA, 0x00]  # psmouse_reset
    m(0xF3, 200, 0xF3, 100, 0xF3, 80)  # intellimouse_detect
    assert m(0xF2) == [ACK, 0x03]
    m(0xF3, 200, 0xF3, 200, 0xF3, 80)  # im_explorer_detect
    assert m(0xF2) == [ACK, 0x04]
    assert m(0xF3, 100, 0xE8, 3, 0xE6, 0xF4) == [ACK] * 6  # psmouse_initialize, psmouse_activate
    assert status(rig) == [ACK, 0x20, 3, 100]
    rig.edges.clear()
    rig.device.move(-1, 1, 0b00010, 1)
    assert rig.drain(aux=True) == [0x1A, 0xFF, 0x01, 0x01]
    assert rig.edges == ["irq12"] * 4


# --- properties ---


def values(kind: Type) -> st.SearchStrategy[Any]:
    """Any value of one field type."""
    match kind:
        case BoolType():
            return st.booleans()
        case IntType(low, high):
            return st.integers(low, high)
        case BytesType(least, most):
            return st.binary(min_size=least, max_size=most)
        case OptionalType(item):
            return st.none() | values(item)
        case StructType(cls):
            return st.builds(cls, **{f.name: values(f.type) for f in schema_of(cls).fields})
    raise AssertionError(kind)


# the values that mean something, more often than a byte's other values
COMMANDS = st.sampled_from([0x20, 0x60, 0xA5, 0xA8, 0xAA, 0xAE, 0xD0, 0xD1, 0xD2, 0xD3, 0xD4]) | st.integers(0, 255)
DATA = st.sampled_from([0, 1, 3, 80, 100, 200, 0x47]) | st.integers(0xE6, 0xFF) | st.integers(0, 255)
STEPS = st.one_of(
    st.tuples(st.just("data")),
    st.tuples(st.just("status")),
    st.tuples(st.just("command"), COMMANDS),
    st.tuples(st.just("write"), DATA),
    st.tuples(st.just("command"), st.just(0xD4), DATA),
    st.tuples(st.just("key"), st.binary(max_size=8)),
    st.tuples(st.just("move"), st.integers(-600, 600), st.integers(-600, 600), st.integers(0, 31), st.integers(-9, 9)),
)
PROGRAMS = st.lists(STEPS, max_size=40)
STATES = values(StructType(I8042State))


def step(rig: Rig, action: tuple[Any, ...]) -> object:
    name, *arguments = action
    if name in ("key", "move"):
        return getattr(rig.device, name)(*arguments)
    return getattr(rig, name)(*arguments)


def woken(state: I8042State) -> Rig:
    """A second machine with this state, by way of what a file holds."""
    rig = Rig()
    rig.device.state = decode("i8042", 1, encode(state), I8042State)
    rig.device.restored()
    rig.edges.clear()
    return rig


@given(STATES, PROGRAMS)
def test_any_state_survives_any_program(state: I8042State, program: list[tuple[Any, ...]]) -> None:
    rig = woken(state)
    for action in program:
        value = step(rig, action)
        assert value is None or 0 <= value <= 0xFF  # type: ignore[operator]
        encode(rig.state)  # and stays within its own schema


@given(STATES, PROGRAMS, PROGRAMS)
def test_a_restored_twin_answers_the_same(
    state: I8042State, before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]
) -> None:
    rig = woken(state)
    for action in before:
        step(rig, action)
    saved = encode(rig.state)
    twin = woken(rig.state)
    assert encode(rig.state) == encode(twin.state) == saved
    assert rig.levels == twin.levels
    rig.edges.clear()
    rig.resets = 0
    for action in after:
        assert step(rig, action) == step(twin, action)
    assert (rig.levels, rig.edges, rig.resets) == (twin.levels, twin.edges, twin.resets)
    assert encode(rig.state) == encode(twin.state)


@given(PROGRAMS)
def test_the_buffer_is_never_left_empty_while_a_byte_may_move(program: list[tuple[Any, ...]]) -> None:
    """From power-on: with the output buffer empty, no enabled device and no answer is waiting."""
    rig = Rig()
    for action in program:
        step(rig, action)
        s = rig.state
        if not s.output_full:
            assert s.reply is None
            assert s.command_byte & 0x10 or not (s.keyboard.replies or s.keyboard.fifo)
            assert s.command_byte & 0x20 or not (s.mouse.replies or s.mouse.packets)


@given(PROGRAMS)
def test_awaited_is_the_argument_of_a_command_that_has_one(program: list[tuple[Any, ...]]) -> None:
    rig = Rig()
    for action in program:
        step(rig, action)
        s = rig.state
        assert s.keyboard.awaiting in (0, 0xED, 0xF0, 0xF3, 0xFB, 0xFC, 0xFD)
        assert s.mouse.awaiting in (0, 0xE8, 0xF3)
        assert s.awaiting in (0, *range(0x60, 0x80), 0xA5, 0xD1, 0xD2, 0xD3, 0xD4)


def test_reset_is_power_on(rig: Rig) -> None:
    rig.command(0xD1, 0xDD)
    rig.device.key(b"\x1c")
    rig.device.reset()
    assert rig.state == I8042State()
    assert rig.levels == {"irq1": False, "irq12": False, "a20": True}
