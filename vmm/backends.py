"""The CPU backends, by name: the one place where `vmm` names them, and it imports them only when asked."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

from vmm.clock import GuestClock
from vmm.cpu import Cpu, CpuState, Intr, IoBus
from vmm.errors import BackendError
from vmm.ram import Ram


class Factory(Protocol):
    """A backend's CPU class."""

    def __call__(self, ram: Ram, bus: IoBus, intr: Intr, clock: GuestClock) -> Cpu: ...
    def refusal(self, state: CpuState) -> str | None: ...


# name -> (module, class); None where a backend is planned and not there yet
BACKENDS: dict[str, tuple[str, str] | None] = {
    "emu": ("emu.cpu", "EmuCpu"),
    "kvm": None,
}


def factory(name: str) -> Factory:
    """The constructor of a backend's CPU. Raises BackendError, naming what is missing."""
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; there are {', '.join(sorted(BACKENDS))}")
    place = BACKENDS[name]
    if place is None:
        raise BackendError(f"the {name} backend is not built yet; use --backend emu")
    module: Any = import_module(place[0])
    return cast(Factory, getattr(module, place[1]))
