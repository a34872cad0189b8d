"""Two CPUs over one saved machine, an instruction at a time, until they differ.

The leader is the emulated CPU: its time is counted in code, so what it does can be told again. The follower is given
the leader's clock, its interrupts at the same instructions, and what it read of the time-stamp counter; all else it
must find by itself, over devices and RAM of its own. Registers are compared after each instruction, everything else
every so often: there both are equal, and can be taken back to. A difference found is looked for between the last such
place and the next by halving, until one instruction is left.

What may differ without being a fault:
* flags and results that an instruction leaves undefined (vmm.cpu.undefined_flags); the leader's are taken
* accessed and dirty bits of page tables: when they are set is the processor's affair (SDM vol. 3, 4.8)
* RF in a pushed RFLAGS: some emulated hosts do not push it
* what vmm.compare leaves out
"""

from __future__ import annotations

import copy
import mmap
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from vmm.clock import ClockState
from vmm.cpu import paging
from vmm.cpu.compare import differences
from vmm.cpu.disassembly import decode
from vmm.cpu.protocol import REGISTERS, Cpu, CpuState, Exit, Reached
from vmm.cpu.undefined_flags import undefined
from vmm.errors import BackendError
from vmm.machine.machine import Fault, Machine, Stop, Stopped
from vmm.saving.saved import Saved

STRIDE = 2000  # instructions between two places where everything is compared
_CHUNK = 1 << 16
_RF = 1 << 16
_RFLAGS, _RIP = 17, 16  # in registers()
_ACCESSED_DIRTY = 0x60

Plant = Callable[[Machine, int], None]  # a fault for a test, put into the follower after instruction number n


@dataclass
class Divergence:
    """The first instruction after which the two differ."""

    instruction: int  # how many ran before it, from the snapshot on
    position: int
    rip: int
    disassembly: str
    fields: dict[str, tuple[Any, Any]]  # by name in the schema: (leader's, follower's)
    memory: list[tuple[int, bytes, bytes]]  # guest-physical address, leader's bytes, follower's
    io: list[str]  # the last accesses before it, oldest first
    before: CpuState
    pair: list[Path] = field(default_factory=list)  # both machines saved just before it


@dataclass(frozen=True)
class _Call:
    """One return of the leader's CPU."""

    exit: Exit
    clock: ClockState
    ran: bool
    interrupted: bool
    entered: bool  # a handler: by an exception or a system call


class Steppable(Cpu, Protocol):
    """A CPU that can run one instruction as another did."""

    def step(self, arrive: int, interrupted: bool, entered: bool, sysret: bool) -> None: ...


class _Leading:
    """The leader's CPU, noting what each run() came to."""

    def __init__(self, cpu: Cpu, machine: Machine) -> None:
        self._cpu, self._machine = cpu, machine
        self.calls: list[_Call] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu, name)

    def run(self, budget_ns: int) -> Exit:
        clock, before = self._machine.clock, self._cpu.exits()
        position = clock.position
        stop = self._cpu.run(budget_ns)
        after = self._cpu.exits()
        interrupted = after["interrupt"] != before["interrupt"]
        self.calls.append(
            _Call(
                exit=stop,
                clock=clock.save(),
                ran=clock.position != position,
                interrupted=interrupted,
                entered=any(after[reason] != before[reason] for reason in ("exception", "syscall")),
            )
        )
        return stop


class _Following:
    """The follower's CPU: each run() does what the leader's did, on the leader's clock."""

    def __init__(self, cpu: Steppable, machine: Machine) -> None:
        self._cpu, self._machine = cpu, machine
        self.calls: deque[_Call] = deque()
        self.arrive = 0  # where the leader came to
        self.kind = ""  # of the instruction, where it is one that single-stepping has trouble with

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu, name)

    def stop_at(self, position: int | None) -> None:
        pass

    def run(self, budget_ns: int) -> Exit:
        if not self.calls:
            return Reached()
        call = self.calls.popleft()
        self._machine.clock.load(call.clock)
        if call.ran or call.interrupted:
            entered = call.entered or self.kind == "shadow"
            self._cpu.step(self.arrive, call.interrupted, entered, self.kind == "sysret")
        return call.exit


