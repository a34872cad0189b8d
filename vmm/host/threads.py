"""Threads of this process, which the host may have none of to give."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmm.errors import BackendError


def start(name: str, target: Callable[[], None]) -> threading.Thread:
    """A daemon thread that runs `target`. Raises BackendError when the host has no more to give."""
    thread = threading.Thread(target=target, daemon=True, name=name)
    try:
        thread.start()
    except RuntimeError as error:
        raise BackendError(f"no thread for {name}: {error}") from None
    return thread
