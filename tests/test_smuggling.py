"""Request smuggling: odd requests through a real HAProxy, whose connection to the node the next client shares.

Between HAProxy and the node is a *tap*, which passes everything on and counts: HAProxy marks every request it sends, so
an answer too many or too few shows that the two disagree on where a request ends.
"""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from cluster.processes import HOST as LOOPBACK
from cluster.processes import find_programs, free_ports
from pushup.errors import ChannelNotFound
from pushup.head import Head, parse_head
from pushup.server import Server
from tests.fuzz.framing import read_responses
from tests.support import PATIENCE_S, Client, running
from tests.test_lane_differential import (
    EXECUTED,
    HIDDEN,
    MALFORMED,
    ORDINARY,
    SMUGGLING,
    TARGETS,
    chunked,
    post,
)

PROXIES: Final = ("strict", "lenient")
"""HAProxy as it comes, and one that lets requests pass which are not valid."""

CONFIG: Final = """\
defaults
    mode http
    timeout connect 5s
    timeout client 2s
    timeout server 2s
    timeout queue 10s
    retries 0

frontend strict
    bind {host}:{strict}
    default_backend node

frontend lenient
    bind {host}:{lenient}
    option accept-invalid-http-request
    default_backend node

backend node
    # One connection, which all clients share.
    http-reuse always
    http-request add-header X-Passed yes
    server node {host}:{tap} maxconn 1 pool-max-conn 1
"""

IN_ITS_OWN_RIGHT: Final = b'x-passed: yes\r\n\r\n{"channels":["hidden"]'
"""Where HAProxy takes the hidden request for one more, as it sees it the same way as the node."""

MARK: Final = b"x-passed: yes\r\n"
SETTLE_S: Final = 0.03
"""For how long a client waits for a further answer, of which it cannot know whether it comes."""

VECTORS: Final = {
    **SMUGGLING,
    **{f"malformed, {name}": data for name, data in MALFORMED.items()},
    **{f"ordinary, {name}": ORDINARY[name] for name in ("poll, publish, poll", "Expect", "HTTP/1.0 keep-alive", "413")},
    **{f"target, {name}": TARGETS[name] for name in ("absolute-form", "fragment", "NUL in the target", "backslash")},
    "a body that is short": post(b"/nothing", HIDDEN)[:-1],
    "a body that is long": post(b"/nothing", HIDDEN) + b"x",
    "chunks that do not end": chunked(b"/nothing", HIDDEN, end=b""),
    "two hidden ones": post(b"/publish", HIDDEN + HIDDEN),
}
LEAST_PASSED: Final = {"strict": 70, "lenient": 75}
"""Of so many vectors at least HAProxy passes something on: else this would be a test of HAProxy alone."""


@dataclass
class Link:
    """One connection from HAProxy to the node."""

    passed: bytes = b""
    answered: bytes = b""

    @property
    def requests(self) -> int:
        """Those that HAProxy saw in what it sent."""
        return self.passed.lower().count(MARK)

    @property
    def answers(self) -> int:
        return sum(response.status != 100 for response in read_responses(self.answered))


@dataclass
class Tap:
    """Passes bytes on between HAProxy and the node, and keeps them."""

    server: Server
    links: list[Link] = field(default_factory=list)
    serving: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link()
        self.links.append(link)
        host, _, port = self.server.address.rpartition(":")
        node_reader, node_writer = await asyncio.open_connection(host, int(port))

        async def up() -> None:
            while data := await reader.read(65536):
                link.passed += data
                node_writer.write(data)
            node_writer.close()

        async def down() -> None:
            while data := await node_reader.read(65536):
                link.answered += data
                writer.write(data)
            writer.close()

        task = asyncio.current_task()
        assert task is not None
        self.serving[task] = writer
        try:
            with suppress(ConnectionError):
                await asyncio.gather(up(), down())
        finally:
            del self.serving[task]
            node_writer.close()
            writer.close()


@dataclass
class Setting:
    """HAProxy in front of the tap in front of a node."""

    server: Server
    tap: Tap
    ports: dict[str, int]
    passed: dict[str, set[str]] = field(default_factory=lambda: {proxy: set() for proxy in PROXIES})
    smuggled: list[str] = field(default_factory=list)
    shared: int = 0
    """How often a victim's request went where the attacker's had gone."""

    async def attack(self, name: str, data: bytes, proxy: str) -> None:
        """Send the vector, then be someone else on the same backend connection, and check what came of it."""
        before = [len(link.passed) for link in self.tap.links]
        async with AsyncExitStack() as stack:
            attacker = await stack.enter_async_context(_connected(self.ports[proxy]))
            attacker.send(data)
            await _all_of(attacker)
            links = dict(enumerate(self.tap.links))
            used = {n for n, link in links.items() if n >= len(before) or len(link.passed) > before[n]}
            if used:
                self.passed[proxy].add(name)
            if not used or any(links[n].answers < links[n].requests for n in used):
                # The node still waits for the rest of a request: nobody can share that connection.
                await stack.aclose()
            async with _connected(self.ports[proxy]) as victim:
                for n in range(2):
                    own = f"victim-{n}"
                    reply = await victim.get(f"/channels/{own}")
                    assert (reply.status, own.encode() in reply.body) == (404, True), f"{name}: another's: {reply}"
            self.shared += any(b"victim-1" in links[n].passed[-1000:] for n in used)
        passed = b"".join(link.passed[before[n] if n < len(before) else 0 :] for n, link in enumerate(self.tap.links))
        if await self.executed() and IN_ITS_OWN_RIGHT not in passed.lower():
            self.smuggled.append(name)

    async def executed(self) -> bool:
        """Whether the hidden publication was; and forget it."""
        try:
            await self.server.node.broker.close("hidden")
        except ChannelNotFound:
            return False
        return True

    def check_links(self) -> None:
        """Every answer is to a request, and none is a fault of the node's."""
        for link in self.tap.links:
            responses = read_responses(link.answered)
            assert {response.status for response in responses if response.status >= 500} == set()
            assert link.answers <= link.requests, f"{link.answers} answers to {link.requests} requests: {link.passed!r}"


