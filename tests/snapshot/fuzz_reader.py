"""Coverage-guided fuzzing of the reader with Atheris: `python -m tests.snapshot.fuzz_reader [options of libFuzzer's]`.

Whatever the bytes, opening them is SnapshotError or a snapshot whose RAM can be verified and mapped.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["snapshot"]):
    from snapshot.chain import Chain
    from snapshot.errors import SnapshotError

TARGET = Path(tempfile.mkdtemp()) / "snapshot"
MAX_RAM = 4 << 20


def one(data: bytes) -> None:
    TARGET.write_bytes(data)
    try:
        with Chain(TARGET, max_ram=MAX_RAM) as chain:
            chain.verify_ram()
            for i in range(len(chain.rams)):
                chain.map_ram(i).close()
    except SnapshotError as error:
        assert "\n" not in str(error)


def main() -> None:
    seeds = Path(tempfile.mkdtemp())
    from tests.snapshot.test_format_doc import example

    (seeds / "example").write_bytes(example())
    atheris.Setup([*sys.argv, os.fspath(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
