"""The initial RAM disk of the emulated computer: this project and the Python it runs on, all where they are here.

Taken are the interpreter and its standard library, the distributions that `anyhyve[test]` needs, the assembler the
tests use, and every shared library those ask for. Modules are compiled beforehand: compiling them there, on an emulated
processor, takes longer than the tests.
"""

from __future__ import annotations

import importlib.metadata
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from vmm.guest.newc import Archive

ROOT = Path(__file__).parents[2]
TOOLS = ("as", "ld", "nm", "objcopy")
_PROJECT = ("anyhyve", "snapshot", "vmm", "emu", "kvmbackend", "tests", "fixtures", "bench", "pyproject.toml")
_LIBRARY_SKIPS = {"test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "site-packages", "dist-packages",
                  "turtledemo", "__pycache__"}  # fmt: skip


class Image:
    """Files by their absolute path; the folders and links on the way to them come by themselves."""

    def __init__(self) -> None:
        self.archive = Archive()
        self._there: set[str] = set()

    def data(self, path: str, content: bytes, mode: int = 0o644) -> None:
        if name := self._claim(path):
            self.archive.file(name, content, mode)

    def link(self, path: str, target: str) -> None:
        if name := self._claim(path):
            self.archive.symlink(name, target)

    def file(self, path: Path, at: str | None = None) -> None:
        """A file with what it needs: a link's target, a program's libraries, a module's compiled form."""
        if path.is_symlink() and at is None:
            self.link(str(path), os.readlink(path))
            self.file(Path(os.path.normpath(path.parent / os.readlink(path))))
            return
        name = self._claim(at or str(path))
        if name is None or path.is_dir():
            return
        content = path.read_bytes()
        self.archive.file(name, content, 0o755 if os.access(path, os.X_OK) else 0o644)
        if path.suffix == ".py":
            self._compiled(path)
        elif content[:4] == b"\x7fELF":
            for library in _libraries(path):
                self.file(library)

    def tree(self, folder: Path, skip: Iterable[str] = ("__pycache__",)) -> None:
        for base, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if name not in skip)
            for name in sorted(files):
                self.file(Path(base, name))

    def folder(self, path: str) -> str:
        """Make a folder; where it really is, if a link leads to it."""
        real = "/"
        for part in Path(path).parts[1:]:
            here = os.path.join(real, part)
            if os.path.islink(here):
                target = os.readlink(here)
                if here not in self._there:
                    self.archive.symlink(here.lstrip("/"), target)
                real = self.folder(os.path.normpath(os.path.join(real, target)))
            else:
                if here not in self._there:
                    self.archive.directory(here.lstrip("/"))
                real = here
            self._there.add(here)
        return real

    def _claim(self, path: str) -> str | None:
        """The name in the archive for `path`; None when it is there already."""
        real = os.path.join(self.folder(os.path.dirname(path)), os.path.basename(path))
        if real in self._there:
            return None
        self._there.add(real)
        return real.lstrip("/")

    def _compiled(self, path: Path) -> None:
        with tempfile.NamedTemporaryFile() as scratch:
            try:
                # Unchecked: the archive keeps no times to check against.
                mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
                py_compile.compile(str(path), scratch.name, str(path), doraise=True, invalidation_mode=mode)
            except py_compile.PyCompileError:
                return
            name = f"{path.stem}.{sys.implementation.cache_tag}.pyc"
            self.data(str(path.parent / "__pycache__" / name), Path(scratch.name).read_bytes())


def build(modules: dict[str, bytes], command: str, extra: Iterable[Path] = ()) -> bytes:
    """The whole archive. `modules` are kernel modules by name; `command` is a shell script, run as root."""
    image = Image()
    for folder in ("/proc", "/sys", "/dev", "/tmp", "/root", "/etc"):
        image.folder(folder)
    image.archive.character_device("dev/console", 5, 1)
    image.archive.character_device("dev/null", 1, 3, 0o666)
    image.file(_tool("busybox"), "/bin/busybox")
    image.link("/bin/sh", "busybox")
    for name, content in modules.items():
        image.data(f"/modules/{name}", content)
    image.data("/lane/command", command.encode())
    image.data("/init", (Path(__file__).parent / "init").read_bytes(), 0o755)
    _python(image)
    for tool in TOOLS:
        if found := shutil.which(tool):
            image.file(Path(found))
    for scripts in Path("/usr/lib").glob("*/ldscripts"):
        image.tree(scripts)
    for name in _PROJECT:
        path = ROOT / name
        image.tree(path) if path.is_dir() else image.file(path)
    for path in extra:
        image.file(path)
    return bytes(image.archive)


def _python(image: Image) -> None:
    image.file(Path(os.path.realpath(sys.executable)))
    for name in ("python", "python3", "pyvenv.cfg"):
        path = Path(sys.prefix, "bin", name) if name != "pyvenv.cfg" else Path(sys.prefix, name)
        if path.exists():
            image.file(path)
    for kind in ("stdlib", "platstdlib"):
        image.tree(Path(sysconfig.get_path(kind, vars=_base())), _LIBRARY_SKIPS)
    for path in _distributions("anyhyve", {"test"}):
        image.file(path)


def _base() -> dict[str, str]:
    return {"base": sys.base_prefix, "platbase": sys.base_exec_prefix, "installed_base": sys.base_prefix,
            "installed_platbase": sys.base_exec_prefix}  # fmt: skip


def _distributions(name: str, extras: set[str]) -> Iterator[Path]:
    """The files of a distribution and of all that it requires."""
    waiting, done = [(name, extras)], set()
    while waiting:
        name, extras = waiting.pop()
        if name in done:
            continue
        done.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on other systems only
        for file in distribution.files or ():
            path = Path(str(file.locate()))
            if path.is_file() and path.suffix != ".pyc" and "bin" not in file.parts[:4]:
                yield Path(os.path.normpath(path))
        for requirement in distribution.requires or ():
            wanted = re.match(r"[\w.-]+", requirement)
            marker = re.search(r"extra\s*==\s*['\"](\w+)['\"]", requirement)
            if wanted and (marker is None or marker[1] in extras):
                waiting.append((re.sub(r"[-_.]+", "-", wanted[0]).lower(), set()))


def _libraries(path: Path) -> list[Path]:
    found = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
    return [Path(word) for word in found.split() if word.startswith("/")]


def _tool(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"lane: {name} is not here (Debian: {name}-static)")
    return Path(found)
