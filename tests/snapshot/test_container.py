"""The container: writer against reader, and both against `build` below, made from docs/snapshot-format.md alone."""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import stat
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshot import canon
from snapshot.container import Extra
from snapshot.errors import SnapshotError
from snapshot.field_types import Json, MaxSize, u7, u16
from snapshot.reader import Part, Reader, decode_part
from snapshot.schema import encode, schema_of, state
from snapshot.versions import upgrade
from snapshot.writer import Writer

PAGE, BLOCK = 4096, 65536
MAGIC = bytes.fromhex("89 41 4E 59 48 59 56 45 0D 0A 1A 0A")


@state("test.container.config", version=1)
class ConfigV1:
    """What the machine is made of."""

    cpus: Annotated[u7, "how many"] = 1


@state("test.container.config", version=2)
class Config:
    """What the machine is made of."""

    cpus: Annotated[u16, "how many"] = 1
    disk: Annotated[bytes, MaxSize(64), "an id"] = b""


@upgrade
def config_v1_to_v2(old: ConfigV1) -> Config:
    return Config(cpus=old.cpus)


@dataclass(frozen=True)
class Raw:
    """A chunk for `build`; None is what a sound file has."""

    kind: bytes
    payload: bytes
    name: str | bytes = ""
    version: int = 1
    flags: int = 0
    alignment: int = 16
    zero: int = 0
    length: int | None = None
    digest: bytes | None = None
    tail: bytes = b""
    gap: bytes = b""  # what the padding before the payload starts with
    after: bytes = b""  # what the padding after it starts with


@dataclass(frozen=True)
class Finish:
    count: int | None = None
    size: int | None = None
    seal: bytes | None = None
    raw: Raw = Raw(b"END ", b"")
    more: bytes = b""


def pad(data: bytes, alignment: int, start: bytes = b"") -> bytes:
    return data + start.ljust(-len(data) % alignment, b"\0")


_GOOD = Finish()


def build(chunks: list[Raw], finish: Finish = _GOOD, magic: bytes = MAGIC, minor: int = 0, rest: bytes = b"") -> bytes:
    """A file from its chunks, digests and END put right."""
    data = struct.pack("<12sHH16s", magic, 1, minor, rest)
    seal = blake3(data)

    def add(raw: Raw) -> bytes:
        name = raw.name.encode() if isinstance(raw.name, str) else raw.name
        digest = blake3(raw.payload).digest() if raw.digest is None else raw.digest
        length = len(raw.payload) if raw.length is None else raw.length
        header = struct.pack(
            "<4sHHIIQ32s32s8s",
            raw.kind,
            raw.version,
            raw.flags,
            raw.alignment,
            raw.zero,
            length,
            name,
            digest,
            raw.tail,
        )
        assert len(header) == 96
        nonlocal data
        data = pad(pad(data + header, raw.alignment, raw.gap) + raw.payload, 16, raw.after)
        return header

    for raw in chunks:
        seal.update(add(raw))
    payload = struct.pack(
        "<QQ32s",
        len(chunks) if finish.count is None else finish.count,
        len(data) + 96 + 48 if finish.size is None else finish.size,
        seal.digest() if finish.seal is None else finish.seal,
    )
    add(replace(finish.raw, payload=finish.raw.payload or payload))
    return data + finish.more


def part_json(value: object, **changes: Json) -> bytes:
    return canon.encode({"schema": schema_of(type(value)).describe(), "state": encode(value), **changes})


def part(name: str | bytes = "config", payload: bytes | None = None, **changes: Any) -> Raw:
    return Raw(b"PART", part_json(Config()) if payload is None else payload, name, **changes)


def ramd(memory: bytes, name: str = "ram.0", **changes: Any) -> Raw:
    return Raw(b"RAMD", memory, name, **{"alignment": PAGE, "digest": bytes(32), **changes})


