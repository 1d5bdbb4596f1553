"""The express lane: what a client on one connection sees, and what a parked poll costs."""

import asyncio
import gc
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, cast

import pytest
from aiohttp import web

from pushup.broker import Tell
from pushup.errors import ChannelNotFound, PushUpError
from pushup.head import is_malformed
from pushup.lane import (
    AHEAD_BYTES_MAX,
    BODY_BYTES_MAX,
    CUT_AT_ONCE,
    GREETING,
    PUBLISHER_BYTES_MAX,
    PUBLISHERS_MAX,
    SHORT_HEAD_BYTES,
)
from pushup.messages import Publication, Receipt
from pushup.server import Server
from tests import pipes
from tests.support import PATIENCE_S, connected, parked, running

HOST = "Host: test\r\n"


def get(target: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    lines = "".join(header + "\r\n" for header in headers)
    return f"{method} {target} HTTP/{version}\r\n{HOST}{lines}\r\n".encode()


def post(target: str, body: Any, *headers: str, version: str = "1.1") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return get(target, f"Content-Length: {len(data)}", *headers, method="POST", version=version) + data


def publish(channel: str, data: Any = None) -> bytes:
    return post("/publish", {"channels": [channel], "data": data})


def lent(channel: str, data: Any = None) -> bytes:
    """A publication that is lent to the web side."""
    return post("/publish", {"channels": [channel], "data": data}, "Content-Encoding: identity")


async def say(server: Server, channel: str, data: bytes = b"1") -> int:
    """Publish behind the server's back; the id."""
    return (await server.node.publish(Publication((channel,), data))).id


def web_connections(server: Server) -> Sequence[web.RequestHandler]:
    """The web side's connections, lent ones included."""
    assert server._web.server is not None
    return server._web.server.connections


class Ahead:
    """The event loop, some seconds later by its clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds

    def time(self) -> float:
        return self._loop.time() + self._seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


@contextmanager
def later(server: Server, seconds: float) -> Iterator[None]:
    """Some seconds later, as the lanes see it."""
    lanes = server._lanes
    loop = lanes.loop
    lanes.loop = cast(asyncio.AbstractEventLoop, Ahead(loop, seconds))
    try:
        yield
    finally:
        lanes.loop = loop


def tick(server: Server, seconds: float) -> None:
    """Have the lanes look at their clock some seconds from now."""
    with later(server, seconds):
        server._lanes.tick()


async def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


# One connection, many requests


async def test_a_connection_is_kept_for_further_polls() -> None:
    """Poll after poll is served on one connection, and none by the web side."""
    async with running() as server, connected(server) as client:
        for _ in range(3):
            reply = await client.get("/poll?channel=a&timeout=0")
            assert reply.status == 200
            assert "connection" not in reply.headers

        assert server.metrics.connections_opened == 1
        assert (server.metrics.requests_lane, server.metrics.requests_web) == (3, 0)


async def test_an_answer_has_exactly_these_headers() -> None:
    """An answer says its type, its length and its date, and that it must not be stored."""
    async with running() as server, connected(server) as client:
        reply = await client.get("/poll?channel=a&timeout=0")

        assert reply.version == "HTTP/1.1"
        assert parsedate_to_datetime(reply.headers.pop("date")).tzinfo is not None
        assert reply.headers == {
            "content-type": "application/json",
            "cache-control": "no-store",
            "content-length": str(len(reply.body)),
        }


async def test_the_date_is_that_of_the_last_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Date header is made once a second, not for every answer."""
    async with running() as server, connected(server) as client:
        monkeypatch.setattr("pushup.lane.formatdate", lambda usegmt: "Fri, 13 Feb 2009 23:31:30 GMT")
        server._lanes.tick()

        reply = await client.get("/poll?channel=a&timeout=0")

        assert reply.headers["date"] == "Fri, 13 Feb 2009 23:31:30 GMT"


async def test_pipelined_polls_are_answered_in_order() -> None:
    """Hundreds of polls in one segment get their answers in the order of the polls."""
    async with running() as server:
        for n in range(300):
            await say(server, f"c{n}", b"%d" % n)
        client = pipes.lane(server)

        responses = await client.receive(b"".join(get(f"/poll?channel=c{n}") for n in range(300)))

        assert [response.json["messages"][0]["data"] for response in responses] == list(range(300))
        assert server.metrics.requests_lane == 300


async def test_pipelined_polls_are_answered_in_order_over_a_socket() -> None:
    """The same over TCP."""
    async with running() as server, connected(server) as client:
        for n in range(300):
            await say(server, f"c{n}", b"%d" % n)

        client.send(b"".join(get(f"/poll?channel=c{n}") for n in range(300)))

        assert [(await client.reply()).json["messages"][0]["data"] for _ in range(300)] == list(range(300))


async def test_pipelined_polls_and_publications_take_effect_in_order() -> None:
    """In a mixed pipeline each request is served once, after the one before it."""
    async with running() as server:
        client = pipes.lane(server)
        poll = get("/poll?channel=a&timeout=0")

        responses = await client.receive(poll + publish("a", 1) + poll + lent("a", 2) + publish("a", 3) + poll)

        assert [response.status for response in responses] == [200, 201, 200, 201, 201, 200]
        seen = [[message["data"] for message in responses[n].json["messages"]] for n in (0, 2, 5)]
        assert seen == [[], [1], [1, 2, 3]]
        assert (server.metrics.requests_lane, server.metrics.requests_web) == (5, 1)
        assert server.node.metrics.publications == 3


async def test_a_known_head_may_come_with_any_part_of_its_body() -> None:
    """Whole, cut anywhere, with the next request behind it: it is the same publication."""
    async with running() as server:
        client = pipes.lane(server)
        request = publish("a", 1)
        for cut in range(1, len(request) + 1):
            await client.receive(request[:cut])
            await client.receive(request[cut:] + request)
        await client.receive(request)

        count = 2 * len(request) + 1
        assert [response.status for response in client.responses] == [201] * count
        assert (server.node.metrics.publications, len(server._lanes.publishers)) == (count, 1)


async def test_a_poll_waits_for_the_one_before_it() -> None:
    """While a poll is parked, those behind it on its connection are neither served nor lost."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=a") + get("/poll?channel=b&timeout=0") + publish("c") + get("/nothing"))
        assert server.node.parked == 1
        assert client.sent == b""

        await say(server, "a")
        await client.settle()

        assert [response.status for response in client.responses] == [200, 200, 201, 404]


async def test_what_comes_while_a_poll_is_parked_is_served_after_it() -> None:
    """A client may send its next requests, in any pieces, before its poll is answered."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=a"))
        data = publish("b", 7) + get("/poll?channel=b")

        await client.receive(*[data[n : n + 5] for n in range(0, len(data), 5)])
        await say(server, "a", b"6")
        await client.settle()

        answers = client.responses
        assert [answer.status for answer in answers] == [200, 201, 200]
        assert [answers[n].json["messages"][0]["data"] for n in (0, 2)] == [6, 7]


