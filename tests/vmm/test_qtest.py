"""Accesses as qtest text: read, written, played here, and compared with QEMU, a device oracle nobody here wrote."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmm.test_cli import anyhyve, refusal
from vmm import qtest
from vmm.errors import BackendError, GuestError
from vmm.qtest import Command

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
    except GuestError as error:
        assert str(error).startswith("line ") and "\n" not in str(error)


@pytest.mark.parametrize(
    "line",
    ["inb", "inq 0x70", "inb 0x10000", "outb 0x70", "inb 0x70 1", "readb -1", "clock_set", "clock_step 1 2", "dance"],
)
def test_a_line_that_is_none(line):
    with pytest.raises(GuestError, match="line 2: not a qtest command known here"):
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


def test_no_qemu():
    with pytest.raises(BackendError, match="nowhere-qemu is not here"):
        qtest.Qemu("nowhere-qemu")


@pytest.fixture
def qemu():
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no qemu-system-x86_64 here (Debian: qemu-system-x86)")
    with qtest.Qemu() as found:
        yield found


def pic_accesses(seed, count):
    """Whatever a guest may do, but for one thing that is answered otherwise by choice: see the last test."""
    draw, polls = random.Random(seed), set()
    for _ in range(count):
        port, value = draw.choice((0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)), draw.randrange(256)
        ocw3 = port in (0x20, 0xA0) and value & 0x18 == 0x08
        if draw.random() < 0.5:
            polls.discard(port & 0xFE)
            yield Command("in", 1, port)
        elif not (ocw3 and port in polls):
            if ocw3 and value & 4:
                polls.add(port)
            yield Command("out", 1, port, value)


def test_the_pics_answer_as_qemus_do(qemu):
    assert qtest.compare(pic_accesses("pic", 20_000), qtest.OurBoard(), qemu) is None


def test_a_difference_is_found(qemu):
    """Planted: a PIC that forgets its mask."""
    ours = qtest.OurBoard()
    ours.board.bus._readers[0x21 << 4 | 1] = lambda: 0
    found = qtest.compare(pic_accesses("pic", 1000), ours, qemu)
    assert found is not None and str(found.command) == "inb 0x21" and found.ours == 0 != found.theirs


def test_against_qemu(qemu, tmp_path):
    (tmp_path / "same").write_text("outb 0x21 0x5a\ninb 0x21\n")
    done = anyhyve("replay", "--qtest", tmp_path / "same", "--against", "qemu")
    assert done.returncode == 0 and b"the same answers to 2 commands" in done.stdout
    (tmp_path / "time").write_text("clock_step 5\n")
    if not qemu.has_time:
        assert "cannot be told the time" in refusal("replay", "--qtest", tmp_path / "time", "--against", "qemu")


def test_a_poll_is_taken_back_by_the_next_ocw3(qemu):
    """A choice (8259A datasheet, figure 8: P = 0 is "no poll command"): QEMU's poll stays until a read."""
    text = "outb 0x21 0xb8\noutb 0x20 0x0c\noutb 0x20 0x0b\ninb 0x21\n"
    found = qtest.compare([command for _, command in qtest.parse(text)], qtest.OurBoard(), qemu)
    assert found is not None and (found.ours, found.theirs) == (0xB8, 0)