def index(memory: bytes, base: int = 0, size: int | None = None, block: int = BLOCK, codec: int = 0) -> bytes:
    blocks = [(n, memory[n * BLOCK : (n + 1) * BLOCK]) for n in range(-(-len(memory) // BLOCK))]
    present = [(n, block) for n, block in blocks if any(block)]
    head = struct.pack("<QQIIQ", base, len(memory) if size is None else size, block, codec, len(present))
    return head + b"".join(struct.pack("<II", n, 0) + blake3(block).digest() for n, block in present)


def rami(payload: bytes, name: str = "ram.0", **changes: Any) -> Raw:
    return Raw(b"RAMI", payload, name, **changes)


def ram(memory: bytes, base: int = 0, name: str = "ram.0") -> list[Raw]:
    return [ramd(memory, name), rami(index(memory, base), name)]


META = Raw(b"META", canon.encode({"tool": "anyhyve 0"}), "meta", flags=1)
EXTRA = Raw(b"NEW9", b"\0\xff later", "x", version=7, flags=1)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "snapshot"
        path.write_bytes(data)
        return path

    return write


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    """What is written here need not survive this machine."""
    with patch("os.fsync"):
        yield


def save(path: Path, memory: bytes = b"", *, config: object = None) -> None:
    with Writer(path) as writer:
        writer.part("config", config or Config())
        if memory:
            writer.ram("ram.0", 0, memoryview(memory), None)
        writer.commit()


# The writer


def test_the_writer_gives_the_bytes_the_format_says(tmp_path: Path) -> None:
    low = bytes(BLOCK) + b"\1" * 5 + bytes(BLOCK - 5) + bytes(BLOCK) + b"end".rjust(PAGE, b"\0")
    high = bytes(2 * PAGE)
    with Writer(tmp_path / "s") as writer:
        writer.part("config", Config(disk=b"abc"))
        writer.raw_part("cpu.0", schema_of(ConfigV1).describe(), {"cpus": 3})
        writer.ram("ram.0", 0, memoryview(low), None)
        writer.ram("ram.1", 1 << 32, memoryview(high), None)
        writer.meta({"tool": "anyhyve 0"})
        writer.extra(Extra(EXTRA.kind, EXTRA.version, "x", 16, EXTRA.payload))
        writer.extra(Extra(b"PAGE", 1, "y", PAGE, b"paged"))
        writer.commit()
    chunks = [
        part(payload=part_json(Config(disk=b"abc"))),
        part("cpu.0", part_json(ConfigV1(cpus=3))),
        *ram(low),
        *ram(high, 1 << 32, "ram.1"),
        META,
        EXTRA,
        Raw(b"PAGE", b"paged", "y", flags=1, alignment=PAGE),
    ]
    assert (tmp_path / "s").read_bytes() == build(chunks)
    assert os.listdir(tmp_path) == ["s"]
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_zero_blocks_are_holes(tmp_path: Path) -> None:
    memory = mmap.mmap(-1, 16 << 20)
    memory[5 << 20] = 1
    with Writer(tmp_path / "s") as writer:
        writer.part("config", Config())
        writer.ram("ram.0", 0, memoryview(memory), None)
        writer.commit()
    assert (tmp_path / "s").stat().st_blocks * 512 < 256 << 10
    with Reader(tmp_path / "s") as reader:
        assert list(reader.rams[0].blocks) == [80]
        reader.verify_ram()


def test_adjacent_blocks_are_one_write(tmp_path: Path) -> None:
    memory = b"\1" * (32 * BLOCK) + bytes(BLOCK) + b"\1" * BLOCK
    with Writer(tmp_path / "s") as writer, patch("os.pwrite", wraps=os.pwrite) as pwrite:
        writer.part("config", Config())
        pwrite.reset_mock()
        writer.ram("ram.0", 0, memoryview(memory), None)
        assert [len(call.args[1]) for call in pwrite.mock_calls] == [32 * BLOCK, BLOCK, 96]


def test_ram_reads_no_memory_outside_the_extents_and_hashes_none(tmp_path: Path) -> None:
    memory = b"\1" * (8 * BLOCK)
    with Writer(tmp_path / "s") as writer:
        writer.part("config", Config())
        with patch("snapshot.writer.blake3", side_effect=AssertionError("the machine waits")):
            writer.ram(
                "ram.0",
                0,
                memoryview(memory),
                [(5 * BLOCK + 9, 6 * BLOCK + 1), (0, 0), (5 * BLOCK, 5 * BLOCK + 1), (1, 2)],
            )
        writer.commit()
    with Reader(tmp_path / "s") as reader:
        assert list(reader.rams[0].blocks) == [0, 5, 6]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w: w.part("cpu.0", Config()),
        lambda w: (w.part("config", Config()), w.part("config", Config())),
        lambda w: (w.part("config", Config()), w.part("CPU", Config())),
        lambda w: (w.part("config", Config()), w.part("a" * 33, Config())),
        lambda w: (w.part("config", Config()), w.meta(1), w.part("cpu.0", Config())),
        lambda w: (w.part("config", Config()), w.meta(1), w.meta(1)),
        lambda w: (w.part("config", Config()), w.ram("r", 1, memoryview(bytes(PAGE)), None)),
        lambda w: (w.part("config", Config()), w.ram("r", 0, memoryview(bytes(PAGE - 1)), None)),
        lambda w: (w.part("config", Config()), w.ram("r", (1 << 64) - PAGE, memoryview(bytes(2 * PAGE)), None)),
        lambda w: (w.part("config", Config()), w.ram("r", 0, memoryview(bytes(PAGE)), [(0, PAGE + 1)])),
        lambda w: (
            [w.part("config", Config())] + [w.ram(f"r{i}", PAGE * i, memoryview(bytes(2 * PAGE)), None) for i in (0, 1)]
        ),
        lambda w: (w.part("config", Config()), w.extra(Extra(b"PART", 1, "x", 16, b""))),
        lambda w: w.commit(),
        lambda w: (w.part("config", Config()), w.commit(), w.commit()),
        lambda w: (w.part("config", Config()), w.commit(), w.meta(1)),
    ],
)
def test_calls_out_of_order_are_our_fault(tmp_path: Path, wrong: Callable[[Writer], object]) -> None:
    with pytest.raises(AssertionError), Writer(tmp_path / "s") as writer:
        wrong(writer)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w: w.raw_part("config", {}, {}),
        lambda w: w.raw_part("config", schema_of(Config).describe(), {"cpus": 1}),
        lambda w: w.part("config", Config(cpus=1 << 16)),
        lambda w: w.meta(1.5),
        lambda w: (w.part("config", Config()), w.meta("x" * (16 << 20))),
        lambda w: (
            [w.part("config", Config())] + [w.extra(Extra(b"BIG ", 1, f"x{i}", 16, bytes(16 << 20))) for i in range(4)]
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path, wrong: Callable[[Writer], object]) -> None:
    with pytest.raises(SnapshotError), Writer(tmp_path / "s") as writer:
        wrong(writer)
    assert os.listdir(tmp_path) == []


def test_too_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Writer(tmp_path / "s") as writer:
        writer.part("config", Config())
        with monkeypatch.context() as limited:
            limited.setattr("snapshot.writer.MAX_CHUNKS", 2)
            writer.meta(1)
            with pytest.raises(SnapshotError, match="more than 2 chunks"):
                writer.extra(Extra(b"NEW9", 1, "x", 16, b""))
        writer.commit()
    monkeypatch.setattr("snapshot.reader.MAX_CHUNKS", 1)
    with pytest.raises(SnapshotError, match="META meta: more than 1 chunks"):
        Reader(tmp_path / "s")


def test_leaving_without_commit_keeps_the_old_file(tmp_path: Path) -> None:
    save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    with Writer(tmp_path / "s") as writer:
        writer.part("config", Config(cpus=9))
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["s"] and (tmp_path / "s").read_bytes() == before


# Faults and deaths while writing

OPERATIONS = ("pwrite", "preadv", "fsync", "rename")


def every_operation(before: Callable[[str, tuple[Any, ...]], None]) -> Any:
    """Patches of what the writer asks the kernel for; `before` sees each call."""
    wrapped: dict[str, Any] = {}
    for name in OPERATIONS:
        real: Callable[..., Any] = getattr(os, name)

        def call(*args: Any, _name: str = name, _real: Callable[..., Any] = real) -> Any:
            before(_name, args)
            return _real(*args)

        wrapped[name] = call
    return patch.multiple("os", **wrapped)


def save_new(path: Path) -> None:
    with Writer(path) as writer:
        writer.part("config", Config(cpus=2))
        writer.ram("ram.0", 0, memoryview(b"\1" * BLOCK + bytes(BLOCK) + b"\2" * PAGE), None)
        writer.meta("new")
        writer.commit()


def count_operations(folder: Path) -> int:
    seen: list[str] = []
    with every_operation(lambda name, args: seen.append(name)):
        save_new(folder / "counted")
    (folder / "counted").unlink()
    assert set(seen) == set(OPERATIONS)
    return len(seen)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("short", [False, True])
def test_a_fault_at_any_operation_leaves_the_old_file(tmp_path: Path, number: int, short: bool) -> None:
    save(tmp_path / "s", b"\7" * PAGE)
    before = (tmp_path / "s").read_bytes()
    total = count_operations(tmp_path)
    for fatal in range(total):
        left = fatal

        def fail(name: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if left == 0:
                if short and name == "pwrite":
                    fd, data, offset = args
                    os.lseek(fd, offset, os.SEEK_SET)
                    os.write(fd, data[: len(data) // 2])
                raise OSError(number, os.strerror(number))
            left -= 1

        with pytest.raises(OSError) as error, every_operation(fail):
            save_new(tmp_path / "s")
        assert error.value.errno == number
        assert os.listdir(tmp_path) == ["s"]
        if fatal < total - 1:  # the last is the fsync of the folder, when the name is already the new file's
            assert (tmp_path / "s").read_bytes() == before
        else:
            Reader(tmp_path / "s").close()


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path: Path) -> None:
    """The magic last of all writes, then the file synced, then the name given, then the folder synced."""
    seen: list[str] = []

    def note(name: str, args: tuple[Any, ...]) -> None:
        kind = "folder" if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode) else ""
        magic = "magic" if name == "pwrite" and bytes(args[1][:12]) == MAGIC else ""
        seen.append(f"{name} {kind}{magic}".rstrip())

    with every_operation(note):
        save_new(tmp_path / "s")
    assert seen[-4:] == ["pwrite magic", "fsync", "rename", "fsync folder"]
    assert seen.count("pwrite magic") == 1


def test_short_writes_are_continued(tmp_path: Path) -> None:
    real = os.pwrite
    save_new(tmp_path / "whole")
    with patch("os.pwrite", lambda fd, data, offset: real(fd, data[: 1 + len(data) // 3], offset)):
        save_new(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_kill_9_at_any_operation_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    save(tmp_path / "s", b"\7" * PAGE)
    before = (tmp_path / "s").read_bytes()
    save_new(tmp_path / "new")
    after = (tmp_path / "new").read_bytes()
    seen = set()
    for fatal in range(count_operations(tmp_path)):
        left = fatal

        def die(name: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), 9)
            left -= 1

        child = os.fork()
        if child == 0:
            with every_operation(die):
                save_new(tmp_path / "s")
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
        seen.add((tmp_path / "s").read_bytes())
        for temporary in tmp_path.glob(".*.tmp"):
            assert temporary.read_bytes()[:12] != MAGIC or temporary.read_bytes() == after
    assert seen == {before, after}


def test_a_name_has_one_writer(tmp_path: Path) -> None:
    with Writer(tmp_path / "s") as first:
        first.part("config", Config())
        with pytest.raises(OSError, match="another is writing a snapshot of this name") as error:
            Writer(tmp_path / "s")
        assert error.value.errno == errno.EBUSY
        with Writer(tmp_path / "other") as second:
            second.part("config", Config())
            second.commit()
        first.commit()
    save(tmp_path / "s")
    assert sorted(os.listdir(tmp_path)) == ["other", "s"]


def test_many_writers_of_one_name_leave_one_whole_snapshot(tmp_path: Path) -> None:
    """Whoever comes second is refused; no interleaving damages what is there."""
    children = []
    for worker in range(4):
        child = os.fork()
        if child == 0:
            done = 0
            while done < 20:
                with contextlib.suppress(OSError):
                    save(tmp_path / "s", bytes((worker + 1,)) * PAGE)
                    done += 1
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    with Reader(tmp_path / "s") as reader:
        reader.verify_ram()


# Round trips


configs = st.builds(Config, cpus=st.integers(0, 65535), disk=st.binary(max_size=64))
names = st.text("abz09._-", min_size=1, max_size=32).filter(lambda name: name != "config")
jsons = st.recursive(
    st.none() | st.integers(-9, 9) | st.text(max_size=3), lambda i: st.lists(i, max_size=3), max_leaves=5
)


@st.composite
def memories(draw: st.DrawFn) -> bytes:
    """A region of some pages, mostly zero, its non-zero bytes often at the edges of blocks."""
    size = PAGE * draw(st.integers(1, 40))
    memory = bytearray(size)
    for at in draw(st.lists(st.integers(0, size - 1) | st.sampled_from([0, size - 1, BLOCK - 1, BLOCK]), max_size=5)):
        memory[min(at, size - 1)] = draw(st.integers(1, 255))
    return bytes(memory)


@settings(deadline=None, max_examples=60)
@given(
    configs,
    st.dictionaries(names, configs, max_size=3),
    st.lists(st.tuples(memories(), st.integers(0, 3), st.booleans()), max_size=3),
    st.none() | jsons,
    st.lists(
        st.builds(
            Extra, st.sampled_from([b"NEW9", b"a b!"]), st.just(3), names, st.sampled_from([16, PAGE]), st.binary()
        ),
        max_size=2,
    ),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    config: Config,
    others: dict[str, Config],
    regions: list[tuple[bytes, int, bool]],
    meta: Json,
    extras: list[Extra],
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip"
    extras = list({(extra.kind, extra.name): extra for extra in extras}.values())
    bases, top = [], 0
    for memory, gap, _ in regions:
        bases.append(top + gap * PAGE)
        top = bases[-1] + len(memory)
    with Writer(path) as writer:
        for name, value in [("config", config), *others.items()]:
            writer.part(name, value)
        for i, (memory, _, whole) in enumerate(regions):
            touched = [(at, at + 1) for at, byte in enumerate(memory) if byte]
            writer.ram(f"ram.{i}", bases[i], memoryview(memory), None if whole else touched)
        if meta is not None:
            writer.meta(meta)
        for extra in extras:
            writer.extra(extra)
        writer.commit()
    with Reader(path) as reader:
        read = {name: decode_part(value, Config) for name, value in reader.parts.items()}
        assert list(read.items()) == [("config", config), *others.items()]
        assert [(image.name, image.base, image.size) for image in reader.rams] == [
            (f"ram.{i}", base, len(memory)) for i, (base, (memory, _, _)) in enumerate(zip(bases, regions, strict=True))
        ]
        for image, (memory, _, _) in zip(reader.rams, regions, strict=True):
            assert reader.map_ram(image)[:] == memory
        reader.verify_ram()
        assert (reader.meta, list(reader.extras)) == (meta, extras)
        with Writer(path) as writer:  # over the file that is open
            for name, old in reader.parts.items():
                writer.raw_part(name, old.schema, old.state)
            for image in reader.rams:
                writer.ram(
                    image.name,
                    image.base,
                    memoryview(reader.map_ram(image)),
                    [image.span(number) for number in image.blocks],
                )
            if reader.meta is not None:
                writer.meta(reader.meta)
            for extra in reader.extras:
                writer.extra(extra)
            before = path.read_bytes()
            writer.commit()
    assert path.read_bytes() == before


def test_mapped_ram_is_private_and_outlives_the_reader(tmp_path: Path) -> None:
    save(tmp_path / "s", b"\1" * PAGE + bytes(PAGE))
    before = (tmp_path / "s").read_bytes()
    with Reader(tmp_path / "s") as reader:
        memory = reader.map_ram(reader.rams[0])
    save(tmp_path / "s", b"\2" * PAGE)
    save(tmp_path / "s", b"\3" * PAGE)
    memory[5] = 9
    assert memory[:7] == b"\1\1\1\1\1\x09\1" and len(memory) == 2 * PAGE
    assert build([part(), *ram(b"\1" * PAGE + bytes(PAGE))]) == before


# Damage


SMALL_RAM = b"\0\xa5".ljust(PAGE, b"\x11")
SMALL = build([part(), *ram(SMALL_RAM), META, EXTRA])


def test_every_truncation_is_refused(file: Callable[[bytes], Path]) -> None:
    path = file(SMALL)
    Reader(path).close()
    for size in reversed(range(len(SMALL))):
        os.truncate(path, size)
        with pytest.raises(SnapshotError):
            Reader(path)


def test_nothing_may_follow_the_end(file: Callable[[bytes], Path]) -> None:
    for more in (b"\0", b"\0" * 16, SMALL):
        with pytest.raises(SnapshotError, match="END"):
            Reader(file(SMALL + more))


def test_every_flipped_bit_is_found(file: Callable[[bytes], Path]) -> None:
    path = file(SMALL)
    fd = os.open(path, os.O_RDWR)
    with Reader(path) as sound:
        image = sound.rams[0]
        for at, byte in enumerate(SMALL):
            in_ram = image.file_offset <= at < image.file_offset + image.size
            for bit in range(8):
                os.pwrite(fd, bytes([byte ^ 1 << bit]), at)
                try:
                    sound.verify_ram() if in_ram else Reader(path).close()
                except SnapshotError as error:
                    assert not in_ram or "RAMD ram.0: block 0 at address 0x0 does not match" in str(error)
                else:
                    pytest.fail(f"bit {bit} of byte {at:#x}")
            os.pwrite(fd, bytes([byte]), at)
        sound.verify_ram()
    os.close(fd)
    Reader(path).close()


@pytest.mark.parametrize("at", [0, BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 17, 4 * BLOCK - 1, 4 * BLOCK + PAGE - 1])
def test_absent_blocks_must_be_zero(tmp_path: Path, at: int) -> None:
    memory = bytes(BLOCK) + b"\1" * BLOCK + bytes(2 * BLOCK + PAGE)
    with Writer(tmp_path / "s") as writer:
        writer.part("config", Config())
        writer.ram("ram.0", 1 << 32, memoryview(memory), None)
        writer.commit()
    with Reader(tmp_path / "s") as reader, open(tmp_path / "s", "r+b") as damaged:
        reader.verify_ram()
        damaged.seek(reader.rams[0].file_offset + at)
        damaged.write(b"\x40")
        damaged.flush()
        address = (1 << 32) + at // BLOCK * BLOCK
        with pytest.raises(
            SnapshotError, match=f"block {at // BLOCK} at address {address:#x} is absent and must be zero"
        ):
            reader.verify_ram()
        Reader(tmp_path / "s").close()


def test_a_present_block_that_became_a_hole_is_found(tmp_path: Path) -> None:
    save(tmp_path / "s", bytes(BLOCK) + b"\1" * BLOCK + bytes(BLOCK))
    data = (tmp_path / "s").read_bytes()
    with Reader(tmp_path / "s") as reader:
        start = reader.rams[0].file_offset
    with open(tmp_path / "s", "wb") as punched:
        punched.write(data[:start])
        punched.seek(start + 3 * BLOCK)
        punched.write(data[start + 3 * BLOCK :])
    with Reader(tmp_path / "s") as reader, pytest.raises(SnapshotError, match=r"block 1 .* does not match its digest"):
        reader.verify_ram()


# Hostile files, sound in every digest

RAM = ram(b"\1" * (2 * BLOCK))
INDEX = RAM[1].payload
ENTRIES = [INDEX[:32], INDEX[32:72], INDEX[72:112]]
HUGE = 1 << 63
V2 = schema_of(Config).describe()


def schema(**changes: Json) -> list[Raw]:
    return [part(payload=canon.encode({"schema": V2 | changes, "state": encode(Config())}))]


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is cut"),
    "text-mode copy": (SMALL.replace(b"\r\n", b"\n", 1), "bad magic"),
    "foreign": (build([part()], magic=b"\x89PNG"), "bad magic"),
    "major": (SMALL[:12] + b"\2\0" + SMALL[14:], "offset 0xc, file header: format major version 2 is not 1"),
    "header reserved": (build([part()], rest=bytes(15) + b"\1"), "offset 0x10, file header: reserved"),
    "no chunk": (build([]), "offset 0x20, END: the first chunk is not PART config"),
    "no config": (build([part("cpu.0")]), "the first chunk is not PART config"),
    "config later": (build([part("cpu.0"), part()]), "the first chunk is not PART config"),
    "kind not ASCII": (build([part(), Raw(b"NE\n9", b"", "x", flags=1)]), "kind 4e450a39 is not printable ASCII"),
    "flags": (build([part(flags=2)]), "offset 0x20, PART: reserved bits"),
    "flags of optional": (build([part(), replace(EXTRA, flags=0x8001)]), "reserved bits"),
    "reserved word": (build([part(zero=1 << 31)]), "reserved bits"),
    "reserved tail": (build([part(tail=bytes(7) + b"\x80")]), "reserved bits"),
    "optional config": (build([part(flags=1)]), "flags 0x1"),
    "mandatory META": (build([part(), replace(META, flags=0)]), "META meta: flags 0x0"),
    "unknown mandatory": (
        build([part(), replace(EXTRA, flags=0)]),
        "NEW9 x: mandatory chunk of kind and version 7 unknown",
    ),
    "newer PART": (build([part(version=2)]), "PART config: mandatory chunk of kind and version 2 unknown"),
    "newer PART said to be optional": (build([part(version=2, flags=1)]), "mandatory"),
    "alignment of PART": (build([part(alignment=PAGE)]), "alignment 4096"),
    "alignment of RAMD": (build([part(), replace(RAM[0], alignment=16), RAM[1]]), "alignment 16"),
    "alignment 0": (build([part(), EXTRA]).replace(b"NEW9\7\0\1\0\x10", b"NEW9\7\0\1\0\0"), "alignment 0"),
    "alignment of optional": (build([part(), replace(EXTRA, alignment=32)]), "NEW9 x: alignment 32"),
    "empty name": (build([part(), part("")]), "name"),
    "upper case": (build([part(), part("Cpu")]), "name"),
    "name with a hole": (build([part(), part(b"cpu\x000")]), "name"),
    "name of newlines": (build([part(), part(b"a\nb")]), "name"),
    "name not ASCII": (build([part(), part("é")]), "name"),
    "same name": (build([part(), part()]), "PART config: a second chunk"),
    "same optional name": (build([part(), EXTRA, EXTRA]), "a second chunk"),
    "META by another name": (build([part(), replace(META, name="other")]), "the name is not meta"),
    "same RAM name": (build([part(), *RAM, *ram(b"\1" * PAGE, 1 << 32)]), "RAMD ram.0: a second chunk"),
    "PART after RAM": (build([part(), *RAM, part("cpu.0")]), "out of order"),
    "RAM after META": (build([part(), META, *RAM]), "out of order"),
    "PART after unknown": (build([part(), EXTRA, part("cpu.0")]), "out of order"),
    "RAMD alone": (build([part(), RAM[0]]), "RAMD is not followed"),
    "RAMI alone": (build([part(), RAM[1]]), "RAMI has no RAMD"),
    "RAMI of another": (build([part(), RAM[0], replace(RAM[1], name="ram.1")]), "RAMI of its name"),
    "two RAMI": (build([part(), *RAM, replace(RAM[1], name="ram.1")]), "RAMI has no RAMD"),
    "padding before": (build([part(), replace(RAM[0], gap=b"\0\1"), RAM[1]]), "RAMD ram.0: padding"),
    "padding after": (build([part(after=b"\1")]), "PART config: padding"),
    "digest": (build([part(digest=bytes(32))]), "PART config: the payload does not match its digest"),
    "digest of unknown": (build([part(), replace(EXTRA, digest=bytes(32))]), "NEW9 x: the payload does not match"),
    "digest of RAMD": (build([part(), replace(RAM[0], digest=b"\1"), RAM[1]]), "RAM data has a digest"),
    "digest of RAMI": (build([part(), RAM[0], replace(RAM[1], digest=bytes(32))]), "RAMI ram.0: the payload does not"),
    "JSON length": (build([part(length=HUGE)]), "bytes are over 1048576"),
    "JSON past the end": (build([part(length=1 << 20)]), "PART config: the file is cut"),
    "unknown length": (build([part(), replace(EXTRA, length=(1 << 20) + 1)]), "bytes are over 1048576"),
    "RAM length": (build([part(), replace(RAM[0], length=HUGE), RAM[1]]), "bytes are over"),
    "RAM past the end": (build([part(), replace(RAM[0], length=1 << 40), RAM[1]]), "RAMD ram.0: the file is cut"),
    "RAM of nothing": (build([part(), ramd(b""), rami(index(b""))]), "not whole pages"),
    "RAM of half a page": (build([part(), *ram(b"\1" * 2048)]), "not whole pages"),
    "index too long": (build([part(), RAM[0], rami(INDEX + bytes(40))]), "are not an index of"),
    "index of nothing": (build([part(), RAM[0], rami(b"")]), "0 bytes are no index"),
    "index count": (build([part(), RAM[0], rami(INDEX[:24] + b"\1" + INDEX[25:])]), "not an index of 1 blocks"),
    "index count huge": (build([part(), RAM[0], rami(INDEX[:24] + b"\xff" * 8 + INDEX[32:])]), "not an index of"),
    "index size": (build([part(), RAM[0], rami(index(RAM[0].payload, size=BLOCK))]), "it says 65536 bytes"),
    "index block size": (build([part(), RAM[0], rami(index(RAM[0].payload, block=PAGE))]), "block size 4096"),
    "index codec": (build([part(), RAM[0], rami(index(RAM[0].payload, codec=2))]), "codec 2"),
    "index of raw called packed": (build([part(), RAM[0], rami(index(RAM[0].payload, codec=1))]), "stored in 0 bytes"),
    "block twice": (
        build([part(), RAM[0], rami(b"".join([ENTRIES[0], ENTRIES[1], ENTRIES[1]]))]),
        "block 0 is not above 0",
    ),
    "blocks down": (
        build([part(), RAM[0], rami(b"".join([ENTRIES[0], ENTRIES[2], ENTRIES[1]]))]),
        "block 0 is not above 1",
    ),
    "block outside": (
        build([part(), RAM[0], rami(INDEX[:72] + b"\2" + INDEX[73:])]),
        "block 2 is not above 0, or past",
    ),
    "block reserved": (build([part(), RAM[0], rami(INDEX[:36] + b"\1" + INDEX[37:])]), "reserved bytes"),
    "RAM off a page": (build([part(), *ram(b"\1" * PAGE, 1)]), "RAM at 0x1 "),
    "RAM past 2^64": (build([part(), *ram(b"\1" * PAGE * 2, 2**64 - PAGE)]), "goes past 2^64"),
    "RAM overlaps": (
        build([part(), *ram(b"\1" * PAGE * 2), *ram(b"\1" * PAGE, PAGE, "ram.1")]),
        "below the end of ram.0",
    ),
    "RAM unsorted": (
        build([part(), *ram(b"\1" * PAGE, PAGE), *ram(b"\1" * PAGE, 0, "ram.1")]),
        "below the end of ram.0",
    ),
    "END version": (build([part()], Finish(raw=Raw(b"END ", b"", version=2))), "END: mandatory"),
    "END optional": (build([part()], Finish(raw=Raw(b"END ", b"", flags=1))), "END: flags"),
    "END name": (build([part()], Finish(raw=Raw(b"END ", b"", "end"))), "END has a name"),
    "END digest": (build([part()], Finish(raw=Raw(b"END ", b"", digest=bytes(32)))), "END: the payload does not match"),
    "END longer": (build([part()], Finish(raw=Raw(b"END ", bytes(64)))), "END: length 64 is not 48"),
    "END count": (build([part()], Finish(count=2)), "END: it counts 2 chunks, there are 1"),
    "END size": (build([part()], Finish(size=7)), "END says 7"),
    "END seal": (build([part()], Finish(seal=bytes(32))), "END: the headers do not match"),
    "not JSON": (build([part(payload=b"{")]), "PART config: not JSON"),
    "no JSON": (build([part(payload=b"")]), "PART config: not JSON"),
    "JSON not canonical": (build([part(payload=part_json(Config()) + b"\n")]), "not in canonical form"),
    "JSON float": (build([part(payload=b'{"schema":1.0}')]), "not an integer: 1.0"),
    "META not JSON": (build([part(), replace(META, payload=b"x")]), "META meta: not JSON"),
    "part not an object": (build([part(payload=b"[]")]), "exactly schema and state"),
    "part with more": (build([part(payload=part_json(Config(), more=1))]), "exactly schema and state"),
    "schema not an object": (build([part(payload=part_json(Config(), schema=[]))]), "schema is not an object"),
    "schema with more": (build(schema(more=1)), "schema is not an object of exactly"),
    "schema name": (build(schema(name=1)), "name and doc are not text"),
    "schema doc": (build(schema(doc=None)), "name and doc are not text"),
    "schema version": (build(schema(version=True)), "version is not a positive integer"),
    "schema version zero": (build(schema(version=0)), "version is not a positive integer"),
    "schema fields": (build(schema(fields={})), "fields are not a list"),
    "schema field": (build(schema(fields=["cpus"])), "field is not an object"),
    "schema field name": (build(schema(fields=[{"name": [], "type": "u7", "doc": ""}])), "field name and doc"),
    "schema field doc": (build(schema(fields=[{"name": "a", "type": "u7", "doc": 1}])), "field name and doc"),
    "schema field twice": (build(schema(fields=[{"name": "a", "type": "u7", "doc": ""}] * 2)), "a field twice"),
    "state without schema": (build(schema(fields=[])), "exactly the fields of the schema"),
    "state not an object": (build([part(payload=part_json(Config(), state=[]))]), "exactly the fields of the schema"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(file: Callable[[bytes], Path], case: str) -> None:
    data, rule = HOSTILE[case]
    path = file(data)
    files_open = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotError) as error:
            Reader(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert rule in message and "\n" not in message and message.startswith("offset 0x")
    assert len(os.listdir("/proc/self/fd")) == files_open


def test_a_sparse_file_of_a_tebibyte_costs_nothing(tmp_path: Path) -> None:
    """One page of bytes claims a terabyte of RAM and an index of all of it, both holes."""
    head = build([part()])[: -96 - 48]
    size, count = 1 << 40, (1 << 40) // BLOCK
    header = struct.Struct("<4sHHIIQ32s32s8s")
    with open(tmp_path / "s", "wb") as sparse:
        sparse.write(head + header.pack(b"RAMD", 1, 0, PAGE, 0, size, b"ram.0", b"", b""))
        end = PAGE + size
        sparse.seek(end)
        sparse.write(header.pack(b"RAMI", 1, 0, 16, 0, 32 + 40 * count, b"ram.0", b"", b""))
        sparse.write(struct.pack("<QQIIQ", 0, size, BLOCK, 0, count))
        seal = blake3(head + header.pack(b"RAMD", 1, 0, PAGE, 0, size, b"ram.0", b"", b""))
        assert len(head) < PAGE
        sparse.seek(end + 96 + 32 + 40 * count)
        payload = struct.pack("<QQ32s", 3, sparse.tell() + 96 + 48, seal.digest())
        sparse.write(header.pack(b"END ", 1, 0, 16, 0, 48, b"", blake3(payload).digest(), b"") + payload)
    tracemalloc.start()
    try:
        with pytest.raises(SnapshotError):
            Reader(tmp_path / "s")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_ram_over_the_limit(file: Callable[[bytes], Path]) -> None:
    path = file(build([part(), *ram(b"\1" * PAGE), *ram(bytes(PAGE), PAGE, "ram.1")]))
    Reader(path, max_ram=2 * PAGE).close()
    with pytest.raises(SnapshotError, match=r"RAMI ram\.1: RAM of 4096 bytes and before is over the limit of 8191"):
        Reader(path, max_ram=2 * PAGE - 1)


def test_a_later_minor_and_a_later_meta_are_accepted(file: Callable[[bytes], Path]) -> None:
    meta = replace(META, version=2, name="other", payload=b"not JSON")
    with Reader(file(build([part(), EXTRA, meta, META], minor=9))) as reader:
        assert reader.meta == {"tool": "anyhyve 0"}
        assert reader.extras == (
            Extra(b"NEW9", 7, "x", 16, EXTRA.payload),
            Extra(b"META", 2, "other", 16, b"not JSON"),
        )


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(SnapshotError, match="not a regular file"):
            Reader(path)
    with pytest.raises(FileNotFoundError):
        Reader(tmp_path / "none")


# Parts


def as_part(value: object, **changes: Json) -> Part:
    described = json.loads(json.dumps(schema_of(type(value)).describe()))
    return Part("config", described | changes, encode(value))


def test_decode_part_upgrades() -> None:
    assert decode_part(as_part(ConfigV1(cpus=3)), Config) == Config(cpus=3)
    assert decode_part(as_part(Config(cpus=300)), Config) == Config(cpus=300)


def test_decode_part_allows_other_doc_lines() -> None:
    fields: Json = [{"name": "cpus", "type": "u7", "doc": "the number of CPUs"}]
    assert decode_part(as_part(ConfigV1(), doc="reworded", fields=fields), Config) == Config()


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ([["cpus", "u8"], ["disk", {"bytes_max": 64}]], "field cpus is declared otherwise in"),
        ([["cpus", "u16"], ["disk", {"bytes_max": 65}]], "field disk is declared otherwise in"),
        ([["cpus", "u16"]], "there is one field more, disk, in"),
        ([["disk", {"bytes_max": 64}]], "there is one field more, cpus, in"),
        ([["cpus", "u16"], ["disk", {"bytes_max": 64}], ["tape", "u7"]], "there is no field tape in"),
        ([["tape", "u7"], ["cpus", "u16"], ["disk", {"bytes_max": 64}]], "there is no field tape in"),
        ([["disk", {"bytes_max": 64}], ["cpus", "u16"]], "field disk is declared otherwise in"),
    ],
)
def test_decode_part_refuses_another_meaning_of_a_known_version(fields: list[list[Json]], how: str) -> None:
    described: Json = [{"name": name, "type": kind, "doc": ""} for name, kind in fields]
    expected = f"^part config: test.container.config version 2: {how} this program$"
    with pytest.raises(SnapshotError, match=expected):
        decode_part(as_part(Config(), fields=described), Config)


def test_decode_part_refuses_the_unknown() -> None:
    with pytest.raises(SnapshotError, match=r"part config: .* version 9 is not known here"):
        decode_part(as_part(Config(), version=9), Config)
    with pytest.raises(SnapshotError, match=r"part config: other: expected a test\.container\.config"):
        decode_part(as_part(Config(), name="other"), Config)


def test_digests_are_blake3_and_nothing_else() -> None:
    """The official test vector of the empty input, so that a swapped hash function cannot pass unseen."""
    assert blake3(b"").hexdigest() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert hashlib.blake2s(b"").hexdigest() != blake3(b"").hexdigest()


def test_a_file_another_process_put_in_place_is_left_alone(tmp_path):
    """A fork finished it; by now somebody else writes under the temporary's name."""
    path = tmp_path / "cut"
    with Writer(path) as writer:
        assert not writer.in_place
        (temporary,) = tmp_path.iterdir()
        temporary.rename(path)  # as the fork does
        assert writer.in_place
        with Writer(path, force=True) as other:
            writer.__exit__(None, None, None)
            assert temporary.exists() and not other.in_place
    assert [file.name for file in tmp_path.iterdir()] == ["cut"]
