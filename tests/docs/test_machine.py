"""docs/machine.md has the board, the memory and the CPU that there are."""

from __future__ import annotations

import importlib
import inspect
import re
import time

import pytest

from tests.conftest import ROOT
from vmm.board import kinds
from vmm.board.board import BOARDS, slots
from vmm.board.config import DEFAULT_EPOCH_NS, MachineConfig
from vmm.board.slot import Irq
from vmm.board.slot import Slot as SlotOfBoard
from vmm.clock import BYTES_PER_NS
from vmm.cpu import model
from vmm.guest import image
from vmm.guest.debian import kernel_files
from vmm.ram import HOLE_END, HOLE_START, Ram

TEXT = (ROOT / "docs" / "machine.md").read_text()


def table(head):
    """The rows of the table whose head begins so."""
    rows = re.search(rf"^\| {re.escape(head)} .*\n\|[-|]+\n((?:\|.*\n)*)", TEXT, re.M)
    assert rows is not None, head
    return rows[1].splitlines()


CHIPS: dict[str, SlotOfBoard] = {slot.id: slot for name in ("pc", "isapc") for slot in slots(MachineConfig(board=name))}


def places(slot):
    """Where a chip's banks are, and its place on the PCI bus."""
    spans = [(at.base, at.base + slot.device.banks[at.bank].size - 1) for at in slot.at]
    found = [f"{first:#x}" if first == last else f"{first:#x}-{last:#x}" for first, last in spans]
    if slot.function is not None:
        found.append(f"slot {slot.function >> 3}.{slot.function & 7}")
    return ", ".join(found)


def said(device):
    """The first line of a device's file, and the file."""
    module = importlib.import_module(device.__module__)
    return str(module.__doc__).splitlines()[0].rstrip("."), device.__module__.replace(".", "/") + ".py"


def board():
    for slot in CHIPS.values():
        irqs = ", ".join(str(lead.number) for lead in slot.wires.values() if isinstance(lead, Irq))
        chip, file = said(slot.device)
        there = [name for name in BOARDS if slot.id in {other.id for other in slots(MachineConfig(board=name))}]
        yield f"| {slot.id} | {chip} | {places(slot)} | {irqs} | {', '.join(there)} | {file} |"


def devices():
    for kind in kinds.OURS:
        yield f"| {kind.name} | {kind.doc} | {kind.place or f'{kind.space}=ADDRESS'} |"


def e820():
    kinds_of = {1: "RAM", 2: "reserved"}
    for base, size, kind in sorted(image.memory_map(Ram.fresh(4 << 30))):
        yield f"| {base:#x} | {base + size:#x} | {kinds_of[kind]} |"


@pytest.mark.parametrize(("head", "rows"), [("id", board), ("kind", devices), ("from", e820)])
def test_a_table_is_what_there_is(head, rows):
    assert table(head) == list(rows())


def test_every_chip_says_what_is_absent():
    for slot in CHIPS.values():
        assert "Absent" in (inspect.getmodule(slot.device).__doc__ or ""), slot.id


def test_where_a_guest_is_put():
    found = [int(row.split("|")[1], 16) for row in table("address")]
    assert found == [image._ZERO_PAGE, image._GDT, image._PAGE_TABLES, image._PVH_INFO, image._CMDLINE, image.FLAT_BASE]
    assert (HOLE_START, HOLE_END) == (3 << 30, 4 << 30)


def test_what_is_said_of_cpu_and_time():
    for words in (
        f"vendor `{model._VENDOR.decode()}`", f"brand `{model._BRAND.decode().rstrip(chr(0))}`",
        f"addresses have {model.PHYS_BITS} bits, linear ones {model.LINEAR_BITS}",
        f"a nanosecond for each {BYTES_PER_NS} bytes of code", f"at {model.TSC_KHZ // 10**6} GHz",
        time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(DEFAULT_EPOCH_NS / 1e9)),
    ):  # fmt: skip
        assert words in TEXT.replace("\n", " "), words


@pytest.mark.slow
def test_debians_kernel_has_what_is_named(tmp_path):
    from vmm.errors import GuestError

    try:
        kernel_files(tmp_path, ["boot/config-*"])
    except GuestError as error:
        pytest.skip(str(error))
    (config,) = tmp_path.glob("config-*")
    names = set(re.findall(r"CONFIG_\w+", "\n".join(table("option"))))
    assert len(names) > 10
    assert {name for name in names if f"\n{name}=y\n" not in config.read_text()} == set()
