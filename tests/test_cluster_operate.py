"""Whole clusters of real processes: what clients notice when nodes come, go and die, and what is left at the end."""

import asyncio
import http.client
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import pytest

from cluster import Cluster, ClusterError, Refused
from cluster.nodes import Node, fetch
from cluster.processes import HOST, free_ports
from pushup import Publisher
from tests.chaos.client import NoAnswer, NotSent, Server
from tests.support import PATIENCE_S

SETTINGS = {"drain_window": "0.5", "poll_timeout": "5"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes; nothing is left of it in the end."""
    state = tmp_path_factory.mktemp("cluster") / "state"
    with taken_down(Cluster.up(state, nodes=2, settings=SETTINGS)) as cluster:
        yield cluster


@contextmanager
def taken_down(cluster: Cluster) -> Iterator[Cluster]:
    """Its end is its own, and complete."""
    try:
        yield cluster
    finally:
        cluster.down()
    assert processes_in(cluster.directory) == []
    assert not cluster.directory.exists()


def processes_in(directory: Path) -> Sequence[str]:
    """The command lines of processes that were started in a directory, removed or not, or that name it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_text().replace("\0", " ")
            if f"{directory}/" in os.readlink(entry / "cwd") or f"{directory}/" in command:
                found.append(command)
        except OSError:
            continue
    return found


class Follower:
    """A client that polls one channel, cursor by cursor, and writes down what it gets and what it does not."""

    def __init__(self, address: str, channel: str) -> None:
        self.got: list[object] = []
        self.troubles: list[str] = []
        self._address = address
        self._channel = channel

    async def run(self) -> None:
        server, cursor = Server(self._address), 0
        try:
            while True:
                target = f"/poll?channel={self._channel}&start={cursor}"
                try:
                    response = await server.request(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), PATIENCE_S)
                except (NoAnswer, NotSent) as error:
                    self.troubles.append(str(error))
                    continue
                if response.status != 200:
                    self.troubles.append(f"{response.status} {response.body!r}")
                    await asyncio.sleep(0.05)
                    continue
                answer = msgspec.json.decode(response.body)
                cursor = answer["next"]
                self.got += ["gap"] * answer["gap"] + [message["data"] for message in answer["messages"]]
        finally:
            await server.close()


class Following:
    """Clients of both frontends, and a publisher."""

    def __init__(self, cluster: Cluster, channel: str) -> None:
        self.public = [Follower(cluster.public, channel) for _ in range(8)]
        self.tcp = [Follower(cluster.tcp, channel) for _ in range(8)]
        self._broker = cluster.broker
        self._channel = channel
        self.sent = 0

    async def publish(self) -> None:
        """One message more; returns when everybody has all there are, each once and in order."""
        await asyncio.to_thread(self._publish)
        self.sent += 1
        try:
            async with asyncio.timeout(PATIENCE_S):
                while any(follower.got != list(range(self.sent)) for follower in (*self.public, *self.tcp)):
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError([(follower.got, follower.troubles) for follower in self.public + self.tcp]) from None

    def _publish(self) -> None:
        with Publisher(self._broker) as publisher:
            publisher.publish(self._channel, self.sent)

    @property
    def troubles(self) -> Sequence[str]:
        return [trouble for follower in (*self.public, *self.tcp) for trouble in follower.troubles]


@asynccontextmanager
async def following(cluster: Cluster, channel: str) -> AsyncIterator[Following]:
    it = Following(cluster, channel)
    tasks = [asyncio.create_task(follower.run()) for follower in (*it.public, *it.tcp)]
    try:
        await it.publish()
        yield it
        await it.publish()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_all_of_it_runs_and_is_ready(cluster: Cluster) -> None:
    """The status says so, of every process."""
    status = cluster.status()

    assert status["whole"]
    assert [(row["name"], row["state"]) for row in status["processes"]] == [
        ("redis1", "master"),
        ("node1", "ready"),
        ("node2", "ready"),
        ("haproxy", "running"),
    ]
    assert [row["haproxy"] for row in status["processes"][1:3]] == ["up", "up"]
    assert [row["parked"] for row in status["processes"][1:3]] == [0, 0]
    assert [process.pid for process in cluster.processes] == [row["pid"] for row in status["processes"]]
    assert (status["public"], status["tcp"], status["broker"]) == (cluster.public, cluster.tcp, cluster.broker)


