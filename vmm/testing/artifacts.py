"""What a machine leaves of itself when a test has failed: a snapshot, its console, and where its CPU is and goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from snapshot.errors import SnapshotError
from vmm.cpu.disassembly import ahead
from vmm.cpu.protocol import REGISTERS, CpuState
from vmm.errors import BackendError, RequestError
from vmm.machine.machine import Machine, Stopped, StopReason
from vmm.testing.expect import Expect

_STEPS = 64


def left(machines: list[Machine], place: Path, talk: Expect | None) -> list[str]:
    """What each of a test's machines leaves, and what was said at the console; in lines."""
    lines = [line for i, machine in enumerate(machines) for line in leave(machine, place, f"vm{i}")]
    if talk is not None:
        try:
            (place / "said.txt").write_text("".join(f"{line}\n" for line in talk.log))
        except OSError as error:
            lines.append(f"said.txt: {error}")
    return lines


def leave(machine: Machine, folder: Path, name: str) -> Iterator[str]:
    """Write NAME.snapshot, NAME.console and NAME.trace, and say so in lines. What cannot be is said, too: a test that
    failed must not fail again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        console = folder / f"{name}.console"
        console.write_bytes(machine.board.console.read(0)[1])
        yield f"{name}: what it wrote is in {console}"
        if machine.closed:
            yield f"{name}: it is closed, and leaves no more"
            return
        snapshot = folder / f"{name}.snapshot"
        machine.save(snapshot, packed=True)  # to be sent from where the tests run
        yield f"{name}: anyhyve restore {snapshot}"
        trace = folder / f"{name}.trace"
        trace.write_text("".join(f"{line}\n" for line in _trace(machine, snapshot)))
        yield f"{name}: its registers and the next {_STEPS} instructions are in {trace}"
    except (OSError, SnapshotError, BackendError, RequestError) as error:
        yield f"{name}: {error}"


def _trace(machine: Machine, snapshot: Path) -> Iterator[str]:
    yield f"position {machine.position}, guest time {machine.clock.now_ns() / 1e9:.9f} s, backend {machine.backend}"
    for number, cpu in enumerate(machine.cpus):
        state: CpuState = cpu.save()
        if len(machine.cpus) > 1:
            yield f"cpu.{number}{', whose turn it is' if cpu is machine.turns.current else ''}"
        yield from (f"{name:7} {getattr(state, name):#018x}" for name in REGISTERS)
        yield ""
    nobody = dict.fromkeys(machine.config.bound, "null")
    # On the emulated CPU, whichever it was: that one goes step by step.
    with Machine.restore(snapshot, bind=nobody) as woken:
        for _ in range(_STEPS):
            state = woken.turns.current.save()
            yield from (f"{woken.position:>12}  {line}" for line in ahead(state, woken.ram.read, 1))
            if woken.run(position=woken.position + 1) != Stopped(StopReason.POSITION):
                return
