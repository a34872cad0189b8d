"""A folder of unpack, edited badly: SnapshotError or OSError, and no file; never another error, never for long."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import unpack
from snapshot.container import BLOCK, Extra
from snapshot.errors import SnapshotError
from snapshot.verify import verify
from snapshot.writer import Writer
from tests.snapshot.test_target import Config


@pytest.fixture(scope="module", params=[False, True], ids=["raw", "packed"])
def unpacked(request, tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("unpacked")
    with Writer(folder / "s") as writer:
        writer.part("config", Config(number=7))
        writer.ram("ram.0", 0, memoryview(b"text" * BLOCK + bytes(BLOCK)), None, packed=request.param)
        writer.meta({"made": "by a test"})
        writer.extra(Extra(b"NEW9", 1, "x", 16, b"payload"))
        writer.commit()
    unpack.unpack(folder / "s", folder / "u")
    return folder / "u"


def copied(source: Path, target: Path) -> Path:
    """A copy that may be changed."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True)
        else:
            place.write_bytes(path.read_bytes())
    return target


def pack(folder: Path, out: Path) -> bool:
    """Whether it could be packed. What was packed can be read."""
    try:
        unpack.pack(folder, out)
    except (SnapshotError, OSError) as error:
        assert len(str(error).splitlines()) == 1, error
        assert not out.exists() and not list(out.parent.glob(".*.tmp"))
        return False
    verify(out)
    return True


ODD: st.SearchStrategy[Any] = st.sampled_from([
    None, True, -1, 0, 1, 65536, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, 1.5, float("inf"),
    float("nan"), "", "x", "..", "../../x", "/etc/passwd", "\0", "\ud800", "é", "NEW9", "x" * 300, [], {}, [[]], [0],
    [[0, 1]], [[0, 1 << 40]], [[0, -1]], ["ram.0"], {"a": 1},
])  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, each in inner for found in places(each, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    held = value
    for step in path[:-1]:
        held = held[step]
    held[path[-1]] = new
    return value


@given(data=st.data())
def test_any_value_at_any_place(unpacked, tmp_path_factory, data):
    folder = copied(unpacked, tmp_path_factory.mktemp("edited") / "u")
    for _ in range(data.draw(st.integers(1, 3))):
        path = folder / data.draw(st.sampled_from(["snapshot.json", "snapshot.json", "parts/config.json", "meta.json"]))
        value = json.loads(path.read_text())
        path.write_text(
            json.dumps(put(value, data.draw(st.sampled_from(places(value))), copy.deepcopy(data.draw(ODD))))
        )
    pack(folder, folder.parent / "out")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("ram", 0, "base"), 1),
        (("ram", 0, "base"), (1 << 64) - 4096),
        (("extra", 0, 3), 1),
        (("extra", 0, 0), "META"),
        (("parts",), []),
    ],
)
def test_what_could_not_be_read_again(unpacked, tmp_path, path, value):
    folder = copied(unpacked, tmp_path / "u")
    manifest = json.loads((folder / "snapshot.json").read_text())
    (folder / "snapshot.json").write_text(json.dumps(put(manifest, path, value)))
    assert not pack(folder, tmp_path / "out")


@given(data=st.data())
def test_any_bytes_anywhere(unpacked, tmp_path_factory, data):
    folder = copied(unpacked, tmp_path_factory.mktemp("edited") / "u")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    held = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(held)))
    held[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    if data.draw(st.booleans()):
        del held[data.draw(st.integers(0, len(held))) :]
    path.write_bytes(held)
    pack(folder, folder.parent / "out")


TEXTS = [
    "",
    "null",
    "[]",
    "{}",
    "1",
    "nan",
    "[" * 100_000,
    '{"a":' * 100_000,
    "1" * 10_000,
    '"\\ud800"',
    "\ufeff{}",
    '{"parts": 1}',
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("file", ["snapshot.json", "parts/config.json"])
def test_what_is_no_json_of_ours(unpacked, tmp_path, file, text):
    folder = copied(unpacked, tmp_path / "u")
    (folder / file).write_text(text)
    assert not pack(folder, tmp_path / "out")


PLACES = ["snapshot.json", "parts/config.json", "ram/ram.0", "extra/0", "parts", "ram", "extra"]


@pytest.mark.parametrize("size", [0, 1 << 32, 1 << 45, (1 << 63) - 1])
def test_a_block_that_says_it_is_large(unpacked, tmp_path, size):
    """No room is made for it."""
    folder = copied(unpacked, tmp_path / "u")
    frame = b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\1\0\0"  # RFC 8878, 3.1.1
    manifest = json.loads((folder / "snapshot.json").read_text())
    manifest["ram"][0].update(packed=True, blocks=[[0, len(frame)]])
    (folder / "snapshot.json").write_text(json.dumps(manifest))
    (folder / "ram" / "ram.0").write_bytes(frame)
    assert not pack(folder, tmp_path / "out")


@pytest.mark.parametrize("what", ["missing", "folder", "fifo", "loop", "dangling", "device", "link out"])
@pytest.mark.parametrize(
    "file", ["snapshot.json", "parts/config.json", "ram/ram.0", "extra/0", "parts", "ram", "extra"]
)
def test_something_else_in_the_place_of_a_file(unpacked, tmp_path, file, what):
    folder = copied(unpacked, tmp_path / "u")
    path = folder / file
    path.rename(tmp_path / "was")
    match what:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to(tmp_path / "nothing")
        case "device":
            path.symlink_to("/dev/zero")
        case "link out":
            path.symlink_to(tmp_path / "was")
    assert not pack(folder, tmp_path / "out")


@pytest.mark.parametrize("path", ["", ".", "/", "\0", "\ud800", "x" * 256, "/x" * 3000, "/dev/null"])
def test_what_is_no_folder(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not pack(Path(path), tmp_path / "out")
