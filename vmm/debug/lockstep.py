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
* what vmm.cpu.compare leaves out
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from vmm.clock import ClockState, GuestClock
from vmm.cpu import backends, paging, rep
from vmm.cpu.compare import differences
from vmm.cpu.disassembly import decode
from vmm.cpu.protocol import REGISTERS, Cpu, CpuState, Exit, Intr, IoBus, Reached
from vmm.cpu.turns import TurnState
from vmm.cpu.undefined_flags import undefined
from vmm.debug.traced import TracedBus
from vmm.errors import RequestError
from vmm.machine.machine import Machine
from vmm.machine.moment import Moment
from vmm.machine.stop import Fault, Stop, Stopped, StopReason
from vmm.ram import Ram

STRIDE = 2000  # instructions between two places where everything is compared
_CHUNK = 1 << 16
_RF = 1 << 16
_RFLAGS, _RIP = REGISTERS.index("rflags"), REGISTERS.index("rip")
_ACCESSED_DIRTY = 0x60
_NOBODY: dict[str, str] = {}  # at the far ends

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
    cpu: int = 0  # whose instruction it is
    pair: list[Path] = field(default_factory=list)  # both machines saved just before it


@dataclass(frozen=True)
class _Call:
    """One return of a CPU of the leader's."""

    cpu: int
    before: tuple[int, ...]  # its registers
    arrive: int  # the RIP it came to
    exit: Exit
    clock: ClockState
    pauses: int  # in this turn
    ran: bool
    interrupted: bool
    entered: bool  # a handler: by an exception or a system call


class Steppable(Cpu, Protocol):
    """A CPU that can run one instruction as another did."""

    def attend(self) -> None: ...
    def step(self, arrive: int, interrupted: bool, entered: bool, sysret: bool) -> None: ...


class _Wrapped:
    """A CPU that is another but for how it runs."""

    def __init__(self, cpu: Any, clock: GuestClock) -> None:
        self._cpu, self._clock = cpu, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cpu, name)


class _Leading(_Wrapped):
    """A CPU of the leader's, `number`, noting what each run() came to."""

    def __init__(self, cpu: Cpu, clock: GuestClock, number: int, calls: list[_Call], turn: Callable[[], TurnState]):
        super().__init__(cpu, clock)
        self._number, self._calls, self._turn = number, calls, turn

    def run(self, limit: int) -> Exit:
        registers, before, position = self._cpu.registers(), self._cpu.exits(), self._clock.position
        stop: Exit = self._cpu.run(limit)
        after = self._cpu.exits()
        self._calls.append(
            _Call(
                cpu=self._number,
                before=registers,
                arrive=self._cpu.registers()[_RIP],
                exit=stop,
                clock=self._clock.save(),
                pauses=self._turn().pauses,
                ran=self._clock.position != position,
                interrupted=after["interrupt"] != before["interrupt"],
                entered=any(after[reason] != before[reason] for reason in ("exception", "syscall")),
            )
        )
        return stop


class _Following(_Wrapped):
    """A CPU of the follower's: each run() does what one of the leader's did, on the leader's clock and in its turns.
    `calls` are all CPUs' together, each with the trouble that single-stepping has with it (see Lockstep._trouble)."""

    counts_pauses = True

    def __init__(
        self, cpu: Steppable, clock: GuestClock, calls: deque[tuple[_Call, str]], turn: Callable[[], TurnState]
    ) -> None:
        super().__init__(cpu, clock)
        self._calls, self._turn = calls, turn
        self.turn_ns = backends.factory("emu").turn_ns

    def stop_at(self, position: int | None) -> None:
        pass

    def run(self, limit: int) -> Exit:
        if not self._calls:
            return Reached()
        call, trouble = self._calls.popleft()
        self._clock.load(call.clock)
        self._cpu.attend()
        if call.ran or call.interrupted:
            entered = call.entered or trouble == "shadow"
            self._cpu.step(call.arrive, call.interrupted, entered, trouble == "sysret")
        self._turn().pauses = call.pauses
        return call.exit


@dataclass
class _Point:
    """A place where both were equal."""

    count: int
    leader: Moment
    follower: Moment


