"""Firmware configuration: items, files, and their ends."""

from __future__ import annotations

import struct

import pytest

from vmm.board.slot import Fixed
from vmm.bus import Bus
from vmm.devices.fw_cfg import CPUS, DIRECTORY, ID, MOST_CPUS, NO_GRAPHIC, RAM_SIZE, SIGNATURE, FwCfg
from vmm.testing import Rig, check_device
from vmm.testing.rig import wiring

FILES = {"etc/e820": b"map", "bootorder": b"", "opt/x": bytes(range(256))}
BUILD = wiring(FwCfg, {"items": Fixed({CPUS: struct.pack("<H", 4)}), "files": Fixed(FILES)})


@pytest.fixture
def read():
    """`read(key, size)`."""
    bus = Bus()
    bus.ports.window(BUILD(Rig())).map(0x510)

    def read(key: int, size: int) -> bytes:
        bus.port_out(0x510, 2, key)
        return bytes(bus.port_in(0x511, 1) for _ in range(size))

    return read


def test_any_guest():
    check_device(BUILD)


def test_where_a_firmware_looks():
    """QEMU, docs/specs/fw_cfg.rst and include/standard-headers/linux/qemu_fw_cfg.h."""
    keys = SIGNATURE, ID, RAM_SIZE, NO_GRAPHIC, CPUS, MOST_CPUS, DIRECTORY
    assert keys == (0x00, 0x01, 0x03, 0x04, 0x05, 0x0F, 0x19)


def test_items(read):
    assert read(SIGNATURE, 4) == b"QEMU" and read(ID, 4) == b"\1\0\0\0" and read(CPUS, 2) == b"\4\0"
    assert read(SIGNATURE, 6) == b"QEMU\0\0", "zeros behind its end"
    assert read(0x4000 | CPUS, 2) == b"\4\0", "for writing, which nothing is"
    assert read(0x8000, 4) == read(0x7777, 4) == bytes(4), "an item of another architecture is not item 0"


def test_files(read):
    (count,) = struct.unpack(">I", read(DIRECTORY, 4))
    entries = read(DIRECTORY, 4 + 64 * count)[4:]
    found = {}
    for i in range(count):
        size, key, _, name = struct.unpack(">IHH56s", entries[64 * i :][:64])
        found[name.rstrip(b"\0").decode()] = read(key, size)
    assert found == FILES and list(found) == sorted(FILES)


def test_a_name_that_does_not_fit():
    with pytest.raises(ValueError, match="at most"):
        FwCfg({}, {"x" * 56: b""})
