"""The paper's four measures: network traffic, publish trip time, received messages and server memory."""

import re
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from loadtest.results import Values, percentiles_ms

HEADER_BYTES: Final = 14 + 20 + 32
"""Headers of a segment on Ethernet: Ethernet, IPv4, TCP with timestamps. The two with SYN have 8 bytes more."""

TCP_INFO_BYTES: Final = 256
# struct tcp_info since Linux 4.6: bytes_acked, bytes_received, segs_out, segs_in.
_TCP_INFO: Final = struct.Struct("=QQII")
_TCP_INFO_OFFSET: Final = 120

_MAPPING: Final = re.compile(r"^Size: +(\d+) kB\n(?:\w+: +\d+ kB\n)*?Rss: +(\d+) kB$", re.MULTILINE)


class Traffic(NamedTuple):
    """Network traffic of clients' connections, both directions, since they were begun.

    `application`: bytes of requests and responses as the client sent and received them. `wire`: bytes on an Ethernet,
    from the kernel's counters of each connection: payload, and `HEADER_BYTES` for each segment, those of the handshake
    and mere acknowledgements included.
    """

    application: int
    wire: int
    segments: int

    def __add__(self, other: object) -> "Traffic":
        if not isinstance(other, Traffic):
            return NotImplemented
        return Traffic(*(mine + its for mine, its in zip(self, other, strict=True)))


NO_TRAFFIC: Final = Traffic(0, 0, 0)


def read_traffic(connection: socket.socket, application: int) -> Traffic:
    """The traffic of a client's connection so far; it must be open still."""
    return count_traffic(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES), application)


def count_traffic(tcp_info: bytes, application: int) -> Traffic:
    """The traffic that a `struct tcp_info` speaks of; the kernel counts the SYN as a byte."""
    acknowledged, received, sent_segments, received_segments = _TCP_INFO.unpack_from(tcp_info, _TCP_INFO_OFFSET)
    segments = sent_segments + received_segments
    return Traffic(application, max(acknowledged - 1, 0) + received + segments * HEADER_BYTES, segments)


def trip_times(trips: Sequence[int]) -> Values:
    """Publish trip times: from the moment a publication was due to its receipt by a client, for each client.

    `trips`: ns. The paper's measure is the mean; the percentiles keep it company.
    """
    if not trips:
        return {}
    ordered = sorted(trips)
    return {
        "latency_mean_ms": sum(ordered) / len(ordered) / 1e6,
        **percentiles_ms("latency", ordered),
    }


def received_share(in_time: int, messages: int, clients: int) -> float:
    """Received message percentage as a share: what clients received until the trial's end, of messages x clients."""
    return in_time / (messages * clients) if messages and clients else 0.0


def memory_values(pss: int, before: int, stacks: int, connections: int) -> Values:
    """Server memory: Pss of its processes, and what each connection has added to it.

    `pss`: bytes while all clients' polls wait; `before`: without clients. `stacks`: the part of it that is threads'
    stacks, as far as they are resident.
    """
    return {
        "server_memory_bytes": pss,
        "server_memory_per_connection_bytes": (pss - before) / connections,
        "server_stacks_bytes": stacks,
    }


def resident_stacks(smaps: str, stack_bytes: int) -> int:
    """Resident bytes of all mappings in /proc/PID/smaps that are as large as a thread's stack."""
    kib = stack_bytes // 1024
    return sum(int(resident) for size, resident in _MAPPING.findall(smaps) if int(size) == kib) * 1024


def read_stacks(pids: Iterable[int], stack_bytes: int) -> int:
    """The same of these processes."""
    return sum(resident_stacks(Path(f"/proc/{pid}/smaps").read_text(), stack_bytes) for pid in pids)


def cpu_ns(pids: Iterable[int]) -> int:
    """Processor time of the processes with all the threads they ever had; quick also where these are thousands."""
    # The clock of a process as Linux numbers it; Python has a name only for that of a thread.
    return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids)
