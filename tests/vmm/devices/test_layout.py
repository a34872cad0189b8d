"""Where the registers of each chip are: a second writing, from the datasheets' tables."""

from __future__ import annotations

import pytest

from vmm.testing.subject import Subject, chips

# By part and bank: offset, or offset+step*count of a family, and its accesses: r, w, rw of so many bytes, * of any.
UART = {"": "0 rw1; 1 rw1; 2 rw1; 3 rw1; 4 rw1; 5 r1; 6 r1; 7 rw1"}
PIC = {"": "0 rw1; 1 rw1", "elcr": "0 rw1"}
CONFIG = "0+1*100 rw*"
LAYOUT = {
    "pic0": PIC,
    "pic1": PIC,
    "pit": {"": "0+1*3 rw1; 3 w1", "portb": "0 rw1"},
    "rtc": {"": "0 w1; 1 rw1"},
    "i8042": {"": "0 rw1", "command": "0 rw1"},
    "com1": UART,
    "com2": UART,
    "com3": UART,
    "com4": UART,
    "port92": {"": "0 rw1"},
    "reset": {"": "0 rw4; 1 rw1"},
    "debugcon": {"": "0 rw1"},
    "biosdebug": {"": "0 rw1"},
    "debugexit": {"": "0 rw1 rw2 rw4"},
    "lapic.0": {"": "0+10*40 rw4"},
    "ioapic": {"": "0 rw4; 10 rw4"},
    "hpet": {
        "": "0 r4; 4 r4; 8 r4; c r4; 10 rw4; 14 r4; 18 r4; 1c r4; 20 rw4; 24 rw4; 28+4*32 r4; f0 rw4; f4 rw4; f8 r4; "
        "fc r4; 100+20*3 rw4; 104+20*3 r4; 108+20*3 rw4 rw8; 10c+20*3 rw4; 110+20*3 rw4; 114+20*3 rw4; 118+20*3 r4; "
        "11c+20*3 r4; 160+4*a8 r4"
    },
    "piix3": {"config": CONFIG, "reset": "0 rw1"},
    "pm": {
        "config": CONFIG,
        "apm": "0 rw1; 1 rw1",
        "pm": "0 rw2; 2 rw2; 4 rw2; 6 r2; 8+1*4 r*; c+2*4 r2; 18+2*2 r2; 1c+2*12 r2",
    },
    "host": {"config": CONFIG, "address": "0 rw4", "data": "0+1*4 rw*"},
    "fw_cfg": {"": "0 rw2; 1 rw1"},
}  # fmt: skip


def layout(part: str) -> dict[str, set[tuple[str, str]]]:
    """Bank: places and accesses, as in LAYOUT."""
    found: dict[str, set[tuple[str, str]]] = {}
    for register in Subject.named(part).device.registers:
        family = register.span
        place = f"{register.offset:x}" + (f"+{family.step:x}*{family.count:x}" if family is not None else "")
        found.setdefault(register.bank, set()).add((place, f"{register.kind[0]}{register.size or '*'}"))
    return found


def written(text: str) -> set[tuple[str, str]]:
    found = set()
    for entry in text.split("; "):
        place, *accesses = entry.split()
        for access in accesses:
            found |= {(place, kind + access.lstrip("rw")) for kind in access.rstrip("1248*")}
    return found


def test_every_part_is_here():
    assert LAYOUT.keys() == chips().keys()


@pytest.mark.parametrize("part", LAYOUT)
def test_registers_are_where_they_belong(part):
    assert layout(part) == {bank: written(text) for bank, text in LAYOUT[part].items()}
