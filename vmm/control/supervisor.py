"""A machine under command: paused, resumed, saved and stopped from any thread while its own thread runs it.

    vm = Supervisor(machine)
    threading.Thread(target=vm.run).start()
    vm.save(path).result()          # a checkpoint: the machine runs on
    vm.save(path, end=True)         # a suspend: saved, then ended

Rules
* Whatever changes the machine happens on its thread, between two instructions. Every command's answer is a Future.
* A save that fails, for whatever reason, changes nothing: the machine goes on as it was.
* One save at a time; a suspend waits for the one under way, and who asks for the same suspend has the same answer. What
  was begun is finished even when the machine ends meanwhile: see `close`.
* What a save needs of the host is there before the guest runs (its thread), or its want fails that one save.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vmm.control.lifecycle import ALIVE, Lifecycle, State
from vmm.errors import BackendError, Cancelled, RequestError
from vmm.machine.machine import Fault, Machine, Stop, Stopped, StopReason
from vmm.machine.run import Goal
from vmm.saving.checkpoint import Checkpoint, NoProcess

QUIESCE_S = 5.0  # a machine not between two instructions by then (its console's reader is stuck, say) is not saved

T = TypeVar("T")
Listener = Callable[[str, dict[str, Any]], None]  # an event's name and its details
_COMMAND = Stopped(StopReason.COMMAND)


class WrongState(RequestError):
    """The command has no meaning in the state the machine is in."""


@dataclass(eq=False)
class Save:
    """A save from its asking to its answer. `saved` has path, position, guest_ns, pause_s, wall_s, size_bytes."""

    path: Path
    end: bool
    hold: bool
    options: dict[str, Any]
    saved: Future[dict[str, Any]] = field(default_factory=Future)
    cancelled: bool = False
    checkpoint: Checkpoint | None = None  # None also where no process could be had to write it
    found: dict[str, Any] = field(default_factory=dict)  # of the instant
    pause_s: float = 0.0

    def same(self, other: Save) -> bool:
        """Whether one file can be the answer to both."""
        return (self.path, self.end, self.options) == (other.path, other.end, other.options)


class Supervisor:
    """Owns how a machine runs, not the machine. All methods but `run` may be called from any thread."""

    def __init__(self, machine: Machine, *, quiesce_s: float = QUIESCE_S) -> None:
        self.machine = machine
        self.listeners: list[Listener] = []
        self._life = Lifecycle(lambda state: self.tell("state", state=state))
        self.quiesce_s = quiesce_s
        self.last_sequence: Callable[[], int] = lambda: 0  # of the saves there are already; asked at the first
        self._sequence: int | None = None
        self._end: Stop | None = None
        self._lock = threading.Lock()  # over what is below
        self._waiting: set[Future[Any]] = set()
        self._saves: list[Save] = []  # the one under way, and a suspend that waits for its end
        self._suspended: Save | None = None  # how the machine came to its end, for who asks once more
        self._saver = ThreadPoolExecutor(1, "save")

    # --- the machine's thread

    def run(
        self, goal: Goal | None = None, *, paused: bool = False, go_on: Callable[[Stop], Goal | None] = lambda _: None
    ) -> Stop:
        """Run the machine as `Machine.run` does, and do what is commanded meanwhile. Returns why it ended. `go_on` is
        asked, on the machine's thread, at each stop that nobody commanded: for what to run on, None for the end. A
        guest that is lost is told of as the event `panic`. Raises what `Machine.run` and `go_on` raise, and
        BackendError when the host has no thread to save with."""
        self._have_a_saver()
        self._life.move(State.PAUSED if paused else State.RUNNING)
        next: Goal | None = goal or Goal()
        try:
            while next is not None:
                self.machine.loop.aim(next)
                stop = self._to_a_stop()
                if isinstance(stop, Stopped) and stop.reason is StopReason.PANIC:
                    self.tell("panic", line=stop.why)
                next = None if self._end is not None else go_on(stop)
        except Exception as error:
            self._over(State.FAILED, str(error))
            raise
        except BaseException:  # Ctrl-C
            self._over(State.STOPPED, "interrupted")
            raise
        self._over(State.FAILED if isinstance(stop, Fault) else State.STOPPED, str(stop))
        return stop

    def _to_a_stop(self) -> Stop:
        """Run, or stand still, until the machine stops or its end is commanded."""
        loop = self.machine.loop
        while (stop := loop.go_on() if self.state is State.RUNNING else loop.stand_still()) == _COMMAND:
            if self._end is not None:
                return self._end
        return self._end or stop

    def _over(self, state: State, why: str) -> None:
        self._life.move(state)
        with self._lock:
            rest, self._waiting = self._waiting, set()
        for future in rest:
            if future.set_running_or_notify_cancel():
                future.set_exception(WrongState(f"the machine has ended: {why}"))

    # --- commands

    @property
    def state(self) -> State:
        return self._life.state

    @property
    def alive(self) -> bool:
        """Whether it has not come to its end."""
        return self.state in ALIVE

    def pause(self) -> Future[bool]:
        """Let the machine stand still. The Future says whether it ran until now."""
        return self.at_safe_point(lambda: self._move(State.RUNNING, State.PAUSED))

    def resume(self) -> Future[bool]:
        """Let a machine that is paused go on. The Future says whether it was paused."""
        return self.at_safe_point(lambda: self._move(State.PAUSED, State.RUNNING))

    def reset(self) -> Future[None]:
        """Start the guest again, as after power-on. The Future fails with RequestError for a machine without an
        image to start from."""
        return self.at_safe_point(self.machine.restart)

    def stop(self, why: StopReason = StopReason.STOPPED) -> Future[None]:
        """End the machine without saving."""

        def end() -> None:
            self._end = Stopped(why)

        return self.at_safe_point(end)

    def save(
        self,
        path: Path,
        *,
        end: bool = False,
        hold: bool = False,
        packed: bool = False,
        parent: Path | None = None,
        versions: Mapping[str, int] | None = None,
        force: bool = False,
    ) -> Future[dict[str, Any]]:
        """Save to `path`: with `end` the machine then ends, with `hold` or `end` it stands still until the file is on
        disk. A suspend (`end`) waits for a save under way, and the same one asked for again, even after the machine's
        end, is the same Future. Raises WrongState when another save is under way or the machine has ended; the Future
        fails as `Machine.save` does, with Cancelled, or with BackendError when the machine does not come to a safe
        point in time."""
        options = {"packed": packed, "parent": parent, "versions": versions, "force": force}
        asked = Save(path, end, hold or end, options)
        with self._lock:
            for other in (*self._saves, self._suspended):
                if other is not None and other.end and asked.same(other):
                    return other.saved
            if self._saves and (not end or self._saves[-1].end):
                raise WrongState(f"a save to {self._saves[-1].path} is under way")
            if not self.alive:
                raise WrongState(f"the machine is {self.state}")
            asked.saved.set_running_or_notify_cancel()  # who stops waiting for it does not cancel it
            self._have_a_saver()
            self._saver.submit(self._see_through, asked)
            self._saves.append(asked)
        return asked.saved

    def cancel(self) -> Path | None:
        """Give up what is being saved and is not on disk yet. Returns the path of the save under way, None when there
        is none."""
        with self._lock:
            given_up = list(self._saves)
            for asked in given_up:
                asked.cancelled = True
        for asked in given_up:
            if asked.checkpoint is not None:
                asked.checkpoint.cancel()
        return given_up[0].path if given_up else None

    def saving(self) -> Path | None:
        """The path of the save that is under way, None when there is none."""
        with self._lock:
            return self._saves[0].path if self._saves else None

    def at_safe_point(self, action: Callable[[], T]) -> Future[T]:
        """Do `action` on the machine's thread, between two instructions. The Future has its result or its exception,
        or fails with WrongState when the machine ends first."""
        future: Future[T] = Future()

        def command(_: Machine) -> Stop | None:
            with self._lock:
                self._waiting.discard(future)
            before = self.state
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action())
                except Exception as error:
                    future.set_exception(error)
                except BaseException:  # Ctrl-C, in the middle of it: nobody must wait for ever
                    future.set_exception(WrongState("the machine has ended: interrupted"))
                    raise
            return None if self.state is before and self._end is None else _COMMAND

        with self._lock:
            ended = not self.alive
            if not ended:
                self._waiting.add(future)
        if ended:
            future.set_exception(WrongState(f"the machine is {self.state}"))
        else:
            self.machine.post(command)
        return future

    def close(self) -> None:
        """Wait for a save under way, which the end of the machine does not take back. There are no more after it."""
        self._saver.shutdown()

    def tell(self, event: str, **details: Any) -> None:
        """Tell all listeners."""
        for listener in list(self.listeners):
            listener(event, details)

    # --- inside

    def _move(self, start: State, to: State) -> bool:
        if self.state is start:
            self._life.move(to)
            return True
        return False

    def _have_a_saver(self) -> None:
        """Have the thread that sees saves through; it stays. Raises BackendError when the host has none to give."""
        try:
            self._saver.submit(lambda: None)
        except RuntimeError as error:
            raise BackendError(f"no thread to save with: {error}") from None

    def _see_through(self, asked: Save) -> None:
        """Carry a save from its asking to its answer, on the save's own thread. Raises nothing: the Future fails."""
        began = time.monotonic()
        try:
            self.machine.await_checked()
            self.machine.know_origin()  # not while the guest stands still
            self._sequence = 1 + (self.last_sequence() if self._sequence is None else self._sequence)
            self._begin(asked)
            self._write(asked)
        except Exception as error:
            self._done(asked)
            self.tell("save failed", path=str(asked.path), why=str(error))
            asked.saved.set_exception(error)
            return
        size = asked.path.stat().st_blocks * 512 if asked.path.exists() else 0
        wall = time.monotonic() - began
        saved = {"path": str(asked.path), **asked.found, "pause_s": round(asked.pause_s, 6),
                 "wall_s": round(wall, 6), "size_bytes": size}  # fmt: skip
        self._done(asked, saved=True)
        self.tell("saved", **saved)
        asked.saved.set_result(saved)

    def _done(self, asked: Save, *, saved: bool = False) -> None:
        with self._lock:
            self._saves.remove(asked)
            if saved and asked.end:
                self._suspended = asked

    def _begin(self, asked: Save) -> None:
        """Take the checkpoint at a safe point, and leave the machine running or, with `hold`, standing still. Raises
        BackendError when no safe point comes in time, Cancelled, or what the checkpoint raises."""

        def instant() -> None:
            machine, began = self.machine, time.monotonic()
            options = {**asked.options, "meta": {"sequence": self._sequence}}
            if asked.cancelled:
                raise Cancelled(f"the save to {asked.path} was cancelled")
            try:
                asked.checkpoint = machine.checkpoint(asked.path, **options)
            except NoProcess:
                if not asked.hold:
                    raise
                machine.save(asked.path, **options)  # it was to stand still meanwhile: this thread will do
            asked.found = {"position": machine.position, "guest_ns": machine.clock.now_ns(), "was": self.state}
            if asked.hold:
                self._life.move(State.SAVING)
            asked.pause_s = time.monotonic() - began

        began = self.at_safe_point(instant)
        try:
            began.result(self.quiesce_s)
        except TimeoutError:
            if began.cancel():
                raise BackendError(
                    f"cannot save to {asked.path}: no safe point came in {self.quiesce_s:g} s; the machine runs on"
                ) from None
            began.result()

    def _write(self, asked: Save) -> None:
        """Wait until the file is on disk, and let a machine that stood still go on or end. Raises what the checkpoint
        raises; the machine goes on then, too."""
        was, began = asked.found.pop("was"), time.monotonic()
        saved = False
        try:
            if asked.checkpoint is not None:
                if asked.cancelled:
                    asked.checkpoint.cancel()
                asked.checkpoint.wait(self._progress)
            saved = True
        finally:
            if asked.hold:
                asked.pause_s += time.monotonic() - began
                self._after(was, asked.end and saved)

    def _progress(self, done: int, total: int) -> None:
        self.tell("progress", done=done, total=total)

    def _after(self, was: State, end: bool) -> None:
        """Move the machine on from `saving`: to its end, or back to what it `was`."""

        def go_on() -> None:
            if end:
                self._end = Stopped(StopReason.SUSPENDED)
            else:
                self._life.move(was)

        self.at_safe_point(go_on).exception()
