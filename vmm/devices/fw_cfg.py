"""Firmware configuration: what a machine is made of, for its firmware to read.

Source: QEMU, docs/specs/fw_cfg. Files are wiring, made of the machine's config; only where the guest reads is state.

Absent: DMA; writes of files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated

from snapshot.field_types import u16, u32
from snapshot.schema import state
from vmm.device import Device
from vmm.registers import reads, writes

SIGNATURE, ID, RAM_SIZE, NO_GRAPHIC, CPUS, MOST_CPUS, DIRECTORY = 0x00, 0x01, 0x03, 0x04, 0x05, 0x0F, 0x19
_FIRST_FILE = 0x20
_WRITE = 0x4000  # a bit of the selector that is no part of the key
_NAME = 56  # bytes of a file's name, with a zero at its end


@state("fw_cfg", version=1)
class FwCfgState:
    """Firmware configuration."""

    selector: Annotated[u16, "key of the item"] = 0
    offset: Annotated[u32, "what is read next of it"] = 0


class FwCfg(Device[FwCfgState]):
    """Selector of two bytes at 0, data of one at 1. `items` by key; `files` by name, in a directory in the order
    of their names. Beyond an item's end zeros are read."""

    State = FwCfgState

    def __init__(self, items: Mapping[int, bytes], files: Mapping[str, bytes]) -> None:
        """Raises ValueError for a name that is too long."""
        super().__init__()
        if wrong := [name for name in files if len(name.encode()) >= _NAME]:
            raise ValueError(f"fw_cfg: {wrong[0]}: a name has {_NAME - 1} bytes at most")
        names = sorted(files)
        directory = struct.pack(">I", len(names)) + b"".join(
            struct.pack(f">IHH{_NAME}s", len(files[name]), _FIRST_FILE + i, 0, name.encode())
            for i, name in enumerate(names)
        )
        contents = {_FIRST_FILE + i: files[name] for i, name in enumerate(names)}
        self._items = {SIGNATURE: b"QEMU", ID: struct.pack("<I", 1), **items, DIRECTORY: directory, **contents}

    @reads(0, size=2)
    def read_selector(self) -> int:
        return 0

    @writes(0, size=2)
    def write_selector(self, value: int) -> None:
        self.state.selector, self.state.offset = value & ~_WRITE, 0

    @reads(1)
    def read_data(self) -> int:
        s = self.state
        item = self._items.get(s.selector, b"")
        if s.offset >= len(item):
            return 0
        s.offset += 1
        return item[s.offset - 1]

    @writes(1)
    def write_data(self, value: int) -> None:
        """Nothing can be written."""
