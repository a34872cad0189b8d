"""Intel 8259A programmable interrupt controller, and the pair of them on a PC.

Datasheet: Intel 8259A (order 231468-003); ELCR: Intel 82371AB (PIIX4), 8.5 "edge/level control".
Absent: MCS-80/85 mode (ICW1 IC4=0, CALL vectors), buffered mode's SP/EN pin, slaves on other inputs than IR2.

Priorities are counted from `lowest`: the input after it is the highest (datasheet, "Priority Resolver"). An edge is
latched in `irr` when a line rises and is forgotten if the line falls before INTA; that is what makes a spurious IR7.
An OCW3 with P = 0, "no poll command" (figure 8), takes back a poll that was not read yet; QEMU keeps that.
"""

from __future__ import annotations

from typing import Annotated

from snapshot.field_types import OneOf, u3, u5, u8
from snapshot.schema import state
from vmm.device import Device, invariant, outside
from vmm.registers import reads, writes
from vmm.wires import Line

CASCADE = 2  # the master's input that the slave drives


@state("pic.i8259", version=1)
class PicState:
    """One Intel 8259A."""

    lines: Annotated[u8, "level of each IR input"] = 0
    irr: Annotated[u8, "requests latched by an edge"] = 0
    isr: Annotated[u8, "in service"] = 0
    imr: Annotated[u8, "masked (OCW1)"] = 0
    elcr: Annotated[u8, "inputs that are level-triggered"] = 0
    base: Annotated[u5, "high five bits of the vector (ICW2)"] = 0
    lowest: Annotated[u3, "the input of lowest priority"] = 7
    next_icw: Annotated[str, OneOf(("none", "icw2", "icw3", "icw4")), "initialization word awaited"] = "none"
    single: Annotated[bool, "ICW1 SNGL: no ICW3"] = False
    wants_icw4: Annotated[bool, "ICW1 IC4"] = False
    level_triggered: Annotated[bool, "ICW1 LTIM: all inputs"] = False
    icw3: Annotated[u8, "cascade word"] = 0
    auto_eoi: Annotated[bool, "ICW4 AEOI"] = False
    rotate_on_auto_eoi: Annotated[bool, "rotate in automatic EOI mode"] = False
    special_nested: Annotated[bool, "ICW4 SFNM"] = False
    special_mask: Annotated[bool, "OCW3 SMM"] = False
    read_isr: Annotated[bool, "OCW3: command port reads ISR, not IRR"] = False
    poll: Annotated[bool, "OCW3 P: the next read is a poll"] = False


