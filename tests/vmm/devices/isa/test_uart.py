"""The 16550A, against its datasheet and what drivers probe for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.bus import Bus
from vmm.devices.isa.uart import FIFO, HOST_QUEUE, TRIGGER, Uart, UartState
from vmm.testing import Rig
from vmm.testing.strategies import states

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR
RTS, OUT2, LOOP = 0x02, 0x08, 0x10


class Port:
    def __init__(self) -> None:
        self.rig = Rig()
        self.sent = bytearray()
        self.device = Uart(self.rig.line("irq"), self.sent.append)
        self.bus = Bus()
        self.bus.ports.window(self.device).map(0x3F8)

    def __getitem__(self, register: int) -> int:
        return self.bus.port_in(0x3F8 + register, 1)

    def __setitem__(self, register: int, value: int) -> None:
        self.bus.port_out(0x3F8 + register, 1, value)

    @property
    def irq(self) -> bool:
        return bool(self.rig.lines.get("irq", False))


@pytest.fixture
def port() -> Port:
    port = Port()
    port[MCR] = RTS | OUT2
    return port


def test_a_driver_finds_a_16550a(port):
    """What Linux's autoconfig asks: scratch, IER width, FIFO bits, loopback."""
    port[IER] = 0xFF
    assert port[IER] == 0x0F
    port[IER] = 0
    port[MCR] = LOOP | 0x0A
    assert port[MSR] & 0xF0 == 0x90
    port[MCR] = OUT2
    port[FCR] = 0x01
    assert port[IIR] == 0xC1
    port[FCR] = 0
    assert port[IIR] == 0x01
    port[SCR] = 0xAE
    assert port[SCR] == 0xAE


def test_the_divisor_is_behind_dlab(port):
    port[LCR] = 0x83
    port[DATA], port[IER] = 0x0C, 0x01
    assert (port[DATA], port[IER]) == (0x0C, 0x01)
    port[LCR] = 0x03
    assert port[IER] == 0 and port[LCR] == 3 and not port.sent
    assert port.device.state.divisor == 0x010C


def test_sending_is_done_at_once(port):
    for byte in b"hello":
        assert port[LSR] & 0x60 == 0x60
        port[DATA] = byte
    assert port.sent == b"hello"


def test_transmitter_interrupt_follows_enable_write_and_iir(port):
    port[IER] = 2
    assert port.irq and port[IIR] == 2
    assert not port.irq and port[IIR] == 1, "reading IIR resets it"
    port[DATA] = 65
    assert port.irq and port[IIR] == 2
    port[IER] = 0
    port[IER] = 2
    assert port[IIR] == 2, "enabling sets it again: Linux tests chips for the bug of not doing so"


@pytest.mark.parametrize("bits, trigger", list(enumerate((1, 4, 8, 14))))
def test_receiver_trigger_and_time_out(port, bits, trigger):
    port[FCR] = 1 | bits << 6
    port[IER] = 1
    assert not port.irq
    for count in range(1, FIFO + 1):
        port.device.receive(bytes((count,)))
        assert port.irq
        assert port[IIR] == (0xC4 if count >= trigger else 0xCC)
    for count in range(FIFO, 0, -1):
        assert port[DATA] == FIFO + 1 - count
    assert not port.irq and port[LSR] & 1 == 0


@given(st.lists(st.binary(max_size=40), max_size=12), st.booleans())
def test_every_byte_typed_is_received_in_order(chunks, fifo):
    port = Port()
    port[MCR] = RTS
    port[FCR] = int(fifo)
    got, typed = bytearray(), b"".join(chunks)
    for chunk in chunks:
        assert port.device.receive(chunk) == len(chunk)
        if port[LSR] & 1:
            got.append(port[DATA])
    while (status := port[LSR]) & 1:
        assert not status & 2, "never an overrun"
        got.append(port[DATA])
    assert got == typed


def test_the_host_is_told_what_was_not_taken(port):
    assert port.device.receive(bytes(HOST_QUEUE + 50)) == HOST_QUEUE
    assert port.device.receive(b"x") == 1, "one has moved to the receiver buffer"
    assert port.device.receive(b"x") == 0


def test_fcr_empties_the_receiver(port):
    port[FCR] = 1
    port.device.receive(b"abc")
    port[FCR] = 3
    assert not port[LSR] & 1
    port.device.receive(b"abc")
    port[FCR] = 0
    assert not port[LSR] & 1, "so does turning the FIFOs off"


def test_sources_come_in_the_datasheets_order(port):
    port[MCR] = LOOP
    port[IER] = 0x0F
    port[DATA], port[DATA] = 1, 2  # the second overruns
    port[MCR] = LOOP | 0x02
    order = []
    for _ in range(5):
        source = port[IIR]
        order.append(source)
        {6: lambda: port[LSR], 4: lambda: port[DATA], 0: lambda: port[MSR]}.get(source, lambda: None)()
    assert order == [6, 4, 2, 0, 1]


