"""Intel 82371SB (PIIX3), function 0: the ISA bridge, its PCI interrupt router and its reset control register.

Source: Intel 82371SB datasheet (290550-002), sections 2.1 and 2.5.7; the reset control register at CF9.

Absent
* What it decides about the ISA bus, DMA and SMIs is kept and does nothing.
* The difference between kinds of reset: each is the machine's one reset.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from snapshot.field_types import Size, u2, u4, u8
from snapshot.schema import state
from vmm.device import outside
from vmm.devices.pci.function import Function, FunctionState
from vmm.devices.pci.header import Field, kept
from vmm.registers import reads, writes
from vmm.wires import Dma, Line, Lines, Msi, Placement, ResetRequest

ROUTABLE = (3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15)  # interrupts that PIRQs can be (table in 2.1.14)
PIRQS = 4
_ROUTES, _OFF = 0x60, 0x80
_RCPU, _SRST = 0x04, 0x02
_KEPT, _FIELDS = kept(
    (0x4C, 0x4D, 0x7F),  # I/O recovery
    (0x4E, 0x03, 0xFF),  # X-bus chip select
    (0x4F, 0x00, 0x01),
    (0x69, 0x02, 0xFE),  # top of memory
    (0x6A, 0x00, 0x90),  # miscellaneous status
    (0x70, 0x80, 0xEF),  # motherboard device interrupt
    (0x76, 0x0C, 0xFF),  # motherboard DMA
    (0x77, 0x0C, 0xFF),
    (0x78, 0x02, 0x03),  # programmable chip select
    (0x79, 0x00, 0xFF),
    (0x80, 0x00, 0x7F),  # APIC base
    (0x82, 0x00, 0x0F),  # deterministic latency
    (0xA0, 0x08, 0x1F),  # SMI control
    (0xA2, 0x00, 0xFF),
    (0xA3, 0x00, 0x01),
    *((offset, 0x00, 0xFF) for offset in (0xA4, 0xA5, 0xA6, 0xA7)),
    (0xA8, 0x0F, 0xFF),  # fast-off timer
    (0xAA, 0x00, 0xFF),
    (0xAB, 0x00, 0x01),
    (0xAC, 0x00, 0xFF),  # clock throttling
    (0xAE, 0x00, 0xFF),
)


@state("pci.piix3", version=1)
class Piix3State:
    """The ISA bridge."""

    pci: Annotated[FunctionState, "configuration header"] = field(default_factory=lambda: FunctionState(command=0x0007))
    kept: Annotated[bytes, Size(len(_KEPT)), "registers that only hold what is written"] = _KEPT
    routes: Annotated[bytes, Size(PIRQS), "PIRQRC A to D"] = bytes((_OFF,)) * PIRQS
    levels: Annotated[u4, "levels of PIRQ A to D"] = 0
    reset_control: Annotated[u8, "reset control register"] = 0


def _route(pirq: int) -> Field:
    return Field(_ROUTES + pirq, 1, lambda f: f.state.routes[pirq], 0x8F, lambda f, value: f.route(pirq, value))


class Piix3(Function[Piix3State]):
    """`irqs` are the ISA interrupts; each that PIRQs can be is driven. The reset control register is bank "reset"."""

    State = Piix3State
    vendor, device, class_code = 0x8086, 0x7000, 0x060100
    subsystem = 0x1AF4, 0x1100
    status, commands = 0x0200, 0x0108
    own = (
        *_FIELDS,
        *map(_route, range(PIRQS)),
    )

    def __init__(self, place: Placement, intx: Line, msi: Msi, dma: Dma, irqs: Lines, reset: ResetRequest) -> None:
        super().__init__(place, intx, msi, dma)
        self._irqs, self._reset_system = irqs, reset

    @outside
    def set_pirq(self, pirq: u2, level: bool) -> None:
        """Drive a PIRQ, 0 for A."""
        s = self.state
        s.levels = s.levels | 1 << pirq if level else s.levels & ~(1 << pirq)
        self._drive()

    def route(self, pirq: int, value: int) -> None:
        """Write a PIRQRC."""
        s = self.state
        s.routes = s.routes[:pirq] + bytes((value,)) + s.routes[pirq + 1 :]
        self._drive()

    @reads(0, bank="reset")
    def read_reset_control(self) -> int:
        return self.state.reset_control

    @writes(0, bank="reset")
    def write_reset_control(self, value: int) -> None:
        s = self.state
        rises, s.reset_control = value & _RCPU and not s.reset_control & _RCPU, value & (_RCPU | _SRST)
        if rises:
            self._reset_system()

    def _drive(self) -> None:
        s = self.state
        high = {s.routes[i] for i in range(PIRQS) if s.levels >> i & 1}
        for irq in ROUTABLE:
            self._irqs(irq, irq in high)  # one that is off has bit 7, and is no interrupt's number

    def reset(self) -> None:
        self.state = Piix3State(levels=self.state.levels)  # the inputs are others' outputs
        self.restored()

    def restored(self) -> None:
        super().restored()
        self._drive()
