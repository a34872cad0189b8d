"""A PCI function with a header of type 0.

Source: PCI Local Bus Specification 3.0, chapter 6.

A class says what the function is; its state has a field `pci` with what a guest can change. Where the windows of its
BARs lie follows from that alone.

    class Card(Function[CardState]):
        State = CardState
        vendor, device, class_code, pin = 0x1AF4, 0x1042, 0x010000, 1
        bars = {0: Bar(0x1000, {"common": 0, "notify": 0x800})}
        capabilities = (Msix(vectors=2, bar=1),)

Absent
* Parity and SERR#; the latency timer and BIST, which read 0.
* A BAR at address 0, or one that ends with its space, is nowhere, as on QEMU's PC.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from snapshot.field_types import Size, u8, u16, u32
from snapshot.schema import state
from vmm.device import Device
from vmm.devices.pci import header
from vmm.devices.pci.header import Field
from vmm.registers import ANY, reads, span, writes
from vmm.wires import Dma, Line, Msi, Placement

_IO, _MEMORY, _MASTER, _INTX_OFF = 0x001, 0x002, 0x004, 0x400
_COMMAND = 0x507  # with SERR# enable, which can be written and does nothing
_INTERRUPT_STATUS, _CAPABILITIES_LIST = 0x08, 0x10
_FIRST_CAPABILITY = 0x40
_BARS, _ROM = 0x10, 0x30
_ROM_ENABLE = 1
S = TypeVar("S")


@state("pci.function", version=1)
class FunctionState:
    """What a guest can change in a configuration header of type 0."""

    command: Annotated[u16, "command register"] = 0
    bars: Annotated[tuple[u32, ...], Size(6), "base addresses, without the bits that say what they are"] = (0,) * 6
    rom: Annotated[u32, "expansion ROM's base address, with its enable bit"] = 0
    cache_line: Annotated[u8, "cache line size"] = 0
    interrupt_line: Annotated[u8, "interrupt line"] = 0
    interrupt: Annotated[bool, "an interrupt is asked for, by INTx where there is no better"] = False


@dataclass(frozen=True)
class Bar:
    """A window of `size` bytes, a power of two, that shows these banks, {bank: offset}: among the ports (`io`), or in
    memory, with an address of 64 bits (`wide`). `width` is that of the bus's window (vmm.bus)."""

    size: int
    banks: Mapping[str, int]
    io: bool = False
    wide: bool = False
    prefetchable: bool = False
    width: int = 4

    @property
    def kind(self) -> int:
        """The low bits that cannot be written (6.2.5.1)."""
        return 1 if self.io else self.wide << 2 | self.prefetchable << 3

    def base(self, low: int, high: int) -> int | None:
        """Where registers that hold this put it; None for nowhere."""
        base = low | high << 32 if self.wide else low
        end = 1 << (16 if self.io else 64 if self.wide else 32)
        return base if base and base + self.size < end else None


class Capability:
    """Part of the list of capabilities: `size` bytes, the id and the pointer to the next among them."""

    id: ClassVar[int]
    size: int

    def fields(self, at: int) -> Iterator[Field]:
        """What is behind the two first bytes, for one that begins at offset `at`."""
        yield from ()


class Function(Device[S]):
    """Base of PCI functions. `intx` is its interrupt pin; without a `dma` it masters nothing."""

    vendor: ClassVar[int] = 0xFFFF
    device: ClassVar[int] = 0xFFFF
    subsystem: ClassVar[tuple[int, int]] = (0, 0)  # vendor, device
    class_code: ClassVar[int] = 0xFF0000  # class, subclass, programming interface
    revision: ClassVar[int] = 0
    status: ClassVar[int] = 0  # bits that always read so
    commands: ClassVar[int] = _COMMAND  # bits of the command register that can be written
    many: bool = False  # the device has more functions than this, its first: whoever puts them on a bus says so
    pin: ClassVar[int] = 0  # 1 for INTA
    bars: ClassVar[Mapping[int, Bar]] = {}
    rom: ClassVar[Bar | None] = None
    windows: ClassVar[tuple[Bar, ...]] = ()  # those that its own fields put somewhere, and no BAR
    capabilities: ClassVar[tuple[Capability, ...]] = ()
    space: ClassVar[header.Space]  # all of it
    own: ClassVar[tuple[Field, ...]] = ()  # the function's own fields, behind the header

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.space = header.Space.of([*_header(cls), *_listed(cls.capabilities), *cls.own])

    def __init__(self, place: Placement, intx: Line, msi: Msi, dma: Dma) -> None:
        super().__init__()
        self._place, self._intx = place, intx
        self._send = msi
        self.dma: Dma = _Mastered(self, dma)

    # --- configuration space

    @reads(span(0, header.SIZE), size=ANY, bank="config")
    def read_config(self, offset: int, size: int) -> int:
        return self.space.read(self, offset, size)

    @writes(span(0, header.SIZE), size=ANY, bank="config")
    def write_config(self, offset: int, size: int, value: int) -> None:
        self.space.write(self, offset, size, value)

    # --- what it does to others

    @property
    def masters(self) -> bool:
        """Whether it may read and write memory of its own accord (command register, bit 2)."""
        return bool(self._pci.command & _MASTER)

    def interrupt(self, level: bool) -> None:
        """Ask for the function's interrupt, or no longer."""
        self._pci.interrupt = level
        self.drive_intx()

    def message(self, address: int, data: int) -> None:
        """Send a message-signalled interrupt, if it may write memory."""
        if self.masters:
            self._send(address, data)

    def signals(self) -> bool:
        """Whether interrupts go by messages now, and not by INTx."""
        return any(capability.signals(self) for capability in self.capabilities if isinstance(capability, Signalling))

    def drive_intx(self) -> None:
        p = self._pci
        self._intx(bool(self.pin) and p.interrupt and not p.command & _INTX_OFF and not self.signals())

    # --- where its banks lie

    @property
    def _pci(self) -> FunctionState:
        pci: FunctionState = self.state.pci  # type: ignore[attr-defined]
        return pci

    def places(self) -> dict[str, int | None]:
        """Each bank of a BAR, and its address; None for nowhere."""
        p, found = self._pci, dict[str, int | None]()
        for index, bar in self.bars.items():
            seen = p.command & (_IO if bar.io else _MEMORY)
            base = bar.base(p.bars[index], p.bars[index + 1] if bar.wide else 0) if seen else None
            found |= {bank: None if base is None else base + offset for bank, offset in bar.banks.items()}
        if self.rom is not None:
            seen = p.command & _MEMORY and p.rom & _ROM_ENABLE
            base = self.rom.base(p.rom & ~_ROM_ENABLE, 0) if seen else None
            found |= {bank: None if base is None else base + offset for bank, offset in self.rom.banks.items()}
        return found

    @classmethod
    def all_windows(cls) -> tuple[Bar, ...]:
        return *cls.bars.values(), *((cls.rom,) if cls.rom is not None else ()), *cls.windows

    def place(self) -> None:
        for bank, base in self.places().items():
            self._place(bank, base)

    def reset(self) -> None:
        """RESET#, or a function-level reset."""
        self.state = self.State()
        self.restored()

    def restored(self) -> None:
        self.place()
        self.drive_intx()


