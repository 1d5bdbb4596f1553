"""The servers under test: started, broken, restarted, and gone afterwards."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.stores import ask
from loadtest.dialects import make_payload
from loadtest.fleet import Fleet, Publication
from loadtest.machine import Cores
from loadtest.pushpin import Pushpin
from loadtest.servers import Floor, FloorRedis, Nchan, NchanRedis, PushUp, PushUpRedis, Server, ServerError, get

CORES = Cores(frozenset(os.sched_getaffinity(0)), frozenset(os.sched_getaffinity(0)))
POLLS = 10
PATIENCE_S = 10.0


def present(kind: type[Server]) -> type[Server]:
    try:
        kind.versions()
    except ServerError as error:
        pytest.skip(str(error))
    return kind


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fleet_of(server: Server) -> Fleet:
    return Fleet(server.addresses, server.dialect, publish_addresses=server.publish_addresses)


def deliver(server: Server, fleet: Fleet, number: int) -> None:
    """Every poll of the fleet is answered with a message."""
    fleet.park()

    def holds() -> bool:
        fleet.expect_silence()
        return server.holds(POLLS)

    wait(holds)
    server.settle()
    time.sleep(server.deaf_s)
    payload = make_payload("a", number, 100)
    publication = Publication(server.dialect.publish("a", payload), (payload,), POLLS)
    assert len(fleet.publish([publication], PATIENCE_S).answers) == POLLS


@pytest.mark.parametrize("kind", [PushUp, Floor, Nchan, Pushpin])
def test_a_server_answers_and_is_gone_afterwards(kind: type[Server]) -> None:
    with present(kind)(CORES, 512) as server, fleet_of(server) as fleet:
        fleet.add_publishers(1)
        fleet.add_pollers([("a",)] * POLLS)
        deliver(server, fleet, 1)

        assert len(server.addresses) == server.nodes == 1
        assert server.pids
        assert server.beside.keys() == ({"origin"} if kind is Pushpin else set())
        assert server.settle().cpu > 0
        assert server.memory().own > 0

    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in server.pids)


@pytest.mark.parametrize("kind", [PushUpRedis, NchanRedis])
def test_nodes_over_redis_tell_each_other_also_after_one_was_killed(kind: type[Server]) -> None:
    with present(kind)(CORES, 512) as server:
        with fleet_of(server) as fleet:
            fleet.add_publishers(1)
            fleet.add_pollers([("a",)] * POLLS)
            deliver(server, fleet, 1)

        before = server.pids
        server.kill_node(1)
        assert 0 < len(server.pids) < len(before)
        assert get(server.addresses[1], "/") == (0, "")
        server.restart_node(1)
        assert len(server.pids) == len(before)

        with fleet_of(server) as fleet:
            fleet.add_publishers(1)
            fleet.add_pollers([("a",)] * POLLS)
            deliver(server, fleet, 2)
        pids = (*server.pids, *server.redis_pids)

    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


def test_the_floor_relays_over_redis() -> None:
    with present(FloorRedis)(CORES, 512) as server, fleet_of(server) as fleet:
        fleet.add_publishers(1)
        fleet.add_pollers([("a",)] * POLLS)
        deliver(server, fleet, 1)

        assert len(server.addresses) == len(server.pids) == 2


def test_redis_comes_back_with_what_it_had() -> None:
    """Here with PushUp: Nchan needs more than ten seconds until it has noticed."""
    with present(PushUpRedis)(CORES, 512) as server:
        before = server.redis_pids
        assert ask("{}:{}".format(*server.redis_address), "SET", "kept", "yes")

        server.kill_redis()
        assert server.redis_pids == ()
        server.restart_redis()

        assert len(server.redis_pids) == 1
        assert server.redis_pids != before
        assert server.ran_beside().keys() == {"redis"}
        assert ask("{}:{}".format(*server.redis_address), "GET", "kept") == "yes"


def test_a_server_that_does_not_start_says_why() -> None:
    settings = {"channel_window": "1", "broker_": "x"}

    with pytest.raises(ServerError, match="PushUp: broker_ is not a setting of a node"):
        PushUp(CORES, 512, settings).__enter__()


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.processes.SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(ServerError, match="redis-server is missing; on Debian: apt-get install redis-server"):
        PushUpRedis.versions()
