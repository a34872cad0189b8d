"""Bugs that other monitors' save and restore had, made again here, one at a time; and which property finds each.

`python -m tests.scoreboard` runs them and writes them into docs/scoreboard.md; tests/test_scoreboard.py runs them too.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from snapshot.writer import Writer
from tests import scoreboard
from tests.conftest import OWN
from vmm.board.board import Board
from vmm.cpu.protocol import FpuState
from vmm.devices.isa.i8042 import I8042
from vmm.devices.isa.pit import Pit
from vmm.devices.isa.rtc import Rtc
from vmm.devices.isa.uart import Uart
from vmm.errors import BackendError
from vmm.guest.image import Image
from vmm.guest.image import load as load_image
from vmm.machine.machine import Machine, MachineConfig
from vmm.ram import HOLE_END, HOLE_START, Region
from vmm.saving.saved import Saved
from vmm.testing import Subject, device_machine
from vmm.testing.cuts import cut_anywhere


@dataclasses.dataclass(frozen=True)
class Bug:
    """`plant` is a context manager in which it is there; `property` raises when it finds it."""

    what: str
    whose: str
    plant: Callable[[], Any]
    property: Callable[[], None]


# --- properties


def boot(memory_bytes: int = 8 << 20) -> Machine:
    return Machine.boot(MachineConfig(memory_bytes=memory_bytes), Image.from_files(OWN, flat=True))


def a_cut_leaves_no_trace() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cut_anywhere(boot, end=3_000_000, points=20, folder=Path(folder))


def a_pending_interrupt_is_taken() -> None:
    """A character has come, its interrupt is up at the CPU's pin, and the machine is saved."""
    with tempfile.TemporaryDirectory() as folder, boot() as machine:
        machine.run(position=3_000_000)
        uart: Any = machine.board.devices["com1"]
        uart.receive(b"x")
        assert machine.board.pics.pending(), "the guest has its port set up"
        machine.save(Path(folder) / "saved")
        with Machine.restore(Path(folder) / "saved") as woken:
            for each in (machine, woken):
                each.run(position=3_100_000)
            assert woken.digests() == machine.digests(), "the interrupt that was pending is lost"


def its_grandchild_is_as_it_was() -> None:
    """Saved, woken, saved and woken, with little run in between."""
    with tempfile.TemporaryDirectory() as folder, boot() as machine:
        machine.run(position=2_000_000)
        machine.save(Path(folder) / "1")
        with Machine.restore(Path(folder) / "1") as child:
            child.run(position=2_000_001)
            machine.run(position=2_000_001)
            child.save(Path(folder) / "2")
        with Machine.restore(Path(folder) / "2") as grandchild:
            assert grandchild.digests() == machine.digests(), "the grandchild is not as its grandfather"


def all_ram_is_kept() -> None:
    with tempfile.TemporaryDirectory() as folder, boot(HOLE_START + (16 << 20)) as machine:
        machine.ram.write(HOLE_END + 0x1234, b"above")
        machine.save(Path(folder) / "saved")
        with Machine.restore(Path(folder) / "saved", max_memory=1 << 33) as woken:
            assert woken.ram.read(HOLE_END + 0x1234, 5) == b"above", "RAM above 4 GiB is lost"


def a_failed_save_costs_nothing() -> None:
    with tempfile.TemporaryDirectory() as folder, boot() as machine:
        file = Path(folder) / "kept"
        machine.run(position=1_000_000)
        machine.save(file)
        kept = file.read_bytes()
        machine.run(position=2_000_000)

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with patch.object(os, "fsync", full), suppress(BackendError):
            machine.save(file)
        assert file.exists() and file.read_bytes() == kept, "the last good snapshot is gone"


def device(part: str) -> Callable[[], None]:
    def holds() -> None:
        if (found := scoreboard.seen(device_machine(Subject.named(part)), 1000)) is not None:
            raise AssertionError(found)

    holds.__name__ = f"device_machine_of_{part}"
    return holds


# --- bugs


@contextmanager
def woken(change: Callable[[Saved], Saved]) -> Iterator[None]:
    """Every restore comes out changed."""
    decode = Saved.decode.__func__  # type: ignore[attr-defined]
    with patch.object(Saved, "decode", classmethod(lambda cls, chain: change(decode(cls, chain)))):
        yield


def field(part: str, **fresh: Any) -> Callable[[], Any]:
    def change(saved: Saved) -> Saved:
        for name, value in fresh.items():
            setattr(saved.states[part], name, value)
        return saved

    return lambda: woken(change)


def cpu(**fresh: Any) -> Callable[[], Any]:
    return field("cpu.0", **fresh)


def time(skip_ns: int) -> Callable[[], Any]:
    def change(saved: Saved) -> Saved:
        saved.states["clock"].skipped_ns += skip_ns
        return saved

    return lambda: woken(change)


def unfinished_block(saved: Saved) -> Saved:
    saved.states["clock"].prepaid = 0
    return saved


