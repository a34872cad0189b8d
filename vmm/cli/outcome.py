"""How a run ended: in words, as JSON, and as an exit status."""

from __future__ import annotations

from typing import Any

from vmm.machine.machine import Fault, Machine, Stop, Stopped, StopReason

SIGNALS = {StopReason.SIGTERM: 15, StopReason.SIGHUP: 1}
REACHED = (
    StopReason.POSITION, StopReason.PATTERN, StopReason.QUIT, StopReason.STOPPED, StopReason.SUSPENDED,
)  # fmt: skip
_WORDS = {
    StopReason.PATTERN: "the console shows {until}",
    StopReason.POSITION: "the run has come as far as --at",
    StopReason.TIME: "{until_time:g} s of guest time have passed",
    StopReason.SILENCE: "the console has shown nothing for {silence:g} s of guest time",
    StopReason.TIMEOUT: "{timeout:g} s have passed on the clock on the wall",
    StopReason.PANIC: "the guest is lost: {why}",
    StopReason.RESET: "the guest asked to be started again",
    StopReason.EXIT: "the guest ended with status {code}",
    StopReason.TRIPLE_FAULT: "the guest's CPU shut down: a triple fault",
    StopReason.HALTED: "the guest halted {why}",
    StopReason.COMMAND: "ended",
    StopReason.QUIT: "quit",
    StopReason.STOPPED: "stopped by ctl",
    StopReason.SUSPENDED: "suspended",
    StopReason.SIGTERM: "ended by SIGTERM",
    StopReason.SIGHUP: "ended by SIGHUP",
}


def words(stop: Stop, *, misses: list[str], **asked: Any) -> str:
    """What happened: what was reached, or missed and why. `misses`: the options whose end it may not come to; `asked`:
    until, until_time, timeout, silence."""
    if isinstance(stop, Fault):
        return str(stop)
    said = _WORDS[stop.reason].format(code=stop.status, why=stop.why, **asked)
    if misses and stop.reason not in REACHED:
        return f"{said}; {' and '.join(misses)} not reached"
    return said


def report(machine: Machine, stop: Stop, wall_s: float, saved: str | None) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "position": machine.position,
        "guest_ns": machine.clock.now_ns(),
        "wall_s": round(wall_s, 6),
        "exits": machine.exits(),
        "stopped": str(stop),
        "saved": saved,
        "digest": machine.digests(),
    }


def status(stop: Stop, misses: list[str]) -> int:
    """The exit status, as the help of `run` tells it."""
    match stop:
        case Fault() | Stopped(StopReason.TRIPLE_FAULT | StopReason.PANIC):
            return 1
        case Stopped(StopReason.EXIT, code):
            return code & 0xFF
        case Stopped(reason) if reason in SIGNALS:
            return 128 + SIGNALS[reason]
        case Stopped(reason) if reason in REACHED or not misses:
            return 0
        case _:
            return 3
