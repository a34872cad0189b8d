"""The command line: run, restore, snapshot, lockstep, guest, doctor.

Exit status: 0 done, 1 a fault named in one line on standard error, 2 wrong usage, 3 the guest stopped before what was
asked for (--until, --at). A guest that ends itself through the debug-exit port passes its own status on.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from snapshot.errors import SnapshotError
from vmm import backends, releases
from vmm.boot import Image
from vmm.config import DEFAULT_EPOCH_NS, MachineConfig
from vmm.errors import BackendError, GuestError
from vmm.machine import Fault, Machine, Stop, Stopped
from vmm.saved import ALLOWABLE
from vmm.terminal import Terminal

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Memory(click.ParamType[int]):
    """A size such as 256M or 4G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+)([KMG]?)", str(value).upper())
        if not match:
            self.fail(f"{value!r} is not a size such as 256M", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


class Epoch(click.ParamType[int]):
    """Unix seconds, or `now`."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        seconds = str(int(time.time())) if value == "now" else str(value)
        if not re.fullmatch(r"\d{1,10}", seconds) or int(seconds) > 1 << 33:
            self.fail(f"{value!r} is neither Unix seconds nor `now`", param, ctx)
        return int(seconds)


class Pattern(click.ParamType[str]):
    """A regular expression."""

    name = "regex"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            re.compile(value)
        except re.error as error:
            self.fail(f"not a regular expression: {error}", param, ctx)
        return str(value)


@dataclass
class Goal:
    """What to run for, and what to do when it is reached."""

    until: str | None
    at: int | None
    save: Path | None
    pack: bool
    parent: Path | None
    for_version: str | None
    pace: str | None
    as_json: bool


def _goal(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option("--until", type=Pattern(), help="Stop when a console line matches."),
            click.option("--at", type=click.IntRange(0), metavar="POSITION",
                         help="Stop at this many bytes of code executed."),
            click.option("--save", type=click.Path(path_type=Path, dir_okay=False), help="Save when the run stops."),
            click.option("--pack", is_flag=True, help="Pack the RAM of what is saved with zstd."),
            click.option("--parent", type=click.Path(path_type=Path),
                         help="Save only what differs from this snapshot, in the same folder."),
            click.option("--for-version", metavar="RELEASE", help="Save what this older release can wake."),
            click.option("--pace", type=click.Choice(["real", "max"]),
                         help="Guest time: as the clock on the wall, or as fast as it can. "
                              "[default: real at a terminal, else max]"),
            click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output; no console."),
            click.option("--backend", default="emu", show_default=True, metavar="emu|kvm|auto",
                         help="Which CPU; auto is kvm where the host has it, and says which it took."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


class _Main(click.Group):
    """One clear line for whoever is at fault; a traceback only for our own bugs. What only some commands need is
    imported by them: a boot of two seconds should not wait for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "lockstep", "snapshot"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "snapshot":
            from vmm.snapshot_cli import snapshot

            return snapshot
        if cmd_name == "lockstep":
            from vmm.lockstep_cli import lockstep

            return lockstep
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (SnapshotError, GuestError, BackendError) as error:
            click.echo(f"anyhyve: {error}", err=True)
            sys.exit(1)
        except BrokenPipeError:
            sys.exit(1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"anyhyve: {where}{error.strerror or error}", err=True)
            sys.exit(1)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="anyhyve", prog_name="anyhyve")
def main() -> None:
    """Save a running PC on one CPU, wake it on another."""