async def test_a_request_that_is_complete_later_is_served_then() -> None:
    """What is still incomplete when a parked poll is answered waits for its rest."""
    async with running() as server:
        client = pipes.lane(server)
        data = get("/poll?channel=b&timeout=0")
        await client.receive(get("/poll?channel=a"), data[:20])
        await say(server, "a")
        await client.settle()
        assert len(client.responses) == 1

        await client.receive(data[20:])

        assert [response.status for response in client.responses] == [200, 200]


SPLIT = {
    "GET /poll": (get("/poll?channel=x&timeout=0", "Accept: */*"), 200),
    "HEAD /poll": (get("/poll?channel=x&timeout=0", method="HEAD"), 200),
    "POST /poll": (post("/poll", {"channels": ["x"], "timeout": 0}), 200),
    "POST /publish": (publish("a", "some data"), 201),
    "POST /nothing": (post("/nothing", {"some": "data"}), 404),
    "wrong poll": (post("/poll", {"channels": []}), 400),
    "blank lines": (b"\r\n\r\n" + get("/poll?channel=x&timeout=0"), 200),
    "HTTP/1.0": (get("/poll?channel=x&timeout=0", "Connection: keep-alive", version="1.0"), 200),
}


@pytest.mark.parametrize("name", SPLIT)
async def test_a_request_may_be_split_at_any_byte(name: str) -> None:
    """Wherever it is cut in two, a request is answered once and the same, and the connection goes on."""
    data, status = SPLIT[name]
    async with running() as server:
        for cut in range(1, len(data)):
            client = pipes.lane(server)
            await client.receive(data[:cut], data[cut:], get("/poll?channel=x&timeout=0"))
            (response, after) = client.responses
            assert response.status == status
            assert after.json["messages"] == []
            client.hang_up()

        served = len(data) - 1
        assert server.node.metrics.publications == (served if name == "POST /publish" else 0)
        assert server.metrics.connections_opened == served


async def test_requests_may_come_byte_by_byte() -> None:
    """A whole conversation in segments of one byte is no different."""
    async with running() as server:
        client = pipes.lane(server)
        data = get("/poll?channel=a&timeout=0") + publish("a", 5) + post("/poll", {"channels": ["a"]}) + get("/nothing")

        responses = await client.receive(*[data[n : n + 1] for n in range(len(data))])

        assert [response.status for response in responses] == [200, 201, 200, 404]
        assert responses[2].json["messages"][0]["data"] == 5


async def test_requests_may_come_byte_by_byte_over_a_socket() -> None:
    """The same over TCP."""
    async with running() as server, connected(server) as client:
        data = get("/poll?channel=a&timeout=0") + publish("a", 5) + post("/poll", {"channels": ["a"]})
        for n in range(len(data)):
            client.send(data[n : n + 1])
            await asyncio.sleep(0)

        assert [(await client.reply()).status for _ in range(3)] == [200, 201, 200]


async def test_a_poll_may_have_a_long_body() -> None:
    """A body as long as the lane takes is read by the lane, one byte more by the web side, with the same answer."""
    async with running() as server:
        client = pipes.lane(server)
        longest = json.dumps({"channels": ["a"], "timeout": 0}).encode().ljust(BODY_BYTES_MAX)

        first = await client.receive(post("/poll", longest)[:50000], post("/poll", longest)[50000:])
        second = await client.receive(post("/poll", longest + b" "))

        assert [first[0].status, second[0].status] == [200, 200]
        assert first[0].json["messages"] == second[0].json["messages"] == []
        assert (server.metrics.requests_lane, server.metrics.requests_web) == (1, 1)


# The end of a connection


@pytest.mark.parametrize(
    "request_",
    [
        get("/poll?channel=a&timeout=0", "Connection: close"),
        post("/poll", {"channels": ["a"], "timeout": 0}, "Connection: close"),
        get("/poll?channel=a&timeout=0", "Connection: close", method="HEAD"),
        get("/poll?channel=", "Connection: close"),
        get("/poll?channel=1", "Connection: close"),
        publish("a").replace(HOST.encode(), HOST.encode() + b"Connection: close\r\n"),
    ],
)
async def test_a_client_may_ask_to_close(request_: bytes) -> None:
    """After Connection: close there is one answer, it says so too, and the connection ends."""
    async with running() as server:
        client = pipes.lane(server)

        responses = await client.receive(request_ + get("/poll?channel=a&timeout=0"))

        assert [response.headers["connection"] for response in responses] == ["close"]
        assert client.closing
        assert not client.aborted
        assert not server._lanes.open


async def test_a_parked_poll_may_ask_to_close() -> None:
    """A parked poll's connection ends with its answer, if it said so."""
    async with running() as server, connected(server) as client:
        client.send(get("/poll?channel=a", "Connection: close"))
        await parked(server, 1)

        await say(server, "a")

        assert (await client.reply()).headers["connection"] == "close"
        assert await client.rest() == b""


@pytest.mark.parametrize("park", [True, False])
async def test_http10_closes(park: bool) -> None:
    """HTTP/1.0 is answered as such, and the connection ends."""
    async with running() as server, connected(server) as client:
        client.send(get("/poll?channel=a" + ("" if park else "&timeout=0"), version="1.0"))
        if park:
            await parked(server, 1)
            await say(server, "a")

        reply = await client.reply()

        assert (reply.version, reply.status) == ("HTTP/1.0", 200)
        assert "connection" not in reply.headers
        assert await client.rest() == b""


