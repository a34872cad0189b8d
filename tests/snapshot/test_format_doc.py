"""docs/snapshot-format.md: its worked dump is what the writer writes today, and its tables are what the code says."""

import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from snapshot import container
from snapshot.field_types import OneOf, u8
from snapshot.reader import Reader
from snapshot.schema import state
from snapshot.writer import Writer
from tests.conftest import ROOT

DOC = ROOT / "docs" / "snapshot-format.md"


@state("example.config", version=1)
class ExampleConfig:
    """What the machine is made of."""

    board: Annotated[str, OneOf(("pc",))] = "pc"
    cpus: Annotated[u8, "how many CPUs"] = 1


def example() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example"
        memory = bytearray(128 << 10)
        memory[0x10000:0x10008] = b"anyhyve!"
        with Writer(path) as writer:
            writer.part("config", ExampleConfig())
            writer.ram("ram.0", 0, memoryview(memory), None)
            writer.meta({"tool": "anyhyve"})
            writer.commit()
        with Reader(path) as reader:
            reader.verify_ram()
        return path.read_bytes()


def hex_lines(data: bytes, start: int, end: int) -> Iterator[str]:
    """Lines in the manner of `hexdump -C`."""
    last = None
    starred = False
    for at in range(start, end, 16):
        line = data[at : min(at + 16, end)]
        if line == last and at + 16 < end:
            if not starred:
                yield "*"
            starred = True
            continue
        last, starred = line, False
        text = "".join(chr(byte) if 0x20 <= byte <= 0x7E else "." for byte in line)
        digits = f"{line[:8].hex(' ')}  {line[8:].hex(' ')}"
        yield f"{at:08x}  {digits:<49} |{text}|"


def dump(data: bytes) -> str:
    """The file, each part of it under a line that says what it is."""
    lines = ["file header", *hex_lines(data, 0, 32)]
    offset = 32
    while offset < len(data):
        kind, _, _, alignment, _, length, name = struct.unpack_from("<4sHHIIQ32s", data, offset)
        title = f"{kind.decode()} {name.rstrip(bytes(1)).decode()}".rstrip()
        payload = -(-(offset + 96) // alignment) * alignment
        end, following = payload + length, -(-(payload + length) // 16) * 16
        lines += ["", f"{title}: header", *hex_lines(data, offset, offset + 96)]
        if payload > offset + 96:
            lines += [f"{title}: padding", *hex_lines(data, offset + 96, payload)]
        lines += [f"{title}: payload, {length} bytes", *hex_lines(data, payload, end)]
        if following > end:
            lines += [f"{title}: padding", *hex_lines(data, end, following)]
        offset = following
    return "\n".join(lines)


def test_the_dump_is_what_the_writer_writes() -> None:
    found = re.search(r"<!-- dump -->\n```\n(.*)\n```\n<!-- end of dump -->", DOC.read_text(), re.DOTALL)
    assert found and found[1] == dump(example())


def test_the_dump_can_be_read_back() -> None:
    """From the digits on the page alone, so that nothing is hidden between them."""
    data = bytearray()
    for line in dump(example()).splitlines():
        if found := re.match(r"([0-9a-f]{8})  ([0-9a-f ]{49}) \|", line):
            while len(data) < int(found[1], 16):  # lines a * stands for
                data += data[-16:]
            data += bytes.fromhex(found[2])
    assert data == example()


def test_the_tables_are_the_code() -> None:
    text = DOC.read_text()
    assert container.MAGIC.hex(" ").upper() in text
    kinds = re.findall(r"^\| `(....)` \| (\d) \| (yes|no) \| (\d+) \|", text, re.MULTILINE)
    assert {kind.encode(): (int(v), o == "yes", int(a)) for kind, v, o, a in kinds} == {
        kind: (known.version, bool(known.flags), known.alignment) for kind, known in container.KINDS.items()
    }


def test_versions_are_stated() -> None:
    assert f"version {container.MAJOR}.{container.MINOR}\n" in DOC.read_text()


if __name__ == "__main__":
    print(dump(example()))
