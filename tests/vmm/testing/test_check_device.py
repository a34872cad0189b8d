"""What is wrong with a device is one line that names it and where it stands; no traceback of ours."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from anyhyve import ANY, Alarm, Clock, Device, Line, MaxSize, Range, Size, outside, reads, span, state, u8, writes
from anyhyve.testing import check_device
from snapshot import schema, versions
from snapshot.field_types import Json
from tests.conftest import ROOT
from vmm.qtest.board import Command
from vmm.testing import fuzz
from vmm.testing.actions import Action, Wake
from vmm.testing.case import Case, told


@state("test.check", version=1)
class Byte:
    """A byte."""

    value: u8 = 0
    list: Annotated[bytes, MaxSize(4)] = b""


class Right(Device[Byte]):
    State = Byte

    @reads(0)
    def read(self) -> int:
        return self.state.value

    @writes(0)
    def write(self, value: int) -> None:
        self.state.value = value


# --- older versions


@state("test.check.older", version=1)
class Seconds:
    seconds: u8 = 0


@state("test.check.older", version=2)
class Milliseconds:
    ms: Annotated[int, Range(0, 254_000), "a period"] = 0


class Upgraded(Device[Milliseconds]):
    State = Milliseconds

    @reads(0)
    def read(self) -> int:
        return self.state.ms & 0xFF


@state("test.check.orphan", version=2)
class Orphan:
    value: u8 = 0


class Orphaned(Device[Orphan]):
    State = Orphan

    @reads(0)
    def read(self) -> int:
        return self.state.value


def test_old_states_are_to_be_upgraded(monkeypatch):
    with pytest.raises(AssertionError, match=r"^a state of version 1 is not upgraded: .* no upgrade from version 1\n"):
        check_device(Upgraded)
    step = monkeypatch.setitem
    step(versions._UPGRADES, Seconds, lambda old: Milliseconds(ms=1000 * old.seconds))
    with pytest.raises(AssertionError, match=r"^a state of version 1 is not upgraded: .*ms: 255000 is not"):
        check_device(Upgraded)
    step(versions._UPGRADES, Seconds, lambda old: Milliseconds(ms=min(254_000, 1000 * old.seconds)))
    check_device(Upgraded)
    with pytest.raises(TypeError, match=r"^test.check.orphan version 2: older versions are not declared"):
        check_device(Orphaned)


# --- declared wrongly


class NoState(Device[Any]):
    @reads(0)
    def read(self) -> int:
        return 0


@dataclass
class Undeclared:
    value: int = 0


class PlainState(Right):
    State = Undeclared  # type: ignore[assignment]


class NoRegisters(Device[Byte]):
    State = Byte

    def read(self) -> int:
        return self.state.value


class NoSuper(Right):
    def __init__(self, irq: Line) -> None:
        self._irq = irq


class LateSuper(Right):
    def __init__(self, irq: Line) -> None:
        self.state.value = 1
        super().__init__()


class NoValue(Right):
    @writes(0)
    def write(self) -> None:  # type: ignore[override]
        pass


class NoIndex(Right):
    @reads(span(4, 4))
    def family(self) -> int:
        return 0


class NoSize(Right):
    @reads(span(4, 4), size=ANY)
    def window(self, offset: int) -> int:
        return 0


class NoType(Right):
    @outside
    def pin(self, level) -> None:
        pass


class NoWidth(Right):
    @outside
    def pin(self, level: int) -> None:
        pass


class NoWire(Right):
    def __init__(self, speed: int) -> None:
        super().__init__()


def here(what: str) -> str:
    """Such as "NoSuper.__init__ (test_check_device.py:123)"."""
    return rf"{what} \(test_check_device\.py:\d+\)"


DECLARED = {
    NoState: "NoState has no State",
    PlainState: r"PlainState\.State is no class marked with @state: .*Undeclared.*",
    NoRegisters: "NoRegisters has no register: its methods are to be marked with @reads and @writes",
    NoSuper: here(r"NoSuper\.__init__") + r" is to call super\(\)\.__init__\(\) before all else: .*",
    LateSuper: here(r"LateSuper\.__init__") + r" is to call super\(\)\.__init__\(\) before all else: .*",
    NoValue: here(r"NoValue\.write") + r" is to take \(self, value\): it answers a write",
    NoIndex: here(r"NoIndex\.family") + r" is to take \(self, index\): it answers a read",
    NoSize: here(r"NoSize\.window") + r" is to take \(self, offset, size\): it answers a read",
    NoType: here(r"NoType\.pin") + ": 'level' is to be annotated as a field of a state is",
    NoWidth: here(r"NoWidth\.pin") + ": 'level': <class 'int'> has no exact width",
    NoWire: "NoWire: nothing is wired to 'speed'",
}


@pytest.mark.parametrize("broken", DECLARED, ids=lambda cls: cls.__name__)
def test_what_is_declared_wrongly(broken):
    with pytest.raises(TypeError, match=f"^{DECLARED[broken]}$") as found:
        check_device(broken)
    assert theirs(found.value), "no traceback of ours"


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (int, "int is no Device"),
        (7, "7 is neither a device's class nor a function that makes one of a Rig"),
        (lambda rig: 7, "7 is no Device"),
        (lambda rig: NoSuper(rig.line("irq")), DECLARED[NoSuper]),
    ],
)
def test_what_is_no_device(device, said):
    with pytest.raises(TypeError, match=f"^{said}$") as found:
        check_device(device)
    assert theirs(found.value)


def theirs(error: BaseException) -> bool:
    """Whether its traceback is of the test's and the device's code only, and there is none behind it."""
    modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return {*modules} == {__name__} and not behind


def test_two_methods_for_one_register():
    with pytest.raises(TypeError, match=r"Twice: two methods .*: read registers\+0x1/2 one, and .*\+0x1/2 two"):

        class Twice(Right):
            @reads(1, size=2)
            def one(self) -> int:
                return 0

            @reads(1, size=2)
            def two(self) -> int:
                return 0


@pytest.mark.parametrize(
    ("one", "two", "meet"),
    [
        ((2,), (span(0, 4),), True),
        ((4,), (span(0, 4),), False),
        ((3,), (span(0, 4, step=2),), False),
        ((span(0, 4, step=2),), (span(1, 4, step=2),), False),
        ((span(0, 4, step=2),), (span(6, 4, step=3),), True),
        ((span(0, 1 << 40),), (span((1 << 40) - 1, 1 << 40),), True),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_families_share_no_register(one, two, meet, swapped):
    one, two = (two, one) if swapped else (one, two)

    def declare():
        class Families(Right):
            @writes(*one, bank="other")
            def first(self, *given: int) -> None: ...

            @writes(*two, bank="other")
            def second(self, *given: int) -> None: ...

    if meet:
        with pytest.raises(TypeError, match="Families: two methods for the same register"):
            declare()
    else:
        declare()


def test_a_window_takes_what_no_other_register_answers():
    class Windowed(Right):
        @reads(span(0, 16), size=ANY)
        def window(self, offset: int, size: int) -> int:
            return 0

    check_device(Windowed, examples=5)
    with pytest.raises(TypeError, match=r"two methods .*: read .*/any window, and read .*/any other"):

        class Windows(Windowed):
            @reads(span(0, 16), size=ANY)
            def window(self, offset: int, size: int) -> int:
                return 0

            @reads(span(15, 1), size=ANY)
            def other(self, offset: int, size: int) -> int:
                return 0


def test_two_methods_of_one_name():
    """Python would forget the first."""
    with pytest.raises(TypeError, match=r"Same\.value: two methods of one name, and the first has registers"):

        class Same(Right):
            @reads(1)
            def value(self) -> int:
                return 0

            @writes(1)  # type: ignore[no-redef]
            def value(self, value: int) -> None: ...  # noqa: F811


# --- state beside self.state, and answers that are none


class Counts(Right):
    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    @writes(0)
    def write(self, value: int) -> None:
        self.writes += 1


class CountsInside(Counts):
    @writes(0)
    def write(self, value: int) -> None:
        self._count()

    def _count(self) -> None:
        self.writes += 1


class New(Right):
    @writes(0)
    def write(self, value: int) -> None:
        self.last = value


class Queue(Right):
    def __init__(self) -> None:
        super().__init__()
        self.queue: deque[int] = deque(maxlen=4)

    @outside
    def pin(self, level: u8) -> None:
        self.queue.append(level)


class Log(Right):
    log: list[int] = []

    @writes(0)
    def write(self, value: int) -> None:
        self.log.append(value)


class Total(Right):
    total = 0

    @writes(0)
    def write(self, value: int) -> None:
        type(self).total += 1


class Dice(Right):
    def __init__(self) -> None:
        super().__init__()
        self.dice = random.Random(1)

    @reads(0)
    def read(self) -> int:
        return self.dice.randrange(6)


class Helper:
    def __init__(self, device: Device[Any]) -> None:
        self.device, self.deep = device, {"a": [0]}


class Nested(Right):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper(self)

    def reset(self) -> None:
        super().reset()
        self.helper.deep["a"][0] += 1


class Remembers(Right):
    def __init__(self) -> None:
        super().__init__()
        self.before = 0

    def restored(self) -> None:
        self.before = self.state.value + 1


class Replaced(Right):
    @writes(0)
    def write(self, value: int) -> None:
        self.state = value  # type: ignore[assignment]


class NothingRead(Right):
    @reads(0)
    def read(self) -> None:  # type: ignore[override]
        self.state.value = 0


class HalfRead(Right):
    @reads(0)
    def read(self) -> float:  # type: ignore[override]
        return self.state.value / 2


class TextRead(Right):
    @reads(0)
    def read(self) -> str:  # type: ignore[override]
        return "ready"


class WideRead(Right):
    @reads(0)
    def read(self) -> int:
        return 0x100


class NegativeRead(Right):
    @reads(span(0, 2), size=ANY)
    def window(self, offset: int, size: int) -> int:
        return -1


class HalfDeadline(Right):
    def __init__(self, alarm: Alarm) -> None:
        super().__init__()
        self._alarm = alarm

    def deadline(self) -> float:  # type: ignore[override]
        return 1e17

    def restored(self) -> None:
        self._alarm(self.deadline())  # type: ignore[arg-type]


DOES = {
    Counts: here(r"Counts\.write") + r" changes self\.writes, which is beside self\.state: no snapshot has it",
    CountsInside: here(r"CountsInside\._count") + r" changes self\.writes, .*",
    New: here(r"New\.write") + r" changes self\.last, .*",
    Queue: here(r"Queue\.pin") + r" changes self\.queue, .*",
    Log: here(r"Log\.write") + r" changes Log\.log, .*",
    Total: here(r"Total\.write") + r" changes Total\.total, .*",
    Dice: here(r"Dice\.read") + r" changes self\.dice, .*",
    Nested: here(r"Nested\.reset") + r" changes self\.helper, .*",
    Remembers: here(r"Remembers\.restored") + r" changes self\.before, .*",
    Replaced: here(r"Replaced\.write") + r" makes self\.state a int, no Byte",
    NothingRead: here(r"NothingRead\.read") + ": a read of 1 bytes answered None, no int from 0 to 0xff",
    HalfRead: here(r"HalfRead\.read") + r": a read of 1 bytes answered \d+\.\d, no int .*",
    TextRead: here(r"TextRead\.read") + ": a read of 1 bytes answered 'ready', no int .*",
    WideRead: here(r"WideRead\.read") + ": a read of 1 bytes answered 0x100, no int .*",
    NegativeRead: here(r"NegativeRead\.window") + r": a read of \d bytes answered -0x1, no int .*",
    HalfDeadline: here(r"HalfDeadline\.deadline") + r" answered 1e\+17, neither an int of ns nor None",
}


@pytest.mark.parametrize("broken", DOES, ids=lambda cls: cls.__name__)
def test_what_a_device_may_not_do(broken):
    with pytest.raises(AssertionError, match=f"^{DOES[broken]}\nThe shortest way there:") as found:
        check_device(broken)
    assert theirs(found.value), "no traceback of ours"
    (way,) = found.value.__notes__
    assert way.startswith("The shortest way there:\nguest time 0 ns") and way.count("\n") <= 2, way


class Raises(Right):
    def write(self, value: int) -> None:
        try:
            raise KeyError(value)
        except KeyError as error:
            raise ValueError("no such mode") from error


def test_what_a_device_raises_is_shown_with_its_own_lines():
    with pytest.raises(ValueError, match="no such mode") as found:
        check_device(Raises)
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(found.value.__traceback__)]
    assert frames[1:] == ["write"] and isinstance(found.value.__cause__, KeyError)


class Fixed(Right):
    """Constants, wires, and a table that nobody writes."""

    table = [1, 2, 3]

    def __init__(self, clock: Clock, irq: Line) -> None:
        super().__init__()
        self.clock, self.irq, self.lines = clock, irq, (irq, [irq])
        self.names = {"a": deque([1]), "b": itertools.chain}
        self.helper = Helper(self)

    @writes(0)
    def write(self, value: int) -> None:
        self.state.value = (value + self.clock.now_ns() + self.table[0] + self.helper.deep["a"][0]) & 0xFF
        self.irq(True)
        self.irq(False)


def test_what_does_not_change_is_no_state():
    check_device(Fixed)


@pytest.mark.parametrize("broken", [NoSuper, NoRegisters, NoType, Counts, NothingRead], ids=lambda cls: cls.__name__)
def test_fuzzing_says_it_too(tmp_path, broken):
    name = f"{__name__}:{broken.__name__}"
    command = [sys.executable, "-m", "anyhyve", "fuzz", name, "--seconds", "1", "--in", tmp_path / "finds"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    wanted = {**DECLARED, **DOES}[broken].split(",")[0]
    if broken in DOES:
        (id,) = [line.split()[2] for line in done.stdout.splitlines() if "anyhyve replay" in line]
        command[3:] = ["replay", id, "--in", tmp_path / "finds"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert re.search(wanted, done.stdout)
    else:
        assert re.search(wanted, done.stderr) and done.stderr.count("\n") == 1


# --- the numbers of what does not hold


@state("test.check.pair", version=1)
class Pair:
    """Two numbers, and some more."""

    left: u8 = 3
    right: u8 = 4
    more: Annotated[tuple[u8, ...], Size(3)] = (0, 0, 0)


class Sum(Device[Pair]):
    State = Pair

    def __init__(self, line: Line, tell: Callable[[int], None]) -> None:
        super().__init__()
        self.line, self.tell = line, tell

    @reads(0)
    def read(self) -> int:
        return self.state.left + self.state.right & 0xFF

    @writes(0)
    def write(self, value: int) -> None:
        self.state.left = value
        self.tell(value)
        self.restored()

    def restored(self) -> None:
        self.line(self.state.left > 5)


READ, WRITE, WAKE = Command("in", 1, 0), Command("out", 1, 0, 0x10), Wake()
NUMBERS: dict[str, tuple[dict[str, Json], tuple[Action, ...], list[str], list[str]]] = {
    "an answer": (
        {"left": 6},
        (WRITE, READ, WAKE, READ),
        ["guest time 0 ns", "outb 0x0 0x10", "inb 0x0: 0x14", "wake", "inb 0x0"],
        ["AssertionError: the twin answers 0xa, not 0x14"],
    ),
    "a field": (
        {"right": 20},
        (WAKE, WRITE),
        ["guest time 0 ns", "wake", "outb 0x0 0x10"],
        ["AssertionError: the twin is in another state", "right: expected 4, came 20"],
    ),
    "a level": (
        {"left": 16},
        (WAKE,),
        ["guest time 0 ns", "wake"],
        ["AssertionError: line line differs after the restore", "expected low, came high"],
    ),
    "an item": (
        {"more": [0, 7, 0]},
        (WAKE, WRITE),
        ["guest time 0 ns", "wake", "outb 0x0 0x10"],
        ["AssertionError: the twin is in another state", "more[1]: expected 0, came 7"],
    ),
}


@pytest.mark.parametrize("what", NUMBERS)
def test_what_was_expected_and_what_came(what):
    fields, actions, lines, said = NUMBERS[what]
    golden = schema.encode(Pair())

    def spoil(woken: Pair) -> Any:
        return versions.decode("test.check.pair", 1, {**schema.encode(woken), **fields}, Pair)

    case = Case(f"{__name__}:Sum", golden, 0, {}, actions)
    played, raised = case.told(spoil=spoil)
    assert raised is not None
    assert (played, told(raised)) == (lines, said)


class Wrong(Sum):
    def restored(self) -> None:
        super().restored()
        self.state.more = (self.state.more[0] + 1 & 0xFF, self.state.left, 0)


def test_replay_prints_the_numbers(tmp_path):
    case = Case(f"{__name__}:Wrong", schema.encode(Pair()), 7, {"left": 5}, (READ, WAKE))
    fuzz.keep(tmp_path, case, case.failure() or "")
    command = [sys.executable, "-m", "anyhyve", "replay", case.id, "--in", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.splitlines() == [
        "guest time 7 ns",
        "left = 5, not 3",
        "inb 0x0: 0x9",
        "wake",
        f"{__name__}:Wrong: AssertionError: restored() changed the state",
        "more[0]: expected 1, came 2",
    ]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    shown = json.loads(done.stdout)
    assert shown["cause"] == "AssertionError: restored() changed the state" and shown["played"][2] == "inb 0x0: 0x9"