@pytest.mark.parametrize("park", [True, False])
async def test_http10_may_ask_to_keep_the_connection(park: bool) -> None:
    """HTTP/1.0 with keep-alive is told so, and the connection goes on."""
    async with running() as server, connected(server) as client:
        for _ in range(2):
            client.send(
                get(
                    "/poll?channel=a&start=latest" + ("" if park else "&timeout=0"),
                    "Connection: keep-alive",
                    version="1.0",
                )
            )
            if park:
                await parked(server, 1)
                await say(server, "a")

            reply = await client.reply()

            assert (reply.version, reply.headers["connection"]) == ("HTTP/1.0", "keep-alive")


# HEAD


@pytest.mark.parametrize("query", ["channel=a&timeout=0", "channel=", "channel=1", "channel=b"])
async def test_head_is_get_without_the_body(query: str) -> None:
    """HEAD is answered with the headers of GET, and nothing after them."""
    async with running() as server:
        await say(server, "b")
        client = pipes.lane(server)

        (got, head) = await client.receive(get(f"/poll?{query}"), get(f"/poll?{query}", method="HEAD"))

        assert got.body
        assert (head.line, head.headers, head.body) == (got.line, got.headers, b"")


async def test_a_parked_head_is_answered_without_a_body() -> None:
    """A HEAD poll waits as a GET poll does."""
    async with running() as server, connected(server) as client:
        client.send(get("/poll?channel=a", method="HEAD"))
        await parked(server, 1)

        await say(server, "a")

        reply = await client.reply(head=True)
        assert reply.status == 200
        assert int(reply.headers["content-length"]) > 40
        assert (await client.get("/poll?channel=x&timeout=0")).status == 200


# What the lane answers


async def test_a_wrong_poll_gets_a_problem_document() -> None:
    """A poll that makes no sense is refused by the lane, is counted, and the connection goes on."""
    async with running() as server, connected(server) as client:
        reply = await client.get("/poll?channel=a&start=yesterday")

        assert reply.status == 400
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.json == {
            "type": "about:blank",
            "title": "Bad Request",
            "status": 400,
            "code": "invalid_parameter",
            "detail": "start is an id between 0 and 9007199254740991, or latest",
            "parameter": "start",
        }
        assert server.metrics.refused["invalid_parameter"] == 1
        assert (await client.get("/poll?channel=a&timeout=0")).status == 200
        assert server.metrics.requests_web == 0


async def test_a_poll_is_in_the_query_or_in_the_body() -> None:
    """POST /poll with a query is refused."""
    async with running() as server, connected(server) as client:
        reply = await client.request("POST", "/poll?channel=a", {"channels": ["a"]})

        assert (reply.status, reply.json["code"]) == (400, "invalid_request")
        assert reply.json["detail"] == "a poll is in the query or in the body, not both"


async def test_a_channel_that_turns_out_not_to_exist_is_404() -> None:
    """A poll that fails after it was parked is answered with the error, and the connection goes on."""
    async with running() as server, connected(server) as client:
        reply = await client.get("/poll?channel=7")

        assert (reply.status, reply.json["code"], reply.json["channel"]) == (404, "channel_not_found", 7)
        assert server.metrics.refused["channel_not_found"] == 1
        assert (await client.get("/poll?channel=a&timeout=0")).status == 200


async def test_an_answer_is_rendered_once_for_all_who_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fan-out encodes one response for each way to write it: by version, method and end of the connection."""
    async with running() as server:
        rendered = []
        render = server._lanes.render

        def count(*args: Any) -> bytes:
            rendered.append(args)
            return render(*args)

        monkeypatch.setattr(server._lanes, "render", count)
        clients = [pipes.lane(server) for _ in range(40)]
        for client in clients[:20]:
            await client.receive(get("/poll?channel=a"))
        for client in clients[20:]:
            await client.receive(get("/poll?channel=a", method="HEAD"))

        await say(server, "a")

        assert len(rendered) == 2
        assert len({client.sent for client in clients}) == 2


# A client that vanishes


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/poll?channel=a"), "parked"),
        (get("/poll?channel=a", method="HEAD"), "parked"),
        (post("/poll", {"channels": ["a", "b", "c"]}), "parked"),
        (get("/poll?channel=a&timeout=0") + get("/poll?channel=a"), "parked behind another"),
        (publish("x") + get("/poll?channel=a"), "parked behind a publication"),
        (get("/poll?channel=a", "Transfer-Encoding: chunked") + b"0\r\n\r\n", "parked by the web side"),
        (post("http://test/poll", {"channels": ["a"]}), "parked by the web side"),
    ],
)
async def test_a_vanished_client_frees_its_poll_at_once(request_: bytes, status: str) -> None:
    """When the connection is lost, nothing of its parked poll is left."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(request_)
        assert server.node.parked == 1

        client.hang_up()
        await client.settle()

        assert server.node.parked == 0
        assert server.node.metrics.answers["gone"] == 1
        assert not server._lanes.open
        assert not web_connections(server)


async def test_a_vanished_client_frees_its_poll_over_a_socket() -> None:
    """The same over TCP."""
    async with running() as server:
        async with connected(server) as client:
            client.send(get("/poll?channel=a"))
            await parked(server, 1)

        await parked(server, 0)

        assert not server._lanes.open


async def test_a_client_that_vanishes_during_set_up_frees_its_poll_at_once() -> None:
    """The client may go while its channels are still being read from the broker."""
    async with running() as server:
        client = pipes.lane(server)
        client.push(get("/poll?channel=a"))
        assert server.node.parked == 1

        client.hang_up()

        assert server.node.parked == 0
        assert not server._lanes.open
        await client.settle()
        assert client.sent == b""


@pytest.mark.parametrize("cut", [1, 30, -20, -1])
@pytest.mark.parametrize("request_", [get("/poll?channel=a"), post("/poll", {"channels": ["a"]}), publish("a")])
async def test_a_client_that_vanishes_within_a_request_leaves_nothing(request_: bytes, cut: int) -> None:
    """Half a request ends with its connection, and was never a request."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(request_[:cut])

        client.hang_up()
        await client.settle()

        assert not server._lanes.open
        assert not web_connections(server)
        assert server.node.parked == server.node.metrics.publications == 0


async def test_a_client_that_vanishes_while_it_publishes_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lent request is cancelled when its client goes."""
    async with running() as server:
        waiting = asyncio.Event()
        cancelled = asyncio.Event()

        async def publish_slowly(publications: Sequence[Publication]) -> Sequence[Receipt | PushUpError]:
            waiting.set()
            try:
                await asyncio.sleep(PATIENCE_S)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return ()

        monkeypatch.setattr(server.node.broker, "publish", publish_slowly)
        client = pipes.lane(server)
        client.push(lent("a"))
        await waiting.wait()

        client.hang_up()
        await cancelled.wait()
        await client.settle()

        assert not server._lanes.open
        assert not web_connections(server)


