"""Accesses as qtest text: read, written, played here, and compared with QEMU, a device oracle nobody here wrote."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.cli.test_main import anyhyve, refusal
from vmm.errors import RequestError
from vmm.qtest import board as qtest
from vmm.qtest.board import Command

PORTS = st.integers(0, 0xFFFF)
COMMANDS = st.one_of(
    st.builds(Command, st.just("in"), st.sampled_from((1, 2, 4)), PORTS),
    st.builds(Command, st.just("out"), st.just(1), PORTS, st.integers(0, 0xFF)),
    st.builds(Command, st.just("read"), st.sampled_from((1, 2, 4, 8)), st.integers(0, (1 << 48) - 1)),
    st.builds(Command, st.just("write"), st.just(8), st.integers(0, (1 << 48) - 1), st.integers(0, (1 << 64) - 1)),
    st.builds(Command, st.just("clock_step"), value=st.none() | st.integers(0, 10**9)),
    st.builds(Command, st.just("clock_set"), value=st.integers(0, 10**12)),
)


@given(st.lists(COMMANDS, max_size=20))
def test_what_is_written_is_read_and_can_be_played(commands):
    text = "".join(f"{command}\n" for command in commands)
    assert [command for _, command in qtest.parse(text)] == commands
    board = qtest.OurBoard()
    for command in commands:
        answer = board.play(command)
        assert (answer is not None) == (command.op in ("in", "read"))
        assert answer is None or 0 <= answer < 1 << 8 * command.size


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from(("inb", "outq", "0x70", "-1", "clock_set", "\n", "#"))).map(" ".join)
)
def test_any_text_is_commands_or_one_error(text):
    try:
        list(qtest.parse(text))
    except RequestError as error:
        assert str(error).startswith("line ") and "\n" not in str(error)


@pytest.mark.parametrize(
    "line",
    ["inb", "inq 0x70", "inb 0x10000", "outb 0x70", "inb 0x70 1", "readb -1", "clock_set", "clock_step 1 2", "dance"],
)
def test_a_line_that_is_none(line):
    with pytest.raises(RequestError, match="line 2: not a qtest command known here"):
        list(qtest.parse(f"# all well\n{line}\n"))


def played(text):
    board = qtest.OurBoard()
    return [answer for _, command in qtest.parse(text) if (answer := board.play(command)) is not None]


def test_the_clock_of_the_rtc_steps():
    assert played("outb 0x70 0\ninb 0x71\nclock_step 5000000000\ninb 0x71\nclock_set 61000000000\ninb 0x71") == [
        0,
        5,
        1,
    ]


def test_a_step_to_the_next_timer():
    """Counter 0 in mode 0, 1193 ticks: IRQ 0 after a millisecond; the PIC's IRR shows it."""
    start = "outb 0x43 0x30\noutb 0x40 0xa9\noutb 0x40 0x04\noutb 0x20 0x0a\ninb 0x20\n"
    assert played(start + "clock_step\ninb 0x20")[-1] & 1 == 1
    assert played(start + "clock_step 100\ninb 0x20")[-1] & 1 == 0


def test_replay(tmp_path):
    (tmp_path / "list").write_text("outb 0x70 0x09  # year\ninb 0x71\n")
    assert anyhyve("replay", "--qtest", tmp_path / "list").stdout == b"inb 0x71: 0x20\n"
    assert json.loads(anyhyve("replay", "--qtest", tmp_path / "list", "--json").stdout) == [["inb 0x71", 0x20]]
    (tmp_path / "junk").write_bytes(b"\xff\xfe")
    assert "not text" in refusal("replay", "--qtest", tmp_path / "junk")
    (tmp_path / "junk").write_text("dance")
    assert "line 1: not a qtest command" in refusal("replay", "--qtest", tmp_path / "junk")
    assert "No such file" in refusal("replay", "--qtest", tmp_path / "none")


def test_against_qemu(tmp_path):
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no qemu-system-x86_64 here (Debian: qemu-system-x86)")
    (tmp_path / "same").write_text(
        "outb 0x21 0x5a\ninb 0x21\noutb 0x70 0\nclock_step 2500000001\ninb 0x71\nclock_step\n"
    )
    done = anyhyve("replay", "--qtest", tmp_path / "same", "--against", "qemu")
    assert done.returncode == 0 and b"the same answers to 6 commands" in done.stdout
    (tmp_path / "other").write_text("inb 0x21\ninb 0x43\n")
    done = anyhyve("replay", "--qtest", tmp_path / "other", "--against", "qemu")
    assert done.returncode == 1 and b"command 2, inb 0x43: 0xff here, 0x0 there" in done.stdout