@dataclass
class _Point:
    """A place where both were equal."""

    count: int
    saved: tuple[Saved, Saved]
    ram: list[mmap.mmap]


class Lockstep:
    """Two machines from one snapshot. `leader` and `follower` may be looked at between calls."""

    def __init__(self, file: Path, leader: str, follower: str, plant: Plant | None = None) -> None:
        if leader != "emu":
            leader, follower = follower, leader
        if leader != "emu":
            raise BackendError("lockstep needs the emulated CPU on one side: only its instructions can be counted")
        self.leader = Machine.restore(file, leader)
        try:
            self.follower = Machine.restore(file, follower, allow=("tsc-rate",))
        except BaseException:
            self.leader.close()
            raise
        self.count = 0
        self.stopped: Stop | None = None
        self._plant = plant
        self._io: deque[str] = deque(maxlen=16)
        self._kinds: dict[int, str] = {}
        self._lead = _Leading(self.leader.cpu, self.leader)
        self.leader.cpu = self._lead  # type: ignore[assignment]
        self._follow: _Following | None = None
        if follower != "emu":
            self._follow = _Following(self.follower.cpu, self.follower)  # type: ignore[arg-type]
            self.follower.cpu = self._follow  # type: ignore[assignment]
        self._log(self.leader.board.bus)
        self._point = _Point(0, (self._states(self.leader), self._states(self.follower)), [])
        self._keep_ram()

    # --- the search

    def run(self, instructions: int, progress: Callable[[int], None] = lambda count: None) -> Divergence | None:
        """Run up to so many instructions on both. None: they agree, to the end or to where the guest stopped."""
        while self.count < instructions and self.stopped is None:
            apart = self._advance(min(STRIDE, instructions - self.count))
            if apart or not self.equal():
                return self._narrow(self.count - self._point.count)
            self._mark()
            progress(self.count)
        return None

    def _narrow(self, high: int) -> Divergence:
        """They agree after 0 instructions from the last point and differ after `high`."""
        low = 0
        middle = high - 1  # most often the difference shows at once
        while high - low > 1:
            self._back()
            if not self._advance(middle) and self.equal():
                low = middle
            else:
                high = middle
            middle = (low + high) // 2
        self._back()
        self._advance(low)
        return self._describe()

    def _describe(self) -> Divergence:
        before, count = self.leader.cpu.save(), self.count
        code = paging.read_virtual(before, self.leader.ram.read, before.cs.base + before.rip, 15)
        found = Divergence(
            instruction=count,
            position=self.leader.position,
            rip=before.rip,
            disassembly=_disassemble(code, before),
            fields={},
            memory=[],
            io=[],
            before=before,
        )
        self._step()
        found.io = list(self._io)
        found.fields = _apart(self.leader.cpu.save(), self.follower.cpu.save())
        ours, theirs = self.leader.parts(), self.follower.parts()
        for part in self.leader.board.devices:
            if ours[part] != theirs[part]:
                found.fields[part] = (ours[part], theirs[part])
        found.memory = self._memory(limit=16)
        return found

    def save_pair(self, found: Divergence, prefix: Path) -> None:
        """Save both machines as they were just before the instruction: PREFIX.leader and PREFIX.follower."""
        self._back()
        self._advance(found.instruction - self._point.count)
        for machine, name in ((self.leader, "leader"), (self.follower, "follower")):
            path = prefix.with_name(f"{prefix.name}.{name}")
            machine.save(path)
            found.pair.append(path)

    # --- running

    def _advance(self, count: int) -> bool:
        """Run `count` instructions on both; True as soon as their registers differ."""
        return any(self._step() for _ in range(count) if self.stopped is None)

    def _step(self) -> bool:
        lead, leader, follower = self._lead, self.leader, self.follower
        before = lead.registers()
        lead.calls.clear()
        stop = leader.run(position=leader.position + 1)
        if self._follow is not None:
            self._follow.calls.extend(lead.calls)
            self._follow.arrive = lead.registers()[_RIP]
            self._follow.kind = self._kind(before[_RIP])
            other = follower.run()
        else:
            other = follower.run(position=leader.position)
        self.count += 1
        if self._plant is not None:
            self._plant(follower, self.count)
        if stop != Stopped("position"):
            self.stopped = stop
        return self._apart(before) or (stop != other and not isinstance(stop, Fault))

    def _kind(self, rip: int) -> str:
        """`shadow`: STI, MOV SS and POP SS hold traps back for an instruction, some of them on some processors (SDM
        vol. 3, 6.8.3). `sysret`: it takes TF from R11. Decoded once an address: code that changes there is a chance
        taken."""
        if rip not in self._kinds:
            state = replace(self.leader.cpu.save(), rip=rip)
            code = paging.read_virtual(state, self.leader.ram.read, state.cs.base + rip, 4)
            code = code[1:] if code[:1] and 0x40 <= code[0] <= 0x4F and paging.code_bits(state) == 64 else code
            mov_ss = code[:1] == b"\x8e" and len(code) > 1 and code[1] >> 3 & 7 == 2
            shadow = mov_ss or code[:1] in (b"\xfb", b"\x17")
            self._kinds[rip] = "shadow" if shadow else "sysret" if code[:2] == b"\x0f\x07" else ""
        return self._kinds[rip]

    def _apart(self, before: tuple[int, ...]) -> bool:
        """Whether the registers differ, once what may differ was made equal."""
        ours, theirs = self._lead.registers(), self.follower.cpu.registers()
        if ours[:_RFLAGS] == theirs[:_RFLAGS] and (ours[_RFLAGS] ^ theirs[_RFLAGS]) & ~_RF == 0:
            return False
        state = self.leader.cpu.save()
        at = replace(state, rip=before[_RIP], rflags=before[_RFLAGS])
        code = paging.read_virtual(at, self.leader.ram.read, state.cs.base + before[_RIP], 15)
        other = self.follower.cpu.save()
        excused = _excuse(code, state, other, before)
        if excused != other:
            self.follower.cpu.load(excused)
        return any(getattr(state, name) != getattr(excused, name) for name in REGISTERS)

    # --- comparing and going back

    def equal(self) -> bool:
        """Whether both machines are equal in all that can be compared."""
        if _apart(self.leader.cpu.save(), self.follower.cpu.save()):
            return False
        ours, theirs = self.leader.parts(), self.follower.parts()
        if any(ours[part] != theirs[part] for part in self.leader.board.devices):
            return False
        return not self._memory(limit=1)

    def _memory(self, limit: int) -> list[tuple[int, bytes, bytes]]:
        """Where RAM differs, eight bytes a place; what may differ is made equal on the way."""
        found: list[tuple[int, bytes, bytes]] = []
        for mine, other in zip(self.leader.ram.regions, self.follower.ram.regions, strict=True):
            for start in _chunks(mine.touched(), other.touched()):
                if mine.view[start : start + _CHUNK] == other.view[start : start + _CHUNK]:
                    continue
                for at in range(start, min(start + _CHUNK, mine.size), 8):
                    ours, theirs = bytes(mine.view[at : at + 8]), bytes(other.view[at : at + 8])
                    if ours == theirs:
                        continue
                    if _excused_word(int.from_bytes(ours, "little"), int.from_bytes(theirs, "little")):
                        other.view[at : at + 8] = ours
                    elif len(found) < limit:
                        found.append((mine.base + at, ours, theirs))
                    if len(found) >= limit:
                        return found
        return found

    def _mark(self) -> None:
        self._point.count = self.count
        self._point.saved = (self._states(self.leader), self._states(self.follower))
        self._keep_ram()

    def _keep_ram(self) -> None:
        for i, region in enumerate(self.leader.ram.regions):
            if len(self._point.ram) <= i:
                self._point.ram.append(mmap.mmap(-1, region.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            kept = memoryview(self._point.ram[i])
            for start in _chunks(region.touched()):
                if kept[start : start + _CHUNK] != region.view[start : start + _CHUNK]:
                    kept[start : start + _CHUNK] = region.view[start : start + _CHUNK]
            kept.release()

    def _back(self) -> None:
        for machine, saved in zip((self.leader, self.follower), self._point.saved, strict=True):
            for region, memory in zip(machine.ram.regions, self._point.ram, strict=True):
                kept = memoryview(memory)
                for start in _chunks(region.touched()):
                    if kept[start : start + _CHUNK] != region.view[start : start + _CHUNK]:
                        region.view[start : start + _CHUNK] = kept[start : start + _CHUNK]
                        machine.cpu.discard_code(region.base + start, region.base + start + _CHUNK)
                kept.release()
            machine.assign(copy.deepcopy(saved))
        self.count = self._point.count
        self.stopped = None

    @staticmethod
    def _states(machine: Machine) -> Saved:
        parts = machine.parts()
        return copy.deepcopy(
            Saved(
                config=parts["config"],
                board=parts["board"],
                clock=parts["clock"],
                cpu=parts["cpu.0"],
                devices={name: parts[name] for name in machine.board.devices},
            )
        )

    # --- small things

    def _log(self, bus: Any) -> None:
        """Note each access in `_io`. The CPU looks its bus's methods up when it uses them."""
        for name, form in (("port_in", "in {:#x}, {} bytes: {:#x}"), ("mmio_read", "read {:#x}, {} bytes: {:#x}")):
            bus.__dict__[name] = self._logged_read(getattr(bus, name), form)
        for name, form in (("port_out", "out {:#x}, {} bytes: {:#x}"), ("mmio_write", "write {:#x}, {} bytes: {:#x}")):
            bus.__dict__[name] = self._logged_write(getattr(bus, name), form)

    def _logged_read(self, access: Callable[[int, int], int], form: str) -> Callable[[int, int], int]:
        def read(address: int, size: int) -> int:
            value = access(address, size)
            self._io.append(form.format(address, size, value))
            return value

        return read

    def _logged_write(self, access: Callable[[int, int, int], None], form: str) -> Callable[[int, int, int], None]:
        def write(address: int, size: int, value: int) -> None:
            self._io.append(form.format(address, size, value))
            access(address, size, value)

        return write

    def close(self) -> None:
        self.leader.close()
        self.follower.close()
        for memory in self._point.ram:
            memory.close()

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _chunks(*extents: list[tuple[int, int]]) -> list[int]:
    """Where the chunks start that any of the extents touches."""
    found: set[int] = set()
    for each in extents:
        for start, end in each:
            found.update(range(start // _CHUNK * _CHUNK, end, _CHUNK))
    return sorted(found)


def _apart(ours: CpuState, theirs: CpuState) -> dict[str, tuple[Any, Any]]:
    found = differences(ours, theirs)
    if (ours.rflags ^ theirs.rflags) & ~_RF == 0:
        found.pop("cpu.rflags", None)
    return found


def _excuse(code: bytes, ours: CpuState, theirs: CpuState, before: tuple[int, ...]) -> CpuState:
    """`theirs` with what the instruction may leave otherwise as in `ours`."""
    loose = undefined(code, paging.code_bits(ours), before[1], ours.rflags)
    fixed = replace(theirs, rflags=theirs.rflags ^ (ours.rflags ^ theirs.rflags) & (loose.flags | _RF))
    if loose.destination not in (None, "memory"):
        mine, other = getattr(ours, loose.destination), getattr(fixed, loose.destination)
        fixed = replace(fixed, **{loose.destination: other ^ (mine ^ other) & loose.bits})
    if _reads_time(code, before):
        fixed = replace(fixed, rax=ours.rax, rdx=ours.rdx)
    if code[:2] == b"\x0f\x05":  # SYSCALL puts RFLAGS in R11, with the TF of whoever steps it
        fixed = replace(fixed, r11=fixed.r11 ^ (fixed.r11 ^ ours.r11) & 0x100)
    return fixed


def _reads_time(code: bytes, before: tuple[int, ...]) -> bool:
    """RDTSC, RDTSCP, or RDMSR of the TSC."""
    return code[:2] == b"\x0f\x31" or code[:3] == b"\x0f\x01\xf9" or (code[:2] == b"\x0f\x32" and before[1] == 0x10)


def _excused_word(ours: int, theirs: int) -> bool:
    apart = ours ^ theirs
    page_table = apart & ~_ACCESSED_DIRTY == 0 and bool(ours & 1)
    pushed_flags = apart & ~(_RF | 0x100) == 0 and ours >> 22 == 0 and bool(ours & 2)
    return page_table or pushed_flags


def _disassemble(code: bytes, state: CpuState) -> str:
    return next((text for _, text in decode(state, code, 1)), f"not decodable: {code.hex()}")
