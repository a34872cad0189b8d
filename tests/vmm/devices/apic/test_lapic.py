"""The local APIC: what SDM vol. 3, chapter 11 says of priorities, its timer, its pins and its errors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.board.slot import Fixed
from vmm.bus import Bus
from vmm.devices.apic.lapic import BASE, Lapic
from vmm.devices.apic.messages import from_msi
from vmm.testing import Rig, check_device
from vmm.testing.rig import INTA_VECTOR, wiring

ID, LVR, TPR, PPR, EOI, LDR, DFR, SVR, ESR = 0x2, 0x3, 0x8, 0xA, 0xB, 0xD, 0xE, 0xF, 0x28
ICR, ICR2, TIMER, LINT0, LINT1, ERROR, TMICT, TMCCT, TDCR = 0x30, 0x31, 0x32, 0x35, 0x36, 0x37, 0x38, 0x39, 0x3E
ISR, TMR, IRR = 0x10, 0x18, 0x20
MASKED, LEVEL, REMOTE_IRR, PERIODIC, DEADLINE = 1 << 16, 1 << 15, 1 << 14, 1 << 17, 2 << 17
NMI, EXTINT = 4 << 8, 7 << 8
BY_ONE = 0xB  # divide by 1


class Chip:
    def __init__(self, number: int = 0, enabled: bool = True) -> None:
        self.rig = Rig()
        self.device: Any = wiring(Lapic, {"number": Fixed(number)})(self.rig)
        self.device.restored()
        self.bus = Bus()
        self.bus.memory.window(self.device, width=4).map(BASE)
        if enabled:
            self[SVR] = 0x1FF

    def __getitem__(self, register: int) -> int:
        return self.bus.mmio_read(BASE + 16 * register, 4)

    def __setitem__(self, register: int, value: int) -> None:
        self.bus.mmio_write(BASE + 16 * register, 4, value)

    @property
    def intr(self) -> bool:
        return bool(self.rig.lines.get("intr", False))

    def request(self, vector: int, level: bool = False) -> None:
        self.device.accept(0, vector, level)

    def requested(self) -> set[int]:
        return self.vectors(IRR)

    def vectors(self, register: int) -> set[int]:
        return {32 * i + bit for i in range(8) for bit in range(32) if self[register + i] >> bit & 1}

    def happened(self, name: str) -> list[tuple[object, ...]]:
        return [values for event, values in self.rig.events if event == name]

    def wait(self, ns: int) -> list[int]:
        """Let time pass, meeting deadlines. Returns the times at which a vector was requested by the timer."""
        end, times = self.rig.now + ns, []
        while (due := self.device.deadline()) is not None and due <= end:
            self.rig.now = max(due, self.rig.now)
            before = self.requested()
            self.device.expire()
            for vector in self.requested() - before:
                times.append(self.rig.now)
                self.device.state.irr = bytes(32)
                assert vector == self[TIMER] & 0xFF
        self.rig.now = end
        return times


@pytest.fixture
def chip() -> Chip:
    return Chip()


def test_any_guest():
    check_device(wiring(Lapic, {"number": Fixed(3)}))


def test_what_it_says_of_itself():
    chip = Chip(5)
    assert (chip[ID], chip[LVR]) == (5 << 24, 0x0005_0014)
    assert chip.device.base() == BASE | 0x800 and Chip(0).device.base() == BASE | 0x900


@given(st.lists(st.integers(16, 255), min_size=1, max_size=6, unique=True), st.integers(0, 255))
def test_the_highest_class_above_what_runs_is_taken(vectors, tpr):
    chip = Chip()
    chip[TPR] = tpr
    for vector in vectors:
        chip.request(vector)
    waiting, served = set(vectors), list[int]()
    while chip.intr:
        vector = chip.device.acknowledge()
        assert vector == max(waiting) and vector >> 4 > tpr >> 4
        waiting.remove(vector)
        served.append(vector)
        assert chip[PPR] == (tpr if tpr >> 4 >= vector >> 4 else vector & 0xF0)
        if not chip.intr:  # the rest is of this class, or of a lower one
            assert chip.vectors(ISR) == set(served) and chip.requested() == waiting
            chip[EOI] = 0
            served.pop()
    assert all(vector >> 4 <= tpr >> 4 for vector in waiting)
    chip.device.set_task_priority(0)
    assert chip.intr == bool(waiting) and chip.device.task_priority() == 0


def test_nothing_is_served_twice_without_its_eoi(chip):
    chip.request(0x51)
    assert chip.device.acknowledge() == 0x51
    chip.request(0x51)
    chip.request(0x5F)
    assert not chip.intr, "the class is in service"
    chip.request(0x61)
    assert chip.device.acknowledge() == 0x61
    chip[EOI] = 0
    assert not chip.intr
    chip[EOI] = 0
    assert chip.device.acknowledge() == 0x5F


def test_an_interrupt_that_is_gone_is_spurious(chip):
    chip[SVR] = 0x1EF
    chip.request(0x31)
    chip[TPR] = 0x30
    assert not chip.intr and chip.device.acknowledge() == 0xEF and chip.vectors(ISR) == set()


def test_only_a_level_is_told_to_the_io_apic(chip):
    for vector, level in ((0x51, True), (0x61, False)):
        chip.request(vector, level)
        assert chip.device.acknowledge() == vector and chip.vectors(TMR) == {0x51}
        chip[EOI] = 0
    assert chip.happened("eoi") == [(0x51,)]


def test_software_disabled(chip):
    chip[TIMER] = 0x40
    chip.request(0x41)
    chip[SVR] = 0xFF
    assert chip[TIMER] & MASKED and chip.requested() == {0x41}, "what was requested is kept"
    chip[TIMER] = 0x40
    assert chip[TIMER] & MASKED
    chip.request(0x51)
    assert chip.requested() == {0x41}
    chip.device.accept(4, 0, False)
    assert chip.device.take_nmi()


def test_disabled_it_is_as_if_not_there(chip):
    chip.request(0x51)
    assert chip.device.set_base(BASE)
    assert chip.rig.lines["place of registers"] is False and not chip.intr and chip.requested() == set()
    chip.device.set_lint0(True)
    assert chip.intr and chip.device.acknowledge() == INTA_VECTOR, "LINT0 is INTR (11.4.3)"
    chip.device.set_lint1(True)
    assert chip.device.take_nmi() and not chip.device.take_nmi(), "LINT1 is NMI"


def test_it_moves(chip):
    assert chip.device.set_base(0x8000_0000 | 0x900)
    assert chip.rig.lines["place of registers"] == 0x8000_0000
    for wrong in (BASE | 0x801, BASE | 0xC00, 1 << 40 | 0x800):
        assert not chip.device.set_base(wrong)
    assert chip.device.base() == 0x8000_0900


# --- the timer


@pytest.mark.parametrize(("divide", "ns"), [(0xB, 1), (0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128)])
def test_one_shot(chip, divide, ns):
    chip[TIMER], chip[TDCR], chip[TMICT] = 0x40, divide, 1000
    assert chip[TMCCT] == 1000
    assert chip.wait(400 * ns) == [] and chip[TMCCT] == 600
    assert chip.wait(10_000 * ns) == [1000 * ns] and chip[TMCCT] == 0


def test_periodic(chip):
    chip[TIMER], chip[TDCR], chip[TMICT] = 0x40 | PERIODIC, BY_ONE, 100
    assert chip.wait(350) == [100, 200, 300] and chip[TMCCT] == 50
    chip.rig.now += 1_000_000
    chip.device.expire()
    assert chip.requested() == {0x40} and 0 < chip.device.deadline() - chip.rig.now <= 100
    chip[TMICT] = 0
    assert chip.device.deadline() is None


def test_counting_goes_on_over_a_change_of_mode_or_rate(chip):
    chip[TIMER], chip[TDCR], chip[TMICT] = 0x40, BY_ONE, 1000
    chip.wait(400)
    chip[TIMER] = 0x40 | PERIODIC
    assert chip[TMCCT] == 600
    chip[TDCR] = 0  # by 2
    assert chip[TMCCT] == 600
    assert chip.wait(1200 + 2000) == [400 + 1200, 400 + 1200 + 2000]


def test_a_masked_timer_counts(chip):
    chip[TIMER], chip[TDCR], chip[TMICT] = 0x40 | PERIODIC | MASKED, BY_ONE, 100
    assert chip.wait(250) == [] and chip[TMCCT] == 50


def test_tsc_deadline(chip):
    """The rig's TSC is at 5 and counts at 2 GHz."""
    chip.device.set_deadline_msr(1000)
    assert chip.device.deadline_msr() == 0, "not in this mode"
    chip[TMICT] = 100
    chip[TIMER] = 0x40 | DEADLINE
    assert chip[TMICT] == 0 and chip.device.deadline() is None, "the change disarmed it"
    chip[TMICT] = 100
    chip.device.set_deadline_msr(1005)
    assert chip[TMICT] == chip[TMCCT] == 0 and chip.device.deadline_msr() == 1005
    assert chip.wait(10_000) == [500] and chip.device.deadline_msr() == 0
    chip.device.set_deadline_msr(7)
    assert chip.wait(0) == [10_000], "it is past, and comes at once"


