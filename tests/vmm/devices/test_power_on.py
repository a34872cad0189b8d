"""What each chip holds when the power comes on, by name: a datasheet's value or, where that says "undefined", the one
that firmware finds with us."""

from __future__ import annotations

from typing import Any

import pytest

from snapshot.schema import encode
from vmm.board.isapc import CHIPS
from vmm.board.kinds import OURS
from vmm.devices.isa import i8042, pic, pit, port92, reset_control, rtc, uart
from vmm.devices.isa.debug_exit import DebugExitState
from vmm.devices.isa.debugcon import DebugconState

# 8254: "undefined until programmed"; ours count nothing until then. Port 61 holds the GATE of counter 2 low.
COUNTER = {
    "mode": 0, "access": "both", "bcd": False, "cr": 0, "low_byte": None, "read_high": False, "latch": None,
    "status_latch": None, "written": False, "null_count": True, "gate": True, "load_at": None, "initial": 0x10000,
    "start": None, "frozen": None, "second_half": False,
}  # fmt: skip

POWER_ON: dict[type[Any], dict[str, Any]] = {
    # IBM PS/2: translating, both interfaces off; the keyboard scans, set 2, 10.9 keys/s after 500 ms (2B); the mouse
    # has stream mode, 4 counts/mm, 100 reports/s, and does not report. AA: the self-test of each went well.
    i8042.I8042State: {
        "command_byte": 0x61, "ram": "00" * 31, "awaiting": 0, "last_was_command": False, "a20": True, "output": 0,
        "output_full": False, "output_aux": False, "reply": None, "reply_aux": False, "released": False,
        "keyboard": {
            "scan_set": 2, "scanning": True, "leds": 0, "typematic": 0x2B, "awaiting": 0, "replies": "", "fifo": "",
            "last": 0xAA,
        },
        "mouse": {
            "id": 0, "remote": False, "wrap": False, "reporting": False, "doubled": False, "resolution": 2, "rate": 100,
            "knock": "0000", "awaiting": 0, "buttons": 0, "x": 0, "y": 0, "x_overflow": False, "y_overflow": False,
            "wheel": 0, "unreported": False, "replies": "", "packets": "", "last": "aa00",
        },
    },
    # 8259A: as ICW1 leaves it, IR7 lowest
    pic.PicState: {
        "lines": 0, "irr": 0, "isr": 0, "imr": 0, "elcr": 0, "base": 0, "lowest": 7, "next_icw": "none",
        "single": False, "wants_icw4": False, "level_triggered": False, "icw3": 0, "auto_eoi": False,
        "rotate_on_auto_eoi": False, "special_nested": False, "special_mask": False, "read_isr": False, "poll": False,
    },
    pit.PitState: {
        "counters": [COUNTER, COUNTER, {**COUNTER, "gate": False}], "portb": 0, "irq0": False, "next_edge": None,
    },
    # MC146818: register A 32768 Hz, 1024 Hz; B 24 hours; D the battery was good
    rtc.RtcState: {
        "index": 0, "nmi_masked": False, "ram": "00" * 10 + "26020080" + "00" * 114, "second_ns": 0, "settled_ns": 0,
    },
    # PC16550D, table 1: all low after master reset but IIR 01, LSR 60, MSR X0: our far end has CTS, DSR and DCD up
    uart.UartState: {
        "ier": 0, "lcr": 0, "mcr": 0, "scr": 0, "divisor": 0, "fifo": False, "trigger": 0, "received": "",
        "overrun": False, "thr_empty": False, "msr": 0xB0, "host_input": "",
    },
    port92.Port92State: {"a20": False, "init_now": False},
    reset_control.ResetControlState: {"sys_rst": False, "rst_cpu": False, "full_rst": False},
    DebugconState: {},
    DebugExitState: {},
}  # fmt: skip


@pytest.mark.parametrize("cls", POWER_ON, ids=lambda cls: cls.__name__)
def test_power_on(cls):
    assert encode(cls()) == POWER_ON[cls]


def test_every_chip_is_here():
    assert {chip.device.State for chip in CHIPS} | {kind.device.State for kind in OURS} == POWER_ON.keys()