# Publications that wait for the broker


class SlowBroker:
    """What `Broker.submit` is while the broker takes its time."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[Callable[[], None]] = []
        """For each request, in order, what tells it that all is stored."""
        monkeypatch.setattr(server.node.broker, "submit", self._submit)

    def _submit(self, publications: Sequence[Publication], tell: Tell) -> None:
        results = [Receipt(len(self.told) + 1) for _ in publications]
        self.told.append(lambda: tell(results))


async def test_a_publication_is_answered_when_the_broker_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client sends meanwhile is served after it, and the client is not late."""
    async with running(request_timeout=15) as server:
        broker = SlowBroker(server, monkeypatch)
        client = pipes.lane(server)
        await client.receive(publish("a") + publish("b"), get("/poll?channel=a&timeout=0"))
        tick(server, 100_000)
        server._lanes.close_idle()
        assert (client.sent, client.closing, len(broker.told)) == (b"", False, 1)

        broker.told[0]()
        await client.settle()
        assert [response.json for response in client.responses] == [{"id": 1}]
        broker.told[1]()
        await client.settle()

        assert [response.status for response in client.responses] == [201, 201, 200]
        assert not web_connections(server)


async def test_a_client_that_vanishes_while_the_broker_stores_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gone at once, and what becomes of its publication is told to nobody."""
    async with running() as server:
        broker = SlowBroker(server, monkeypatch)
        client = pipes.lane(server)
        await client.receive(publish("a"))

        client.hang_up()
        assert not server._lanes.open
        broker.told[0]()

        assert client.sent == b""
        assert server.node.metrics.publications == 1


async def test_a_publisher_that_stops_the_server_is_told_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publication under way when the server is going away is answered, as the last of its connection."""
    async with running() as server:
        broker = SlowBroker(server, monkeypatch)
        client = pipes.lane(server)
        await client.receive(publish("a") + publish("hidden"))

        server.service.closing = True
        broker.told[0]()
        await client.settle()

        (response,) = client.responses
        assert (response.status, response.headers["connection"]) == (201, "close")
        assert client.closing
        assert len(broker.told) == 1


async def test_a_publisher_may_be_cut_by_what_it_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery in the middle of a publication may cut any client that does not read, the publisher too."""
    async with running() as server:
        client = pipes.lane(server)
        on_message = server.node.on_message

        def cut(*event: Any) -> None:
            on_message(*event)
            client.lane.abort()

        monkeypatch.setattr(server.node, "on_message", cut)
        await server.node.broker.watch({"a": 0})

        await client.receive(publish("a") + publish("a"))

        assert client.sent == b""
        assert server.node.metrics.publications == 1


async def test_what_is_remembered_of_publishers_is_bounded() -> None:
    """Heads are remembered by their bytes, so that others are not taken for them; not those that come once."""
    async with running() as server:
        client = pipes.lane(server)
        for n in range(PUBLISHERS_MAX + 2):
            client.push(post("/publish", {"channels": ["a"], "data": 1}, f"X: {n}"))
        await client.settle()
        known = dict(server._lanes.publishers)

        await client.receive(post("/publish", {"channels": ["a"], "data": 1}, "Idempotency-Key: k"))
        await client.receive(post("/publish", {"channels": ["a"], "data": 1}, "X: " + "y" * PUBLISHER_BYTES_MAX))
        await client.receive(post("/nothing", {"channels": ["a"], "data": 1}))

        assert len(known) == 2
        assert server._lanes.publishers == known


# A client that sends too much, or reads too little


async def test_a_flood_while_parked_is_not_read() -> None:
    """What a client sends ahead is bounded: then the server stops reading. All of it is served in the end."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=a"))
        ahead = get("/poll?channel=x&timeout=0") * 100
        while client.reading:
            client.push(ahead)
        for _ in range(50):
            client.push(ahead)
        pushed = (client.unread + len(client.lane._buffer)) // len(ahead) * 100
        assert AHEAD_BYTES_MAX < len(client.lane._buffer) <= AHEAD_BYTES_MAX + len(ahead)

        await say(server, "a")
        await client.settle()

        assert client.unread == 0
        assert client.reading
        assert len(client.responses) == 1 + pushed


@pytest.mark.parametrize(
    "ahead",
    [
        get("/poll?channel=a&start=latest"),
        lent("x"),
        get("/channels/x"),
        publish("x") + get("/poll?channel=a&start=latest"),
        post("/nothing", b"x" * 5000) + get("/poll?channel=a&start=latest"),
    ],
)
async def test_answering_does_not_let_a_flood_in(ahead: bytes) -> None:
    """However many of its requests are answered, a client that sends faster than that has no more read ahead."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=a&start=latest"))
        segment = ahead * (16384 // len(ahead))
        for _ in range(40):
            client.push(segment)
        most = 0

        for _ in range(300):
            await say(server, "a")
            await asyncio.sleep(0)
            most = max(most, len(client.lane._buffer))

        assert most <= AHEAD_BYTES_MAX + 2 * len(segment)
        assert client.unread > 0
        client.hang_up()


async def test_a_flood_over_a_socket_is_served_in_the_end() -> None:
    """The same over TCP."""
    async with running() as server, connected(server) as client:
        client.send(get("/poll?channel=a"))
        await parked(server, 1)
        client.send(get("/poll?channel=x&timeout=0") * 20_000)
        lane = next(iter(server._lanes.open))
        await until(lambda: len(lane._buffer) > AHEAD_BYTES_MAX)
        assert not lane._transport.is_reading()

        await say(server, "a")

        for _ in range(20_001):
            assert (await client.reply()).status == 200
        assert lane._transport.is_reading()


async def test_a_long_poll_body_sent_ahead_is_read_to_its_end() -> None:
    """What a request still needs is read, even if so much was sent ahead that reading stopped."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=a"))
        body = json.dumps({"channels": ["x"], "timeout": 0}).encode().ljust(BODY_BYTES_MAX)
        data = post("/poll", body, "X: " + "y" * 4000)
        client.push(data[: AHEAD_BYTES_MAX + 1])
        client.push(data[AHEAD_BYTES_MAX + 1 :])
        assert client.unread > 0

        await say(server, "a")
        await client.settle()

        assert [response.status for response in client.responses] == [200, 200]
        assert server.metrics.requests_lane == 2


