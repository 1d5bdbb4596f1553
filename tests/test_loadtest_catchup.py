"""Everybody comes back: clients check order and completeness, Redis' work is counted, one small trial is real."""

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from loadtest.catchup import Clients, _commands, _of_redis, measure_catch_up, scenarios, show
from loadtest.charts import Chart
from loadtest.dialects import PushUpDialect, make_payload
from loadtest.fleet import FleetError
from loadtest.machine import Cores
from loadtest.results import Measurement, Medians, Result
from loadtest.scenario import Bench
from loadtest.servers import PushUpRedis

Answers = Callable[[str], list[int]]


def talk(connection: socket.socket, answers: Answers) -> None:
    """Each poll is answered with the messages of those numbers; the cursor is the last and one."""
    with connection, suppress(ConnectionError):
        while head := connection.recv(4096):
            numbers = answers(head.split(b"start=")[1].split(b"&")[0].decode())
            messages = [{"data": make_payload("c0", number, 30).decode()} for number in numbers]
            body = json.dumps({"messages": messages, "next": numbers[-1] + 1, "gap": False}).encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def catch_up(answers: Answers, until: int) -> int:
    """How many polls three clients needed."""
    with (
        ThreadPoolExecutor(3) as threads,
        socket.create_server(("127.0.0.1", 0)) as listener,
        Clients(PushUpDialect(25), 3, ["c0"]) as clients,
    ):
        clients.connect(listener.getsockname())
        for _ in clients.all:
            threads.submit(talk, listener.accept()[0], answers)
        seen = clients.catch_up(until, 5)
    assert len(seen.caught_up) == 3
    assert 0 < max(seen.caught_up) <= seen.wall
    return seen.polls


def test_a_client_has_caught_up_when_it_has_every_message() -> None:
    assert catch_up(lambda start: [0, 1, 2], 2) == 3
    assert catch_up(lambda start: [0 if start == "latest" else int(start)], 2) == 9


@pytest.mark.parametrize("numbers", [[1, 2], [0, 2], [0, 0, 1, 2], [0, 2, 1]])
def test_what_is_left_out_repeated_or_out_of_order_is_found(numbers: list[int]) -> None:
    with pytest.raises(FleetError, match="message"):
        catch_up(lambda start: numbers, 2)


def test_only_calls_of_the_nodes_count_as_calls() -> None:
    commands = {"fcall_ro": 2, "subscribe": 1, "zrange": 30, "hmget": 3}

    values = _of_redis(commands, {"channels": 2, "clients": 12})
    assert values == {
        "redis_calls": 3,
        "redis_calls_per_channel": 1.5,
        "redis_calls_per_client": 0.25,
        "redis_commands_per_channel": 18,
    }


def test_targets_compare_with_nchan_over_redis() -> None:
    (scenario,) = scenarios(quick=False)
    medians = Medians(
        [
            Measurement(1, "100 channels", "PushUp over Redis", {"catch_up_ms": 400, "redis_calls": 106}),
            Measurement(1, "100 channels", "Nchan over Redis", {"catch_up_ms": 1000}),
            Measurement(1, "100 channels", "Nchan over Redis, multipart answers", {"catch_up_ms": 200}),
        ]
    )

    judged = [target.judge(medians) for target in scenario.targets]
    assert [target["value"] for target in judged] == [None, None, None, 0.4, 2, 106]
    assert [target["met"] for target in judged] == [None, None, None, True, False, False]


def test_a_small_trial_with_redis() -> None:
    every = frozenset(range(64))
    parameters = {
        "clients": 24,
        "channels": 3,
        "messages_before": 5,
        "messages_meanwhile": 2,
        "message_bytes": 60,
        "sweeps": 2,
    }
    with PushUpRedis(Cores(every, every), 1000) as server:
        values, samples = measure_catch_up(Bench(server, parameters, lambda: None, spin=False))
        asked = _commands(server)

    assert values["catch_up_polls_per_client"] == 1
    assert 1 <= values["redis_calls"] <= 3 + 5
    assert values["catch_up_cpu_ms"] > 0
    assert len(samples["caught_up_percentiles_ms"]) == 101
    assert "info" not in asked


def test_the_report_shows_how_many_have_caught_up() -> None:
    samples = {"caught_up_percentiles_ms": [5.0, 7.0, 9.0]}
    measurements = [
        Measurement(1, "one channel", "PushUp over Redis", {}, samples),
        Measurement(1, "one channel", "Nchan over Redis", failure="it did not start"),
        Measurement(2, "one channel", "PushUp over Redis", {}, {"caught_up_percentiles_ms": [1.0]}),
    ]
    explanation, chart = show(Result("catch-up", "?", "", "", 1, True, {}, {}, "", {}, measurements, []))

    assert isinstance(explanation, str)
    assert isinstance(chart, Chart)
    assert chart.lines == {"PushUp over Redis": [(5.0, 0.0), (7.0, 1.0), (9.0, 2.0)]}
