"""Starting up: what counts as the first poll served, and one start."""

import socket
import threading
import time

import pytest

from loadtest import startup
from loadtest.dialects import NchanDialect, PushUpDialect
from loadtest.fleet import FleetError
from loadtest.machine import Cores
from loadtest.scenario import Bench
from loadtest.servers import PushUp
from loadtest.startup import _await_poll, first_requests, measure_starts


def test_a_poll_that_waits_for_nothing_is_the_first() -> None:
    assert first_requests(PushUpDialect(25)) == (
        b"GET /poll?channel=first&start=latest&timeout=0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    )
    publish, poll = first_requests(NchanDialect())
    assert publish.startswith(b"POST /pub?id=first ")
    assert b"If-Modified-Since: Thu, 01 Jan 1970" in poll


def test_a_server_that_does_not_listen_or_refuses_is_not_there_yet() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        asked = []

        def serve() -> None:
            time.sleep(0.05)
            listener.listen()
            for status in (b"503 X", b"200 OK"):
                connection, _ = listener.accept()
                with connection:
                    asked.append(connection.recv(100))
                    connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve)
        begin = time.monotonic_ns()
        thread.start()
        served = _await_poll(listener.getsockname(), [b"poll"])
        thread.join()

    assert asked == [b"poll", b"poll"]
    assert served - begin >= 0.05e9


def test_a_server_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "PATIENCE_S", 0.05)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(FleetError, match="no poll was served"):
            _await_poll(silent.getsockname(), [b"poll"])


def test_one_start() -> None:
    every = frozenset(range(64))
    with PushUp(Cores(every, every), 1000) as server:
        values, samples = measure_starts(Bench(server, {"sweeps": 1}, lambda: None, spin=False))

    assert values["start_mean_ms"] == values["start_p50_ms"] == values["start_max_ms"] > 10
    assert values["start_cpu_ms"] > 10
    assert len(samples["start_ms"]) == 1