async def test_a_client_that_does_not_read_is_not_served_further() -> None:
    """While a client does not take its answers, its requests wait; they are served when it reads again."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=a&timeout=0"))
        client.protocol.pause_writing()
        assert await client.receive(get("/poll?channel=a&timeout=0") * 3, get("/poll?channel=a&timeout=0")) == []
        assert server.metrics.requests_lane == 1

        client.protocol.resume_writing()
        await client.settle()

        assert len(client.responses) == 5


async def test_a_client_that_does_not_read_is_not_read_from_either() -> None:
    """What waits behind unread answers is bounded too, however the client reads a little now and then."""
    async with running() as server:
        client = pipes.lane(server)
        client.protocol.pause_writing()
        for _ in range(40):
            client.push(get("/nothing?" + "x" * 1000) * 16)

        for _ in range(10):
            client.protocol.resume_writing()
            client.protocol.pause_writing()
            await client.settle()

        assert len(client.lane._buffer) <= AHEAD_BYTES_MAX + 20_000
        assert client.unread > 0
        client.hang_up()


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    """After write_timeout the connection of a client that takes nothing is closed."""
    async with running(write_timeout=30) as server:
        client = pipes.lane(server)
        client.protocol.pause_writing()

        tick(server, 29)
        assert not client.closing
        tick(server, 31)

        assert client.aborted


async def test_a_client_that_reads_again_in_time_is_not_cut_off() -> None:
    """The time starts anew whenever the client has caught up."""
    async with running(write_timeout=15, keepalive_timeout=75) as server:
        client = pipes.lane(server)
        client.protocol.pause_writing()
        client.protocol.resume_writing()

        tick(server, 16)

        assert not client.closing


async def test_a_client_that_does_not_read_bounds_what_is_written() -> None:
    """Over TCP, a client that polls for much and reads nothing gets little written, and is cut off."""
    async with running(write_timeout=15, message_bytes_max=10_000_000) as server, connected(server) as client:
        await say(server, "a", b'"' + b"x" * 2_000_000 + b'"')
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]

        client.send(get("/poll?channel=a") * 1000)
        await until(lambda: any(lane._stuck for lane in server._lanes.open))

        lane = next(iter(server._lanes.open))
        assert server.metrics.requests_lane < 20
        assert lane._transport.get_write_buffer_size() < 3_000_000
        tick(server, 16)
        await until(lambda: not server._lanes.open)


@pytest.mark.parametrize(
    "request_",
    [get("/poll?channel=a&timeout=0", "Connection: close"), get("/nothing", "Connection: close")],
)
async def test_a_connection_that_cannot_close_in_peace_is_cut_off(request_: bytes) -> None:
    """A last answer that the client never takes does not hold the connection for ever."""
    async with running(request_timeout=15) as server:
        client = pipes.lane(server)
        client.stalled = True
        await client.receive(request_)
        assert client.closing

        tick(server, 14)
        assert not client.aborted
        tick(server, 16)
        await client.settle()

        assert client.aborted
        assert not server._lanes.open


# Time


@pytest.mark.parametrize("before", [get("/poll?channel=a&timeout=0"), publish("a")])
async def test_an_idle_connection_is_closed(before: bytes) -> None:
    """Between requests a connection is kept for keepalive_timeout, and then closed in peace."""
    async with running(keepalive_timeout=75, request_timeout=15) as server:
        client = pipes.lane(server)
        await client.receive(before, b"\r\n")

        tick(server, 74)
        assert not client.closing
        tick(server, 77)  # That it began to be idle is known to a second.

        assert client.closing
        assert not client.aborted


@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r", b"\n\n\n"])
async def test_a_connection_that_asks_for_nothing_is_closed(before: bytes) -> None:
    """A new connection has request_timeout to begin its first request, and blank lines are none."""
    async with running(keepalive_timeout=75, request_timeout=15) as server:
        client = pipes.lane(server)
        await client.receive(before)

        tick(server, 14)
        assert not client.closing
        with later(server, 14):
            await client.receive(b"\r\n")
        tick(server, 16)

        assert client.closing


@pytest.mark.parametrize(
    "data",
    [
        b"G",
        get("/poll?channel=a")[:-1],
        post("/poll", {"channels": ["a"]})[:-1],
        get("/poll?channel=a&timeout=0") + b"GET /p",
        publish("a") + b"POST /p",
        get("/nothing") + b"GET /p",
    ],
)
async def test_a_request_that_does_not_come_whole_is_given_up(data: bytes) -> None:
    """A client has request_timeout to send a whole request."""
    async with running(keepalive_timeout=75, request_timeout=15) as server:
        client = pipes.lane(server)
        await client.receive(data)

        tick(server, 14)
        assert not client.closing
        tick(server, 16)

        assert client.aborted


@pytest.mark.parametrize("request_", [publish("a"), post("/publish", {}, "Origin: http://page")])
async def test_a_publisher_whose_body_does_not_come_whole_is_told_so(request_: bytes) -> None:
    """As the web side does, with the header fields that the answer needs."""
    async with running(request_timeout=15, cors_origins="http://page") as server:
        client = pipes.lane(server)
        await client.receive(request_[:-1])

        tick(server, 14)
        assert not client.sent
        tick(server, 16)

        (response,) = client.responses
        assert (response.status, response.json["detail"]) == (408, "the request's body did not come in time")
        assert response.headers["connection"] == "close"
        assert ("access-control-allow-origin" in response.headers) == (b"Origin" in request_)
        assert client.closing


async def test_dripping_does_not_help() -> None:
    """The time for a request is counted from its first byte, not from its last."""
    async with running(request_timeout=15) as server:
        client = pipes.lane(server)
        await client.receive(b"GET /poll?")
        with later(server, 10):
            await client.receive(b"channel=a")

        tick(server, 16)

        assert client.aborted


async def test_a_busy_connection_is_not_late() -> None:
    """The time for a request is counted from its own first byte, also where segments cut requests in two."""
    async with running(request_timeout=15) as server:
        client = pipes.lane(server)
        data = get("/poll?channel=a&timeout=0")
        await client.receive(data, data[:20])
        with later(server, 10):
            await client.receive(data[20:] + data[:20])

        tick(server, 16)
        assert not client.closing
        tick(server, 26)

        assert client.aborted


async def test_a_parked_poll_is_never_late() -> None:
    """A parked poll ends by its own timeout, not by the connection's."""
    async with running(keepalive_timeout=75, request_timeout=15) as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=a") + b"GET /p")

        tick(server, 100_000)

        assert not client.closing
        assert server.node.parked == 1


