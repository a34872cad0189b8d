"""The one error a snapshot can cause."""


class SnapshotError(Exception):
    """The file is at fault: damaged, hostile, foreign, or not for this machine. The message is one line."""
