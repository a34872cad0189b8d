"""Guest time.

`position` is bytes of code executed, as charged by the CPU when it enters a block; `skipped_ns` is time that passed
with no code executed: halted, or waiting for a device or the TSC. Guest time is a pure function of the two:

    now_ns = position // BYTES_PER_NS + skipped_ns

so a machine on the emulated CPU has no other source of time, and two runs of the same guest agree to the last byte.
The words live in shared memory because the emulated CPU's machine code adds to the time itself.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Annotated

from snapshot.field_types import u16, u56
from snapshot.schema import state

LARGEST_BLOCK = 512 * 15  # bytes: as many instructions as the emulated CPU puts into one, each as long as they come
LAST_NS = 1 << 55  # guest time ends there, after 1.1 years: a state holds 56 bits of it, so that it can be saved
BYTES_PER_NS = 4  # a nominal 1 GHz guest: x86 code averages four bytes an instruction

# What reading the time-stamp counter costs: about that of a clock read by it on processors of today, a fence and the
# 25 to 40 ticks of RDTSC itself (A. Fog, Instruction tables). Without it a guest that waits by it reads three times as
# often.
RDTSC_NS = 25


@state("clock", version=1)
class ClockState:
    """Guest time: now_ns = position // 4 + skipped_ns."""

    position: Annotated[u56, "bytes of code charged so far; a block is charged when it is entered"] = 0
    skipped_ns: Annotated[u56, "guest time that passed while no code ran"] = 0
    prepaid: Annotated[u16, "bytes of the current block charged but not yet executed; 0 between blocks"] = 0


class Word(IntEnum):
    """The words of a clock, 64 bits each. Those from LIMIT on but SKIPPED_NS are the CPU backend's own."""

    TIME = 0  # in quarters of a ns
    LIMIT = 1  # of the run that is under way: no block is entered that would cross it
    SKIPPED_NS = 2  # guest time that passed while no code ran
    REFUSED = 3  # size of the block that was not entered
    EXCEPTIONS = 4  # how many were delivered
    TSC_OFFSET = 5
    TSC_SCALE = 6  # TSC ticks in a quarter of a ns, times 2**32
    DELIVERED_AT = 7  # TIME when an exception was delivered last
    DELIVERIES = 8  # how many were delivered at that TIME
    STEPPING = 9  # 1: blocks are run an instruction at a time


_TIME, _SKIPPED_NS = Word.TIME.value, Word.SKIPPED_NS.value


class GuestClock:
    """The machine's one clock. `words` is shared with the CPU backend's machine code."""

    def __init__(self, tsc_khz: int) -> None:
        self.tsc_khz = tsc_khz  # what the CPU's time-stamp counter makes of this time
        self.memory = (ctypes.c_uint64 * len(Word))()
        self.words = memoryview(self.memory).cast("B").cast("Q")
        self.prepaid = 0

    def now_ns(self) -> int:
        return self.words[0] // BYTES_PER_NS

    @property
    def charged(self) -> int:
        """Bytes of code charged so far."""
        return self.words[_TIME] - self.words[_SKIPPED_NS] * BYTES_PER_NS

    @property
    def position(self) -> int:
        """Bytes of code executed: orders instruction boundaries."""
        return self.charged - self.prepaid

    def skip(self, ns: int) -> None:
        """Let time pass with no code executed."""
        self.words[_SKIPPED_NS] += ns
        self.words[_TIME] += ns * BYTES_PER_NS

    def skip_to(self, when_ns: int) -> None:
        """Let time pass to `when_ns`, if that is ahead; to LAST_NS at most."""
        self.skip(max(0, min(when_ns, LAST_NS) - self.now_ns()))

    def save(self) -> ClockState:
        return ClockState(position=self.charged, skipped_ns=self.words[_SKIPPED_NS], prepaid=self.prepaid)

    def load(self, state: ClockState) -> None:
        self.words[_SKIPPED_NS] = state.skipped_ns
        self.words[_TIME] = state.position + state.skipped_ns * BYTES_PER_NS
        self.prepaid = state.prepaid
