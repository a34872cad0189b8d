"""What a machine was booted from, told by a snapshot of it: names and digests, and the command line. The files
themselves are not in there; a woken machine that is to start again looks for them, and takes none but these."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from snapshot.field_types import Json
from snapshot.files import read_file
from vmm.errors import BackendError, RequestError
from vmm.guest.image import Image

KEY = "boot"  # in META
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BootFile:
    """A kernel or an initrd: its name without a folder, size in bytes, BLAKE3 in hexadecimal."""

    name: str
    size: int
    blake3: str

    @classmethod
    def of(cls, name: str, data: bytes) -> BootFile:
        return cls(name, len(data), blake3(data).hexdigest())

    @classmethod
    def from_json(cls, given: Any) -> BootFile:
        """Raises ValueError, LookupError, TypeError for what is none."""
        name, size, digest = given["name"], given["size"], given["blake3"]
        if not isinstance(name, str) or Path(name).name != name or type(size) is not int or size < 0:
            raise ValueError
        if not _DIGEST.fullmatch(digest):
            raise ValueError
        return cls(name, size, digest)

    @property
    def kept(self) -> str:
        """The name under which `keep` puts it."""
        return f"boot-{self.blake3[:16]}"

    def find(self, folders: Iterable[Path]) -> bytes | None:
        """Its bytes, from the first of the folders that has it."""
        for folder in folders:
            for name in (self.kept, self.name):
                with suppress(OSError):  # it is not there
                    if name and (path := folder / name).stat().st_size == self.size:
                        data = read_file(path)
                        if BootFile.of(self.name, data) == self:
                            return data
        return None

    def __str__(self) -> str:
        return f"{self.name or 'a file without a name'} ({self.size} bytes, BLAKE3 {self.blake3[:16]}...)"


@dataclass(frozen=True)
class Origin:
    """The files of an Image, and the rest of it."""

    kernel: BootFile
    initrd: BootFile | None
    append: str
    flat: bool

    @classmethod
    def of(cls, image: Image) -> Origin:
        kernel, initrd = image.names
        ramdisk = BootFile.of(initrd, image.initrd) if image.initrd else None
        return cls(BootFile.of(kernel, image.kernel), ramdisk, image.cmdline, image.flat)

    @classmethod
    def from_meta(cls, meta: Json) -> Origin | None:
        """From what META has; None where it says nothing, or nothing sensible: it is no part of the machine."""
        try:
            given: Any = meta[KEY]  # type: ignore[index, call-overload]
            kernel, initrd = given["kernel"], given["initrd"]
            if not isinstance(given["append"], str) or not isinstance(given["flat"], bool):
                return None
            ramdisk = None if initrd is None else BootFile.from_json(initrd)
            return cls(BootFile.from_json(kernel), ramdisk, given["append"], given["flat"])
        except (LookupError, TypeError, ValueError):
            return None

    def to_json(self) -> Json:
        """As META has it."""
        initrd = None if self.initrd is None else vars(self.initrd)
        return {"kernel": dict(vars(self.kernel)), "initrd": initrd and dict(initrd), "append": self.append,
                "flat": self.flat}  # fmt: skip

    def find(self, folders: Iterable[Path]) -> Image:
        """The image again. Raises RequestError, naming the file that is in none of the folders."""
        places, found = list(folders), []
        for file in (self.kernel, self.initrd):
            data = b"" if file is None else file.find(places)
            if data is None:
                where = " nor ".join(map(str, places))
                raise RequestError(
                    f"to start again it needs {file}, which is neither given (--kernel, --initrd) nor in {where}"
                )
            found.append(data)
        names = self.kernel.name, "" if self.initrd is None else self.initrd.name
        return Image(found[0], found[1], self.append, self.flat, names)


def keep(image: Image, folder: Path) -> None:
    """Put kernel and initrd into a folder, where a machine woken from a snapshot in it finds them. Files that are there
    stay. Raises BackendError when they cannot be written."""
    origin = Origin.of(image)
    for file, data in ((origin.kernel, image.kernel), (origin.initrd, image.initrd)):
        if file is None or file.find([folder]) is not None:
            continue
        path = folder / file.kept
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            try:
                with open(new, "xb", opener=_ours_alone) as file_of_ours:
                    file_of_ours.write(data)
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)
        except OSError as error:
            raise BackendError(f"cannot keep {file.name} at {path}: {error.strerror}") from None


def _ours_alone(path: str, flags: int) -> int:
    """As a snapshot is: an initial RAM disk may hold what is nobody else's business."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