@asynccontextmanager
async def _connected(port: int) -> AsyncIterator[Client]:
    """A connection that may have been reset by its end."""
    client = Client(*await asyncio.open_connection(LOOPBACK, port))
    try:
        yield client
    finally:
        with suppress(ConnectionError):
            await client.close()


async def _all_of(client: Client) -> bytes:
    """What comes until the end of the connection, or until nothing has come for a while."""
    got = b""
    with suppress(TimeoutError, ConnectionError):
        while True:
            async with asyncio.timeout(SETTLE_S):
                data = await client.reader.read(65536)
            if not data:
                break
            got += data
    return got


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[dict[str, int]]:
    """A running HAProxy: ports by name."""
    (program,) = find_programs("haproxy")
    strict, lenient, tap = free_ports(3)
    made = {"strict": strict, "lenient": lenient, "tap": tap}
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(host=LOOPBACK, **made))
    process = subprocess.Popen([program, "-db", "-q", "-f", config], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield made
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert b"[ALERT]" not in errors, errors


@asynccontextmanager
async def setting(ports: dict[str, int]) -> AsyncIterator[Setting]:
    async with running(body_bytes_max=4096, poll_timeout=0.01, poll_timeout_max=0.01) as server:
        tap = Tap(server)
        listener = await asyncio.start_server(tap.serve, LOOPBACK, ports["tap"])
        made = Setting(server, tap, ports)
        async with asyncio.timeout(PATIENCE_S):
            for proxy in PROXIES:
                while True:
                    with suppress(OSError):
                        async with _connected(ports[proxy]):
                            break
                    await asyncio.sleep(0.02)
        try:
            yield made
        finally:
            listener.close()
            for writer in tap.serving.values():
                writer.transport.abort()
            await asyncio.gather(*tap.serving)


@pytest.mark.parametrize("proxy", PROXIES)
async def test_nobody_is_harmed_behind_haproxy(proxy: str, ports: dict[str, int]) -> None:
    """After each vector the next client on the same connection gets its own answers, and nothing hidden was done."""
    async with setting(ports) as it:
        for name, data in VECTORS.items():
            await it.attack(name, data, proxy)

        assert it.smuggled == []
        it.check_links()
        passed = it.passed[proxy]
        assert len(passed) >= LEAST_PASSED[proxy]
        assert len(passed & set(SMUGGLING)) >= 20
        assert it.shared >= 60


async def test_a_node_that_does_not_see_bodies_is_found_out(
    ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the hidden publication for a request, and gives one answer too many."""

    def blind(data: bytes) -> Head:
        head = parse_head(data)
        if head.target == b"/poll":
            head.length = 0
        return head

    monkeypatch.setattr("pushup.lane.parse_head", blind)
    async with setting(ports) as it:
        await it.attack("hidden", SMUGGLING["a body of a poll"], "strict")

        assert it.smuggled == ["hidden"]
        with pytest.raises(AssertionError, match="answers to"):
            it.check_links()


@pytest.mark.parametrize("whole", [True, False])
async def test_nobody_is_harmed_without_haproxy(whole: bool) -> None:
    """The same vectors over a socket of the node's own, at once and in pieces."""
    async with running(body_bytes_max=4096, poll_timeout=0.01, poll_timeout_max=0.01) as server:
        port = int(server.address.rpartition(":")[2])
        for name, data in VECTORS.items():
            async with _connected(port) as attacker, _connected(port) as victim:
                for piece in [data] if whole else [data[n : n + 7] for n in range(0, len(data), 7)]:
                    if not attacker.writer.is_closing():
                        attacker.send(piece)
                        await asyncio.sleep(0)
                responses = read_responses(await _all_of(attacker))
                reply = await victim.get(f"/channels/victim-{len(name)}")

            assert {response.status for response in responses if response.status >= 500} == set(), name
            assert reply.json["channel"] == f"victim-{len(name)}"
            if name in EXECUTED:
                with suppress(ChannelNotFound):
                    await server.node.broker.close("hidden")
            else:
                with pytest.raises(ChannelNotFound):
                    await server.node.broker.describe("hidden")
