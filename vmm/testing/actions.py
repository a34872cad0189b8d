"""What can be done to a device, as values that can be written down: a list of them is a test.

outb 0x3f8 0x41                 an access, in the words of QEMU's qtest
clock_step 1000000              time, in ns; without a number, to the device's next deadline
call receive {"data": "6162"}   something from outside: a method marked @outside
wake                            the device is saved, and from here on a twin woken from that does all the same
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vmm.errors import RequestError
from vmm.qtest import board as qtest
from vmm.qtest.board import Command


@dataclass(frozen=True)
class Call:
    """A method of the device's, marked @outside."""

    method: str
    arguments: tuple[tuple[str, Any], ...]  # encoded, as in a snapshot

    def __str__(self) -> str:
        return f"call {self.method} {json.dumps(dict(self.arguments))}"


@dataclass(frozen=True)
class Wake:
    """Save the device, and go on with a twin woken from that beside it."""

    def __str__(self) -> str:
        return "wake"


Action = Command | Call | Wake


def parse(line: str) -> Action:
    """Raises RequestError."""
    word, _, rest = line.strip().partition(" ")
    if word == "wake":
        return Wake()
    if word != "call":
        (found,) = qtest.parse(line)
        return found[1]
    method, _, arguments = rest.partition(" ")
    try:
        return Call(method, tuple(json.loads(arguments).items()))
    except (ValueError, AttributeError, RecursionError):
        raise RequestError(f"not an action: {line.strip()[:60]!r}") from None
