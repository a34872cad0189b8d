"""Mapped RAM is checked while the guest already runs: waking is at once, damage is found soon after.

The digests are compared with the file, not with the guest's memory, which has moved on. Until the check is through, a
save waits for it: damaged RAM must not be given new digests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from snapshot.chain import Chain
from snapshot.errors import SnapshotError
from vmm.errors import BackendError
from vmm.host import threads


class Scrub:
    """Owns the chain: it is closed when the check ends. `found` is called from another thread when it finds damage."""

    def __init__(self, chain: Chain, found: Callable[[], None]) -> None:
        self._chain = chain
        self._found = found
        self._left = threading.Event()
        self._error: SnapshotError | BackendError | None = None
        self._thread: threading.Thread | None = None
        try:
            self._thread = threads.start("scrub", self._run)
        except BackendError:  # without a thread it is checked before the machine runs
            self._run()

    def check(self) -> None:
        """Raises SnapshotError when damage was found so far, BackendError when it could not be looked for."""
        if self._error is not None:
            if isinstance(self._error, SnapshotError):
                self._error.of(self._chain.path)
            raise self._error

    def wait(self) -> None:
        """Block until the whole RAM has been checked. Raises as `check`."""
        self._join()
        self.check()

    def leave(self) -> None:
        """Give the check up, and wait until it has let go of the file: what it would find no longer matters."""
        self._left.set()
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            for _ in self._chain.verify_blocks():
                if self._left.is_set():
                    return
        except SnapshotError as error:
            self._error = SnapshotError(f"the RAM of the snapshot is damaged: {error}")
        except OSError as error:
            self._error = SnapshotError(f"the RAM of the snapshot cannot be read: {error.strerror or error}")
        except MemoryError:
            self._error = BackendError("the RAM of the snapshot cannot be checked: out of memory")
        finally:
            self._chain.close()
        if self._error is not None:
            self._found()
