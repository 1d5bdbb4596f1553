"""Every limit, through a whole server and raw connections, on both sides of a node. Each test begins with its setting.

What every refusal has: its status and code, `Retry-After` where it passes by itself, its place in the metrics; and
somebody else is served meanwhile.
"""

import asyncio
import json
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import jwt
import pytest

import pushup.realm
from pushup.access import hash_key
from pushup.cli import GROUPS
from pushup.messages import Publication
from pushup.server import Server
from tests.redis_server import RedisServer
from tests.support import PATIENCE_S, Client, Reply, connected, eventually, parked, running
from tests.test_lane import later, tick

SECRET: Final = "a secret of thirty-two bytes or more"
KEY: Final = "pushup_key"
HOST: Final = "Host: test\r\n"
NEVER: Final = 1e6
"""Seconds that no test waits."""

SIDES: Final = pytest.mark.parametrize("side", ["lane", "web"])
WAYS: Final = pytest.mark.parametrize("way", ["lane", "lent", "handed over"])


def chunked(target: str, body: Any, headers: str = "") -> bytes:
    """A POST whose connection is handed over to the web side for good."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"POST {target} HTTP/1.1\r\n{HOST}{headers}Transfer-Encoding: chunked\r\n\r\n{len(data):x}\r\n".encode()
        + data
        + b"\r\n0\r\n\r\n"
    )


def whole(target: str, body: Any, headers: str = "") -> bytes:
    """A POST with its length; a poll is the lane's then, anything else is lent to the web side."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {target} HTTP/1.1\r\n{HOST}{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data


def post(side: str, target: str, body: Any, headers: str = "") -> bytes:
    return whole(target, body, headers) if side == "lane" else chunked(target, body, headers)


async def ask(server: Server, request: bytes) -> Reply:
    """The answer to one request on a connection of its own."""
    async with connected_from(server) as client:
        client.send(request)
        return await client.reply()


async def counted(server: Server, family: str) -> dict[str, int]:
    """What /metrics shows of a family with one label, without zeros."""
    async with connected(server, admin=True) as admin:
        text = (await admin.get("/metrics")).body.decode()
    lines = re.findall(rf'^{family}_total{{\w+="(\w+)"}} (\S+)$', text, re.MULTILINE)
    assert lines, family
    return {label: int(float(value)) for label, value in lines if float(value)}


async def refusals(server: Server) -> dict[str, int]:
    return await counted(server, "pushup_requests_refused")


async def cuts(server: Server) -> dict[str, int]:
    return await counted(server, "pushup_connections_cut")


async def is_refused(server: Server, reply: Reply, status: int, code: str, times: int = 1) -> None:
    """The answer says so, in a form that programs read, and the metrics do."""
    assert (reply.status, reply.json["status"], reply.json["code"]) == (status, status, code)
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json["detail"]
    if status in (429, 503):
        assert int(reply.headers["retry-after"]) == reply.json["retry_after"] >= 1
    else:
        assert "retry-after" not in reply.headers
    assert await refusals(server) == {code: times}


async def others_are_served(server: Server, address: str = "127.0.0.1", headers: str = "") -> None:
    """Somebody else publishes, and hears of it."""
    async with connected_from(server, address) as client:
        reply = await client.request("POST", "/publish", {"channels": ["others"], "data": 1}, headers)
        assert reply.status == 201, reply
        reply = await client.request("GET", f"/poll?channel=others&start={reply.json['id']}", headers=headers)
        assert [message["data"] for message in reply.json["messages"]] == [1]


@asynccontextmanager
async def connected_from(
    server: Server, address: str = "127.0.0.1", *, buffer: int | None = None
) -> AsyncIterator[Client]:
    """A connection from another address of this machine; `buffer` bytes are what it takes without being read."""
    host, _, port = server.address.rpartition(":")
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.bind((address, 0))
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=sock.dup())
        client = Client(reader, writer)
        try:
            yield client
        finally:
            writer.transport.abort()
            await asyncio.sleep(0)


def stop_reading(client: Client) -> None:
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]


def read_on(client: Client) -> None:
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]


async def is_cut(client: Client) -> bytes:
    """What was still said before the connection ended, in whatever way."""
    try:
        return await client.rest()
    except ConnectionError:
        return b""


def nobody_is_here(server: Server) -> Callable[[], bool]:
    return lambda: server.metrics.connections_opened == server.metrics.connections_closed


def access(folder: Path, rules: str = "", tokens: str = "") -> Path:
    """An access file with a key that may do everything, and tokens."""
    secret = folder / "secret"
    secret.write_text(SECRET)
    file = folder / "access.toml"
    file.write_text(
        f"[realms.default]\n{rules}\n"
        f'[[realms.default.keys]]\nname = "all"\nhash = "{hash_key(KEY)}"\n'
        'actions = ["publish", "manage", "subscribe"]\n'
        f'[realms.default.tokens]\nsecret_file = "{secret}"\n{tokens}\n'
    )
    return file


def bearer(credentials: str) -> str:
    return f"Authorization: Bearer {credentials}\r\n"


def token(subject: str | None = None, **more: Any) -> str:
    claims = {"exp": time.time() + 3600, "pushup": {"subscribe": ["*"], "publish": ["*"]}, **more}
    return jwt.encode({**claims, "sub": subject} if subject is not None else claims, SECRET, "HS256")


# head_bytes_max


