"""This user's folders, by the XDG base directory specification."""

from __future__ import annotations

import os
from pathlib import Path

from vmm.errors import BackendError


def cache() -> Path:
    """Where what can be made again is kept. It need not be there. Raises BackendError for a user who has no home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise BackendError(str(error)) from None
    return Path(base, "anyhyve").absolute()
