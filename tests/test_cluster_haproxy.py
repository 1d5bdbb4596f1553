"""HAProxy: what its configuration says, and that it does so, with nodes that are doubles."""

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.haproxy import HTTP_NODES, TCP_NODES, Proxy, Server, render
from cluster.processes import HOST, find_programs, free_ports
from tests.chaos.client import NoAnswer, NotSent
from tests.chaos.client import Server as Client
from tests.support import PATIENCE_S

NODES = [Server("node1", 9001, 9101), Server("node7", 9007, 9107)]


def section(text: str, head: str) -> list[str]:
    """The lines of a section, without those that are empty or comments."""
    _, _, rest = f"\n{text}".partition(f"\n{head}\n")
    body = re.split(r"\n\S", rest)[0]
    return [line.strip() for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_every_node_is_in_both_backends() -> None:
    """With its port, and the port of its admin listener to be checked."""
    text = render(8000, 8001, NODES, 0, 120, 20_000)

    for backend in (HTTP_NODES, TCP_NODES):
        servers = [line for line in section(text, f"backend {backend}") if line.startswith("server ")]
        assert servers == ["server node1 127.0.0.1:9001 port 9101", "server node7 127.0.0.1:9007 port 9107"]


def test_browsers_reach_polls_and_the_example() -> None:
    """Exactly three paths go to the nodes, everything else to the application."""
    frontend = section(render(8000, 8001, NODES, 8002, 120, 20_000), "frontend public")

    polls = "acl polls path_reg ^((/realms/[^/]+)?/(poll|events|stream|ws)|/pushup[.]js)$"
    assert frontend.index(polls) < frontend.index("use_backend nodes if polls")
    assert "bind 127.0.0.1:8000" in frontend
    assert "default_backend example" in frontend
    assert not any("return status" in line for line in frontend)


def test_without_the_example_there_is_a_clear_404() -> None:
    """It says what is where."""
    text = render(8000, 8001, NODES, 0, 120, 20_000)

    (rule,) = [line for line in section(text, "frontend public") if "return status 404" in line]
    assert rule.endswith("unless polls")
    assert "http://127.0.0.1:8001" in rule
    assert "backend example" not in text


@pytest.mark.parametrize(("hold_s", "silence", "stop"), [(120.0, "130s", "150s"), (300.5, "310s", "330s")])
def test_no_timeout_is_shorter_than_a_poll(hold_s: float, silence: str, stop: str) -> None:
    """Those of both sides, and the life of a former worker, follow the longest hold that the nodes allow."""
    text = render(8000, 8001, NODES, 0, hold_s, 20_000)

    assert f"timeout client {silence}" in section(text, "defaults")
    assert f"timeout server {silence}" in section(text, "defaults")
    assert f"hard-stop-after {stop}" in section(text, "global")


@pytest.mark.parametrize(("descriptors", "clients"), [(20_000, 9750), (1024, 262), (256, 100), (1_000_000_000, 49_750)])
def test_clients_fit_the_descriptors(descriptors: int, clients: int) -> None:
    """Two for each, and not without bound where a container has no limit."""
    assert f"maxconn {clients}" in section(render(8000, 8001, NODES, 0, 120, descriptors), "global")


@pytest.mark.parametrize("example", [0, 8002])
@pytest.mark.parametrize("nodes", [NODES, []], ids=["nodes", "none"])
def test_haproxy_has_nothing_against_it(tmp_path: Path, example: int, nodes: list[Server]) -> None:
    """Neither an error nor a warning."""
    (program,) = find_programs("haproxy")
    (tmp_path / "haproxy.cfg").write_text(render(8000, 8001, nodes, example, 120, 20_000))

    checked = subprocess.run(
        [program, "-c", "-f", tmp_path / "haproxy.cfg"], capture_output=True, text=True, check=False
    )

    assert (checked.returncode, checked.stderr) == (0, "")


class FakeNode:
    """Answers everything with its name, when it is let; its readiness is what `status` says."""

    def __init__(self, name: str, port: int, check_port: int) -> None:
        self.server = Server(name, port, check_port)
        self.name = name
        self.status = "200 OK"
        self.asked: list[str] = []
        self.open = asyncio.Event()
        self.open.set()
        self.dies = False
        """It closes the connection when it is asked something, as a node does that is killed with a poll."""
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["FakeNode"]:
        async with (
            await asyncio.start_server(self._serve, HOST, self.server.port),
            await asyncio.start_server(self._check, HOST, self.server.check_port),
        ):
            try:
                yield self
            finally:
                self.open.set()
                for writer in self._serving.values():
                    writer.transport.abort()
                await asyncio.gather(*self._serving)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = writer
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.asked.append(head.split("\r\n")[0])
                await self.open.wait()
                if self.dies:
                    break
                body = self.name.encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        except (asyncio.IncompleteReadError, ConnectionError):
            ...
        finally:
            del self._serving[task]
            await _close(writer)

    async def _check(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 {self.status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


class Setting:
    """HAProxy, which found both nodes ready."""

    def __init__(self, proxy: Proxy, nodes: list[FakeNode], ports: tuple[int, int]) -> None:
        self.proxy = proxy
        self.nodes = nodes
        self.public, self.tcp = (f"{HOST}:{port}" for port in ports)
        self.ports = ports

    async def configure(self, *nodes: FakeNode) -> None:
        servers = [node.server for node in nodes]
        await asyncio.to_thread(self.proxy.configure, *self.ports, servers, 0, 120.0)
        await asyncio.to_thread(self.proxy.expect_up, [node.name for node in nodes])

    async def until(self, state: str, node: FakeNode) -> None:
        """Return once HAProxy thinks so of the node."""
        async with asyncio.timeout(PATIENCE_S):
            while (await asyncio.to_thread(self.proxy.servers))[HTTP_NODES, node.name] != state:
                await asyncio.sleep(0.02)

    async def ask(self, target: str = "/poll?start=5", method: str = "GET") -> tuple[int, str]:
        """Status and body of one request on a connection of its own."""
        client = Client(self.public)
        try:
            return await self.ask_by(client, target, method)
        finally:
            await client.close()

    async def ask_by(self, client: Client, target: str = "/poll?start=5", method: str = "GET") -> tuple[int, str]:
        response = await client.request(f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), PATIENCE_S)
        return response.status, response.body.decode()

    async def park(self, *clients: Client) -> "list[asyncio.Task[tuple[int, str]]]":
        """A request of each that waits, half of them with each node: HAProxy gives the next one to who has fewer."""
        for node in self.nodes:
            node.open.clear()
        tasks = []
        for number, client in enumerate(clients, self._asked + 1):
            tasks.append(asyncio.create_task(self.ask_by(client)))
            async with asyncio.timeout(PATIENCE_S):
                while self._asked < number:
                    await asyncio.sleep(0.01)
        return tasks

    @property
    def _asked(self) -> int:
        return sum(len(node.asked) for node in self.nodes)


async def close(clients: Sequence[Client]) -> None:
    for client in clients:
        await client.close()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    # As long as the path of a state directory may be, and too long for a socket.
    directory = tmp_path / ("a" * 200)
    directory.mkdir()
    proxy = Proxy(directory, "haproxy", "")
    yield proxy
    proxy.kill()


@asynccontextmanager
async def setting(proxy: Proxy) -> AsyncIterator[Setting]:
    ports = free_ports(6)
    nodes = [FakeNode("node1", ports[0], ports[1]), FakeNode("node2", ports[2], ports[3])]
    async with AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node.serving())
        made = Setting(proxy, nodes, (ports[4], ports[5]))
        await made.configure(*nodes)
        yield made


async def test_a_poll_with_a_cursor_outlives_its_node(proxy: Proxy) -> None:
    """HAProxy asks another node. Nothing else is asked twice: `start=latest` would skip what came in between."""
    async with setting(proxy) as it:
        dying, living = it.nodes
        dying.dies = True

        for target in ("/poll?channel=a&start=5", "/poll?start=0&channel=a"):
            assert [await it.ask(target) for _ in range(4)] == [(200, "node2")] * 4
        assert len(dying.asked) >= 2
        living.dies = True
        for node in it.nodes:
            node.asked.clear()
        for method, target in (
            ("GET", "/poll?channel=a&start=latest"),
            ("GET", "/poll?channel=a"),
            ("POST", "/poll?start=5"),
            ("GET", "/events?start=5"),
        ):
            assert (await it.ask(target, method))[0] == 502

        assert len(dying.asked) + len(living.asked) == 4


async def test_a_node_that_is_not_ready_keeps_its_polls(proxy: Proxy) -> None:
    """It gets no new ones, and those it has are answered when it answers them."""
    async with setting(proxy) as it:
        draining, other = it.nodes
        clients = [Client(it.public) for _ in range(4)]
        parked = await it.park(*clients)

        draining.status = "503 Service Unavailable"
        await it.until("nolb", draining)
        other.open.set()
        assert [await it.ask() for _ in range(4)] == [(200, "node2")] * 4
        assert len(draining.asked) == 2
        draining.open.set()

        assert sorted([await poll for poll in parked]) == [(200, "node1")] * 2 + [(200, "node2")] * 2
        await close(clients)


async def test_a_node_that_is_drained_keeps_its_polls(proxy: Proxy) -> None:
    """It gets no new ones at once, without waiting for a health check."""
    async with setting(proxy) as it:
        draining, other = it.nodes
        clients = [Client(it.public) for _ in range(2)]
        parked = await it.park(*clients)

        await asyncio.to_thread(proxy.drain, draining.name)
        states = await asyncio.to_thread(proxy.servers)
        other.open.set()
        assert [await it.ask() for _ in range(4)] == [(200, "node2")] * 4
        draining.open.set()

        assert sorted([await poll for poll in parked]) == [(200, "node1"), (200, "node2")]
        assert {states[backend, "node1"] for backend in (HTTP_NODES, TCP_NODES)} == {"drain"}
        await close(clients)


async def test_a_reload_loses_nobody(proxy: Proxy) -> None:
    """A parked poll is answered by the former worker, and its client asks the new one next."""
    async with setting(proxy) as it:
        gone, kept = it.nodes
        clients = [Client(it.public) for _ in range(6)]
        parked = await it.park(*clients)

        await it.configure(kept)
        kept.open.set()
        gone.open.set()

        assert sorted([await poll for poll in parked]) == [(200, "node1")] * 3 + [(200, "node2")] * 3
        gone.asked.clear()
        assert [await it.ask_by(client) for client in clients] == [(200, "node2")] * 6
        assert gone.asked == []
        await close(clients)


async def test_connections_take_turns_over_tcp(proxy: Proxy) -> None:
    """As in the paper's evaluation."""
    async with setting(proxy) as it:
        bodies = []
        for _ in range(4):
            client = Client(it.tcp)
            bodies.append((await client.request(b"GET /anything HTTP/1.1\r\n\r\n", PATIENCE_S)).body)
            await client.close()

        assert sorted(bodies) == [b"node1", b"node1", b"node2", b"node2"]
        assert bodies[0] != bodies[1]


async def test_a_configuration_that_haproxy_refuses(proxy: Proxy) -> None:
    """It is not taken over: the one before goes on."""
    async with setting(proxy) as it:
        config = proxy.directory / "haproxy.cfg"
        config.write_text(config.read_text() + "\nfrontend nonsense\n    fly\n")

        with pytest.raises(ClusterError, match=r"(?s)HAProxy refuses its configuration: .*unknown keyword 'fly'"):
            await asyncio.to_thread(proxy.reload)

        assert (await it.ask())[0] == 200


async def test_haproxy_that_died_is_started_by_a_reload(proxy: Proxy) -> None:
    """With the same configuration."""
    async with setting(proxy) as it:
        await asyncio.to_thread(proxy.kill)
        assert (proxy.servers(), proxy.ask("show info")) == ({}, "")
        with pytest.raises((NotSent, NoAnswer)):
            await it.ask()

        await asyncio.to_thread(proxy.reload)

        assert (await it.ask())[0] == 200


async def test_haproxy_that_cannot_start_shows_its_log(proxy: Proxy) -> None:
    """A port that somebody took in the meantime, for one."""
    (port, other) = free_ports(2)
    async with await asyncio.start_server(lambda reader, writer: None, HOST, port):
        with pytest.raises(ClusterError, match="haproxy ended before it was serving") as failed:
            await asyncio.to_thread(proxy.configure, port, other, [], 0, 120.0)

    assert f"{HOST}:{port}" in str(failed.value)
    assert not proxy.alive
