"""PCI Advanced Features: a function that can be reset by itself.

Source: PCI-SIG ECN "Advanced Capabilities for Conventional PCI" (2006), section 6.x, capability 13h. Transactions are
never pending.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vmm.devices.pci.function import Capability, Function
from vmm.devices.pci.header import Field

_TRANSACTIONS_PENDING, _RESET = 0x01, 0x02  # what the capability offers


class AdvancedFeatures(Capability):
    """Function-level reset: configuration space and all else as after RESET#."""

    id, size = 0x13, 6

    def fields(self, at: int) -> Iterator[Field]:
        yield Field.fixed(at + 2, 1, self.size)
        yield Field.fixed(at + 3, 1, _TRANSACTIONS_PENDING | _RESET)
        yield Field(at + 4, 1, lambda f: 0, 0x01, _initiate)


def _initiate(function: Function[Any], value: int) -> None:
    if value & 1:
        function.reset()
