"""What a backend's CPU can do on this host, by trying: a small guest, and the same guest in lockstep.

A KVM may be there and run no operating system: where it is itself emulated, say, or interprets a kernel's code. So
nobody takes one for granted: `auto`, doctor, `lockstep` and the pytest plugin all ask here. What KVM was found to do is
kept in a file, for as long as kernel, module, processor and this file stay as they are.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from vmm.cpu import backends
from vmm.debug.lockstep import Lockstep
from vmm.errors import BackendError, GuestError, RequestError
from vmm.guest.image import Image
from vmm.host import folders
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason

CHECKS = (  # in the order of selftest.S
    "pages of a kernel's own tables",
    "a page that is not there",
    "a page that is read-only",
    "INVLPG",
    "string instructions",
    "MUL, DIV, POPCNT, CMPXCHG16B",
    "SSE and x87 registers through FXSAVE",
    "fences, LOCK, CLTS",
    "INT3 in the kernel",
    "a division by zero in the kernel",
    "UD2 in the kernel",
    "an MSR that is not there",
    "SWAPGS",
    "RDTSC",
    "IRETQ to the user, and an INT of its",
    "code of the user",
    "a page the user must not see",
    "an instruction the user must not run",
    "SYSCALL",
    "SYSRET",
    "the timer's interrupt out of HLT",
    "the TSC as WRMSR sets it",
)
_STEPPED = CHECKS.index("SYSCALL")  # the checks before it: in it processors differ from what they say (see Lockstep)
_KEPT = "kvm.json"  # in the user's folder of caches
_IMAGE = Path(__file__).with_name("selftest.bin")
_FIRST, _LAST, _NOW, _OUTCOMES = 0x210000, 0x210008, 0x210010, 0x210100
_TSC = CHECKS.index("the TSC as WRMSR sets it")
_TRIES, _MOST_TRIES = 3, 10
_PATIENCE_S = 5.0  # for what takes milliseconds; where KVM is emulated, a second
_STRIDE, _MOST = 32, 2_000  # instructions: few at a time, where each takes a hundred times as long
_TAIL = 20  # bytes of code from the last check to the end


@dataclass(frozen=True)
class Findings:
    """`failed`: of CHECKS. `stepping`: why it cannot run in lockstep, None where it can."""

    failed: tuple[str, ...] = ()
    stepping: str | None = None

    @property
    def runs(self) -> str | None:
        """Why it cannot run an operating system, in one line; None where it can."""
        if not self.failed:
            return None
        return f"this host's KVM fails {len(self.failed)} of {len(CHECKS)} checks: {'; '.join(self.failed)}"


def findings(backend: str) -> Findings:
    """What is known of a backend, tried where nothing is yet. Raises BackendError where it is not there at all."""
    if backend != "kvm":
        backends.factory(backend)
        return Findings()
    backends.probe(backend)
    return _kept(_host()) or examine(backend)


def examine(backend: str) -> Findings:
    """Try it now, which takes a second at most. Raises BackendError where it is not there at all."""
    backends.probe(backend)
    found = Findings(tuple(_failed(backend)), _stepping(backend) if backend == "kvm" else None)
    if backend == "kvm":
        _keep(_host(), found)
    return found


def choose() -> tuple[str, str]:
    """The backend that serves best here, and why: kvm where this host's can run a guest, else emu."""
    try:
        why = findings("kvm").runs
    except BackendError as error:
        return "emu", str(error)
    return ("kvm", backends.probe("kvm")) if why is None else ("emu", why)


# --- the guest


def _machine(backend: str, first: int, last: int) -> Machine:
    image = Image(_IMAGE.read_bytes(), flat=True)
    machine = Machine.boot(MachineConfig(memory_bytes=8 << 20), image, backend)
    for address, value in ((_FIRST, first), (_LAST, last)):
        machine.ram.slice(address, 1)[0] = value
    return machine


def _failed(backend: str) -> list[str]:
    """The checks that never hold. One that fails is tried again, and most often that of the TSC where it is the only
    one: KVM on a TSC that is not stable loses a guest's write of it now and then."""
    bad = set(range(len(CHECKS)))
    for tried in range(_MOST_TRIES):
        bad -= _passed(backend)
        if not bad or (tried + 1 >= _TRIES and bad != {_TSC}):
            break
    return [CHECKS[number] for number in sorted(bad)]


def _passed(backend: str) -> set[int]:
    """The checks that hold. Where one of them stops the CPU, the rest is tried on another."""
    good: set[int] = set()
    first = 0
    while first < len(CHECKS):
        with _machine(backend, first, len(CHECKS)) as machine:
            stop = machine.run(seconds=_PATIENCE_S)
            good |= {number for number, one in enumerate(machine.ram.slice(_OUTCOMES, len(CHECKS))) if one}
            ended = isinstance(stop, Stopped) and stop.reason is StopReason.EXIT
            first = len(CHECKS) if ended else max(first, machine.ram.slice(_NOW, 1)[0]) + 1
    return good


def _stepping(backend: str) -> str | None:
    """What goes wrong in lockstep with the emulated CPU, over checks that both pass."""
    with _machine("emu", 0, 0) as machine:
        machine.run()
        set_up = machine.position - _TAIL
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "selftest.snapshot")
        with _machine("emu", 0, _STEPPED) as machine:
            machine.run(position=set_up)
            machine.save(file)
        try:
            with Lockstep(file, "emu", backend) as pair:
                for far in range(_STRIDE, _MOST, _STRIDE):
                    if (found := pair.run(far)) is not None or pair.stopped is not None:
                        break
        except (BackendError, GuestError, RequestError) as error:
            return str(error)
    if found is None:
        return None
    fields = [*found.fields][:3] or ["RAM"]
    more = "" if len(found.fields) <= 3 else f" and {len(found.fields) - 3} fields more"
    return f"single step is not to be relied on: {found.disassembly} differs in {', '.join(fields)}{more}"


# --- what is kept


def _host() -> str:
    """What findings hold for: a digest of kernel, KVM's modules, processor and the self-test."""
    said = [platform.release(), platform.version(), _IMAGE.read_bytes().hex(), Path(__file__).read_text()]
    for module in sorted(Path("/sys/module").glob("kvm*")):
        with suppress(OSError):
            said.append(f"{module.name} {(module / 'srcversion').read_text()}")
        said.append(module.name)
    with suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
        said += [line for line in cpu.split("\n") if line.startswith(("vendor_id", "model", "stepping", "microcode"))]
    return blake3("\0".join(said).encode()).hexdigest()


def _kept(host: str) -> Findings | None:
    try:
        kept = json.loads((folders.cache() / _KEPT).read_text())
        if kept["host"] == host:
            failed = tuple(name for name in CHECKS if name in kept["failed"])
            return Findings(failed, None if kept["stepping"] is None else str(kept["stepping"]))
    except (OSError, BackendError, ValueError, LookupError, TypeError):
        pass  # there is none, or it is nothing of ours: it is tried again
    return None


def _keep(host: str, found: Findings) -> None:
    with suppress(OSError, BackendError):  # no room, no home, or read-only: it is tried again each time
        place = folders.cache() / _KEPT
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            new.write_text(json.dumps({"host": host, **asdict(found)}))
            new.replace(place)
        finally:
            new.unlink(missing_ok=True)
