"""Keyboard controller with its keyboard and its mouse: the PS/2 system's Intel 8042.

Intel UPI-41/42 User's Manual (8042: data bus buffers, status register, ports 1 and 2), cited as UPI;
IBM Personal System/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller", cited as
IBM: the program in the 8042, its commands and its command byte.

The chip talks to a keyboard and a mouse (ps2.py) and the guest sees one output buffer of one byte: while it is full
the devices are held back, and when it is read the next byte moves in, the controller's own before the keyboard's
before the mouse's. IRQ1 or IRQ12 is the level of "buffer full" of the one or the other, if enabled; it falls when
the byte is read and rises with the next, so an edge-triggered controller sees each byte.

Power-on is the state in which PC firmware leaves the chip, since guests are started without firmware too: keyboard
enabled, translated and on IRQ1, mouse disabled. The system flag alone is as the hardware has it, 0 until the
self-test, which is how firmware tells a cold start from a warm one. Port 2 is high after RESET (UPI), so A20 is.

Absent: time (a byte is there as soon as it is asked for: the input buffer is never seen full and no transfer times
out or fails in parity, so status bits 1, 6 and 7 read 0); the keyboard lock (status bit 4 reads 1) and the password
(A4 says none is installed, A5 takes its text and forgets it, A6 does nothing); AC diagnostic dump and C1/C2 polling
of port 1; the effect of D1 on any pin but A20 and reset, and of F0-FF on any but reset; active multiplexing.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from snapshot.field_types import MaxSize, Range, Size, u5, u8
from snapshot.schema import state
from vmm.device import Device, invariant, outside
from vmm.devices.isa.ps2 import (
    BREAK,
    SET_2_TO_1,
    KeyboardState,
    MouseState,
    keyboard_key,
    keyboard_take,
    keyboard_write,
    mouse_move,
    mouse_take,
    mouse_write,
)
from vmm.registers import reads, writes
from vmm.wires import Line, ResetRequest

# IBM, "Status Register"
OUTPUT_FULL, SYSTEM_FLAG, LAST_WAS_COMMAND, NOT_INHIBITED, AUX_OUTPUT_FULL = 0x01, 0x04, 0x08, 0x10, 0x20
# IBM, "Command Byte"; its system flag has the same place as the status register's
KEYBOARD_IRQ, AUX_IRQ, KEYBOARD_OFF, AUX_OFF, TRANSLATE = 0x01, 0x02, 0x10, 0x20, 0x40

INPUT_PORT = 0xB3  # IBM, "Input Port": not locked, jumper open, idle data lines high
OUTPUT_PORT_IDLE = 0xCD  # IBM, "Output Port": reset released, clock and data lines high
RESET_PIN, A20_PIN = 0x01, 0x02


@state("i8042", version=1)
class I8042State:
    """Keyboard controller, keyboard and mouse."""

    command_byte: Annotated[u8, "byte 0 of the internal RAM: interrupts, system flag, disables, translation"] = (
        KEYBOARD_IRQ | AUX_OFF | TRANSLATE
    )
    ram: Annotated[bytes, Size(31), "bytes 1 to 31 of the internal RAM"] = bytes(31)
    awaiting: Annotated[u8, "command whose data byte comes next at port 60; 0 none"] = 0
    last_was_command: Annotated[bool, "the last write was to port 64, not 60"] = False
    a20: Annotated[bool, "A20 pin of the output port"] = True
    output: Annotated[u8, "output buffer; it keeps its byte when it has been read"] = 0
    output_full: Annotated[bool, "the output buffer has not been read"] = False
    output_aux: Annotated[bool, "the output buffer is from the mouse, or from D3"] = False
    reply: Annotated[u8 | None, "the controller's own byte waiting for the output buffer"] = None
    reply_aux: Annotated[bool, "the waiting byte is to be taken for the mouse's"] = False
    released: Annotated[bool, "translation has seen F0: the next code is a break"] = False
    keyboard: Annotated[KeyboardState, "the keyboard"] = dataclasses.field(default_factory=KeyboardState)
    mouse: Annotated[MouseState, "the mouse"] = dataclasses.field(default_factory=MouseState)


class I8042(Device[I8042State]):
    """Bank "" is port 60, bank "command" is port 64. `reset` asks for a system reset and returns at once."""

    State = I8042State

    def __init__(self, irq1: Line, irq12: Line, a20: Line, reset: ResetRequest) -> None:
        super().__init__()
        self._irq1, self._irq12, self._a20, self._reset_system = irq1, irq12, a20, reset

    @outside
    def key(self, code: Annotated[bytes, MaxSize(8)]) -> None:
        """Host input: one key's make or break code, all its bytes, in set 2."""
        keyboard_key(self.state.keyboard, code)
        self._fill()

    @outside
    def move(
        self,
        dx: Annotated[int, Range(-1024, 1023)],
        dy: Annotated[int, Range(-1024, 1023)],
        buttons: u5,
        wheel: Annotated[int, Range(-128, 127)] = 0,
    ) -> None:
        """Host input: right, up, the buttons that are down (left, right, middle, 4, 5), wheel towards the user."""
        mouse_move(self.state.mouse, dx, dy, buttons, wheel)
        self._fill()

    @invariant
    def what_can_be_read_does_not_wait(self) -> bool:
        """The controller's own byte waits only while the output buffer is full."""
        return self.state.reply is None or self.state.output_full

    def restored(self) -> None:
        self._a20(self.state.a20)
        self._drive_irqs()

    @reads(0)
    def read_data(self) -> int:
        s = self.state
        value = s.output
        if s.output_full:
            s.output_full = False
            self._drive_irqs()
            self._fill()
        return value

    @reads(0, bank="command")
    def read_status(self) -> int:
        s = self.state
        return (
            s.output_full * OUTPUT_FULL
            | s.command_byte & SYSTEM_FLAG
            | s.last_was_command * LAST_WAS_COMMAND
            | NOT_INHIBITED
            | (s.output_full and s.output_aux) * AUX_OUTPUT_FULL
        )

    @writes(0)
    def write_data(self, value: int) -> None:
        s = self.state
        s.last_was_command = False
        command, s.awaiting = s.awaiting, 0
        match command:
            case 0x60:
                s.command_byte = value
                self._drive_irqs()
            case _ if 0x61 <= command <= 0x7F:
                at = command - 0x61
                s.ram = s.ram[:at] + bytes((value,)) + s.ram[at + 1 :]
            case 0xA5:  # the password ends at a zero
                s.awaiting = command if value else 0
            case 0xD1:
                self._set_a20(bool(value & A20_PIN))
                if not value & RESET_PIN:
                    self._reset_system()
            case 0xD2 | 0xD3:
                self._reply(value, aux=command == 0xD3)
            case 0xD4:
                s.command_byte &= ~AUX_OFF
                mouse_write(s.mouse, value)
            case _:  # sending to a device enables its interface (IBM, "Input Buffer")
                s.command_byte &= ~KEYBOARD_OFF
                keyboard_write(s.keyboard, value)
        self._fill()

    @writes(0, bank="command")
    def write_command(self, command: int) -> None:
        """IBM, "Controller Commands"."""
        s = self.state
        s.last_was_command, s.awaiting = True, 0
        match command:
            case 0x20:
                self._reply(s.command_byte)
            case _ if 0x21 <= command <= 0x3F:
                self._reply(s.ram[command - 0x21])
            case 0xA5 | 0xD1 | 0xD2 | 0xD3 | 0xD4:
                s.awaiting = command
            case _ if 0x60 <= command <= 0x7F:
                s.awaiting = command
            case 0xA4:  # test password installed: no
                self._reply(0xF1)
            case 0xA7:
                s.command_byte |= AUX_OFF
            case 0xA8:
                s.command_byte &= ~AUX_OFF
            case 0xA9 | 0xAB:  # interface tests: no error
                self._reply(0x00)
            case 0xAA:  # self-test
                s.command_byte |= SYSTEM_FLAG
                self._reply(0x55)
            case 0xAD:
                s.command_byte |= KEYBOARD_OFF
            case 0xAE:
                s.command_byte &= ~KEYBOARD_OFF
            case 0xC0:
                self._reply(INPUT_PORT)
            case 0xD0:
                irq1, irq12 = self._irq_levels()
                self._reply(OUTPUT_PORT_IDLE | s.a20 * A20_PIN | irq1 << 4 | irq12 << 5)
            case 0xDD | 0xDF:  # not IBM's, but every clone's: A20 off, on
                self._set_a20(command == 0xDF)
            case 0xE0:  # test inputs: T0 and T1 are the clock lines, held low while an interface is disabled
                self._reply((not s.command_byte & KEYBOARD_OFF) | (not s.command_byte & AUX_OFF) << 1)
            case _ if command >= 0xF0 and not command & RESET_PIN:  # the pins whose bits are 0 are pulsed low
                self._reset_system()
        self._fill()

    def _reply(self, value: int, aux: bool = False) -> None:
        """The controller's own byte: it has one place to wait, so the newest stands."""
        self.state.reply, self.state.reply_aux = value, aux

    def _fill(self) -> None:
        """Move the next byte into the output buffer if that is empty."""
        s = self.state
        if s.output_full:
            return
        aux = False
        value = s.reply
        if value is not None:
            aux, s.reply, s.reply_aux = s.reply_aux, None, False
        elif not s.command_byte & KEYBOARD_OFF:
            value = self._from_keyboard()
        if value is None and not s.command_byte & AUX_OFF:
            aux, value = True, mouse_take(s.mouse)
        if value is not None:
            s.output, s.output_aux, s.output_full = value, aux, True
            self._drive_irqs()

    def _from_keyboard(self) -> int | None:
        """The next byte as the guest is to see it: with translation F0 is no byte but bit 7 of the next code."""
        s = self.state
        while (byte := keyboard_take(s.keyboard)) is not None:
            if not s.command_byte & TRANSLATE:
                return byte
            if byte != BREAK:
                released, s.released = s.released, False
                return SET_2_TO_1[byte] | released << 7
            s.released = True
        return None

    def _irq_levels(self) -> tuple[bool, bool]:
        s = self.state
        keyboard, aux = s.output_full and not s.output_aux, s.output_full and s.output_aux
        return keyboard and bool(s.command_byte & KEYBOARD_IRQ), aux and bool(s.command_byte & AUX_IRQ)

    def _drive_irqs(self) -> None:
        irq1, irq12 = self._irq_levels()
        self._irq1(irq1)
        self._irq12(irq12)

    def _set_a20(self, level: bool) -> None:
        self.state.a20 = level
        self._a20(level)
