"""Why a run ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class StopReason(StrEnum):
    """What a run ended with. Each is a string, and equal to it."""

    POSITION = "position"  # it was asked to stop there
    TIME = "time"
    PATTERN = "pattern"
    RESET = "reset"  # the guest wants to be started again,
    EXIT = "exit"  # to end with a status,
    TRIPLE_FAULT = "triple fault"
    HALTED = "halted"  # or waits for nothing
    PANIC = "panic"  # the console shows that it is lost
    SILENCE = "silence"  # for as long as was given the console shows nothing
    TIMEOUT = "timeout"  # the time given on the clock on the wall is over
    COMMAND = "command"  # a posted command said so, and no more
    QUIT = "quit"  # at the terminal
    STOPPED = "stopped"  # over the socket
    SUSPENDED = "suspended"
    SIGTERM = "SIGTERM"
    SIGHUP = "SIGHUP"


@dataclass(frozen=True)
class Stopped:
    """The run ended; `status` is that of an exit, `why` says more in a few words: the console's line, say."""

    reason: StopReason
    status: int = 0
    why: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", StopReason(self.reason))

    def __str__(self) -> str:
        return f"exit {self.status}" if self.reason is StopReason.EXIT else self.reason.value


@dataclass(frozen=True)
class Fault:
    """The CPU backend could not go on at `rip`: `why` in one line."""

    rip: int
    why: str

    def __str__(self) -> str:
        return f"the CPU cannot go on at {self.rip:#x}: {self.why}"


Stop = Stopped | Fault