def head(size: int, fields: int = 1, request: str = f"GET /poll?channel=a&timeout=0 HTTP/1.1\r\n{HOST}") -> bytes:
    """A head of exactly so many bytes, in so many long fields."""
    start = request.encode()
    names = [b"X-%d: " % number for number in range(fields)]
    room = size - len(start) - len(b"\r\n") - sum(len(name) + 2 for name in names)
    values = [b"x" * (room // fields + (number < room % fields)) for number in range(fields)]
    data = start + b"".join(name + value + b"\r\n" for name, value in zip(names, values, strict=True)) + b"\r\n"
    assert len(data) == size
    return data


@pytest.mark.parametrize("fields", [1, 4])
@pytest.mark.parametrize("step", [5000, 700, 100])
async def test_head_bytes_max(step: int, fields: int) -> None:
    """A head may be as long as the limit, in however many pieces and fields it comes; one byte more is 431."""
    async with running(head_bytes_max=2000) as server, connected(server) as client:
        for at in range(0, 2000, step):
            client.send(head(2000, fields)[at : at + step])
            await asyncio.sleep(0)
        assert (await client.reply()).status == 200

        client.send(head(2001, fields))

        await is_refused(server, await client.reply(), 431, "head_too_large")
        assert await client.rest() == b""
        await others_are_served(server)


async def test_head_bytes_max_without_an_end() -> None:
    """Nothing is kept of a head that is too long already, whether it ever ends or not."""
    async with running(head_bytes_max=2000) as server, connected(server) as client:
        client.send(head(100_000)[:3000])

        await is_refused(server, await client.reply(), 431, "head_too_large")
        assert await client.rest() == b""


@pytest.mark.parametrize("fields", [1, 4])
async def test_head_bytes_max_on_the_web_side(fields: int) -> None:
    """The same holds for what is handed over, also where each field alone is within the limit."""
    request = f"POST /publish HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n"
    body = b'1b\r\n{"channels":["a"],"data":1}\r\n0\r\n\r\n'
    async with running(head_bytes_max=2000) as server:
        assert (await ask(server, head(2000, fields, request) + body)).status == 201

        await is_refused(server, await ask(server, head(2001, fields, request) + body), 431, "head_too_large")


# body_bytes_max


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/poll", {"channels": ["a"], "timeout": 0}),
        ("/publish", {"channels": ["a"], "data": 1}),
        ("/channels", {}),
    ],
)
@SIDES
async def test_body_bytes_max(side: str, target: str, body: Any) -> None:
    """A body may be as long as the limit; one byte more is 413, whether its length was said before or not."""
    async with running(body_bytes_max=1000) as server:
        data = json.dumps(body).encode()
        assert (await ask(server, post(side, target, data.ljust(1000)))).status in (200, 201)

        await is_refused(server, await ask(server, post(side, target, data.ljust(1001))), 413, "too_large")
        await others_are_served(server)


@pytest.mark.parametrize("target", ["/poll", "/publish"])
async def test_body_bytes_max_is_known_before_the_body_comes(target: str) -> None:
    """A length that is too large is refused at once: nobody has to send 10 GB to hear that."""
    async with running(body_bytes_max=1000, request_timeout=NEVER) as server, connected(server) as client:
        client.send(f"POST {target} HTTP/1.1\r\n{HOST}Content-Length: 10000000000\r\n\r\n".encode())

        await is_refused(server, await client.reply(), 413, "too_large")


@pytest.mark.parametrize("target", ["/poll", "/publish"])
async def test_body_bytes_max_of_a_body_without_end(target: str) -> None:
    """Chunks are counted as they come, and the connection does not go on after too many."""
    async with running(body_bytes_max=1000, request_timeout=NEVER) as server, connected(server) as client:
        client.send(f"POST {target} HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(11):
            client.send(b"64\r\n" + b" " * 100 + b"\r\n")

        await is_refused(server, await client.reply(), 413, "too_large")


# request_timeout


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "idle"),
        (b"G", "slow"),
        (b"\r\n", "idle"),
        (f"GET /poll?channel=a HTTP/1.1\r\n{HOST}".encode(), "slow"),
        (f"POST /publish HTTP/1.1\r\n{HOST}".encode(), "slow"),
        (whole("/poll", {"channels": ["a"]})[:-1], "slow"),
    ],
)
async def test_request_timeout_of_a_head_or_a_short_body(data: bytes, reason: str) -> None:
    """A new connection has so long to ask for something, whole; it is cut though idle ones may stay longer."""
    async with running(request_timeout=15, keepalive_timeout=75) as server, connected_from(server) as client:
        client.send(data)
        await eventually(lambda: len(server._lanes.open) == 1, "it is here")
        await asyncio.sleep(0.01)
        tick(server, 14)
        assert await cuts(server) == {}
        tick(server, 16)

        assert await is_cut(client) == b""
        assert await cuts(server) == {reason: 1}
        await others_are_served(server)


async def test_request_timeout_of_a_head_that_drips() -> None:
    """A byte now and then does not make it longer."""
    async with running(request_timeout=15) as server, connected_from(server) as client:
        for second, byte in enumerate(f"GET /poll?channel=a HTTP/1.1\r\n{HOST}"[:14]):
            with later(server, second):
                client.send(byte)
                await eventually(
                    lambda sent=second: any(len(lane._buffer) == sent + 1 for lane in server._lanes.open),  # type: ignore[misc]
                    "the byte has come",
                )
        assert await cuts(server) == {}

        tick(server, 16)

        assert await is_cut(client) == b""
        assert await cuts(server) == {"slow": 1}


