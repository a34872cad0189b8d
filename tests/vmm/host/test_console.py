"""What is looked for at the console is found, in whatever pieces it comes; and how a test talks with a guest there."""

from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.errors import GuestError
from vmm.guest.lost import LOST
from vmm.host.console import BACK, Console, expression, text
from vmm.machine.machine import Machine, Stopped, StopReason
from vmm.testing import expect as expect_module
from vmm.testing.expect import Expect

PATTERNS = ["ab", "^b", "a.b", "b$", "é", r"a\r?\n", "^$", "a|b", "(?i)A+b"]


@given(st.text("abé\r\n", max_size=40), st.data(), st.sampled_from(PATTERNS))
def test_a_line_is_found_as_soon_as_it_is_there(written, data, pattern):
    output, console = written.encode(), Console()
    began = data.draw(st.integers(0, len(output)))
    since = data.draw(st.integers(0, began))
    for byte in output[:began]:
        console.transmit(byte)
    last_line = max(since, output.rfind(b"\n", 0, began) + 1)  # the ones before it are over
    console.watch(pattern, since)
    found = None
    for n in range(began, len(output)):
        console.transmit(output[n])
        if console.found:
            found = n + 1
            break
    ends = range(began + 1, len(output) + 1)
    assert found == next((n for n in ends if expression(pattern).search(text(output[last_line:n]))), None)


def test_a_line_without_an_end_is_searched_in_its_last_bytes():
    console = Console()
    console.watch("x.*y")
    for byte in b"x" + b"." * 5000 + b"y":
        console.transmit(byte)
    assert not console.found
    for byte in b"x..y":
        console.transmit(byte)
    assert console.found


@pytest.mark.parametrize("pattern", ["^A", "^$", "^.A"])
def test_the_middle_of_a_long_line_is_not_its_beginning(pattern):
    console = Console()
    console.watch(pattern)
    for byte in b"x" + b"A" * 3 * BACK:
        console.transmit(byte)
        assert not console.found or pattern == "^.A"
    assert console.found == (pattern == "^.A")


@given(st.binary(max_size=1500).map(lambda data: bytes(each | 0xF1 for each in data)), st.integers(0, 40))
def test_a_guest_is_lost_wherever_a_commands_output_stands(ours, cut):
    """Which comes in bytes of its own (vmm/testing/shell.py), before the kernel's line and in it."""
    console, line = Console(), b"[    1.5] Kernel panic - not syncing: why"
    console.watch(None, lost=LOST)
    for byte in b"# " * BACK + b"\n" + ours + line[:cut] + ours + line[cut:] + b"\r\n":
        console.transmit(byte)
    assert console.lost == line.decode()


class Scripted:
    """A machine whose guest writes one piece a run."""

    def __init__(self, *pieces):
        self.board, self.clock, self.pieces, self.sent = SimpleNamespace(console=Console()), self, list(pieces), b""
        self.now = 0

    def now_ns(self):
        return self.now

    def send(self, data):
        self.sent += data

    def run(self, *, until, since, until_ns, **_):
        console = self.board.console
        console.watch(until, since)
        for piece in self.pieces:
            self.pieces = self.pieces[1:]
            write(self, piece)
            if console.found:
                return Stopped(StopReason.PATTERN)
        self.now = until_ns
        return Stopped(StopReason.TIME)


def expecting(machine: Scripted) -> Expect:
    """It is all of a machine that Expect uses."""
    return Expect(cast(Machine, machine))


def write(machine, piece):
    for byte in piece.encode():
        machine.board.console.transmit(byte)


@pytest.mark.parametrize(
    ("before", "piece", "pattern"),
    [("lo", "gin: ", "login: "), ("a\n", "b", "^b"), ("", "aéb", "a.b"), ("é", "\n", "é$")],
)
def test_what_has_begun_already(before, piece, pattern):
    machine = Scripted(piece)
    expect = expecting(machine)
    write(machine, before)
    assert expect.expect(pattern)
    assert machine.now == 0, "found, not waited for"


def test_what_was_written_last_is_what_is_kept():
    machine = Scripted()
    expect = expecting(machine)
    write(machine, "." * (3 << 19) + "\nEND")
    assert expect.output.endswith("\nEND") and expect.expect("END")
    with pytest.raises(GuestError, match=r"its last lines:\n[.]*\nEND$"):
        expect.expect("more")


@pytest.fixture
def searched(monkeypatch):
    """Counts the bytes that are searched by an Expect."""
    counted = [0]

    def count(data):
        counted[0] += len(data)
        return text(data)

    monkeypatch.setattr(expect_module, "text", count)
    return counted


def test_stops_that_are_no_match_cost_a_line(searched):
    """`x$` is there when the console stops, and is over when it is looked at."""

    class Late(Scripted):
        def run(self, *, until, since, until_ns, **_):
            found = super().run(until=until, since=since, until_ns=until_ns)
            write(self, "y")  # the block was not at its end
            return found

    machine = Late("z" * 300_000, *["x"] * 200)
    with pytest.raises(GuestError):
        expecting(machine).expect("x$")
    assert searched[0] < 300_000 * 2 + 203 * (BACK + 2)


def test_what_a_guest_said_is_data_in_an_error():
    machine = Scripted("\x1b[2J\n\u202eevil\x9b\rline\n")
    with pytest.raises(GuestError) as failed:
        expecting(machine).expect("never")
    *_, first, second = str(failed.value).split("\n")
    assert (first, second) == (r"\x1b[2J", r"\u202eevil\x9b\rline")


def test_what_nobody_reads_is_kept_in_bounds():
    console = Console()
    for _ in range(5 << 20):
        console.transmit(65)
    assert len(console.output) <= 2 << 20 and console.total == 5 << 20


def test_what_was_written_to_another_console_is_read_and_matches_nothing_that_comes():
    heard: list[int] = []
    console = Console()
    console.listen(heard.append)
    console.recall(b"as before\nshell re")
    console.watch("shell")
    for byte in b"ady\n":
        console.transmit(byte)
    assert console.read(0) == (0, b"as before\nshell ready\n") and console.total == 22
    assert bytes(heard) == b"ady\n" and not console.found


@given(st.binary(max_size=20), st.binary(max_size=20), st.binary(max_size=20))
def test_what_is_kept_of_a_moment(before, between, after):
    """What came between is nobody's any more; whoever waits for more has that, and no byte twice."""
    console = Console()
    for byte in before:
        console.transmit(byte)
    _, kept = console.read(0)
    for byte in between:
        console.transmit(byte)
    console.keep(kept)
    at = console.total
    assert at == len(before + between) and console.read(at) == (at, b"")
    for byte in after:
        console.transmit(byte)
    assert console.read(0)[1] == before + after and console.read(at) == (at, after)