async def test_the_time_starts_anew_after_an_answer() -> None:
    """However long a poll was parked, its connection is then kept for keepalive_timeout."""
    async with running(keepalive_timeout=75) as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=a"))
        tick(server, 100)
        await say(server, "a")

        tick(server, 174)
        assert not client.closing
        tick(server, 177)

        assert client.closing


async def test_clients_that_ask_the_same_wait_as_one() -> None:
    """And are each counted, answered, and free to leave."""
    async with running() as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(server)) for _ in range(5)]
        cursor = (await clients[0].get("/poll?channel=a&timeout=0")).json["next"]
        for client in clients:
            client.send(get(f"/poll?channel=a&start={cursor}"))
        await parked(server, 5)
        waiting = len(server.node._hub.waiting())
        await clients[2].close()
        await parked(server, 4)
        id = await say(server, "a")

        replies = [await client.reply() for client in clients[:2] + clients[3:]]

        assert waiting == 2  # The first one was parsed, which makes an object of its own.
        assert [[message["id"] for message in reply.json["messages"]] for reply in replies] == [[id]] * 4
        answers = server.node.metrics.answers
        assert (answers["message"], answers["gone"]) == (4, 1)


async def test_who_asks_just_before_it_would_be_cut_is_not() -> None:
    """Thousands that are late together are cut in portions, between which they may ask."""
    async with running(keepalive_timeout=75, request_timeout=15) as server:
        clients = [pipes.lane(server) for _ in range(CUT_AT_ONCE + 2)]
        tick(server, 76)
        asks, stays_idle = [client for client in clients if not client.closing]

        asks.push(get("/poll?channel=a"))
        await asks.settle()

        assert (asks.closing, stays_idle.closing) == (False, True)
        assert server.node.parked == 1


async def test_a_lent_body_that_does_not_come_is_refused() -> None:
    """The web side gives a body request_timeout too, and says so."""
    async with running(request_timeout=0.05) as server, connected(server) as client:
        client.send(lent("a")[:-1])

        reply = await client.reply()

        assert (reply.status, reply.json["detail"]) == (408, "the request's body did not come in time")


async def test_a_lent_request_is_not_late() -> None:
    """While the web side has a request, its time is the web side's."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(lent("a")[:-1])

        tick(server, 100_000)

        assert not client.closing
        (response,) = await client.receive(lent("a")[-1:])
        assert response.status == 201


# Lending


async def test_a_connection_comes_back_from_the_web_side() -> None:
    """After a publication, polls on the same connection are the lane's again."""
    async with running() as server, connected(server) as client:
        for n in range(3):
            client.send(lent("a", n))
            id = (await client.reply()).json["id"]
            reply = await client.get(f"/poll?channel=a&start={id}")
            assert reply.json["messages"] == [{"id": id, "channels": ["a"], "data": n}]

        assert (server.metrics.requests_lane, server.metrics.requests_web) == (3, 3)
        assert len(web_connections(server)) == 1


async def test_a_parked_poll_keeps_no_web_connection() -> None:
    """The web side's half of a connection ends when a poll parks, and begins again when it is needed."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(lent("a"))
        assert len(web_connections(server)) == 1

        await client.receive(get("/poll?channel=b"))
        assert len(web_connections(server)) == 0
        await say(server, "b")
        await client.receive(lent("c"))

        assert [response.status for response in client.responses] == [201, 200, 201]
        assert len(web_connections(server)) == 1
        assert not client.closing


async def test_a_web_connection_without_a_lane_ends_with_its_transport() -> None:
    """A client that goes takes the lent web connection with it."""
    async with running() as server:
        async with connected(server) as client:
            client.send(lent("a"))
            await client.reply()
            assert len(web_connections(server)) == 1

        await until(lambda: not web_connections(server))
        await until(lambda: not server._lanes.open)


async def test_what_has_no_certain_length_is_handed_over_for_good() -> None:
    """A chunked request is the web side's, and the last of its connection: nothing can hide behind it."""
    async with running() as server:
        client = pipes.lane(server)
        body = b'{"channels":["a"],"data":1}'
        chunked = get("/publish", "Transfer-Encoding: chunked", method="POST") + b"%x\r\n%b\r\n0\r\n\r\n" % (
            len(body),
            body,
        )

        responses = await client.receive(get("/poll?channel=a&timeout=0") + chunked + publish("hidden"))

        assert [response.status for response in responses] == [200, 201]
        assert responses[1].headers["connection"] == "close"
        assert (server.metrics.requests_lane, server.metrics.requests_web) == (1, 1)
        assert client.closing
        assert not server._lanes.open
        assert not server._lanes.handed_over
        assert not web_connections(server)


async def test_handing_over_ends_a_loan() -> None:
    """A lent web connection does not stay beside the one that has the connection for good."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(lent("a"))

        await client.receive(get("/poll?channel=a&start=latest", "Transfer-Encoding: chunked") + b"0\r\n\r\n")

        assert server.node.parked == 1
        assert len(web_connections(server)) == 1
        client.hang_up()
        await client.settle()
        assert server.node.parked == 0
        assert not web_connections(server)


async def test_a_flood_behind_what_was_handed_over_is_dropped() -> None:
    """The web side keeps nothing of what comes behind the last request of a connection, while it is answered."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=a", "Transfer-Encoding: chunked") + b"0\r\n\r\n")
        for _ in range(10):
            await client.receive(publish("hidden") * 1000)
        (web,) = server._lanes.handed_over.values()

        assert not web._messages  # type: ignore[attr-defined]
        await say(server, "a")
        await client.settle()

        assert [response.status for response in client.responses] == [200]
        assert client.closing


