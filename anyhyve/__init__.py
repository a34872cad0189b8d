"""anyhyve's public names: what documentation shows is imported from here.

    from anyhyve import Image, Machine, MachineConfig

Each is imported from the module it is defined in when it is first asked for, so that importing this package costs
nothing. For more tests of devices and machines there is `anyhyve.testing`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snapshot.errors import SnapshotError as SnapshotError
    from snapshot.field_types import MaxSize as MaxSize
    from snapshot.field_types import OneOf as OneOf
    from snapshot.field_types import Range as Range
    from snapshot.field_types import Size as Size
    from snapshot.field_types import i64 as i64
    from snapshot.field_types import u2 as u2
    from snapshot.field_types import u3 as u3
    from snapshot.field_types import u4 as u4
    from snapshot.field_types import u5 as u5
    from snapshot.field_types import u7 as u7
    from snapshot.field_types import u8 as u8
    from snapshot.field_types import u16 as u16
    from snapshot.field_types import u24 as u24
    from snapshot.field_types import u32 as u32
    from snapshot.field_types import u56 as u56
    from snapshot.field_types import u64 as u64
    from snapshot.schema import state as state
    from snapshot.versions import downgrade as downgrade
    from snapshot.versions import renamed as renamed
    from snapshot.versions import upgrade as upgrade
    from vmm.board.config import DeviceConfig as DeviceConfig
    from vmm.board.config import MachineConfig as MachineConfig
    from vmm.board.kinds import IsaOptions as IsaOptions
    from vmm.board.kinds import Kind as Kind
    from vmm.control.client import Client as Client
    from vmm.control.place import Place as Place
    from vmm.control.place import rundir as rundir
    from vmm.control.server import Server as Server
    from vmm.control.supervisor import Supervisor as Supervisor
    from vmm.device import Device as Device
    from vmm.device import invariant as invariant
    from vmm.device import outside as outside
    from vmm.errors import BackendError as BackendError
    from vmm.errors import Cancelled as Cancelled
    from vmm.errors import GuestError as GuestError
    from vmm.errors import RequestError as RequestError
    from vmm.guest.image import Image as Image
    from vmm.machine.machine import Machine as Machine
    from vmm.machine.moment import Moment as Moment
    from vmm.machine.stop import Fault as Fault
    from vmm.machine.stop import Stop as Stop
    from vmm.machine.stop import Stopped as Stopped
    from vmm.machine.stop import StopReason as StopReason
    from vmm.registers import ANY as ANY
    from vmm.registers import reads as reads
    from vmm.registers import span as span
    from vmm.registers import writes as writes
    from vmm.testing import Rig as Rig
    from vmm.testing import check_device as check_device
    from vmm.testing import device_machine as device_machine
    from vmm.wires import Alarm as Alarm
    from vmm.wires import Clock as Clock
    from vmm.wires import Configuration as Configuration
    from vmm.wires import Dma as Dma
    from vmm.wires import ExitRequest as ExitRequest
    from vmm.wires import Inta as Inta
    from vmm.wires import Line as Line
    from vmm.wires import Lines as Lines
    from vmm.wires import Msi as Msi
    from vmm.wires import Placement as Placement
    from vmm.wires import Posting as Posting
    from vmm.wires import ResetRequest as ResetRequest
    from vmm.wires import Transmit as Transmit
    from vmm.wires import Tsc as Tsc

_MODULES = {  # where each name is from; the imports above are the same for type checkers, and a test compares them
    "snapshot.errors": "SnapshotError",
    "snapshot.schema": "state",
    "snapshot.field_types": "MaxSize OneOf Range Size i64 u2 u3 u4 u5 u7 u8 u16 u24 u32 u56 u64",
    "snapshot.versions": "downgrade renamed upgrade",
    "vmm.board.config": "DeviceConfig MachineConfig",
    "vmm.board.kinds": "IsaOptions Kind",
    "vmm.control.client": "Client",
    "vmm.control.place": "Place rundir",
    "vmm.control.server": "Server",
    "vmm.control.supervisor": "Supervisor",
    "vmm.device": "Device invariant outside",
    "vmm.errors": "BackendError Cancelled GuestError RequestError",
    "vmm.guest.image": "Image",
    "vmm.machine.machine": "Machine",
    "vmm.machine.moment": "Moment",
    "vmm.machine.stop": "Fault Stop StopReason Stopped",
    "vmm.registers": "ANY reads span writes",
    "vmm.testing": "Rig check_device device_machine",
    "vmm.wires": "Alarm Clock Configuration Dma ExitRequest Inta Line Lines Msi Placement Posting ResetRequest "
    "Transmit Tsc",
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return found


def __dir__() -> list[str]:
    return __all__
