"""Machines whose guest is up, for the pytest plugin: what boots them, talks with them and comes back to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from vmm.errors import GuestError
from vmm.machine.machine import Machine, MachineConfig
from vmm.testing.artifacts import left
from vmm.testing.expect import Expect

if TYPE_CHECKING:
    from vmm.guest.image import Image
    from vmm.machine.moment import Moment


def boot(backend: str, image: Image, config: pytest.Config) -> Machine:
    """The guest, up."""
    machine = Machine.boot(MachineConfig(memory_bytes=int(config.getini("vm_memory")) << 20), image, backend)
    try:
        until_ready(machine, config)
    except BaseException:
        machine.close()
        raise
    return machine


@dataclass
class Booted:
    """The guest when it is up, to come back to; booted again after a test that closed the machine."""

    boot: Callable[[], Machine]
    machine: Machine | None = None
    moment: Moment | None = None
    failed: str | None = None  # why it could not be booted: it is not tried again for every test

    def again(self) -> Machine:
        machine = self.machine
        if self.failed is not None:
            pytest.fail(f"no guest, as before: {self.failed}", pytrace=False)
        if machine is None or machine.closed or self.moment is None:
            try:
                machine = self.machine = self.boot()
            except BaseException as error:
                self.failed = str(error).split("\n")[0]
                raise
            self.moment = machine.moment()
        machine.rewind(self.moment)
        for console in machine.board.consoles.values():
            console.typed.clear()
        return machine

    def close(self) -> None:
        if self.machine is not None:
            self.machine.close()


def talk(machine: Machine, config: pytest.Config) -> Expect:
    patience, wall = (float(config.getini(name)) for name in ("vm_patience", "vm_wall_patience"))
    return Expect(machine, seconds=patience, wall_seconds=wall, lost=config.getini("vm_lost") or None)


def until_ready(machine: Machine, config: pytest.Config) -> None:
    try:
        talk(machine, config).expect(config.getini("vm_ready"))
    except GuestError as error:
        folder = config.getoption("--vm-artifacts")
        lines = [] if folder is None else left([machine], folder / "boot", None)
        pytest.fail("\n".join((f"{error}\n(vm_ready says what to wait for)", *lines)), pytrace=False)
