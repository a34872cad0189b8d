"""Hostile snapshots: valid ones, mutated by structure and by byte, through reader, verifier and a whole restore.

    python -m tests.snapshot.hostile COUNT SEED

prints one JSON object and exits 0 when every file was either refused with SnapshotError or gave a machine that ran.
Half of the files have their digests made right again, so that the checks behind them are reached.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from snapshot import canon, verify
from snapshot.chain import Chain
from snapshot.errors import SnapshotError
from vmm.errors import BackendError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig

MEMORY = (1 << 20) + (128 << 10)
MAX_MEMORY = 4 << 20
HANG_S = 30

# Touches memory, ports and the clock for ever: in al, 0x61; out 0x80, al; rdtsc; mov [0x90000], rax; jmp
PROGRAM = bytes.fromhex("e461 e680 0f31 4889042500000900 ebf0".replace(" ", ""))


@dataclass(frozen=True)
class Raw:
    """A chunk as it will be written; the digest is worked out unless it is given."""

    kind: bytes
    version: int
    flags: int
    alignment: int
    zero: int
    name: bytes
    payload: bytes
    length: int | None = None
    digest: bytes | None = None
    tail: bytes = b""
    gap: bytes = b""


@dataclass(frozen=True)
class File:
    header: bytes
    chunks: list[Raw] = field(default_factory=list)

    @classmethod
    def parse(cls, data: bytes) -> File:
        chunks, at = [], 32
        while at < len(data):
            kind, version, flags, alignment, zero, length, name, digest, _ = struct.unpack_from(
                "<4sHHIIQ32s32s8s", data, at
            )
            start = -(-(at + 96) // alignment) * alignment
            payload = data[start : start + length]
            keep = digest if kind == b"RAMD" else None
            chunks.append(Raw(kind, version, flags, alignment, zero, name.rstrip(b"\0"), payload, digest=keep))
            at = -(-(start + length) // 16) * 16
        return cls(data[:32], chunks)

    def build(self) -> bytes:
        """With all digests, and what END says, made right; END itself is made anew unless it was mutated."""
        data, seal = self.header, blake3(self.header)
        for raw in self.chunks:
            if raw.kind == b"END " and raw.flags == 0 and not raw.tail:
                payload = struct.pack("<QQ32s", len(self.chunks) - 1, len(data) + 96 + 48, seal.digest())
                raw = replace(raw, payload=payload, digest=None)
            digest = blake3(raw.payload).digest() if raw.digest is None else raw.digest
            length = len(raw.payload) if raw.length is None else raw.length
            head = struct.pack(
                "<4sHHIIQ32s32s8s",
                raw.kind, raw.version & 0xFFFF, raw.flags & 0xFFFF, raw.alignment & 0xFFFFFFFF, raw.zero & 0xFFFFFFFF,
                length & (1 << 64) - 1, raw.name, digest, raw.tail,
            )  # fmt: skip
            seal.update(head)
            data += head
            align = raw.alignment if 0 < raw.alignment <= 1 << 16 else 16
            data += raw.gap[: -len(data) % align].ljust(-len(data) % align, b"\0") + raw.payload
            if raw.kind != b"END ":
                data += bytes(-len(data) % 16)
        return data


NUMBERS = (
    0,
    1,
    2,
    3,
    15,
    16,
    0xFF,
    0xFFF,
    4095,
    4096,
    65535,
    65536,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)
WORDS = ("", "u8", "u64", "bool", "config", "a" * 300, "\n", "é", "[red]", "../x", "00", "x" * 5000, "interrupt")


class Mutator:
    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def number(self) -> int:
        dice = self.dice
        return dice.choice(NUMBERS) + dice.choice((-1, 0, 0, 1)) if dice.random() < 0.8 else dice.getrandbits(64)

    def value(self, depth: int = 0) -> Any:
        dice = self.dice
        match dice.randrange(8):
            case 0:
                return None
            case 1:
                return dice.random() < 0.5
            case 2 | 3:
                return max(-(1 << 63), min((1 << 64) - 1, self.number()))
            case 4 | 5:
                return dice.choice(WORDS)
            case 6:
                return [self.value(depth + 1) for _ in range(dice.randrange(3))] if depth < 3 else []
            case _:
                return {dice.choice(WORDS): self.value(depth + 1)} if depth < 3 else {}

    def json(self, value: Any) -> Any:
        """Something changed somewhere in it."""
        dice = self.dice
        places: list[tuple[Any, Any]] = []
        if not isinstance(value, dict | list):
            return self.value()

        def walk(node: Any) -> None:
            for key, item in node.items() if isinstance(node, dict) else enumerate(node):
                places.append((node, key))
                if isinstance(item, dict | list):
                    walk(item)

        value = copy.deepcopy(value)
        walk(value)
        if not places or dice.random() < 0.02:
            return self.value()
        node, key = dice.choice(places)
        match dice.randrange(10):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[dice.choice(WORDS)] = node.pop(key)
            case 2 if isinstance(node, list):
                node.insert(key, copy.deepcopy(node[key]))
            case 3:
                deep: Any = node[key]
                for _ in range(dice.choice((1, 40, 5000))):
                    deep = [deep]
                node[key] = deep
            case 4 if type(node[key]) is int:
                node[key] ^= 1 << dice.randrange(64)
            case _:
                node[key] = self.value()
        return value

    def state(self, part: Any) -> Any:
        """A part whose state says something else, often within its types."""
        dice = self.dice
        part = copy.deepcopy(part)
        for _ in range(dice.choice((1, 1, 2, 5))):
            node: Any = part["state"]
            while True:
                keys = list(node) if isinstance(node, dict) else range(len(node))
                if not keys:
                    break
                key = dice.choice(list(keys))
                item = node[key]
                if isinstance(item, dict | list) and dice.random() < 0.9:
                    node = item
                    continue
                if type(item) is bool:
                    node[key] = not item
                elif type(item) is int:
                    width = dice.choice((1, 2, 4, 8, 16, 32, 63))
                    node[key] = dice.choice((item ^ 1 << dice.randrange(width), dice.getrandbits(width), item + 1))
                elif isinstance(item, str) and item and all(c in "0123456789abcdef" for c in item):
                    at = dice.randrange(len(item))
                    node[key] = item[:at] + dice.choice("0123456789abcdef") + item[at + 1 :]
                else:
                    node[key] = self.value()
                break
        return part

    def index(self, payload: bytes) -> bytes:
        dice, data = self.dice, bytearray(payload)
        if dice.random() < 0.5 or len(data) <= 32:
            at, size = dice.choice(((0, 8), (8, 8), (16, 4), (20, 4), (24, 8)))
        else:
            entry = 32 + 40 * dice.randrange((len(data) - 32) // 40)
            at, size = dice.choice(((entry, 4), (entry + 4, 4), (entry + 8, 8)))
            if dice.random() < 0.2:
                del data[entry : entry + 40]
                return bytes(data)
            if dice.random() < 0.2:
                data[entry:entry] = data[entry : entry + 40]
                return bytes(data)
        data[at : at + size] = (self.number() & (1 << 8 * size) - 1).to_bytes(size, "little")
        return bytes(data)

    def noise(self, data: bytes) -> bytes:
        dice, changed = self.dice, bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 8))):
            at = dice.randrange(len(changed) + 1)
            match dice.randrange(5):
                case 0 | 1 if at < len(changed):
                    changed[at] ^= 1 << dice.randrange(8)
                case 2:
                    del changed[at : at + dice.choice((1, 4, 16, 4096))]
                case 3:
                    changed[at:at] = dice.randbytes(dice.choice((1, 4, 16, 300)))
                case _:
                    del changed[at:]
        return bytes(changed)

    def chunk(self, raw: Raw) -> Raw:
        dice = self.dice
        if raw.kind in (b"PART", b"BASE", b"META") and dice.random() < 0.75:
            try:
                value = canon.decode(raw.payload)
            except SnapshotError:  # mutated before
                return replace(raw, payload=self.noise(raw.payload))
            whole = isinstance(value, dict) and isinstance(value.get("state"), dict)
            value = self.state(value) if whole and dice.random() < 0.6 else self.json(value)
            try:
                return replace(raw, payload=canon.encode(value))
            except (SnapshotError, RecursionError, ValueError):
                return replace(raw, payload=_deep_json(value))
        if raw.kind == b"RAMI" and dice.random() < 0.8:
            return replace(raw, payload=self.index(raw.payload))
        match dice.randrange(9):
            case 0:
                return replace(raw, version=self.number() & 0xFFFF)
            case 1:
                return replace(raw, flags=1 << dice.randrange(16))
            case 2:
                return replace(raw, alignment=dice.choice((0, 1, 16, 4096, 8192, 65536, 1 << 31)))
            case 3:
                return replace(raw, zero=1 << dice.randrange(32))
            case 4:
                return replace(raw, name=dice.choice((b"", b"a" * 32, b"x\0y", b"\xff", b"config", b"ram.0", b"PART")))
            case 5:
                return replace(raw, length=self.number() & (1 << 64) - 1)
            case 6:
                return replace(
                    raw, kind=dice.choice((b"PART", b"RAMD", b"RAMI", b"META", b"BASE", b"END ", b"NEW9", b"\0\0\0\0"))
                )
            case 7:
                return replace(raw, tail=dice.randbytes(8), gap=dice.randbytes(1))
            case _:
                return replace(raw, payload=self.noise(raw.payload))

    def file(self, file: File) -> bytes:
        dice, chunks, header = self.dice, list(file.chunks), file.header
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            at = dice.randrange(len(chunks))
            match dice.randrange(20):
                case 0:
                    del chunks[at]
                    chunks = chunks or list(file.chunks)
                case 1:
                    chunks.insert(at, dice.choice(chunks))
                case 2:
                    other = dice.randrange(len(chunks))
                    chunks[at], chunks[other] = chunks[other], chunks[at]
                case 3:
                    header = self.noise(header)[:32].ljust(32, b"\0")
                case _:
                    chunks[at] = self.chunk(chunks[at])
        return File(header, chunks).build()


def _deep_json(value: Any) -> bytes:
    """JSON our own encoder refuses: too deep, too large, not ASCII."""
    try:
        return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    except (RecursionError, ValueError, TypeError):
        return b"[" * 100_000 + b"]" * 100_000


def originals(folder: Path) -> list[Path]:
    """A machine stored raw, packed, and as a difference."""
    image = Image(PROGRAM, flat=True)
    with Machine.boot(MachineConfig(memory_bytes=MEMORY), image) as machine:
        machine.run(position=10_000)
        machine.save(folder / "raw")
        machine.save(folder / "packed", packed=True)
        machine.run(position=20_000)
        machine.save(folder / "difference", parent=folder / "raw")
    return [folder / name for name in ("raw", "packed", "difference")]


def outcome(path: Path) -> str:
    """What became of one file. Raises whatever is neither a refusal nor a machine that runs."""
    try:
        with Chain(path, max_ram=MAX_MEMORY) as chain:
            chain.verify_ram()
        read = "good"
    except SnapshotError:
        read = "bad"
    try:
        verify.verify(path)
        verified = "good"
    except verify.Bad:
        verified = "bad"
    except verify.CannotTell:
        verified = "bad" if read == "bad" else "cannot tell"  # a parent that is not there
    if read != verified and not _only_too_large(path, read):
        raise AssertionError(f"the reader says {read}, the verifier {verified}")
    try:
        with Machine.restore(path, max_memory=MAX_MEMORY, verify=read == "bad") as machine:
            if read == "bad":
                raise AssertionError("a file the reader refuses was woken")
            machine.run(position=machine.position + 3_000)
        return "ran"
    except SnapshotError:
        return "refused" if read == "bad" else "refused by the machine"
    except BackendError as error:
        if str(error).startswith("cpu."):
            return "refused by the CPU"
        raise


def _only_too_large(path: Path, read: str) -> bool:
    """The verifier has no limit of its own on RAM."""
    if read == "good":
        return False
    try:
        with Chain(path) as chain:
            chain.verify_ram()
        return True
    except SnapshotError:
        return False


def main(count: int, seed: int) -> int:
    os.fsync = lambda fd: None  # what is written here need not survive this computer
    outcomes: Counter[str] = Counter()
    slowest, grown = (0.0, -1), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = originals(folder)
        parsed = [File.parse(file.read_bytes()) for file in files]
        for file, whole in zip(files, parsed, strict=True):
            assert whole.build() == file.read_bytes(), "the mutator can write what it read"
        target = folder / "mutated"
        for i in range(count):
            dice = random.Random(f"{seed}/{i}")
            mutator = Mutator(dice)
            which = dice.randrange(len(files))
            rightly = i % 2 == 0
            data = mutator.file(parsed[which]) if rightly else mutator.noise(files[which].read_bytes())
            target.write_bytes(data)
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            started = time.perf_counter()
            try:
                outcomes[("structure: " if rightly else "bytes: ") + outcome(target)] += 1
            except BaseException:
                print(f"seed {seed}, file {i}", file=sys.stderr)
                (Path("hostile.snapshot")).write_bytes(data)
                raise
            faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, (time.perf_counter() - started, i))
            if i == min(200, count // 2):
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown
    print(json.dumps({"files": count, "outcomes": outcomes, "slowest_s": slowest[0], "grown_kib": grown}))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
