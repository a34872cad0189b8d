"""Whose fault it is. SnapshotError (the file) lives in `snapshot`."""


class GuestError(Exception):
    """The guest image or what was asked of the machine is at fault. The message is one line."""


class BackendError(Exception):
    """The host is at fault: a CPU backend is missing, forbidden or not the version we know. One line."""


class Cancelled(Exception):
    """Nobody is at fault: it was asked for. One line."""
