"""The 8259 pair: priorities against a plain reading of the datasheet, then its modes case by case."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.bus import Bus
from vmm.devices.isa.pic import CASCADE, Pic, PicPair
from vmm.wires import Junction

MASTER, SLAVE = 0x20, 0xA0
EOI = 0x20


class Pair:
    """Both chips as the PC has them, initialized the way Linux does: vectors 0x30 and 0x38."""

    def __init__(self, icw4: int = 0x01, initialize: bool = True) -> None:
        self.edges: list[bool] = []
        self._level = False
        master = Pic(self._intr)
        self.pics = PicPair(master, Pic(partial(master.set_line, CASCADE), master=False))
        self.bus = Bus()
        for chip, port, elcr in ((self.pics.master, MASTER, 0x4D0), (self.pics.slave, SLAVE, 0x4D1)):
            self.bus.ports.window(chip).map(port)
            self.bus.ports.window(chip, "elcr").map(elcr)
        chips = (self.pics.master, self.pics.slave)
        self.wires = [Junction(partial(chips[irq // 8].set_line, irq % 8)) for irq in range(16)]
        self.lines = [wire.driver() for wire in self.wires]
        if initialize:
            for port, vector, cascade in ((MASTER, 0x30, 4), (SLAVE, 0x38, 2)):
                self.out(port, 0x11)
                for word in (vector, cascade, icw4):
                    self.out(port + 1, word)

    def _intr(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self.edges.append(level)

    def out(self, port: int, value: int) -> None:
        self.bus.port_out(port, 1, value)

    def read(self, port: int) -> int:
        return self.bus.port_in(port, 1)

    def pulse(self, *irqs: int) -> None:
        for irq in irqs:
            self.lines[irq](False)
            self.lines[irq](True)

    def inta(self) -> int:
        return self.pics.acknowledge()

    def eoi(self, irq: int) -> None:
        if irq >= 8:
            self.out(SLAVE, EOI)
        self.out(MASTER, EOI)

    def irr(self, port: int = MASTER) -> int:
        self.out(port, 0x0A)
        return self.read(port)

    def isr(self, port: int = MASTER) -> int:
        self.out(port, 0x0B)
        return self.read(port)

    def drain(self) -> list[int]:
        """Serve everything, ending each before the next."""
        served = []
        while self.pics.pending():
            vector = self.inta()
            served.append(vector - 0x30)
            self.eoi(vector - 0x30)
        return served


@pytest.fixture
def pair() -> Pair:
    return Pair()


ORDER = [0, 1, 8, 9, 10, 11, 12, 13, 14, 15, 3, 4, 5, 6, 7]


@given(st.sets(st.sampled_from(ORDER)), st.sets(st.integers(0, 15)))
def test_served_by_priority_and_mask(raised, masked):
    pair = Pair()
    pair.out(MASTER + 1, sum(1 << i for i in masked if i < 8 and i != 2))
    pair.out(SLAVE + 1, sum(1 << i - 8 for i in masked if i >= 8))
    for irq in raised:
        pair.lines[irq](True)
    assert pair.drain() == [irq for irq in ORDER if irq in raised and (irq not in masked or irq == 2)]
    pair.out(MASTER + 1, 0)
    pair.out(SLAVE + 1, 0)
    assert pair.drain() == [irq for irq in ORDER if irq in raised and irq in masked]


@given(st.lists(st.sampled_from(ORDER), max_size=8))
def test_only_a_higher_request_nests(raises):
    """Fully nested mode: INT is up exactly when the best request beats the best in service."""
    pair = Pair()
    requested: set[int] = set()
    serving: list[int] = []
    for irq in raises:
        if irq not in requested:
            pair.pulse(irq)
            requested.add(irq)

        def rank(n):  # the whole slave is level 2 of the master, and in service it blocks its own lower inputs
            return ORDER.index(n)

        best = min(requested, key=rank, default=None)
        busy_slave = any(s >= 8 for s in serving)
        allowed = best is not None and all(rank(best) < rank(s) for s in serving)
        if best is not None and best >= 8 and busy_slave:
            allowed = False  # "special fully nested mode" exists because plain mode blocks this
        assert pair.pics.pending() == allowed
        if best is not None and allowed:
            assert pair.inta() == 0x30 + best
            requested.discard(best)
            serving.append(best)
    assert pair.isr() & ~4 == sum(1 << s for s in serving if s < 8)
    assert pair.isr(SLAVE) == sum(1 << s - 8 for s in serving if s >= 8)


@given(st.integers(0, 7), st.sets(st.integers(0, 7), min_size=1))
def test_set_priority_rotates(lowest, raised):
    pair = Pair()
    pair.out(MASTER, 0xC0 | lowest)
    for irq in raised - {2}:
        pair.lines[irq](True)
    order = [(lowest + 1 + i) % 8 for i in range(8)]
    assert pair.drain() == [irq for irq in order if irq in raised and irq != 2]


def test_rotate_on_non_specific_eoi_makes_the_served_lowest(pair):
    for irq in (3, 4):
        pair.lines[irq](True)
    assert pair.inta() == 0x33
    pair.out(MASTER, 0xA0)
    pair.pulse(3)
    assert pair.inta() == 0x34


def test_rotate_on_specific_eoi(pair):
    pair.pulse(3)
    pair.inta()
    pair.out(MASTER, 0xE3)
    assert pair.isr() == 0
    pair.pulse(3, 4)
    assert pair.inta() == 0x34


def test_specific_eoi_ends_that_level_only(pair):
    for irq in (4, 1):
        pair.pulse(irq)
        pair.inta()
    pair.out(MASTER, 0x60 | 4)
    assert pair.isr() == 1 << 1


def test_automatic_eoi_leaves_nothing_in_service_and_rotates_when_told():
    pair = Pair(icw4=0x03)
    pair.pulse(3)
    assert pair.inta() == 0x33 and pair.isr() == 0
    pair.out(MASTER, 0x80)
    pair.pulse(3, 4)
    assert pair.inta() == 0x33
    pair.pulse(3)
    assert pair.inta() == 0x34, "3 became the lowest"
    pair.out(MASTER, 0x00)
    for _ in range(2):
        pair.pulse(3, 4)
        assert (pair.inta(), pair.inta()) == (0x33, 0x34), "no rotation: 4 stays the lowest"


def test_special_mask_mode_lets_lower_levels_in(pair):
    pair.pulse(1)
    pair.inta()
    pair.lines[5](True)
    assert not pair.pics.pending()
    pair.out(MASTER + 1, 1 << 1)
    assert not pair.pics.pending(), "masking alone does not help"
    pair.out(MASTER, 0x68)
    assert pair.pics.pending() and pair.inta() == 0x35
    pair.out(MASTER, 0x48)
    assert pair.isr() == 1 << 1 | 1 << 5


def test_special_fully_nested_mode_lets_the_slave_interrupt_itself():
    for icw4, vector in ((0x01, None), (0x11, 0x38)):
        pair = Pair(icw4)
        pair.pulse(10)
        assert pair.inta() == 0x3A
        pair.pulse(8)
        assert pair.pics.pending() == (vector is not None)
        if vector:
            assert pair.inta() == vector


def test_a_request_that_goes_away_is_a_spurious_7(pair):
    pair.lines[3](True)
    pair.lines[3](False)
    assert not pair.pics.pending() and pair.inta() == 0x37
    assert pair.isr() == 0, "a spurious interrupt is not in service"


def test_a_slaves_request_that_goes_away_is_a_spurious_15_with_level_2_in_service(pair):
    pair.lines[10](True)
    slave = pair.pics.slave.state
    slave.irr = slave.lines = 0  # gone between the two INTA cycles
    assert pair.inta() == 0x3F
    assert pair.isr() == 4 and pair.isr(SLAVE) == 0


def test_an_edge_counts_once_and_a_level_for_as_long_as_it_stays(pair):
    pair.lines[5](True)
    assert pair.drain() == [5]
    assert not pair.pics.pending()
    pair.out(0x4D0, 0xFF)
    assert pair.read(0x4D0) == 0xF8, "IRQ 0, 1 and 2 have no level mode"
    assert pair.pics.pending(), "the line is still up"
    assert pair.inta() == 0x35
    pair.eoi(5)
    assert pair.pics.pending()
    pair.lines[5](False)
    assert not pair.pics.pending()
    pair.out(0x4D1, 0xFF)
    assert pair.read(0x4D1) == 0xDE


@pytest.mark.parametrize("how", ["ICW1 LTIM", "ELCR"])
def test_irr_shows_a_level_for_as_long_as_it_stays(pair, how):
    """Datasheet, "Reading the 8259A Status"; "Edge and Level Triggered Modes": an acknowledge resets no level."""
    if how == "ELCR":
        pair.out(0x4D0, 1 << 5)
    else:
        for register, word in ((0, 0x19), (1, 0x30), (1, 4), (1, 1)):
            pair.out(MASTER + register, word)
    pair.lines[5](True)
    assert pair.irr() == 1 << 5 and pair.inta() == 0x35
    assert pair.irr() == pair.isr() == 1 << 5
    pair.lines[5](False)
    assert pair.irr() == 0


def test_irr_and_isr_reads(pair):
    pair.lines[4](True)
    assert pair.irr() == 1 << 4 and pair.isr() == 0
    pair.inta()
    assert pair.isr() == 1 << 4 and pair.irr() == 0
    assert pair.read(MASTER + 1) == 0


def test_what_is_read_stays_chosen_over_another_ocw3(pair):
    pair.lines[4](True)
    pair.inta()
    pair.out(MASTER, 0x0B)
    assert pair.read(MASTER) == 1 << 4
    pair.out(MASTER, 0x68)  # special mask mode; no RR
    assert pair.read(MASTER) == 1 << 4
    pair.lines[3](True)
    pair.out(MASTER, 0x0A)
    pair.out(MASTER, 0x49)  # and out of it, with RIS and without RR
    assert pair.read(MASTER) == 1 << 3


def test_poll_is_an_acknowledge(pair):
    pair.out(MASTER, 0x0C)
    assert pair.read(MASTER) == 0
    pair.lines[6](True)
    pair.out(MASTER, 0x0C)
    assert pair.read(MASTER) == 0x86 and pair.isr() == 1 << 6
    assert pair.read(MASTER) == 1 << 6, "only the read after the poll command polls"


def test_icw1_forgets_requests_and_mask(pair):
    pair.out(MASTER + 1, 0xFF)
    pair.pulse(3)
    pair.out(MASTER, 0x11)
    assert pair.pics.master.state.imr == 0
    for word in (0x40, 4, 1):
        pair.out(MASTER + 1, word)
    assert not pair.pics.pending(), "an edge must come again"
    pair.pulse(3)
    assert pair.inta() == 0x43


@pytest.mark.parametrize("icw1, words", [(0x11, 3), (0x13, 2), (0x10, 2), (0x12, 1)])
def test_icw1_says_how_many_words_follow(icw1, words):
    pair = Pair(initialize=False)
    pair.out(MASTER, icw1)
    for _ in range(words):
        pair.out(MASTER + 1, 0)
    pair.out(MASTER + 1, 0x5A)
    assert pair.read(MASTER + 1) == 0x5A, "OCW1"


def test_the_pin_is_driven_once_per_change(pair):
    pair.edges.clear()
    for irq in (3, 4, 5):
        pair.lines[irq](True)
    assert pair.edges == [True]
    pair.drain()
    assert pair.edges[-1] is False


def test_devices_on_one_line_are_ored(pair):
    other = pair.wires[4].driver()
    pair.lines[4](False)
    other(False)
    pair.lines[4](True)
    other(False)
    assert pair.pics.pending(), "the other's low does not pull it down"
    pair.lines[4](False)
    assert not pair.pics.pending()


def test_restoring_shared_lines_raises_no_edge(pair):
    other = pair.wires[4].driver()
    pair.lines[4](False)
    other(True)
    assert pair.drain() == [4]
    pair.wires[4].forget()
    pair.lines[4](False)  # the first to speak is low; the other still holds the line
    other(True)
    assert not pair.pics.pending()
