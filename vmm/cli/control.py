"""`anyhyve ctl`, `list` and `attach`: a running machine's socket from the command line.

Exit status: 0 done, 1 the answer was an error (its text is printed), 130 cancelled by Ctrl-C (the machine runs on).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from vmm.cli import show
from vmm.cli.options import FILE, Seconds, json_option, rundir_option
from vmm.control import place, protocol
from vmm.control.client import Client, Failed, sense
from vmm.control.client import result as answer
from vmm.control.dispatch import Method
from vmm.control.methods import METHODS
from vmm.errors import BackendError, RequestError

_LIST_TIMEOUT_S = 2.0
_WAIT_S = 60
_ESCAPE = re.compile(r"\\(?:([nrt\\])|x([0-9A-Fa-f]{2})|.?)", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


class _Ctl(click.Group):
    """One subcommand a method, made from its signature."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(METHODS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(METHODS[cmd_name]) if cmd_name in METHODS else None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # bhyvectl names the machine by an option; then there is no NAME before the command.
        kept = self.params
        if any(arg == "--vm" or arg.startswith("--vm=") for arg in args):
            self.params = [param for param in kept if param.name != "name"]
        try:
            return super().parse_args(ctx, args)
        finally:
            self.params = kept


@click.group(cls=_Ctl, invoke_without_command=True, subcommand_metavar="METHOD [ARGS]...")
@click.argument("name", metavar="NAME", required=False)
@click.option("--vm", metavar="NAME", help="The machine NAME, as bhyvectl spells it; so is what follows.")
@click.option("--checkpoint", type=FILE, metavar="FILE", help="Save and go on.")
@click.option("--suspend", type=FILE, metavar="FILE", help="Save, then end.")
@click.option("--destroy", is_flag=True, help="End without saving.")
@click.option("--force-poweroff", is_flag=True, help="The same.")
@click.option("--force-reset", is_flag=True, help="Start the guest again.")
@click.option("--get-stats", is_flag=True, help="Show counts.")
@click.option("--get-all", is_flag=True, help="Show status, counts and devices.")
@rundir_option
@json_option
@click.pass_context
def ctl(
    ctx: click.Context, vm: str | None, checkpoint: Path | None, suspend: Path | None, destroy: bool,
    force_poweroff: bool, force_reset: bool, get_stats: bool, get_all: bool, rundir: Path | None, as_json: bool,
    name: str | None = None,
) -> None:  # fmt: skip
    """Ask the machine NAME, which runs: the answer is the result."""
    ctx.obj = place.rundir(rundir), vm or name, as_json
    asked = [
        *([("checkpoint", {"path": str(checkpoint.absolute())})] if checkpoint else []),
        *([("suspend", {"path": str(suspend.absolute())})] if suspend else []),
        *([("reset", {})] if force_reset else []),
        *([("stats", {})] if get_stats else []),
        *([(each, {}) for each in ("status", "stats", "devices")] if get_all else []),
        *([("stop", {})] if destroy or force_poweroff else []),
    ]
    if ctx.obj[1] is None or (ctx.invoked_subcommand is None) == (not asked):
        raise click.UsageError("which machine, and what of it? `ctl NAME METHOD`, or `ctl --vm=NAME --checkpoint=FILE`")
    for method, params in asked:
        _ask(ctx, method, params)


def _command(method: Method) -> click.Command:
    params: list[click.Parameter] = []
    for name, param in method.params.items():
        said = param.doc.partition(";")[0]  # what is behind it is of values that only JSON has
        kinds, doc = param.kinds, f"{said[0].upper()}{said[1:]}."
        kind: Any = FILE if Path in kinds else kinds[0]
        option = f"--{name.replace('_', '-')}"
        if param.needed:
            saves = method.name in ("checkpoint", "suspend")  # without a name: into the catalog
            params.append(click.Argument([name], type=kind, required=not saves))
        elif bool in kinds:
            params.append(click.Option([option, name], is_flag=True, help=doc))
            params += [click.Option([f"--{old}"], is_flag=True, hidden=True) for old in param.was]
        else:
            kind = str if kinds[0] is list else kind
            params.append(click.Option([option, name], type=kind, multiple=kinds[0] is list, help=doc))

    if method.name == "console.write":
        doc = r"DATA has escapes: \n, \r, \t, \\, and \xHH for the byte of that hexadecimal number."
        params.append(click.Option(["--escape"], is_flag=True, help=doc))

    @click.command(method.name, params=params, help=method.doc)
    @json_option
    @click.pass_context
    def command(ctx: click.Context, /, as_json: bool, escape: bool = False, **values: Any) -> None:
        if escape:
            values["data"] = _unescaped(values["data"])
        ctx.obj = *ctx.obj[:2], ctx.obj[2] or as_json
        # What is not asked for is not said: the machine may be of an older release, and not know of it.
        said = {name: _plain(value) for name, value in values.items() if value not in (None, ()) and value is not False}
        _ask(ctx, method.name, said)

    return command


