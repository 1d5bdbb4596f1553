"""The four measures."""

import os
import socket
import time

import pytest

from loadtest.measures import (
    HEADER_BYTES,
    Traffic,
    count_traffic,
    cpu_ns,
    memory_values,
    read_traffic,
    received_share,
    resident_stacks,
    trip_times,
)

SMAPS = """\
7f00-7f04 ---p 00000000 00:00 0
Size:                  4 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                   0 kB
Pss:                   0 kB
7f04-7f44 rw-p 00000000 00:00 0
Size:                256 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                   8 kB
Pss:                   8 kB
7f44-7f84 rw-p 00000000 00:00 0
Size:                256 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                  12 kB
Pss:                  12 kB
"""


def test_traffic_is_payload_and_headers_of_every_segment() -> None:
    info = bytes(120) + (51).to_bytes(8, "little") + (100).to_bytes(8, "little") + b"\4\0\0\0\3\0\0\0"

    assert count_traffic(info, 150) == Traffic(150, 50 + 100 + 7 * HEADER_BYTES, 7)


def test_the_kernel_counts_a_connection_with_its_handshake() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        assert read_traffic(client, 0) == Traffic(0, 3 * HEADER_BYTES, 3)


def test_trip_times_are_a_mean_with_percentiles() -> None:
    values = trip_times([1_000_000, 3_000_000, 8_000_000])

    assert values["latency_mean_ms"] == 4
    assert (values["latency_p50_ms"], values["latency_max_ms"]) == (3, 8)
    assert trip_times([]) == {}


@pytest.mark.parametrize(("in_time", "messages", "clients", "share"), [(15, 2, 10, 0.75), (0, 0, 10, 0)])
def test_received_is_of_messages_times_clients(in_time: int, messages: int, clients: int, share: float) -> None:
    assert received_share(in_time, messages, clients) == share


def test_memory_is_shared_among_connections() -> None:
    assert memory_values(5000, 1000, 800, 4)["server_memory_per_connection_bytes"] == 1000


def test_stacks_count_as_far_as_they_are_resident() -> None:
    assert resident_stacks(SMAPS, 256 * 1024) == 20 * 1024


def test_a_processes_clock_is_the_one_it_has_itself() -> None:
    before = time.process_time_ns()

    assert before <= cpu_ns([os.getpid()]) <= time.process_time_ns()
