"""Text from elsewhere, to be shown: out of a file, a socket, a guest, or a path.

Only a guest's console goes to a terminal as it is.
"""

from __future__ import annotations


def shown(text: object) -> str:
    """The text as one line that does nothing but say something. What cannot be printed (a control character, the end of
    a line, what turns the direction of writing or has no width, half a surrogate pair) is as in a Python string."""
    line = str(text)
    if line.isprintable():
        return line
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
