"""What a machine is built from: versions, devices as texts and as JSON, options, places."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot.errors import SnapshotError
from snapshot.field_types import Bits, MaxSize, OneOf, Range, Size, u8
from snapshot.schema import encode
from snapshot.versions import decode, lower
from vmm.board import options
from vmm.board.board import Board, slots
from vmm.board.config import DeviceConfig, MachineConfig, MachineConfigV1, MachineConfigV2, OptionConfig, named
from vmm.clock import GuestClock
from vmm.errors import BackendError, RequestError
from vmm.saving.parts import parts_of
from vmm.testing.strategies import states


def board(*devices: DeviceConfig) -> Board:
    return Board(MachineConfig(devices=named(devices)), GuestClock(1_000_000))


# --- versions


def test_what_was_saved_before_is_a_machine_without_more_devices():
    v1 = MachineConfigV1(memory_bytes=8 << 20, epoch_ns=7)
    wanted = MachineConfig(memory_bytes=8 << 20, epoch_ns=7, tsc_khz=1_000_000)
    assert decode("machine", 1, encode(v1), MachineConfig) == wanted
    v2 = MachineConfigV2(memory_bytes=8 << 20, epoch_ns=7, tsc_khz=2_500_000)
    assert decode("machine", 2, encode(v2), MachineConfig).tsc_khz == 2_500_000
    assert lower(wanted, 1) == v1


def test_what_an_older_version_cannot_say_is_named():
    with pytest.raises(SnapshotError, match=r"machine.devices: version 2 has no devices .* not com5"):
        lower(MachineConfig(devices=(DeviceConfig.parse("uart,id=com5,port=0x2a8"),)), 2)
    with pytest.raises(SnapshotError, match=r"machine.cpus: version 2 has one, not 2"):
        lower(MachineConfig(cpus=2), 2)
    with pytest.raises(SnapshotError, match=r"machine.tsc_khz: version 1"):
        lower(MachineConfig(), 1)


def test_what_this_program_cannot_build_is_named():
    with pytest.raises(RequestError, match="there is no board 'q35' here; there are isapc"):
        parts_of(MachineConfig(board="q35"))
    with pytest.raises(RequestError, match="board isapc has one CPU, not 2"):
        parts_of(MachineConfig(cpus=2))


# --- a device as text


def test_text_and_json_say_the_same():
    as_text = DeviceConfig.parse("uart,port=0x2a8,irq=5,id=com5")
    assert as_text == DeviceConfig(
        id="com5", kind="uart", place="port=0x2a8", options=(OptionConfig(name="irq", value="5"),)
    )
    given = {"kind": "uart", "port": "0x2a8", "irq": 5, "id": "com5"}
    assert DeviceConfig.parse(json.dumps(given)) == as_text
    assert DeviceConfig.of("uart", [("port", "0x2a8"), ("irq", 5), ("id", "com5")]) == as_text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a device has a kind"),
        ("{}", "a device has a kind"),
        ("{", "not a JSON object"),
        ("{" * 5000, "not a JSON object"),
        ("uart,port=1,memory=2", "place is given twice"),
        ("uart,id=a,id=b", "id is given twice"),
    ],
)
def test_what_is_no_device(text, why):
    with pytest.raises(RequestError, match=why):
        DeviceConfig.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("uart", "device uart0: it is put at port=ADDRESS"),
        ("uart,port=0x3f8", "device uart0: com1 lies at port=0x3f8"),
        ("uart,port=0x3f1", "device uart0: com1 lies at port=0x3f8"),
        ("uart,port=0x10000", "not within 0..0xffff"),
        ("uart,port=here", "port=here: not an address"),
        ("uart,memory=0xfed00000", "it is put at port=ADDRESS, not memory="),
        ("uart,slot=3", "it is put at port=ADDRESS, not slot="),
        ("uart,port=0x2a8,irq=16", "irq: 16 is not an integer in 0..15"),
        ("uart,port=0x2a8,irq=one", "irq=one: not a number"),
        ("uart,port=0x2a8,irq=2", "interrupt 2 is where the second controller is connected"),
        ("uart,port=0x2a8,speed=9600", "there is no option 'speed'; there are id, port, irq"),
        ("uart,port=0x2a8,irq=5,irq=6", "option 'irq' is given twice"),
        ("uart,port=0x2a8,id=com1", "its id is taken"),
        ("uart,port=0x2a8,id=clock", "its id is taken"),
        ("uart,port=0x2a8,id=cpu.0", "or is no name"),
        ("uart,port=0x2a8,id=" + "a" * 40, "or is no name"),
        ("debugcon", "debugcon lies at port=0xe9"),
    ],
)
def test_what_cannot_be_put_on_the_board(text, why):
    with pytest.raises(RequestError, match=why):
        board(DeviceConfig.parse(text))


def test_a_kind_that_is_not_here_is_the_hosts_fault():
    with pytest.raises(BackendError, match=r"device thermometer0: there is no kind of device 'thermometer' here"):
        board(DeviceConfig.parse("thermometer,port=0x300"))


def test_each_has_an_id():
    given = ["uart,port=0x2a0", "uart,port=0x2a8,id=uart0", "debugcon,port=0x300", "uart,port=0x2b0"]
    ids = [device.id for device in named(map(DeviceConfig.parse, given))]
    assert ids == ["uart1", "uart0", "debugcon0", "uart2"]
    assert [slot.id for slot in slots(MachineConfig(devices=named(map(DeviceConfig.parse, given))))][-4:] == ids


def test_what_is_put_on_the_board_is_there():
    made = board(
        DeviceConfig.parse("uart,id=com5,port=0x2a8,irq=5"), DeviceConfig.parse("debugcon,port=0x300,readback=0x5a")
    )
    made.bus.port_out(0x2A8 + 7, 1, 0x77)
    assert made.bus.port_in(0x2A8 + 7, 1) == 0x77 and made.bus.port_in(0x300, 1) == 0x5A
    made.bus.port_out(0x2A8, 1, ord("x"))
    assert made.consoles["com5"].output == b"x" and not made.console.output
    made.bus.port_out(0x2A8 + 4, 1, 0x08)  # OUT2
    made.bus.port_out(0x2A8 + 1, 1, 0x02)  # THR empty
    assert made.devices["pic0"].state.lines & 1 << 5


# --- options


@dataclass(frozen=True, kw_only=True)
class Every:
    """One option of each type."""

    needed: Annotated[u8, "has to be given"]
    number: Annotated[int, Range(-5, 99), "a number"] = 7
    flag: Annotated[bool, "yes or no"] = True
    word: Annotated[str, OneOf(("one", "two")), "a word"] = "one"
    text: Annotated[str, MaxSize(20), "a text"] = "some"
    raw: Annotated[bytes, Size(2), "two bytes"] = b"\x01\x02"
    wide: Annotated[int, Bits(64), "64 bits"] = 0


EVERY = st.builds(
    Every,
    needed=st.integers(0, 255),
    number=st.integers(-5, 99),
    flag=st.booleans(),
    word=st.sampled_from(("one", "two")),
    text=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
    raw=st.binary(min_size=2, max_size=2),
    wide=st.integers(0, (1 << 64) - 1),
)


@given(EVERY)
def test_what_is_spelled_is_read_again(chosen):
    assert options.read(Every, options.spell(chosen)) == chosen
    as_json: dict[str, Any] = {name: getattr(chosen, name) for name in ("needed", "number", "flag", "word", "wide")}
    assert options.read(Every, {**as_json, "text": chosen.text, "raw": chosen.raw.hex()}.items()) == chosen


@given(st.sampled_from([*options.options_of(Every), "other"]), st.text(max_size=30))
def test_any_text_is_an_option_or_one_line(name, text):
    try:
        options.read(Every, [("needed", "1"), (name, text)])
    except RequestError as error:
        assert "\n" not in str(error) or "\n" in text


def test_what_is_missing_is_named():
    with pytest.raises(RequestError, match="option 'needed' is missing: has to be given"):
        options.read(Every, [])


PLACES = st.sampled_from(("port=0x2a8", "port=0x3f8", "port=99999", "memory=1", "slot=3.1", "port=", "=", "port"))
DEVICES = st.builds(
    DeviceConfig,
    id=st.sampled_from(("", "com1", "com5", "x y", "cpu.0", "config")) | st.text("ab-_.9", max_size=32),
    kind=st.sampled_from(("uart", "debugcon", "debug-exit", "nothing", "")),
    place=PLACES | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=64),
    options=st.lists(
        st.builds(
            OptionConfig,
            name=st.sampled_from(("irq", "readback", "other")),
            value=st.sampled_from(("5", "2", "-1", "0x10", "9" * 1024, "")) | st.text("0123456789abcdefx_", max_size=9),
        ),
        max_size=3,
    ).map(tuple),
)


@given(states(MachineConfig), st.lists(DEVICES, max_size=4).map(tuple))
def test_any_config_a_file_may_hold_is_a_board_or_is_refused(config, devices):
    """In one line, by its own fault: nothing else is raised."""
    for each in (config, replace(config, cpus=1, board="isapc", devices=devices)):
        try:
            wanted = parts_of(each)
        except (RequestError, BackendError) as error:
            assert "\n" not in str(error)
        else:
            assert len({part.name for part in wanted}) == len(wanted)
            Board(each, GuestClock(each.tsc_khz)).restored()
