"""Open loop against a node; over Redis it is the load test."""

import os
import time

from loadtest.latency import OpenLoop
from loadtest.machine import Cores
from loadtest.servers import PushUp

CORES = Cores(frozenset(os.sched_getaffinity(0)), frozenset(os.sched_getaffinity(0)))
POLLS = 12


def test_every_delivery_is_in_the_ledger_with_its_latency_from_when_it_was_due() -> None:
    with PushUp(CORES, 512) as server, OpenLoop(server, POLLS, 3) as clients:
        clients.park()
        end = time.monotonic() + 10
        while not server.holds(POLLS):
            assert time.monotonic() < end
            clients.listen(time.monotonic_ns() + 10_000_000)
        late_ns = 50_000_000
        for number in range(9):
            clients.publish(number, time.monotonic_ns() - late_ns, 50)
        while len(clients.ledger.verdict(0).latencies) < 9 * POLLS // 3:
            assert time.monotonic() < end
            clients.listen(time.monotonic_ns() + 10_000_000)
        verdict = clients.ledger.verdict(time.monotonic_ns())

    assert (verdict.acknowledged, verdict.expected, verdict.received) == (9, 36, 36)
    assert (verdict.lost, verdict.repeated, verdict.disordered, clients.wrong) == (0, 0, 0, 0)
    assert min(verdict.latencies) >= late_ns
    assert len(clients.lags) == 9
