"""A program, with a terminal of its own, at which somebody types: `python typist.py PATTERN KEYS COMMAND`.

KEYS are typed once PATTERN is seen (at once, if it is empty), and again each second, as who is not heard does it: ^] is
Ctrl-], ^M is Enter, _ is a space. What the program shows is passed on, and its exit status.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import sys
import time


def main() -> None:
    pattern, keys, command = sys.argv[1:]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("bash", ["bash", "-c", command])
    typed = re.sub(r"\^(.)", lambda m: chr(ord(m[1]) & 0x1F), keys).replace("_", " ").encode()
    seen, next_s = b"", 0.0
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
        while True:
            if select.select([terminal], [], [], 0.1)[0]:
                data = os.read(terminal, 1 << 16)
                os.write(1, data)
                seen += data
            if pattern.encode() in seen and time.monotonic() >= next_s:
                os.write(terminal, typed)
                next_s = time.monotonic() + 1
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    main()
