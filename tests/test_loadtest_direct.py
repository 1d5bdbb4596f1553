"""Commands for Redis, and Redis alone as a server under test."""

import os

import pytest

from loadtest.direct import (
    BareRedis,
    LeastFunction,
    LeastFunctionForMany,
    RedisFunction,
    RedisFunctionForMany,
    by_pipeline,
    encode,
    measure,
)
from loadtest.fleet import FleetError
from loadtest.machine import Cores
from loadtest.scenario import Bench
from loadtest.servers import ServerError

CORES = Cores(frozenset(os.sched_getaffinity(0)), frozenset(os.sched_getaffinity(0)))
PARAMETERS = {"messages": 250, "channels": 7, "message_bytes": 100, "batch": 100, "sweeps": 1}


def test_a_command_is_encoded_as_redis_reads_it() -> None:
    assert encode(("ZADD", "z", 12, b"\x00\n")) == b"*4\r\n$4\r\nZADD\r\n$1\r\nz\r\n$2\r\n12\r\n$2\r\n\x00\n\r\n"


@pytest.mark.parametrize("kind", [BareRedis, LeastFunction, LeastFunctionForMany, RedisFunction, RedisFunctionForMany])
def test_publications_straight_into_redis_are_counted_and_timed(kind: type[BareRedis]) -> None:
    steps: list[None] = []
    try:
        kind.versions()
    except ServerError as error:
        pytest.skip(str(error))
    with kind(CORES, 512) as server:
        values, samples = measure(by_pipeline, Bench(server, PARAMETERS, lambda: steps.append(None), False))

    assert values["publications_per_s"] > 0
    assert values["cpu_publication_us"] > 0
    assert len(samples["publications_per_s"]) == 1
    assert len(steps) == 2


def test_an_error_of_redis_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        BareRedis.versions()
    except ServerError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(BareRedis, "commands", lambda self, batch: [("NONSENSE", "a")])

    with BareRedis(CORES, 512) as server, pytest.raises(FleetError, match=r"answered with an error: b.-ERR unknown"):
        by_pipeline(server, [[("a", b"x")]])()


@pytest.mark.parametrize("kind", [RedisFunction, RedisFunctionForMany])
def test_a_refused_publication_fails(kind: type[RedisFunction]) -> None:
    try:
        kind.versions()
    except ServerError as error:
        pytest.skip(str(error))

    with kind(CORES, 512) as server, pytest.raises(FleetError, match="INVALID"):
        by_pipeline(server, [[("a", b"good"), (".", b"bad"), ("b", b"good")]])()
