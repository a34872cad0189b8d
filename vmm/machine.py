"""The machine: one CPU, RAM and a board; and the run loop.

machine = Machine.boot(MachineConfig(memory_bytes=256 << 20), image)
machine.run(until="login:")
machine.save(path)
other = Machine.restore(path)
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import blake3

from snapshot import canon
from snapshot.chain import Chain
from snapshot.container import Parent
from snapshot.schema import encode, lower, schema_of
from snapshot.writer import Writer
from vmm import backends
from vmm.board import Board
from vmm.boot import Image
from vmm.boot import load as load_image
from vmm.clock import ClockState, GuestClock
from vmm.config import MachineConfig
from vmm.cpu import Cpu, Crashed, Expired, Halted, Kicked, Reached, Shutdown
from vmm.devices import rtc
from vmm.errors import BackendError, GuestError
from vmm.ram import Ram
from vmm.saved import Saved, admit, host_memory, map_ram
from vmm.scrub import Scrub

__all__ = ["Fault", "Machine", "MachineConfig", "Stop", "Stopped"]

_MOST_NS = 1 << 55  # guest time fits 56 bits: 2.3 years; half of it may be slept through
_SLICE_NS = 20_000_000  # how long the CPU may run before the loop looks around


@dataclass(frozen=True)
class Stopped:
    """The run ended: `reason` is one of position, pattern, reset, exit, triple fault, halted, command."""

    reason: str
    status: int = 0


@dataclass(frozen=True)
class Fault:
    """The CPU backend could not go on."""

    rip: int
    why: str


Stop = Stopped | Fault


class Machine:
    """One PC. Not thread-safe, but for `post()`."""

    def __init__(self, config: MachineConfig, backend: str, ram: Ram) -> None:
        self.config = config
        self.backend = backend
        self.ram = ram
        self.clock = GuestClock(config.tsc_khz)
        self.board = Board(self.clock, self)
        self._open = True
        self._scrub: Scrub | None = None
        self.pace_real = False
        self.awaits_input = False  # somebody may type: an idle guest with no timer is not at its end
        self._image: Image | None = None
        self._commands: queue.SimpleQueue[Callable[[Machine], Stop | None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._real_zero: float | None = None
        self.cpu: Cpu = backends.factory(backend)(ram, self.board.bus, self.board.pics, self.clock)
        self.board.console.on_match = self.attention
        self.board.restored()

    # --- making one

    @classmethod
    def boot(cls, config: MachineConfig, image: Image, backend: str = "emu") -> Machine:
        """A fresh machine with the guest loaded. Raises GuestError or BackendError."""
        machine = cls(config, backend, Ram.fresh(config.memory_bytes))
        machine._image = image
        machine._start(image)
        return machine

    @classmethod
    def restore(
        cls,
        path: Path,
        backend: str = "emu",
        *,
        verify: bool = False,
        max_memory: int | None = None,
        allow: Collection[str] = (),
    ) -> Machine:
        """A paused machine from a snapshot, or from a chain of them. Nothing is created before the structure and state
        of every file have been checked; RAM contents only with `verify`, else while the machine runs. `max_memory`
        bytes of RAM are accepted, by default as much as the host has. `allow` names what may differ from what was
        saved: "tsc-rate". Raises SnapshotError or BackendError."""
        chain = Chain(path, max_ram=host_memory() if max_memory is None else max_memory)
        try:
            saved = admit(Saved.decode(chain), backend, allow)
            if verify:
                chain.verify_ram()
            machine = cls(saved.config, backend, Ram(map_ram(chain)))
            try:
                machine.assign(saved)
            except BaseException:
                machine.close()
                raise
        except BaseException:
            chain.close()
            raise
        if verify:
            chain.close()
        else:
            machine._scrub = Scrub(chain, machine.attention)
        return machine

    @staticmethod
    def check(path: Path, backend: str = "emu", *, max_memory: int | None = None, allow: Collection[str] = ()) -> None:
        """Raises what `restore` would raise, SnapshotError or BackendError, and makes nothing."""
        with Chain(path, max_ram=host_memory() if max_memory is None else max_memory) as chain:
            admit(Saved.decode(chain), backend, allow)

    def _start(self, image: Image) -> None:
        below = min(self.config.memory_bytes, self.ram.regions[0].size)
        self.board.devices["rtc"].state = rtc.power_on(self.config.epoch_ns, below, self.config.memory_bytes - below)
        self.cpu.load(load_image(image, self.ram))

    def assign(self, saved: Saved) -> None:
        """Make all state but RAM that of `saved`, whose pieces it then owns."""
        self.clock.load(saved.clock)
        self.board.state = saved.board
        for name, device in self.board.devices.items():
            device.state = saved.devices[name]
        self.cpu.load(saved.cpu)
        self.board.restored()

    # --- running

    def run(self, *, position: int | None = None, until: str | None = None) -> Stop:
        """Run until the guest stops, `position` is reached (at the first instruction boundary not before it), the
        console shows the regular expression `until`, or a posted command says so. Raises SnapshotError when the RAM
        the machine was woken with turns out to be damaged."""
        cpu, board, clock = self.cpu, self.board, self.clock
        cpu.stop_at(position)
        board.console.watch(until)
        while (stop := self._drain()) is None:
            deadline = board.next_deadline()
            budget = _SLICE_NS if deadline is None else min(_SLICE_NS, deadline - clock.now_ns())
            match cpu.run(budget):
                case Expired() | Kicked():
                    pass
                case Reached():
                    return Stopped("position")
                case Halted(interruptible):
                    if (stop := self._idle(interruptible, deadline)) is not None:
                        return stop
                case Shutdown():
                    return Stopped("triple fault")
                case Crashed(rip, why):
                    return Fault(rip, why)
                case unreachable:
                    assert_never(unreachable)
            board.expire_due()
            if self.pace_real:
                self._hold_back()
        return stop

    def post(self, command: Callable[[Machine], Stop | None]) -> None:
        """From any thread: run `command` at the next boundary; a Stop it returns ends the run."""
        self._commands.put(command)
        self._wake.set()
        self.attention()

    def send(self, data: bytes) -> None:
        """Type `data` at the console, at the next boundary."""

        def receive(machine: Machine) -> None:
            uart: Any = machine.board.devices["com1"]
            rest = data[uart.receive(data) :]
            if rest:
                machine.send(rest)  # the UART's queue is full: the host holds the rest back

        self.post(receive)

    def _drain(self) -> Stop | None:
        """The only safe point. Inside a block nothing may change: the block is finished first."""
        if self._scrub is not None:
            self._scrub.check()
        if self.clock.prepaid:
            return None
        for _ in range(self._commands.qsize()):
            if (stop := self._commands.get()(self)) is not None:
                return stop
        if self.board.state.request != "none":
            request, self.board.state.request = self.board.state.request, "none"
            return Stopped(request, self.board.state.exit_status)
        if self.board.console.found:
            self.board.console.found = False
            return Stopped("pattern")
        return None

    def _idle(self, interruptible: bool, deadline: int | None) -> Stop | None:
        """The CPU halted: time skips to the next event."""
        if not interruptible:
            return Stopped("halted")
        if deadline is None:
            if not self.awaits_input:
                return Stopped("halted") if self._commands.empty() else None
            self._wake.wait(0.05)
            self._wake.clear()
            return None
        if self.pace_real and self._wait_real(deadline):
            return None
        self.clock.skip_to(deadline)
        return None

    def _wait_real(self, deadline: int) -> bool:
        """Sleep until `deadline` in wall time; True when a command came first."""
        ahead = (deadline - self._real_now_ns()) / 1e9
        if ahead <= 0:
            return False
        if not self._wake.wait(min(ahead, 1.0)):
            return ahead > 1.0
        self._wake.clear()
        self.clock.skip_to(min(deadline, self._real_now_ns()))
        return True

    def _hold_back(self) -> None:
        ahead = (self.clock.now_ns() - self._real_now_ns()) / 1e9
        if ahead > 0:
            time.sleep(min(ahead, 0.05))

    def _real_now_ns(self) -> int:
        now = time.monotonic()
        if self._real_zero is None:
            self._real_zero = now - self.clock.now_ns() / 1e9
        return int((now - self._real_zero) * 1e9)

    # --- the board's host

    def intr(self, level: bool) -> None:
        self.cpu.intr(level)

    def set_a20(self, enabled: bool) -> None:
        self.cpu.set_a20(enabled)

    def post_writes(self, port: int, on: bool) -> None:
        self.cpu.post_writes(port, on)

    def attention(self) -> None:
        self.cpu.kick()

    # --- state

    @property
    def position(self) -> int:
        return self.clock.position

    def parts(self) -> dict[str, Any]:
        """Every declared state by its part name, in the file's order. Changes nothing."""
        return {
            "config": self.config,
            "board": self.board.state,
            "clock": self.clock.save(),
            "cpu.0": self.cpu.save(),
            **{name: device.state for name, device in self.board.devices.items()},
        }

    def can_save(self, path: Path, parent: Path | None = None) -> None:
        """Raises what `save` would raise as far as it can be told now: SnapshotError, BackendError."""
        if not path.parent.is_dir():
            raise BackendError(f"cannot save to {path}: {path.parent} is not a folder")
        if not os.access(path.parent, os.W_OK):
            raise BackendError(f"cannot save to {path}: permission denied")
        if parent is not None:
            Chain.for_child(parent, path, self._layout()).close()

    def _layout(self) -> list[tuple[str, int, int]]:
        return [(region.name, region.base, region.size) for region in self.ram.regions]

    def save(
        self,
        path: Path,
        *,
        packed: bool = False,
        parent: Path | None = None,
        versions: Mapping[str, int] | None = None,
    ) -> None:
        """Write a snapshot; `path` is replaced only by a whole new one. `packed` packs RAM with zstd. With `parent`, a
        snapshot in the same folder, only the blocks of RAM that differ from its are written. `versions` (by state name)
        writes what an older release reads. Raises SnapshotError for a parent that cannot be one or a state an older
        version cannot say, BackendError when the host cannot write; the machine is unchanged either way."""
        if self._scrub is not None:
            self._scrub.wait()
        parts = self.parts()
        if versions is not None:
            parts = {name: lower(value, versions.get(schema_of(type(value)).name, 0)) for name, value in parts.items()}
        known: list[dict[int, bytes]] = []
        identity = b""
        if parent is not None:
            with Chain.for_child(parent, path, self._layout()) as chain:
                known = [chain.digests(i) for i in range(len(chain.rams))]
                identity = chain.identity
        try:
            with Writer(path) as writer:
                for name, value in parts.items():
                    writer.part(name, value)
                if parent is not None:
                    writer.base(Parent(identity, parent.name))
                for i, region in enumerate(self.ram.regions):
                    before = known[i] if known else None
                    writer.ram(region.name, region.base, region.view, region.touched(), packed=packed, parent=before)
                writer.commit()
        except OSError as error:
            raise BackendError(f"cannot save to {path}: {error.strerror or error}") from None

    def reset(self) -> None:
        """Start the guest again, as after power-on. Raises GuestError for a machine that was restored."""
        if self._image is None:
            raise GuestError("a restored machine has no kernel to start again from")
        for region in self.ram.regions:
            region.view[:] = bytes(region.size)
            self.cpu.discard_code(region.base, region.base + region.size)
        self.clock.load(ClockState())
        self.board.reset()
        self._start(self._image)

    def catch_up(self, wall_ns: int | None = None) -> None:
        """Let the time pass that the machine missed: its wall clock then shows `wall_ns` (Unix ns), by default this
        computer's. Raises BackendError when that is more than guest time can hold."""
        now = time.time_ns() if wall_ns is None else wall_ns
        missed = now - self.config.epoch_ns - self.clock.now_ns()
        if missed >= _MOST_NS - self.clock.now_ns():
            raise BackendError(f"the guest's clock is {missed / 86_400e9:.0f} days behind: too long to catch up with")
        self.clock.skip(max(0, missed))

    def digests(self) -> dict[str, Any]:
        """BLAKE3 of RAM, CPU and each device, for comparing two machines."""
        parts = self.parts()
        ram = blake3.blake3()
        for region in self.ram.regions:
            ram.update(region.view)

        def digest(value: Any) -> str:
            return blake3.blake3(canon.encode(encode(value))).hexdigest()[:32]

        return {
            "ram": ram.hexdigest()[:32],
            "cpu": digest(parts["cpu.0"]),
            "devices": {name: digest(value) for name, value in parts.items() if name not in ("config", "cpu.0")},
        }

    def exits(self) -> dict[str, int]:
        """How often the CPU left the guest's code, by reason."""
        return self.cpu.exits()

    def close(self) -> None:
        if self._open:
            self._open = False
            if self._scrub is not None:
                self._scrub.leave()
            self.cpu.close()
            self.ram.close()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
