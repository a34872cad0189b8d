"""What each release's snapshots hold: the schemas it was released with, kept in `schemas/`, one file a release."""

from __future__ import annotations

from pathlib import Path

from snapshot import promises as lock
from vmm.errors import RequestError

SCHEMAS = Path(__file__).parent / "schemas"


def names() -> list[str]:
    """All releases, oldest first."""
    return sorted((file.stem for file in SCHEMAS.glob("*.json")), key=lambda name: [int(n) for n in name.split(".")])


def versions(release: str) -> dict[str, int]:
    """The version of each state that `release` reads and writes. Raises RequestError for a release there is not."""
    if release not in names():
        raise RequestError(f"there is no release {release!r}; there are {', '.join(names())}")
    return lock.versions(lock.load(SCHEMAS / f"{release}.json"))
