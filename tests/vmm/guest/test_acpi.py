"""ACPI tables: well-formed by their checksums and pointers, and read by the compiler that others use."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.board.platform import Platform
from vmm.guest import acpi, aml
from vmm.guest.acpi import AT

PLATFORMS = {"one CPU": Platform(), "eight, no HPET": Platform(cpus=8, hpet=None, serial={4: (0x2E8, 3)}, pm=0xB000)}


def tables(platform: Platform) -> dict[str, bytes]:
    """Each table by its signature, found as a system finds it: by the root pointer."""
    image = acpi.tables(platform, AT)

    def table(at: int) -> bytes:
        (size,) = struct.unpack_from("<I", image, at - AT + 4)
        return image[at - AT : at - AT + size]

    root = image[:36]
    assert root[:8] == b"RSD PTR " and sum(root[:20]) & 0xFF == sum(root) & 0xFF == 0
    rsdt, xsdt = struct.unpack_from("<I4xQ", root, 16)
    entries = struct.unpack(f"<{(len(table(xsdt)) - 36) // 8}Q", table(xsdt)[36:])
    assert entries == struct.unpack(f"<{len(entries)}I", table(rsdt)[36:])
    found = [table(at) for at in (rsdt, xsdt, *entries)]
    (fadt,) = (each for each in found if each[:4] == b"FACP")
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert table(facs)[:4] == b"FACS" and facs % 64 == 0
    found.append(table(dsdt))
    for each in found:
        assert sum(each) & 0xFF == 0, each[:4]
    return {each[:4].decode(): each for each in found}


@pytest.mark.parametrize("name", PLATFORMS)
def test_what_there_is(name):
    platform = PLATFORMS[name]
    found = tables(platform)
    assert set(found) == {"RSDT", "XSDT", "FACP", "APIC", "DSDT"} | ({"HPET"} if platform.hpet else set())
    assert acpi.tables(platform, AT) == acpi.tables(platform, AT)
    at, kinds = 44, []
    while at < len(found["APIC"]):
        kinds.append(found["APIC"][at])
        at += found["APIC"][at + 1]
    assert at == len(found["APIC"]) and kinds.count(0) == platform.cpus and kinds.count(1) == 1


@pytest.mark.parametrize("name", PLATFORMS)
def test_iasl_reads_them(name, tmp_path):
    """Taken apart and put together again they are the same bytes, but for the compiler's name in them."""
    if shutil.which("iasl") is None:
        pytest.skip("no iasl here: acpica-tools has it")
    for signature, table in tables(PLATFORMS[name]).items():
        if signature in ("RSDT", "XSDT"):
            continue
        file = tmp_path / f"{signature}.aml"
        file.write_bytes(table)
        said = _iasl("-d", file)
        assert not re.search(r"(?i)error|warning|invalid", said), said
        said = _iasl("-p", tmp_path / "again", file.with_suffix(".dsl"))
        assert re.search(r"\b0 Errors", said) and re.search(r"\b0 Warnings", said), said
        assert (tmp_path / "again.aml").read_bytes()[36:] == table[36:], signature


def _iasl(*arguments: object) -> str:
    done = subprocess.run(["iasl", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", PLATFORMS)
def test_what_iasl_reads_is_what_the_platform_has(name, tmp_path):
    if shutil.which("iasl") is None:
        pytest.skip("no iasl here: acpica-tools has it")
    platform = PLATFORMS[name]
    source = _source(tables(platform)["DSDT"], tmp_path / "dsdt.aml")
    assert source.count("0x000AFFFF") == 4, "four pins of slot 10"
    for number, (port, _) in platform.serial.items():
        assert f"Device (COM{number})" in source and f"0x{port:04X}" in source
    assert ("PNP0103" in source) == (platform.hpet is not None)
    assert 'EisaId ("PNP0A03")' in source and "Name (_S5" in source


def _source(table: bytes, file: Path) -> str:
    file.write_bytes(table)
    _iasl("-d", file)
    return file.with_suffix(".dsl").read_text()


@given(st.integers(0, 1 << 20))
def test_a_length_counts_itself(size):
    body = aml.buffer(bytes(size))[1:]
    lead, more = body[0], body[0] >> 6
    length = lead & 0x3F if not more else lead & 15 | int.from_bytes(body[1 : 1 + more], "little") << 4
    assert length == len(body)


@pytest.mark.parametrize("wrong", ["", "ABCDE", "abc", "A.", "A-B", "\\"])
def test_what_is_no_name(wrong):
    with pytest.raises(ValueError, match="is no name"):
        aml.path(wrong)


@pytest.mark.parametrize("wrong", [-1, 1 << 64, [0] * 256])
def test_what_is_no_value(wrong):
    with pytest.raises(ValueError, match=r"integer|package"):
        aml.value(wrong)
