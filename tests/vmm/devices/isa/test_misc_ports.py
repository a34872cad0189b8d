"""The small ports: 92, CF9, the debug console and debug exit."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from snapshot.schema import encode, schema_of
from snapshot.versions import decode
from vmm.bus import Bus
from vmm.device import Device
from vmm.devices.isa.debug_exit import DebugExit
from vmm.devices.isa.debugcon import Debugcon
from vmm.devices.isa.port92 import Port92, Port92State
from vmm.devices.isa.reset_control import ResetControl, ResetControlState

PROGRAMS = st.lists(st.none() | st.integers(0, 255), max_size=12)  # None is a read


class Rig:
    """All four on a bus, and everything that left them."""

    def __init__(self) -> None:
        self.out: list[tuple[str, int]] = []
        self.port92 = Port92(lambda level: self.out.append(("a20", level)), lambda: self.out.append(("init", 1)))
        self.cf9 = ResetControl(lambda: self.out.append(("reset", 1)))
        self.debugcon = Debugcon(lambda byte: self.out.append(("char", byte)), 0xE9)
        self.debug_exit = DebugExit(lambda status: self.out.append(("exit", status)))
        self.bus = Bus()
        for port, device in self.parts().items():
            self.bus.ports.window(device).map(port)

    def parts(self) -> dict[int, Device[Any]]:
        return {0x92: self.port92, 0xCF8: self.cf9, 0xE9: self.debugcon, 0x501: self.debug_exit}

    def run(self, port: int, program: list[int | None]) -> list[int]:
        seen = []
        for value in program:
            if value is None:
                seen.append(self.bus.port_in(port, 1))
            else:
                self.bus.port_out(port, 1, value)
        return seen

    def drain(self) -> list[tuple[str, int]]:
        out, self.out = self.out, []
        return out


# --- ICH9 datasheet, 13.7.3 PORT92 ---


def test_port92_a20() -> None:
    rig = Rig()
    assert rig.run(0x92, [None, 0xFE, None, 0x00, None]) == [0x00, 0x02, 0x00]
    assert rig.drain() == [("a20", True), ("a20", False)]


def test_port92_resets_on_the_rise_of_bit_0_only() -> None:
    rig = Rig()
    rig.run(0x92, [0x03, 0x03, 0x02])
    assert [name for name, _ in rig.drain()].count("init") == 1
    rig.run(0x92, [0x03])
    assert rig.drain() == [("a20", True), ("init", 1)]


def test_port92_restored_drives_a20_and_nothing_else() -> None:
    rig = Rig()
    rig.port92.state = Port92State(a20=True, init_now=True)
    rig.port92.restored()
    assert rig.drain() == [("a20", True)]


# --- ICH9 datasheet, 13.7.5 RST_CNT ---


def test_linux_reboots_by_cf9() -> None:
    """arch/x86/kernel/reboot.c, BOOT_CF9_FORCE: ask for a hard reset, then do it."""
    rig = Rig()
    mode = 0x06
    value = rig.run(0xCF9, [None])[0] & ~mode
    rig.run(0xCF9, [value | 2])
    assert rig.drain() == []
    rig.run(0xCF9, [value | mode])
    assert rig.drain() == [("reset", 1)]


def test_cf9_acts_on_the_rise_of_bit_2_and_keeps_bits_1_to_3() -> None:
    rig = Rig()
    assert rig.run(0xCF9, [0xFF, None, 0x04, None, 0x0A, None]) == [0x0E, 0x04, 0x0A]
    assert rig.drain() == [("reset", 1)]
    rig.run(0xCF9, [0x04])
    assert rig.drain() == [("reset", 1)]


def test_cf9_restored_does_not_reset() -> None:
    rig = Rig()
    rig.cf9.state = ResetControlState(rst_cpu=True)
    rig.cf9.restored()
    rig.run(0xCF9, [0x06])
    assert rig.drain() == []


# --- Bochs port E9, QEMU isa-debugcon and isa-debug-exit ---


def test_debugcon_takes_characters_and_says_it_is_there() -> None:
    rig = Rig()
    assert rig.run(0xE9, [0x48, None, 0x69]) == [0xE9]
    assert rig.drain() == [("char", 0x48), ("char", 0x69)]
    assert Debugcon(lambda byte: None, 0x12).read() == 0x12


def test_debug_exit_takes_any_size_once() -> None:
    rig = Rig()
    rig.bus.port_out(0x501, 1, 0x00)
    rig.bus.port_out(0x501, 2, 0x1234)
    rig.bus.port_out(0x501, 4, 0x89ABCDEF)
    assert rig.drain() == [("exit", 1), ("exit", 0x2469), ("exit", 0x113579BDF)]
    assert [rig.bus.port_in(0x501, size) for size in (1, 2, 4)] == [0, 0, 0]


# --- properties ---


@given(
    st.builds(Port92State, a20=st.booleans(), init_now=st.booleans()),
    st.builds(ResetControlState, sys_rst=st.booleans(), rst_cpu=st.booleans(), full_rst=st.booleans()),
    st.sampled_from([0x92, 0xCF9, 0xE9, 0x501]),
    PROGRAMS,
    PROGRAMS,
)
def test_a_restored_twin_answers_the_same(
    port92: Port92State, cf9: ResetControlState, port: int, before: list[int | None], after: list[int | None]
) -> None:
    rig, twin = Rig(), Rig()
    rig.port92.state, rig.cf9.state = port92, cf9
    rig.run(port, before)
    for at, part in twin.parts().items():
        saved = encode(rig.parts()[at].state)
        part.state = decode(schema_of(part.State).name, 1, saved, part.State)
        part.restored()
        assert encode(rig.parts()[at].state) == encode(part.state) == saved
    assert {name for name, _ in twin.drain()} == {"a20"}
    rig.drain()
    assert rig.run(port, after) == twin.run(port, after)
    assert rig.drain() == twin.drain()
