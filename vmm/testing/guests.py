"""Machines whose guest is up, for the pytest plugin: what boots or wakes them, talks with them, comes back to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmm.errors import BackendError, GuestError, RequestError
from vmm.machine.machine import Machine, MachineConfig
from vmm.testing import boots
from vmm.testing.artifacts import left
from vmm.testing.boots import Boots
from vmm.testing.expect import Expect
from vmm.testing.options import STARTED_NS

if TYPE_CHECKING:
    from vmm.guest.image import Image
    from vmm.machine.moment import Moment


class Guest:
    """The guest of a session on one CPU, up. A boot that failed is not tried again for every test. All raise GuestError
    when it does not come up, with what is left of it."""

    def __init__(self, backend: str, image: Image, config: pytest.Config, cache: Boots) -> None:
        self._backend, self._image, self._config, self._cache = backend, image, config, cache
        memory = int(config.getini("vm_memory")) << 20
        cpus = int(config.getini("vm_cpus"))
        self._machine = MachineConfig(memory_bytes=memory, board=config.getini("vm_board"), cpus=cpus)
        self._failed: str | None = None
        code = cache.code(STARTED_NS)
        self._key = boots.key(self._machine, image, backend, config.getini("vm_ready"), code)

    @property
    def cached(self) -> bool:
        """Whether it may be kept for other processes."""
        return self._cache.folder is not None

    def boot(self) -> Machine:
        """One that is booted now."""
        if self._failed is not None:
            raise GuestError(f"no guest, as before: {self._failed}")
        try:
            machine = Machine.boot(self._machine, self._image, self._backend)
            try:
                until_ready(machine, self._config)
            except BaseException:
                machine.close()
                raise
        except (GuestError, BackendError, RequestError) as error:
            self._failed = str(error).split("\n")[0]
            raise
        return machine

    def wake(self) -> Machine:
        """One out of the cache. Its console shows what the guest wrote when it was booted, and it can be restarted."""

        def load(file: Path) -> Machine:
            machine = Machine.restore(file, self._backend, verify=True)
            machine.board.console.recall(boots.shown(file))
            machine.image = self._image
            return machine

        return self._cache.get(self._key, self.boot, load)

    def file(self) -> Path:
        """It as a snapshot, all of it checked."""

        def load(file: Path) -> Path:
            Machine.restore(file, self._backend, verify=True).close()
            return file

        return self._cache.get(self._key, self.boot, load)


@dataclass
class Marked:
    """A machine to come back to; made again after a test that closed it."""

    make: Callable[[], Machine]
    machine: Machine | None = None
    moment: Moment | None = None
    written: dict[str, bytes] = field(default_factory=dict)  # by then, at each console

    def again(self) -> Machine:
        machine = self.machine
        if machine is None or machine.closed or self.moment is None:
            machine = self.machine = self.make()
            self.moment = machine.moment()
            self.written = {name: console.read(0)[1] for name, console in machine.board.consoles.items()}
        machine.rewind(self.moment)
        for name, console in machine.board.consoles.items():
            console.typed.clear()
            console.keep(self.written[name])
        return machine

    def close(self) -> None:
        if self.machine is not None:
            self.machine.close()


def talk(machine: Machine, config: pytest.Config) -> Expect:
    patience, wall = (float(config.getini(name)) for name in ("vm_patience", "vm_wall_patience"))
    return Expect(machine, seconds=patience, wall_seconds=wall, lost=config.getini("vm_lost") or None)


def until_ready(machine: Machine, config: pytest.Config) -> None:
    """Raises GuestError when it does not come up, with what is left of it."""
    try:
        talk(machine, config).expect(config.getini("vm_ready"))
    except GuestError as error:
        folder = config.getoption("--vm-artifacts")
        lines = [] if folder is None else left([machine], folder / "boot", None)
        raise GuestError("\n".join((f"{error}\n(vm_ready says what to wait for)", *lines))) from None
