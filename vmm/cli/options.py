"""Values and options that several commands take."""

from __future__ import annotations

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from snapshot.errors import Refused, check_path
from vmm.board.config import GIVEN_BOARD, DeviceConfig
from vmm.cli import show
from vmm.cpu import backends
from vmm.saving.saved import ALLOWABLE

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Memory(click.ParamType[int]):
    """A size such as 256M or 4G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+)([KMG]?)", str(value).upper())
        if not match:
            self.fail(f"{value!r} is not a size such as 256M", param, ctx)
        if not match[2] and 0 < int(match[1]) < 1 << 20:
            self.fail(f"{match[1]} is a number of bytes; is {match[1]}M meant?", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


class Epoch(click.ParamType[int]):
    """Unix seconds, or `now`."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        seconds = str(int(time.time())) if value == "now" else str(value)
        if not re.fullmatch(r"\d{1,10}", seconds) or int(seconds) > 1 << 33:
            self.fail(f"{value!r} is neither Unix seconds nor `now`", param, ctx)
        return int(seconds)


class Seconds(click.ParamType[float]):
    """More than none, and not for ever."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= 1e9:
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


class Pattern(click.ParamType[str]):
    """A regular expression."""

    name = "regex"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            re.compile(value)
        except re.error as error:
            self.fail(f"not a regular expression: {error}", param, ctx)
        return str(value)


class Device(click.ParamType[DeviceConfig]):
    """A device: KIND,option=value or a JSON object with "kind"."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> DeviceConfig:
        return value if isinstance(value, DeviceConfig) else DeviceConfig.parse(str(value))


class BhyveSlot(click.ParamType[DeviceConfig | None]):
    """A device as bhyve's -s has it: [0:]SLOT[:FUNCTION],KIND[,OPTION=VALUE]. None for one that a board has anyway."""

    name = "slot"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> DeviceConfig | None:
        if value is None or isinstance(value, DeviceConfig):
            return value
        where, _, what = str(value).partition(",")
        if (found := re.fullmatch(r"(?:0:)?(\d+)(?::(\d+))?", where)) is None or not what:
            self.fail(f"{value!r} is not SLOT[:FUNCTION],KIND", param, ctx)
        if int(found[1]) > 31 or int(found[2] or 0) > 7:
            self.fail(f"{value!r}: slots are 0 to 31, functions 0 to 7", param, ctx)
        if what.partition(",")[0] in ("hostbridge", "amd_hostbridge", "lpc"):
            return None
        device = DeviceConfig.parse(what)
        if device.place:
            self.fail(f"{value!r} says twice where it is", param, ctx)
        return replace(device, place=f"slot={found[1]}.{found[2] or 0}")


class Binding(click.ParamType[tuple[str, str]]):
    """A part and what is at its far end."""

    name = "binding"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        part, equals, end = str(value).partition("=")
        if not (part and equals and end):
            self.fail(f"{value!r} is not PART=END, such as com2=socket:PATH", param, ctx)
        return part, end


class Place(click.Path):
    """A path that the host can have."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            check_path(value)
        except Refused as error:
            self.fail(f"{error.filename}: {error.strerror}", param, ctx)
        return Path(os.fsdecode(super().convert(value, param, ctx)))


FILE = Place(path_type=Path)
NO_FOLDER = Place(path_type=Path, dir_okay=False)
FOLDER = Place(path_type=Path, file_okay=False)
PARENT = "Save only what differs from this snapshot, in the same folder."

json_option = click.option(
    "--json", "as_json", is_flag=True, help="The result as JSON on standard output, and nothing else there."
)
rundir_option = click.option(
    "--rundir", type=FOLDER, help="The folder of the machines' sockets.  [default: $XDG_RUNTIME_DIR/anyhyve]"
)
backend_option = click.option(
    "--backend",
    default="emu",
    show_default=True,
    metavar="emu|kvm|auto",
    help="Which CPU; auto is kvm where this host's can run a guest, and says which it took.",
)
board_option = click.option(
    "--board",
    type=click.Choice(["isapc", "pc"]),
    help="Which chips there are: isapc has a PC/AT's, pc has PCI, ACPI, APICs and HPET besides.  "
    f"[default: {GIVEN_BOARD}]",
)
allow_option = click.option(
    "--allow", multiple=True, type=click.Choice(ALLOWABLE), help="What may differ from what was saved."
)
force_option = click.option("--force", is_flag=True, help="Replace any file, also one that others stand on.")
pack_option = click.option("--pack", "packed", is_flag=True, help="Pack the RAM with zstd.")


def chosen(backend: str) -> str:
    """The name of the CPU that --backend means here. Raises RequestError when there is none of that name."""
    if backend != "auto":
        backends.factory(backend)
        return backend
    from vmm.debug import selftest

    name, why = selftest.choose()
    show.note(f"backend {name}: {why}")
    return name
