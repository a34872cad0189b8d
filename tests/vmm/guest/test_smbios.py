"""SMBIOS tables: found and walked as a kernel does it. What Debian reads of them is in test_debian_pc."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from vmm.guest import acpi, smbios
from vmm.ram import layout

# DSP0134 3.0: the length of the formatted area, by type.
LENGTHS = {0: 0x18, 1: 0x1B, 3: 0x16, 4: 0x30, 16: 0x17, 17: 0x28, 19: 0x1F, 32: 0x0B, 127: 4}


def walk(image: bytes) -> list[tuple[int, bytes, list[str]]]:
    """Type, formatted area and strings of each structure."""
    entry = image[:24]
    assert entry[:5] == b"_SM3_" and sum(entry) & 0xFF == 0 and entry[6] == 24 and entry[7:9] == b"\3\0"
    size, where = struct.unpack_from("<IQ", entry, 12)
    assert where == smbios.AT + 24 and size == len(image) - 24
    found, handles, at = [], set(), 24
    while at < len(image):
        kind, length, handle = struct.unpack_from("<BBH", image, at)
        assert handle not in handles
        handles.add(handle)
        end = image.index(b"\0\0", at + length)
        strings = image[at + length : end].decode().split("\0")
        found.append((kind, image[at : at + length], [text for text in strings if text]))
        at = end + 2
    return found


@given(st.integers(1, 64), st.integers(1, 1 << 26).map(lambda pages: 4096 * pages))
def test_they_are_well_formed(cpus, memory_bytes):
    memory = layout(memory_bytes)
    image = smbios.tables(cpus, memory, smbios.AT)
    found = walk(image)
    assert smbios.AT % 16 == 0 and smbios.AT + len(image) <= 1 << 20
    assert all(len(body) == LENGTHS[kind] for kind, body, _ in found)
    kinds = [kind for kind, _, _ in found]
    assert kinds.count(4) == cpus and kinds.count(19) == len(memory) and kinds[-1] == 127
    ranges = [struct.unpack_from("<QQ", body, 15) for kind, body, _ in found if kind == 19]
    assert ranges == [(base, base + size - 1) for base, size in memory]
    (device,) = (body for kind, body, _ in found if kind == 17)
    small, large = struct.unpack_from("<H", device, 12)[0], struct.unpack_from("<I", device, 28)[0]
    assert (large if small == 0x7FFF else small) == memory_bytes >> 20


def test_what_it_is_called():
    strings = {kind: text for kind, _, text in walk(smbios.tables(1, layout(1 << 28), smbios.AT))}
    assert strings[0] == ["anyhyve", "1", "01/01/2020"] and strings[1] == ["anyhyve", "anyhyve pc"]


def test_it_lies_beside_acpi():
    assert acpi.AT < smbios.AT
