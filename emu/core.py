"""What a machine's emulated CPUs share: one engine, on which one of them is at a time.

A CPU that is not on it is bytes: its registers as the engine has them (emu.engine.Kept). Putting one on costs a few
microseconds, and a guest's translations of addresses, which are forgotten. Translated code is all CPUs': what one
writes another must not run as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from emu import layout, msr
from emu.asked import OnEngine
from emu.engine import Kept
from emu.hooks import Hooks
from emu.native import replaced
from vmm.clock import BYTES_PER_NS, GuestClock, Word
from vmm.cpu import model as cpu_model
from vmm.cpu.protocol import IoBus
from vmm.ram import Ram

_EXCEPTIONS, _TSC_OFFSET, _TSC_SCALE = Word.EXCEPTIONS.value, Word.TSC_OFFSET.value, Word.TSC_SCALE.value


class Sharing(OnEngine, Protocol):
    """A CPU that shares an engine. `kept` and what follows are its own while it is not on that."""

    paused: Callable[[], None] | None  # called at each PAUSE
    kept: Kept
    tsc_offset: int
    counts: dict[str, int]
    exceptions: int


class Core:
    """The engine over a machine's RAM, its hooks, and `on`, the CPU that is on it."""

    def __init__(self, first: Sharing, ram: Ram, bus: IoBus, clock: GuestClock, native: bool) -> None:
        if native:
            replaced.replace()
        self.on = first
        self.kicked = self._closed = False
        self.engine = engine = layout.checked_engine()
        self.words = clock.words
        self.words[_EXCEPTIONS] = 0
        self.words[_TSC_SCALE] = (clock.tsc_khz << 32) // (BYTES_PER_NS * 1_000_000)
        self._ram, self._ram_shown = ram, ram.changes
        self.hooks = hooks = Hooks(engine, clock, bus, self)
        engine.hide_features(cpu_model.CPUID[1][2], cpu_model.CPUID[1][3])
        for region in ram.regions:
            engine.map_ram(region.base, region.size, region.address)
        for base, size in ram.holes(1 << cpu_model.PHYS_BITS):
            engine.map_hole(base, size, hooks.mmio_read, hooks.mmio_write)
        engine.show_windows(ram.shown())
        engine.intercept(hooks.acknowledge, msr.BASES)
        hooks.install(native=native)
        self.new = engine.kept_registers()  # what a CPU begins with

    def put_on(self, cpu: Sharing) -> None:
        """Have this CPU on the engine."""
        if cpu is self.on:
            return
        self._swap(cpu)
        self.engine.settle_down()
        self.engine.flush_tlb()

    @contextmanager
    def shown(self, cpu: Sharing) -> Iterator[None]:
        """Context manager: its registers are the engine's, to be read. Nothing is forgotten."""
        before = self.on
        if cpu is before:
            yield
            return
        self._swap(cpu)
        try:
            yield
        finally:
            self._swap(before)

    def _swap(self, cpu: Sharing) -> None:
        words, counts, gone = self.words, self.hooks.counts, self.on
        self.engine.swap_registers(gone.kept, cpu.kept)
        gone.tsc_offset, words[_TSC_OFFSET] = words[_TSC_OFFSET], cpu.tsc_offset
        gone.exceptions, words[_EXCEPTIONS] = words[_EXCEPTIONS], cpu.exceptions
        gone.counts = counts.copy()
        counts.update(cpu.counts)
        self.on = cpu
        self.engine.intercept_pauses(cpu.paused is not None)

    def ram_changed(self) -> bool:
        """Whether the RAM shows itself otherwise than the engine knows."""
        return self._ram_shown != self._ram.changes

    def show_windows(self) -> None:
        self._ram_shown = self._ram.changes
        self.engine.show_windows(self._ram.shown())

    def close(self) -> None:
        """Free the engine, once."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def ticks(self) -> int:
        """Guest time in ticks of a time-stamp counter."""
        return self.words[Word.TIME] * self.words[_TSC_SCALE] >> 32
