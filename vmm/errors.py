"""Whose fault it is. Every message is one line. SnapshotError (the file) lives in `snapshot`."""


class GuestError(Exception):
    """The guest is at fault: its image, or what it did."""


class BackendError(Exception):
    """The host is at fault: a CPU backend, memory, a file or a package is missing, forbidden or not as we know it."""


class RequestError(Exception):
    """What was asked for is at fault: there is no such thing, or it cannot be done now."""


class Cancelled(Exception):
    """Nobody is at fault: it was asked for."""