@pytest.mark.parametrize("target", ["/poll", "/publish", "/channels"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_request_timeout_of_a_body(framing: str, target: str) -> None:
    """A body that the web side reads has as long; then 408, and the connection is of no further use."""
    body = json.dumps({"channels": ["a"]}).encode().ljust(100_000)
    data = whole(target, body)[:-1] if framing == "length" else chunked(target, body)[:-5]
    async with running(request_timeout=0.1) as server, connected_from(server) as client:
        client.send(data)

        await is_refused(server, await client.reply(), 408, "request_timeout")
        assert await is_cut(client) == b""
        await others_are_served(server)


async def test_request_timeout_of_a_body_that_drips() -> None:
    """Neither does a byte now and then make this longer, nor what comes after the answer."""
    async with running(request_timeout=0.3) as server, connected_from(server) as client:
        client.send(whole("/publish", {"channels": ["a"], "data": "x" * 100_000})[:1000])

        async def drip() -> None:
            while True:
                client.send(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        begun = asyncio.get_running_loop().time()
        try:
            await is_refused(server, await client.reply(), 408, "request_timeout")
            await is_cut(client)
        finally:
            dripping.cancel()
        assert asyncio.get_running_loop().time() - begun < 5


async def test_request_timeout_of_a_proxy_header() -> None:
    """A trusted proxy, too, has so long to say whose connection it is."""
    async with running(request_timeout=15, proxy_protocol=True) as server, connected_from(server) as client:
        client.send(b"PROXY TCP4 ")
        await eventually(lambda: any(lane._buffer for lane in server._lanes.open), "it has come")

        tick(server, 16)

        assert await is_cut(client) == b""
        assert await cuts(server) == {"slow": 1}


# keepalive_timeout


@pytest.mark.parametrize(
    "data", [whole("/poll", {"channels": ["a"], "timeout": 0}), whole("/publish", {"channels": ["a"], "data": 1})]
)
async def test_keepalive_timeout(data: bytes) -> None:
    """Between requests a connection is kept so long, whichever side served it last."""
    async with running(keepalive_timeout=75, request_timeout=15) as server, connected_from(server) as client:
        client.send(data)
        await client.reply()
        tick(server, 74)
        client.send(data)
        await client.reply()
        tick(server, 74)
        assert await cuts(server) == {}

        tick(server, 74 + 77)  # Since when it is idle is known to a second.

        assert await is_cut(client) == b""
        assert await cuts(server) == {"idle": 1}
        await others_are_served(server)


async def test_keepalive_timeout_does_not_concern_what_was_handed_over() -> None:
    """Such a connection ends with its answer, so that it never idles, whatever was sent behind the request."""
    async with running(keepalive_timeout=NEVER) as server, connected_from(server) as client:
        client.send(chunked("/poll", {"channels": ["x"], "timeout": 0}) + b"GET /po")

        reply = await client.reply()

        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await is_cut(client) == b""
        await eventually(nobody_is_here(server), "nothing is left of it")


# write_timeout, write_buffer_bytes_max, unread_bytes_max

BIG: Final = 8_000_000
"""More than the buffers of a connection on this machine ever hold."""


async def store(server: Server, size: int = BIG, channel: str = "big") -> None:
    await server.node.publish(Publication((channel,), b'"' + b"x" * (size - 2) + b'"'))


def asking(way: str) -> bytes:
    """A request whose answer is big."""
    if way == "lane":
        return f"GET /poll?channel=big HTTP/1.1\r\n{HOST}\r\n".encode()
    if way == "handed over":
        return chunked("/poll", {"channels": ["big"]})
    return whole("/publish", [{}] * 40_000)


def unread(server: Server) -> int:
    return server._lanes._unread_bytes


ROOM: Final = {"message_bytes_max": BIG, "answer_bytes_max": BIG, "publish_batch_max": 40_000}


@WAYS
async def test_write_timeout(way: str) -> None:
    """A client has so long to read an answer, whoever wrote it; then the connection is cut."""
    async with running(write_timeout=30, **ROOM) as server, connected_from(server, buffer=4096) as client:
        await store(server)
        stop_reading(client)
        client.send(asking(way))
        await eventually(lambda: unread(server) > 0, "it does not read")
        await others_are_served(server)
        tick(server, 29)
        assert await cuts(server) == {}

        tick(server, 31)

        assert await cuts(server) == {"unread": 1}
        await eventually(nobody_is_here(server), "nothing is left of it")
        assert unread(server) == 0


@WAYS
async def test_write_timeout_of_a_client_that_catches_up(way: str) -> None:
    """Who reads in time has everything, goes on, and owes nothing."""
    async with running(write_timeout=30, **ROOM) as server, connected_from(server, buffer=4096) as client:
        await store(server)
        stop_reading(client)
        client.send(asking(way))
        await eventually(lambda: unread(server) > 0, "it does not read")

        read_on(client)
        assert len((await client.reply()).body) > 1_000_000

        assert unread(server) == 0
        tick(server, 31)
        assert await cuts(server) == {}
        if way != "handed over":
            assert (await client.get("/poll?channel=a&timeout=0")).status == 200


@pytest.mark.parametrize("way", ["lane", "lent"])
async def test_write_buffer_bytes_max(way: str) -> None:
    """Who leaves more than this unread gets no further answer before he has read; then all of them come."""
    flags = {**ROOM, "write_buffer_bytes_max": 10_000, "message_bytes_max": 300_000}
    async with running(**flags) as server, connected_from(server, buffer=4096) as client:
        await store(server, 300_000)
        stop_reading(client)
        client.send((asking("lane") if way == "lane" else whole("/publish", [{}] * 1000)) * 100)
        await eventually(lambda: unread(server) > 0, "there is no more room for answers")
        await asyncio.sleep(0.05)
        assert server.metrics.requests_lane + server.metrics.requests_web < 60
        assert unread(server) < 10_000 + 2 * 300_000
        await others_are_served(server)

        read_on(client)

        assert {(await client.reply()).status for _ in range(100)} == {200}
        assert unread(server) == 0


async def test_write_buffer_bytes_max_of_a_parked_poll() -> None:
    """A client that still has something to read is not read from, so no poll of it parks and piles up answers."""
    async with running(**ROOM) as server, connected_from(server, buffer=4096) as client:
        await store(server)
        stop_reading(client)
        client.send(asking("lane") + f"GET /poll?channel=a HTTP/1.1\r\n{HOST}\r\n".encode())
        await eventually(lambda: unread(server) > 0, "it does not read")
        await others_are_served(server)
        assert server.node.parked == 0

        read_on(client)
        await client.reply()

        await parked(server, 1)


@WAYS
async def test_unread_bytes_max(way: str) -> None:
    """All clients together may leave so much unread; beyond it, who has not read longest is cut, and nobody else."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(unread_bytes_max=2 * BIG, **ROOM))
        await store(server)
        order = ["lane", way, "lane", "handed over"]
        clients = []
        for number, each in enumerate(order):
            client = await stack.enter_async_context(connected_from(server, buffer=4096))
            stop_reading(client)
            before = len(server._lanes._unread) + server.metrics.connections_cut["unread"]
            client.send(asking(each))
            await eventually(
                lambda before=before: (  # type: ignore[misc]
                    len(server._lanes._unread) + server.metrics.connections_cut["unread"] > before
                ),
                f"client {number} does not read",
            )
            clients.append(client)
            assert unread(server) <= 2 * BIG
        cut = (await cuts(server))["unread"]
        assert 1 <= cut < len(order)
        await others_are_served(server)

        for client in clients:
            read_on(client)
        sizes = [len(await is_cut(client)) if number < cut else -1 for number, client in enumerate(clients)]

        assert all(size < BIG for size in sizes)
        for client in clients[cut:]:
            assert len((await client.reply()).body) > 1_000_000
        assert unread(server) == 0


async def test_unread_bytes_max_counts_what_was_left_by_those_who_are_gone() -> None:
    """A client that vanishes owes nothing any more, on either side."""
    async with running(**ROOM) as server:
        await store(server)
        for way in ("lane", "lent", "handed over"):
            async with connected_from(server, buffer=4096) as client:
                stop_reading(client)
                client.send(asking(way))
                await eventually(lambda: unread(server) > 0, "it does not read")

            await eventually(lambda: unread(server) == 0, f"nothing is owed by one that was {way}")
        assert await cuts(server) == {}


# connections_per_address_max


class Door(NamedTuple):
    """A way that client addresses are known by: settings, the server's view of who connects, what is said first."""

    flags: dict[str, Any]
    peer: str
    hello: Callable[[str], bytes]


def v2(host: str) -> bytes:
    payload = socket.inet_aton(host) + socket.inet_aton("127.0.0.1") + struct.pack("!HH", 4711, 80)
    return b"\r\n\r\n\x00\r\nQUIT\n" + struct.pack("!BBH", 0x21, 0x11, len(payload)) + payload


DOORS: Final = {
    "direct": Door({"trusted_proxies": ""}, "", lambda _: b""),
    "PROXY 1": Door(
        {"proxy_protocol": True}, "127.0.0.1", lambda host: f"PROXY TCP4 {host} 127.0.0.1 4711 80\r\n".encode()
    ),
    "PROXY 2": Door({"proxy_protocol": True}, "127.0.0.1", v2),
}


@asynccontextmanager
async def entering(server: Server, door: Door, host: str) -> AsyncIterator[Client]:
    """A connection of a client, through that door."""
    async with connected_from(server, door.peer or host) as client:
        client.send(door.hello(host))
        yield client


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Door:
    return DOORS[request.param]


POLL: Final = f"GET /poll?channel=a HTTP/1.1\r\n{HOST}\r\n".encode()


async def test_connections_per_address_max(door: Door) -> None:
    """The first that is too many is told so when it asks, on from twice as many without a word; others are served."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(connections_per_address_max=2, **door.flags))
        good = [await stack.enter_async_context(entering(server, door, "127.0.0.2")) for _ in range(2)]
        for client in good:
            client.send(POLL)
        await parked(server, 2)

        for number in range(2):
            surplus = await stack.enter_async_context(entering(server, door, "127.0.0.2"))
            surplus.send(POLL)
            await is_refused(server, await surplus.reply(), 429, "too_many_connections", number + 1)
            assert await surplus.rest() == b""

        async with entering(server, door, "127.0.0.3") as other:
            assert (await other.get("/poll?channel=a&timeout=0")).status == 200
        assert server.node.parked == 2
        assert await cuts(server) == {}


async def test_connections_per_address_max_of_a_flood(door: Door) -> None:
    """From twice the limit on nobody is told anything: that would only be more work."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(connections_per_address_max=2, **door.flags))
        for number in range(4):
            await stack.enter_async_context(entering(server, door, "127.0.0.2"))
            await eventually(lambda here=number + 1: count(server, "127.0.0.2") == here, "it is here")  # type: ignore[misc]

        async with entering(server, door, "127.0.0.2") as one, entering(server, door, "127.0.0.2") as other:
            assert await is_cut(one) == await is_cut(other) == b""

        assert await cuts(server) == {"flood": 2}
        assert await refusals(server) == {}
        assert count(server, "127.0.0.2") == 4
        async with entering(server, door, "127.0.0.3") as client:
            assert (await client.get("/poll?channel=a&timeout=0")).status == 200


def count(server: Server, host: str) -> int:
    return server.service.peers._connections.get(host, 0)


ENDS: Final[dict[str, bytes]] = {
    "nothing asked": b"",
    "half a head": b"GET /po",
    "a poll that waits": POLL,
    "a poll that waits on the web side": chunked("/poll", {"channels": ["a"]}),
    "a lent request that waits for its body": whole("/publish", {"channels": ["a"], "data": 1})[:-1],
    "a chunked request that waits for its body": chunked("/publish", {"channels": ["a"], "data": 1})[:-5],
    "a malformed request": b"nonsense\r\n\r\n",
    "a connection that was handed over": chunked("/nothing", {}),
}


@pytest.mark.parametrize("last", ENDS)
@pytest.mark.parametrize("vanishes", [False, True])
async def test_connections_per_address_max_is_freed(last: str, vanishes: bool, door: Door) -> None:
    """Whatever a connection was doing when it ended, and however it ended, its place is free again, once."""
    async with running(connections_per_address_max=1, **door.flags) as server:
        for _ in range(3):
            async with entering(server, door, "127.0.0.2") as client:
                await eventually(lambda: count(server, "127.0.0.2") == 1, "it is here")
                client.send(ENDS[last])
                if "waits" in last:
                    await asyncio.sleep(0.01)
                    assert count(server, "127.0.0.2") == 1
                if not vanishes:
                    client.writer.close()
            await eventually(lambda: len(server.service.peers) == 0, f"{last} frees its place")
        await eventually(nobody_is_here(server), "nobody is here")
        await eventually(lambda: server.node.parked == 0, "no poll is left")


async def test_connections_per_address_max_refused_on_the_web_side_too(door: Door) -> None:
    """What is too many hears so whatever it asks for."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(connections_per_address_max=1, **door.flags))
        first = await stack.enter_async_context(entering(server, door, "127.0.0.2"))
        await eventually(lambda: count(server, "127.0.0.2") == 1, "it is here")
        first.send(chunked("/poll", {"channels": ["a"]}))
        await parked(server, 1)

        async with entering(server, door, "127.0.0.2") as surplus:
            surplus.send(chunked("/poll", {"channels": ["a"]}))
            await is_refused(server, await surplus.reply(), 429, "too_many_connections")


async def test_connections_per_address_max_of_those_who_are_refused_and_say_nothing(door: Door) -> None:
    """Too many that do not even ask are cut after request_timeout, and no longer count."""
    async with AsyncExitStack() as stack:
        flags = {"connections_per_address_max": 1, "request_timeout": 15, **door.flags}
        server = await stack.enter_async_context(running(**flags))
        first = await stack.enter_async_context(entering(server, door, "127.0.0.2"))
        await eventually(lambda: count(server, "127.0.0.2") == 1, "it is here")
        first.send(POLL)
        await parked(server, 1)
        second = await stack.enter_async_context(entering(server, door, "127.0.0.2"))
        await eventually(lambda: count(server, "127.0.0.2") == 2, "the other one is, too")

        tick(server, 16)

        assert await is_cut(second) == b""
        await eventually(lambda: count(server, "127.0.0.2") == 1, "only the first is left")
        assert server.node.parked == 1


def forwarded(*hops: str) -> str:
    return f"X-Forwarded-For: {', '.join(hops)}\r\n"


@SIDES
async def test_connections_per_address_max_behind_a_proxy(side: str) -> None:
    """A proxy mixes its clients on its connections; so the polls that wait are counted, by the client it names."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(connections_per_address_max=2))

        async def ask(host: str, wait: float = 25) -> Client:
            client = await stack.enter_async_context(connected(server))
            client.send(post(side, "/poll", {"channels": ["a"], "timeout": wait}, forwarded("6.6.6.6", host)))
            return client

        first = await ask("192.0.2.1")
        await ask("192.0.2.1")
        await parked(server, 2)

        surplus = await ask("192.0.2.1")
        await is_refused(server, await surplus.reply(), 429, "too_many_connections")
        other = await ask("192.0.2.2", wait=0)
        assert (await other.reply()).status == 200
        await ask("192.0.2.2")
        await parked(server, 3)

        first.writer.transport.abort()
        await parked(server, 2)
        await ask("192.0.2.1")
        await parked(server, 3)
        assert count(server, "192.0.2.1") == 2
        await server.node.publish(Publication(("a",), b"1"))
        await eventually(lambda: len(server.service.peers) == 0, "polls that were answered do not count")


async def test_connections_per_address_max_behind_a_proxy_survives_its_pool() -> None:
    """On one connection of a proxy its clients take turns, and nothing is left of any of them."""
    async with running(connections_per_address_max=1) as server, connected(server) as proxy:
        for number in range(6):
            host = f"192.0.2.{number % 3}"
            proxy.send(whole("/poll", {"channels": ["a"], "timeout": 0.02 * (number % 2)}, forwarded(host)))
            assert (await proxy.reply()).status == 200
            assert len(server.service.peers) == 0


@SIDES
@pytest.mark.parametrize("said", [forwarded("192.0.2.1"), forwarded("127.0.0.1"), "X-Real-IP: 192.0.2.1\r\n"])
async def test_connections_per_address_max_believes_no_client(side: str, said: str) -> None:
    """Who is not a trusted proxy may say in X-Forwarded-For what he likes: he is counted by where he comes from."""
    flags = {"connections_per_address_max": 1, "trusted_proxies": "127.0.0.9"}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(**flags))
        first = await stack.enter_async_context(connected_from(server, "127.0.0.2"))
        first.send(post(side, "/poll", {"channels": ["a"]}, said))
        await parked(server, 1)
        assert list(server.service.peers._connections) == ["127.0.0.2"]

        async with connected_from(server, "127.0.0.2") as surplus:
            surplus.send(post(side, "/poll", {"channels": ["a"]}, said))
            await is_refused(server, await surplus.reply(), 429, "too_many_connections")
        async with connected_from(server, "127.0.0.3") as other:
            other.send(post(side, "/poll", {"channels": ["a"], "timeout": 0}, forwarded("127.0.0.2")))
            assert (await other.reply()).status == 200


async def test_connections_per_address_max_believes_no_clients_proxy_header() -> None:
    """A PROXY header of somebody who is no trusted proxy is no HTTP."""
    flags = {"connections_per_address_max": 9, "trusted_proxies": "127.0.0.9", "proxy_protocol": True}
    for hello in (b"PROXY TCP4 192.0.2.1 127.0.0.1 1 2\r\n", v2("192.0.2.1")):
        async with running(**flags) as server, connected_from(server, "127.0.0.2") as client:
            client.send(hello + POLL)

            assert b" 400 " in (await is_cut(client)).partition(b"\r\n")[0]
            assert server.node.parked == 0
            assert not count(server, "192.0.2.1")


@pytest.mark.parametrize("hello", [POLL, b"PROXY nonsense\r\n", b"\r\n\r\nGET"])
async def test_connections_per_address_max_of_a_proxy_that_forgets_its_header(hello: bytes) -> None:
    """With proxy_protocol, a trusted proxy that does not say whose connection it is has none."""
    async with running(proxy_protocol=True) as server, connected_from(server) as client:
        client.send(hello)

        assert await is_cut(client) == b""
        assert await refusals(server) == {"invalid_request": 1}


@pytest.mark.parametrize("hello", [b"PROXY UNKNOWN\r\n", b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"])
@SIDES
async def test_connections_per_address_max_does_not_count_a_proxy_itself(side: str, hello: bytes) -> None:
    """Health checks of the proxy are nobody's connection, however many; and its clients' words are not the proxy's."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(proxy_protocol=True, connections_per_address_max=1))
        for number in range(3):
            client = await stack.enter_async_context(connected(server))
            client.send(hello + post(side, "/poll", {"channels": ["a"]}, forwarded("192.0.2.1")))
            await parked(server, number + 1)

        assert len(server.service.peers) == 0


async def test_connections_per_address_max_of_a_header_in_pieces(door: Door) -> None:
    """A PROXY header may come byte by byte, and be followed at once by requests."""
    flags = {"connections_per_address_max": 1, **door.flags}
    async with running(**flags) as server, connected_from(server, door.peer or "127.0.0.2") as client:
        for byte in door.hello("127.0.0.2"):
            client.send(bytes([byte]))
            await asyncio.sleep(0)
        client.send(POLL.replace(b"channel=a", b"channel=a&timeout=0") * 2)

        assert [(await client.reply()).status for _ in range(2)] == [200, 200]
        assert count(server, "127.0.0.2") == 1


# polls_per_token_max


@SIDES
async def test_polls_per_token_max(side: str, tmp_path: Path) -> None:
    """So many polls wait with one token, or with tokens of one subject, on whatever connections; others' do."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(polls_per_token_max=2, access=access(tmp_path)))

        async def ask(credentials: str, wait: float = 25) -> Client:
            client = await stack.enter_async_context(connected(server))
            client.send(post(side, "/poll", {"channels": ["a"], "timeout": wait}, bearer(credentials)))
            return client

        first, second = token("ann", jti="1"), token("ann", jti="2")
        one = await ask(first)
        await ask(second)
        await parked(server, 2)

        surplus = await ask(first)
        await is_refused(server, await surplus.reply(), 429, "too_many_polls")
        for credentials in (token("bob"), KEY):
            other = await ask(credentials, wait=0)
            assert (await other.reply()).status == 200
        await others_are_served(server, headers=bearer(KEY))

        one.writer.transport.abort()
        await parked(server, 1)
        await ask(second)
        await parked(server, 2)
        await server.node.publish(Publication(("a",), b"1"))
        again = await ask(first, wait=0)
        assert (await again.reply()).status == 200


@SIDES
async def test_polls_per_token_max_without_a_subject(side: str, tmp_path: Path) -> None:
    """Tokens that do not say whose they are count each for itself."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(polls_per_token_max=1, access=access(tmp_path)))
        tokens = [token(jti=str(number)) for number in range(3)]
        for number, each in enumerate(tokens):
            client = await stack.enter_async_context(connected(server))
            client.send(post(side, "/poll", {"channels": ["a"]}, bearer(each)))
            await parked(server, number + 1)

        surplus = await stack.enter_async_context(connected(server))
        surplus.send(post(side, "/poll", {"channels": ["a"]}, bearer(tokens[1])))

        await is_refused(server, await surplus.reply(), 429, "too_many_polls")


async def test_polls_per_token_max_does_not_concern_keys(tmp_path: Path) -> None:
    """A back end's key may have any number of polls."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(polls_per_token_max=1, access=access(tmp_path)))
        for number in range(3):
            client = await stack.enter_async_context(connected(server))
            client.send(whole("/poll", {"channels": ["a"]}, bearer(KEY)))
            await parked(server, number + 1)


# poll_channels_max


@pytest.mark.parametrize("way", ["query", "body", "chunks"])
async def test_poll_channels_max(way: str) -> None:
    """A poll may name as many channels as the limit; one more is 413."""

    def naming(count: int) -> bytes:
        names = [f"c{number}" for number in range(count)]
        if way == "query":
            return f"GET /poll?timeout=0&channel={'&channel='.join(names)} HTTP/1.1\r\n{HOST}\r\n".encode()
        return post("lane" if way == "body" else "web", "/poll", {"channels": names, "timeout": 0})

    async with running(poll_channels_max=3) as server:
        assert (await ask(server, naming(3))).status == 200

        await is_refused(server, await ask(server, naming(4)), 413, "too_large")
        await others_are_served(server)


# poll_timeout, poll_timeout_max


@SIDES
async def test_poll_timeout(side: str) -> None:
    """So long waits a poll that does not say how long."""
    async with running(poll_timeout=0.2, poll_jitter=0) as server, connected(server) as client:
        begun = asyncio.get_running_loop().time()
        client.send(post(side, "/poll", {"channels": ["a"]}))
        await parked(server, 1)

        assert (await client.reply()).json["messages"] == []
        assert asyncio.get_running_loop().time() - begun >= 0.2


@SIDES
async def test_poll_timeout_max(side: str) -> None:
    """No poll waits longer, whatever it says."""
    async with running(poll_timeout=0, poll_timeout_max=0.2) as server, connected(server) as client:
        client.send(post(side, "/poll", {"channels": ["a"], "timeout": 1_000_000_000}))
        await parked(server, 1)

        assert (await client.reply()).json["messages"] == []


# answer_bytes_max


@SIDES
async def test_answer_bytes_max(side: str) -> None:
    """An answer has so many bytes of messages; `next` is where the rest begins, and nothing is lost or doubled."""
    async with running(answer_bytes_max=1000) as server, connected(server) as client:
        ids = []
        for number in range(10):
            body = {"channels": ["a"], "data": f"{number}".ljust(300)}
            ids.append((await client.request("POST", "/publish", body)).json["id"])

        seen, start = [], 0
        while True:
            answer = (await ask(server, post(side, "/poll", {"channels": ["a"], "start": start, "timeout": 0}))).json
            if not answer["messages"]:
                break
            assert sum(len(json.dumps(message["data"])) for message in answer["messages"]) <= 1000
            assert not answer["gap"]
            seen += [message["id"] for message in answer["messages"]]
            start = answer["next"]
            assert start == seen[-1] + 1

        assert seen == ids


@SIDES
async def test_answer_bytes_max_and_a_larger_message(side: str) -> None:
    """A message that is larger than an answer may be comes alone: it has to come somehow."""
    async with running(answer_bytes_max=100) as server, connected(server) as client:
        for _ in range(2):
            await client.publish("a", data="x" * 500)

        client.send(post(side, "/poll", {"channels": ["a"], "timeout": 0}))

        assert [len(message["data"]) for message in (await client.reply()).json["messages"]] == [500]


@SIDES
async def test_answer_bytes_max_of_a_poll_that_waited(side: str) -> None:
    """The same holds for a poll that was parked when messages came in one go."""
    async with running(answer_bytes_max=1000) as server, connected(server) as client:
        client.send(post(side, "/poll", {"channels": ["a"]}))
        await parked(server, 1)
        publications = [Publication(("a",), json.dumps("x" * 300).encode()) for _ in range(10)]
        await server.node.publish_all(publications)

        first = (await client.reply()).json
        second = (
            await ask(server, post(side, "/poll", {"channels": ["a"], "start": first["next"], "timeout": 0}))
        ).json

        for answer in (first, second):
            assert sum(len(json.dumps(message["data"])) for message in answer["messages"]) <= 1000
        assert second["messages"][0]["id"] > first["messages"][-1]["id"]
        assert not second["gap"]


# message_bytes_max, publish_channels_max, publish_batch_max


@SIDES
async def test_message_bytes_max(side: str) -> None:
    """Data may have as many bytes of JSON as the limit, however it is spelt; one more is 413."""
    async with running(message_bytes_max=100) as server:
        for data in (b'"' + b"x" * 98 + b'"', b"[" + b" " * 98 + b"]"):
            assert (await ask(server, post(side, "/publish", b'{"channels":["a"],"data":%b}' % data))).status == 201

        await is_refused(
            server,
            await ask(server, post(side, "/publish", b'{"channels":["a"],"data":"%b"}' % (b"x" * 99))),
            413,
            "too_large",
        )
        await others_are_served(server)


@SIDES
async def test_publish_channels_max(side: str) -> None:
    """A publication may name as many channels as the limit; one more is 413."""
    async with running(publish_channels_max=3) as server:
        assert (await ask(server, post(side, "/publish", {"channels": ["a", "b", "c"], "data": 1}))).status == 201

        await is_refused(
            server,
            await ask(server, post(side, "/publish", {"channels": ["a", "b", "c", "d"], "data": 1})),
            413,
            "too_large",
        )
        await others_are_served(server)


@SIDES
async def test_message_bytes_max_and_publish_channels_max_within_an_array(side: str) -> None:
    """Of an array, the items that are over a limit are refused, and no others."""
    items = [
        {"channels": ["a"], "data": "x" * 98},
        {"channels": ["a"], "data": "x" * 99},
        {"channels": ["a", "b", "c"], "data": 1},
        {"channels": ["a", "b", "c", "d"], "data": 1},
    ]
    async with running(message_bytes_max=100, publish_channels_max=3) as server, connected(server) as client:
        client.send(post(side, "/publish", items))
        reply = await client.reply()

        assert reply.status == 200
        assert [item["error"]["code"] if "error" in item else "stored" for item in reply.json] == [
            "stored",
            "too_large",
            "stored",
            "too_large",
        ]
        assert {item["error"]["status"] for item in reply.json if "error" in item} == {413}


@SIDES
async def test_publish_batch_max(side: str) -> None:
    """An array may have as many publications as the limit; with one more nothing of it is stored."""
    item = {"channels": ["a"], "data": 1}
    async with running(publish_batch_max=3) as server, connected(server) as client:
        assert (await ask(server, post(side, "/publish", [item] * 3))).status == 200

        await is_refused(server, await ask(server, post(side, "/publish", [item] * 4)), 413, "too_large")
        assert (await client.get("/channels/a")).json["messages"] == 3
        await others_are_served(server)


# publish_rate_max, token_publish_rate_max


class Clock:
    """Stands still until it is told the time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pushup.realm, "monotonic", clock)
    return clock


async def _rate(
    side: str, setting: str, credentials: Callable[[], str], other: Callable[[], str], folder: Path, clock: Clock
) -> None:
    file = access(folder, tokens="publish = true")
    mine, others = bearer(credentials()), bearer(other())
    item = {"channels": ["a"], "data": 1}
    async with running(access=file, **{setting: 3}) as server:

        async def publish(body: Any) -> Reply:
            return await ask(server, post(side, "/publish", body, mine))

        assert [(await publish(item)).status for _ in range(3)] == [201] * 3
        refused = await publish(item)
        await is_refused(server, refused, 429, "too_many_publications")
        await others_are_served(server, headers=others)

        clock.now += int(refused.headers["retry-after"])
        assert (await publish([item] * 30)).status == 200
        refused = await publish([item])
        await is_refused(server, refused, 429, "too_many_publications", 2)
        assert 9 <= int(refused.headers["retry-after"]) <= 11
        clock.now += int(refused.headers["retry-after"]) - 2
        assert (await publish(item)).status == 429
        clock.now += 2
        assert (await publish(item)).status == 201


@SIDES
async def test_publish_rate_max(side: str, tmp_path: Path, clock: Clock) -> None:
    """With one key so many a second are published, an array by its items; who is refused hears when to come back."""
    await _rate(side, "publish_rate_max", lambda: KEY, lambda: token("bob"), tmp_path, clock)


@SIDES
async def test_token_publish_rate_max(side: str, tmp_path: Path, clock: Clock) -> None:
    """The same for a token, and for all tokens of a subject."""
    await _rate(side, "token_publish_rate_max", lambda: token("ann"), lambda: KEY, tmp_path, clock)


async def test_token_publish_rate_max_is_the_subjects(tmp_path: Path, clock: Clock) -> None:
    """A new token does not make a subject faster, nor does it when nothing else is held by the old one."""
    file = access(tmp_path, tokens="publish = true")
    item = {"channels": ["a"], "data": 1}
    async with running(access=file, token_publish_rate_max=2) as server, connected(server) as client:
        statuses = [
            (await client.request("POST", "/publish", item, bearer(token("ann", jti=str(number))))).status
            for number in range(3)
        ]

        assert statuses == [201, 201, 429]


async def test_token_publish_rate_max_of_what_is_refused(tmp_path: Path, clock: Clock) -> None:
    """Publications that are wrong or forbidden cost time, too, so an array of them is paid for."""
    file = access(tmp_path, tokens="publish = true")
    forbidden = {"subscribe": [], "publish": ["mine"]}
    mine = bearer(token("ann", pushup=forbidden))
    async with running(access=file, token_publish_rate_max=2) as server, connected(server) as client:
        for item in ({}, {"channels": ["other"], "data": 1}):
            reply = await client.request("POST", "/publish", [item] * 20, mine)
            assert (reply.status, len(reply.json)) == (200, 20)

            reply = await client.request("POST", "/publish", {"channels": ["mine"], "data": 1}, mine)
            assert (reply.status, reply.json["code"]) == (429, "too_many_publications")
            clock.now += int(reply.headers["retry-after"])


# realm_bytes_max


@SIDES
async def test_realm_bytes_max(side: str) -> None:
    """A realm keeps so many bytes; then publications are 503 until messages expire, and polls go on."""
    async with running(realm_bytes_max=1000, channel_window=0.5) as server:

        async def publish(channel: str) -> Reply:
            return await ask(server, post(side, "/publish", {"channels": [channel], "data": "x" * 398}))

        assert [(await publish(channel)).status for channel in ("a", "b")] == [201, 201]
        await is_refused(server, await publish("c"), 503, "realm_full")
        async with connected(server) as other:
            assert len((await other.get("/poll?channel=a&timeout=0")).json["messages"]) == 1

        async def has_room() -> bool:
            return (await publish("c")).status == 201

        async with asyncio.timeout(PATIENCE_S):
            while not await has_room():
                await asyncio.sleep(0.05)
        assert (await refusals(server)).keys() == {"realm_full"}


async def test_realm_bytes_max_of_a_busy_channel() -> None:
    """What a publication pushes out of its own channel makes room for it."""
    async with running(realm_bytes_max=1000, channel_max_messages=2) as server, connected(server) as client:
        for _ in range(10):
            await client.publish("a", data="x" * 398)

        assert await refusals(server) == {}


# broker_timeout


@SIDES
async def test_broker_timeout(side: str, redis_server: RedisServer, tmp_path: Path) -> None:
    """Who publishes while the broker does not answer waits so long, and is told 503."""
    flags = {"broker": redis_server.url, "realm": f"limits-{side}-{tmp_path.name}"[:60], "broker_timeout": 0.3}
    async with running(**flags) as server, connected(server) as client:
        await client.publish("a")
        redis_server.pause()
        try:
            client.send(post(side, "/publish", {"channels": ["a"], "data": 1}))
            reply = await client.reply()
        finally:
            redis_server.resume()

        await is_refused(server, reply, 503, "unavailable")


# All of them


def test_every_limit_has_a_test() -> None:
    """A setting whose name ends in _max or _timeout has a test whose name begins with it."""
    limits = {
        name
        for title in ("this node", "polls", "publications", "channels")
        for name in GROUPS[title]
        if name.endswith(("_max", "_timeout"))
    } | {name for names in GROUPS.values() for name in names if name.endswith("_bytes_max")}
    tests = [name.removeprefix("test_") for name in globals() if name.startswith("test_")]
    tested = {max((limit for limit in limits if name.startswith(limit)), key=len, default="") for name in tests}

    assert len(limits) > 15
    assert limits <= tested, limits - tested
