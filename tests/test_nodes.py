"""The list of nodes: fetched from Redis or from the one node there is, and shown to people."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from pushup import __version__
from pushup.errors import BrokerRefused, Unavailable
from pushup.library import LOAD, Library
from pushup.messages import SECOND, NodeInfo
from pushup.nodes import fetch_nodes, show_nodes
from pushup.settings import Settings, load
from tests.redis_server import RedisServer
from tests.support import connected, parked, running

NOW = 1_700_000_000 * SECOND

ONE = NodeInfo(
    name="one",
    address="127.0.0.1:8080",
    admin_address="127.0.0.1:8081",
    version="1",
    state="ready",
    started=NOW - 200 * 60 * SECOND,
    seen=NOW - SECOND,
    parked=12_345,
    channels=1_000,
    connections=12_350,
    publications=5,
    deliveries=1_234_567,
)


def node(**changes: Any) -> NodeInfo:
    return msgspec.structs.replace(ONE, **changes)


def cell(nodes: list[NodeInfo], row: int, column: str) -> str:
    """What a table has in a place; cells are two spaces apart at least."""
    head, *rows = [line.split("  ") for line in show_nodes(nodes, NOW).splitlines()]
    columns = [word.strip() for word in head if word.strip()]
    return [word.strip() for word in rows[row] if word.strip()][columns.index(column)]


def settings(**given: Any) -> Settings:
    return load({name: str(value) for name, value in given.items()}, {}).settings


def test_the_table() -> None:
    """A line for each node, words to the left and numbers to the right, with a head."""
    drained = node(
        name="node-2", address="[::1]:1", state="draining", parked=0, channels=0, connections=1, deliveries=0
    )

    assert show_nodes([ONE, drained], NOW).splitlines() == [
        "NAME    ADDRESS         STATE     PARKED  CHANNELS  CONNECTIONS  PUBLISHED  DELIVERED   UP",
        "one     127.0.0.1:8080  ready     12,345     1,000       12,350          5  1,234,567  3 h",
        "node-2  [::1]:1         draining       0         0            1          5          0  3 h",
    ]


def test_nobody() -> None:
    """Only the head."""
    assert show_nodes([], NOW).splitlines() == [
        "NAME  ADDRESS  STATE  PARKED  CHANNELS  CONNECTIONS  PUBLISHED  DELIVERED  UP"
    ]


@pytest.mark.parametrize(
    ("microseconds", "state"),
    [(0, "ready"), (5 * SECOND, "ready"), (5 * SECOND + 1, "silent for 5 s"), (59 * SECOND, "silent for 59 s")],
)
def test_a_silent_node(microseconds: int, state: str) -> None:
    """One that has missed some heartbeats is shown so, whatever it said last."""
    assert cell([node(seen=NOW - microseconds)], 0, "STATE") == state


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (172_799, "47 h"),
        (172_800, "2 d"),
        (1000 * 86_400, "1000 d"),
    ],
)
def test_how_long_it_is_up(seconds: int, shown: str) -> None:
    """In the unit of which there are two at least."""
    assert cell([node(started=NOW - seconds * SECOND)], 0, "UP") == shown


async def test_the_one_node_there_is() -> None:
    """Without Redis the node itself is asked, at its admin address."""
    async with running(name="lonely") as server, connected(server) as client:
        client.send("GET /poll?channel=a HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)
        nodes, now = await asyncio.to_thread(asyncio.run, fetch_nodes(settings(admin_listen=server.admin_address)))

    (found,) = nodes
    assert (found.name, found.address, found.admin_address) == ("lonely", server.address, server.admin_address)
    assert (found.version, found.state, found.parked, found.channels, found.connections) == (
        __version__,
        "ready",
        1,
        1,
        1,
    )
    assert found.started <= found.seen == now
    assert cell(list(nodes), 0, "NAME") == "lonely"


async def test_no_node_at_the_admin_address() -> None:
    """The sentence names the address."""
    async with running() as server:
        address = server.admin_address

    with pytest.raises(Unavailable) as caught:
        await asyncio.to_thread(asyncio.run, fetch_nodes(settings(admin_listen=address)))

    assert str(caught.value).startswith(f"no node answers at {address}, the admin address: ")


async def test_a_node_on_every_interface() -> None:
    """Is asked on this machine's own."""
    async with running(admin_listen=":0", insecure=True, name="wide") as server:
        port = server.admin_address.rpartition(":")[2]
        nodes, _ = await asyncio.to_thread(asyncio.run, fetch_nodes(settings(admin_listen=f":{port}", insecure=True)))

    assert [found.name for found in nodes] == ["wide"]


