"""What `emu.native` does, in Python: for hosts that refuse executable memory or are not x86-64.

Same results, slower. What the engine cannot be asked for from Python, delivery, is here too (emu.delivery).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from emu.delivery import Delivery
from emu.engine import EXIT_SHUTDOWN, Engine
from vmm.clock import BYTES_PER_NS, RDTSC_NS, Word

_TIME, _LIMIT, _REFUSED = Word.TIME.value, Word.LIMIT.value, Word.REFUSED.value
_SKIPPED_NS, _STEPPING = Word.SKIPPED_NS.value, Word.STEPPING.value


class Callbacks:
    """The hooks' bodies over one engine; each has the argument list of its hook."""

    def __init__(
        self, engine: Engine, words: Any, delivery: Delivery, other: Callable[[Any, int, Any], int],
        tsc: Callable[[], int],
    ) -> None:  # fmt: skip
        self._engine = engine
        self._words = words
        self._delivery = delivery
        self._other = other
        self._tsc = tsc
        self._block = 0  # the size of the last one that was entered

    def block(self, _uc: Any, _address: int, size: int, _data: Any) -> None:
        words = self._words
        self._block = size
        after = words[_TIME] + size
        if after > words[_LIMIT]:
            words[_REFUSED] = size
            self._engine.uc.emu_stop()
            return
        words[_TIME] = after
        if after == words[_LIMIT] and words[_STEPPING]:
            self._engine.one_instruction(True)

    def interrupt(self, _uc: Any, number: int, _data: Any) -> None:
        if number >= 0x100:
            if self._other(None, number, None):
                self._deliver()
        elif not self._engine.u32("exception_is_int").value:
            self._deliver()
        elif not self._delivery.software(number, self._block):
            self._other(None, EXIT_SHUTDOWN, None)

    def invalid_opcode(self, _uc: Any, _data: Any) -> int:
        engine = self._engine
        if engine.u32("exception_is_int").value:
            engine.eip.value = engine.u64("exception_next_eip").value
        self.interrupt(None, 6, None)
        return 1

    def rdtsc(self, _uc: Any, _data: Any) -> int:
        engine = self._engine
        if engine.cr[4] & 4 and engine.hflags.value & 3:
            return 0
        tsc = self._tsc()
        engine.regs[0], engine.regs[2] = tsc & 0xFFFFFFFF, tsc >> 32
        self._words[_SKIPPED_NS] += RDTSC_NS
        self._words[_TIME] += RDTSC_NS * BYTES_PER_NS
        return 1

    def rdtscp(self, _uc: Any, _data: Any) -> int:
        handled = self.rdtsc(_uc, _data)
        if handled:
            self._engine.regs[1] = self._engine.u32("tsc_aux").value
        return handled

    def _deliver(self) -> None:
        if not self._delivery.exception(self._engine.exception_index.value, self._engine.error_code.value):
            self._other(None, EXIT_SHUTDOWN, None)
