"""The bus: who answers at which port or physical address.

Two spaces, ports and memory, of windows: a bank of a device's registers, `size` bytes at `base`. Windows can be mapped,
moved and removed at any time, also by the access that is under way; nothing a guest does to them raises.

Which register answers an access
* The window on top at its first byte, if the access lies within it and a register there has its offset and size.
* Otherwise it is taken apart from the low address on, each piece by the window on top at the piece's first byte.
  In a window of `width` 1 a piece is a byte, as the ISA bridge makes it. In one of width 4 or 8 a piece ends where the
  register around it ends: a read takes its bytes out of that whole register, a write is the whole register read,
  changed in those bytes, and written (bytes of one that cannot be read are zero). Where no register of the width is,
  pieces are bytes.
* What no register answers floats high when read, and is lost when written.

Which window is on top: the one that was made first, however they were moved since. So what a machine shows follows from
its state, and not from what happened before.

The hot way is one dict look-up and one bound method: what was worked out for (address, size) is kept until any window
of the space moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from vmm.device import Device

Reader = Callable[[], int]
Writer = Callable[[int], None]

_KEPT = 1 << 16  # ways worked out, before they are forgotten: a guest may read all of a large window


class Window:
    """One bank of a device in a space; nowhere until it is mapped. `base` is None while it is not."""

    def __init__(self, space: Space, device: Device[Any], bank: str, size: int | None, width: int) -> None:
        if width not in (1, 2, 4, 8):
            raise ValueError(f"a window's width is 1, 2, 4 or 8 bytes, not {width}")
        self.base: int | None = None
        self.device, self.bank, self.width = device, bank, width
        self._bank = device.banks[bank]
        self.size = self._bank.size if size is None else size
        self._space = space

    def map(self, base: int) -> None:
        """Put it at `base`, wherever it was before. What reaches beyond the space's end is not seen."""
        if base != self.base:
            self.base = base
            self._space.forget()

    def unmap(self) -> None:
        """Take it away, if it is there."""
        if self.base is not None:
            self.base = None
            self._space.forget()

    def find(self, kind: str, offset: int, size: int) -> Callable[..., Any] | None:
        """The register that answers, as a callable; None where there is none or it does not lie within the window."""
        if offset + size > self.size:
            return None
        return self._bank.find(self.device, kind, offset, size)

    def __repr__(self) -> str:
        where = "nowhere" if self.base is None else f"{self.base:#x}"
        return f"<{type(self.device).__name__} {self.bank or 'registers'}, {self.size} bytes at {where}>"


class Space:
    """Ports or memory: addresses from 0 to `end`. `readers` and `writers` are the ways worked out already, by
    address << 4 | size: one integer hash, no tuple built on the hot way. What lies in `beneath` is seen where no window
    of its own is."""

    def __init__(self, end: int, beneath: Space | None = None) -> None:
        self.end = end
        self.readers: dict[int, Reader] = {}
        self.writers: dict[int, Writer] = {}
        self._windows: list[Window] = []  # the one on top first
        self._beneath = beneath
        self._above: list[Space] = []
        if beneath is not None:
            beneath._above.append(self)

    def window(self, device: Device[Any], bank: str = "", *, size: int | None = None, width: int = 1) -> Window:
        """One more window, below all there are, mapped nowhere. `size` in bytes, by default to the end of the bank's
        last register. Raises KeyError for a bank the device does not have."""
        made = Window(self, device, bank, size, width)
        self._windows.append(made)
        return made

    def forget(self) -> None:
        """A window moved: every access is worked out anew."""
        self.readers.clear()
        self.writers.clear()
        for above in self._above:
            above.forget()

    def top(self, address: int) -> Window | None:
        """The window that is seen at `address`."""
        for window in self._windows:
            base = window.base
            if base is not None and base <= address < base + window.size:
                return window
        return None if self._beneath is None else self._beneath.top(address)

    # --- an access that was not worked out yet

    def read(self, address: int, size: int) -> int:
        reader = self._reader(address, size)
        if len(self.readers) >= _KEPT:
            self.readers.clear()
        self.readers[address << 4 | size] = reader
        return reader()

    def write(self, address: int, size: int, value: int) -> None:
        writer = self._writer(address, size)
        if len(self.writers) >= _KEPT:
            self.writers.clear()
        self.writers[address << 4 | size] = writer
        writer(value)

    def _reader(self, address: int, size: int) -> Reader:
        parts: list[tuple[Reader, int, int, int]] = []  # register, bits to its first byte, mask, place in the value
        floating = 0
        for piece in self._pieces("read", address, size):
            register = piece.register("read")
            if register is None:
                floating |= piece.mask << 8 * piece.at
            elif piece.length == piece.size == size:
                return register
            else:
                parts.append((register, 8 * piece.lane, piece.mask, 8 * piece.at))
        return partial(_gather, tuple(parts), floating)

    def _writer(self, address: int, size: int) -> Writer:
        parts: list[tuple[int, int, Writer]] = []  # place in the value, mask, register
        for piece in self._pieces("write", address, size):
            register = piece.register("write")
            if register is None:
                continue
            if piece.length == piece.size == size:
                return register
            if piece.length != piece.size:
                register = partial(_merge, piece.register("read"), register, 8 * piece.lane, piece.mask)
            parts.append((8 * piece.at, piece.mask, register))
        return partial(_scatter, tuple(parts))

    def _pieces(self, kind: str, address: int, size: int) -> Iterator[_Piece]:
        """The access taken apart, before its first register is touched."""
        at = 0
        while at < size:
            here = (address + at) % self.end
            window = self.top(here)
            piece = _Piece(at, 1) if window is None else _piece(window, kind, here - (window.base or 0), at, size)
            yield piece
            at += piece.length


