"""What can go wrong when a cluster is operated."""

from typing import ClassVar


class ClusterError(Exception):
    """A part did not do what it was told. The text says which, and shows the end of its log."""

    exit_status: ClassVar[int] = 1


class Refused(ClusterError):
    """It was not begun, and nothing was changed: a program is missing, a port is taken, the directory is in use."""

    exit_status = 2