async def test_a_proxy_is_not_for_nodes() -> None:
    """A proxy for the web that the environment names is not asked for a node of this machine."""
    async with running(name="near") as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pushup", "nodes", "--json", "--admin-listen", server.admin_address),
            env={"http_proxy": "http://127.0.0.1:1"},
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await process.communicate()

    assert process.returncode == 0
    assert [found["name"] for found in json.loads(printed)["nodes"]] == ["near"]


@asynccontextmanager
async def something_else(response: bytes) -> AsyncIterator[str]:
    """A server that is no node; its address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    try:
        yield f"{host}:{port}"
    finally:
        server.close()
        await server.wait_closed()


def http(body: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    "response",
    [
        http("<html>", "404 Not Found"),
        http("<html>"),
        http("{}"),
        http("[]"),
        http('{"nodes": [{"name": "x"}]}'),
        http('{"nodes": []}'),
        b"-ERR unknown command\r\n",
        b"",
    ],
    ids=["404", "page", "object", "array", "strangers", "none", "not HTTP", "nothing"],
)
async def test_another_server_at_the_admin_address(response: bytes) -> None:
    """Whatever it says, it is no node."""
    async with something_else(response) as address:
        with pytest.raises(Unavailable) as caught:
            await asyncio.to_thread(asyncio.run, fetch_nodes(settings(admin_listen=address)))

    assert str(caught.value).startswith(f"no node answers at {address}, the admin address: ")


async def test_the_nodes_of_a_realm(redis_server: RedisServer) -> None:
    """With Redis all of them are listed, by name, with the time there."""
    realm = uuid4().hex
    async with (
        running(broker=redis_server.url, realm=realm, name="b") as b,
        running(broker=redis_server.url, realm=realm, name="a") as a,
        running(broker=redis_server.url, realm=uuid4().hex, name="c"),
    ):
        nodes, now = await fetch_nodes(settings(broker=redis_server.url, realm=realm))

    assert [(found.name, found.address) for found in nodes] == [("a", a.address), ("b", b.address)]
    assert all(found.started <= found.seen <= now for found in nodes)


async def test_nodes_that_stopped_or_died(redis_server: RedisServer) -> None:
    """One that stops in good order is gone from the list at once; one that died is shown as silent."""
    realm = uuid4().hex
    library = Library(realm)
    async with running(broker=redis_server.url, realm=realm, name="stopped"):
        pass
    with redis_server.client() as client:
        time: Any = client.time()
        now = time[0] * SECOND + time[1]
        about = json.dumps(msgspec.to_builtins(node(name="died", started=now)))
        client.hset(f"{library.key}:nodes", "died", f"{now - 20 * SECOND} {about}")
    nodes, now = await fetch_nodes(settings(broker=redis_server.url, realm=realm))

    table = show_nodes(nodes, now)
    assert [found.name for found in nodes] == ["died"]
    assert "silent for 20 s" in table


async def test_a_realm_nobody_serves(redis_server: RedisServer) -> None:
    """Has no nodes, also in a Redis that has never seen one."""
    with redis_server.client() as client:
        client.function_flush()
    nodes, _ = await fetch_nodes(settings(broker=redis_server.url, realm=uuid4().hex))

    assert nodes == []


async def test_redis_does_not_answer() -> None:
    """The error says so after no longer than a broker may take."""
    with pytest.raises(Unavailable, match="cannot reach Redis"):
        await fetch_nodes(settings(broker="redis://127.0.0.1:1", broker_timeout=0.1))


async def test_a_user_who_may_not(redis_server: RedisServer) -> None:
    """What Redis has against it is told."""
    with redis_server.client() as client:
        client.execute_command(*LOAD)
        client.execute_command("ACL", "SETUSER", "guest", "on", ">secret", "+ping")
        try:
            with pytest.raises(BrokerRefused, match="no permissions"):
                await fetch_nodes(settings(broker=f"redis://guest:secret@127.0.0.1:{redis_server.port}"))
        finally:
            client.execute_command("ACL", "DELUSER", "guest")