def method(cls: type, name: str, wrong: Callable[..., Any]) -> Callable[[], Any]:
    """`wrong` is given what was right first."""
    right = getattr(cls, name)
    return lambda: patch.object(cls, name, lambda self, *a, **k: wrong(right, self, *a, **k))


def interrupt_on_restore(right: Any, self: Uart) -> None:
    self.state.thr_empty = True
    right(self)


def image_again(right: Any, self: Machine, saved: Saved) -> None:
    right(self, saved)
    load_image(Image.from_files(OWN, flat=True), self.ram)


def tsc_first(right: Any, self: Machine, saved: Saved) -> None:
    right(self, saved)
    clock, (cpu,) = saved.states["clock"], saved.cpus
    self.clock.load(dataclasses.replace(clock, position=0, skipped_ns=0))
    self.cpu.load(cpu)
    self.clock.load(clock)


def only_what_was_written(right: Any, self: Region) -> Any:
    return right(dataclasses.replace(self, stored=[]))


def first_region(right: Any, self: Writer, name: str, *rest: Any, **more: Any) -> None:
    extents = rest[2] if name == "ram.0" else []
    right(self, name, *rest[:2], extents, **more)


def in_place(right: Any, self: Writer, path: Path, **more: Any) -> None:
    right(self, path, **more)
    target = self._target
    os.rename(target.temporary, target.path)
    target.temporary = target.path


def no_level(right: Any, self: I8042) -> None:
    self._a20(self.state.a20)


def wrong_index(right: Any, self: Rtc) -> int:
    return right(self) if self.state.index < len(self.state.ram) - 1 else self.state.ram[self.state.index + 1]


def board_forgets(right: Any, self: Board) -> None:
    """Devices' wires are not derived from their states again."""


BUGS = [
    Bug("the FPU's registers are not saved", "bhyve", cpu(fpu=FpuState()), a_cut_leaves_no_trace),
    Bug("an MSR is not saved (KERNEL_GS_BASE)", "several", cpu(kernel_gs_base=1), a_cut_leaves_no_trace),
    Bug("time jumps forward", "several", time(1), a_cut_leaves_no_trace),
    Bug("a timer jumps back", "bhyve, PM timer", time(-1000), a_cut_leaves_no_trace),
    Bug("the TSC is set before the clock it counts from", "KVM: TSC_DEADLINE before TSC",
        method(Machine, "assign", tsc_first), a_cut_leaves_no_trace),
    Bug("timers are not armed again", "bhyve, PIT", field("pit", next_edge=None), a_cut_leaves_no_trace),
    Bug("work in flight is lost: a block begun", "several", lambda: woken(unfinished_block), a_cut_leaves_no_trace),
    Bug("restoring writes the boot image over the RAM", "bhyve, BIOS tables", method(Machine, "assign", image_again),
        a_cut_leaves_no_trace),
    Bug("restoring drives no lines", "the boot path changed, the restore path not",
        method(Board, "restored", board_forgets), a_pending_interrupt_is_taken),
    Bug("saving a restored machine loses what it did not write", "generation two",
        method(Region, "touched", only_what_was_written), its_grandchild_is_as_it_was),
    Bug("the second RAM region is not saved", "several", method(Writer, "ram", first_region), all_ram_is_kept),
    Bug("a save that fails has overwritten the last good one", "bhyve", method(Writer, "__init__", in_place),
        a_failed_save_costs_nothing),
    Bug("an interrupt appears: THR empty", "bhyve, thre_int_pending", method(Uart, "restored", interrupt_on_restore),
        device("com1")),
    Bug("the PIT's latch is lost", "bhyve, output latch", method(Pit, "restored", lambda right, self: (
        self.state.__setattr__("counters", tuple(dataclasses.replace(c, latch=None) for c in self.state.counters)),
        right(self))), device("pit")),
    Bug("the keyboard's FIFO is lost", "bhyve, PS/2", method(I8042, "restored", lambda right, self: (
        self.state.keyboard.__setattr__("fifo", b""), right(self))), device("i8042")),
    Bug("an interrupt line's level is lost", "bhyve, INTx", method(I8042, "restored", no_level), device("i8042")),
    Bug("an index in the file is not checked", "bhyve, all devices", method(Rtc, "read_data", wrong_index),
        device("rtc")),
]  # fmt: skip

ABSENT = """Of what cannot happen here: AHCI, e1000 and xhci have no counterpart on these boards;
no state can hold a host pointer, for a schema has no such type; a device without state to save cannot be put on the
board; a save keeps no record of dirty pages that a failed one could spoil; nothing is left over in a state unread, for
an unknown field is an error."""


def find(bug: Bug) -> str | None:
    """What finds it, in its own words; None when nothing does."""
    with bug.plant():
        try:
            bug.property()
        except Exception as error:
            said = re.sub(
                r"saved at \d+, it first differs at \d+: ([\w.+]+): .*", r"\1 differs", str(error), flags=re.S
            )
            return f"{said.splitlines()[0]}" if isinstance(error, AssertionError) else f"{type(error).__name__}: {said}"
    return None
