"""The machine: one CPU, RAM and a board; and the run loop.

machine = Machine.boot(MachineConfig(memory_bytes=256 << 20), image)
machine.run(until="login:")
machine.save(path)
other = Machine.restore(path)
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, assert_never

import blake3

from snapshot import canon
from snapshot.chain import Chain
from snapshot.container import Parent
from snapshot.schema import encode, schema_of
from snapshot.versions import lower
from snapshot.writer import Writer
from vmm.board.board import Board
from vmm.board.config import MachineConfig
from vmm.clock import ClockState, GuestClock
from vmm.cpu import backends
from vmm.cpu.protocol import Cpu, Crashed, Expired, Halted, Kicked, Reached, Shutdown
from vmm.devices import rtc
from vmm.errors import BackendError, GuestError
from vmm.guest.image import Image
from vmm.guest.image import load as load_image
from vmm.machine.moment import Mark
from vmm.ram import Ram
from vmm.saving.checkpoint import Checkpoint, Fill, write
from vmm.saving.saved import Saved, admit, host_memory, map_ram
from vmm.saving.scrub import Scrub
from vmm.testing.roundtrip import RoundTrips

__all__ = ["Fault", "Machine", "MachineConfig", "Stop", "Stopped"]

_MOST_NS = 1 << 55  # guest time fits 56 bits: 2.3 years; half of it may be slept through
_SLICE_NS = 20_000_000  # how long the CPU may run before the loop looks around


@dataclass(frozen=True)
class Stopped:
    """The run ended: `reason` is one of position, time, pattern, reset, exit, triple fault, halted, command."""

    reason: str
    status: int = 0


@dataclass(frozen=True)
class Fault:
    """The CPU backend could not go on."""

    rip: int
    why: str


Stop = Stopped | Fault
Command = Callable[["Machine"], Stop | None]


class Machine:
    """One PC. Not thread-safe, but for `post()`."""

    roundtrip_ns: ClassVar[int | None] = None  # of every machine: saved, and gone on from the file, so often

    def __init__(self, config: MachineConfig, backend: str, ram: Ram) -> None:
        self.config = config
        self.backend = backend
        self.ram = ram
        self.clock = GuestClock(config.tsc_khz)
        self.board = Board(self.clock, self)
        self._open = True
        self._scrub: Scrub | None = None
        self._mark: Mark | None = None
        self._trips = None if self.roundtrip_ns is None else RoundTrips(self.roundtrip_ns)
        self._position: int | None = None  # what the run is for
        self._until_ns: int | None = None
        self._past_exits: dict[str, int] = {}  # of CPUs it had before
        self.pace_real = False
        self.awaits_input = False  # somebody may type: an idle guest with no timer is not at its end
        self.image: Image | None = None  # what `reset` starts from
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._next: Command | None = None  # taken from the queue, not done yet
        self._typed = bytearray()
        self._real_zero: float | None = None
        self.cpu: Cpu = backends.factory(backend)(ram, self.board.bus, self.board.pics, self.clock)
        self.board.console.on_match = self.attention
        self.board.restored()

    # --- making one

    @classmethod
    def boot(cls, config: MachineConfig, image: Image, backend: str = "emu") -> Machine:
        """A fresh machine with the guest loaded. Raises GuestError or BackendError."""
        machine = cls(config, backend, Ram.fresh(config.memory_bytes))
        machine.image = image
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

    def go_on_from(self, path: Path) -> None:
        """Be the machine in a snapshot, which was saved here: a new CPU, new RAM, every state as it was read. Only the
        host's ends stay: consoles, what was typed, what was posted. At a safe point only. Raises as `restore` does,
        and then nothing has changed."""
        chain = Chain(path)
        try:
            saved = admit(Saved.decode(chain), self.backend)
            ram = Ram(map_ram(chain))
        except BaseException:
            chain.close()
            raise
        self._leave()
        self._past_exits = self.exits()
        before = self.cpu, self.ram
        self.board.unplug()
        self.ram = ram
        self.cpu = backends.factory(self.backend)(ram, self.board.bus, self.board.pics, self.clock)
        self.assign(saved)
        self.cpu.stop_at(self._position)
        self._scrub = Scrub(chain, self.attention)
        self.attention()  # a kick may have gone to the CPU before
        for gone in before:
            gone.close()

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

    def run(
        self,
        *,
        position: int | None = None,
        until: str | None = None,
        since: int | None = None,
        until_ns: int | None = None,
    ) -> Stop:
        """Run until the guest stops, `position` is reached (at the first instruction boundary not before it), a line
        the console goes on to show has the regular expression `until` (in what was written after the first `since`
        bytes, by default from now on), guest time is `until_ns`, or a posted command says so. Raises SnapshotError
        when the RAM the machine was woken with turns out to be damaged."""
        self.aim(position, until, until_ns, since=since)
        return self.go_on()

    def aim(
        self,
        position: int | None = None,
        until: str | None = None,
        until_ns: int | None = None,
        *,
        since: int | None = None,
    ) -> None:
        """What `go_on` runs for, however often a command stops it on the way: see `run`."""
        self._position, self._until_ns = position, until_ns
        self.cpu.stop_at(position)
        self.board.console.watch(until, since)

    def go_on(self) -> Stop:
        """Run towards what was aimed at."""
        board, clock = self.board, self.clock
        while (stop := self._drain()) is None:
            deadline = board.next_deadline()
            if self._until_ns is not None and (deadline is None or self._until_ns < deadline):
                deadline = self._until_ns
            budget = _SLICE_NS if deadline is None else min(_SLICE_NS, deadline - clock.now_ns())
            if self._trips is not None:
                budget = min(budget, self._trips.left_ns(clock.now_ns()))
            match self.cpu.run(budget):
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

    def stand(self) -> Stop:
        """Do not run: only do what is posted, until that says stop."""
        while (stop := self._obey()) is None:
            self._await_command(None)
        self._real_zero = None  # the time that passed was not the guest's
        return stop

    def post(self, command: Command) -> None:
        """From any thread, or a signal handler: run `command` at the next boundary; a Stop it returns ends the run."""
        self._commands.put(command)
        self.attention()

    def send(self, data: bytes) -> None:
        """From any thread: type `data` at the console, from the next boundary on."""
        self._typed.extend(data)
        self.post(lambda _: None)

    def drop_typed(self) -> None:
        """Forget what was typed and has not reached the serial port yet."""
        self._typed.clear()

    @property
    def typed(self) -> int:
        """How many characters typed have not reached the serial port yet."""
        return len(self._typed)

    def _drain(self) -> Stop | None:
        """The only safe point. Inside a block nothing may change: the block is finished first."""
        if self._scrub is not None:
            self._scrub.check()
        if self.clock.prepaid:
            return None
        if (stop := self._obey()) is not None:
            return stop
        if self._typed:
            uart: Any = self.board.devices["com1"]
            del self._typed[: uart.receive(bytes(self._typed))]
        if self.board.state.request != "none":
            request, self.board.state.request = self.board.state.request, "none"
            return Stopped(request, self.board.state.exit_status)
        if self.board.console.found:
            self.board.console.found = False
            return Stopped("pattern")
        if self._until_ns is not None and self.clock.now_ns() >= self._until_ns:
            return Stopped("time")
        if self._trips is not None:
            self._trips.at_safe_point(self)
        return None

    def _obey(self) -> Stop | None:
        """Do what was posted up to now."""
        for _ in range(self._commands.qsize() + (self._next is not None)):
            command, self._next = self._next or self._commands.get(), None
            if (stop := command(self)) is not None:
                return stop
        return None

    def _await_command(self, timeout_s: float | None) -> bool:
        """Sleep; True when a command came."""
        if self._next is None:
            try:
                self._next = self._commands.get(timeout=timeout_s)
            except queue.Empty:
                return False
        return True

    def _idle(self, interruptible: bool, deadline: int | None) -> Stop | None:
        """The CPU halted: time skips to the next event."""
        if not interruptible:
            return Stopped("halted")
        if deadline is None:
            if not self.awaits_input:
                return Stopped("halted") if self._commands.empty() else None
            self._await_command(0.05)
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
        if not self._await_command(min(ahead, 1.0)):
            return ahead > 1.0
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

    def encoded_parts(self) -> dict[str, tuple[str, int, Any]]:
        """Every part's schema, version and state, as a snapshot has them. Changes nothing."""
        parts = self.parts().items()
        return {name: (schema_of(type(v)).name, schema_of(type(v)).version, encode(v)) for name, v in parts}

    def touched_bytes(self) -> int:
        """How much RAM may hold other bytes than zero."""
        return sum(end - start for region in self.ram.regions for start, end in region.touched())

    def can_save(self, path: Path, parent: Path | None = None) -> None:
        """Raises what `save` would raise as far as it can be told now: SnapshotError, BackendError."""
        if not path.parent.is_dir():
            raise BackendError(f"cannot save to {path}: {path.parent} is not a folder")
        if not os.access(path.parent, os.W_OK):
            raise BackendError(f"cannot save to {path}: permission denied")
        if path.exists() and not path.stat().st_mode & 0o222:
            raise BackendError(f"cannot save to {path}: the file there is read-only")
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
        write(path, self._filling(path, packed, parent, versions))

    def checkpoint(
        self,
        path: Path,
        *,
        packed: bool = False,
        parent: Path | None = None,
        versions: Mapping[str, int] | None = None,
    ) -> Checkpoint:
        """As `save`, but the machine may run on at once: what is written is its state at this instant."""
        fill = self._filling(path, packed, parent, versions)
        touched = self.touched_bytes()
        return Checkpoint(path, fill, touched if packed or parent else 2 * touched)  # hashed when packed, else after

    def _filling(self, path: Path, packed: bool, parent: Path | None, versions: Mapping[str, int] | None) -> Fill:
        """What writes the machine as it is now, without asking it again but for its RAM."""
        self.await_checked()
        parts, ram = self.parts(), self.ram

        def fill(writer: Writer) -> None:
            for name, value in parts.items():
                wanted = None if versions is None else versions.get(schema_of(type(value)).name, 0)
                writer.part(name, value if wanted is None else lower(value, wanted))
            known: list[dict[int, bytes]] = []
            if parent is not None:
                with Chain.for_child(parent, path, self._layout()) as chain:
                    known = [chain.digests(i) for i in range(len(chain.rams))]
                    writer.base(Parent(chain.identity, parent.name))
            for i, region in enumerate(ram.regions):
                before = known[i] if known else None
                writer.ram(region.name, region.base, region.view, region.touched(), packed=packed, parent=before)

        return fill

    def await_checked(self) -> None:
        """Until the RAM the machine was woken with has been checked: damaged RAM must not be given new digests. From
        any thread. Raises SnapshotError when it is damaged."""
        if self._scrub is not None:
            self._scrub.wait()

    def mark(self) -> None:
        """Remember this moment for `reset`. Raises SnapshotError, BackendError."""
        self._unmark()
        self._mark = Mark(self)

    @property
    def marked(self) -> Mark | None:
        """What `reset` goes back to."""
        return self._mark

    def reset(self, *, verify: bool = False) -> int:
        """Back to the moment of `mark`: how many bytes of RAM had been written since. With `verify` all is compared
        with how it was then, and AssertionError names what differs."""
        assert self._mark is not None, "no mark to go back to"
        written = self._mark.reset()
        if verify and (found := self._mark.differences()):
            raise AssertionError(f"after the reset differ: {', '.join(found[:8])}")
        return written

    @property
    def closed(self) -> bool:
        return not self._open

    def _unmark(self) -> None:
        if self._mark is not None:
            self._mark.close()
            self._mark = None

    def restart(self) -> None:
        """Start the guest again, as after power-on. Raises GuestError for a machine that was restored, unless it was
        given an `image`."""
        if self.image is None:
            raise GuestError("a restored machine has no kernel to start again from")
        for region in self.ram.regions:
            for start, end in region.touched():
                region.view[start:end] = bytes(end - start)
            self.cpu.discard_code(region.base, region.base + region.size)
        self.clock.load(ClockState())
        self.board.reset()
        self._start(self.image)

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
        return {reason: count + self._past_exits.get(reason, 0) for reason, count in self.cpu.exits().items()}

    def close(self) -> None:
        if self._open:
            self._open = False
            self._leave()
            self.cpu.close()
            self.ram.close()

    def _leave(self) -> None:
        """Give up what is known of the RAM."""
        if self._scrub is not None:
            self._scrub.leave()
            self._scrub = None
        self._unmark()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
