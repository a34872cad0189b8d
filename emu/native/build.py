"""Assemble the machine code: `python -m emu.native.build` writes x86_64.py out of x86_64.S.

Needs as, ld, objcopy and nm (Debian: binutils). What the source names in capitals is defined here.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from emu import engine
from vmm import clock
from vmm.clock import Word
from vmm.cpu.model import PHYS_BITS

_HERE = Path(__file__).parent
SOURCE, ASSEMBLED = _HERE / "x86_64.S", _HERE / "x86_64.py"
_WIDTH = 96  # hexadecimal digits in a line


def symbols() -> dict[str, int]:
    """What the source may name."""
    return {
        **{f"ENV_{name.upper()}": offset for name, offset in engine._ENV.items()},
        **{f"UC_{name.upper()}": offset for name, offset in engine._UC_PAGES.items()},
        **{f"WORD_{word.name}": 8 * word for word in Word},
        "TLB_ADDR_CODE": 0x10,
        "CPU_CFLAGS_NEXT_TB": engine._CPU_CFLAGS_NEXT_TB - engine._CPU_TO_ENV,  # from the CPUX86State
        "RF": engine.RF,
        "VM": 1 << 17,  # RFLAGS
        "HF_GUEST": engine.HF_GUEST,
        "HF_LMA": engine.HF_LMA,
        "HF_SS32": 1 << 5,
        "HF_CS64": 1 << 15,
        "HF_INHIBIT_IRQ": engine.HF_INHIBIT_IRQ,
        "PHYS_BITS": PHYS_BITS,
        "MOST_DELIVERIES": engine.MOST_DELIVERIES,
        "RDTSC_NS": clock.RDTSC_NS,
        "BYTES_PER_NS": clock.BYTES_PER_NS,
    }


def assemble(source: Path = SOURCE) -> tuple[bytes, dict[str, int]]:
    """The code and where in it the global symbols are. Raises FileNotFoundError without an assembler, and
    subprocess.CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> str:
            return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout

        defined = [f"--defsym={name}={value}" for name, value in symbols().items()]
        run("as", "--64", *defined, "-o", "code.o", str(source.resolve()))
        run("ld", "-Ttext=0", "-e", "0", "-o", "code.elf", "code.o")
        run("objcopy", "-O", "binary", "-j", ".text", "code.elf", "code.bin")
        names = [line.split() for line in run("nm", "code.elf").splitlines()]
        return (Path(folder) / "code.bin").read_bytes(), {name: int(at, 16) for at, kind, name in names if kind == "T"}


def module(code: bytes, places: dict[str, int]) -> str:
    """The text of the module that holds it."""
    digits = code.hex()
    lines = [digits[at : at + _WIDTH] for at in range(0, len(digits), _WIDTH)]
    return "\n".join(
        [
            '"""Made by emu.native.build out of x86_64.S."""',
            "",
            "# fmt: off",
            "CODE = bytes.fromhex(",
            *(f'    "{line}"' for line in lines),
            ")",
            "PLACES = {",
            *(f'    "{name}": {at:#x},' for name, at in sorted(places.items(), key=lambda place: place[1])),
            "}",
            "",
        ]
    )


if __name__ == "__main__":
    ASSEMBLED.write_text(module(*assemble()))
