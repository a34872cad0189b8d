"""National PC16550D serial port.

Source: National Semiconductor PC16550D datasheet (TL/C/8652), section 8; the OUT2 gate of the interrupt as in the IBM
AT serial adapter.

Sending takes no time: the transmitter is empty again when the write ends. Receiving never overruns: what the host
typed waits in `host_input` until the FIFO has room. With fewer characters than the trigger level the time-out
interrupt comes at once, not four character times later.

Absent
* Line speed, word length and parity have no effect; no parity, framing or break is ever received (LSR bits 2 to 4).
* DMA signalling (the RXRDY and TXRDY pins), the factory test write to LSR, writes to MSR.
* The far end holds CTS, DSR and DCD on and never rings; it sends while RTS is on, so what is typed before the guest
  has set up its port is not lost to the set-up.
"""

from __future__ import annotations

from typing import Annotated

from snapshot.field_types import MaxSize, u2, u4, u5, u8, u16
from snapshot.schema import state
from vmm.device import Device, invariant, outside
from vmm.registers import reads, writes
from vmm.wires import Line, Posting, Transmit

FIFO = 16
TRIGGER = (1, 4, 8, 14)
HOST_QUEUE = 4096

DLAB = 0x80  # LCR
DTR, RTS, OUT1, OUT2, LOOP = 0x01, 0x02, 0x04, 0x08, 0x10  # MCR
DATA_READY, OVERRUN, TRANSMITTER_EMPTY = 0x01, 0x02, 0x60  # LSR
CTS, DSR, RI, DCD = 0x10, 0x20, 0x40, 0x80  # MSR; changes in the low half
RECEIVED, THR_EMPTY, LINE_STATUS, MODEM_STATUS = 0x01, 0x02, 0x04, 0x08  # IER


@state("uart.16550a", version=1)
class UartState:
    ier: Annotated[u4, "interrupt enable"] = 0
    lcr: Annotated[u8, "line control"] = 0
    mcr: Annotated[u5, "modem control"] = 0
    scr: Annotated[u8, "scratch"] = 0
    divisor: Annotated[u16, "baud rate divisor latch"] = 0
    fifo: Annotated[bool, "FCR: FIFOs enabled"] = False
    trigger: Annotated[u2, "FCR: receiver trigger level 1, 4, 8, 14"] = 0
    received: Annotated[bytes, MaxSize(FIFO), "receiver FIFO, or the receiver buffer"] = b""
    overrun: Annotated[bool, "LSR: overrun error (only in loopback)"] = False
    thr_empty: Annotated[bool, "transmitter-empty interrupt pending"] = False
    msr: Annotated[u8, "modem status"] = CTS | DSR | DCD
    host_input: Annotated[bytes, MaxSize(HOST_QUEUE), "typed by the host, not yet received"] = b""


