"""A guest that is lost under a name is told of, and goes on."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.vmm.cpu.program import Program
from tests.vmm.machine.test_lost import PANIC, saying
from vmm.control.supervisor import Supervisor
from vmm.guest.lost import LOST
from vmm.machine.run import Goal
from vmm.machine.stop import Stopped, StopReason

ENDS = {
    StopReason.RESET: "mov $0xfe, %al; out %al, $0x64",
    StopReason.HALTED: "cli; hlt",
    StopReason.TRIPLE_FAULT: "movw $0, 0x200000; lidt 0x200000; ud2",
}


@pytest.mark.parametrize("reason", ENDS)
@pytest.mark.parametrize("ends_lost", [True, False])
def test_what_it_comes_to_is_not_lost(reason, ends_lost):
    machine = Program(saying(f"{PANIC}\r\n", "trace\r\n", then=ENDS[reason])).machine
    told = []
    with closing(Supervisor(machine)) as vm:
        vm.listeners.append(lambda event, details: told.append(details["line"]) if event == "panic" else None)
        lets_it_go_on = lambda stop: None if ends_lost or stop.reason is not StopReason.PANIC else Goal()  # noqa: E731
        stop = vm.run(Goal(lost=LOST), go_on=lets_it_go_on)
    assert told == [PANIC]
    assert stop == Stopped(StopReason.PANIC if ends_lost else reason)
