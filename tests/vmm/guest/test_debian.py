"""The Debian guest: packages, the kernel's payload (boot.rst), the initial RAM disk. apt is played by a script."""

import gzip
import io
import lzma
import os
import struct
import tarfile
from collections.abc import Callable

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.guest.test_newc import entries
from vmm.errors import GuestError
from vmm.guest import debian as guest
from vmm.guest.debian import extract_vmlinux, fetch, make_initrd

VMLINUX = b"\x7fELF" + bytes(range(256)) * 40
OUTPUTS = ("vmlinuz", "vmlinux", "initrd.img")

PACKERS = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "zstd": zstandard.ZstdCompressor(level=22).compress,
}


def lz4_legacy(data: bytes, block: int = 8 << 20) -> bytes:
    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), block):
        piece = lz4.block.compress(data[at : at + block], store_size=False)
        packed += struct.pack("<I", len(piece)) + piece
    return packed + struct.pack("<I", len(data))


def bzimage(payload: bytes, setup_sectors: int = 3, offset: int = 0x40, version: int = 0x20F) -> bytes:
    header = bytearray(((setup_sectors or 4) + 1) * 512)
    header[0x1F1] = setup_sectors
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, version)
    struct.pack_into("<II", header, 0x248, offset, len(payload))
    return bytes(header) + bytes(offset) + payload + b"after the payload"


# --- extract_vmlinux


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("setup_sectors", [0, 3, 39])  # boot.rst, setup_sects: 0 means 4
def test_payload(packer, setup_sectors):
    payload = PACKERS[packer](VMLINUX)
    assert extract_vmlinux(bzimage(payload, setup_sectors)) == VMLINUX
    with_size = payload + struct.pack("<I", len(VMLINUX))  # the kernel's build appends it
    assert extract_vmlinux(bzimage(with_size, setup_sectors)) == VMLINUX


@pytest.mark.parametrize("size", [len(VMLINUX), (8 << 20) + 1, 16 << 20])
def test_payload_lz4(size):
    vmlinux = (VMLINUX * (size // len(VMLINUX) + 1))[:size]
    assert extract_vmlinux(bzimage(lz4_legacy(vmlinux))) == vmlinux


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"\x7fELF" + bytes(0x300), "not a bzImage"),
        (b"", "not a bzImage"),
        (bzimage(b"x", version=0x207), "protocol 2.08"),
        (bzimage(b""), "cut short"),
        (bzimage(gzip.compress(VMLINUX))[:-100], "cut short"),
        (bzimage(gzip.compress(VMLINUX)[:-30]), "cut short"),
        (bzimage(lzma.compress(VMLINUX)[:-30]), "cut short"),
        (bzimage(PACKERS["zstd"](VMLINUX)[:-10]), "cut short"),
        (bzimage(gzip.compress(b"MZ no elf")), "not an ELF"),
        (bzimage(lz4_legacy(VMLINUX)[:-4]), "cut short"),
        (bzimage(lz4_legacy(VMLINUX)[:-9]), "cut short"),
        (bzimage(lz4_legacy(VMLINUX * 900, 1 << 20)[:200]), "cut short"),
        (bzimage(b"\x02\x21\x4c\x18" + bytes(40)), "cut short"),
        (bzimage(b"\x02\x21\x4c\x18\x10\0\0\0" + b"\xff" * 40), "damaged"),
        (bzimage(b"\x89LZO" + bytes(40)), "packed with lzo"),
        (bzimage(b"what is this"), "an unknown method"),
        (bzimage(gzip.compress(VMLINUX)[:-8] + bytes(8)), "damaged"),  # CRC32, RFC 1952, 2.3
        (bzimage(lzma.compress(VMLINUX)[:20] + b"\xff" * 40), "damaged"),
        (bzimage(PACKERS["zstd"](VMLINUX)[:8] + b"\xff" * 40), "damaged"),
    ],
)
def test_no_payload(image, words):
    with pytest.raises(GuestError, match=words) as caught:
        extract_vmlinux(image)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=2000), st.sampled_from(sorted(PACKERS)), st.integers(0, 700))
def test_any_image_is_a_kernel_or_a_guest_error(noise, packer, at):
    image = bytearray(bzimage(PACKERS[packer](VMLINUX[:300])))
    image[at + 0x1F0 : at + 0x1F0 + len(noise)] = noise
    try:
        assert extract_vmlinux(bytes(image)).startswith(b"\x7fELF")
    except GuestError as error:
        assert "\n" not in str(error)


