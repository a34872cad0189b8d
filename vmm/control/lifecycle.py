"""What a machine under command can be called, be, and become. One table; the documentation's picture is drawn from it.

python -m vmm.control.lifecycle     # as a Mermaid diagram
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from enum import StrEnum

from vmm.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> str:
    """The name itself, if it can name a machine. Raises RequestError when it cannot."""
    if not _NAME.fullmatch(name):
        raise RequestError(f"{name!r} cannot name a machine: letters, digits, '.', '_' and '-', 64 at most")
    return name


class State(StrEnum):
    """One of a machine's states."""

    CREATED = "created"  # built, not running yet
    RUNNING = "running"
    PAUSED = "paused"
    SAVING = "saving"  # stands still until a snapshot is written
    STOPPED = "stopped"  # at its end, as the guest or somebody wanted
    FAILED = "failed"  # at its end: the CPU could not go on, or the RAM it woke with is damaged


MOVES: dict[State, dict[State, str]] = {  # from, to: what brings it about
    State.CREATED: {
        State.RUNNING: "start",
        State.PAUSED: "start --paused",
        State.STOPPED: "stop",
        State.FAILED: "fault",
    },
    State.RUNNING: {
        State.PAUSED: "pause",
        State.SAVING: "suspend, checkpoint --hold",
        State.STOPPED: "stop, or the guest ends",
        State.FAILED: "fault",
    },
    State.PAUSED: {
        State.RUNNING: "resume",
        State.SAVING: "suspend, checkpoint --hold",
        State.STOPPED: "stop",
        State.FAILED: "fault",
    },
    State.SAVING: {
        State.RUNNING: "saved, failed or cancelled",
        State.PAUSED: "the same, if it was paused",
        State.STOPPED: "suspended, or stop",
        State.FAILED: "fault",
    },
    State.STOPPED: {},
    State.FAILED: {},
}

ALIVE = frozenset(state for state, moves in MOVES.items() if moves)


class Lifecycle:
    """The present state of one machine. `changed` hears of each move, on the thread that makes it."""

    def __init__(self, changed: Callable[[State], None]) -> None:
        self._state = State.CREATED
        self._changed = changed
        self._lock = threading.Lock()

    @property
    def state(self) -> State:
        return self._state

    def move(self, to: State) -> None:
        with self._lock:
            assert to in MOVES[self._state], f"no move from {self._state} to {to}"
            self._state = to
        self._changed(to)


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.CREATED}"]
    for state, moves in MOVES.items():
        lines += [f"    {state} --> {to}: {why}" for to, why in moves.items()]
        lines += [] if moves else [f"    {state} --> [*]"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