# --- pins


def test_lint0_is_the_8259s(chip):
    chip[LINT0] = EXTINT | 0x20
    chip.device.set_lint0(True)
    assert chip.intr and chip.device.acknowledge() == INTA_VECTOR and chip.vectors(ISR) == set()
    chip[LINT0] = EXTINT | MASKED
    assert not chip.intr


def test_lint1_is_nmi(chip):
    chip[LINT1] = NMI
    chip.device.set_lint1(True)
    assert chip.rig.lines["event"] and chip.device.take_nmi() and not chip.rig.lines["event"]
    chip.device.set_lint1(True)
    assert not chip.device.take_nmi(), "an edge"


@pytest.mark.parametrize(
    ("lint0", "makes"),
    [(NMI, True), (NMI | 0x55, True), (NMI | LEVEL, True), (NMI | MASKED, False), (EXTINT, False), (0x55, False),
     (0x5 << 8, False)],
)  # fmt: skip
def test_what_makes_nmis(chip, lint0, makes):
    chip[LINT0] = lint0
    assert chip.device.makes_nmis() is makes
    chip.device.set_base(0xFEE0_0000)
    assert not chip.device.makes_nmis(), "it is switched off"


def test_only_what_is_fixed_has_a_level(chip):
    chip[LINT0] = NMI | LEVEL
    chip.device.set_lint0(True)
    assert chip.device.take_nmi() and not chip[LINT0] & REMOTE_IRR and chip.requested() == set()
    chip[LINT0] = NMI | LEVEL
    assert not chip.device.take_nmi(), "it has not risen again"


