"""A Debian guest to try: kernel and busybox by `apt-get download`, made into vmlinuz, vmlinux and initrd.img.

Nothing is installed and no root is needed; packages are opened here (deb(5): ar around a tar).
Linux Documentation/arch/x86/boot.rst for the kernel's payload.

Absent: payloads packed with lzo, lzma or bzip2.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lz4.block
import zstandard

from vmm.errors import GuestError
from vmm.guest.newc import Archive

# Each depends on the kernel package of the day. The first that the package lists know is taken: Debian, then Ubuntu.
KERNELS = ("linux-image-cloud-amd64", "linux-image-amd64", "linux-image-virtual", "linux-image-generic")
BUSYBOX = "busybox-static"

DEFAULT_INIT = """\
#!/bin/sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin 2>/dev/null
export PATH=/bin HOME=/root TERM=vt100 PS1='# '
cd /root
echo 'anyhyve: shell ready'
setsid cttyhack sh
poweroff -f
"""

_STAMP = ".anyhyve-guest"
_RECIPE = "1"  # changes when the same packages and init would give other files
_OUTPUTS = ("vmlinuz", "vmlinux", "initrd.img")
_MAX_KERNEL = 1 << 30
_APT_TIMEOUT_S = 1800
_LZ4, _LZ4_BLOCK = b"\x02\x21\x4c\x18", 8 << 20


def _silent(message: str) -> None:
    pass


def fetch(folder: Path, init: str | None = None, progress: Callable[[str], None] = _silent) -> None:
    """Make folder/vmlinuz, folder/vmlinux and folder/initrd.img; does nothing where they are there. GuestError."""
    script = DEFAULT_INIT if init is None else init
    stamp = hashlib.sha256(f"{_RECIPE}\n{script}".encode()).hexdigest()
    try:
        if all((folder / name).is_file() for name in _OUTPUTS) and _stamp_of(folder) == stamp:
            return
        with tempfile.TemporaryDirectory(prefix="anyhyve-") as scratch:
            kernel_deb, busybox_deb = _download(Path(scratch), progress)
            progress("unpacking the kernel")
            vmlinuz = _member(kernel_deb, "boot/vmlinuz-*")
            busybox = _member(busybox_deb, "bin/busybox", "usr/bin/busybox")
        made = dict(zip(_OUTPUTS, (vmlinuz, extract_vmlinux(vmlinuz), make_initrd(busybox, script)), strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _STAMP).unlink(missing_ok=True)
        for name, data in made.items():
            _replace(folder / name, data)
        _replace(folder / _STAMP, f"{stamp}\n".encode())
    except OSError as error:
        raise GuestError(f"{error.filename or folder}: {error.strerror or error}") from None


def kernel_files(
    folder: Path, patterns: Sequence[str], progress: Callable[[str], None] = _silent, *,
    kernels: Sequence[str] = KERNELS,
) -> None:  # fmt: skip
    """Make in `folder` the files of the kernel's package that fit `patterns`, unpacked; a kernel as `vmlinuz`. The
    package is the one of the day that the first known of `kernels` depends on. Does nothing where they are there.
    Raises GuestError."""
    of = () if kernels is KERNELS else tuple(kernels)
    stamp = hashlib.sha256("\n".join((_RECIPE, *of, *patterns)).encode()).hexdigest()
    try:
        if _stamp_of(folder) == stamp:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _STAMP).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="anyhyve-") as scratch:
            package = _download_kernel(Path(scratch), progress, kernels)
            for name, content in _members(package, patterns):
                name, content = _unpack_module(Path(name).name, content)
                _replace(folder / ("vmlinuz" if name.startswith("vmlinuz") else name), content)
        _replace(folder / _STAMP, f"{stamp}\n".encode())
    except OSError as error:
        raise GuestError(f"{error.filename or folder}: {error.strerror or error}") from None


def _unpack_module(name: str, content: bytes) -> tuple[str, bytes]:
    """A kernel module as insmod of busybox takes it."""
    if name.endswith(".ko.xz"):
        return name[:-3], lzma.decompress(content)
    if name.endswith(".ko.zst"):
        return name[:-4], zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return name, content


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage (boot.rst: payload_offset, payload_length). Raises GuestError."""
    if len(bzimage) < 0x250 or bzimage[0x202:0x206] != b"HdrS":
        raise GuestError("the kernel is not a bzImage")
    (version,) = struct.unpack_from("<H", bzimage, 0x206)
    if version < 0x208:
        raise GuestError("the bzImage does not say where its payload is (boot protocol 2.08 is needed)")
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = ((bzimage[0x1F1] or 4) + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if not length or len(payload) != length:
        raise GuestError("the bzImage is cut short")
    vmlinux = _unpack(payload)
    if vmlinux[:4] != b"\x7fELF":
        raise GuestError("the bzImage's payload is not an ELF kernel")
    return vmlinux


def make_initrd(busybox: bytes, init: str) -> bytes:
    """An initial RAM disk of busybox and the script `init`. The same arguments give the same bytes."""
    if not init.startswith("#!"):
        raise GuestError("the init script does not begin with #!, the kernel could not run it")
    archive = Archive()
    for name in ("bin", "dev", "proc", "sys", "etc"):
        archive.directory(name)
    archive.directory("tmp", 0o1777)
    archive.directory("root", 0o700)
    archive.file("bin/busybox", busybox, 0o755)
    archive.symlink("bin/sh", "busybox")
    archive.character_device("dev/console", 5, 1)  # the kernel opens it for /init before devtmpfs is there
    archive.character_device("dev/ttyS0", 4, 64)
    archive.character_device("dev/null", 1, 3, 0o666)
    archive.file("init", init.encode(), 0o755)
    return gzip.compress(bytes(archive), 9, mtime=0)


# --- the kernel's payload


def _unpack(payload: bytes) -> bytes:
    try:
        if payload.startswith(b"\x1f\x8b"):
            stream = zlib.decompressobj(31)
            data, done = stream.decompress(payload, _MAX_KERNEL), stream.eof
        elif payload.startswith(b"\xfd7zXZ\0"):
            xz = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            data, done = xz.decompress(payload, _MAX_KERNEL), xz.eof
        elif payload.startswith(b"\x28\xb5\x2f\xfd"):
            zstd = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            data = zstd.decompress(payload)
            done = zstd.eof
        elif payload.startswith(_LZ4):
            data, done = _unlz4(payload)
        else:
            raise GuestError(f"the kernel is packed with {_packer(payload)}: gzip, xz, zstd and lz4 are known here")
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise GuestError(f"the kernel's payload is damaged: {error}") from None
    if not done:
        raise GuestError("the kernel's payload is cut short")
    return data


def _unlz4(payload: bytes) -> tuple[bytes, bool]:
    """LZ4's legacy frame, which Linux packs with: blocks of at most 8 MiB, and behind them the kernel's size."""
    at, blocks, total = len(_LZ4), [], 0
    while at + 8 <= len(payload) and total <= _MAX_KERNEL:
        (length,) = struct.unpack_from("<I", payload, at)
        at += 4 + length
        if length == 0 or at > len(payload):
            break
        blocks.append(lz4.block.decompress(payload[at - length : at], uncompressed_size=_LZ4_BLOCK))
        total += len(blocks[-1])
    return b"".join(blocks), payload[at:] == struct.pack("<I", total & 0xFFFFFFFF)


def _packer(payload: bytes) -> str:
    known = {b"\x89LZO": "lzo", b"BZh": "bzip2", b"\x5d\0\0": "lzma"}
    return next((name for magic, name in known.items() if payload.startswith(magic)), "an unknown method")


# --- packages


def _download(scratch: Path, progress: Callable[[str], None]) -> tuple[Path, Path]:
    """The kernel's and busybox's packages as files in `scratch`."""
    kernel = _download_kernel(scratch, progress, KERNELS)
    progress(f"downloading {BUSYBOX}")
    (busybox,) = download(scratch / BUSYBOX, BUSYBOX + _suffix(scratch)[0])
    return kernel, busybox


def _download_kernel(scratch: Path, progress: Callable[[str], None], kernels: Sequence[str]) -> Path:
    for tool in ("apt-get", "apt-cache"):
        if shutil.which(tool) is None:
            raise GuestError(f"{tool} is not on this machine: a Debian guest can be fetched on Debian or Ubuntu only")
    progress("looking for a kernel")
    suffix, host = _suffix(scratch)
    kernel = _newest_kernel(scratch, suffix, host, kernels)
    progress(f"downloading {kernel}")
    (package,) = download(scratch / kernel, kernel + suffix)
    return package


def _suffix(scratch: Path) -> tuple[str, str]:
    """What makes a package's name mean the amd64 one, and the host's architecture."""
    host = _run(["apt-config", "dump", "--format", "%v", "APT::Architecture"], scratch).stdout.strip()
    return "" if host == "amd64" else ":amd64", host


def _newest_kernel(scratch: Path, suffix: str, host: str, kernels: Sequence[str]) -> str:
    for name in kernels:
        depends = _run(["apt-cache", "depends", "--no-recommends", "--no-suggests", name + suffix], scratch).stdout
        if found := re.search(r"Depends: (linux-image-[0-9][^\s:]*)", depends):
            return found[1]
    # indextargets names only the lists that are here
    lists = ["apt-get", "indextargets", "--format", "$(FILENAME)", "Created-By: Packages"]
    if not _run(lists, scratch).stdout.strip():
        raise GuestError("apt's package lists are empty: run apt-get update")
    if suffix:
        raise GuestError(f"apt knows no amd64 kernel on this {host} machine: "
                         "run dpkg --add-architecture amd64 and apt-get update")  # fmt: skip
    raise GuestError(f"apt's package lists have none of {', '.join(kernels)}: run apt-get update")


def download(folder: Path, *packages: str) -> list[Path]:
    """Make `folder`, with Debian's packages of these names in it, by apt. Raises GuestError."""
    folder.mkdir()
    command = ["apt-get", "download", "-qq", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=30"]
    if os.geteuid() == 0:
        command += ["-o", "APT::Sandbox::User=root"]  # its own user could not write to our folder, and it says so
    done = _run([*command, *packages], folder)
    found = sorted(folder.glob("*.deb"))
    if done.returncode or len(found) < len(packages):
        raise GuestError(f"apt-get could not download {', '.join(packages)}: {_reason(done.stderr)}")
    return found


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=folder, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=_APT_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise GuestError(f"{command[0]} did not end in {_APT_TIMEOUT_S} s") from None


def _reason(stderr: str) -> str:
    """What apt says first is the cause; an old list is the commonest."""
    errors = [line[3:].strip() for line in stderr.splitlines() if line.startswith("E: ")]
    reason = errors[0] if errors else "it gives no reason"
    stale = "404" in reason or "Unable to locate" in reason or "Can't find a source" in reason
    return f"{reason} (run apt-get update)" if stale else reason


def _member(deb: Path, *patterns: str) -> bytes:
    """The first plain file of a package whose name fits."""
    for _, content in _members(deb, patterns):
        return content
    raise GuestError(f"{deb.name} has no {patterns[0]}")


def _members(deb: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each plain file of a package whose name fits."""
    try:
        with tarfile.open(fileobj=_data_tar(deb.read_bytes()), mode="r|") as tar:
            for entry in tar:
                name = entry.name.removeprefix("./")
                if entry.isfile() and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    content = tar.extractfile(entry)
                    assert content is not None
                    yield name, content.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise GuestError(f"{deb.name} is damaged: {error}") from None


def _data_tar(deb: bytes) -> io.BufferedIOBase:
    """The tar of a package's files, unpacked as it is read: deb(5), ar(5)."""
    at = 8 if deb.startswith(b"!<arch>\n") else len(deb)
    while at + 60 <= len(deb):
        name = deb[at : at + 16].decode("latin-1").strip().rstrip("/")
        length = deb[at + 48 : at + 58].strip()
        if not length.isdigit():
            break
        start = at + 60
        data = io.BytesIO(deb[start : start + int(length)])
        match name:
            case "data.tar":
                return data
            case "data.tar.gz":
                return gzip.GzipFile(fileobj=data)
            case "data.tar.xz":
                return lzma.LZMAFile(data)
            case "data.tar.zst":
                return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(data))
        at = start + int(length) + int(length) % 2
    raise tarfile.ReadError("no data.tar in it that is known here")


# --- files


def _stamp_of(folder: Path) -> str:
    try:
        return (folder / _STAMP).read_text().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def _replace(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    fresh = path.with_name(f".{path.name}.part")
    fresh.write_bytes(data)
    fresh.replace(path)
