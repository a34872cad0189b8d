"""Faults to plant: mutmut's operators, and two it lacks, over the syntax tree of a file.

Not mutated, for no test could or should see it:
- annotations, TypeVar and aliases of Callable, `if TYPE_CHECKING`, `__slots__`, dataclass's arguments: mypy checks
  those. The widths of a state's fields and its version are among them: released schemas hold them (vmm/saving).
- docstrings, `__repr__`, what a `raise` says: text is free. That it raises is mutated.
- `raise NotImplementedError`: every class of ours replaces the method.
- `assert`: it says what is true anyway, to the reader and to mypy.
- arguments of len and isinstance, as mutmut leaves them: what remains is a TypeError.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import libcst as cst
from mutmut.mutation.mutators import mutation_operators

_LEFT_OUT = {"TypeVar", "ParamSpec", "NewType", "Callable", "dataclass", "state", "len", "isinstance"}


def operator_statement(node: Any) -> Iterable[Any]:
    """Leave a statement out: a call, a raise, an assignment to something that is there already."""
    match node:
        case cst.Expr(value=cst.Call()) | cst.Raise() | cst.AugAssign() | cst.Del():
            yield cst.Pass()
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Attribute() | cst.Subscript())]):
            yield cst.Pass()


def operator_condition(node: Any) -> Iterable[Any]:
    """The other way at an `if` or a `while`."""
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(operator=cst.Not(), expression=test))


OPERATORS: list[tuple[Any, Any]] = [
    *mutation_operators,
    (cst.BaseSmallStatement, operator_statement),
    ((cst.If, cst.While), operator_condition),
]


@dataclass(frozen=True)
class Site:
    """One place in a file and what one operator makes of it: one fault or several of one kind."""

    source: Source
    function: str
    operator: str
    node: Any
    instead: tuple[Any, ...]

    @property
    def where(self) -> str:
        return f"{self.source.file}::{self.function}"


@dataclass(frozen=True)
class Mutant:
    """One fault. All but the code is its name, which outlives a move of lines."""

    file: str
    function: str
    operator: str
    before: str
    after: str
    code: str

    @property
    def name(self) -> tuple[str, ...]:
        return self.file, self.function, self.operator, self.before, self.after


class Source:
    """A file that is mutated."""

    def __init__(self, root: Path, file: str) -> None:
        self.file = file
        self.text = (root / file).read_text()

    @cached_property
    def module(self) -> Any:
        return cst.parse_module(self.text)

    @cached_property
    def sites(self) -> list[Site]:
        return list(self._walk(self.module, ()))

    def _walk(self, node: Any, names: tuple[str, ...]) -> Iterator[Site]:
        if _left_out(node):
            return
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            names = (*names, node.name.value)
        for kind, operator in OPERATORS:
            if isinstance(node, kind) and (instead := tuple(operator(node))):
                yield Site(self, ".".join(names), operator.__name__.removeprefix("operator_"), node, instead)
        if isinstance(node, cst.Raise):
            return
        for child in node.children:
            yield from self._walk(child, names)

    def mutant(self, site: Site, instead: Any) -> Mutant | None:
        """None where the mutated text does not compile or means the same."""
        code = self.module.deep_replace(site.node, instead).code
        try:
            if ast.dump(ast.parse(code)) == ast.dump(ast.parse(self.text)):
                return None
            compile(code, self.file, "exec", dont_inherit=True)
        except SyntaxError:
            return None
        before, after = _difference(self.text.splitlines(), code.splitlines())
        return Mutant(self.file, site.function, site.operator, before, after, code)

    def mutants(self) -> Iterator[Mutant]:
        """All of them."""
        for site in self.sites:
            for instead in site.instead:
                if (mutant := self.mutant(site, instead)) is not None:
                    yield mutant


def sample(sites: list[Site], seed: int, count: int) -> list[Mutant]:
    """Random mutants, the same ones for the same sites and seed. Each site is as likely as any other, however many
    faults can be made of it: else a call with six arguments would weigh as much as a function."""
    draw = random.Random(seed)
    found: list[Mutant] = []
    for site in draw.sample(sites, len(sites)):
        if len(found) == count:
            break
        if (mutant := site.source.mutant(site, draw.choice(site.instead))) is not None:
            found.append(mutant)
    return found


def _left_out(node: Any) -> bool:
    match node:
        case cst.Annotation() | cst.Assert() | cst.Import() | cst.ImportFrom():
            return True
        case cst.Raise(exc=cst.Name(value="NotImplementedError")):
            return True
        case cst.Expr(value=cst.SimpleString() | cst.ConcatenatedString()):
            return True
        case cst.If(test=cst.Name(value="TYPE_CHECKING")) | cst.FunctionDef(name=cst.Name(value="__repr__")):
            return True
        case cst.Call(func=cst.Name(value=called)):
            return called in _LEFT_OUT
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value="__slots__" | "__all__"))]):
            return True
        case cst.Assign(value=cst.Call(func=cst.Name(value=called)) | cst.Subscript(value=cst.Name(value=called))):
            return called in _LEFT_OUT
    return False


def _difference(before: list[str], after: list[str]) -> tuple[str, str]:
    """The lines that differ, without their indentation."""
    while before and after and before[0] == after[0]:
        before, after = before[1:], after[1:]
    while before and after and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    return " ".join(line.strip() for line in before), " ".join(line.strip() for line in after)