@pytest.mark.parametrize("mode", [0, 1, 4, 5, 6])
def test_the_cpu_is_told_at_once(chip, mode):
    chip.device.accept(mode, 0x41, False)
    told = (mode in (0, 1), mode in (4, 5))  # no CPU waits for a start-up message
    assert (chip.intr, chip.rig.lines["event"]) == told


def test_a_level_on_lint0(chip):
    chip[LINT0] = 0x51 | LEVEL
    chip.device.set_lint0(True)
    assert chip[LINT0] & REMOTE_IRR and chip.device.acknowledge() == 0x51
    chip[EOI] = 0
    assert chip.device.acknowledge() == 0x51, "it is still asserted"
    chip.device.set_lint0(False)
    chip[EOI] = 0
    assert not chip.intr and not chip[LINT0] & REMOTE_IRR


# --- messages and errors


@pytest.mark.parametrize(
    ("command", "high", "sent"),
    [
        (0x41, 2 << 24, (2, False, 0, 0x41, False, None)),
        (0x941, 3 << 24, (3, True, 1, 0x41, False, None)),
        (0x400, 1 << 24, (1, False, 4, 0, False, None)),
        (0x4500, 1 << 24, (1, False, 5, 0, False, None)),
        (0x80041, 0, (255, False, 0, 0x41, False, None)),
        (0xC0041, 0, (255, False, 0, 0x41, False, 0)),
        (0x8500, 1 << 24, None),  # INIT level de-assert
    ],
)
def test_sending(chip, command, high, sent):
    chip[ICR2], chip[ICR] = high, command
    assert chip.happened("send") == ([] if sent is None else [sent])
    assert chip[ICR] == command & 0xCCFFF and chip[ICR2] == high


