"""A machine on this terminal, or under a name, from its start to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from snapshot.errors import SnapshotError
from vmm.cli import outcome, show
from vmm.control import catalog
from vmm.control.automatic import Automatic
from vmm.control.supervisor import Supervisor
from vmm.control.terminal import Terminal
from vmm.cpu import backends
from vmm.errors import BackendError, GuestError, RequestError
from vmm.guest import origin
from vmm.machine.machine import Fault, Machine, Stop, StopReason
from vmm.machine.run import Goal
from vmm.saving import releases

SILENCE_S = 600.0  # of guest time; a guest that is idle passes it in seconds
LOG = "log"  # in the folder of the machine's snapshots
# What ends a run without --save being done.
_NOT_SAVED = (StopReason.QUIT, StopReason.STOPPED, StopReason.SUSPENDED, *outcome.SIGNALS)


@dataclass
class Asked:
    """What to run for, and what to do when it is reached."""

    until: str | None
    at: int | None
    until_time: float | None
    timeout: float | None
    lost: str
    silence: float | None
    save: Path | None
    force: bool
    packed: bool
    parent: Path | None
    for_version: str | None
    keep_boot: bool
    pace: str | None
    as_json: bool
    name: str | None
    rundir: Path | None
    paused: bool
    autosave: int | None
    suspend_on_term: bool
    away: Callable[[Path], None] | None = None  # leaves the terminal (vmm.host.background)

    @property
    def misses(self) -> list[str]:
        """The options whose end it may not come to."""
        return [f"--{name}" for name in ("until", "at") if getattr(self, name) is not None]

    @property
    def awaits(self) -> bool:
        """Whether there is something to reach."""
        return bool(self.misses) or self.until_time is not None or self.timeout is not None

    def goal(self, machine: Machine) -> Goal:
        """Raises RequestError for a position the machine has passed."""
        if self.at is not None and self.at < machine.position:
            raise RequestError(f"--at {self.at}: the machine is at position {machine.position} already")
        until_ns = None if self.until_time is None else machine.clock.now_ns() + round(self.until_time * 1e9)
        silence_ns = None if self.silence is None else round(self.silence * 1e9)
        return Goal(self.at, self.until, None, until_ns, self.lost or None, self.timeout, silence_ns)


def drive(machine: Machine, asked: Asked) -> int:
    """Run to the goal, save, report. Returns the exit status."""
    return _Drive(machine, asked).run()


class _Drive:
    def __init__(self, machine: Machine, asked: Asked) -> None:
        self.vm = Supervisor(machine)
        shows = not asked.as_json and asked.away is None
        self.terminal = Terminal(self.vm, asked.save, force=asked.force) if shows else None
        # Somebody can go on with it.
        self.attended = asked.name is not None or (self.terminal is not None and self.terminal.interactive)
        if asked.until is not None and asked.silence is None and not self.attended:
            asked = replace(asked, silence=SILENCE_S)
        self.machine, self.asked = machine, asked
        self.goal = asked.goal(machine)
        self.versions = None if asked.for_version is None else releases.versions(asked.for_version)
        if asked.save is not None:  # said now, not after an hour's run
            machine.can_save(asked.save, asked.parent, self.versions, force=asked.force)
        if asked.keep_boot:
            self._keep_boot()
            self.vm.listeners.append(self._keep_beside)
        self.vm.listeners.append(self._remember)
        if asked.name is not None:
            self.vm.last_sequence = partial(catalog.last_sequence, asked.name)
        self.saved: str | None = None
        self.saved_at: int | None = None  # position, where it was asked to save by a key meanwhile
        self.unsaved = False

    def run(self) -> int:
        machine, asked, vm = self.machine, self.asked, self.vm
        if machine.backend != "emu":
            _warn_of_the_host(machine.backend)
        for part, place in machine.far_ends.items():
            show.note(f"{part} is at {place}")
        with ExitStack() as stack:
            stack.enter_context(Automatic(vm, asked.name, autosave_s=asked.autosave, suspend=asked.suspend_on_term))
            if asked.name is not None:
                self._name(asked.name, stack)
            if self.terminal is not None:
                stack.enter_context(self.terminal)
            machine.loop.pace_real = asked.pace == "real" or (asked.pace is None and self.attended)
            started = time.perf_counter()
            try:
                stop = vm.run(self.goal, paused=asked.paused, go_on=self._go_on)
            finally:
                vm.close()
        wall = time.perf_counter() - started
        if asked.as_json:
            show.as_json(outcome.report(machine, stop, wall, self.saved))
        else:
            show.note_after_console(self._last_line(stop))
        return 1 if self.unsaved else outcome.status(stop, asked.misses)

    def _go_on(self, stop: Stop) -> Goal | None:
        """What to run for after a stop; None: it has come to its end."""
        if isinstance(stop, Fault):
            return None
        ends_lost = self.asked.awaits or not self.attended
        if stop.reason is StopReason.PANIC and not ends_lost:
            return replace(self.goal, lost=None)
        if stop.reason is StopReason.RESET and not ends_lost:
            return self._restart()
        if self.asked.save is not None and stop.reason not in _NOT_SAVED:
            return self._save(self.asked.save)
        return None

    def _restart(self) -> Goal | None:
        try:
            self.machine.restart()
        except (RequestError, GuestError) as error:
            show.note(error)
            return None
        return self.goal

    def _save(self, path: Path) -> Goal | None:
        """Save at the end; where that fails and somebody can do something about it, the machine runs on."""
        asked = self.asked
        try:
            with show.progress(None, quiet=asked.as_json or self.terminal is None) as progress:
                progress(f"saving to {path}")
                self.machine.save(
                    path, packed=asked.packed, parent=asked.parent, versions=self.versions, force=asked.force
                )
        except (BackendError, RequestError, SnapshotError) as error:
            if not self.attended:
                raise
            self.unsaved = True
            show.note_after_console(f"{error}; the machine runs on, and can be saved again")
            return Goal()
        self.saved = str(path)
        return None

    def _last_line(self, stop: Stop) -> str:
        """What happened, where, and what was saved."""
        asked = self.asked
        said = outcome.words(
            stop,
            misses=asked.misses,
            until=asked.until,
            until_time=asked.until_time,
            timeout=asked.timeout,
            silence=asked.silence,
        )
        if backends.counts(self.machine.backend):
            said = f"{said}, at position {self.machine.position}"
        else:
            said = f"{said}, after {self.machine.clock.now_ns() / 1e9:.3f} s of guest time"
        if self.saved is not None:
            return f"{said}; saved to {self.saved}"
        if asked.save is not None and self.saved_at is not None:
            return f"{said}; {asked.save} is of position {self.saved_at}"
        return f"{said}; not saved to {asked.save}" if asked.save is not None else said

    def _keep_boot(self) -> None:
        image = self.machine.image or self.machine.find_image()
        asked = self.asked
        folders = [catalog.folder(asked.name)] if asked.name is not None else []
        for folder in folders + ([asked.save.parent] if asked.save is not None else []):
            origin.keep(image, folder)

    def _keep_beside(self, event: str, details: dict[str, Any]) -> None:
        """A save that somebody else asked for, wherever to."""
        if event == "saved":
            try:
                origin.keep(self.machine.image or self.machine.find_image(), Path(details["path"]).parent)
            except (BackendError, RequestError) as error:
                self.vm.tell("warning", text=f"a machine woken from {details['path']} may not start again: {error}")

    def _remember(self, event: str, details: dict[str, Any]) -> None:
        if event == "saved" and self.asked.save is not None and details["path"] == str(self.asked.save.absolute()):
            self.saved_at = details["position"]

    def _name(self, name: str, stack: ExitStack) -> None:
        """Let others ask for the machine."""
        from vmm.control.place import Place, rundir
        from vmm.control.server import Server

        vm, asked = self.vm, self.asked
        # After the signals: no socket is left by a signal that came too early.
        stack.enter_context(Server(vm, Place(rundir(asked.rundir), name)))
        catalog.clear(name)  # the name is ours by now
        vm.machine.loop.awaits_input = True  # somebody may attach
        vm.listeners.append(_warn)
        if asked.away is not None:
            log = catalog.folder(name) / LOG
            show.line(f"{name} runs; what it has to say goes to {log}")
            asked.away(log)


def _warn_of_the_host(backend: str) -> None:
    from vmm.debug import selftest

    if (why_not := selftest.findings(backend).runs) is not None:
        show.note(f"warning: {why_not}: no operating system comes up on it, as it does with --backend emu")


def _warn(event: str, details: dict[str, Any]) -> None:
    if event == "warning":
        with suppress(OSError):  # nobody reads it
            show.note(details["text"])
