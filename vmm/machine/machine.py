"""The machine: CPUs, RAM and a board; run, saved and woken.

machine = Machine.boot(MachineConfig(memory_bytes=256 << 20), image)
machine.run(until="login:")
machine.save(path)
other = Machine.restore(path)
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import blake3

from snapshot import canon
from snapshot.chain import Chain
from snapshot.errors import SnapshotError
from snapshot.field_types import Json
from snapshot.schema import encode, schema_of
from vmm.board.board import Board
from vmm.board.config import MachineConfig, named
from vmm.clock import LAST_NS, ClockState, GuestClock
from vmm.cpu import backends, startup, validity
from vmm.cpu.protocol import Cpu, CpuState
from vmm.cpu.turns import Turns, TurnState
from vmm.errors import RequestError
from vmm.guest import acpi, smbios
from vmm.guest.image import Image
from vmm.guest.image import load as load_image
from vmm.guest.origin import KEY as ORIGIN
from vmm.guest.origin import Origin
from vmm.host.bindings import Bindings
from vmm.machine.moment import Moment, Moments
from vmm.machine.run import Goal, RunLoop
from vmm.machine.stop import Fault, Stop, Stopped, StopReason
from vmm.ram import Ram, layout
from vmm.saving.checkpoint import Checkpoint, write
from vmm.saving.parts import Part, parts_of
from vmm.saving.save import Contents, preflight
from vmm.saving.saved import Saved, admit, host_memory, map_ram
from vmm.saving.scrub import Scrub

__all__ = ["Fault", "Machine", "MachineConfig", "Stop", "StopReason", "Stopped", "made"]

Command = Callable[["Machine"], Stop | None]
made: list[Callable[[Machine], None]] = []  # called with each machine there will be, once it can run


class Machine:
    """One PC. Not thread-safe, but for `post()` and `send()`. `loop` says how it runs (vmm.machine.run)."""

    def __init__(
        self,
        config: MachineConfig,
        backend: str,
        ram: Ram,
        *,
        bind: Mapping[str, str] | None = None,
        make_cpu: backends.MakeCpu | None = None,
    ) -> None:
        """Of a machine that `boot` or `restore` then makes whole. `bind` says what is at the far ends of its parts
        (vmm.host.bindings); `make_cpu` is called instead of the backend's class. Raises RequestError, BackendError."""
        self.config = config
        self.backend = backend
        self.ram = ram
        self.clock = GuestClock(config.tsc_khz)
        self.board = Board(config, self.clock)
        self.image: Image | None = None  # what `restart` starts from
        self.origin: Origin | None = None  # what it was last started from, as snapshots tell it
        self._folder = Path()  # of the snapshot it was woken from
        self._make_cpu = make_cpu or backends.factory(backend)
        self._open = True
        self._scrub: Scrub | None = None
        self._past_exits: dict[str, int] = {}  # of CPUs it had before
        self._moments = Moments(self)
        self._bindings = Bindings(self.board.consoles, {} if bind is None else bind)
        try:
            self.cpus: tuple[Cpu, ...] = self._make_cpus(ram)
            self.turns = Turns(self.cpus, self.clock)
            self.loop = RunLoop(self.board, self.clock, self.cpus, self.turns, self._check)
            self.loop.awaits_input = self._bindings.takes_input
            self.board.attach(self.cpus, ram, self.turns.woken)
            self.board.restored()
            for hook in made:
                hook(self)
        except BaseException:
            self._bindings.close()
            raise

    # --- making one

    @classmethod
    def boot(
        cls,
        config: MachineConfig,
        image: Image,
        backend: str = "emu",
        *,
        bind: Mapping[str, str] | None = None,
        make_cpu: backends.MakeCpu | None = None,
    ) -> Machine:
        """A fresh machine with the guest loaded. Raises GuestError, RequestError or BackendError."""
        config = replace(config, devices=named(config.devices), bound=tuple(sorted(bind or ())))
        parts_of(config)  # nothing is made of a config that cannot be
        machine = cls(config, backend, Ram.fresh(config.memory_bytes), bind=bind, make_cpu=make_cpu)
        try:
            machine._start(image)
        except BaseException:
            machine.close()
            raise
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
        bind: Mapping[str, str] | None = None,
        make_cpu: backends.MakeCpu | None = None,
    ) -> Machine:
        """A paused machine from a snapshot, or from a chain of them. Nothing is created before the structure and state
        of every file have been checked; RAM contents only with `verify`, else while the machine runs. `max_memory`
        bytes of RAM are accepted, by default as much as the host has. `allow` names what may differ from what was
        saved: "tsc-rate". `bind` says what is at the far ends of its parts: each that had somebody there has to be
        given. Raises SnapshotError, RequestError (for a file that cannot be read, too) or BackendError."""
        path = Path(path)
        try:
            chain = Chain(path, max_ram=host_memory() if max_memory is None else max_memory)
        except OSError as error:
            raise RequestError(f"{error.filename or path}: {error.strerror or error}") from None
        try:
            saved = admit(Saved.decode(chain), backend, allow)
            _complete(saved.config, bind or {})
            saved = replace(saved, config=replace(saved.config, bound=tuple(sorted(bind or ()))))
            if verify:
                chain.verify_ram()
            machine = cls(saved.config, backend, Ram(map_ram(chain)), bind=bind, make_cpu=make_cpu)
            try:
                machine.assign(saved)
                machine.ram.check()
            except BaseException:
                machine.close()
                raise
            machine.origin, machine._folder = Origin.from_meta(chain.meta), path.parent
        except BaseException as error:
            chain.close()
            if isinstance(error, SnapshotError):
                error.of(path)
            raise
        if verify:
            chain.close()
        else:
            machine._scrub = Scrub(chain, machine.loop.attention)
        return machine

    def go_on_from(self, path: Path) -> None:
        """Become the machine that a snapshot holds, which was saved by this process of this machine: it gets a new CPU,
        new RAM, and every state as it was read. What this computer holds of it stays: consoles, what was typed, what
        was posted. To be called at a safe point. Raises as `restore` does, and then nothing has changed."""
        chain = Chain(path)
        try:
            saved = admit(Saved.decode(chain), self.backend)
            ram = Ram(map_ram(chain))
        except BaseException:
            chain.close()
            raise
        exits = self.exits()
        try:
            cpus = self._make_cpus(ram)
        except BaseException:
            chain.close()
            ram.close()
            raise
        self._leave_file()
        self._past_exits = exits
        before: tuple[Cpu | Ram, ...] = (*reversed(self.cpus), self.ram)
        self.cpus, self.ram = cpus, ram
        self.turns.replace(cpus)
        self.board.attach(cpus, ram, self.turns.woken)
        self.assign(saved)
        self.loop.replace(cpus)
        self._scrub = Scrub(chain, self.loop.attention)
        for gone in before:
            gone.close()

    @staticmethod
    def check(
        path: Path, backend: str = "emu", *, verify: bool = False, max_memory: int | None = None,
        allow: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Raises what `restore` would raise of the file and this host, SnapshotError or BackendError; makes nothing.
        RAM is checked with `verify`, as there."""
        with Chain(path, max_ram=host_memory() if max_memory is None else max_memory) as chain:
            admit(Saved.decode(chain), backend, allow)
            if verify:
                chain.verify_ram()

    def _make_cpus(self, ram: Ram) -> tuple[Cpu, ...]:
        """Raises BackendError, RequestError."""
        cpus: list[Cpu] = []
        try:
            for bus, intr in zip(self.board.buses, self.board.intrs, strict=True):
                cpus.append(self._make_cpu(ram, bus, intr, self.clock, cpus[0] if cpus else None))
        except BaseException:
            for cpu in reversed(cpus):
                cpu.close()
            raise
        return tuple(cpus)

    def _start(self, image: Image) -> None:
        self.image = image
        self.board.power_on()
        if (platform := self.board.platform) is not None:
            self.ram.write(acpi.AT, acpi.tables(platform, acpi.AT))
            memory = layout(self.config.memory_bytes)
            self.ram.write(smbios.AT, smbios.tables(platform.cpus, memory, smbios.AT))
        for cpu in self.cpus[1:]:
            cpu.load(replace(startup.reset(), halted=True))  # until a start-up message comes
        self.cpus[0].load(load_image(image, self.ram))

    def assign(self, saved: Saved) -> None:
        """Make all state but RAM that of `saved`, whose pieces it then owns."""
        for part in self.parts:
            part.put(self, saved.states[part.name])
        self.board.restored()

    # --- running

    def run(
        self,
        *,
        position: int | None = None,
        until: str | None = None,
        since: int | None = None,
        until_ns: int | None = None,
        lost: str | None = None,
        seconds: float | None = None,
    ) -> Stop:
        """Run until the guest stops, `position` is reached (at the first instruction boundary not before it), a line
        the console goes on to show has the regular expression `until` (in what was written after the first `since`
        bytes, by default from now on), guest time is `until_ns`, so many `seconds` have passed on the clock on the
        wall, a line of the console has the regular expression `lost` (vmm.guest.lost.LOST: the guest is lost, and may
        show more for a moment), or a posted command says so. Raises SnapshotError
        when the RAM the machine was woken with turns out to be damaged, or its file to be changed; GuestError when
        guest time has come to its end, RequestError for a position on KVM, or for what is no expression."""
        self._must_be_open()
        try:
            self.loop.aim(Goal(position, until, since, until_ns, lost, seconds))
        except re.error as error:
            raise RequestError(f"not a regular expression: {error}: {until or lost}") from None
        return self.loop.go_on()

    def post(self, command: Command) -> None:
        """From any thread, or a signal handler: run `command` at the next boundary; a Stop it returns ends the run."""
        self.loop.post(lambda: command(self))

    def send(self, data: bytes | str) -> None:
        """From any thread: type `data` at the console, from the next boundary on."""
        self.board.console.send(data.encode() if isinstance(data, str) else data)

    def _check(self, every_s: float) -> None:
        self.ram.check(every_s)
        if self._scrub is not None:
            with self._better_reason():
                self._scrub.check()

    @property
    def position(self) -> int:
        """Bytes of code executed."""
        return self.clock.position

    # --- state

    @property
    def cpu(self) -> Cpu:
        """The first."""
        return self.cpus[0]

    @cached_property
    def parts(self) -> list[Part]:
        """What is saved of it, in the file's order."""
        return parts_of(self.config)

    def states(self) -> dict[str, Any]:
        """Every declared state by its part's name, in the file's order. Changes nothing."""
        return {part.name: part.get(self) for part in self.parts}

    def encoded_states(self) -> dict[str, tuple[str, int, Any]]:
        """Every part's schema, version and state, as a snapshot has them. Changes nothing."""
        states = self.states().items()
        return {name: (schema_of(type(v)).name, schema_of(type(v)).version, encode(v)) for name, v in states}

    def digests(self) -> dict[str, Any]:
        """BLAKE3 of RAM, CPUs and every other part but the config, for comparing two machines. Raises SnapshotError
        when the file it was woken from was changed."""
        ram = blake3.blake3()
        for region in self.ram.regions:
            ram.update(region.view)
        self.ram.check()
        cpus, others = blake3.blake3(), {}
        for part in self.parts:
            encoded = canon.encode(encode(part.get(self)))
            if part.State is CpuState:
                cpus.update(encoded)
            elif part.State is not MachineConfig:
                others[part.name] = blake3.blake3(encoded).hexdigest()[:32]
        return {"ram": ram.hexdigest()[:32], "cpu": cpus.hexdigest()[:32], "devices": others}

    def touched_bytes(self) -> int:
        """How much RAM may hold other bytes than zero."""
        return sum(end - start for region in self.ram.regions for start, end in region.touched())

    def moment(self) -> Moment:
        """Remember what it is now, for `rewind`. Raises SnapshotError when the RAM it was woken with is damaged,
        BackendError when the host has not the memory."""
        self.await_checked()
        return self._moments.make()

    def rewind(self, moment: Moment, *, verify: bool = False) -> int:
        """Back to a moment of this machine: how many bytes of RAM had been written since. With `verify` the machine
        is compared with the moment, no file is read, and AssertionError names what differs. Raises RequestError for a
        moment of a machine with other RAM, BackendError when the host has not the memory."""
        written = self._moments.back_to(moment)
        self.loop.time_moved()
        if verify and (found := moment.differences(self)):
            raise AssertionError(f"after the rewind differ: {', '.join(found[:8])}")
        return written

    def restart(self) -> None:
        """Start the guest again, as after power-on. Raises RequestError for a machine that was restored and has no
        `image`, where the kernel and initrd its snapshot names lie neither beside it nor in the working folder."""
        image = self.image or self.find_image()
        for region in self.ram.regions:
            for start, end in region.touched():
                region.view[start:end] = bytes(end - start)
            self.cpu.discard_code(region.base, region.base + region.size)
        self.clock.load(ClockState())
        self.turns.state = TurnState()
        self.board.reset()
        self._start(image)
        self.origin = None  # the image may be another than the one before
        self.loop.time_moved()

    def find_image(self) -> Image:
        """What a woken machine was booted from: its files, from beside its snapshot or the working folder. Raises
        RequestError, naming the one that is not there."""
        if self.origin is None:
            raise RequestError("its snapshot does not say what it was booted from: give it a kernel to start again")
        return self.origin.find(dict.fromkeys((self._folder.absolute(), Path().absolute())))

    def know_origin(self) -> Origin | None:
        """Digests of what it was started from, worked out when they are first asked for. From any thread."""
        if self.origin is None and self.image is not None:
            self.origin = Origin.of(self.image)
        return self.origin

    def catch_up(self, wall_ns: int | None = None) -> None:
        """Let the time pass that the machine missed: its wall clock then shows `wall_ns` (Unix ns), by default this
        computer's. Raises RequestError when that is more than guest time can hold."""
        now = time.time_ns() if wall_ns is None else wall_ns
        missed = now - self.config.epoch_ns - self.clock.now_ns()
        if missed >= LAST_NS - self.clock.now_ns():
            raise RequestError(f"the guest's clock is {missed / 86_400e9:.0f} days behind: too long to catch up with")
        self.clock.skip(max(0, missed))
        self.loop.time_moved()

    # --- saving

    def save(
        self,
        path: Path,
        *,
        packed: bool = False,
        parent: Path | None = None,
        versions: Mapping[str, int] | None = None,
        force: bool = False,
        meta: Json = None,
    ) -> None:
        """Write a snapshot; `path` is replaced only by a whole new one, and only where a snapshot lies that no other
        stands on: `force` replaces any file that can be written. The other options are those of
        vmm.saving.save.Contents. Raises SnapshotError for a parent that cannot be one or a state an older version
        cannot say, RequestError for what is not to be replaced, BackendError when the host cannot write; the machine
        is unchanged either way."""
        write(path, self._contents(path, packed, parent, versions, meta).fill, force=force)

    def checkpoint(
        self,
        path: Path,
        *,
        packed: bool = False,
        parent: Path | None = None,
        versions: Mapping[str, int] | None = None,
        force: bool = False,
        meta: Json = None,
    ) -> Checkpoint:
        """As `save`, but the machine may run on at once: what is written is its state at this instant."""
        contents, touched = self._contents(path, packed, parent, versions, meta), self.touched_bytes()
        hashed_at_once = packed or parent is not None
        total = touched if hashed_at_once else 2 * touched
        return Checkpoint(path, contents.fill, total, force=force, keep=self.ram.files())

    def can_save(
        self,
        path: Path,
        parent: Path | None = None,
        versions: Mapping[str, int] | None = None,
        *,
        force: bool = False,
    ) -> None:
        """Raises what `save` would raise as far as it can be told now: RequestError, BackendError, SnapshotError."""
        preflight(path, parent, self.ram, force=force)
        self._must_know(versions)

    def _must_know(self, versions: Mapping[str, int] | None) -> None:
        """Raises RequestError for a part whose state those versions have not."""
        if versions is None:
            return
        for part in self.parts:
            if (state := schema_of(part.State).name) not in versions:
                if part.name in {device.id for device in self.config.devices}:
                    raise RequestError(f"that release has no {state}, which is the state of device {part.name}")
                raise RequestError(f"that release has no board {self.config.board!r}: it wakes those of --board isapc")

    def _contents(
        self, path: Path, packed: bool, parent: Path | None, versions: Mapping[str, int] | None, meta: Json
    ) -> Contents:
        self._must_be_open()
        self.await_checked()
        states = self.states()
        for state in states.values():
            # Behind a triple fault the engine's CPU may stand between two states.
            if isinstance(state, CpuState) and (why := validity.refusal(state)) is not None:
                raise RequestError(f"cannot save to {path}: no CPU can be in this state: {why}")
        self._must_know(versions)
        if (origin := self.know_origin()) is not None and (meta is None or isinstance(meta, dict)):
            meta = {**(meta or {}), ORIGIN: origin.to_json()}
        return Contents(path, states, self.ram, packed, parent, versions, meta)

    def await_checked(self) -> None:
        """Until the RAM the machine was woken with has been checked: damaged RAM must not be given new digests. From
        any thread. Raises SnapshotError when it is damaged, or the file was changed."""
        self.ram.check()
        if self._scrub is not None:
            with self._better_reason():
                self._scrub.wait()

    @contextlib.contextmanager
    def _better_reason(self) -> Iterator[None]:
        """Context manager: where the file was changed, damage found in it is said to be that."""
        try:
            yield
        except SnapshotError:
            self.ram.check()
            raise

    @property
    def far_ends(self) -> dict[str, str]:
        """Where this computer's ends of its serial ports are to be met: a device or a socket, by part."""
        return self._bindings.places

    # --- the end

    def exits(self) -> dict[str, int]:
        """How often the CPUs left the guest's code, by reason."""
        counts = Counter(self._past_exits)
        for cpu in self.cpus:
            counts.update(cpu.exits())
        return dict(counts)

    def _must_be_open(self) -> None:
        if not self._open:
            raise RequestError("the machine is closed")

    @property
    def closed(self) -> bool:
        return not self._open

    def close(self) -> None:
        if self._open:
            self._open = False
            self.loop.close()
            self._leave_file()
            self._moments.close()
            self._bindings.close()
            for cpu in reversed(self.cpus):
                cpu.close()
            self.ram.close()

    def _leave_file(self) -> None:
        """Whether the file it was woken from is whole matters no more."""
        if self._scrub is not None:
            self._scrub.leave()
            self._scrub = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _complete(config: MachineConfig, bind: Mapping[str, str]) -> None:
    """Raises RequestError, naming what a restore needs and was not given."""
    for name in config.bound:
        if name not in bind:
            raise RequestError(f"{name} had something at its far end: say what it is now, --bind {name}=... (or null)")