# --- make_initrd


def test_initrd():
    image = make_initrd(b"BUSYBOX", "#!/bin/sh\n")
    found = {e.name: e for e in entries(gzip.decompress(image))}
    modes = {name: f"{e.mode:o}" for name, e in found.items()}
    assert modes == {
        **dict.fromkeys(("bin", "dev", "proc", "sys", "etc"), "40755"),
        "tmp": "41777", "root": "40700", "bin/busybox": "100755", "bin/sh": "120777", "init": "100755",
        "dev/console": "20600", "dev/ttyS0": "20600", "dev/null": "20666",
    }  # fmt: skip
    assert found["bin/busybox"].data == b"BUSYBOX"
    assert found["bin/sh"].data == b"busybox"
    assert found["init"].data == b"#!/bin/sh\n"
    # Linux Documentation/admin-guide/devices.txt
    assert [found[f"dev/{n}"].device for n in ("console", "ttyS0", "null")] == [(5, 1), (4, 64), (1, 3)]
    assert image[4:8] == bytes(4), "gzip's time stamp (RFC 1952, 2.3) is the host's"
    assert image == make_initrd(b"BUSYBOX", "#!/bin/sh\n")


def test_default_init_says_when_it_is_ready():
    assert "anyhyve: shell ready" in guest.DEFAULT_INIT
    make_initrd(b"", guest.DEFAULT_INIT)


def test_init_needs_an_interpreter():
    with pytest.raises(GuestError, match="#!"):
        make_initrd(b"", "echo hello\n")


# --- fetch


def deb(files: dict[str, bytes], packing: str = "xz") -> bytes:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as out:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    packers: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress, "xz": lzma.compress, "zst": PACKERS["zstd"], "": bytes,
    }  # fmt: skip
    pack = packers[packing]
    whole = b"!<arch>\n"
    data_name = f"data.tar.{packing}".rstrip(".")
    for name, data in (("debian-binary", b"2.0\n"), ("control.tar", b"odd"), (data_name, pack(tar.getvalue()))):
        whole += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return whole


KERNEL_DEB = deb({"boot/System.map-6": b"no", "boot/vmlinuz-6": bzimage(lzma.compress(VMLINUX))})
BUSYBOX_DEB = deb({"bin/busybox": b"BUSYBOX"}, "gz")