def test_what_is_behind_the_frontends(cluster: Cluster) -> None:
    """Polls over HTTP, and a clear 404 for all else; the whole API over TCP."""
    connection = http.client.HTTPConnection(cluster.public, timeout=PATIENCE_S)
    connection.request("GET", "/channels")
    response = connection.getresponse()
    said = response.read().decode()
    connection.close()

    assert (response.status, f"http://{cluster.tcp}" in said) == (404, True)
    assert fetch(cluster.public, "/poll?channel=none&timeout=0")[0] == 200
    assert fetch(cluster.tcp, "/channels")[0] == 200


def test_the_same_cluster_from_elsewhere(cluster: Cluster) -> None:
    """Another object has other objects for the same processes; each keeps its own."""
    other = Cluster.at(cluster.directory)

    assert (other.public, other.tcp, other.broker) == (cluster.public, cluster.tcp, cluster.broker)
    assert [(node.name, node.pid) for node in other.nodes] == [(node.name, node.pid) for node in cluster.nodes]
    assert other.nodes[0] is other.nodes[0]
    assert other.stores[0] is other.stores[0]


async def test_scaling_loses_no_client(cluster: Cluster) -> None:
    """Nobody who polls sees an error while nodes come and go, and everybody has every message once."""
    before = [node.name for node in cluster.nodes]
    async with following(cluster, "scale") as it:
        for count in (3, 1, 2):
            await asyncio.to_thread(cluster.scale, count)
            await it.publish()
            assert len(cluster.nodes) == count

    assert it.troubles == []
    assert cluster.nodes[0].name == before[0]
    assert cluster.nodes[1].name not in before
    assert cluster.status()["whole"]


async def test_draining_and_reloading_lose_no_client(cluster: Cluster) -> None:
    """The polls of a node that ends are taken up by the other one."""
    drained, kept = cluster.nodes
    async with following(cluster, "drain") as it:
        await asyncio.to_thread(cluster.reload_proxy)
        await it.publish()
        await asyncio.to_thread(cluster.drain, drained.name)
        await it.publish()

    assert it.troubles == []
    assert not drained.alive
    assert [node.name for node in cluster.nodes] == [kept.name]


async def test_a_killed_node_is_replaced(cluster: Cluster) -> None:
    """Over HTTP its polls are asked elsewhere; over TCP clients notice and come again. It is listed until then."""
    await asyncio.to_thread(cluster.scale, 2)
    killed, kept = cluster.nodes
    async with following(cluster, "kill") as it:
        await asyncio.to_thread(cluster.kill, killed.name)
        await it.publish()
        assert (killed.alive, killed in cluster.nodes) == (False, True)
        assert not (await asyncio.to_thread(cluster.status))["whole"]
        await asyncio.to_thread(cluster.scale, 2)

    assert [follower.troubles for follower in it.public] == [[]] * len(it.public)
    assert killed not in cluster.nodes
    assert kept in cluster.nodes
    assert len({killed.name, *[node.name for node in cluster.nodes]}) == 3


async def test_redis_comes_back_with_everything_or_nothing(cluster: Cluster) -> None:
    """What was acknowledged is there after a kill; after a loss, everybody is told of a gap."""
    (store,) = cluster.stores
    async with following(cluster, "restart") as it:
        await asyncio.to_thread(store.kill)
        await asyncio.to_thread(store.restart)
        await it.publish()

        await asyncio.to_thread(store.kill)
        await asyncio.to_thread(store.restart, empty=True)
        async with asyncio.timeout(PATIENCE_S):
            while any("gap" not in follower.got for follower in (*it.public, *it.tcp)):
                await asyncio.sleep(0.01)
        for follower in (*it.public, *it.tcp):
            follower.got.remove("gap")


