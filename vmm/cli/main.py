"""The command line: which commands there are, and whose fault a failure is.

Exit status: 0 done, 1 a fault named in one line on standard error, 2 wrong usage, 3 the guest stopped before what was
asked for (--until, --at), 130 Ctrl-C. A guest that ends itself through the debug-exit port passes its own status on.
Where standard output takes nothing, or nobody reads it any more, that is 1; a standard stream that is closed is as
/dev/null.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from snapshot.errors import SnapshotError
from vmm.cli import show
from vmm.errors import BackendError, GuestError, RequestError
from vmm.host import streams
from vmm.host.shown import shown

_COMMANDS = {  # command: module, attribute; imported when asked for: nobody waits for what he does not use
    "attach": ("vmm.cli.control", "attach"),
    "catalog": ("vmm.cli.catalog", "catalog_group"),
    "ctl": ("vmm.cli.control", "ctl"),
    "devices": ("vmm.cli.devices", "devices"),
    "doctor": ("vmm.cli.doctor", "doctor"),
    "fuzz": ("vmm.cli.fuzz", "fuzz"),
    "guest": ("vmm.cli.guest", "guest"),
    "list": ("vmm.cli.control", "list_machines"),
    "lockstep": ("vmm.cli.lockstep", "lockstep"),
    "replay": ("vmm.cli.replay", "replay"),
    "restore": ("vmm.cli.run", "restore"),
    "run": ("vmm.cli.run", "run"),
    "snapshot": ("vmm.cli.snapshot", "snapshot"),
    "suspend-all": ("vmm.cli.catalog", "suspend_all"),
    "wake": ("vmm.cli.run", "wake"),
}
_HELP: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())  # of click 8.2 on: its message is the help
_ALIKE = 0.75  # of 1: what was mistyped, and not what is merely of the same length
_COMMAND_ALIKE = 0.65  # two letters of three
_WERE = {"resume": "wake", "snapshots": "catalog"}  # old names: they work, and are not shown


@contextmanager
def _usage_in_a_line() -> Iterator[None]:
    """Context manager: what click says of wrong usage has the words that were wrong in it."""
    try:
        yield
    except click.ClickException as error:
        if isinstance(error, _HELP):
            raise
        vars(error).update(message=shown(error.message))
        if isinstance(error, click.NoSuchOption) and error.possibilities:
            near = get_close_matches(error.option_name, error.possibilities, cutoff=_ALIKE)
            vars(error).update(possibilities=near)
        raise


@contextmanager
def _one_line() -> Iterator[None]:
    """Context manager: a fault that has a name ends the process with a line."""
    try:
        yield
    except SnapshotError as error:
        show.note(error if error.file is None else f"{error.file}: {error}")
        sys.exit(1)
    except (GuestError, BackendError, RequestError) as error:
        show.note(error)
        sys.exit(1)
    except KeyboardInterrupt:
        show.note("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        show.note(f"{where}{error.strerror or error}")
        sys.exit(1)
    except Exception as error:
        kinds = sys.modules.get("vmm.board.kinds")
        if kinds is None or (said := kinds.at_fault(error)) is None:
            raise
        show.note(f"a device's code fails: {said}")
        sys.exit(1)


class _Main(click.Group):
    """One clear line for whoever is at fault; a traceback only for our own bugs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # Without what each says of itself: that would import them all, at each press of a key.
        names = [CompletionItem(name) for name in _COMMANDS if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = _WERE.get(args[0], args[0])
        if name not in _COMMANDS and (near := get_close_matches(name, [*_COMMANDS, "help"], 1, _COMMAND_ALIKE)):
            ctx.fail(f"No such command '{name}'. Did you mean {near[0]}?")
        return super().resolve_command(ctx, [name, *args[1:]])

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        show.begin()
        with _usage_in_a_line(), _one_line(), streams.writing():  # --help, --version
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _usage_in_a_line(), _one_line():
            return super().invoke(ctx)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="anyhyve", prog_name="anyhyve")
def main() -> None:
    """Save a running PC on one CPU, wake it on another."""
