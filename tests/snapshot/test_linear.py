"""The work of reading, writing, verifying and merging grows with the number of chunks, not with its square: counted in
lines of Python that run, and calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from snapshot import rewrite, unpack
from snapshot.chain import Chain
from snapshot.container import Extra
from snapshot.reader import Reader
from snapshot.verify import verify
from snapshot.writer import Writer
from tests.snapshot.test_target import Config

PAGE = 4096


def parts(path: Path, count: int) -> None:
    with Writer(path) as writer:
        writer.part("config", Config())
        for i in range(count - 1):
            writer.part(f"p{i}", Config())
        writer.commit()


def extras(path: Path, count: int) -> None:
    with Writer(path) as writer:
        writer.part("config", Config())
        for i in range(count - 1):
            writer.extra(Extra(b"NEW9", 1, f"x{i}", 16, b""))
        writer.commit()


def regions(path: Path, count: int) -> None:
    """Two chunks each."""
    with Writer(path) as writer:
        writer.part("config", Config())
        for i in range(count // 2 - 1):
            writer.ram(f"ram.{i}", i * PAGE, memoryview(b"\1" * PAGE), None)
        writer.commit()


def difference(path: Path, count: int) -> None:
    parent = path.with_name(f"{path.name}.parent")
    regions(parent, count)
    layout = [(f"ram.{i}", i * PAGE, PAGE) for i in range(count // 2 - 1)]
    with Writer(path) as writer, Chain.for_child(parent, path, layout) as chain:
        writer.part("config", Config())
        writer.base(chain.as_parent())
        for i, (name, base, _) in enumerate(layout):
            writer.ram(name, base, memoryview(b"\2" * PAGE), None, parent=chain.digests(i))
        writer.commit()


def taken_apart(path: Path) -> None:
    folder = path.with_name(f"{path.name}.apart")
    unpack.unpack(path, folder)
    unpack.pack(folder, path.with_name(f"{path.name}.packed"))


def read(path: Path) -> None:
    with Reader(path) as reader:
        reader.verify_ram()


MAKE: dict[str, Callable[[Path, int], None]] = {
    "parts": parts, "extras": extras, "regions": regions, "difference": difference,
}  # fmt: skip
USE: dict[str, Callable[[Path], Any]] = {
    "read": read,
    "verify": verify,
    "merge": lambda path: rewrite.merge(path, path.with_name(f"{path.name}.merged")),
    "edit": lambda path: rewrite.with_parts(path, path, {}),
    "unpack, pack": taken_apart,
}


def lines(action: Callable[[], object]) -> int:
    """How many lines of our Python ran, and how often a function of ours began or a generator went on."""
    count = 0

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return line

    def call(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if "/snapshot/" not in frame.f_code.co_filename:
            return None
        count += 1
        return line

    before = sys.gettrace()
    sys.settrace(call)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("kind", MAKE)
def test_twice_as_many_are_twice_the_work(tmp_path: Path, kind: str) -> None:
    few, many = tmp_path / "400", tmp_path / "800"
    work = {path: lines(partial(MAKE[kind], path, int(path.name))) for path in (few, many)}
    assert work[many] < 2.15 * work[few], "write"
    for use, action in USE.items():
        work = {path: lines(partial(action, path)) for path in (few, many)}
        assert work[many] < 2.15 * work[few], use