APT = """\
#!/bin/sh
case "${0##*/} $*" in
"apt-config "*) echo "$ARCH" ;;
"apt-cache depends"*linux-image-cloud-amd64*) [ -z "$KNOWN" ] || printf '%s\\n  Depends: %s\\n' meta "$KNOWN" ;;
"apt-get indextargets"*) echo "$LISTS" ;;
"apt-get download"*)
    echo "$*" >>"$STORE/log"
    if [ -n "$FAULT" ]; then echo "$FAULT" >&2; exit 100; fi
    for last; do :; done
    cp "$STORE/${last%%:*}.deb" . ;;
esac
"""


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A machine with an apt of ours; the folder its packages come from."""
    tools, store = tmp_path / "tools", tmp_path / "store"
    tools.mkdir()
    store.mkdir()
    for name in ("apt-get", "apt-cache", "apt-config"):
        (tools / name).write_text(APT)
        (tools / name).chmod(0o755)
    (store / "linux-image-6.1.0-9-cloud-amd64.deb").write_bytes(KERNEL_DEB)
    (store / "busybox-static.deb").write_bytes(BUSYBOX_DEB)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    for name, value in {
        "STORE": str(store), "ARCH": "amd64", "LISTS": "a list", "FAULT": "",
        "KNOWN": "linux-image-6.1.0-9-cloud-amd64",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return store


def downloads(store) -> list[str]:
    log = store / "log"
    return [line.split()[-1] for line in log.read_text().splitlines()] if log.exists() else []


def refusal(folder) -> str:
    with pytest.raises(GuestError) as caught:
        fetch(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fetch(apt, tmp_path):
    said: list[str] = []
    folder = tmp_path / "deep" / "guest"
    fetch(folder, progress=said.append)
    assert downloads(apt) == ["linux-image-6.1.0-9-cloud-amd64", "busybox-static"]
    assert (folder / "vmlinux").read_bytes() == VMLINUX
    assert extract_vmlinux((folder / "vmlinuz").read_bytes()) == VMLINUX
    assert (folder / "initrd.img").read_bytes() == make_initrd(b"BUSYBOX", guest.DEFAULT_INIT)
    assert "downloading busybox-static" in said


def test_fetch_again_only_when_something_is_other(apt, tmp_path):
    folder = tmp_path / "guest"
    fetch(folder)
    fetch(folder, guest.DEFAULT_INIT)
    assert len(downloads(apt)) == 2
    fetch(folder, "#!/bin/sh\necho mine\n")
    assert len(downloads(apt)) == 4
    assert b"echo mine" in gzip.decompress((folder / "initrd.img").read_bytes())
    fetch(folder, "#!/bin/sh\necho mine\n")
    assert len(downloads(apt)) == 4
    for name in OUTPUTS:
        (folder / name).unlink()
        fetch(folder, "#!/bin/sh\necho mine\n")
        assert (folder / name).exists()
    assert len(downloads(apt)) == 10


@pytest.mark.parametrize("packing", ["", "gz", "xz", "zst"])
def test_package_packings(apt, tmp_path, packing):
    """deb(5): data.tar, .gz, .xz; dpkg 1.21.18: .zst. busybox moves to /usr/bin with the merged /usr."""
    (apt / "busybox-static.deb").write_bytes(deb({"usr/bin/busybox": b"MOVED"}, packing))
    fetch(tmp_path / "guest")
    assert b"MOVED" in gzip.decompress((tmp_path / "guest" / "initrd.img").read_bytes())


@pytest.mark.parametrize(
    ("package", "words"),
    [
        (b"", "damaged"),
        (b"<html>", "damaged"),
        (BUSYBOX_DEB[:-40], "damaged"),
        (BUSYBOX_DEB[:120] + b"\xff" * 60 + BUSYBOX_DEB[180:], "damaged"),
        (deb({"bin/other": b""}), "has no bin/busybox"),
    ],
)
def test_bad_package(apt, tmp_path, package, words):
    (apt / "busybox-static.deb").write_bytes(package)
    assert words in refusal(tmp_path / "guest")


def test_a_failed_fetch_leaves_the_last_guest(apt, tmp_path, monkeypatch):
    folder = tmp_path / "guest"
    fetch(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (apt / "linux-image-6.1.0-9-cloud-amd64.deb").write_bytes(deb({"boot/vmlinuz-7": bzimage(b"\x89LZO")}))
    with pytest.raises(GuestError, match="lzo"):
        fetch(folder, "#!/bin/sh\n")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_no_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(tmp_path / "guest").startswith("apt-get is not on this machine: ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"KNOWN": "", "LISTS": ""}, "package lists are empty: run apt-get update"),
        ({"KNOWN": ""}, "have none of linux-image-cloud-amd64"),
        ({"KNOWN": "", "ARCH": "arm64"}, "arm64 machine: run dpkg --add-architecture amd64"),
        ({"FAULT": "E: Failed to fetch http://x  Could not resolve 'x'\nE: More"}, "download linux-image-6.1.0-9-cloud-"
         "amd64: Failed to fetch http://x  Could not resolve 'x'"),
        ({"FAULT": "E: Failed to fetch http://x  404  Not Found"}, "(run apt-get update)"),
        ({"FAULT": "E: Unable to locate package busybox-static"}, "(run apt-get update)"),
        ({"FAULT": "killed"}, "no reason"),
    ],
)  # fmt: skip
def test_faults_of_apt(apt, tmp_path, monkeypatch, settings, words):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert words in refusal(tmp_path / "guest")
    assert not (tmp_path / "guest").exists()


def test_another_architecture_asks_for_amd64_packages(apt, tmp_path, monkeypatch):
    monkeypatch.setenv("ARCH", "arm64")
    fetch(tmp_path / "guest")
    assert downloads(apt) == ["linux-image-6.1.0-9-cloud-amd64:amd64", "busybox-static:amd64"]


def test_a_folder_that_cannot_be(apt, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refusal(tmp_path / "file" / "guest")


@pytest.mark.debian
def test_a_real_kernel(debian):
    vmlinuz = (debian / "vmlinuz").read_bytes()
    assert extract_vmlinux(vmlinuz) == (debian / "vmlinux").read_bytes()
