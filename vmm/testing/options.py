"""The pytest plugin's options and settings (docs/testing.md), and the lines of pytest's header that say how it runs."""

from __future__ import annotations

import importlib.metadata
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmm.board.board import BOARDS
from vmm.board.config import GIVEN_BOARD, MAX_CPUS
from vmm.errors import BackendError
from vmm.guest.lost import LOST
from vmm.host.shown import shown
from vmm.testing import boots

BACKENDS = ("emu", "kvm")
STARTED_NS = time.time_ns()  # pytest imports this before anything else of ours

_INI = {
    "vm_kernel": "guest: a bzImage, a vmlinux, or with vm_flat any code",
    "vm_initrd": "guest: the initial RAM disk",
    "vm_append": "guest: kernel command line",
    "vm_memory": "guest: MiB of RAM",
    "vm_board": "guest: which chips there are: pc or isapc",
    "vm_cpus": "guest: how many CPUs",
    "vm_ready": "regular expression for the console's line at which the guest is up",
    "vm_patience": "guest seconds to wait for what the console is to show",
    "vm_wall_patience": "the same in seconds of this computer's clock: no wait is longer",
    "vm_lost": "regular expression for a console line of a guest that goes no further: a panic",
    "vm_cache_mib": "MiB of boots that are kept: more, and those not used for longest are removed",
}
_DEFAULTS = {
    "vm_append": "console=ttyS0 mitigations=off",
    "vm_memory": "256",
    "vm_board": GIVEN_BOARD,
    "vm_cpus": "1",
    "vm_ready": "shell ready",
    "vm_patience": "60",
    "vm_wall_patience": "300",
    "vm_lost": LOST,
    "vm_cache_mib": "2048",
}
_CHECKS: dict[str, tuple[Callable[[str], object], str]] = {
    "vm_memory": (lambda given: 1 <= int(given) < 1 << 24, "a number of MiB"),
    "vm_board": (BOARDS.__getitem__, f"a board there is: {', '.join(BOARDS)}"),
    "vm_cpus": (lambda given: 1 <= int(given) <= MAX_CPUS, "a number of CPUs"),
    "vm_cache_mib": (lambda given: 1 <= int(given) < 1 << 40, "a number of MiB"),
    "vm_patience": (lambda given: 0 < float(given) < math.inf, "a number of seconds"),
    "vm_wall_patience": (lambda given: 0 < float(given) < math.inf, "a number of seconds"),
    "vm_ready": (re.compile, "a regular expression"),
    "vm_lost": (re.compile, "a regular expression"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("anyhyve")
    group.addoption(
        "--vm-backend", default="emu", choices=(*BACKENDS, "auto", "all"),
        help="the CPU of the machines: emu (default), kvm, auto (kvm where it is), all (each test on each)",
    )  # fmt: skip
    group.addoption("--require-kvm", action="store_true", help="a test skipped for want of KVM is a failure")
    group.addoption(
        "--vm-roundtrip", type=float, metavar="N",
        help="save every machine each N guest ms, and go on from what was saved",
    )  # fmt: skip
    group.addoption(
        "--vm-artifacts", type=Path, metavar="DIR", help="snapshot, console and trace of the machines of a failed test"
    )
    group.addoption("--vm-slow", action="store_true", help="run tests marked slow_guest, too")
    group.addoption("--vm-cache", metavar="DIR", help="keep boots there (default: $XDG_CACHE_HOME/anyhyve/boots)")
    group.addoption("--vm-no-cache", action="store_true", help="keep no boots, and use none that were kept")
    group.addoption("--vm-cache-clear", action="store_true", help="remove the boots that were kept, first of all")
    for name, text in _INI.items():
        parser.addini(name, text, default=_DEFAULTS.get(name, ""))
    parser.addini("vm_flat", "guest: vm_kernel is code for 0x100000, run in 64-bit mode", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "requires_kvm: needs a KVM; where there is none the test is skipped, and the reason named",
        "backend(*names): the machines' CPU, whatever --vm-backend says: emu, kvm",
        "slow_guest: only with --vm-slow",
        "no_roundtrip(reason): its machines make no round trips",
    ):
        config.addinivalue_line("markers", line)
    every_ms = config.getoption("--vm-roundtrip")
    if every_ms is not None and not 1e-3 <= every_ms < math.inf:
        raise pytest.UsageError("--vm-roundtrip takes a number of guest ms, of at least 0.001")
    for name, (right, what) in _CHECKS.items():
        try:
            good = right(config.getini(name))
        except (ValueError, LookupError, re.error):
            good = False
        if not good:
            raise pytest.UsageError(f"{name} = {config.getini(name)}: not {what}")

    config.stash[CACHE] = cache = Cache.chosen(config)
    if config.getoption("--vm-cache-clear") and cache.folder is not None and not hasattr(config, "workerinput"):
        cache.cleared = boots.evict(cache.folder, -1)


@dataclass
class Cache:
    """Where boots are kept; None, and why they are not."""

    folder: Path | None
    why: str = ""
    cleared: int | None = None  # how many were removed

    @classmethod
    def chosen(cls, config: pytest.Config) -> Cache:
        if config.getoption("--vm-no-cache"):
            return cls(None, "--vm-no-cache")
        if config.getoption("--vm-roundtrip") is not None:
            return cls(None, "--vm-roundtrip is of boots, too")
        given = config.getoption("--vm-cache")
        try:
            folder = boots.place() if given is None else config.invocation_params.dir / given
            boots.check(folder)
        except BackendError as error:
            return cls(None, str(error))
        return cls(folder)

    def __str__(self) -> str:
        if self.folder is None:
            return f"no boots are kept: {shown(self.why)}"
        count, size = boots.usage(self.folder)
        cleared = "" if self.cleared is None else f" ({self.cleared} removed)"
        return f"boots kept in {shown(self.folder)}: {count}, {size / 2**20:.0f} MiB{cleared}"


CACHE = pytest.StashKey[Cache]()


def _backend(config: pytest.Config) -> str:
    name: str = config.getoption("--vm-backend")
    if name != "auto":
        return name
    from vmm.debug import selftest

    chosen, why = selftest.choose()
    return f"auto: {chosen} ({shown(why)})"


def pytest_report_header(config: pytest.Config) -> list[str]:
    version = importlib.metadata.version
    parts = [f"backend {_backend(config)}", f"unicorn {version('unicorn')}", f"CPU {boots.processor()}"]
    parts.append(f"board {config.getini('vm_board')}")
    if (every_ms := config.getoption("--vm-roundtrip")) is not None:
        parts.append(f"a round trip every {every_ms:g} guest ms")
    return [f"anyhyve {version('anyhyve')}: " + ", ".join(parts), f"anyhyve: {config.stash[CACHE]}"]