class _Piece(NamedTuple):
    """`length` bytes of an access, from its byte `at` on: those from byte `lane` on of a register of `size` bytes at
    `offset` of a window. Without a window nothing is there."""

    at: int
    length: int
    window: Window | None = None
    offset: int = 0
    size: int = 1
    lane: int = 0

    @property
    def mask(self) -> int:
        return (1 << 8 * self.length) - 1

    def register(self, kind: str) -> Callable[..., Any] | None:
        return None if self.window is None else self.window.find(kind, self.offset, self.size)


def _piece(window: Window, kind: str, offset: int, at: int, size: int) -> _Piece:
    """The piece of an access that begins at `offset` of the window on top there."""
    if not at and window.find(kind, offset, size) is not None:
        return _Piece(at, size, window, offset, size)
    width = window.width
    lane = offset % width
    count = min(size - at, window.size - offset, width - lane)
    if window.find(kind, offset, count) is not None:
        return _Piece(at, count, window, offset, count)
    if window.find(kind, offset - lane, width) is not None:
        return _Piece(at, count, window, offset - lane, width, lane)
    return _Piece(at, 1, window, offset)


class Bus:
    """Port and memory-mapped I/O of one machine; with `machine`, as a CPU of it sees that, whose own windows in memory
    lie on top. Implements the CPU's `IoBus`."""

    def __init__(self, machine: Bus | None = None) -> None:
        self.ports: Space = Space(1 << 16) if machine is None else machine.ports
        self.memory: Space = Space(1 << 64, None if machine is None else machine.memory)
        self._readers, self._writers = self.ports.readers, self.ports.writers
        self._memory_readers, self._memory_writers = self.memory.readers, self.memory.writers

    def port_in(self, port: int, size: int) -> int:
        reader = self._readers.get(port << 4 | size)
        if reader is not None:
            return reader()
        return self.ports.read(port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        writer = self._writers.get(port << 4 | size)
        if writer is not None:
            writer(value)
        else:
            self.ports.write(port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        reader = self._memory_readers.get(address << 4 | size)
        if reader is not None:
            return reader()
        return self.memory.read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        writer = self._memory_writers.get(address << 4 | size)
        if writer is not None:
            writer(value)
        else:
            self.memory.write(address, size, value)


def _gather(parts: tuple[tuple[Reader, int, int, int], ...], floating: int) -> int:
    value = floating
    for register, shift, mask, place in parts:
        value |= (register() >> shift & mask) << place
    return value


def _scatter(parts: tuple[tuple[int, int, Writer], ...], value: int) -> None:
    for place, mask, take in parts:
        take(value >> place & mask)


def _merge(before: Reader | None, write: Writer, shift: int, mask: int, value: int) -> None:
    whole = 0 if before is None else before()
    write(whole & ~(mask << shift) | value << shift)
