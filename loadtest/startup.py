"""How long after its start a node serves its first poll.

A node is killed and started again, over and over; a client tries every millisecond, from the moment it is started.
"""

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from statistics import fmean, median
from typing import Final

from loadtest.dialects import Dialect, NchanDialect, PushUpDialect, WrongAnswer, parse_response
from loadtest.fleet import FleetError
from loadtest.machine import ran
from loadtest.results import Medians, Target, Values, percentile
from loadtest.scenario import Bench, Case, Samples, Scenario, comparison
from loadtest.servers import Address, Nchan, PushUp, PushUpRedis, Server

STARTS: Final = 10
QUICK_STARTS: Final = 2
PATIENCE_S: Final = 20.0
ANSWER_S: Final = 1.0
STEP_S: Final = 0.001
READ_BYTES: Final = 65536
START_MAX_MS: Final = 500.0
SECONDS_A_START: Final = 0.4
SECONDS_A_SERVER: Final = 1.0

CHANNEL: Final = "first"
CASE: Final = "killed and started again"

LONG_AGO: Final = b"If-Modified-Since: Thu, 01 Jan 1970 00:00:01 GMT\r\nIf-None-Match: 0\r\n"
"""As Nchan's cursor: whatever is there, at once."""


def first_requests(dialect: Dialect) -> Sequence[bytes]:
    """The poll that shall be answered at once, and what that takes.

    Nchan cannot be asked to wait for nothing: it has a message published before, which takes it less than a
    millisecond.
    """
    if isinstance(dialect, NchanDialect):
        before, after = dialect.poll([CHANNEL], b"")
        return (dialect.publish(CHANNEL, b"hello"), before + LONG_AGO + after)
    before, after = PushUpDialect(0).poll([CHANNEL], b"")
    return (before + dialect.first_cursor + after,)


def measure_starts(bench: Bench) -> tuple[Values, Samples]:
    """Kill the first node and start it again, so many times."""
    server = bench.server
    requests = first_requests(server.dialect)
    times, used = [], []
    with ThreadPoolExecutor(1) as thread:
        for _ in range(bench.parameters["sweeps"]):
            server.kill_node(0)
            others = set(server.pids)
            begin = time.monotonic_ns()
            started = thread.submit(server.restart_node, 0)
            times.append(_await_poll(server.address, requests) - begin)
            started.result()
            used.append(ran(set(server.pids) - others).cpu)
            bench.step()
    ordered = sorted(time / 1e6 for time in times)
    values: Values = {
        "start_mean_ms": fmean(ordered),
        "start_p50_ms": percentile(ordered, 50),
        "start_max_ms": ordered[-1],
        "start_cpu_ms": median(used) / 1e6,
    }
    return values, {
        "start_ms": [round(time / 1e6, 2) for time in times],
        "start_cpu_ms": [round(cpu / 1e6, 2) for cpu in used],
    }


def _await_poll(address: Address, requests: Sequence[bytes]) -> int:
    """When all of these had been answered well, in order, over one connection; ns."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(OSError, WrongAnswer), socket.create_connection(address, ANSWER_S) as connection:
            if all(_status(connection, request) in (200, 201, 202) for request in requests):
                return time.monotonic_ns()
        time.sleep(STEP_S)
    raise FleetError(f"no poll was served within {PATIENCE_S:.0f} s of the start")


def _status(connection: socket.socket, request: bytes) -> int:
    connection.sendall(request)
    data = b""
    while (response := parse_response(data)) is None:
        more = connection.recv(READ_BYTES)
        if not more:
            return 0
        data += more
    return response.status


# The catalogue


def _median(server: type[Server]) -> Callable[[Medians], float | None]:
    return lambda medians: medians.of(CASE, "start_p50_ms", server.name)


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """The one there is. `quick`: fewer starts."""
    starts = QUICK_STARTS if quick else STARTS
    kinds = (PushUp, PushUpRedis, Nchan)
    scenario = comparison(
        "start-up",
        "How long after its start does a node serve its first poll?",
        [Case(CASE, {"sweeps": starts}, measure_starts, kinds)],
        [
            Target(f"{kind.name}: first poll served within {START_MAX_MS:.0f} ms (median)", _median(kind), START_MAX_MS)
            for kind in (PushUp, PushUpRedis)
        ],
        rounds=1,
    )
    return (replace(scenario, seconds=len(kinds) * (starts * SECONDS_A_START + SECONDS_A_SERVER)),)