@pytest.mark.parametrize("after", [get("/poll?channel=x&timeout=0"), publish("x")])
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("/nothing", b"x" * 100_000), 404),
        (post("/poll/x", b"x" * 100_000), 404),
        (post("/channels/a", b"x" * 100_000), 405),
        (post("/publish", b" " * 100_000), 413),
        (post("/poll", b" " * 100_000), 413),
        (post("/poll", b" " * 2_000_000), 413),
        (post("/nothing", b"x" * 2_000_000), 404),
    ],
)
async def test_an_early_answer_does_not_lose_the_next_request(request_: bytes, status: int, after: bytes) -> None:
    """Where the web side answers before a body has come, the rest of the body is still no request."""
    async with running(body_bytes_max=50_000) as server:
        client = pipes.lane(server)
        head, _, body = request_.partition(b"\r\n\r\n")
        await client.receive(head + b"\r\n\r\n" + body[:60_000])

        await client.receive(*[body[n : n + 100_000] for n in range(60_000, len(body), 100_000)])
        responses = await client.receive(after)

        assert [response.status for response in responses][-1] in (200, 201)
        assert [response.status for response in client.responses][:-1] == [status]


async def test_an_early_answer_that_closes_waits_for_the_rest_of_the_body() -> None:
    """With Connection: close an early answer comes at once, and the connection ends when the body has."""
    async with running() as server:
        client = pipes.lane(server)
        data = post("/nothing", b"x" * 1000, "Connection: close")
        (response,) = await client.receive(data[:-500])
        assert (response.status, response.headers["connection"]) == (404, "close")
        assert not client.closing

        await client.receive(data[-500:])

        assert client.closing
        assert not client.aborted
        assert not server._lanes.open


async def test_a_poll_behind_a_refused_body_is_parked_on_a_live_connection() -> None:
    """A body that made aiohttp stop reading does not leave the connection deaf when its web side is released."""
    async with running() as server:
        client = pipes.lane(server)
        client.push(post("/nothing", b"x" * 1_000_000) + get("/poll?channel=a"))
        assert not client.reading
        await client.settle()
        assert server.node.parked == 1

        await say(server, "a")
        await client.receive(get("/poll?channel=x&timeout=0"))

        assert [response.status for response in client.responses] == [404, 200, 200]
        assert client.reading


async def test_a_big_burst_over_a_socket_keeps_its_framing() -> None:
    """Over TCP, bodies that nobody reads and those that are too large are passed over in step."""
    async with running(body_bytes_max=1_000_000) as server, connected(server) as client:
        client.send(post("/nothing", b"x" * 3_000_000) + post("/publish", b" " * 3_000_000) + publish("a"))
        client.send(get("/poll?channel=a"))

        assert [(await client.reply()).status for _ in range(4)] == [404, 413, 201, 200]


@pytest.mark.parametrize("keep_alive", [True, False])
async def test_two_answers_to_one_request_end_the_connection(keep_alive: bool) -> None:
    """If the two sides disagree on what was one request, nobody may go on with the connection."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(post("/nothing", b"12345")[:-1])
        assert len(client.responses) == 1

        client.lane.web_answered(keep_alive)

        assert client.aborted


async def test_an_answer_to_nothing_ends_the_connection() -> None:
    """The web side has nothing to say while nothing is lent to it."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(publish("a"))

        client.lane.web_answered(True)

        assert client.aborted


async def test_an_expected_continue_is_sent() -> None:
    """A client that waits for 100 Continue before it sends a body gets it, and the connection comes back."""
    async with running() as server:
        client = pipes.lane(server)
        head, blank, body = post("/poll", {"channels": ["a"], "timeout": 0}, "Expect: 100-continue").partition(
            b"\r\n\r\n"
        )

        first = await client.receive(head + blank)
        second = await client.receive(body)
        third = await client.receive(get("/poll?channel=a&timeout=0"))

        assert [response.line for response in first] == ["HTTP/1.1 100 Continue"]
        assert [response.status for response in second + third] == [200, 200]
        assert (server.metrics.requests_lane, server.metrics.requests_web) == (1, 1)


async def test_a_pause_in_writing_reaches_the_web_side() -> None:
    """A lent answer waits for a client that does not read, and is not taken for done before."""
    async with running() as server:
        client = pipes.lane(server)
        await client.receive(lent("a"))
        client.push(lent("a"))
        client.protocol.pause_writing()
        await client.receive(get("/poll?channel=x&timeout=0"))
        assert server.metrics.requests_lane == 0

        client.protocol.resume_writing()
        await client.settle()

        assert [response.status for response in client.responses] == [201, 201, 200]


# Draining


async def test_a_drained_poll_is_told_to_close() -> None:
    """Polls that are parked when the server stops are answered with their cursor and Connection: close."""
    async with running() as server:
        async with connected(server) as one, connected(server) as other, connected(server) as idle:
            await one.get("/poll?channel=a&timeout=0")
            one.send(get("/poll?channel=a"))
            other.send(get("/poll?channel=a", "Connection: keep-alive", version="1.0"))
            await parked(server, 2)

            await server.stop(0)

            replies = [await one.reply(), await other.reply()]
            assert [reply.json["messages"] for reply in replies] == [[], []]
            assert [reply.headers.get("connection") for reply in replies] == ["close", None]
            assert [await client.rest() for client in (one, other, idle)] == [b"", b"", b""]
        assert not server._lanes.open


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/poll?channel=a&timeout=0"), 200),
        (get("/poll?channel="), 400),
        (publish("a"), 201),
        (get("/nothing"), 404),
        (get("/poll?channel=a&timeout=0", "Expect: 100-continue"), 200),
    ],
)
async def test_while_draining_every_answer_is_the_last(request_: bytes, status: int) -> None:
    """A server that is going away still answers, and tells each client to connect elsewhere."""
    async with running() as server:
        client = pipes.lane(server)
        server.service.closing = True
        server.node.draining = True

        response = (await client.receive(request_ + get("/poll?channel=a&timeout=0")))[-1]

        assert (response.status, response.headers["connection"]) == (status, "close")
        assert client.closing


