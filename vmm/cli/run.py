"""`anyhyve run`, `restore` and `wake`: a machine on this terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from snapshot.errors import SnapshotError
from vmm.board.config import DEFAULT_EPOCH_NS, DeviceConfig, MachineConfig, named
from vmm.cli import show
from vmm.cli.options import (
    FILE,
    NO_FOLDER,
    PARENT,
    Binding,
    Device,
    Epoch,
    Memory,
    Pattern,
    Seconds,
    allow_option,
    backend_option,
    chosen,
    force_option,
    json_option,
    pack_option,
    rundir_option,
)
from vmm.control.supervisor import Supervisor
from vmm.control.terminal import Terminal
from vmm.cpu import backends
from vmm.errors import RequestError
from vmm.guest.image import Image
from vmm.guest.lost import LOST
from vmm.machine.machine import Fault, Machine, Stop, Stopped, StopReason
from vmm.machine.run import Goal
from vmm.saving import releases

DEFAULT_MEMORY = 256 << 20
_SIGNALS = {StopReason.SIGTERM: 15, StopReason.SIGHUP: 1}
_REACHED = (
    StopReason.POSITION, StopReason.PATTERN, StopReason.QUIT, StopReason.STOPPED, StopReason.SUSPENDED,
)  # fmt: skip
# What ends a run without --save being done.
_NOT_SAVED = (StopReason.QUIT, StopReason.STOPPED, StopReason.SUSPENDED, *_SIGNALS)


@dataclass
class Asked:
    """What to run for, and what to do when it is reached."""

    until: str | None
    at: int | None
    until_time: float | None
    timeout: float | None
    lost: str
    save: Path | None
    force: bool
    packed: bool
    parent: Path | None
    for_version: str | None
    pace: str | None
    as_json: bool
    name: str | None
    rundir: Path | None
    paused: bool
    autosave: int | None
    suspend_on_term: bool

    @property
    def misses(self) -> list[str]:
        """The options whose end it may not come to."""
        return [f"--{name}" for name in ("until", "at") if getattr(self, name) is not None]

    @property
    def awaits(self) -> bool:
        """Whether there is something to reach."""
        return bool(self.misses) or self.until_time is not None or self.timeout is not None

    def goal(self, machine: Machine) -> Goal:
        until_ns = None if self.until_time is None else machine.clock.now_ns() + round(self.until_time * 1e9)
        return Goal(self.at, self.until, None, until_ns, self.lost or None, self.timeout)


def _goal(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option("--until", type=Pattern(), help="Stop when a console line matches."),
            click.option("--at", type=click.IntRange(0), metavar="POSITION",
                         help="Stop at this many bytes of code executed."),
            click.option("--until-time", type=Seconds(), metavar="SECONDS",
                         help="Stop when so much guest time has passed."),
            click.option("--timeout", type=Seconds(), metavar="SECONDS",
                         help="Stop when so much time has passed on the clock on the wall."),
            click.option("--lost", type=Pattern(), default=LOST, show_default="what Linux, the BSDs, Xen, SeaBIOS say",
                         help="A console line of a guest that goes no further: a panic. What the run is for it will "
                              "not reach, and ends. '' for none."),
            click.option("--save", type=NO_FOLDER, help="Save when the run stops."),
            force_option,
            pack_option,
            click.option("--parent", type=FILE, help=PARENT),
            click.option("--for-version", metavar="RELEASE", help="Save what this older release can wake."),
            click.option("--pace", type=click.Choice(["real", "max"]),
                         help="Guest time: as the clock on the wall, or as fast as it can. "
                              "[default: real at a terminal or with a name, else max]"),
            json_option,
            rundir_option,
            click.option("--paused", is_flag=True, help="Of a machine with a name: wait for `ctl NAME resume`."),
            click.option("--autosave", type=click.IntRange(1), metavar="SECONDS",
                         help="Of a machine with a name: save into the catalog this often, over the one before."),
            click.option("--suspend-on-term", is_flag=True,
                         help="Of a machine with a name: SIGTERM suspends into the catalog (`anyhyve wake NAME`)."),
            click.option("--bind", type=Binding(), multiple=True, metavar="PART=END",
                         help="What is at the far end of a serial port: console, null, file:PATH, pty, socket:PATH."),
            backend_option,
        )
    ):  # fmt: skip
        command = option(command)
    return command


_name_option = click.option(
    "--name", metavar="NAME", help="Make it the machine NAME, which others can ask (ctl, list, attach)."
)


def _wake_options(command: Callable[..., None]) -> Callable[..., None]:
    clock = click.option("--clock", type=click.Choice(["freeze", "catch-up"]), default="freeze", show_default=True,
                         help="Guest time: on from where it stood, or up to this computer's wall clock.")  # fmt: skip
    return allow_option(clock(command))


@click.command()
@click.option("--kernel", type=FILE, help="The guest's kernel: bzImage, ELF vmlinux, or flat code.")
@click.option("--initrd", type=FILE, help="Initial RAM disk.")
@click.option("--append", default="console=ttyS0", show_default=True, help="Kernel command line.")
@click.option("--memory", type=Memory(), help="Guest RAM.  [default: 256M]")
@click.option("--flat", is_flag=True, help="The kernel is raw 64-bit code for address 1 MiB.")
@click.option("--epoch", type=Epoch(), help="Guest wall clock at start: Unix seconds, or `now`.  [default: 2020-01-01]")
@click.option("-r", "waking", type=FILE, metavar="FILE",
              help="As bhyve's: wake FILE; the other options are as they were at first.")  # fmt: skip
@click.option(
    "--device",
    "devices",
    type=Device(),
    multiple=True,
    metavar="KIND,OPTION=VALUE",
    help="One more device, such as uart,port=0x2a8,irq=5; `anyhyve devices` lists the kinds.",
)
@click.option("--tsc-khz", type=int, help="Rate of the guest's TSC.  [default: 4000000 on emu, the host's own on kvm]")
@_name_option
@_goal
def run(
    kernel: Path | None, initrd: Path | None, append: str, memory: int | None, flat: bool, epoch: int | None,
    tsc_khz: int | None, waking: Path | None, devices: tuple[DeviceConfig, ...], bind: tuple[tuple[str, str], ...],
    backend: str, **goal: Any
) -> None:  # fmt: skip
    """Boot a guest with its serial console on this terminal.

    Exit status: the guest's own where it ends with one; 0 where what was asked for is reached, or nothing was; 3 where
    it is missed; 1 where the guest is lost, its CPU shuts down, or something is wrong; 2 for wrong usage.
    """
    if waking is None and kernel is None:
        raise click.UsageError("Missing option '--kernel'.")
    image = None if kernel is None else Image.from_files(kernel, initrd, append, flat)
    backend = chosen(backend)
    if waking is not None:
        with Machine.restore(waking, backend, bind=_bind(bind)) as machine:
            _agree(machine.config, memory_bytes=memory, epoch_ns=epoch and epoch * 10**9, tsc_khz=tsc_khz,
                   devices=named(devices) or None)  # fmt: skip
            machine.image = image
            sys.exit(_drive(machine, Asked(**goal)))
    assert image is not None
    rate = tsc_khz or backends.factory(backend).tsc_khz()
    start_ns = DEFAULT_EPOCH_NS if epoch is None else epoch * 10**9
    config = _config(
        memory_bytes=DEFAULT_MEMORY if memory is None else memory, epoch_ns=start_ns, tsc_khz=rate, devices=devices
    )
    with Machine.boot(config, image, backend, bind=_bind(bind)) as machine:
        sys.exit(_drive(machine, Asked(**goal)))


def _bind(given: tuple[tuple[str, str], ...]) -> dict[str, str]:
    bound = dict(given)
    if len(bound) < len(given):
        raise RequestError("--bind: a part is given twice")
    return bound


def _agree(config: MachineConfig, **asked: Any) -> None:
    """Compare what was asked for with the snapshot, which says it all; bhyve -r wants the arguments of the first start.
    Raises RequestError for what does not agree."""
    for field, value in asked.items():
        if value is not None and value != getattr(config, field):
            raise RequestError(f"{field}: the snapshot has {getattr(config, field)}, not {value}")


@click.command()
@click.argument("file", type=FILE)
@click.option(
    "--verify", is_flag=True, help="Check all RAM against the digests in the file before it wakes, not while it runs."
)
@_wake_options
@_name_option
@_goal
def restore(file: Path, verify: bool, **options: Any) -> None:
    """Wake a saved machine: the file says all there is to know."""
    _wake(file, verify, **options)


@click.command()
@click.argument("name", metavar="NAME")
@_wake_options
@_goal
def wake(name: str, **options: Any) -> None:
    """Wake the machine NAME from its newest snapshot in the catalog."""
    from vmm.control import catalog

    file = catalog.newest(name)
    show.note(f"{name}: {file}")
    _wake(file, False, name=name, **options)


def _wake(
    file: Path, verify: bool, allow: tuple[str, ...], clock: str, bind: tuple[tuple[str, str], ...], backend: str,
    **goal: Any,
) -> None:  # fmt: skip
    with Machine.restore(file, chosen(backend), verify=verify, allow=allow, bind=_bind(bind)) as machine:
        if clock == "catch-up":
            machine.catch_up()
        sys.exit(_drive(machine, Asked(**goal)))


def _config(**values: Any) -> MachineConfig:
    from snapshot.schema import encode

    config = MachineConfig(**values)
    try:
        encode(config)
    except SnapshotError as error:
        raise RequestError(f"not a machine we can build: {error}") from None
    return config


def _drive(machine: Machine, asked: Asked) -> int:
    """Run to the goal, save, report. Returns the exit status."""
    versions = None if asked.for_version is None else releases.versions(asked.for_version)
    if asked.save is not None:
        machine.can_save(asked.save, asked.parent, versions, force=asked.force)  # said now, not after an hour's run
    vm = Supervisor(machine)
    for part, place in machine.far_ends.items():
        show.note(f"{part} is at {place}")
    with ExitStack() as stack:
        if asked.name is not None:
            _name(vm, asked, stack)
        interactive = False
        if not asked.as_json:
            interactive = stack.enter_context(Terminal(vm, asked.save, force=asked.force)).interactive
        attended = interactive or asked.name is not None
        machine.loop.pace_real = asked.pace == "real" or (asked.pace is None and attended)
        started = time.perf_counter()
        try:
            stop = vm.run(asked.goal(machine), paused=asked.paused, ends_lost=asked.awaits or not attended)
        finally:
            vm.close()
    wall = time.perf_counter() - started
    if asked.save is not None and isinstance(stop, Stopped) and stop.reason not in _NOT_SAVED:
        machine.save(asked.save, packed=asked.packed, parent=asked.parent, versions=versions, force=asked.force)
    if asked.as_json:
        show.as_json(report(machine, stop, wall))
    else:
        show.note_after_console(f"{_words(stop, asked)}, at position {machine.position}")
    return status(stop, asked)


def _name(vm: Supervisor, asked: Asked, stack: ExitStack) -> None:
    """Let others ask for the machine, and save it by itself."""
    from vmm.control import catalog
    from vmm.control.automatic import Automatic
    from vmm.control.place import Place, rundir
    from vmm.control.server import Server

    assert asked.name is not None
    vm.last_sequence = partial(catalog.last_sequence, asked.name)
    stack.enter_context(Automatic(vm, asked.name, autosave_s=asked.autosave, suspend=asked.suspend_on_term))
    # After the signals: no socket is left by a signal that came too early.
    stack.enter_context(Server(vm, Place(rundir(asked.rundir), asked.name)))
    catalog.clear(asked.name)  # the name is ours by now
    vm.machine.loop.awaits_input = True  # somebody may attach

    def warn(event: str, details: dict[str, Any]) -> None:
        if event == "warning":
            with suppress(OSError):  # nobody reads it
                show.note(details["text"])

    vm.listeners.append(warn)


def _words(stop: Stop, asked: Asked) -> str:
    """What happened: what was reached, or missed and why."""
    match stop:
        case Fault():
            return str(stop)
        case Stopped(StopReason.PATTERN):
            return f"the console shows {asked.until}"
        case Stopped(StopReason.POSITION):
            return "the run has come as far as --at"
        case Stopped(reason, code, why):
            said = _WORDS[reason].format(code=code, why=why, time=asked.until_time, timeout=asked.timeout)
    if asked.misses and reason not in _REACHED:
        return f"{said}; {' and '.join(asked.misses)} not reached"
    return said


_WORDS = {
    StopReason.TIME: "{time:g} s of guest time have passed",
    StopReason.TIMEOUT: "{timeout:g} s have passed on the clock on the wall",
    StopReason.PANIC: "the guest is lost: {why}",
    StopReason.RESET: "the guest asked to be started again",
    StopReason.EXIT: "the guest ended with status {code}",
    StopReason.TRIPLE_FAULT: "the guest's CPU shut down: a triple fault",
    StopReason.HALTED: "the guest halted {why}",
    StopReason.COMMAND: "ended",
    StopReason.QUIT: "quit",
    StopReason.STOPPED: "stopped by ctl",
    StopReason.SUSPENDED: "suspended",
    StopReason.SIGTERM: "ended by SIGTERM",
    StopReason.SIGHUP: "ended by SIGHUP",
}


def report(machine: Machine, stop: Stop, wall_s: float) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "position": machine.position,
        "guest_ns": machine.clock.now_ns(),
        "wall_s": round(wall_s, 6),
        "exits": machine.exits(),
        "stopped": str(stop),
        "digest": machine.digests(),
    }


def status(stop: Stop, asked: Asked) -> int:
    match stop:
        case Fault() | Stopped(StopReason.TRIPLE_FAULT | StopReason.PANIC):
            return 1
        case Stopped(StopReason.EXIT, code):
            return code & 0xFF
        case Stopped(reason) if reason in _SIGNALS:
            return 128 + _SIGNALS[reason]
        case Stopped(reason) if reason in _REACHED or not asked.misses:
            return 0
        case _:
            return 3
