"""ACPI tables of a PC, made from what it has, for a kernel that is started without a firmware.

Source: ACPI specification 6.4, chapter 5; IA-PC HPET specification 1.0a, 3.2.4; Multiple APIC description 5.2.12.

Of sleep states there is S5. ACPI is on from the start: there is no SMI command.
"""

from __future__ import annotations

import struct

from vmm.board.platform import Platform
from vmm.guest import aml

AT = 0xF_0000  # in memory: where a kernel looks for the root pointer, and what the memory map reserves
_OEM, _TABLE, _CREATOR = b"ANYHYV", b"ANYHYVE ", b"ANYH"
_ALIGN = 64
_FADT_BYTES = 276
_IO_SPACE, _MEMORY_SPACE = 1, 0  # of a generic address
_LEVEL_HIGH = 0xD  # MADT: flags of an interrupt that is level-triggered, active high
_FADT_FLAGS = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10  # WBINVD, C1, no sleep button, RTC not fixed, RESET_REG
_LEGACY, _KEYBOARD, _NO_VGA, _NO_ASPM = 1 << 0, 1 << 1, 1 << 2, 1 << 4  # IAPC_BOOT_ARCH


def tables(platform: Platform, at: int) -> bytes:
    """All tables as they are in memory from `at` on, a multiple of 64; the root pointer (RSDP) is first."""
    image = bytearray(_ALIGN)

    def put(table: bytes) -> int:
        image.extend(bytes(-len(image) % _ALIGN))
        where = at + len(image)
        image.extend(table)
        return where

    facs = put(struct.pack("<4sIIIIIB31x", b"FACS", 64, 0, 0, 0, 0, 2))
    entries = [put(fadt(platform, facs, put(dsdt(platform)))), put(madt(platform))]
    if platform.hpet is not None:
        entries.append(put(hpet(platform.hpet, platform.hpet_id)))
    rsdt = put(_table(b"RSDT", 1, struct.pack(f"<{len(entries)}I", *entries)))
    xsdt = put(_table(b"XSDT", 1, struct.pack(f"<{len(entries)}Q", *entries)))
    root = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, rsdt, 36, xsdt, 0))
    root[8] = _checksum(root[:20])
    root[32] = _checksum(root)
    image[: len(root)] = root
    return bytes(image)


def madt(platform: Platform) -> bytes:
    """Interrupt controllers: 8259As, local APICs, one I/O APIC."""
    entries = [struct.pack("<BBBBI", 0, 8, i, i, 1) for i in range(platform.cpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, 0, 0, platform.ioapic, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0))  # the 8254 is at INTIN2
    for irq in sorted({platform.sci, *platform.pirqs}):
        entries.append(struct.pack("<BBBBIH", 2, 10, 0, irq, irq, _LEVEL_HIGH))
    entries.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI is LINT1 of every CPU
    return _table(b"APIC", 4, struct.pack("<II", platform.lapic, 1) + b"".join(entries))


def hpet(base: int, id: int) -> bytes:
    """The event timers at `base`."""
    return _table(b"HPET", 1, struct.pack("<IBBBBQBHB", id, _MEMORY_SPACE, 64, 0, 0, base, 0, 128, 0))


def fadt(platform: Platform, facs: int, dsdt: int) -> bytes:
    """Fixed ACPI hardware, version 6."""
    body = bytearray(_FADT_BYTES - 36)

    def put(code: str, offset: int, *values: int) -> None:
        struct.pack_into("<" + code, body, offset - 36, *values)

    def register(offset: int, port: int, bits: int, access: int) -> None:
        put("BBBBQ", offset, _IO_SPACE, bits, 0, access, port)

    put("II", 36, facs, dsdt)
    put("H", 46, platform.sci)
    put("IIIIII", 56, platform.pm, 0, platform.pm + 4, 0, 0, platform.pm + 8)  # PM1a, PM1b, PM2, PM timer
    put("BBBB", 88, 4, 2, 0, 4)  # their lengths
    put("HH", 96, 0xFFFF, 0xFFFF)  # no C2, no C3
    put("B", 108, 0x32)  # the century in the RTC's memory
    put("H", 109, _LEGACY | _KEYBOARD | _NO_VGA | _NO_ASPM)
    put("I", 112, _FADT_FLAGS)
    register(116, platform.reset[0], 8, 1)
    put("B", 128, platform.reset[1])
    put("B", 131, 4)  # minor version
    put("QQ", 132, 0, dsdt)  # X_FIRMWARE_CTRL is 0 where FIRMWARE_CTRL is used (5.2.9)
    register(148, platform.pm, 32, 2)
    register(172, platform.pm + 4, 16, 2)
    register(208, platform.pm + 8, 32, 3)
    return _table(b"FACP", 6, bytes(body))


def dsdt(platform: Platform) -> bytes:
    """Devices, and how PCI interrupts go."""
    prt: list[aml.Value] = [
        (slot << 16 | 0xFFFF, pin, 0, platform.pirqs[slot - 1 + pin & 3]) for slot in platform.slots for pin in range(4)
    ]
    bridge = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", 0),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_numbers(0, 0xFF),
                aml.ports(0xCF8, 8),
                aml.port_range(0, 0xCF7),
                aml.port_range(0xD00, 0xFFFF),
                aml.memory_range(*platform.pci_memory),
            ),
        ),
        aml.name("_PRT", prt),
        aml.device("ISA", aml.name("_ADR", 1 << 16), *_isa(platform)),
    )
    timers = []
    if platform.hpet is not None:
        found = aml.resources(aml.memory(platform.hpet, 0x400, writable=False))
        timers = [aml.device("HPET", aml.name("_HID", aml.eisa_id("PNP0103")), aml.name("_CRS", found))]
    return _table(b"DSDT", 2, aml.name("_S5", (0, 0, 0, 0)) + aml.scope("_SB", bridge, *timers))


def _isa(platform: Platform) -> list[bytes]:
    devices = [
        ("RTC", "PNP0B00", (aml.ports(0x70, 2), aml.interrupt(8))),
        ("KBD", "PNP0303", (aml.ports(0x60, 1), aml.ports(0x64, 1), aml.interrupt(1))),
        ("MOU", "PNP0F13", (aml.interrupt(12),)),
    ]
    found = [
        aml.device(where, aml.name("_HID", aml.eisa_id(id)), aml.name("_CRS", aml.resources(*needs)))
        for where, id, needs in devices
    ]
    for number, (port, irq) in platform.serial.items():
        crs = aml.resources(aml.ports(port, 8), aml.interrupt(irq))
        id = aml.name("_HID", aml.eisa_id("PNP0501"))
        found.append(aml.device(f"COM{number}", id, aml.name("_UID", number), aml.name("_CRS", crs)))
    return found


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    head = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM, _TABLE, 1, _CREATOR, 1)
    table = bytearray(head + body)
    table[9] = _checksum(table)
    return bytes(table)