async def test_only_idle_connections_are_closed() -> None:
    """Closing what is idle leaves parked polls, lent requests and half requests alone."""
    async with running() as server:
        idle, used, half, waiting, away = [pipes.lane(server) for _ in range(5)]
        await used.receive(lent("x"))
        await half.receive(b"GET")
        await waiting.receive(get("/poll?channel=a"))
        await away.receive(lent("a")[:-1])

        server._lanes.close_idle()

        assert [client.closing for client in (idle, used, half, waiting, away)] == [True, True, False, False, False]
        for client in (half, away):
            client.hang_up()


# The cost


async def test_a_parked_poll_costs_no_task_and_no_request() -> None:
    """While 100 polls are parked there is no task for any of them, and aiohttp knows of none."""
    async with running() as server:
        clients = [pipes.lane(server) for _ in range(100)]
        for client in clients:
            await client.receive(lent("x") if client is clients[0] else get("/poll?channel=x&timeout=0"))
        tasks = len(asyncio.all_tasks())
        assert server._web.server is not None
        served = server._web.server.requests_count

        for client in clients:
            await client.receive(get("/poll?channel=a"))
        gc.collect()

        assert server.node.parked == 100
        assert len(asyncio.all_tasks()) <= tasks
        assert server._web.server.requests_count == served == 1
        assert not web_connections(server)
        assert not [thing for thing in gc.get_objects() if isinstance(thing, web.BaseRequest)]


async def test_polls_and_publications_never_touch_aiohttp(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are parsed, parked and answered where there is no aiohttp at all."""
    async with running() as server:

        def borrow(lane: object) -> Any:
            raise AssertionError("the lane wants aiohttp")

        monkeypatch.setattr(server._lanes, "borrow", borrow)
        client = pipes.lane(server)
        await client.receive(
            get("/poll?channel=a&timeout=0")
            + get("/poll?channel=a&timeout=0", method="HEAD")
            + post("/poll", {"channels": ["a"], "timeout": 0})
            + get("/poll?channel=&x")
            + post("/poll", {"channels": 1})
            + get("/poll?channel=9")
            + publish("b")
            + post("/publish", [{"channels": ["b"], "data": 1}, {}], "Idempotency-Key: k")
            + post("/realms/default/publish", [{"channels": ["b"], "data": 1}, {}])
            + post("/publish", b"")
            + get("/poll?channel=a", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk")
        )
        await say(server, "a")
        await client.settle()

        assert [response.status for response in client.responses] == [
            200,
            200,
            200,
            400,
            400,
            404,
            201,
            400,
            200,
            400,
            200,
        ]
        assert server.metrics.requests_web == 0


async def test_the_broker_is_asked_once_for_polls_that_come_together() -> None:
    """Polls of one channel on many connections are one read of the broker."""
    async with running() as server:
        clients = [pipes.lane(server) for _ in range(50)]
        for client in clients:
            client.push(get("/poll?channel=a"))
        await clients[0].settle()

        assert server.node.parked == 50
        assert server.node.metrics.broker_reads == 1


async def test_every_way_to_end_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After answers, errors, closings and vanished clients no connection and no subscription is left."""
    async with running() as server:
        endings: list[Callable[[pipes.Pipe], Awaitable[Any]]] = [
            lambda client: client.receive(get("/poll?channel=a&timeout=0", "Connection: close")),
            lambda client: client.receive(get("/poll?channel=a", version="1.0")),
            lambda client: client.receive(get("/poll?channel=", "Connection: close")),
            lambda client: client.receive(get("/nothing", "Connection: close")),
            lambda client: client.receive(b"\x16\x03\x01"),
            lambda client: client.receive(publish("b") + b"\x00"),
            lambda client: client.receive(get("/poll?channel=a")),
        ]
        clients = [pipes.lane(server) for _ in endings]
        for client, ending in zip(clients, endings, strict=True):
            await ending(client)
        await say(server, "a")
        for client in clients:
            client.hang_up()
            await client.settle()

        with pytest.raises(ChannelNotFound):
            await server.node.broker.describe("nothing")
        assert server.node.parked == 0
        assert not server._lanes.open
        assert not web_connections(server)


async def test_a_head_that_comes_byte_by_byte_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come of a head is parsed again where a line has ended, not with every byte."""
    parsed = 0

    def count(data: bytes) -> bool:
        nonlocal parsed
        parsed += 1
        return is_malformed(data)

    monkeypatch.setattr("pushup.lane.is_malformed", count)
    async with running() as server:
        client = pipes.lane(server)
        request = get("/poll?channel=a&timeout=0", *(f"X-{n}: {'x' * 500}" for n in range(10)))

        for byte in request:
            client.push(bytes([byte]))
        await client.settle()

        assert [response.status for response in client.responses] == [200]
        assert parsed <= SHORT_HEAD_BYTES + 2 * 12


async def test_what_is_remembered_of_polls_is_bounded() -> None:
    """By what it takes in memory, of which the bytes of the request lines are the least."""
    async with running() as server:
        memory, client = server._lanes.memory, pipes.lane(server)
        for number in range(1000):
            await client.receive(get(f"/poll?channel=a&timeout=0&start={number}"))

        assert len(memory._lines) == 1000
        assert memory._size > sum(sys.getsizeof(line) + 250 for line in memory._lines)


async def test_a_client_that_is_refused_again_and_again_is_not_idle() -> None:
    """Whoever asks is busy, also if the answer is an error."""
    async with running(keepalive_timeout=75, poll_channels_max=1) as server:
        client = pipes.lane(server)
        await client.receive(get("/poll?channel=1"))
        with later(server, 70):
            await client.receive(get("/poll?channel=1"))

        tick(server, 80)

        assert not client.closing
        assert [response.status for response in client.responses] == [404, 404]


async def test_a_proxied_connection_that_asks_for_nothing_is_closed() -> None:
    """Behind its PROXY header it is as new as any other."""
    async with running(keepalive_timeout=75, request_timeout=15, proxy_protocol=True) as server:
        client = pipes.lane(server)
        client.lane._state = GREETING
        await client.receive(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")

        tick(server, 14)
        assert not client.closing
        tick(server, 16)

        assert client.closing