def test_a_directory_that_is_in_use(cluster: Cluster) -> None:
    """Starting there is refused, and harms nothing."""
    with pytest.raises(Refused) as refused:
        Cluster.up(cluster.directory, nodes=1)

    assert str(refused.value).startswith(f"{cluster.directory} is in use: a cluster runs there.")
    assert cluster.status()["whole"]


def test_nodes_that_are_not_there(cluster: Cluster) -> None:
    """The sentence names those that are; a cluster of none is refused too."""
    names = ", ".join(node.name for node in cluster.nodes)
    for command in (cluster.kill, cluster.drain):
        with pytest.raises(Refused) as refused:
            command("redis1")
        assert str(refused.value) == f"there is no node redis1; there are {names}"
    with pytest.raises(Refused, match="at least one node"):
        cluster.scale(0)


def test_a_node_that_does_not_start_leaves_the_others_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaling fails with the end of its log; the cluster is as it was."""
    names = [node.name for node in cluster.nodes]
    with monkeypatch.context() as context:
        context.setattr(sys, "executable", broken_python(cluster.directory.parent))
        with pytest.raises(ClusterError, match=r"ended before it was ready\. The end of its log:\n  no such language"):
            cluster.scale(4)

    assert [node.name for node in cluster.nodes] == names
    assert cluster.status()["whole"]


def broken_python(directory: Path) -> str:
    program = directory / "python"
    program.write_text("#!/bin/sh\necho no such language\nexit 1\n")
    program.chmod(0o755)
    return str(program)


def test_a_start_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis runs by then, and is stopped again; directories that were made are gone, others are not."""
    state = tmp_path / "deep" / "state"
    monkeypatch.setattr(sys, "executable", broken_python(tmp_path))

    with pytest.raises(ClusterError, match="no such language"):
        Cluster.up(state, nodes=2)

    assert processes_in(state) == []
    assert [path.name for path in tmp_path.iterdir()] == ["python"]