def _unescaped(text: str) -> str:
    """Raises click.UsageError."""

    def character(found: re.Match[str]) -> str:
        if found[1] is None and found[2] is None:
            raise click.UsageError(rf"{found[0]!s} is no escape: there are \n, \r, \t, \\ and \xHH")
        return _ESCAPED[found[1]] if found[2] is None else chr(int(found[2], 16))

    return _ESCAPE.sub(character, text)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    return list(value) if isinstance(value, tuple) else value


def _ask(ctx: click.Context, method: str, params: dict[str, Any]) -> None:
    folder, name, as_json = ctx.obj
    try:
        with Client(folder, name) as client:
            if method in ("checkpoint", "suspend"):
                result = _save(client, method, params) if "path" in params else _save_in_catalog(client, method, params)
            elif method == "events":
                _follow(client, params)
            else:
                result = client.call(method, **params)
    except Failed as error:
        show.note(f"{name}: {error}")
        sys.exit(130 if error.code == protocol.CANCELLED else 1)
    if as_json:
        show.as_json(result)
        return
    with sense(name):
        if method == "console.read":
            show.console(result["data"].encode("latin-1"))
        else:
            _show(result)


def _save_in_catalog(client: Client, method: str, params: dict[str, Any]) -> Any:
    from vmm.control import catalog

    def save(path: Path) -> Any:
        return _save(client, method, {**params, "path": str(path)})

    if method == "checkpoint":
        return save(catalog.new(client.name))
    return catalog.over(client.name, catalog.SUSPENDED, save)


def _save(client: Client, method: str, params: dict[str, Any]) -> Any:
    """Ask for a save and show how far it is; Ctrl-C cancels it, and the machine runs on. Returns the answer. Raises
    Failed."""
    client.call("events", kinds=["progress"])
    call, what = None, f"{method} {client.name}"
    with show.progress(None, "bytes") as progress:
        progress(what)
        while True:
            try:
                if call is None:
                    call = client.ask(method, **params)
                message = client.read()
                with sense(client.name):
                    if message.get("method") == "event":
                        progress(what, float(message["params"]["done"]), float(message["params"]["total"]))
                    elif message.get("id") == call:
                        return answer(message)
            except KeyboardInterrupt:
                client.ask("cancel")


def _follow(client: Client, params: dict[str, Any]) -> None:
    """Print events as JSON lines, until the machine ends or Ctrl-C; then exit."""
    client.call("events", **params)
    try:
        while True:
            message = client.read()
            if message.get("method") == "event":
                with sense(client.name):
                    show.as_json(message["params"])
    except (BackendError, RequestError, KeyboardInterrupt):
        sys.exit(0)


def _show(result: Any) -> None:
    if isinstance(result, list):
        show.table(
            [*(result[0] if result else ["nothing"])], ([_cell(cell) for cell in row.values()] for row in result)
        )
        return
    for key, value in result.items():
        show.line(f"{key}: {json.dumps(value) if isinstance(value, dict | bool) or value is None else value}")


def _cell(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


@click.command("list")
@rundir_option
@json_option
def list_machines(rundir: Path | None, as_json: bool) -> None:
    """The machines that run here."""
    folder, found, rows = place.rundir(rundir), list[dict[str, Any]](), list[tuple[object, ...]]()
    for name in place.names(folder):
        try:
            with Client(folder, name, timeout_s=_LIST_TIMEOUT_S) as client:
                status = client.call("status")
                with sense(name):
                    rows.append(_row(status))
                found.append(status)
        except (BackendError, RequestError, Failed) as error:
            found.append({"name": name, "state": f"does not answer: {error}"})
            rows.append(tuple(found[-1].values()))
    if as_json:
        show.as_json(found)
    elif not found:
        show.line("no machine with a name runs here")
    else:
        show.table(("name", "state", "backend", "pid", "memory MiB", "guest time"), rows)


def _row(status: dict[str, Any]) -> tuple[object, ...]:
    memory, seconds = status["memory_bytes"] >> 20, status["guest_ns"] / 1e9
    return *(status[key] for key in ("name", "state", "backend", "pid")), memory, f"{seconds:.3f} s"


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--wait", "wait_s", type=Seconds(), is_flag=False, flag_value=_WAIT_S, metavar="[SECONDS]",
              help=f"Wait for a machine that is not there yet.  [without SECONDS: {_WAIT_S}]")  # fmt: skip
@rundir_option
def attach(name: str, wait_s: float | None, rundir: Path | None) -> None:
    """Join the console of the machine NAME. Ctrl-] then d leaves it, and the machine runs on; Ctrl-] then ? says the
    keys."""
    from vmm.control.attach import attach as join

    sys.exit(join(place.rundir(rundir), name, wait_s or 0.0))
