"""`python docs/picture/draw.py` draws docs/picture/found.svg: what pytest says of the device beside this file."""

from __future__ import annotations

import html
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
PICTURE = HERE / "found.svg"
COMMANDS = (
    "tail -n 10 musicbox.py",
    "tail -n 2 test_musicbox.py",
    "pytest -q --tb=short -rN test_musicbox.py",
)
WIDTH = 82


def run() -> str:
    """What a terminal shows of the commands, run now in an empty folder; how long it took is left out."""
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("musicbox.py", "test_musicbox.py"):
            shutil.copy(HERE / name, folder)
        for command in COMMANDS:
            words = command.split()
            if words[0] == "pytest":
                words = [sys.executable, "-m", *words, "-p", "no:cacheprovider", "-p", "no:xdist"]
            environment = {**os.environ, "COLUMNS": "80", "PYTEST_ADDOPTS": "", "NO_COLOR": "1"}
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
            shown.append(f"$ {command}\n{done.stdout}")
    return re.sub(r" in [\d.]+s\b", "", "\n".join(shown))


def draw(text: str) -> str:
    """The SVG of a terminal that shows it."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in text.rstrip().splitlines():
        style = "bold" if line.startswith("$ ") else "bright_red" if line.startswith("E ") else ""
        console.print(Text(line, style=style))
    svg = console.export_svg(title="a bug, found and made small", unique_id="found")
    return re.sub(r"^ *@font-face \{.*?\}\n", "", svg, flags=re.M | re.S)  # no font is fetched to look at it


def read(svg: str) -> list[str]:
    """The words of a picture, line by line."""
    rows: dict[float, list[str]] = {}
    for y, words in re.findall(r'<text class="found-r\d+" x="[\d.]+" y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        rows.setdefault(float(y), []).extend(html.unescape(words).split())
    return [" ".join(row) for _, row in sorted(rows.items()) if row]


if __name__ == "__main__":
    PICTURE.write_text(draw(run()))
