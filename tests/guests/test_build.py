"""The own guest's image is what its source builds."""

import shutil
import subprocess
from pathlib import Path

import capstone
import pytest

OWN = Path(__file__).parent.parent.parent / "fixtures" / "guests" / "own"


def test_rebuilt_image_is_equal(tmp_path):
    for tool in ("as", "ld"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine (Debian: apt-get install binutils)")
    if b"x86_64" not in subprocess.run(["ld", "-V"], capture_output=True, check=True).stdout:
        pytest.skip("the binutils of this machine do not build x86-64 code")
    subprocess.run([OWN / "build.sh", tmp_path], check=True)
    assert (tmp_path / "own.bin").read_bytes() == (OWN / "own.bin").read_bytes(), "run fixtures/guests/own/build.sh"


def test_image_fits_its_mapping():
    """The kernel maps IMAGE_PAGES = 4 pages of itself; the user program is the last page."""
    size = (OWN / "own.bin").stat().st_size
    assert size <= 4 * 4096 and size % 4096 == 0


def instructions(code: bytes, base: int) -> list[str]:
    return [i.mnemonic for i in capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(code, base)]


def test_what_the_guest_exercises():
    """The cut tests are worth what the guest does: it must not lose these."""
    image = (OWN / "own.bin").read_bytes()
    user = set(instructions(image[-4096:], 0x40000000))
    assert user >= {
        "rep stosq", "rep movsb", "repe cmpsq", "repne scasb", "lodsq", "std", "loop", "div", "idiv", "lock cmpxchg",
        "mulps", "addps", "xorps", "pshufd", "cvtdq2ps", "cvtps2dq", "sqrtps", "ldmxcsr",
        "fild", "fsqrt", "faddp", "fstp", "fldcw", "ud2", "syscall", "int", "enter", "leave",
    }  # fmt: skip
    # the kernel holds data between its code, so its instructions are looked for as bytes
    for name, code in {"sti; hlt": "fbf4", "sysretq": "480f07", "iretq": "48cf", "swapgs": "0f01f8", "rdtsc": "0f31",
                       "ltr": "0f00d8", "lidt": "0f011c25"}.items():  # fmt: skip
        assert bytes.fromhex(code) in image[:-4096], name
