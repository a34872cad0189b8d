"""`anyhyve guest`: guests to try."""

from __future__ import annotations

from pathlib import Path

import click

from snapshot.files import read_file
from vmm.cli import show
from vmm.cli.options import FOLDER, NO_FOLDER
from vmm.errors import GuestError


@click.group()
def guest() -> None:
    """Guests to try."""


@guest.command()
@click.option("--dir", "folder", required=True, type=FOLDER, help="The folder they are put in.")
@click.option("--init", type=NO_FOLDER, help="Script to run as /init.")
def fetch(folder: Path, init: Path | None) -> None:
    """Get a Debian kernel and busybox, and make DIR/vmlinuz, DIR/vmlinux, DIR/initrd.img."""
    from vmm.guest.debian import fetch as get

    script = None
    if init is not None:
        try:
            script = read_file(init).decode()
        except OSError as error:
            raise GuestError(f"{init}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise GuestError(f"{init}: not text") from None
    with show.progress(None) as progress:
        get(folder, script, progress=progress)
