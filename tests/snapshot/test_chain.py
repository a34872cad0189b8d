"""Differences and chains: what is loaded is what was written, whatever was packed, merged, rebased or taken apart."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot import rewrite, unpack
from snapshot.chain import Chain
from snapshot.container import BLOCK, MAX_CHAIN, Extra, Parent
from snapshot.errors import SnapshotError
from snapshot.field_types import u8
from snapshot.reader import Reader
from snapshot.schema import state
from snapshot.writer import Writer

PAGE = 4096
SIZE = 3 * BLOCK + 2 * PAGE  # the last block is short


@state("test.chain.config", version=1)
class Config:
    generation: u8 = 0


@pytest.fixture(autouse=True, scope="module")
def no_fsync():
    with patch("os.fsync"):
        yield


def save(
    path: Path,
    memory: bytes | bytearray,
    parent: Path | None = None,
    packed: bool = False,
    generation: int = 0,
    extras: Iterable[Extra] = (),
) -> Path:
    layout = [("ram.0", 0, len(memory))]
    known = None
    with Writer(path) as writer:
        writer.part("config", Config(generation=generation))
        if parent is not None:
            with Chain.for_child(parent, path, layout) as chain:
                writer.base(Parent(chain.identity, parent.name))
                known = chain.digests(0)
        writer.ram("ram.0", 0, memoryview(memory), None, packed=packed, parent=known)
        for extra in extras:
            writer.extra(extra)
        writer.commit()
    return path


def load(path: Path) -> bytes:
    with Chain(path) as chain:
        chain.verify_ram()
        with chain.map_ram(0) as memory:
            return bytes(memory)


def test_what_is_not_ram_is_the_leafs(tmp_path):
    """The format document, "Differences": a file says all but the RAM it shares."""
    files: list[Path] = []
    for i in range(3):
        with Writer(tmp_path / f"{i}") as writer:
            writer.part("config", Config(generation=i))
            if files:
                with Chain.for_child(files[-1], tmp_path / f"{i}", [("ram.0", 0, SIZE)]) as chain:
                    writer.base(Parent(chain.identity, files[-1].name))
            writer.ram("ram.0", 0, memoryview(bytes(SIZE)), None)
            writer.meta({"generation": i})
            writer.commit()
        files.append(tmp_path / f"{i}")
        with Chain(files[-1]) as chain, Reader(files[-1]) as alone:
            assert (chain.meta, chain.parts["config"].state) == ({"generation": i}, {"generation": i})
            assert (chain.identity, chain.rams) == (alone.identity, alone.rams)


CHANGES = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * PAGE), st.integers(0, 255), st.booleans()), max_size=4
)


@settings(max_examples=60)
@given(st.lists(st.tuples(CHANGES, st.booleans()), min_size=1, max_size=9))
def test_a_chain_loads_as_the_memory_it_was_saved_from(tmp_path_factory, generations):
    folder = tmp_path_factory.mktemp("chain")
    memory, parent = bytearray(SIZE), None
    for i, (changes, packed) in enumerate(generations):
        for at, length, value, noisy in changes:
            data = os.urandom(length) if noisy else bytes((value,)) * length
            memory[at : at + length] = data[: SIZE - at]
        file = save(folder / f"{i}", bytes(memory), parent, packed, i)
        assert load(file) == memory
        parent = file
    assert parent is not None
    with Chain(parent) as chain:
        assert len(chain.readers) == len(generations)
        assert chain.parts["config"].state == {"generation": len(generations) - 1}
        for number, _ in chain.digests(0).items():
            assert chain.block(0, number) == memory[number * BLOCK : (number + 1) * BLOCK]
    for packed in (False, True):
        rewrite.merge(parent, folder / "merged", packed=packed)
        shutil.copy(folder / "merged", folder / "alone")
        with Chain(folder / "alone") as chain:
            assert len(chain.readers) == 1
        assert load(folder / "merged") == memory
        rewrite.rebase(folder / "merged", folder / "0", folder / "rebased", packed=packed)
        assert load(folder / "rebased") == memory
    for i in range(len(generations)):
        unpack.unpack(folder / f"{i}", folder / f"u{i}")
        unpack.pack(folder / f"u{i}", folder / "again")
        assert (folder / "again").read_bytes() == (folder / f"{i}").read_bytes()


def test_an_error_of_a_chain_names_its_file(tmp_path):
    file = save(tmp_path / "named", bytes(SIZE))
    with pytest.raises(SnapshotError) as caught, Chain(file):
        raise SnapshotError("a fault")
    assert caught.value.file == file


def test_only_what_changed_is_in_a_difference(tmp_path):
    memory = bytearray(os.urandom(SIZE))
    save(tmp_path / "a", memory)
    memory[BLOCK + 5] ^= 1
    memory[2 * BLOCK : 3 * BLOCK] = bytes(BLOCK)  # now zero: that too must be said
    save(tmp_path / "b", memory, tmp_path / "a")
    with Reader(tmp_path / "b") as reader:
        assert list(reader.rams[0].blocks) == [1, 2]
        assert reader.parent is not None and reader.parent.file == "a"
    assert load(tmp_path / "b") == memory
    assert os.stat(tmp_path / "b").st_blocks * 512 < 2 * BLOCK


def test_packing_packs_what_can_be_packed(tmp_path):
    memory = os.urandom(BLOCK) + b"text " * (BLOCK // 5) + bytes(PAGE)
    memory = memory[: len(memory) // PAGE * PAGE]
    save(tmp_path / "a", memory, packed=True)
    with Reader(tmp_path / "a") as reader:
        (_, first, _), (_, second, _) = reader.entries(reader.rams[0])[:2]
        assert first == BLOCK and second < 200
    assert load(tmp_path / "a") == memory


@pytest.fixture
def family(tmp_path: Path) -> Path:
    memory = bytearray(os.urandom(SIZE))
    parent = None
    for name in ("a", "b", "c"):
        memory[7] ^= 1
        parent = save(tmp_path / name, bytes(memory), parent)
    return tmp_path


def refusal(file: Path) -> str:
    with pytest.raises(SnapshotError) as caught, Chain(file):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_parent_is_named(family):
    (family / "b").unlink()
    assert refusal(family / "c") == "parent b: No such file or directory"
    (family / "b").mkdir()
    assert refusal(family / "c") == "parent b: offset 0x0: not a regular file"


def test_a_parents_parent_is_named(family):
    (family / "a").unlink()
    assert refusal(family / "c").startswith("parent a: ")


def test_another_snapshot_under_the_parents_name_is_refused(family):
    shutil.copy(family / "a", family / "b")
    assert "parent b: it is not the snapshot this one was made from" in refusal(family / "c")


def test_a_damaged_parent_is_refused(family):
    data = bytearray((family / "b").read_bytes())
    data[200] ^= 1
    (family / "b").write_bytes(data)
    assert refusal(family / "c").startswith("parent b: offset ")


def test_damage_in_a_parents_ram_is_found_by_verify(family):
    data = bytearray((family / "a").read_bytes())
    data[PAGE + 2 * BLOCK] ^= 1
    (family / "a").write_bytes(data)
    with Chain(family / "c") as chain, pytest.raises(SnapshotError, match=r"^parent a: offset .*digest"):
        chain.verify_ram()
    with pytest.raises(SnapshotError, match="digest"):
        rewrite.merge(family / "c", family / "merged")
    assert not (family / "merged").exists(), "damage must not become good"


def test_a_chain_has_an_end(tmp_path):
    parent, memory = None, bytearray(PAGE)
    for i in range(MAX_CHAIN):
        memory[0] = i
        parent = save(tmp_path / f"{i}", bytes(memory), parent)
    assert parent is not None and load(parent) == memory
    with pytest.raises(SnapshotError, match=f"the chain has {MAX_CHAIN} snapshots already"):
        save(tmp_path / "more", bytes(memory), parent)


@pytest.mark.parametrize(
    ("parent", "child", "size", "words"),
    [
        ("none", "d", SIZE, "none: No such file"),
        ("c", "sub/d", SIZE, "it is not in the folder of"),
        ("c", "c", SIZE, "is part of its chain"),
        ("c", "a", SIZE, "is part of its chain"),
        ("c", "d", PAGE, "its RAM is laid out otherwise"),
    ],
)
def test_what_cannot_be_a_parent(family, parent, child, size, words):
    (family / "sub").mkdir()
    with pytest.raises(SnapshotError, match=words):
        Chain.for_child(family / parent, family / child, [("ram.0", 0, size)])


@pytest.mark.parametrize(
    "value",
    [{}, {"digest": "00" * 32}, {"digest": "00" * 31, "file": "a"}, {"digest": "AA" * 32, "file": "a"},
     {"digest": "00" * 32, "file": "../a"}, {"digest": "00" * 32, "file": ".."}, {"digest": "00" * 32, "file": ""},
     {"digest": "00" * 32, "file": "a\n"}, {"digest": "00" * 32, "file": "é"}, {"digest": 1, "file": "a"}, []],
)  # fmt: skip
def test_a_bad_reference_is_refused(value):
    with pytest.raises(SnapshotError):
        Parent.from_json(value)


# --- apart and together again


EXTRAS = [Extra(b"NEW9", 7, "x", 16, b"\0\xff later"), Extra(b"NEW9", 7, "y", 4096, b"")]


@pytest.mark.parametrize("meta_at", [None, 0, 1, 2])
def test_unknown_chunks_and_their_order_are_kept(tmp_path, meta_at):
    with Writer(tmp_path / "a", minor=3) as writer:
        writer.part("config", Config())
        writer.ram("ram.0", 0, memoryview(b"\1" * PAGE), None)
        for i in range(3):
            if i == meta_at:
                writer.meta({"tool": "test"})
            if i < 2:
                writer.extra(EXTRAS[i])
        writer.commit()
    before = (tmp_path / "a").read_bytes()
    unpack.unpack(tmp_path / "a", tmp_path / "u")
    unpack.pack(tmp_path / "u", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == before
    rewrite.with_parts(tmp_path / "a", tmp_path / "a", {})
    assert (tmp_path / "a").read_bytes() == before


def test_an_edited_folder_makes_a_good_snapshot(tmp_path):
    save(tmp_path / "a", b"\1" * PAGE)
    unpack.unpack(tmp_path / "a", tmp_path / "u")
    (tmp_path / "u" / "ram" / "ram.0").write_bytes(b"\2" * PAGE)
    text = (tmp_path / "u" / "parts" / "config.json").read_text()
    (tmp_path / "u" / "parts" / "config.json").write_text(text.replace('"generation": 0', '"generation": 9'))
    unpack.pack(tmp_path / "u", tmp_path / "b")
    assert load(tmp_path / "b") == b"\2" * PAGE
    with Reader(tmp_path / "b") as reader:
        assert reader.parts["config"].state["generation"] == 9


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("snapshot.json", "{", ""),
        ("snapshot.json", '"ram"', '"ran"'),
        ("snapshot.json", '"config"', '"../config"'),
        ("snapshot.json", '"packed": true', '"packed": false'),
        ("snapshot.json", '"size": 4096', '"size": 4097'),
        ("parts/config.json", '"generation": 0', '"generation": 256'),
        ("parts/config.json", '"generation": 0', '"generatio": 0'),
        ("ram/ram.0", "", "x"),
    ],
)
def test_a_folder_that_was_broken_is_refused_in_words(tmp_path, file, old, new):
    save(tmp_path / "a", b"\1" * PAGE, packed=True)
    unpack.unpack(tmp_path / "a", tmp_path / "u")
    path = tmp_path / "u" / file
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode(), 1))
    with pytest.raises(SnapshotError):
        unpack.pack(tmp_path / "u", tmp_path / "b")
    assert not (tmp_path / "b").exists()


# --- hostile packed blocks


@pytest.mark.parametrize("damage", ["flip", "grow", "second frame", "no size", "other size"])
def test_a_packed_block_that_lies(tmp_path, damage):
    import zstandard
    from blake3 import blake3

    memory = b"text" * PAGE
    pack = zstandard.ZstdCompressor(level=3)
    frames = {
        "flip": lambda: pack.compress(memory),
        "grow": lambda: pack.compress(memory) + b"more",
        "second frame": lambda: pack.compress(memory) + pack.compress(b""),
        "no size": lambda: zstandard.ZstdCompressor(write_content_size=False).compress(memory),
        "other size": lambda: pack.compress(memory * 1000),
    }
    frame = bytearray(frames[damage]())
    if damage == "flip":
        frame[-1] ^= 0xFF
        frame[len(frame) // 2] ^= 0xFF
    (tmp_path / "frame").write_bytes(frame)
    with Writer(tmp_path / "a") as writer:
        writer.part("config", Config())
        fd = os.open(tmp_path / "frame", os.O_RDONLY)
        writer.stored_ram("ram.0", 0, len(memory), True, [(0, len(frame), blake3(memory).digest())], fd, 0)
        writer.commit()
        os.close(fd)
    with Chain(tmp_path / "a") as chain:
        for check in (chain.verify_ram, lambda: chain.map_ram(0)):
            with pytest.raises(SnapshotError, match="zstd frame"):
                check()