class Signalling(Capability):
    """A capability that makes messages of interrupts."""

    def signals(self, function: Function[Any]) -> bool:
        """Whether it is enabled."""
        raise NotImplementedError


class _Mastered:
    """RAM as the function sees it while it may master the bus."""

    def __init__(self, function: Function[Any], dma: Dma) -> None:
        self._function, self._dma = function, dma

    def view(self, address: int, size: int) -> memoryview | None:
        return self._dma.view(address, size) if self._function.masters else None

    def write(self, address: int, data: bytes) -> bool:
        return self._function.masters and self._dma.write(address, data)


# --- the header's fields (figure 6-1)


def _header(cls: type[Function[Any]]) -> Iterator[Field]:
    yield Field.fixed(0x00, 2, cls.vendor)
    yield Field.fixed(0x02, 2, cls.device)
    yield Field(0x04, 2, lambda f: f._pci.command, cls.commands, _put_command)
    yield Field(0x06, 2, _status)
    yield Field.fixed(0x08, 4, cls.class_code << 8 | cls.revision)
    yield Field(0x0C, 1, lambda f: f._pci.cache_line, 0xFF, lambda f, value: _put(f, "cache_line", value))
    yield Field(0x0E, 1, lambda f: f.many << 7)
    for index, bar in cls.bars.items():
        yield _bar(index, bar.kind, -bar.size)
        if bar.wide:
            yield _bar(index + 1, 0, -bar.size >> 32)
    yield Field.fixed(0x2C, 4, cls.subsystem[0] | cls.subsystem[1] << 16)
    if cls.rom is not None:
        mask = -cls.rom.size & 0xFFFF_F800 | _ROM_ENABLE
        yield Field(_ROM, 4, lambda f: f._pci.rom & mask, mask, _put_rom)
    yield Field.fixed(0x34, 1, _FIRST_CAPABILITY if cls.capabilities else 0)
    yield Field(0x3C, 1, lambda f: f._pci.interrupt_line, 0xFF, lambda f, value: _put(f, "interrupt_line", value))
    yield Field.fixed(0x3D, 1, cls.pin)


def _bar(index: int, kind: int, mask: int) -> Field:
    mask &= 0xFFFF_FFFF

    def put(function: Function[Any], value: int) -> None:
        bars = function._pci.bars
        function._pci.bars = (*bars[:index], value & mask, *bars[index + 1 :])
        function.place()

    return Field(_BARS + 4 * index, 4, lambda f: f._pci.bars[index] & mask | kind, mask, put)


def _status(function: Function[Any]) -> int:
    p = function._pci
    return function.status | p.interrupt * _INTERRUPT_STATUS | bool(function.capabilities) * _CAPABILITIES_LIST


def _put(function: Function[Any], name: str, value: int) -> None:
    setattr(function._pci, name, value)


def _put_command(function: Function[Any], value: int) -> None:
    function._pci.command = value
    function.place()
    function.drive_intx()


def _put_rom(function: Function[Any], value: int) -> None:
    function._pci.rom = value
    function.place()


def _listed(capabilities: tuple[Capability, ...]) -> Iterator[Field]:
    """The list of capabilities (6.7), each at a multiple of four."""
    at = _FIRST_CAPABILITY
    for i, capability in enumerate(capabilities):
        following = at + (capability.size + 3 & ~3)
        last = i + 1 == len(capabilities)
        yield Field.fixed(at, 2, capability.id | (0 if last else following) << 8)
        yield from capability.fields(at)
        at = following
