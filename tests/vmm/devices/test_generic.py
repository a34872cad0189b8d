"""Every device of the board, by the generic properties."""

import pytest

from vmm.board import SLOTS
from vmm.device import Device, reads, writes
from vmm.devices.debug_exit import DebugExit
from vmm.devices.debugcon import Debugcon
from vmm.devices.i8042 import I8042
from vmm.devices.pic import Pic
from vmm.devices.pit import Pit
from vmm.devices.port92 import Port92
from vmm.devices.reset_control import ResetControl
from vmm.devices.rtc import Rtc
from vmm.devices.uart import Uart
from vmm.testing import check_device

BUILDS = {
    Pic: lambda rig: Pic(rig.line("int")),
    Pit: lambda rig: Pit(rig.clock, rig.line("irq0")),
    Rtc: lambda rig: Rtc(rig.clock, rig.line("irq8")),
    Uart: lambda rig: Uart(rig.line("irq"), rig.sink("transmit")),
    I8042: lambda rig: I8042(rig.line("irq1"), rig.line("irq12"), rig.line("a20"), rig.sink("reset")),
    Port92: lambda rig: Port92(rig.line("a20"), rig.sink("reset")),
    ResetControl: lambda rig: ResetControl(rig.sink("reset")),
    Debugcon: lambda rig: Debugcon(rig.sink("out"), 0xE9),
    DebugExit: lambda rig: DebugExit(rig.sink("exit")),
}


@pytest.mark.parametrize("device", BUILDS, ids=lambda d: d.__name__)
def test_device(device):
    check_device(BUILDS[device])


def test_every_device_of_the_board_is_here():
    assert {slot.device for slot in SLOTS} == set(BUILDS)


def test_a_field_outside_the_state_is_found():
    """Planted bugs: what the properties are for."""
    from snapshot.schema import state, u8

    @state("test.generic.counter", version=1)
    class CounterState:
        count: u8 = 0

    class Forgetful(Device[CounterState]):
        State = CounterState

        def __init__(self):
            super().__init__()
            self.hidden = 0

        @reads(0)
        def read(self):
            return self.hidden

        @writes(0)
        def write(self, value):
            self.hidden = value

    class Wide(Device[CounterState]):
        State = CounterState

        @writes(0)
        def write(self, value):
            self.state.count += value

    class Clicks(Device[CounterState]):
        State = CounterState

        def restored(self):
            self.state.count = self.state.count + 1 & 0xFF

    for broken in (Forgetful, Wide, Clicks):
        with pytest.raises(Exception, match=r"twin|not an integer|restored"):
            check_device(lambda rig, broken=broken: broken())