def test_a_start_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while nodes start stops them."""
    started = []

    def interrupt(node: Node) -> bool:
        started.append(node.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(Node, "ready", interrupt)

    with pytest.raises(KeyboardInterrupt):
        Cluster.up(tmp_path, nodes=1)

    assert processes_in(tmp_path) == []
    assert not Path(f"/proc/{started[0]}/cwd").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"nodes": 0}, "a cluster has at least one node"),
        ({"nodes": 1, "port": 70000}, "70000 is not a port: those are 1 to 65535, or 0 for a free one"),
        ({"nodes": 1, "settings": {"linger": "x"}}, "linger = 'x' "),
    ],
)
def test_a_start_that_is_refused_makes_nothing(tmp_path: Path, wrong: dict[str, object], sentence: str) -> None:
    """Not even a directory."""
    with pytest.raises(Refused) as refused:
        Cluster.up(tmp_path / "state", **wrong)  # type: ignore[arg-type]

    assert str(refused.value).startswith(sentence)
    assert list(tmp_path.iterdir()) == []


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """The sentence says what to do."""
    (port,) = free_ports(1)
    async with await asyncio.start_server(lambda reader, writer: None, HOST, port):
        with pytest.raises(Refused) as refused:
            Cluster.up(tmp_path, nodes=1, port=port)

    assert str(refused.value) == (
        f"port {port} of 127.0.0.1 cannot be had: Address already in use. Name another --port, or none for a free one"
    )


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    """One with something else in it, and a file."""
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(Refused, match="is not empty, and has no cluster in it"):
        Cluster.up(tmp_path, nodes=1)
    with pytest.raises(Refused, match="cannot be a state directory: it is a file"):
        Cluster.up(file, nodes=1)
    with pytest.raises(Refused, match="no cluster is in"):
        Cluster.at(tmp_path)

    assert list(tmp_path.iterdir()) == [file]


async def test_the_end_comes_in_order_whatever_is_left(tmp_path: Path) -> None:
    """A parked poll gets its cursor; what died or stands still is no obstacle; logs are kept if so wished."""
    state = tmp_path / "state"
    settings = {"drain_window": "60"}
    cluster = await asyncio.to_thread(lambda: Cluster.up(state, nodes=3, example=True, settings=settings))
    client = Server(cluster.public)
    try:
        dead, paused, _ = cluster.nodes
        assert cluster.example is not None
        assert await asyncio.to_thread(fetch, cluster.public, "/health") == (200, {"status": "pass"})
        await asyncio.to_thread(cluster.kill, dead.name)
        await asyncio.to_thread(cluster.example.kill)
        poll = asyncio.create_task(client.request(b"GET /poll?channel=a HTTP/1.1\r\nHost: x\r\n\r\n", PATIENCE_S))
        async with asyncio.timeout(PATIENCE_S):
            while not any(load["parked"] for load in (await asyncio.to_thread(paused.load)).values()):
                await asyncio.sleep(0.05)
        await asyncio.to_thread(paused.pause)
        assert {row["state"] for row in (await asyncio.to_thread(cluster.status))["processes"]} >= {"dead", "paused"}
    finally:
        await asyncio.to_thread(lambda: cluster.down(keep_logs=True))

    assert msgspec.json.decode((await poll).body)["messages"] == []
    await client.close()
    assert processes_in(state) == []
    assert [path.name for path in state.iterdir()] == ["logs"]
    logs = sorted(path.name for path in (state / "logs").iterdir())
    assert logs == ["example.log", "haproxy.log", "node1.log", "node2.log", "node3.log", "redis1.log"]


def test_remains_are_not_built_upon(tmp_path: Path) -> None:
    """A cluster whose processes are all gone, as after a restart of the machine, is removed by `down` only."""
    cluster = Cluster.up(tmp_path / "state", nodes=1)
    with taken_down(cluster):
        for process in cluster.processes:
            process.kill()

        with pytest.raises(Refused, match="holds the remains of a cluster that has ended; `down` removes them"):
            Cluster.up(tmp_path / "state", nodes=1)
        assert not cluster.status()["whole"]


def test_under_sentinel(tmp_path: Path) -> None:
    """A master with two replicas, three sentinels, and nodes that find the master."""
    with taken_down(Cluster.up(tmp_path / "state", nodes=1, store="sentinel")) as cluster:
        assert [store.role() for store in cluster.stores] == ["master", "replica", "replica"]
        assert [sentinel.alive for sentinel in cluster.sentinels] == [True] * 3
        assert cluster.broker.startswith("redis+sentinel://")
        assert cluster.status()["whole"]
        with Publisher(cluster.broker) as publisher:
            id = publisher.publish("news", 1)
        assert fetch(cluster.public, "/poll?channel=news")[1]["messages"][0]["id"] == id


def test_on_a_redis_cluster(tmp_path: Path) -> None:
    """Three masters with a replica each, and nodes that find the master of their realm."""
    with taken_down(Cluster.up(tmp_path / "state", nodes=1, store="cluster")) as cluster:
        assert sorted(store.role() for store in cluster.stores) == ["master"] * 3 + ["replica"] * 3
        assert cluster.stores[0].role() == "master"
        assert cluster.broker.startswith("redis+cluster://")
        assert cluster.status()["whole"]
        with Publisher(cluster.broker) as publisher:
            id = publisher.publish("news", 1)
        assert fetch(cluster.public, "/poll?channel=news")[1]["messages"][0]["id"] == id