@main.command()
@click.option("--kernel", required=True, type=click.Path(path_type=Path), help="bzImage, ELF vmlinux, or flat code.")
@click.option("--initrd", type=click.Path(path_type=Path), help="Initial RAM disk.")
@click.option("--append", default="console=ttyS0", show_default=True, help="Kernel command line.")
@click.option("--memory", type=Memory(), default="256M", show_default=True, help="Guest RAM.")
@click.option("--flat", is_flag=True, help="The kernel is raw 64-bit code for address 1 MiB.")
@click.option("--epoch", type=Epoch(), default=str(DEFAULT_EPOCH_NS // 10**9), show_default=True,
              help="Guest wall clock at start: Unix seconds, or `now`.")  # fmt: skip
@click.option("--tsc-khz", type=int, help="Rate of the guest's TSC.  [default: 4000000 on emu, the host's own on kvm]")
@_goal
def run(
    kernel: Path, initrd: Path | None, append: str, memory: int, flat: bool, epoch: int, tsc_khz: int | None,
    backend: str, **goal: Any
) -> None:  # fmt: skip
    """Boot a guest with its serial console on this terminal."""
    image = Image.from_files(kernel, initrd, append, flat)
    backend = _backend(backend)
    rate = tsc_khz or backends.factory(backend).tsc_khz()
    config = _config(memory_bytes=memory, epoch_ns=epoch * 10**9, tsc_khz=rate)
    with Machine.boot(config, image, backend) as machine:
        sys.exit(_drive(machine, Goal(**goal)))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Check every byte of RAM against its digest first.")
@click.option("--allow", multiple=True, type=click.Choice(ALLOWABLE), help="What may differ from what was saved.")
@click.option("--clock", type=click.Choice(["freeze", "catch-up"]), default="freeze", show_default=True,
              help="Guest time: on from where it stood, or up to this computer's wall clock.")  # fmt: skip
@_goal
def restore(file: Path, verify: bool, allow: tuple[str, ...], clock: str, backend: str, **goal: Any) -> None:
    """Wake a saved machine: the file says all there is to know."""
    with Machine.restore(file, _backend(backend), verify=verify, allow=allow) as machine:
        if clock == "catch-up":
            machine.catch_up()
        sys.exit(_drive(machine, Goal(**goal)))


def _backend(name: str) -> str:
    chosen, why = backends.choose(name)
    if name == "auto":
        click.echo(f"anyhyve: backend {chosen}: {why}", err=True)
    return chosen


def _config(**values: Any) -> MachineConfig:
    from snapshot.schema import encode

    config = MachineConfig(**values)
    try:
        encode(config)
    except SnapshotError as error:
        raise GuestError(f"not a machine we can build: {error}") from None
    return config


def _drive(machine: Machine, goal: Goal) -> int:
    """Run to the goal, save, report. The exit status."""
    versions = None if goal.for_version is None else releases.versions(goal.for_version)
    if goal.save is not None:
        machine.can_save(goal.save, goal.parent)  # said now, not after an hour's run
    terminal = None if goal.as_json else Terminal(machine, goal.save)
    interactive = terminal is not None and terminal.interactive
    machine.pace_real = goal.pace == "real" or (goal.pace is None and interactive)
    started = time.perf_counter()
    if terminal is None:
        stop = machine.run(position=goal.at, until=goal.until)
    else:
        with terminal:
            stop = machine.run(position=goal.at, until=goal.until)
    wall = time.perf_counter() - started
    if goal.save is not None and isinstance(stop, Stopped) and stop.reason != "quit":
        machine.save(goal.save, packed=goal.pack, parent=goal.parent, versions=versions)
    if goal.as_json:
        click.echo(json.dumps(report(machine, stop, wall)))
    else:
        click.echo(f"\nanyhyve: {describe(stop)} at position {machine.position}", err=True)
    return status(stop, goal)


def report(machine: Machine, stop: Stop, wall_s: float) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "position": machine.position,
        "guest_ns": machine.clock.now_ns(),
        "wall_s": round(wall_s, 6),
        "exits": machine.exits(),
        "stopped": describe(stop),
        "digest": machine.digests(),
    }


def describe(stop: Stop) -> str:
    match stop:
        case Fault(rip, why):
            return f"the CPU cannot go on at {rip:#x}: {why}"
        case Stopped("exit", code):
            return f"exit {code}"
        case Stopped(reason, _):
            return reason


def status(stop: Stop, goal: Goal) -> int:
    match stop:
        case Fault():
            return 1
        case Stopped("exit", code):
            return code & 0xFF
        case Stopped("triple fault", _):
            return 1
        case Stopped("position" | "pattern" | "quit" | "saved", _):
            return 0
        case _:
            return 3 if goal.until is not None or goal.at is not None else 0


@main.group()
def guest() -> None:
    """Guests to try."""


@guest.command()
@click.option("--dir", "folder", required=True, type=click.Path(path_type=Path, file_okay=False), help="Where to.")
@click.option("--init", type=click.Path(path_type=Path, dir_okay=False), help="Script to run as /init.")
def fetch(folder: Path, init: Path | None) -> None:
    """Get a Debian kernel and busybox, and make DIR/vmlinuz, DIR/vmlinux, DIR/initrd.img."""
    from rich.console import Console as Rich

    from vmm.guest import fetch as get

    script = None
    if init is not None:
        try:
            script = init.read_text()
        except OSError as error:
            raise GuestError(f"{init}: {error.strerror}") from None
    with Rich(stderr=True).status("fetching") as progress:
        get(folder, script, progress=progress.update)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
def doctor(as_json: bool) -> None:
    """What this computer can do, and why not where it cannot."""
    from rich.console import Console as Rich
    from rich.table import Table

    from vmm.doctor import examine

    findings = examine(backends.BACKENDS)
    if as_json:
        click.echo(json.dumps(findings))
    else:
        table = Table("what", "finding")
        for what, finding in findings.items():
            table.add_row(what, str(finding))
        Rich().print(table)
    sys.exit(0 if findings["emu"].startswith("ready") else 1)