def test_to_itself(chip):
    chip[ICR] = 0x40041
    assert chip.requested() == {0x41}


def test_errors(chip):
    chip[ERROR] = 0xFE
    chip[ICR] = 7
    assert chip.requested() == {0xFE} and chip[ESR] == 0
    chip[ESR] = 0
    assert chip[ESR] == 0x20
    chip.request(15)
    assert chip[0x3F] == 0
    chip[ESR] = 0
    assert chip[ESR] == 0x40 | 0x80
    chip[ERROR] = 3  # its own vector is none: it does not end in itself for ever
    chip.request(15)
    chip[ESR] = 0
    assert chip[ESR] == 0x40


@pytest.mark.parametrize(
    ("ldr", "dfr", "destination", "logical", "is_named"),
    [
        (0, 15, 3, False, True), (0, 15, 2, False, False), (0, 15, 255, False, True),
        (0b0100, 15, 0b0110, True, True), (0b0100, 15, 0b1010, True, False), (0, 15, 255, True, True),
        (0x21, 0, 0x23, True, True), (0x21, 0, 0x33, True, False), (0x21, 0, 0x22, True, False),
        (0x21, 0, 0xF1, True, True),
    ],
)  # fmt: skip
def test_names(ldr, dfr, destination, logical, is_named):
    chip = Chip(3)
    chip[LDR], chip[DFR] = ldr << 24, dfr << 28
    assert chip.device.is_named(destination, logical) is is_named


def test_init_and_start_up():
    chip = Chip(3)
    chip[TPR] = 0x50
    chip.device.accept(5, 0, False)
    assert chip.rig.lines["event"] and chip.device.take_init() and not chip.device.take_init()
    assert chip[TPR] == 0 and chip[SVR] == 0xFF and chip[ID] == 3 << 24
    assert not chip.rig.lines["event"]
    chip.device.accept(4, 0, False)
    assert not chip.rig.lines["event"], "it waits for nothing but a start-up message"
    chip.device.accept(6, 0x9A, False)
    assert chip.rig.lines["event"] and chip.device.begins_anew()
    assert chip.device.take_sipi() == 0x9A and chip.device.take_sipi() is None and not chip.rig.lines["event"]
    chip.device.accept(6, 0x9B, False)
    assert not chip.device.begins_anew() and chip.device.take_sipi() is None, "it runs"


def test_a_start_up_message_behind_an_init_is_kept_until_that_is_done():
    chip = Chip(3)
    chip.device.accept(5, 0, False)
    chip.device.accept(6, 0x9A, False)
    assert chip.device.take_sipi() is None and chip.device.take_init() and chip.device.take_sipi() == 0x9A


def test_init_of_the_first_cpu():
    """It begins at its reset vector, and waits for nobody (9.4.2)."""
    chip = Chip(0)
    chip.device.accept(5, 0, False)
    chip.device.accept(6, 0x9A, False)
    assert chip.device.take_init() and chip.device.take_sipi() is None and not chip.rig.lines["event"]


def test_a_devices_message():
    assert from_msi(0xFEE0_3004, 0x8141) == (3, True, 1, 0x41, True, None)
    assert from_msi(0xFEC0_3004, 0x41) is None
