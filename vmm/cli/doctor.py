"""What this computer can do: each finding is one line, with its reason."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import version

import click

from vmm.cli import show
from vmm.cli.options import json_option
from vmm.cpu import backends
from vmm.debug import selftest
from vmm.errors import BackendError


def examine(names: Iterable[str]) -> dict[str, str]:
    """Finding by subject; the backends' findings start with `ready` or `not ready`."""
    findings = {
        "host": f"{platform.system()} {platform.release()} {platform.machine()}, Python {sys.version.split()[0]}",
        "unicorn": version("unicorn"),
    }
    for name in names:
        findings.update(_backend(name))
    if not os.path.exists("/dev/kvm"):
        findings["/dev/kvm"] = "not there"
    else:
        findings["/dev/kvm"] = "readable and writable" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "no permission"
    findings["apt-get"] = shutil.which("apt-get") or "not there: `guest fetch` needs it"
    return findings


def _backend(name: str) -> dict[str, str]:
    try:
        found = selftest.examine(name)
    except BackendError as error:
        return {name: f"not ready: {error}"}
    findings = {name: f"ready: {backends.probe(name)}" if found.runs is None else f"not ready: {found.runs}"}
    if name != "emu":
        findings[f"lockstep with {name}"] = "ready" if found.stepping is None else f"not ready: {found.stepping}"
    return findings


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """What this computer can do, and why not where it cannot."""
    findings = examine(backends.BACKENDS)
    if as_json:
        show.as_json(findings)
    else:
        show.table(("what", "finding"), findings.items())
    sys.exit(0 if findings["emu"].startswith("ready") else 1)
