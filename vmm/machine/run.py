"""The run loop: the CPU runs to the next deadline, the board does what is due, and between two instructions whatever
was asked for is done.

One place is the safe point, where the machine may be saved, changed or left: see `_safe_point`.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

from vmm.board.board import Board
from vmm.clock import BYTES_PER_NS, LAST_NS, GuestClock
from vmm.cpu.protocol import Cpu, Crashed, Expired, Halted, Kicked, Reached, Shutdown
from vmm.cpu.turns import Turns
from vmm.errors import GuestError
from vmm.machine.interrupt import Interrupt
from vmm.machine.stop import Fault, Stop, Stopped, StopReason

_SLICE_NS = 20_000_000  # how long the CPU may run before the loop looks around
_SILENCE_NS, _LAST_WORDS_NS = 10_000_000, 200_000_000  # of guest time, after a panic's first line
# Of a guest that is lost these say less than its console.
_ENDS_OF_ITS_OWN = frozenset((StopReason.HALTED, StopReason.TRIPLE_FAULT, StopReason.TIME))
_LOOK_S = 0.05  # how often it looks at the file that RAM was woken from

Command = Callable[[], Stop | None]  # what it returns ends the run


class Hook(Protocol):
    """What is done at safe points of a run."""

    def due_ns(self) -> int:
        """The guest time at which it wants one, if none comes before."""
        ...

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Goal:
    """What a run is for: it ends where the first of them comes true. `Machine.run` says what each is."""

    position: int | None = None
    until: str | None = None
    since: int | None = None
    until_ns: int | None = None
    lost: str | None = None
    seconds: float | None = None
    silence_ns: int | None = None  # of guest time in which the console shows nothing


class RunLoop:
    """Not thread-safe, but for `post`. `check` is called at each safe point, with how often in seconds it is to look at
    what costs something, and raises for what must end the run."""

    def __init__(
        self, board: Board, clock: GuestClock, cpus: Sequence[Cpu], turns: Turns, check: Callable[[float], None]
    ) -> None:
        self.cpus, self._turns = cpus, turns
        self.pace_real = False  # guest time is held back to the clock on the wall
        self.awaits_input = False  # somebody may type: an idle guest with no timer is not at its end
        self.hooks: list[Hook] = []
        self._board, self._clock, self._check = board, clock, check
        self._goal = Goal()
        self._until_s: float | None = None  # on the clock on the wall
        self._lost_ns: int | None = None  # since when the guest is lost
        self._shown, self._shown_ns = 0, 0  # how much the console had shown, and since when no more
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._next: Command | None = None  # taken from the queue, not done yet
        self._woken = self._closed = False
        self._real_zero: float | None = None  # what the clock on the wall showed at guest time zero
        board.console.on_match = self.attention
        for console in board.consoles.values():
            console.on_input = self._look_around

    def aim(self, goal: Goal) -> None:
        """What `go_on` runs for, however often a command stops it on the way."""
        self._goal = goal
        self._until_s = None if goal.seconds is None else time.monotonic() + goal.seconds
        self._lost_ns = None
        self._shown_ns = self._clock.now_ns()
        for cpu in self.cpus:
            cpu.stop_at(goal.position)
        self._board.console.watch(goal.until, goal.since, goal.lost)

    def replace(self, cpus: Sequence[Cpu]) -> None:
        """Go on with other CPUs."""
        self.cpus = cpus
        for cpu in cpus:
            cpu.stop_at(self._goal.position)
        self.attention()  # a kick may have gone to the one before

    def go_on(self) -> Stop:
        """Run towards what was aimed at. Raises GuestError when guest time has come to its end, KeyboardInterrupt for
        SIGINT, between two instructions."""
        with Interrupt(lambda: self.post(lambda: None)) as interrupt:
            stop = self._go_on(interrupt)
        line = self._board.console.lost
        if line is not None and isinstance(stop, Stopped) and stop.reason in _ENDS_OF_ITS_OWN:
            return Stopped(StopReason.PANIC, why=line)
        return stop

    def _go_on(self, interrupt: Interrupt) -> Stop:
        board, clock, turns, until_ns = self._board, self._clock, self._turns, self._goal.until_ns
        self.time_moved()
        while (stop := self._safe_point(interrupt)) is None:
            deadline = board.alarms.next_ns
            if until_ns is not None and (deadline is None or until_ns < deadline):
                deadline = until_ns
            if clock.now_ns() >= LAST_NS:
                raise GuestError(f"guest time has come to its end, {LAST_NS} ns: it has nothing more to wait for")
            limit_ns = clock.now_ns() + _SLICE_NS
            if deadline is not None and deadline < limit_ns:
                limit_ns = deadline
            for hook in self.hooks:
                limit_ns = min(limit_ns, hook.due_ns())
            try:
                exit = turns.choose().run(min(limit_ns * BYTES_PER_NS, turns.limit()))
            except Exception:
                self._check(0)  # what a guest does that has lost its RAM is not its fault, nor the engine's
                raise
            if isinstance(exit, Crashed | Shutdown):
                self._check(0)
            match exit:
                case Expired() | Kicked():
                    pass
                case Reached():
                    return Stopped(StopReason.POSITION)
                case Halted():
                    # What was written before it, and came late, is looked at first: see the next safe point.
                    waits = not board.console.found and not turns.another_can_run()
                    if waits and (stop := self._idle(turns.any_listens(), deadline)) is not None:
                        return stop
                case Shutdown():
                    if not board.console.found:  # see Halted
                        return Stopped(StopReason.TRIPLE_FAULT)
                case Crashed(rip, why):
                    return Fault(rip, why)
                case unreachable:
                    assert_never(unreachable)
            board.alarms.expire_due(clock.now_ns())
            if self.pace_real:
                self._hold_back()
        return stop

    def stand_still(self) -> Stop:
        """Run nothing; do what is posted, until that ends it."""
        while (stop := self._obey()) is None:
            self._await_command(None)
        return stop

    def post(self, command: Command) -> None:
        """From any thread, or a signal handler: run `command` at the next boundary; a Stop it returns ends the run."""
        self._commands.put(command)
        self.attention()

    def attention(self) -> None:
        """From any thread: come to a safe point soon."""
        if not self._closed:
            for cpu in self.cpus:
                cpu.kick()

    def time_moved(self) -> None:
        """Guest time did not go on with the clock on the wall: pacing begins anew from here."""
        self._real_zero = None

    def close(self) -> None:
        """There will be no run any more: what is posted is forgotten."""
        self._closed = True

    def _look_around(self) -> None:
        """Something was typed. However much is, one wake-up is enough until it was seen."""
        if not self._woken:
            self._woken = True
            self.post(self._seen)

    def _seen(self) -> None:
        self._woken = False

    def _safe_point(self, interrupt: Interrupt) -> Stop | None:
        """The only place where a running machine may be changed from outside. Inside a block nothing may be: the block
        is finished first."""
        self._check(_LOOK_S)
        if self._clock.prepaid:
            return None
        if interrupt.came:
            raise KeyboardInterrupt
        if (stop := self._obey()) is not None:
            return stop
        board = self._board
        for console, receive in board.receivers:
            if console.typed:
                console.take(receive)
        if board.console.found:  # before what the guest has asked for since
            board.console.found = False
            return Stopped(StopReason.PATTERN)
        if board.state.request == StopReason.RESET and board.console.lost is not None:
            return Stopped(StopReason.PANIC, why=board.console.lost)  # the request stays for who lets the guest go on
        if board.state.request != "none":
            request, board.state.request = board.state.request, "none"
            return Stopped(StopReason(request), board.state.exit_status)
        if board.console.lost is not None and self._has_said_all():
            return Stopped(StopReason.PANIC, why=board.console.lost)
        if self._goal.until_ns is not None and self._clock.now_ns() >= self._goal.until_ns:
            return Stopped(StopReason.TIME)
        if self._goal.silence_ns is not None and self._silent_ns() >= self._goal.silence_ns:
            return Stopped(StopReason.SILENCE)
        if self._until_s is not None and time.monotonic() >= self._until_s:
            return Stopped(StopReason.TIMEOUT)
        for hook in self.hooks:
            hook()
        return None

    def _silent_ns(self) -> int:
        """For how long the console has shown nothing."""
        shown, now = self._board.console.total, self._clock.now_ns()
        if shown != self._shown:
            self._shown, self._shown_ns = shown, now
        return now - self._shown_ns

    def _has_said_all(self) -> bool:
        """Whether a guest that is lost has shown nothing more for a while, or enough: a panic's trace follows its first
        line."""
        now = self._clock.now_ns()
        if self._lost_ns is None:
            self._lost_ns = now
        return self._silent_ns() >= _SILENCE_NS or now - self._lost_ns >= _LAST_WORDS_NS

    def _obey(self) -> Stop | None:
        """Do what was posted up to now."""
        for _ in range(self._commands.qsize() + (self._next is not None)):
            command, self._next = self._next or self._commands.get(), None
            if (stop := command()) is not None:
                return stop
        return None

    def _await_command(self, timeout_s: float | None) -> bool:
        """Sleep; True when a command came."""
        if self._next is None:
            try:
                self._next = self._commands.get(timeout=timeout_s)
            except queue.Empty:
                return False
        return True

    def _idle(self, interruptible: bool, deadline: int | None) -> Stop | None:
        """The CPUs halt: time skips to the next event."""
        if not interruptible and not self._board.apics.make_nmis():
            return Stopped(StopReason.HALTED, why="with interrupts off")
        if deadline is None:
            if not self.awaits_input:
                nothing = Stopped(StopReason.HALTED, why="and nothing is to come that would wake it")
                return nothing if self._commands.empty() else None
            self._await_command(0.05)
            return None
        for hook in self.hooks:
            deadline = min(deadline, max(hook.due_ns(), self._clock.now_ns()))
        if self.pace_real and self._wait_real(deadline):
            return None
        self._clock.skip_to(deadline)
        return None

    # --- the clock on the wall

    def _wait_real(self, deadline: int) -> bool:
        """Sleep until `deadline` in wall time; True when a command came first."""
        ahead = (deadline - self._real_now_ns()) / 1e9
        if ahead <= 0:
            return False
        if not self._await_command(min(ahead, 1.0)):
            return ahead > 1.0
        self._clock.skip_to(min(deadline, self._real_now_ns()))
        return True

    def _hold_back(self) -> None:
        ahead = (self._clock.now_ns() - self._real_now_ns()) / 1e9
        if ahead > 0:
            time.sleep(min(ahead, 0.05))

    def _real_now_ns(self) -> int:
        now = time.monotonic()
        if self._real_zero is None:
            self._real_zero = now - self._clock.now_ns() / 1e9
        return int((now - self._real_zero) * 1e9)
