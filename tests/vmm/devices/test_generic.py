"""Every device of the board, by the generic properties."""

import random
import re
from collections.abc import Callable
from typing import Annotated

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from snapshot.field_types import Json, Size, u8, u64
from snapshot.schema import state
from vmm.board.isapc import CHIPS
from vmm.board.kinds import OURS
from vmm.device import Device, invariant, outside
from vmm.devices.isa.debugcon import Debugcon
from vmm.qtest.board import Command
from vmm.registers import reads, writes
from vmm.testing import Subject, check_device, device_machine
from vmm.testing.case import Case
from vmm.testing.draw import case
from vmm.wires import Alarm, Clock, Line

PARTS = [slot.id for slot in CHIPS if slot.id not in ("com2", "com3", "com4")]  # as com1
KINDS = [kind.name for kind in OURS if kind.device not in {slot.device for slot in CHIPS}]  # on no board by themselves


@pytest.mark.parametrize("part", [*PARTS, *KINDS])
def test_device(part):
    check_device(Subject.named(part))


@state("test.generic.counter", version=1)
class CounterState:
    count: u8 = 0
    at_ns: u64 = 0


def hiding_place() -> Callable[..., int]:
    """Keeps what it is called with, where no look at a device's attributes finds it."""
    hidden = 0

    def keep(value: int | None = None) -> int:
        nonlocal hidden
        hidden = hidden if value is None else value
        return hidden

    return keep


class Counter(Device[CounterState]):
    """One byte, a line that is its lowest bit, a timer, and a pin."""

    State = CounterState

    def __init__(self, clock: Clock, alarm: Alarm, line: Line, sink: Callable[[int], None]) -> None:
        super().__init__()
        self.clock, self.alarm, self.line, self.sink = clock, alarm, line, sink
        self.hidden = hiding_place()

    @reads(0)
    def read(self) -> int:
        return self.state.count

    @writes(0)
    def write(self, value: int) -> None:
        self.set(value)

    @outside
    def pin(self, value: u8) -> None:
        self.set(value)

    def set(self, value: int) -> None:
        self.state.count = value
        self.line(bool(value & 1))

    def deadline(self) -> int | None:
        return self.state.at_ns if self.state.at_ns > 0 else None

    def expire(self) -> None:
        self.state.at_ns = 0
        self.alarm(None)

    def restored(self) -> None:
        self.line(bool(self.state.count & 1))
        self.alarm(self.deadline())


def test_a_device_that_is_right():
    check_device(Counter)


def test_a_device_built_by_a_function():
    """Whoever takes a rig's alarm by hand has one, too."""
    check_device(lambda rig: Counter(rig.clock, rig.alarm, rig.line("line"), rig.sink("sink")))


class Forgetful(Counter):
    def read(self):
        return self.hidden()

    def set(self, value):
        super().set(value)
        self.hidden(value)


class Wide(Counter):
    def set(self, value):
        self.state.count += value
        self.line(bool(self.state.count & 1))


class Clicks(Counter):
    def restored(self):
        super().restored()
        self.state.count = self.state.count + 1 & 0xFF


class Tells(Counter):
    def restored(self):
        super().restored()
        self.sink(1)


class Late(Counter):
    def expire(self):
        pass


class Endless(Counter):
    def read(self):
        while self.state.count:
            pass
        return 0


class SlowerByTheYear(Counter):
    def expire(self):
        for _ in range(0, self.clock.now_ns() - self.state.at_ns, 1000):
            pass
        super().expire()


class Hangs(Counter):
    def restored(self):
        self.line(False)
        self.alarm(self.deadline())


class Oversleeps(Counter):
    def restored(self):
        self.line(bool(self.state.count & 1))


class TellsNothing(Counter):
    def __init__(self, clock: Clock, line: Line, sink: Callable[[int], None]) -> None:
        super().__init__(clock, lambda when_ns: None, line, sink)


class Knocks(Counter):
    def restored(self):
        self.line(True)
        self.line(False)
        super().restored()


class KnocksLater(Counter):
    """The twin's line goes up twice where the original's does once."""

    def set(self, value):
        if self.hidden():
            self.line(False)
        super().set(value)

    def restored(self):
        super().restored()
        self.hidden(self.state.count & 1)


class Loses(Counter):
    @invariant
    def never_five(self):
        return self.state.count != 5


class Raises(Counter):
    def set(self, value):
        super().set((1, 2, 3, 4)[value & 7])


class TooMuch(Counter):
    def read(self):
        return self.state.count << 1


class PinForgotten(Counter):
    @outside
    def pin(self, value: u8):
        self.hidden(value)

    def read(self):
        return self.state.count ^ self.hidden()


