"""A network of its own for what this process starts, where the kernel allows it."""

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1

_TRACKED: Final = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_TRACKED_MAX: Final = Path("/proc/sys/net/netfilter/nf_conntrack_max")


@contextmanager
def own_network() -> Iterator[bool]:
    """This thread, and the processes that it starts, have a loopback interface of their own inside.

    There all ports are free, and no firewall tracks connections: tracking them costs time, and their number is limited
    to fewer than a process per 20,000 of them could serve. Only root may do that: False where it could not be done.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    former = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_NEWNET):
            yield False
            return
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))
            yield True
        finally:
            libc.setns(former, _CLONE_NEWNET)
    finally:
        os.close(former)


def connections_left() -> int | None:
    """How many more connections the kernel would track; None if it tracks none."""
    try:
        tracked = int(_TRACKED.read_text())
        return int(_TRACKED_MAX.read_text()) - tracked if tracked else None
    except OSError:
        return None