class Pic(Device[PicState]):
    """One interrupt controller. `output` is its INT pin; the `master` has another in its cascade input."""

    State = PicState

    def __init__(self, output: Line, master: bool = True) -> None:
        super().__init__()
        self._output = output
        self._master = master
        # IRQ 0, 1, 2 and IRQ 8, 13 have no level mode (PIIX4, ELCR1/ELCR2: reserved bits)
        self._elcr_bits = 0xF8 if master else 0xDE

    # --- inputs and INTA

    @outside
    def set_line(self, irq: u3, level: bool) -> None:
        """Drive IR input `irq`."""
        s, bit = self.state, 1 << irq
        if level:
            if not s.lines & bit:
                s.lines |= bit
                s.irr |= bit
                self._drive()
        elif s.lines & bit:
            s.lines &= ~bit
            s.irr &= ~bit
            self._drive()

    @invariant
    def a_request_is_of_a_line_that_is_high(self) -> bool:
        """An edge is forgotten when its line falls."""
        return not self.state.irr & ~self.state.lines

    def pending(self) -> bool:
        """The INT pin's level."""
        return self._highest() is not None

    @outside
    def acknowledge(self) -> int:
        """INTA: the vector; that of IR7 when the request is gone (datasheet, "the IR7 routine")."""
        s = self.state
        irq = self._highest()
        if irq is None:
            return s.base << 3 | 7
        self._take(irq)
        self._drive()
        return s.base << 3 | irq

    def serving(self) -> int | None:
        """The input INTA would serve now."""
        return self._highest()

    # --- registers

    @reads(0)
    def read_command(self) -> int:
        s = self.state
        if s.poll:
            return self._poll()
        return s.isr if s.read_isr else self._requests()

    @reads(1)
    def read_data(self) -> int:
        if self.state.poll:
            return self._poll()
        return self.state.imr

    @writes(0)
    def write_command(self, value: int) -> None:
        if value & 0x10:
            self._icw1(value)
        elif value & 0x08:
            self._ocw3(value)
        else:
            self._ocw2(value)
        self._drive()

    @writes(1)
    def write_data(self, value: int) -> None:
        s = self.state
        match s.next_icw:
            case "none":
                s.imr = value  # OCW1
            case "icw2":
                s.base = value >> 3
                s.next_icw = "icw4" if s.single and s.wants_icw4 else "none" if s.single else "icw3"
            case "icw3":
                s.icw3 = value
                s.next_icw = "icw4" if s.wants_icw4 else "none"
            case _:
                s.auto_eoi = bool(value & 0x02)
                s.special_nested = bool(value & 0x10)
                s.next_icw = "none"
        self._drive()

    @reads(0, bank="elcr")
    def read_elcr(self) -> int:
        return self.state.elcr

    @writes(0, bank="elcr")
    def write_elcr(self, value: int) -> None:
        self.state.elcr = value & self._elcr_bits
        self._drive()

    def reset(self) -> None:
        lines = self.state.lines  # the inputs are others' outputs
        self.state = PicState(lines=lines)
        self.restored()

    def restored(self) -> None:
        self._drive()

    # --- command words

    def _icw1(self, value: int) -> None:
        """ICW1 clears the mask, the edge latch, special mask mode and the read select, and sets IR7 lowest."""
        s = self.state
        s.imr = s.irr = s.isr = 0
        s.lowest = 7
        s.special_mask = s.read_isr = s.poll = False
        s.single, s.wants_icw4 = bool(value & 0x02), bool(value & 0x01)
        s.level_triggered = bool(value & 0x08)
        s.auto_eoi = s.special_nested = s.rotate_on_auto_eoi = False  # as without ICW4
        s.next_icw = "icw2"

    def _ocw2(self, value: int) -> None:
        s, level = self.state, value & 7
        match value >> 5:
            case 0b000:
                s.rotate_on_auto_eoi = False
            case 0b001 | 0b101:  # non-specific EOI, and with rotation
                served = self._served()
                if served is not None:
                    s.isr &= ~(1 << served)
                    if value & 0x80:
                        s.lowest = served
            case 0b011 | 0b111:  # specific EOI, and with rotation
                s.isr &= ~(1 << level)
                if value & 0x80:
                    s.lowest = level
            case 0b100:
                s.rotate_on_auto_eoi = True
            case 0b110:  # set priority
                s.lowest = level
            case _:
                pass  # 010: no operation

    def _ocw3(self, value: int) -> None:
        s = self.state
        if value & 0x40:  # ESMM
            s.special_mask = bool(value & 0x20)
        s.poll = bool(value & 0x04)
        if value & 0x02:  # RR
            s.read_isr = bool(value & 0x01)

    def _poll(self) -> int:
        """A poll is an INTA that is read (datasheet, "Poll Command"): bit 7 says whether there was a request."""
        self.state.poll = False
        irq = self._highest()
        if irq is None:
            return 0
        self._take(irq)
        self._drive()
        return 0x80 | irq

    # --- the priority resolver

    def _requests(self) -> int:
        """Requests seen: edges latched, and levels that are up."""
        s = self.state
        level = 0xFF if s.level_triggered else s.elcr
        return s.irr & ~level | s.lines & level

    def _highest(self) -> int | None:
        """The request INT is raised for: not masked, and above what is in service."""
        s = self.state
        level = 0xFF if s.level_triggered else s.elcr
        requests = (s.irr & ~level | s.lines & level) & ~s.imr
        if not requests:
            return None
        first = s.lowest + 1
        for i in range(first, first + 8):
            bit = 1 << (i & 7)
            # In special mask mode only the level itself blocks itself; masked ones in service do not count.
            if s.isr & bit and not (s.special_mask and s.imr & bit):
                if s.special_nested and requests & bit and i & 7 == CASCADE and self._master:
                    return i & 7  # the slave may interrupt itself (datasheet, "Special Fully Nested Mode")
                if not s.special_mask:
                    return None
                continue
            if requests & bit:
                return i & 7
        return None

    def _served(self) -> int | None:
        """The highest in service, which a non-specific EOI ends; masked ones are passed over in special mask mode."""
        s = self.state
        for i in range(s.lowest + 1, s.lowest + 9):
            bit = 1 << (i & 7)
            if s.isr & bit and not (s.special_mask and s.imr & bit):
                return i & 7
        return None

    def _take(self, irq: int) -> None:
        s, bit = self.state, 1 << irq
        s.irr &= ~bit
        if not s.auto_eoi:
            s.isr |= bit
        elif s.rotate_on_auto_eoi:
            s.lowest = irq

    def _drive(self) -> None:
        self._output(self._highest() is not None)


class PicPair:
    """Master and slave as the PC wires them: the slave's INT is the master's IR2. Implements the CPU's `Intr`."""

    apic = None

    def __init__(self, master: Pic, slave: Pic) -> None:
        self.master, self.slave = master, slave

    def pending(self) -> bool:
        return self.master.pending()

    def acknowledge(self) -> int:
        """The two INTA cycles: the master names its level, and for IR2 the slave gives the vector. A slave whose
        request is gone answers IR7, with the master's IR2 in service all the same."""
        irq = self.master.serving()
        vector = self.master.acknowledge()
        if irq == CASCADE:
            vector = self.slave.acknowledge()
            # INT falls with the second INTA even when another request keeps it up: the master sees a new edge.
            self.master.set_line(CASCADE, False)
            self.slave.restored()
        return vector
