"""A device whose methods are looked at as they return.

* A read answers an int that fits its width, `deadline()` a time or None.
* Nothing but what is in `state` changes: what else a method changes no snapshot holds.
"""

from __future__ import annotations

import functools
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

from vmm.board.declared import where
from vmm.device import Device
from vmm.registers import Bank
from vmm.testing.rig import Rig

_OPAQUE = (Rig, Device, FunctionType, MethodType, BuiltinMethodType, functools.partial, type, ModuleType)  # wires, code
_CONSTANT = (int, float, str, bytes, type(None), *_OPAQUE)


class Watched:
    """For a bus it is the device. Every method raises AssertionError, naming the method that does what it may not."""

    def __init__(self, device: Device[Any]) -> None:
        self.device, self._class = device, type(device)
        self.banks = {name: _Bank(self, bank) for name, bank in device.banks.items()}
        bases = self._class.__mro__[: self._class.__mro__.index(Device)]
        self._shared = [(base, name) for base in bases for name, value in vars(base).items() if _is_data(name, value)]
        self._held = self._holds()
        self._inner = {name: _frozen(value) for name, value in self._held.items() if not _is_constant(value)}

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        return self.do(getattr(self.device, method), *arguments, **named)

    def do(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call one of its methods."""
        answer = function(*arguments, **named)
        if type(self.device.state) is not self._class.State:
            put = type(self.device.state).__name__
            raise AssertionError(f"{self._where(function)} makes self.state a {put}, no {self._class.State.__name__}")
        if (changed := self._changed()) is not None:
            writer = _writer(self._class, _name(function), changed.rpartition(".")[2])
            said = f"changes {changed}, which is beside self.state: no snapshot has it"
            raise AssertionError(f"{where(self._class, writer)} {said}")
        return answer

    def read(self, function: Callable[[], Any], size: int) -> int:
        answer = self.do(function)
        if not isinstance(answer, int) or not 0 <= answer < 1 << 8 * size:
            said = f"{answer:#x}" if isinstance(answer, int) else repr(answer)
            said += f", no int from 0 to {(1 << 8 * size) - 1:#x}"
            raise AssertionError(f"{self._where(function)}: a read of {size} bytes answered {said}")
        return answer

    def deadline(self) -> int | None:
        answer: Any = self.device.deadline()  # often asked; what it changes is seen after the next call
        if answer is not None and not isinstance(answer, int):
            said = f"answered {answer!r}, neither an int of ns nor None"
            raise AssertionError(f"{self._where(self.device.deadline)} {said}")
        return answer

    def _where(self, function: Callable[..., Any]) -> str:
        return where(self._class, _name(function))

    def _holds(self) -> dict[str, Any]:
        """What the device has beside its state, and what its classes have."""
        held = {**vars(self.device), "state": None}
        for base, name in self._shared:
            held[f"{base.__name__}.{name}"] = vars(base).get(name)
        return held

    def _changed(self) -> str | None:
        """What no longer is as it was when it was made."""
        held = self._holds()
        if held != self._held:
            names = (name for name in {**held, **self._held} if held.get(name, self) != self._held.get(name, self))
        else:
            names = (name for name, was in self._inner.items() if _frozen(held[name]) != was)
        return next((name if "." in name else f"self.{name}" for name in names), None)


class _Bank:
    def __init__(self, watched: Watched, bank: Bank) -> None:
        self.size = bank.size
        self._watched, self._bank = watched, bank

    def find(self, watched: object, kind: str, offset: int, size: int) -> Callable[..., Any] | None:
        found = self._bank.find(self._watched.device, kind, offset, size)
        if found is None:
            return None
        if kind == "read":
            return functools.partial(self._watched.read, found, size)
        return functools.partial(self._watched.do, found)


def _is_data(name: str, value: object) -> bool:
    """Whether an attribute of a class is one that its devices may have in common."""
    descriptor = hasattr(value, "__get__") or isinstance(value, _OPAQUE)
    return not name.startswith("__") and not descriptor and name not in vars(Device)


def _is_constant(value: object) -> bool:
    """Whether nothing in it can change: it need not be looked into."""
    if isinstance(value, tuple | frozenset):
        return all(map(_is_constant, value))
    if is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return all(_is_constant(getattr(value, field.name)) for field in fields(value))
    return isinstance(value, _CONSTANT)


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "func", function).__name__)


def _writer(cls: type[Any], called: str, attribute: str) -> str:
    """The method that was called, or the only other whose code knows the attribute."""

    def knows(method: str) -> bool:
        code = getattr(inspect.unwrap(getattr(cls, method)), "__code__", None)
        return code is not None and attribute in code.co_names

    others = [name for name in dir(cls) if name != "__init__" and callable(getattr(cls, name)) and knows(name)]
    return others[0] if len(others) == 1 and not knows(called) else called


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return id(value) if isinstance(value, _OPAQUE) else None


def _frozen(value: object) -> object:
    """What differs once something in the value has changed. A wire is itself, whatever it leads to."""
    written = io.BytesIO()
    try:
        _Pickler(written).dump(value)
    except Exception:  # it cannot be looked into
        return id(value)
    return written.getvalue()
