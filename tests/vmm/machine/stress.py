"""stress-ng, from Debian's packages, as a piece of an initial RAM disk: real programs that check what they compute."""

from __future__ import annotations

import gzip
import re
import subprocess
from pathlib import Path

import pytest

from vmm.errors import GuestError
from vmm.guest.debian import download
from vmm.guest.newc import Archive

# What its libraries are in; those that a newer one needs besides are named when they are missed.
PACKAGES = [
    "stress-ng", "libapparmor1", "libbsd0", "libmd0", "libc6", "libcrypt1", "libegl1", "libglvnd0", "libgles2",
    "libgbm1", "libdrm2", "libexpat1", "libwayland-server0", "libffi8", "libxcb-randr0", "libxcb1", "libxau6",
    "libxdmcp6", "libipsec-mb1", "libjpeg62-turbo", "libjudydebian1", "libkmod2", "liblzma5", "libzstd1",
    "libssl3", "libsctp1", "libxxhash0", "zlib1g",
]  # fmt: skip


def archive(folder: Path) -> bytes:
    """A cpio archive with /stress/stress-ng and /stress/lib, to be put behind a guest's initial RAM disk. Skips the
    test where the packages cannot be had."""
    try:
        for package in download(folder, *PACKAGES):
            subprocess.run(["dpkg-deb", "--extract", package, folder / "root"], check=True)
        found = _with_libraries(folder / "root")
    except (GuestError, FileNotFoundError) as error:
        pytest.skip(f"stress-ng cannot be had: {error}")
    packed = Archive()
    for directory in ("stress", "stress/lib"):
        packed.directory(directory)
    for name, path in found.items():
        place = "stress" if name == "stress-ng" else "stress/lib"
        packed.file(f"{place}/{name}", path.read_bytes(), 0o755)
    return gzip.compress(bytes(packed), 1)  # one that is not packed would have to lie at a multiple of four


def _with_libraries(root: Path) -> dict[str, Path]:
    """The program and all libraries it is linked with, by name."""
    there = {path.name: path for path in root.rglob("*.so*")}
    found = {"stress-ng": root / "usr" / "bin" / "stress-ng"}
    todo = list(found.values())
    while todo:
        needed = subprocess.run(["readelf", "--dynamic", todo.pop()], capture_output=True, text=True, check=True).stdout
        for name in re.findall(r"\(NEEDED\).*\[(.*)\]", needed):
            if name not in found:
                assert name in there, f"{name} is in none of PACKAGES"
                found[name] = there[name]
                todo.append(there[name])
    return found
