"""Redis as a cluster sets it up: one server, and what is asked of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ClusterError, Refused
from cluster.processes import HOST, free_ports
from cluster.stores import Store, ask, broker_url, check_version, start_stores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One server that runs."""
    (port,) = free_ports(1)
    store = Store(tmp_path_factory.mktemp("store"), "redis1", f"{HOST}:{port}")
    start_stores("standalone", [store], [], [])
    yield store
    store.kill()


def test_broker_urls() -> None:
    """Sentinels are asked for the master; any server of a cluster knows the others."""
    stores, sentinels = ["h:1", "h:2", "h:3"], ["h:4", "h:5"]

    assert broker_url("standalone", stores[:1], []) == "redis://h:1"
    assert broker_url("sentinel", stores, sentinels) == "redis+sentinel://h:4,h:5/pushup"
    assert broker_url("cluster", stores, []) == "redis+cluster://h:1,h:2,h:3"


@pytest.mark.parametrize(
    ("said", "version"), [("Redis server v=6.0.16 sha=0 bits=64", "6.0.16"), ("something else", "unknown")]
)
def test_a_redis_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, version: str) -> None:
    """It has no functions; the sentence says which version there is."""
    program = tmp_path / "redis-server"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(Refused) as refused:
        check_version()

    assert str(refused.value) == f"{program} is version {version}; PushUp needs Redis 7 or newer"


def test_the_installed_redis_is_good_enough() -> None:
    """Nothing is raised."""
    check_version()


def test_nothing_that_is_acknowledged_is_lost(store: Store) -> None:
    """It is on disk, and what does not fit is refused."""
    wanted = {"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"}

    assert {name: ask(store.address, "CONFIG", "GET", name)[name] for name in wanted} == wanted


def test_it_comes_back_as_it_was_or_empty(store: Store) -> None:
    """After being killed; and also while it runs."""
    ask(store.address, "SET", "key", "value")
    pid = store.pid

    store.kill()
    assert (store.role(), ask(store.address, "PING")) == ("down", None)
    store.restart()

    assert store.pid != pid
    assert (store.role(), ask(store.address, "GET", "key")) == ("master", "value")
    store.restart(empty=True)
    assert (store.role(), ask(store.address, "GET", "key")) == ("master", None)


def test_an_error_is_no_answer(store: Store) -> None:
    """Whoever asks waits for the right one."""
    assert ask(store.address, "NONSENSE") is None


def test_a_server_that_cannot_start_shows_its_log(store: Store, tmp_path: Path) -> None:
    """A port that is taken, for one."""
    other = Store(tmp_path, "redis1", store.address)

    with pytest.raises(ClusterError, match=r"(?s)redis1 ended before it was ready\. .*Address already in use"):
        start_stores("standalone", [other], [], [])
