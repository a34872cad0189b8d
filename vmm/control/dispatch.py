"""How a method of the socket is declared and called: its signature is the check of the parameters, its docstring the
documentation, its decorator the states it is answered in."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vmm.control.lifecycle import State
from vmm.control.protocol import INVALID_PARAMS, UNKNOWN_METHOD, RpcError
from vmm.control.supervisor import Supervisor, WrongState

MAX_WAIT_S = 60


ALL = frozenset(State)


class Session(Protocol):
    """Whoever asks, as far as a method must know."""

    vm: Supervisor
    name: str
    events: set[str]

    async def output(self, offset: int, wait_s: float) -> None: ...  # until the console has more than that


@dataclass(frozen=True)
class Was:
    """The name a parameter had before, in its annotation: still taken, and documented nowhere."""

    name: str


@dataclass(frozen=True)
class Param:
    """One parameter of a method: the types its value may have, what it is when it is not given, and its old names."""

    kinds: tuple[type, ...]
    doc: str
    default: Any
    needed: bool
    was: tuple[str, ...]

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> Param:
        kind, doc, *was = typing.get_args(parameter.annotation)
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        needed = parameter.default is parameter.empty
        kinds = tuple(typing.get_origin(each) or each for each in kinds)
        return cls(kinds, doc, parameter.default, needed, tuple(old.name for old in was))

    @property
    def spelt(self) -> str:
        return " or ".join(_SPELT[kind] for kind in self.kinds)


@dataclass(frozen=True)
class Method:
    """One method: its function, and the states it is answered in."""

    name: str
    states: frozenset[State]
    function: Callable[..., Awaitable[Any]]

    @cached_property
    def params(self) -> dict[str, Param]:
        found = inspect.signature(self.function, eval_str=True).parameters
        return {name: Param.of(parameter) for name, parameter in found.items() if name != "session"}

    @property
    def doc(self) -> str:
        return " ".join((self.function.__doc__ or "").split())


class Methods(dict[str, Method]):
    """Methods by name, in the order they are declared in."""

    def method(self, name: str, states: frozenset[State]) -> Callable[[Callable[..., Awaitable[Any]]], Any]:
        """Declare a method that is answered in `states`."""

        def register(function: Callable[..., Awaitable[Any]]) -> Any:
            self[name] = Method(name, states, function)
            return function

        return register

    async def call(self, session: Session, name: str, params: dict[str, Any]) -> Any:
        """Call a method by its name; returns its result. Raises RpcError, WrongState, or what the method raises."""
        if name not in self:
            raise RpcError(UNKNOWN_METHOD, f"there is no method {name!r}; there are {', '.join(self)}")
        found = self[name]
        arguments = bind(found, params)
        if (state := session.vm.state) not in found.states:
            raise WrongState(f"{name}: the machine is {state}; it must be {_either(found.states)}")
        return await found.function(session, **arguments)

    def describe(self) -> str:
        """The methods, as docs/control.md shows them."""
        lines = []
        for found in self.values():
            lines += [f"### `{found.name}`", "", found.doc, ""]
            for name, param in found.params.items():
                needed = "needed" if param.needed else f"default `{json.dumps(param.default)}`"
                lines += [f"- `{name}` ({param.spelt}; {needed}): {param.doc}"]
            lines += [""] if found.params else []
            lines += ["In any state." if found.states == ALL else f"When {_either(found.states)}.", ""]
        return "\n".join(lines)


def bind(found: Method, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters as the function takes them. Raises RpcError."""
    params = _by_new_names(found, params)
    for name in params:
        if name not in found.params:
            raise RpcError(INVALID_PARAMS, f"{found.name} has no parameter {name!r}")
    arguments = {}
    for name, param in found.params.items():
        if name in params:
            arguments[name] = _take(f"{found.name}: {name}", params[name], param)
        elif param.needed:
            raise RpcError(INVALID_PARAMS, f"{found.name} needs the parameter {name!r}")
    return arguments


def _by_new_names(found: Method, params: dict[str, Any]) -> dict[str, Any]:
    """What was given, each under the name its parameter has now. Raises RpcError for one that is given under two."""
    new = {old: name for name, param in found.params.items() for old in param.was}
    for old in params.keys() & new.keys():
        if new[old] in params:
            raise RpcError(INVALID_PARAMS, f"{found.name}: {old!r} and {new[old]!r} are one parameter")
    return {new.get(name, name): value for name, value in params.items()}


def _take(what: str, value: Any, param: Param) -> Any:
    for kind in param.kinds:
        if kind is Path and isinstance(value, str):
            if not value.startswith("/") or "\0" in value or len(value) > 4095:
                raise RpcError(INVALID_PARAMS, f"{what} must be an absolute path")
            return Path(value)
        if (
            kind is float
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 <= value <= MAX_WAIT_S
        ):
            return float(value)
        if kind is int and type(value) is int and 0 <= value < 1 << 63:
            return value
        if kind is list and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        if kind in (bool, str, types.NoneType) and type(value) is kind:
            return value
    raise RpcError(INVALID_PARAMS, f"{what} must be {param.spelt}")


_SPELT = {
    Path: "an absolute path",
    str: "a string",
    int: "a count",
    float: f"seconds, {MAX_WAIT_S} at most",
    bool: "true or false",
    list: "a list of strings",
    types.NoneType: "null",
}


def _either(states: frozenset[State]) -> str:
    return " or ".join(state for state in State if state in states)