class Uart(Device[UartState]):
    """A serial port: eight registers at 0..7.

    `transmit` takes each byte sent; `receive` is the other direction. `posting` is on while
    a write of register 0 does nothing but send: such a write may come late, if before any other access."""

    State = UartState

    def __init__(self, irq: Line, transmit: Transmit, posting: Posting = lambda level: None) -> None:
        super().__init__()
        self._irq = irq
        self._transmit = transmit
        self._posting = posting

    # --- the far end

    @outside
    def receive(self, data: Annotated[bytes, MaxSize(2 * HOST_QUEUE)]) -> int:
        """Characters for the guest. Returns how many were taken; the host keeps the rest."""
        s = self.state
        taken = min(len(data), HOST_QUEUE - len(s.host_input))
        s.host_input += data[:taken]
        self._refill()
        self._drive()
        return taken

    @invariant
    def one_byte_without_a_fifo(self) -> bool:
        """The receiver buffer holds one character (datasheet, 8.4)."""
        return self.state.fifo or len(self.state.received) <= 1

    # --- registers

    @reads(0)
    def read_data(self) -> int:
        s = self.state
        if s.lcr & DLAB:
            return s.divisor & 0xFF
        if not s.received:
            return 0
        value, s.received = s.received[0], s.received[1:]
        self._refill()
        self._drive()
        return value

    @writes(0)
    def write_data(self, value: int) -> None:
        s = self.state
        if s.lcr & DLAB:
            s.divisor = s.divisor & 0xFF00 | value
            return
        if s.mcr & LOOP:
            self._loop_back(value)
        else:
            self._transmit(value)
        s.thr_empty = True
        self._drive()

    @reads(1)
    def read_ier(self) -> int:
        s = self.state
        return s.divisor >> 8 if s.lcr & DLAB else s.ier

    @writes(1)
    def write_ier(self, value: int) -> None:
        s = self.state
        if s.lcr & DLAB:
            s.divisor = value << 8 | s.divisor & 0xFF
            return
        if value & THR_EMPTY and not s.ier & THR_EMPTY:
            s.thr_empty = True  # enabling it while THR is empty, as it always is, sets it
        s.ier = value & 0x0F
        self._drive()
        self._post()

    @reads(2)
    def read_iir(self) -> int:
        s = self.state
        source = self._source()
        if source == 0x02:
            s.thr_empty = False  # reading IIR resets this source, and no other
            self._drive()
        return source | (0xC0 if s.fifo else 0)

    @writes(2)
    def write_fcr(self, value: int) -> None:
        s = self.state
        enable = bool(value & 0x01)
        if enable != s.fifo or (enable and value & 0x02):
            s.received = b""
        s.fifo = enable
        s.trigger = value >> 6 if enable else 0
        self._refill()
        self._drive()

    @reads(3)
    def read_lcr(self) -> int:
        return self.state.lcr

    @writes(3)
    def write_lcr(self, value: int) -> None:
        self.state.lcr = value
        self._post()

    @reads(4)
    def read_mcr(self) -> int:
        return self.state.mcr

    @writes(4)
    def write_mcr(self, value: int) -> None:
        s = self.state
        s.mcr = value & 0x1F
        self._inputs()
        self._refill()
        self._drive()
        self._post()

    @reads(5)
    def read_lsr(self) -> int:
        s = self.state
        value = TRANSMITTER_EMPTY | (DATA_READY if s.received else 0) | (OVERRUN if s.overrun else 0)
        if s.overrun:
            s.overrun = False
            self._drive()
        return value

    @reads(6)
    def read_msr(self) -> int:
        s = self.state
        value, s.msr = s.msr, s.msr & 0xF0
        if value & 0x0F:
            self._drive()
        return value

    @reads(7)
    def read_scr(self) -> int:
        return self.state.scr

    @writes(7)
    def write_scr(self, value: int) -> None:
        self.state.scr = value

    def reset(self) -> None:
        """MR clears control registers; what waits on the host's side stays there (datasheet, table 1)."""
        s = self.state
        self.state = UartState(scr=s.scr, divisor=s.divisor, host_input=s.host_input)
        self.restored()

    def restored(self) -> None:
        self._drive()
        self._post()

    # --- inside

    def _source(self) -> int:
        """IIR's low half: the highest source pending and enabled, 1 for none (datasheet, table 5)."""
        s = self.state
        if s.ier & LINE_STATUS and s.overrun:
            return 0x06
        if s.ier & RECEIVED and s.received:
            return 0x04 if not s.fifo or len(s.received) >= TRIGGER[s.trigger] else 0x0C
        if s.ier & THR_EMPTY and s.thr_empty:
            return 0x02
        if s.ier & MODEM_STATUS and s.msr & 0x0F:
            return 0x00
        return 0x01

    def _drive(self) -> None:
        # On a PC the OUT2 pin enables the interrupt's driver; loopback mode holds that pin inactive.
        enabled = self.state.mcr & (OUT2 | LOOP) == OUT2
        self._irq(enabled and self._source() != 0x01)

    def _post(self) -> None:
        s = self.state
        self._posting(not s.lcr & DLAB and not s.mcr & LOOP and not s.ier & THR_EMPTY)

    def _refill(self) -> None:
        s = self.state
        if s.host_input and s.mcr & (RTS | LOOP) == RTS:
            room = max(0, (FIFO if s.fifo else 1) - len(s.received))
            s.received += s.host_input[:room]
            s.host_input = s.host_input[room:]

    def _loop_back(self, value: int) -> None:
        s = self.state
        if len(s.received) < (FIFO if s.fifo else 1):
            s.received += bytes((value,))
            return
        s.overrun = True
        if not s.fifo:
            s.received = bytes((value,))  # the buffer is overwritten; a FIFO keeps what it has

    def _inputs(self) -> None:
        """The modem inputs: the far end's, or in loopback the modem outputs."""
        s = self.state
        lines = CTS | DSR | DCD
        if s.mcr & LOOP:
            wired = ((RTS, CTS), (DTR, DSR), (OUT1, RI), (OUT2, DCD))
            lines = sum(status for control, status in wired if s.mcr & control)
        changed = (lines ^ s.msr) & 0xF0
        if lines & RI:
            changed &= ~RI  # TERI is the trailing edge only
        s.msr = lines | s.msr & 0x0F | changed >> 4
