"""The engine's insides: refused when they are another build's."""

from __future__ import annotations

import ctypes
import mmap
import re

import pytest
import unicorn

from emu import engine as engine_module
from emu import layout
from emu.instruction import length_behind
from vmm.errors import BackendError
from vmm.ram import Shown

UNSEEN = {
    "error_code", "exception_is_int", "exception_next_eip", "vm_vmcb",
    *(name for name in engine_module._ENV if "intercept" in name),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(engine_module._ENV))
def test_another_layout_is_refused(monkeypatch, name):
    """By the field's name, but where the API cannot show it, and the engine itself is lost."""
    monkeypatch.setitem(engine_module._ENV, name, engine_module._ENV[name] + 8)
    how = "does not run as it should" if name in UNSEEN else "laid out as 2.1.4's" + f": {name}" * (name != "uc")
    with pytest.raises(BackendError, match=f"{re.escape(how)}{'' if name in UNSEEN else '$'}"):
        layout.check_running.__wrapped__()


def test_where_no_memory_is_it_reads_ones():
    engine = layout.checked_engine()
    assert engine.read_physical(1 << 38, 5) == b"\xff" * 5
    engine.close()


def test_a_window_is_where_it_was_moved_to_and_nowhere_else():
    """RAM of a device's, shown in the hole; where it was devices answer again, and no other memory is given up."""
    engine, seen = layout.checked_engine(), []
    ram = mmap.mmap(-1, 1 << 20)
    ram[:4] = b"main"
    there = ctypes.addressof(ctypes.c_char.from_buffer(ram))

    def answer(address, size):
        seen.append(address)
        return 0x5A5A5A5A5A5A5A5A & (1 << 8 * size) - 1

    engine.map_ram(0, 1 << 20, there)
    engine.map_hole(0xC000_0000, 0x4000_0000, answer, lambda *_: None)
    own = mmap.mmap(-1, 4096)
    own[:4] = b"shown"[:4]
    window = ctypes.addressof(ctypes.c_char.from_buffer(own))
    for base in (0xD000_0000, 0xD000_1000, 0xD400_0000, 0xD000_0000):
        engine.show_windows([Shown(base, 4096, window, True)])
        shown = {at: engine.read_physical(at, 4) for at in (0xD000_0000, 0xD000_1000, 0xD400_0000)}
        assert shown == {at: b"show" if at == base else b"ZZZZ" for at in shown}
        assert engine.read_physical(0, 4) == b"main"
    engine.show_windows([])
    assert engine.read_physical(0xD000_0000, 4) == b"ZZZZ" and seen
    engine.close()


@pytest.mark.parametrize(("code", "length"), [("cc", 1), ("ce", 1), ("cd05", 2), ("90cd03", 2), ("cdcd", 2)])
def test_what_is_behind_an_int(code, length):
    """Where its block is not known: INT3 and INTO are one byte long, INT n two."""
    engine = layout.checked_engine()
    ram = mmap.mmap(-1, 1 << 16)
    engine.map_ram(0, 1 << 16, ctypes.addressof(ctypes.c_char.from_buffer(ram)))
    ram[0x1000 : 0x1000 + len(code) // 2] = bytes.fromhex(code)
    engine.eip.value = 0x1000 + len(code) // 2
    assert length_behind(engine, 0) == length
    engine.close()


@pytest.mark.parametrize(
    ("code", "length"),
    [
        ("cc", 1),
        ("ce", 1),
        ("cd05", 2),
        ("66cd05", 3),
        ("b466cd05", 2),
        ("f0cd05", 3),
        ("8feacdf0", 2),
        ("8feacc", 1),
        ("48", 1),
    ],
)
def test_what_is_behind_an_int_of_a_known_block(code, length):
    """With its prefixes. Where the decoder sees a longer instruction (8F EA is POP to the engine, to it the beginning
    of an XOP instruction), without."""
    engine = layout.checked_engine()
    ram = mmap.mmap(-1, 1 << 16)
    engine.map_ram(0, 1 << 16, ctypes.addressof(ctypes.c_char.from_buffer(ram)))
    size = len(code) // 2
    ram[0x1000 : 0x1000 + size] = bytes.fromhex(code)
    engine.eip.value = 0x1000 + size
    assert length_behind(engine, size) == length
    engine.close()


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(unicorn, "__version__", "2.2.0")
    with pytest.raises(BackendError, match=r"needs unicorn 2\.1\.4, this is 2\.2\.0"):
        engine_module.Engine()


@pytest.mark.parametrize("refuse", [layout.check_running.__wrapped__, layout.checked_engine])
def test_a_refused_engine_is_closed(monkeypatch, refuse):
    """It has reserved a gibibyte."""
    layout.check_running()
    closed = []
    close = engine_module.Engine.close

    def count(engine):
        closed.append(engine)
        close(engine)

    monkeypatch.setattr(engine_module.Engine, "close", count)
    monkeypatch.setattr(layout, "_HFLAGS", 0)
    with pytest.raises(BackendError, match=r"laid out as 2\.1\.4's: hflags"):
        refuse()
    assert len(closed) == 1
