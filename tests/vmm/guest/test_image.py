"""Kernels that are damaged, cut or lie: GuestError in one line, in bounded time and memory."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import struct
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot.container import MAGIC
from tests.conftest import DEBIAN
from vmm.errors import GuestError
from vmm.guest.image import Image, load
from vmm.ram import Ram

MEMORY = 16 << 20


def bzimage() -> bytearray:
    """The smallest that loads: boot protocol 2.12, one setup sector, a payload of a page."""
    kernel = bytearray(1024 + 4096)
    kernel[0x1F1] = 1
    kernel[0x202:0x206] = b"HdrS"
    struct.pack_into("<I", kernel, 0x1F4, 4096 // 16)
    struct.pack_into("<H", kernel, 0x206, 0x20C)
    struct.pack_into("<I", kernel, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<H", kernel, 0x236, 1)
    struct.pack_into("<QI", kernel, 0x258, 0x100000, 0x2000)
    return kernel


def elf() -> bytearray:
    """A segment of code, and a note with the entry of PVH."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x100000)
    head = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, 62, 1, 0x100000, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )
    code = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, 0x100000, 0x100000, 0x100, 0x1000, 0x1000)
    notes = struct.pack("<IIQQQQQQ", 4, 4, 0x800, 0, 0, len(note), len(note), 4)
    file = bytearray(0x1100)
    file[: len(head + code + notes)] = head + code + notes
    file[0x800 : 0x800 + len(note)] = note
    return file


KERNELS = {"bzImage": bzimage(), "ELF": elf()}
HEADERS = {"bzImage": range(0x1F0, 0x290), "ELF": range(0, 64 + 2 * 56)}
EDGES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)


@pytest.mark.parametrize("kind", KERNELS)
def test_the_sound_ones_load(kind):
    load(Image(bytes(KERNELS[kind])), Ram.fresh(MEMORY))


@st.composite
def damaged(draw, kind):
    """Changed where it counts, with values at which arithmetic ends; then perhaps cut."""
    kernel = bytearray(KERNELS[kind])
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.sampled_from(HEADERS[kind]))
        size = draw(st.sampled_from((1, 2, 4, 8)))
        value = draw(st.sampled_from(EDGES) | st.integers(0, (1 << 64) - 1)) & (1 << 8 * size) - 1
        kernel[at : at + size] = value.to_bytes(size, "little")
    if draw(st.booleans()):
        del kernel[draw(st.integers(0, len(kernel))) :]
    return bytes(kernel)


@given(
    data=st.data(), kind=st.sampled_from(sorted(KERNELS)), initrd=st.binary(max_size=100), cmdline=st.text(max_size=50)
)
def test_a_damaged_kernel(data, kind, initrd, cmdline):
    image = Image(data.draw(damaged(kind)), initrd, cmdline)
    ram = Ram.fresh(MEMORY)
    tracemalloc.start()
    try:
        state = load(image, ram)
        assert state.rip < 1 << 32
    except GuestError as error:
        assert len(str(error).splitlines()) == 1
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        ram.close()
    assert most < 4 << 20


@pytest.mark.parametrize("kind", [1, 4])
def test_many_headers_do_not_make_much_work(kind):
    """65535 segments, or notes, each of the whole file: 64 GiB to copy, or 6 thousand million notes to look at."""
    kernel = bytearray(5 << 20)
    kernel[:64] = elf()[:64]
    struct.pack_into("<H", kernel, 56, 0xFFFF)
    header = struct.pack("<IIQQQQQQ", kind, 4, 4 << 20, 0, 0x200000, 1 << 20, 1 << 20, 0)
    kernel[64 : 64 + 56 * 0xFFFF] = header * 0xFFFF
    with pytest.raises(GuestError, match="segments are more than the file"):
        load(Image(bytes(kernel)), Ram.fresh(MEMORY))


def test_a_file_of_any_size(monkeypatch, tmp_path):
    (tmp_path / "large").touch()
    monkeypatch.setattr("snapshot.files.MAX_FILE", 1 << 20)
    os.truncate(tmp_path / "large", 1 << 40)
    with pytest.raises(GuestError, match="more than 1 MiB"):
        Image.from_files(tmp_path / "large")


@pytest.mark.parametrize("words", ["\ud800", "a\0b", "x" * 2048])
@pytest.mark.parametrize("kind", KERNELS)
def test_a_command_line_that_cannot_be_one(kind, words):
    with pytest.raises(GuestError, match="command line"):
        load(Image(bytes(KERNELS[kind]), cmdline=words), Ram.fresh(MEMORY))


