"""The CPU backends, by name: the one place where `vmm` names them, and it imports them only when asked."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

from vmm.clock import GuestClock
from vmm.cpu.protocol import Cpu, CpuState, Intr, IoBus
from vmm.errors import RequestError
from vmm.ram import Ram


class MakeCpu(Protocol):
    """Makes one of a machine's CPUs; `first` is that which was made first, and is closed last."""

    def __call__(self, ram: Ram, bus: IoBus, intr: Intr, clock: GuestClock, first: Cpu | None = None, /) -> Cpu: ...


class Factory(MakeCpu, Protocol):
    """A backend's CPU class."""

    turn_ns: int

    def refusal(self, state: CpuState) -> str | None: ...
    def tsc_khz(self, wanted: int | None = None) -> int: ...


BACKENDS = {  # name -> (module, class)
    "emu": ("emu.cpu", "EmuCpu"),
    "kvm": ("kvmbackend.cpu", "KvmCpu"),
}


def factory(name: str) -> Factory:
    """The constructor of a backend's CPU. Raises RequestError for one there is not."""
    if name not in BACKENDS:
        raise RequestError(f"there is no backend {name!r}; there are {', '.join(sorted(BACKENDS))}")
    module, cpu = BACKENDS[name]
    return cast(Factory, getattr(import_module(module), cpu))


def counts(name: str) -> bool:
    """Whether its CPUs count the code they run: else a machine's position stands still."""
    return name != "kvm"


def probe(name: str) -> str:
    """How this host runs a backend, in one line. Raises BackendError, naming what is missing."""
    module: Any = import_module(factory(name).__module__)
    return str(module.probe())