class Lockstep:
    """Two machines from one snapshot. `leader` and `follower` may be looked at between calls."""

    def __init__(self, file: Path, leader: str, follower: str, plant: Plant | None = None) -> None:
        """`plant`: a fault for a test. Raises RequestError where neither is the emulated CPU; else as Machine.restore
        does."""
        if leader != "emu":
            leader, follower = follower, leader
        if leader != "emu":
            raise RequestError("lockstep needs the emulated CPU on one side: only its instructions can be counted")
        self.count = 0
        self.stopped: Stop | None = None
        self._plant = plant
        self._io: deque[str] = deque(maxlen=16)
        self._troubles: dict[int, str] = {}
        self._leads: list[_Leading] = []  # by CPU
        self._led: list[_Call] = []
        self._follows: list[_Following] = []  # by CPU; none where the follower is an emulated machine
        self._to_follow: deque[tuple[_Call, str]] = deque()
        self.leader = Machine.restore(file, leader, bind=_NOBODY, make_cpu=self._make_leading)
        try:
            make = self._make_following if follower != "emu" else None
            self.follower = Machine.restore(file, follower, allow=("tsc-rate",), bind=_NOBODY, make_cpu=make)
            self._mark()
        except BaseException:
            self.close()
            raise

    def _make_leading(self, ram: Ram, bus: IoBus, intr: Intr, clock: GuestClock, first: Cpu | None = None, /) -> Cpu:
        beside = None if first is None else self._leads[0]._cpu
        cpu = backends.factory("emu")(ram, TracedBus(bus, self._io.append), intr, clock, beside)
        number = len(self._leads)
        self._leads.append(_Leading(cpu, clock, number, self._led, lambda: self.leader.turns.state))
        return cast(Cpu, self._leads[-1])

    def _make_following(self, ram: Ram, bus: IoBus, intr: Intr, clock: GuestClock, first: Cpu | None = None, /) -> Cpu:
        beside = None if first is None else self._follows[0]._cpu
        cpu = cast(Steppable, backends.factory("kvm")(ram, bus, intr, clock, beside))
        self._follows.append(_Following(cpu, clock, self._to_follow, lambda: self.follower.turns.state))
        return cast(Cpu, self._follows[-1])

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
        cpu, count = self._next_cpu(), self.count
        before = self.leader.cpus[cpu].save()
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
            cpu=cpu,
        )
        self._step()
        found.io = list(self._io)
        for number, (ours, theirs) in enumerate(zip(self.leader.cpus, self.follower.cpus, strict=True)):
            own = "cpu" if len(self.leader.cpus) == 1 else f"cpu.{number}"
            apart = _apart(ours.save(), theirs.save())
            found.fields |= {name.replace("cpu", own, 1): pair for name, pair in apart.items()}
        for name, pair in self._devices():
            if pair[0] != pair[1]:
                found.fields[name] = pair
        found.memory = self._memory(limit=16)
        return found

    def save_pair(self, found: Divergence, prefix: Path) -> None:
        """Save both machines as they were just before the instruction: PREFIX.leader and PREFIX.follower."""
        self._back()
        self._advance(found.instruction - self._point.count)
        for machine, name in ((self.leader, "leader"), (self.follower, "follower")):
            path = prefix.parent / f"{prefix.name}.{name}"
            machine.save(path)
            found.pair.append(path)

    # --- running

    def _advance(self, count: int) -> bool:
        """Run `count` instructions on both; True as soon as their registers differ."""
        return any(self._step() for _ in range(count) if self.stopped is None)

    def _next_cpu(self) -> int:
        """The number of the CPU whose instruction is next."""
        self.leader.turns.choose()
        return self.leader.turns.state.current

    def _step(self) -> bool:
        goal = self.leader.position + 1
        self._led.clear()
        stop = self.leader.run(position=goal)
        ran = next((call for call in self._led if call.ran), None)
        if self._follows:
            stop = self._past_repeats(stop)
            other = self.follower.run()
            self._to_follow.clear()
        else:
            other = self.follower.run(position=goal)  # the same: at one position an interrupt may be taken or to come
        self.count += 1
        if self._plant is not None:
            self._plant(self.follower, self.count)
        if stop != Stopped(StopReason.POSITION):
            self.stopped = stop
        apart = ran is not None and self._apart(ran.cpu, ran.before)
        return apart or (stop != other and not isinstance(stop, Fault))

    def _past_repeats(self, stop: Stop) -> Stop:
        """Have the leader go on for as long as one of its CPUs stands at a repeated instruction that is done, which the
        follower is behind; and the follower hear of all that was done."""
        behind: set[int] = set()
        while True:
            for call in self._led:
                if call.cpu in behind:
                    call = replace(call, ran=False)
                self._to_follow.append((call, self._trouble(call)))
            for cpu in {call.cpu for call in self._led if call.ran}:
                first = next(call for call in self._led if call.cpu == cpu)
                done = rep.is_done(cast(Cpu, self._leads[cpu]), self.leader.ram.read, first.before[_RIP])
                behind = behind | {cpu} if done else behind - {cpu}
            if not behind or stop != Stopped(StopReason.POSITION):
                return stop
            self._led.clear()
            stop = self.leader.run(position=self.leader.position + 1)

    def _trouble(self, call: _Call) -> str:
        """What single-stepping has to know of the instruction that was run.

        `shadow`: STI, MOV SS and POP SS hold traps back for an instruction, some of them on some processors (SDM vol.
        3, 6.8.3). `sysret`: it takes TF from R11. Decoded once an address: code that changes there is a chance taken.
        """
        rip = call.before[_RIP]
        if rip not in self._troubles:
            state = replace(self._leads[call.cpu].save(), rip=rip)
            code = paging.read_virtual(state, self.leader.ram.read, state.cs.base + rip, 4)
            code = code[1:] if code[:1] and 0x40 <= code[0] <= 0x4F and paging.code_bits(state) == 64 else code
            mov_ss = code[:1] == b"\x8e" and len(code) > 1 and code[1] >> 3 & 7 == 2
            shadow = mov_ss or code[:1] in (b"\xfb", b"\x17")
            self._troubles[rip] = "shadow" if shadow else "sysret" if code[:2] == b"\x0f\x07" else ""
        return self._troubles[rip]

    def _apart(self, cpu: int, before: tuple[int, ...]) -> bool:
        """Whether a CPU's registers differ, once what may differ was made equal."""
        leading, following = self.leader.cpus[cpu], self.follower.cpus[cpu]
        ours, theirs = leading.registers(), following.registers()
        if ours[:_RFLAGS] == theirs[:_RFLAGS] and (ours[_RFLAGS] ^ theirs[_RFLAGS]) & ~_RF == 0:
            return False
        state = leading.save()
        at = replace(state, rip=before[_RIP], rflags=before[_RFLAGS])
        code = paging.read_virtual(at, self.leader.ram.read, state.cs.base + before[_RIP], 15)
        other = following.save()
        excused = _excuse(code, state, other, before)
        if excused != other:
            following.load(excused)
        return any(getattr(state, name) != getattr(excused, name) for name in REGISTERS)

    # --- comparing and going back

    def equal(self) -> bool:
        """Whether both machines are equal in all that can be compared."""
        if any(_apart(a.save(), b.save()) for a, b in zip(self.leader.cpus, self.follower.cpus, strict=True)):
            return False
        if any(ours != theirs for _, (ours, theirs) in self._devices()):
            return False
        return not self._memory(limit=1)

    def _devices(self) -> Iterator[tuple[str, tuple[Any, Any]]]:
        """The states that are held, by part: the leader's and the follower's. Clock and config are not compared: the
        follower is given the one, and may have another rate of the TSC in the other."""
        for part in self.leader.parts:
            if part.holder is not None:
                yield part.name, (part.get(self.leader), part.get(self.follower))

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
        self._point = _Point(self.count, self.leader.moment(), self.follower.moment())

    def _back(self) -> None:
        self.leader.rewind(self._point.leader)
        self.follower.rewind(self._point.follower)
        self.count = self._point.count
        self.stopped = None

    def close(self) -> None:
        for machine in (getattr(self, "leader", None), getattr(self, "follower", None)):
            if machine is not None:
                machine.close()

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