@pytest.mark.parametrize(
    "path", ["", "/", "\0", "\ud800", "x" * 256, "/x" * 3000, "/proc/self/mem", "/dev/zero", "/dev/tty"]
)
def test_what_is_no_file(path):
    with pytest.raises(GuestError):
        Image.from_files(Path(path))


def test_a_fifo_is_no_kernel(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(GuestError, match="not a regular file"):
        Image.from_files(tmp_path / "fifo")


@pytest.mark.debian
@pytest.mark.parametrize("name", ["vmlinuz", "vmlinux"])
def test_a_real_kernel_cut(debian, name):
    """The last hundredth is a signature, or symbols."""
    kernel = (DEBIAN / name).read_bytes()
    whole = Ram.fresh(256 << 20)
    load(Image(kernel[: len(kernel) - len(kernel) // 100]) if name == "vmlinux" else Image(kernel), whole)
    whole.close()
    for size in [*range(0, 0x400, 37), *range(0x400, len(kernel) // 2, len(kernel) // 20)]:
        ram = Ram.fresh(256 << 20)
        with pytest.raises(GuestError):
            load(Image(kernel[:size]), ram)
        ram.close()


@given(st.data(), st.sampled_from(sorted(KERNELS)))
def test_a_kernel_cut_short(data, kind):
    size = data.draw(st.integers(0, len(KERNELS[kind]) - 1))
    with pytest.raises(GuestError):
        load(Image(bytes(KERNELS[kind][:size])), Ram.fresh(MEMORY))


def _elf(**fields: int) -> bytes:
    """Of another kind, machine, class or byte order; or with another first header."""
    file = elf()
    order = ">" if fields.get("order") == 2 else "<"
    struct.pack_into(f"{order}HH", file, 16, fields.get("kind", 2), fields.get("machine", 62))
    file[4], file[5] = fields.get("bits", 2), fields.get("order", 1)
    struct.pack_into("<I", file, 64, fields.get("first", 1))
    return bytes(file)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (bytes(0x38) + b"ARM\x64" + bytes(0x200), "it is an ARM64 kernel"),
        (gzip.compress(bytes(elf())), "it is packed with gzip: unpack it first"),
        (b"070701" + bytes(200), "an initial RAM disk.*--initrd takes it"),
        (MAGIC + bytes(200), "`anyhyve restore` wakes it"),
        (b"#!/bin/sh\n", "a script"),
        (b"MZ" + bytes(0x300), "a program for UEFI"),
        (_elf(machine=183), "for ARM64, not for x86-64"),
        (_elf(machine=3, bits=1), "for 32-bit x86, not for x86-64"),
        (_elf(machine=22, order=2), "for S/390, not for x86-64"),
        (_elf(machine=9999), "for machine 9999 of the ELF standard"),
        (_elf(kind=1), "such as a kernel module"),
        (_elf(kind=3), "a program or a library"),
        (_elf(first=3), "a program for an operating system"),
        (b"\x7fELF", "cut short"),
        (b"", "the kernel is an empty file"),
    ],
)
def test_what_is_no_kernel_of_ours(kernel, words):
    with pytest.raises(GuestError, match=words):
        load(Image(kernel), Ram.fresh(MEMORY))


def test_a_program_of_this_computer():
    with pytest.raises(GuestError, match="no kernel we can boot"):
        load(Image(Path(sys.executable).read_bytes()), Ram.fresh(MEMORY))


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("initrd", [0, 1, 5000, 3 << 20])
def test_too_little_memory_says_how_much_is_needed(kind, initrd):
    """And with that it loads."""
    image = Image(bytes(KERNELS[kind]), bytes(initrd))
    struct.pack_into("<I", big := bytearray(image.kernel), 0x260, 0x280000)
    if kind == "bzImage":
        image = replace(image, kernel=bytes(big))
    with pytest.raises(GuestError, match=r"needs? \d+M of memory, the machine has 1M") as refused:
        load(image, Ram.fresh(1 << 20))
    needed = int(re.findall(r"(\d+)M of memory", str(refused.value))[0])
    with contextlib.suppress(GuestError):  # the kernel fits; what the two need is said next
        load(image, Ram.fresh(needed << 20))
        return
    with pytest.raises(GuestError, match=r"kernel and initrd need \d+M of memory") as refused:
        load(image, Ram.fresh(needed << 20))
    needed = int(re.findall(r"(\d+)M of memory", str(refused.value))[0])
    load(image, Ram.fresh(needed << 20))


def test_code_that_does_not_fit():
    with pytest.raises(GuestError, match="the code needs 3M of memory, the machine has 2M"):
        load(Image(bytes((1 << 20) + 1), flat=True), Ram.fresh(2 << 20))