# (enabled by this bit of IER, pending, IIR): PC16550D, table 5, from the highest priority down
SOURCES = (
    (0x04, lambda s: s.overrun, 0x06),
    (0x01, lambda s: len(s.received) >= (TRIGGER[s.trigger] if s.fifo else 1), 0x04),
    (0x01, lambda s: s.received, 0x0C),
    (0x02, lambda s: s.thr_empty, 0x02),
    (0x08, lambda s: s.msr & 0x0F, 0x00),
)


@given(states(UartState))
def test_in_any_state_it_asks_for_the_highest_enabled_source(state):
    port = Port()
    port.device.state = state
    port.device.restored()
    wanted = next((iir for bit, pending, iir in SOURCES if state.ier & bit and pending(state)), 0x01)
    assert port.irq == (wanted != 0x01 and state.mcr & (OUT2 | LOOP) == OUT2)
    lsr = 0x60 | bool(state.received) | state.overrun << 1
    assert port[IIR] == wanted | (0xC0 if state.fifo else 0)
    assert port[LSR] == lsr


def test_loopback_overrun(port):
    port[MCR] = LOOP
    port[DATA], port[DATA] = 1, 2
    assert port[LSR] == 0x63 and port[LSR] == 0x61
    assert port[DATA] == 2, "without FIFOs the buffer is overwritten"
    port[FCR] = 1
    for value in range(FIFO + 1):
        port[DATA] = value
    assert port[LSR] & 2
    assert [port[DATA] for _ in range(FIFO)] == list(range(FIFO)), "a FIFO keeps what it has"
    assert not port.sent


def test_loopback_wires_modem_outputs_to_inputs_and_notes_changes(port):
    assert port[MSR] == 0xB0
    port[MCR] = LOOP
    assert port[MSR] == 0x0B, "CTS, DSR and DCD went off"
    port[MCR] = LOOP | 0x04
    assert port[MSR] == 0x40, "RI on is no change"
    port[MCR] = LOOP
    assert port[MSR] == 0x04, "its trailing edge is"
    for control, status in ((1, 0x22), (2, 0x11), (8, 0x88)):
        port[MCR] = LOOP | control
        assert port[MSR] == status
        port[MCR] = LOOP
        port[MSR]


def test_a_change_of_the_modem_inputs_interrupts_until_it_is_read(port):
    port[MSR]
    port[IER] = 8
    assert not port.irq
    port[MCR] = LOOP | OUT2
    assert not port.irq, "loopback takes OUT2, too"
    port[MCR] = RTS | OUT2
    assert port.irq and port[MSR] & 0x0F and not port.irq


def test_out2_gates_the_interrupt(port):
    port[IER] = 2
    assert port.irq
    port[MCR] = 0
    assert not port.irq and port[IIR] == 2
    port[IER], port[IER] = 0, 2
    port[MCR] = OUT2 | LOOP
    assert not port.irq, "loopback holds OUT2 inactive"
    port[MCR] = OUT2
    assert port.irq


def test_typed_characters_wait_out_loopback(port):
    port[MCR] = LOOP
    port.device.receive(b"a")
    assert not port[LSR] & 1
    port[MCR] = RTS
    assert port[LSR] & 1 and port[DATA] == ord("a")


def test_what_is_typed_before_set_up_is_not_lost_to_it():
    port = Port()
    port.device.receive(b"early")
    port[FCR] = 7
    assert not port[LSR] & 1
    port[MCR] = RTS
    assert bytes(port[DATA] for _ in range(5)) == b"early"


def test_reset_keeps_scratch_divisor_and_what_was_typed(port):
    port.device.receive(b"ab")
    port[SCR], port[IER] = 7, 3
    port.device.reset()
    assert port[SCR] == 7 and port[IER] == 0 and not port.irq
    assert port.device.state.host_input == b"b"


def test_a_write_may_come_late_only_when_it_does_nothing_but_send():
    """DLAB makes it the divisor latch, loopback a receiver, THRI an interrupt."""
    posting: list[bool] = []
    uart = Uart(lambda level: None, lambda byte: None, posting.append)
    uart.restored()
    for register, value, late in (
        (1, 2, False),
        (1, 1, True),
        (3, 0x80, False),
        (3, 3, True),
        (4, 0x10, False),
        (4, 8, True),
    ):
        {1: uart.write_ier, 3: uart.write_lcr, 4: uart.write_mcr}[register](value)
        assert posting[-1] is late, (register, value)
