"""`anyhyve run`, `restore` and `wake`: a machine on this terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from snapshot.errors import SnapshotError
from vmm.board.config import DEFAULT_EPOCH_NS, GIVEN_BOARD, MAX_CPUS, DeviceConfig, MachineConfig, named
from vmm.cli import show
from vmm.cli.drive import SILENCE_S, Asked, drive
from vmm.cli.options import (
    FILE,
    NO_FOLDER,
    PARENT,
    BhyveSlot,
    Binding,
    Device,
    Epoch,
    Memory,
    Pattern,
    Seconds,
    allow_option,
    backend_option,
    board_option,
    chosen,
    force_option,
    json_option,
    pack_option,
    rundir_option,
)
from vmm.clock import BYTES_PER_NS, LAST_NS
from vmm.cpu import backends
from vmm.cpu.model import TSC_KHZ
from vmm.errors import RequestError
from vmm.guest.image import Image
from vmm.guest.lost import LOST
from vmm.guest.origin import Origin
from vmm.host import background
from vmm.machine.machine import Machine

DEFAULT_MEMORY = 256 << 20
_EPOCH = datetime.fromtimestamp(DEFAULT_EPOCH_NS / 1e9, UTC)


def _goal(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option("--until", type=Pattern(), help="Stop when a console line matches."),
            click.option("--at", type=click.IntRange(0, LAST_NS * BYTES_PER_NS), metavar="POSITION",
                         help="Stop at this many bytes of code executed."),
            click.option("--until-time", type=Seconds(), metavar="SECONDS",
                         help="Stop when so much guest time has passed."),
            click.option("--timeout", type=Seconds(), metavar="SECONDS",
                         help="Stop when so much time has passed on the clock on the wall."),
            click.option("--lost", type=Pattern(), default=LOST, show_default="what Linux, the BSDs, Xen, SeaBIOS say",
                         help="A console line of a guest that goes no further: a panic. What the run is for it will "
                              "not reach, and ends. '' for none."),
            click.option("--silence", type=Seconds(), metavar="SECONDS",
                         help="Stop when the console has shown nothing for so much guest time.  "
                              f"[default: with --until {SILENCE_S:g}, but none at a terminal or with a name]"),
            click.option("--save", type=NO_FOLDER,
                         help="Save when the run stops, but not when it is interrupted, quit, or stopped by ctl."),
            force_option,
            pack_option,
            click.option("--parent", type=FILE, help=PARENT),
            click.option("--for-version", metavar="RELEASE", help="Save what this older release can wake."),
            click.option("--keep-boot", is_flag=True,
                         help="Put kernel and initrd beside the snapshots: a machine woken from them can start again."),
            click.option("--pace", type=click.Choice(["real", "max"]),
                         help="Guest time: as the clock on the wall, or as fast as it can. "
                              "[default: real at a terminal or with a name, else max]"),
            json_option,
            rundir_option,
            click.option("--detach", is_flag=True,
                         help="Of a machine with a name: leave this terminal once it is up (`attach`, `ctl`)."),
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
_NEED_A_NAME = ("detach", "paused", "autosave", "suspend_on_term", "rundir")
_NEED_A_FILE = ("force", "packed", "parent", "for_version")
_SPELT = {"packed": "--pack", "name": "--name", "save": "--save"}


def _spelt(option: str) -> str:
    return _SPELT.get(option, f"--{option.replace('_', '-')}")


def _asked(detach: bool, **goal: Any) -> Asked:
    """What was asked for, where all of it has a meaning. With `detach` this process goes to the background, and its
    parent does not come back. Raises click.UsageError."""
    for options, wanted in ((_NEED_A_NAME, ("name",)), (_NEED_A_FILE, ("save",)), (("keep_boot",), ("name", "save"))):
        for option in options:
            if (detach if option == "detach" else goal[option]) and not any(goal[other] for other in wanted):
                raise click.UsageError(f"{_spelt(option)} does nothing without {' or '.join(map(_spelt, wanted))}.")
    if detach and goal["as_json"]:
        raise click.UsageError("--json has nowhere to write to with --detach.")
    return Asked(**goal, away=background.go() if detach else None)


def _given(*names: str) -> list[str]:
    """Those of the options that the user has spelt out."""
    context = click.get_current_context()
    return [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]


def _boot_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a woken machine starts from again when it is reset."""
    for option in (
        click.option("--append", help="With --kernel: its command line.  [default: as it was booted with]"),
        click.option("--initrd", type=FILE, help="With --kernel: its initial RAM disk."),
        click.option("--kernel", type=FILE,
                     help="What a reset starts. Not needed where the file it was booted from lies beside the snapshot, "
                          "or here."),
    ):  # fmt: skip
        command = option(command)
    return command


