"""Accesses to the board's devices as text, in the words of QEMU's qtest: what reproduces a finding about a device, here
and on `qemu-system-x86_64`.

    outb 0x70 0x0b
    inb 0x71
    clock_step 1000000

Known words: inb inw inl ADDRESS, outb outw outl ADDRESS VALUE, readb readw readl readq ADDRESS, writeb ... ADDRESS
VALUE, clock_step [NS] (without NS: to the next timer), clock_set NS. Empty lines and what follows a # are left out.
QEMU's own board is in vmm/qtest/qemu.py. Source: QEMU 7.2, softmmu/qtest.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from vmm.board.board import Board
from vmm.board.config import MachineConfig
from vmm.clock import GuestClock
from vmm.cpu.model import TSC_KHZ
from vmm.errors import RequestError

_SIZES = {"b": 1, "w": 2, "l": 4, "q": 8}
_WORDS = re.compile(r"(in|out|read|write)([bwlq])|(clock_step|clock_set)")
_MAX_EVENTS = 1_000_000  # between two commands
_LAST_NS = 1 << 55


@dataclass(frozen=True)
class Command:
    """One line. `op` is in, out, read, write, clock_step or clock_set; times in ns."""

    op: str
    size: int = 0
    address: int = 0
    value: int | None = None

    def __str__(self) -> str:
        if self.op.startswith("clock"):
            return self.op if self.value is None else f"{self.op} {self.value}"
        word = self.op + {size: letter for letter, size in _SIZES.items()}[self.size]
        return f"{word} {self.address:#x}" + ("" if self.value is None else f" {self.value:#x}")


def parse(text: str) -> Iterator[tuple[int, Command]]:
    """Line numbers and commands. Raises RequestError, naming the line."""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            yield number, _command(words)
        except ValueError:
            raise RequestError(f"line {number}: not a qtest command known here: {line.strip()[:60]!r}") from None


def _command(words: list[str]) -> Command:
    match = _WORDS.fullmatch(words[0])
    numbers = [int(word, 0) for word in words[1:]]
    if match is None or any(number < 0 for number in numbers) or not (numbers or match[3]):
        raise ValueError
    if match[3]:
        if len(numbers) > 1 or (match[3] == "clock_set" and not numbers) or max(numbers, default=0) > _LAST_NS:
            raise ValueError
        return Command(match[3], value=numbers[0] if numbers else None)
    op, size = match[1], _SIZES[match[2]]
    if op in ("in", "out") and (size == 8 or numbers[0] > 0xFFFF):
        raise ValueError
    address, *value = numbers
    if len(value) != (op in ("out", "write")) or address >> 48:
        raise ValueError
    return Command(op, size, address, value[0] & (1 << 8 * size) - 1 if value else None)


class Player(Protocol):
    """What commands can be given to. Its clock has ticks of so many ns."""

    tick_ns: int

    def play(self, command: Command) -> int | None: ...  # what a read answered


class OurBoard:
    """Our board with nobody on it: no CPU, no RAM; time moves when it is told to."""

    tick_ns = 1

    def __init__(self, config: MachineConfig | None = None) -> None:
        self.clock = GuestClock(TSC_KHZ)
        self.board = Board(config or MachineConfig(), self.clock)
        self.board.power_on()

    def play(self, command: Command) -> int | None:
        bus, value = self.board.bus, command.value or 0
        match command.op:
            case "in":
                return bus.port_in(command.address, command.size)
            case "out":
                bus.port_out(command.address, command.size, value)
            case "read":
                return bus.mmio_read(command.address, command.size)
            case "write":
                bus.mmio_write(command.address, command.size, value)
            case "clock_step":
                deadline = self.board.alarms.next_ns
                now = self.clock.now_ns()
                self._run_to(now + command.value if command.value is not None else deadline or now)
            case "clock_set":
                self._run_to(value)
        self.board.alarms.expire_due(self.clock.now_ns())
        return None

    def at_a_time(self, command: Command, tick_ns: int) -> Command:
        """A command that moves the clock, as one that moves it by whole ticks, the next timer's time known."""
        if not command.op.startswith("clock"):
            return command
        now, ns = self.clock.now_ns(), command.value
        if ns is None:
            ns = (self.board.alarms.next_ns or now) - now
        elif command.op == "clock_set":
            ns = max(0, ns - now)
        return Command("clock_step", value=-(-ns // tick_ns) * tick_ns)

    def _run_to(self, when_ns: int) -> None:
        """Every event on the way happens at its own time."""
        for _ in range(_MAX_EVENTS):
            deadline = self.board.alarms.next_ns
            if deadline is None or deadline > when_ns:
                break
            self.clock.skip_to(deadline)
            self.board.alarms.expire_due(self.clock.now_ns())
        self.clock.skip_to(min(when_ns, _LAST_NS))


@dataclass(frozen=True)
class Difference:
    """The first answer that differs."""

    at: int  # which command, from 0
    command: Command
    ours: int
    theirs: int

    def __str__(self) -> str:
        return f"{self.command}: {self.ours:#x} here, {self.theirs:#x} there"


def compare(commands: Iterable[Command], ours: OurBoard, theirs: Player) -> Difference | None:
    """Play the same to both, with times that both can keep."""
    for at, given in enumerate(commands):
        command = ours.at_a_time(given, theirs.tick_ns)
        here, there = ours.play(command), theirs.play(command)
        if here is not None and there is not None and here != there:
            return Difference(at, command, here, there)
    return None