BUGS = {
    Forgetful: "the twin answers",
    Wide: "not an integer",
    Clicks: "restored.. changed the state",
    Tells: "restored.. acted",
    Late: "stays in the past",
    Endless: "does not come to an end",
    SlowerByTheYear: "does not come to an end",
    Hangs: "line line differs",
    Oversleeps: "the alarm was told None",
    TellsNothing: "no Alarm to tell it to",
    Knocks: "moved a line to and fro",
    KnocksLater: "line line of the twin differs",
    Loses: "never_five holds no more",
    Raises: "tuple index",
    TooMuch: "a read of 1 bytes answered",
    PinForgotten: "the twin answers",
}


@pytest.mark.parametrize("broken", BUGS, ids=lambda cls: cls.__name__)
def test_what_is_wrong_is_found(broken):
    """Planted bugs: what the properties are for."""
    how = settings(max_examples=400, phases=[Phase.generate], report_multiple_bugs=False, deadline=None, database=None)
    with pytest.raises(Exception, match=BUGS[broken]):
        run_state_machine_as_test(device_machine(broken), settings=how)


def test_what_is_overdue_in_a_state_is_served_within_bounds():
    subject = Subject.of(SlowerByTheYear)
    overdue = Case(subject.name, {"count": 0, "at_ns": 0}, 1 << 50, {"at_ns": 1}, ())
    assert "does not come to an end" in (overdue.failure(subject=subject) or "")


def test_an_invariant_that_comes_to_hold_goes_on_holding():
    subject = Subject.of(Loses)
    golden: dict[str, Json] = {"count": 5, "at_ns": 0}
    five = Case(subject.name, golden, 0, {}, (Command("out", 1, 0, 5),))
    assert five.failure(subject=subject) is None, "it has not held yet"
    back = Case(subject.name, golden, 0, {}, (Command("out", 1, 0, 4), Command("out", 1, 0, 5)))
    assert back.failure(subject=subject) == "AssertionError: never_five holds no more"


@state("test.generic.large", version=1)
class LargeState:
    table: Annotated[tuple[u8, ...], Size(8192)] = (0,) * 8192


class Large(Device[LargeState]):
    """Its state alone is more than an access may do."""

    State = LargeState

    @reads(0)
    def read(self) -> int:
        return self.state.table[0]


def test_only_what_the_device_does_is_bounded():
    check_device(Large, examples=3)


@state("test.generic.timer", version=1)
class TimerState:
    at_ns: u64 = 1000


class Timer(Device[TimerState]):
    """No register, only time."""

    State = TimerState

    def __init__(self, alarm: Alarm, line: Line) -> None:
        super().__init__()
        self.alarm, self.line = alarm, line

    def deadline(self) -> int | None:
        return self.state.at_ns or None

    def expire(self) -> None:
        self.state.at_ns = 0
        self.line(True)
        self.alarm(None)

    def restored(self) -> None:
        self.line(not self.state.at_ns)
        self.alarm(self.deadline())


class ForgottenTimer(Timer):
    def restored(self) -> None:
        self.line(False)
        self.alarm(self.deadline())


def test_a_device_without_registers():
    check_device(Timer)
    with pytest.raises(AssertionError, match="line line differs"):
        check_device(ForgottenTimer)
    for n in range(50):
        assert case(Subject.of(Timer), {"at_ns": 0}, 0, random.Random(n).randbytes(200)).actions


class FarApart(Counter):
    @reads(0x108, bank="first")
    def read_first(self) -> int:
        return 0

    @reads(0x8, bank="second")
    def read_second(self) -> int:
        return 0


def test_banks_do_not_overlap():
    check_device(FarApart, examples=5)


def test_a_constructor_that_does_not_say_what_it_needs():
    with pytest.raises(TypeError, match="Debugcon: nothing is wired to 'readback'"):
        check_device(Debugcon)


@state("mailbox", version=1)
class MailboxState:
    word: u64 = 0
    lost: bool = False


class Mailbox(Device[MailboxState]):
    """In memory, with a register of eight bytes."""

    State = MailboxState

    @reads(0, size=8)
    def read_word(self) -> int:
        return self.state.word

    @writes(0, size=8)
    def write_word(self, value: int) -> None:
        self.state.word = value

    @reads(8, size=4)
    def read_count(self) -> int:
        return self.state.word.bit_count()


class NarrowMailbox(Mailbox):
    @writes(0, size=8)
    def write_word(self, value: int) -> None:
        assert value >> 32 == 0
        self.state.word = value


def test_a_device_in_memory():
    check_device(Mailbox)
    with pytest.raises(AssertionError) as found:
        check_device(NarrowMailbox)
    (note,) = found.value.__notes__
    shortest = note.removeprefix("The shortest way there:\nguest time 0 ns\n")
    # A part of the register is written as the whole register, so there are several shortest ways: one write each.
    assert re.fullmatch(r"write[bwlq] 0x[ef]\w+ 0x10*", shortest), note


def test_fuzzing_a_device_in_memory():
    drawn = {action.op for n in range(50) for action in case(
        Subject.of(Mailbox), {"word": 0, "lost": False}, 0, random.Random(n).randbytes(200)
    ).actions if isinstance(action, Command)}  # fmt: skip
    assert drawn == {"read", "write", "clock_step"}