def _only_with_a_kernel(kernel: Path | None, *given: object) -> None:
    if kernel is None and any(given):
        raise click.UsageError("--initrd, --append and --flat of a woken machine do nothing without --kernel.")


def _give_image(
    machine: Machine, kernel: Path | None, initrd: Path | None, append: str | None, flat: bool | None = None
) -> None:
    """What a woken machine is to start from again. What was not given is as it was booted."""
    if kernel is None:
        return
    before = machine.origin
    if append is None:
        append = "console=ttyS0" if before is None else before.append
    if flat is None:
        flat = before is not None and before.flat
    machine.image = Image.from_files(kernel, initrd, append, flat)
    if before is not None and Origin.of(machine.image) != before:
        show.note("warning: a reset starts what was given, which is not what the machine was booted from")


def _wake_options(command: Callable[..., None]) -> Callable[..., None]:
    clock = click.option("--clock", type=click.Choice(["freeze", "catch-up"]), default="freeze", show_default=True,
                         help="Guest time: on from where it stood, or up to this computer's wall clock.")  # fmt: skip
    return allow_option(clock(_boot_options(command)))


@click.command()
@click.argument("machine_name", metavar="[NAME]", required=False)
@click.option("--kernel", type=FILE, help="The guest's kernel: bzImage, ELF vmlinux, or flat code.")
@click.option("--initrd", type=FILE, help="Initial RAM disk.")
@click.option("--append", default="console=ttyS0", show_default=True, help="Kernel command line.")
@click.option("-m", "--memory", type=Memory(), help=f"Guest RAM.  [default: {DEFAULT_MEMORY >> 20}M]")
@click.option("-c", "--cpus", type=click.IntRange(1, MAX_CPUS), help="How many CPUs: to 64 on board pc.  [default: 1]")
@click.option("--flat", is_flag=True, help="The kernel is raw 64-bit code for address 1 MiB.")
@click.option("--epoch", type=Epoch(),
              help=f"Guest wall clock at start: Unix seconds, or `now`.  [default: {_EPOCH:%Y-%m-%d}]")  # fmt: skip
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
@click.option("-s", "slots", type=BhyveSlot(), multiple=True, metavar="SLOT,KIND",
              help="As bhyve's: one more PCI device. A hostbridge and an lpc the board has by itself.")  # fmt: skip
@board_option
@click.option("--tsc-khz", type=int,
              help=f"Rate of the guest's TSC.  [default: {TSC_KHZ} on emu, the host's own on kvm]")  # fmt: skip
