"""Intel 82371AB (PIIX4), function 3: power management.

Source: Intel 82371AB datasheet (290562-001), chapter 7; ACPI 6.4, 4.8.3 for the meaning of PM1.

Of sleep states there is soft off, SUS_TYP 0: the machine ends.

Absent
* SMM: SMIs are not made, and DEVACTB says that the APM port is set up already, as QEMU's does without SMM.
* SMBus; general-purpose events and pins, monitors of devices, clock control: they read 0.
* RTC and resume events.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from snapshot.field_types import Size, u8, u16, u56
from snapshot.schema import state
from vmm.device import outside
from vmm.devices.pci.function import Bar, Function, FunctionState
from vmm.devices.pci.header import Field, kept
from vmm.registers import ANY, reads, span, writes
from vmm.wires import Alarm, Clock, Dma, ExitRequest, Line, Msi, Placement

HZ = 3_579_545
PORTS = 64
_COUNTER_BITS = 24
_HALF = 1 << _COUNTER_BITS - 1  # ticks from one change of the counter's top bit to the next
_TMROF, _GBL, _PWRBTN = 0x0001, 0x0020, 0x0100
_ENABLE, _CONTROL = 0x0521, 0x1C03  # bits that are kept
_SCI_EN, _SUS_EN = 0x0001, 0x2000
_ACPI_ENABLE, _ACPI_DISABLE = 0xF1, 0xF0  # what firmware writes to the APM control port
_KEPT, _FIELDS = kept(
    *((offset, 0x00, 0xFF) for offset in range(0x44, 0x5B)),  # counters, general-purpose and device activity
    (0x5B, 0x02, 0xFF),  # DEVACTB: APMC_EN
    *((offset, 0x00, 0xFF) for offset in range(0x5C, 0x80)),  # device resources
)


@state("pci.piix4.pm", version=1)
class Piix4PmState:
    """Power management."""

    pci: Annotated[FunctionState, "configuration header"] = field(default_factory=FunctionState)
    kept: Annotated[bytes, Size(len(_KEPT)), "registers that only hold what is written"] = _KEPT
    base: Annotated[u16, "PMBASE"] = 0
    enabled: Annotated[bool, "PMREGMISC: the ports are seen"] = False
    status: Annotated[u16, "PMSTS"] = 0
    enable: Annotated[u16, "PMEN"] = 0
    control: Annotated[u16, "PMCNTRL"] = 0
    overflow: Annotated[u56, "tick of the timer at which its top bit changes next"] = _HALF
    apm_control: Annotated[u8, "APMC"] = 0
    apm_status: Annotated[u8, "APMS"] = 0


class Piix4Pm(Function[Piix4PmState]):
    """Ports of bank "pm" at PMBASE, of bank "apm" at B2. `sci` is the ACPI interrupt, `off` ends the machine."""

    State = Piix4PmState
    vendor, device, class_code, revision, pin = 0x8086, 0x7113, 0x068000, 3, 1
    subsystem = 0x1AF4, 0x1100
    status, commands = 0x0280, 0x0001
    windows = (Bar(PORTS, {"pm": 0}, io=True, width=2),)
    own = (
        *_FIELDS,
        Field(0x40, 4, lambda f: f.state.base | 1, 0xFFC0, lambda f, value: f.move(value & 0xFFC0)),
        Field(0x80, 1, lambda f: int(f.state.enabled), 0x01, lambda f, value: f.show(bool(value))),
    )

    def __init__(
        self, place: Placement, intx: Line, msi: Msi, dma: Dma, clock: Clock, alarm: Alarm, sci: Line, off: ExitRequest
    ) -> None:
        super().__init__(place, intx, msi, dma)
        self._clock, self._alarm = clock, alarm
        self._sci, self._off = sci, off

    @outside
    def press_power_button(self) -> None:
        """The guest is asked to end."""
        self.state.status |= _PWRBTN
        self._drive()

    # --- where its ports are

    def move(self, base: int) -> None:
        """Write PMBASE."""
        self.state.base = base
        self.place()

    def show(self, enabled: bool) -> None:
        """Write PMREGMISC."""
        self.state.enabled = enabled
        self.place()

    def places(self) -> dict[str, int | None]:
        s = self.state
        return {"pm": (s.base & 0xFFC0 or None) if s.enabled else None}

    # --- the ports

    @reads(0x00, bank="pm", size=2)
    def read_status(self) -> int:
        self._settle()
        return self.state.status

    @writes(0x00, bank="pm", size=2)
    def write_status(self, value: int) -> None:
        self._settle()
        self.state.status &= ~value
        self._drive()

    @reads(0x02, bank="pm", size=2)
    def read_enable(self) -> int:
        return self.state.enable

    @writes(0x02, bank="pm", size=2)
    def write_enable(self, value: int) -> None:
        self.state.enable = value & _ENABLE
        self._drive()

    @reads(0x04, bank="pm", size=2)
    def read_control(self) -> int:
        return self.state.control

    @writes(0x04, bank="pm", size=2)
    def write_control(self, value: int) -> None:
        self.state.control = value & _CONTROL
        self._drive()
        if value & _SUS_EN and not value >> 10 & 7:
            self._off(0)

    @reads(span(0x08, 4), bank="pm", size=ANY)
    def read_timer(self, lane: int, size: int) -> int:
        return (self._tick() & (1 << _COUNTER_BITS) - 1) >> 8 * lane & (1 << 8 * size) - 1

    @reads(0x06, span(0x0C, 4, 2), span(0x18, 2, 2), span(0x1C, 18, 2), bank="pm", size=2)
    def read_nothing(self, _index: int = 0) -> int:
        return 0

    @reads(0, bank="apm")
    def read_apm_control(self) -> int:
        return self.state.apm_control

    @writes(0, bank="apm")
    def write_apm_control(self, value: int) -> None:
        """ACPI is turned on and off by it, as by a firmware's SMI handler."""
        s = self.state
        s.apm_control = value
        if value in (_ACPI_ENABLE, _ACPI_DISABLE):
            s.control = s.control & ~_SCI_EN | (value == _ACPI_ENABLE)
            self._drive()

    @reads(1, bank="apm")
    def read_apm_status(self) -> int:
        return self.state.apm_status

    @writes(1, bank="apm")
    def write_apm_status(self, value: int) -> None:
        self.state.apm_status = value

    # --- the timer, and the interrupt

    def _tick(self) -> int:
        return self._clock.now_ns() * HZ // 10**9

    def _settle(self) -> None:
        s, tick = self.state, self._tick()
        if tick >= s.overflow:
            s.status |= _TMROF
            s.overflow = (tick // _HALF + 1) * _HALF

    def deadline(self) -> int | None:
        """When the timer's status interrupts."""
        s = self.state
        waits = s.enable & _TMROF and s.control & _SCI_EN and not s.status & _TMROF
        return -(-s.overflow * 10**9 // HZ) if waits else None

    def expire(self) -> None:
        self._settle()
        self._drive()

    def _drive(self) -> None:
        s = self.state
        self._sci(bool(s.status & s.enable & _ENABLE) and bool(s.control & _SCI_EN))
        self._alarm(self.deadline())

    def restored(self) -> None:
        super().restored()
        self._drive()
