"""To have a command's output back whole from a guest's shell, whatever else its console shows.

A kernel's log comes to the console at any moment, in the middle of a line too. So what is ours is written in bytes that
no text has (`vmm/host/console.py`): a hexadecimal digit as 0xF0 + the digit, but zero as 0xC0; and 0xC1 behind each
number. An answer is

    C1 NUMBER C1        which answer it is; from here on the command runs
    FIELD C1 ...        of a command: nothing, its status, how many bytes it wrote (decimal), these bytes

What the command writes goes to a file of the guest's first: it may write to it for as long as it likes, and what it
leaves running holds nothing up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmm.host.console import NO_TEXT

FOLDERS = ("/tmp", "/dev/shm", "/run", "/var/tmp", "$HOME")
SOURCE, INPUT, OUTPUT = (f"anyhyve.$$.{name}" for name in ("sh", "in", "out"))  # in one of them, of each shell
TOOLS = ("od", "rm", "tr", "wc")  # of POSIX; besides those that every shell has itself
_STOP = 0xC1
_BYTES = b"\xc0" + bytes(range(0xF1, 0x100))  # by digit
_DIGITS = bytes.maketrans(_BYTES, b"0123456789abcdef")
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _./:=,+@")
_LINE = 200  # characters: MAX_CANON may be 255, a shell's own editor takes some more
_BATCH = 2000  # characters typed before the shell is waited for: a terminal forgets what is too much
_LOG = 1 << 20


@dataclass(frozen=True)
class Completed:
    """A command that has ended: its status; what it wrote, standard error too; and what else the console showed
    meanwhile, of which the kernel's log is the most."""

    status: int
    output: bytes
    kernel_log: str


class Answer:
    """An answer as it comes, byte by byte. `on_whole` is called when all of its `fields` are there."""

    def __init__(self, number: int, fields: int, on_whole: Callable[[], None]) -> None:
        self.others = bytearray()  # which are not ours, since it began; the last MiB, or up to two
        self.whole = False
        self._mark = _stops(f".{number:x}.")
        self._left, self._on_whole = fields, on_whole
        self._ours = bytearray()
        self.begun = False

    def hear(self, byte: int) -> None:
        if self.whole:
            return
        if byte not in NO_TEXT:
            self.others.append(byte)
            if len(self.others) > 2 * _LOG:
                del self.others[:-_LOG]
            return
        self._ours.append(byte)
        if byte != _STOP:
            return
        if self.begun:
            self._left -= 1
        elif self._ours.endswith(self._mark):
            self.begun = True
            self._ours.clear()
            self.others.clear()
        if self.begun and self._left <= 0:
            self.whole = True
            self._on_whole()

    @property
    def fields(self) -> list[str]:
        """Each in hexadecimal digits."""
        *fields, _ = self._ours.split(b"\xc1")
        return [field.translate(_DIGITS).decode() for field in fields]


def where(number: int) -> list[str]:
    """Lines that find a folder to write to. The answer's one field is its place in FOLDERS, from 1 on, or 0."""
    tried = (f'if [ -w "{folder}/." ]; then {_say(number, n)}' for n, folder in enumerate(FOLDERS, 1))
    return ["\nel".join(tried), f"else {_say(number, 0)}; fi"]


def missing(number: int) -> list[str]:
    """Lines that find what the guest has not. The answer's one field is its place in TOOLS, from 1 on, or 0."""
    tried = (f"if ! command -v {tool} >/dev/null; then {_say(number, n)}" for n, tool in enumerate(TOOLS, 1))
    return ["\nel".join(tried), f"else {_say(number, 0)}; fi"]


def put(data: bytes, file: str) -> list[str]:
    """Lines that write a file."""
    return [f': >|"{file}"', *(f"printf '{piece}' >>\"{file}\"" for piece in _pieces(data))]


def batches(lines: list[str]) -> Iterator[list[str]]:
    """The lines, as many at a time as can be typed at once. Behind each but the last there is to be `here`."""
    batch, size = list[str](), 0
    for line in lines:
        if size + len(line) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line) + 1
    yield batch


def here(number: int) -> str:
    """A line whose answer has no field."""
    return _say(number)


def go(number: int, folder: str, *, reads: bool) -> list[str]:
    """Lines that run what is in the file SOURCE, in the shell itself, with the file INPUT to read or nothing. The
    answer's four fields are those of a command; all are empty where a tool is missing."""
    source, given, output = (f'"{folder}/{name}"' for name in (SOURCE, INPUT, OUTPUT))
    return [  # in braces: all lines have been read, and echoed, before the first of them is done
        # A syntax error behind `command` ends what is run, and not the line.
        f"{{ {_say(number)}; command . {source} >|{output} 2>&1 <{given if reads else '/dev/null'}",
        # What was left running may write to it on: so much of it, as it is now. (All is in a subshell, a pipe's end.)
        f"{{ set -- $? $(wc -c <{output}); printf .%x.%s. $1 $2; od -An -v -tx1 -N$2 {output}",
        f"rm -f {source} {given} {output}; echo .; }} |",
        "tr -d ' \\n' | LC_ALL=C tr 0-9a-f. '\\300\\361-\\377\\301' || printf '\\301\\301\\301\\301'; echo; }",
    ]


def completed(answer: Answer) -> Completed | None:
    """What `go` was answered; None where it does not come out even: a tool is missing, or somebody else wrote such
    bytes."""
    _, status, size, output = answer.fields  # the first is what others wrote of such bytes while it ran
    try:
        found = Completed(int(status, 16), bytes.fromhex(output), readable(answer.others))
        return found if len(found.output) == int(size) else None
    except ValueError:
        return None


def readable(data: bytes | bytearray) -> str:
    """What a console showed, to be read: without what is ours."""
    return data.translate(None, NO_TEXT).decode(errors="replace").replace("\r\n", "\n")


def _pieces(data: bytes) -> Iterator[str]:
    """As printf takes it."""
    piece = ""
    for byte in data:
        piece += chr(byte) if byte in _PLAIN else f"\\{byte:03o}"
        if len(piece) > _LINE - 4:
            yield piece
            piece = ""
    if piece:
        yield piece


def _stops(digits: str) -> bytes:
    """Digits, and `.` for what is behind a number, in our bytes."""
    return bytes(_STOP if digit == "." else _BYTES[int(digit, 16)] for digit in digits)


def _say(number: int, *fields: int) -> str:
    """What a shell says an answer with."""
    digits = "".join(f"{field:x}." for field in (number, *fields))
    return "printf '" + "".join(f"\\{byte:03o}" for byte in _stops(f".{digits}")) + "'"