@_name_option
@_goal
def run(
    machine_name: str | None, name: str | None, kernel: Path | None, initrd: Path | None,
    append: str | None, memory: int | None, cpus: int | None, flat: bool, epoch: int | None, tsc_khz: int | None,
    waking: Path | None,
    devices: tuple[DeviceConfig, ...], slots: tuple[DeviceConfig | None, ...], board: str | None,
    bind: tuple[tuple[str, str], ...], backend: str, **goal: Any
) -> None:  # fmt: skip
    """Boot a guest with its serial console on this terminal. NAME, as bhyve has it, is --name.

    Exit status: the guest's own where it ends with one; 0 where what was asked for is reached, or nothing was; 3 where
    it is missed; 1 where the guest is lost, its CPU shuts down, or something is wrong; 2 for wrong usage.
    """
    if machine_name is not None and name not in (None, machine_name):
        raise click.UsageError(f"two names are given, {machine_name} and --name {name}.")
    goal["name"] = machine_name if name is None else name
    given = _given("append")
    if waking is None and kernel is None:
        raise click.UsageError("Missing option '--kernel'.")
    if waking is None and flat and (initrd is not None or "append" in given):
        raise click.UsageError("--flat code is given no --initrd and no --append.")
    if waking is not None:
        append = append if "append" in given else None
        _only_with_a_kernel(kernel, initrd, append is not None, flat)
    asked = _asked(**goal)
    backend = chosen(backend)
    if slots and board == "isapc":
        raise click.UsageError("-s is of PCI, which --board isapc has not.")
    devices += tuple(slot for slot in slots if slot is not None)
    if waking is not None:
        with Machine.restore(waking, backend, bind=_bind(bind)) as machine:
            _agree(machine.config, memory_bytes=memory, cpus=cpus, epoch_ns=epoch and epoch * 10**9, tsc_khz=tsc_khz,
                   devices=named(devices) or None, board=board)  # fmt: skip
            _give_image(machine, kernel, initrd, append, flat or None)
            sys.exit(drive(machine, asked))
    assert kernel is not None
    image = Image.from_files(kernel, initrd, "" if flat or append is None else append, flat)
    rate = tsc_khz or backends.factory(backend).tsc_khz()
    start_ns = DEFAULT_EPOCH_NS if epoch is None else epoch * 10**9
    config = _config(
        memory_bytes=DEFAULT_MEMORY if memory is None else memory,
        cpus=cpus or 1,
        epoch_ns=start_ns,
        tsc_khz=rate,
        devices=devices,
        board=board or GIVEN_BOARD,
    )
    with Machine.boot(config, image, backend, bind=_bind(bind)) as machine:
        sys.exit(drive(machine, asked))


def _bind(given: tuple[tuple[str, str], ...]) -> dict[str, str]:
    bound = dict(given)
    if len(bound) < len(given):
        raise RequestError("--bind: a part is given twice")
    return bound


def _agree(config: MachineConfig, **asked: Any) -> None:
    """Compare what was asked for with the snapshot, which says it all; bhyve -r wants the arguments of the first start.
    Raises RequestError for what does not agree."""
    for field, value in asked.items():
        if value is None or value == (there := getattr(config, field)):
            continue
        if field == "devices":
            names = ", ".join(device.id for device in there) or "none"
            raise RequestError(
                f"devices: the snapshot has {names}, and no others are put on: leave --device and -s out"
            )
        raise RequestError(f"{field}: the snapshot has {there}, not {value}")


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
    _wake(lambda: file, verify, **options)


@click.command()
@click.argument("name", metavar="NAME")
@_wake_options
@_goal
def wake(name: str, **options: Any) -> None:
    """Wake the machine NAME from its newest snapshot in the catalog."""
    from vmm.control import catalog

    def newest() -> Path:
        file = catalog.newest(name)
        show.note(f"{name}: {file}")
        return file

    _wake(newest, False, name=name, **options)


def _wake(
    find: Callable[[], Path], verify: bool, allow: tuple[str, ...], clock: str, bind: tuple[tuple[str, str], ...],
    backend: str, kernel: Path | None, initrd: Path | None, append: str | None, **goal: Any,
) -> None:  # fmt: skip
    _only_with_a_kernel(kernel, initrd, append is not None)
    asked = _asked(**goal)
    with Machine.restore(find(), chosen(backend), verify=verify, allow=allow, bind=_bind(bind)) as machine:
        _give_image(machine, kernel, initrd, append)
        if clock == "catch-up":
            machine.catch_up()
        sys.exit(drive(machine, asked))


def _config(**values: Any) -> MachineConfig:
    from snapshot.schema import encode

    config = MachineConfig(**values)
    try:
        encode(config)
    except SnapshotError as error:
        raise RequestError(f"not a machine we can build: {error}") from None
    return config
