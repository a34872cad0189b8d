"""Random guests and random CPU states by the thousand, in processes of their own: none may die, none may hang.

    python -m tests.vmm.cpu.campaign guests --count 100000
    python -m tests.vmm.cpu.campaign states --count 300000
    python -m tests.vmm.cpu.campaign crossings --count 10000

A guest is a number (tests.vmm.cpu.random_guests), and so is a state: a guest's, with some fields replaced by any value
that the schema allows. It is refused by name, or it runs and can be saved as a state that a CPU can be in.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from snapshot import schema
from tests.vmm.cpu import random_guests
from tests.vmm.cpu.hosts import host
from tests.vmm.cpu.random_guests import SIZE, Guest
from vmm.cpu import validity
from vmm.cpu.compare import differences
from vmm.cpu.protocol import CpuState
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig
from vmm.machine.stop import Fault, Stopped, StopReason
from vmm.testing.draw import Choices, value

HANG_S = 10  # of the wall's clock, for a microsecond of the guest's; on a computer that does other things too
_BYTES, _NS = 4000, 50_000
_CROSSINGS = 20  # of a guest


class Bench:
    """A machine that runs one guest after another. Its timer ticks every two microseconds and needs no EOI."""

    def __init__(self, backend: str = "emu") -> None:
        self.machine = Machine.boot(MachineConfig(memory_bytes=2 << 20), Image(b"\xf4", flat=True), backend)
        pic = ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3), (0x21, 0xFE))
        for port, byte in (*pic, (0x43, 0x34), (0x40, 3), (0x40, 0)):
            self.machine.board.bus.port_out(port, 1, byte)
        self._empty = self.machine.moment()

    def put(self, guest: Guest) -> Machine:
        machine = self.machine
        machine.rewind(self._empty)
        machine.ram.write(0, guest.memory)
        machine.cpus[0].discard_code(0, SIZE)
        machine.cpus[0].load(guest.state)
        return machine

    def close(self) -> None:
        self.machine.close()


def guest(seed: int) -> Guest:
    return random_guests.draw(seed)


def state(seed: int) -> Guest:
    """A guest whose CPU is in any state that the schema allows, near one that can be or far from it."""
    drawn = random_guests.draw(seed)
    rng = random.Random(-seed)
    choices = Choices(rng.randbytes(4096))
    encoded = schema.encode(drawn.state)
    fields = schema.schema_of(CpuState).fields
    for _ in range(rng.choice((1, 1, 2, 3, 8, len(fields)))):
        field = rng.choice(fields)
        match field.type:
            case schema.StructType(cls) if rng.random() < 0.8:
                inner = rng.choice(schema.schema_of(cls).fields)
                nested = encoded[field.name]
                assert isinstance(nested, dict)
                nested[inner.name] = value(choices, inner.type)
            case _:
                encoded[field.name] = value(choices, field.type)
    return Guest(drawn.kind, schema.StructType(CpuState).decode(encoded, "cpu"), drawn.memory)


DRAWS: dict[str, Callable[[int], Guest]] = {"guests": guest, "states": state}


def run(bench: Bench, drawn: Guest) -> str:
    """How it ended, in a word. AssertionError for what must not be."""
    if (why := validity.refusal(drawn.state)) is not None:
        assert why.startswith("cpu.") and "\n" not in why, why
        return "refused"
    machine = bench.put(drawn)
    stop = machine.run(position=machine.position + _BYTES, until_ns=machine.clock.now_ns() + _NS)
    after = machine.cpus[0].save()
    match stop:
        case Fault():
            return "fault"
        case Stopped(StopReason.TRIPLE_FAULT):
            return "triple fault"  # a CPU in shutdown is in no state of its own
        case Stopped(reason):
            assert (wrong := validity.refusal(after)) is None, wrong
            return str(reason.value)
    raise AssertionError(stop)


def cross(benches: tuple[Bench, Bench], drawn: Guest, exact: bool) -> int:
    """States that a random guest comes to on the emulated CPU: KVM takes each and gives it back, and the guest goes on
    from that. How many they were. Not `exact`: a KVM that is known to lose something only has to take them."""
    emulated, kvm = (bench.machine for bench in benches)
    benches[0].put(drawn)
    cuts = random.Random(drawn.memory[:64])
    for crossed in range(_CROSSINGS):
        if emulated.run(position=emulated.position + cuts.randrange(1, 200)) != Stopped(StopReason.POSITION):
            return crossed
        state = emulated.cpus[0].save()
        kvm.cpus[0].load(state)
        back = kvm.cpus[0].save()
        if exact:
            assert not (other := differences(back, state)), f"{drawn.kind}: {list(other)}"
            assert (wrong := validity.refusal(back)) is None, f"{drawn.kind}: {wrong}"
            emulated.cpus[0].load(back)
    return _CROSSINGS


# --- processes


def _worker(kind: str, first: int, stop: int, shared: mmap.mmap) -> Counter[str]:
    seen, benches = Counter[str](), None
    for seed in range(first, stop):
        struct.pack_into("<Q", shared, 0, seed + 1)
        try:
            if kind == "crossings":
                benches = benches or (Bench(), Bench("kvm"))
                seen["crossed"] += cross(benches, guest(seed), exact=host() != "kvm_pvm")
            else:
                benches = benches or (Bench(), Bench())
                seen[run(benches[0], DRAWS[kind](seed))] += 1
        except BaseException as error:
            seen["escaped"] += 1
            print(f"{kind} {seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            benches = None
    return seen


def campaign(kind: str, first: int, count: int) -> Iterator[Counter[str]]:
    """Yields what was seen, a part at a time: `died` and `hung` count what ended or stopped a process."""
    at, end = first, first + count
    while at < end:
        stop = min(end, at + 500)
        with mmap.mmap(-1, mmap.PAGESIZE) as shared:
            out, into = os.pipe()
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    os.write(into, json.dumps(_worker(kind, at, stop, shared)).encode())
                    code = 0
                finally:
                    os._exit(code)
            os.close(into)
            how = _watch(pid, shared)
            with os.fdopen(out, "rb") as pipe:
                told = pipe.read()
            if how is None:
                yield Counter(json.loads(told))
                at = stop
            else:
                last = struct.unpack_from("<Q", shared)[0]
                print(f"{kind} {last - 1}: {how}", file=sys.stderr, flush=True)
                yield Counter({how.split()[0]: 1, "before it": max(0, last - 1 - at)})
                at = max(last, at + 1)


def _watch(pid: int, shared: mmap.mmap) -> str | None:
    """How a process ended, if not well."""
    last, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return None if status == 0 else f"died {status}"
        seed = struct.unpack_from("<Q", shared)[0]
        if seed != last:
            last, since = seed, time.monotonic()
        elif time.monotonic() - since > HANG_S:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hung"
        time.sleep(0.02)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.vmm.cpu.campaign")
    parser.add_argument("kind", choices=[*DRAWS, "crossings"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    given: Any = parser.parse_args(arguments)
    total = Counter[str]()
    for seen in campaign(given.kind, given.first, given.count):
        total += seen
    print(json.dumps(total))
    return int(bool(total["died"] or total["hung"] or total["escaped"]))


if __name__ == "__main__":
    sys.exit(main())
