"""Devices as they are declared, and as they are made: what is wrong with one is one line that names it, wherever the
device was to be used."""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable, Mapping
from typing import Any

from snapshot import field_types as types
from snapshot import schema
from vmm.device import Device
from vmm.registers import ANY, Register


def where(cls: type[Any], method: str) -> str:
    """A method's name, and where it stands."""
    code = getattr(inspect.unwrap(getattr(cls, method)), "__code__", None)
    place = f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})" if code else ""
    return f"{cls.__name__}.{method}{place}"


def wrong(cls: type[Any]) -> str | None:
    """What is wrong with a device's class, if anything."""
    if not issubclass(cls, Device):
        return f"{cls.__name__} is no Device"
    state = getattr(cls, "State", None)
    if state is None:
        return f"{cls.__name__} has no State"
    if state not in schema.declared().values():
        return f"{cls.__name__}.State is no class marked with @state: {state!r}"
    if not cls.registers and not cls.outside and cls.deadline is Device.deadline:
        return f"{cls.__name__} has no register: its methods are to be marked with @reads and @writes"
    for register in cls.registers:
        if (said := _callable_as(cls, register)) is not None:
            return said
    try:
        outside(cls)
    except TypeError as error:
        return str(error)
    return None


def _callable_as(cls: type[Any], register: Register) -> str | None:
    """What is wrong with a register's method, if it does not take what it will be given."""
    given = [] if register.span is None else ["offset", "size"] if register.size == ANY else ["index"]
    given += ["value"] if register.kind == "write" else []
    try:
        inspect.signature(getattr(cls, register.method)).bind("self", *given)
    except TypeError:
        return f"{where(cls, register.method)} is to take ({', '.join(['self', *given])}): it answers a {register.kind}"
    return None


def outside(cls: type[Device[Any]]) -> Mapping[str, Mapping[str, types.Type]]:
    """The methods marked @outside, with the types of their parameters. Raises TypeError for one that has none."""
    found = {}
    for method in cls.outside:
        function = getattr(cls, method)
        hints = typing.get_type_hints(function, include_extras=True)
        names = list(inspect.signature(function).parameters)[1:]
        for name in names:
            if name not in hints:
                raise TypeError(f"{where(cls, method)}: {name!r} is to be annotated as a field of a state is")
        found[method] = {name: schema.type_of(hints[name], f"{where(cls, method)}: {name!r}") for name in names}
    return found


def made(make: Callable[[], Any]) -> Device[Any]:
    """What `make` makes. Raises TypeError, naming it, where that is no device with a state; and what `make` raises."""
    try:
        device = make()
    except AttributeError as error:
        if error.name == "state" and isinstance(error.obj, Device):
            raise TypeError(_without_state(type(error.obj))) from None
        raise
    if not isinstance(device, Device):
        raise TypeError(f"{device!r} is no Device")
    if not hasattr(device, "state"):
        raise TypeError(_without_state(type(device)))
    return device


def _without_state(cls: type[Any]) -> str:
    return f"{where(cls, '__init__')} is to call super().__init__() before all else: that makes self.state"
