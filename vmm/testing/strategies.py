"""Hypothesis strategies from declarations: values of fields, states, registers, calls from outside."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from snapshot import field_types as types
from snapshot import schema
from vmm.board.slot import At
from vmm.testing.actions import Call
from vmm.testing.subject import Subject

WAITS = st.sampled_from((1, 100, 1000, 10**6, 10**9)) | st.integers(0, 10**15)  # ns


def values(kind: types.Type) -> st.SearchStrategy[Any]:
    """Any value a field type allows."""
    match kind:
        case types.IntType(low, high):
            edges = [v for v in (low, low + 1, high - 1, high) if low <= v <= high]
            return st.integers(low, high) | st.sampled_from(edges)
        case types.BoolType():
            return st.booleans()
        case types.WordType(words):
            return st.sampled_from(words)
        case types.TextType(most):
            return st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=min(most, 64))
        case types.BytesType(least, most):
            return st.binary(min_size=least, max_size=max(least, min(most, 64)))
        case types.ListType(item, least, most):
            return st.lists(values(item), min_size=least, max_size=max(least, min(most, 16))).map(tuple)
        case types.OptionalType(item):
            return st.none() | values(item)
        case schema.StructType(cls):
            return states(cls)
    raise AssertionError(f"no strategy for {kind}")


def states(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Any value of a @state class: its defaults with some fields replaced, or every field drawn."""
    fields = {f.name: values(f.type) for f in schema.schema_of(cls).fields}
    needed = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    always = {name: values for name, values in fields.items() if name in needed}
    others = {name: values for name, values in fields.items() if name not in needed}
    some = st.fixed_dictionaries(always, optional=others).map(lambda given: cls(**given))
    return some | st.fixed_dictionaries(fields).map(lambda given: cls(**given))


@st.composite
def accesses(draw: st.DrawFn, subject: Subject, kind: str) -> tuple[At, int, int]:
    """A declared register that can be read, or written: the place of its bank, its address and size."""
    register = draw(st.sampled_from([register for register in subject.device.registers if register.kind == kind]))
    at, address = subject.place(register)
    size = register.size or draw(st.sampled_from(subject.sizes(at)))
    if register.span is not None:
        last = register.span.count - 1
        address += register.span.step * draw(st.integers(0, last) | st.sampled_from((0, last)))
    return at, address, size


def calls(subject: Subject, method: str) -> st.SearchStrategy[Call]:
    """Calls of a method that is marked as @outside."""
    wanted = subject.calls[method]
    given = st.fixed_dictionaries({name: values(kind) for name, kind in wanted.items()})
    return given.map(lambda values: Call(method, tuple((n, wanted[n].encode(v, n)) for n, v in values.items())))
