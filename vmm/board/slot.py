"""A slot of a board: one chip, as data. Which class, what its wires lead to, where its banks lie.

Wires that every device of a kind has alike (clock, alarm, DMA) go by the annotation of the constructor's argument; a
slot names the others:

    Slot("com1", Uart, {"irq": Irq(4)}, (ports(0x3F8),))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vmm.device import Device


@dataclass(frozen=True)
class At:
    """Where a bank lies: from `base` on among the ports or in memory. `width` is its window's (vmm.bus)."""

    base: int
    bank: str = ""
    space: Literal["port", "memory"] = "port"
    width: int = 1


def ports(base: int, bank: str = "") -> At:
    return At(base, bank)


@dataclass(frozen=True)
class Irq:
    """To ISA interrupt `number`; what shares it is ORed."""

    number: int


@dataclass(frozen=True)
class Cascade:
    """To the cascade input of the interrupt controller in another slot."""

    slot: str


@dataclass(frozen=True)
class Input:
    """To what a chip in another slot, which comes before, is driven by: its method, and what is said before the
    level."""

    slot: str
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Irqs:
    """To these ISA interrupts, by number."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Pirq:
    """To a PCI interrupt line, 0 for A; what drives it is ORed."""

    number: int


@dataclass(frozen=True)
class Nowhere:
    """A pin that is not connected."""


@dataclass(frozen=True)
class Intr:
    """To the INTR pin of the slot's CPU, which is the first where it is no CPU's."""


@dataclass(frozen=True)
class Event:
    """To where the slot's CPU looks for what waits at its local APIC."""


@dataclass(frozen=True)
class A20:
    """To the A20 gate; what drives it is ORed."""


@dataclass(frozen=True)
class Serial:
    """To the console `name` of this computer; by default each device has one by its slot's name."""

    name: str


@dataclass(frozen=True)
class Fixed:
    """No wire but a value: an option, a strap."""

    value: Any


Lead = Irq | Irqs | Pirq | Cascade | Input | Nowhere | Intr | Event | A20 | Serial | Fixed


@dataclass(frozen=True)
class Slot:
    """`id` is the name of its part in a snapshot; `wires` by argument of the constructor; `power_on` makes the state it
    has at guest time zero, from the machine's config, where that is not the class' default; `function` is where it is
    on the PCI bus, device << 3 | function; `cpu` is the CPU it is a part of, which alone sees it in memory."""

    id: str
    device: type[Device[Any]]
    wires: Mapping[str, Lead] = field(default_factory=dict)
    at: tuple[At, ...] = ()
    power_on: Callable[[Any], Any] | None = None
    function: int | None = None
    cpu: int | None = None
