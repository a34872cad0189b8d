"""The command line, as `anyhyve` and as `python -m anyhyve`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run it. Ctrl-C while it is only being imported ends it without a word."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vmm.cli.main import main as command

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command(prog_name="anyhyve")


if __name__ == "__main__":
    main()
