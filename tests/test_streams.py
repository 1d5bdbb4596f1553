"""Server-Sent Events and lines of JSON, byte by byte, through a whole server and raw connections."""

import asyncio
import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import time
from typing import Any, Final

import pytest

from pushup.access import hash_key
from pushup.errors import Unavailable
from pushup.messages import MAX_ID
from pushup.server import FLUSH_TIMEOUT_S, Server
from pushup.streams import GOODBYE_S, RETRY_MS, EventStream, Follower
from tests.redis_server import RedisServer
from tests.support import PATIENCE_S, Client, Reply, connected, eventually, parked, running
from tests.test_access_http import ALL, READER, AccessFile, bearer, token

KINDS: Final = pytest.mark.parametrize("path", ["/events", "/stream"])
NEVER_S: Final = 1e6


class Stream:
    """A stream as its client reads it: blocks of an event stream, or lines of JSON."""

    def __init__(self, client: Client, head: Reply) -> None:
        self.client = client
        self.head = head
        self._chunked = head.headers.get("transfer-encoding") == "chunked"
        self._end = b"\n\n" if head.headers["content-type"] == "text/event-stream" else b"\n"
        self._left = b""
        self.ended = False

    async def block(self) -> bytes:
        """The next block or line, with its end; empty when there are no more."""
        async with asyncio.timeout(PATIENCE_S):
            while self._end not in self._left and not self.ended:
                self._left += await self._read()
        block, end, self._left = self._left.partition(self._end)
        return block + end

    async def line(self) -> Any:
        """The next line, decoded."""
        return json.loads(await self.block())

    async def rest(self) -> list[bytes]:
        """All further blocks or lines, when the stream has ended."""
        blocks = []
        while block := await self.block():
            blocks.append(block)
        return blocks

    async def _read(self) -> bytes:
        reader = self.client.reader
        if not self._chunked:
            data = await reader.read(65536)
            self.ended = not data
            return data
        size = int(await reader.readline(), 16)
        data = await reader.readexactly(size + 2)
        self.ended = not size
        return data[:-2]


async def begin(client: Client, target: str, headers: str = "") -> Stream:
    """Ask for a stream on this connection."""
    client.send(f"GET {target} HTTP/1.1\r\nHost: test\r\n{headers}\r\n")
    head = await client.reply()
    assert head.status == 200, head
    return Stream(client, head)


@asynccontextmanager
async def streaming(server: Server, target: str, headers: str = "") -> AsyncIterator[Stream]:
    """A stream on a connection of its own."""
    async with connected(server) as client:
        yield await begin(client, target, headers)


async def ask(server: Server, target: str, headers: str = "", method: str = "GET") -> Reply:
    """The answer to one request on a connection of its own."""
    async with connected(server) as client:
        return await client.request(method, target, headers=headers)


async def publish(server: Server, *channels: str | int, data: Any = None) -> int:
    async with connected(server) as client:
        return await client.publish(*channels, data=data)


async def create(server: Server) -> int:
    """A new integer channel."""
    async with connected(server) as client:
        return int((await client.request("POST", "/channels", {})).json["channel"])


async def close(server: Server, channel: str | int) -> None:
    async with connected(server) as client:
        assert (await client.request("DELETE", f"/channels/{channel}")).status == 204


class EventSource:
    """What a browser makes of an event stream: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str]] = []
        """Type, data and lastEventId of each."""
        self.last_id = ""
        self.retry = 0

    def feed(self, stream: bytes) -> None:
        """Take a whole stream. What is behind its last blank line is dropped, as a browser does."""
        kind, id = "", self.last_id
        data: list[str] = []
        for line in stream.decode().split("\n")[:-1]:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line:
                self.last_id = id
                if data:
                    self.events.append((kind or "message", "\n".join(data), id))
                kind, data = "", []
            elif name == "data":
                data.append(value)
            elif name == "id":
                id = value
            elif name == "event":
                kind = value
            elif name == "retry":
                self.retry = int(value)

    @property
    def messages(self) -> list[Any]:
        return [json.loads(data) for kind, data, _ in self.events if kind == "message"]


async def skip(stream: Stream) -> None:
    """What a stream begins with when there is nothing to tell."""
    if stream.head.headers["content-type"] == EventStream.content_type:
        await stream.block()
    await stream.block()


def cursor(block: bytes) -> int:
    """That of a block without data."""
    match = re.fullmatch(rb": \nid: (\d+)\n\n", block)
    assert match, block
    return int(match[1])


async def nothing_is_left(server: Server) -> None:
    """No task, poll, count or connection."""
    metrics = server.metrics
    await eventually(
        lambda: (
            not any(realm.node.parked for realm in server.service.realms.values())
            and not any(metrics.streams.values())
            and not len(server.service.peers)
            and metrics.connections_opened == metrics.connections_closed
            and not server._lanes._unread_bytes
        ),
        "nothing is left",
    )
    for realm in server.service.realms.values():
        assert not any(holder.parked for holder in realm._holders.values())


# The event stream


async def test_an_event_stream_begins_at_once() -> None:
    """The first bytes are when to come back, at random, and a cursor: both before anything is published."""
    retries = set()
    async with running() as server:
        for _ in range(20):
            async with streaming(server, "/events?channel=a") as stream:
                headers = stream.head.headers
                assert headers["content-type"] == "text/event-stream"
                assert headers["cache-control"] == "no-store"
                assert headers["x-accel-buffering"] == "no"
                assert "server" not in headers
                match = re.fullmatch(rb"retry: (\d{4})\n\n", await stream.block())
                assert match
                retries.add(int(match[1]))
                assert cursor(await stream.block()) > 0
        assert all(RETRY_MS[0] <= retry <= RETRY_MS[1] for retry in retries)
        assert len(retries) > 10
        await nothing_is_left(server)


async def test_a_message_is_two_lines_and_a_cursor_follows() -> None:
    """`id` is the cursor behind the message; every answer ends with a block that has nothing but the cursor."""
    async with running() as server, streaming(server, "/events?channel=a") as stream:
        await stream.block()
        await stream.block()
        id = await publish(server, "a", data=[7])
        shown = b'{"id":%d,"channels":["a"],"data":[7]}' % id
        assert await stream.block() == b"id: %d\ndata: %b\n\n" % (id + 1, shown)
        assert await stream.block() == b": \nid: %d\n\n" % (id + 1)


async def test_cached_messages_come_first() -> None:
    """From `start` on, in order; without it from the beginning."""
    async with running() as server:
        ids = [await publish(server, "a", data=n) for n in range(5)]
        for query, expected in (("", ids), (f"&start={ids[2]}", ids[2:]), (f"&start={ids[2] + 1}", ids[3:])):
            async with streaming(server, f"/events?channel=a{query}") as stream:
                await stream.block()
                for id in expected:
                    assert (await stream.block()).startswith(b"id: %d\ndata: " % (id + 1))
                assert cursor(await stream.block()) == ids[-1] + 1


ODD: Final = {
    "separators": '"\u2028\u2029\u0085"',
    "escapes": r'"\u0000\r\n\t\u2028\ud83d\ude00\\\/"',
    "fields": r'"\nid: 5\ndata: x\n\nevent: gap\nretry: 1"',
    "colons": '": :: id: 7"',
    "byte order mark": '"\ufeff"',
    "beyond": '"\U0001f600\U0010ffff"',
    "controls": '"\x7f\x80\x9f"',
    "blanks": '{ "a" :\t[ 1 , 2 ] }',
    "numbers": "[1e300,-0.0,123456789012345678901234567890]",
    "nothing": '""',
    "null": "null",
    "long": '"' + "x" * 65000 + '"',
}


@KINDS
@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
async def test_data_comes_byte_for_byte(path: str, text: str) -> None:
    """Whatever odd characters it has, a message is one line, and the data in it is what was published."""
    async with running() as server, streaming(server, f"{path}?channel=a&start=latest") as stream:
        await skip(stream)
        async with connected(server) as client:
            body = b'{"channels":["a"],"data":' + text.encode() + b"}"
            assert (await client.request("POST", "/publish", body)).status == 201
        block = await stream.block()
        assert b'"data":' + text.encode() + b"}" in block
        assert block.decode().count("\n") == (3 if path == "/events" else 1)


@KINDS
@pytest.mark.parametrize("blank", ["\n", "\r", "\r\n", "\n\n\n"])
async def test_line_breaks_between_values_are_spaces(path: str, blank: str) -> None:
    """Published over HTTP they are white space between values, and would end a line."""
    async with running() as server, streaming(server, f"{path}?channel=a&start=latest") as stream:
        await skip(stream)
        async with connected(server) as client:
            body = f'{{"channels":["a"],"data":[1,{blank}2{blank}]{blank}}}'.encode()
            assert (await client.request("POST", "/publish", body)).status == 201
        spaces = b" " * len(blank)
        assert b'"data":[1,%b2%b]' % (spaces, spaces) in await stream.block()


@KINDS
async def test_what_redis_let_through_is_one_line_too(redis_server: RedisServer, path: str) -> None:
    """A back end that calls Redis itself may send line breaks; they do not end a message."""
    realm = f"lines-{path[1:]}"
    async with (
        running(broker=redis_server.url, realm=realm) as server,
        streaming(server, f"{path}?channel=a&start=latest") as stream,
    ):
        await skip(stream)
        with redis_server.client() as redis:
            redis.execute_command("FCALL", "pushup_publish", 1, f"pushup:{{{realm}}}", '{"a":\n1,\r\n"b":\r[2]}', "a")
        block = await stream.block()
        assert b'"data":{"a": 1,  "b": [2]}' in block


@KINDS
async def test_a_publication_to_several_of_the_channels_comes_once(path: str) -> None:
    """With those of its channels that were asked for, in the order in which they were."""
    async with running() as server, streaming(server, f"{path}?channel=b&channel=a&channel=b") as stream:
        await skip(stream)
        first = await publish(server, "a", "c", "b", data=1)
        block = await stream.block()
        assert b'{"id":%d,"channels":["b","a"],"data":1}' % first in block
        second = await publish(server, "a", data=2)
        blocks = [await stream.block() for _ in range(2 if path == "/events" else 1)]
        assert b'{"id":%d,"channels":["a"],"data":2}' % second in blocks[-1]


@pytest.mark.parametrize("start", ["", "&start=0", "&start=latest", f"&start={MAX_ID}"])
async def test_the_last_event_id_wins(start: str) -> None:
    """A browser sends its URL again as it was, and beside it the last id: the later cursor."""
    async with running() as server:
        ids = [await publish(server, "a", data=n) for n in range(3)]
        headers = f"Last-Event-ID: {ids[1]}\r\n"
        async with streaming(server, f"/events?channel=a{start}", headers) as stream:
            await stream.block()
            assert (await stream.block()).startswith(b"id: %d\n" % (ids[1] + 1))
            assert (await stream.block()).startswith(b"id: %d\n" % (ids[2] + 1))
            assert cursor(await stream.block()) == ids[2] + 1


async def test_an_empty_last_event_id_says_nothing() -> None:
    """It is what a client has before its first block."""
    async with running() as server:
        ids = [await publish(server, "a", data=n) for n in range(2)]
        async with streaming(server, f"/events?channel=a&start={ids[1]}", "Last-Event-ID: \r\n") as stream:
            await stream.block()
            assert (await stream.block()).startswith(b"id: %d\n" % (ids[1] + 1))


async def test_lines_know_no_last_event_id() -> None:
    """The header is of event streams; a program has `start`."""
    async with running() as server:
        id = await publish(server, "a", data=1)
        async with streaming(server, "/stream?channel=a", "Last-Event-ID: nonsense\r\n") as stream:
            assert (await stream.line())["messages"][0]["id"] == id


async def test_latest_cut_off_after_the_first_block_has_no_hole() -> None:
    """The first block has a cursor, so what is published while the client is away is there when it comes back."""
    async with running() as server:
        await publish(server, "a", data="before")
        async with streaming(server, "/events?channel=a&start=latest") as stream:
            await stream.block()
            came = cursor(await stream.block())
        await nothing_is_left(server)
        missed = await publish(server, "a", data="meanwhile")
        async with streaming(server, "/events?channel=a&start=latest", f"Last-Event-ID: {came}\r\n") as stream:
            await stream.block()
            assert (await stream.block()).startswith(b"id: %d\n" % (missed + 1))


async def test_cut_off_at_any_byte_nothing_is_lost_or_doubled() -> None:
    """Wherever a stream ends, the browser's last id goes on exactly behind what the page was given."""
    async with running(channel_max_messages=6) as server:
        ids = [await publish(server, *channels, data="é\u2028") for channels in ("ab", "a", "b", "ab", "a")]
        realm = server.service.root
        follower = Follower(realm, None, ("a", "b"), 0)
        form = EventStream()
        stream = form.begin() + form.show(await follower.next())
        for _ in range(2):
            ids.append(await publish(server, "b", data=[1]))
            stream += form.show(await follower.next())
        for cut in range(len(stream) + 1):
            source = EventSource()
            try:
                source.feed(stream[:cut])
            except UnicodeDecodeError:
                source.feed(stream[:cut].rpartition(b"\n")[0] + b"\n")
            seen = [message["id"] for message in source.messages]
            answer = await Follower(realm, None, ("a", "b"), int(source.last_id or 0)).next()
            assert not answer.gap
            assert seen + [message.id for message, _ in answer.messages] == ids, stream[:cut]


@KINDS
async def test_a_gap_comes_before_the_messages_behind_it(path: str) -> None:
    """Whoever comes back too late is told so, once, and then goes on."""
    async with running(channel_max_messages=2) as server:
        ids = [await publish(server, "a", data=n) for n in range(5)]
        async with streaming(server, f"{path}?channel=a&start={ids[0]}") as stream:
            if path == "/stream":
                answer = await stream.line()
                assert (answer["gap"], [message["id"] for message in answer["messages"]]) == (True, ids[3:])
            else:
                assert (await stream.block()).startswith(b"retry: ")
                assert await stream.block() == b'event: gap\ndata: {"next":%d}\n\n' % (ids[4] + 1)
                for id in ids[3:]:
                    assert (await stream.block()).startswith(b"id: %d\n" % (id + 1))
                assert cursor(await stream.block()) == ids[4] + 1
            after = await publish(server, "a", data=5)
            block = await stream.block()
            assert b'"id":%d,' % after in block
            assert b'gap"' not in block or b'"gap":false' in block


async def test_a_gap_without_messages() -> None:
    """The channel's messages are all gone; the cursor is behind them."""
    async with running(channel_window=0) as server:
        ids = [await publish(server, "a", data=n) for n in range(2)]
        async with streaming(server, f"/events?channel=a&start={ids[0]}") as stream:
            await stream.block()
            gap = await stream.block()
            came = cursor(await stream.block())
            assert gap == b'event: gap\ndata: {"next":%d}\n\n' % came
            assert came > ids[1]
        async with streaming(server, f"/events?channel=a&start={came}") as stream:
            await stream.block()
            cursor(await stream.block())


# Channels that close


@KINDS
async def test_an_integer_channel_that_closes_ends_the_stream(path: str) -> None:
    """It was the only one, and never comes back; the connection goes on."""
    async with running() as server, connected(server) as client:
        channel = await create(server)
        stream = await begin(client, f"{path}?channel={channel}")
        await parked(server, 1)
        await close(server, channel)
        last = (await stream.rest())[-2:]
        if path == "/events":
            assert last[0] == b'event: closed\ndata: {"closed":[%d]}\n\n' % channel
            cursor(last[1])
        else:
            assert json.loads(last[1])["closed"] == [channel]
        reply = await client.get(f"{path}?channel={channel}")
        assert (reply.status, reply.json["code"]) == (404, "channel_not_found")


@KINDS
async def test_the_other_channels_go_on(path: str) -> None:
    """An integer channel that closes takes nothing along."""
    async with running() as server:
        channel = await create(server)
        async with streaming(server, f"{path}?channel=a&channel={channel}") as stream:
            await parked(server, 1)
            await close(server, channel)
            id = await publish(server, "a", data=1)
            seen = b""
            while b'"id":%d,' % id not in seen:
                seen += await stream.block()
            assert seen.count(b'"closed":[%d]' % channel) == 1


@KINDS
async def test_a_named_channel_that_closes_comes_back(path: str) -> None:
    """It may be published to again, so the stream goes on."""
    async with running() as server, streaming(server, f"{path}?channel=a") as stream:
        await publish(server, "a", data=1)
        await parked(server, 1)
        await close(server, "a")
        id = await publish(server, "a", data=2)
        seen = b""
        while b'"id":%d,' % id not in seen:
            seen += await stream.block()
        assert seen.count(b'"closed":["a"]') == 1
        assert b'"gap":true' not in seen
        assert b"event: gap" not in seen


async def test_a_channel_that_closes_between_two_polls_is_told_of() -> None:
    """The client was slow, so nobody waited in that moment; the others go on from the same cursor."""
    async with running() as server:
        channel = await create(server)
        follower = Follower(server.service.root, None, ("a", str(channel)), 0)
        before = (await follower.next()).next
        await close(server, channel)
        answer = await follower.next()
        assert (answer.closed, answer.next, follower.channels) == (str(channel), before, ("a",))
        id = await publish(server, "a", data=1)
        assert [message.id for message, _ in (await follower.next()).messages] == [id]


async def test_a_name_that_must_be_created_does_not_go_round_in_circles() -> None:
    """Where publishing makes no channel, a named one that was closed is left out, as it would be an error."""
    async with running(channel_implicit=False) as server:
        for name in "ab":
            async with connected(server) as client:
                assert (await client.request("POST", "/channels", {"name": name})).status == 201
        async with streaming(server, "/events?channel=a&channel=b") as stream:
            await parked(server, 1)
            await close(server, "a")
            id = await publish(server, "b", data=1)
            seen = b""
            while b'"id":%d,' % id not in seen:
                seen += await stream.block()
            assert 1 <= seen.count(b'"closed":["a"]') <= 2


# Heartbeats


@KINDS
async def test_heartbeats_move_the_cursor(path: str) -> None:
    """Time passes and others publish, so a client that comes back later asks from a moment ago."""
    async with running(heartbeat=0.1) as server, streaming(server, f"{path}?channel=a") as stream:
        cursors = []
        if path == "/events":
            await stream.block()
        for _ in range(4):
            await publish(server, "other", data=1)
            block = await stream.block()
            if path == "/events":
                cursors.append(cursor(block))
            else:
                cursors.append(json.loads(block)["next"])
                assert json.loads(block) == {"messages": [], "next": cursors[-1], "gap": False}
        assert cursors == sorted(set(cursors))


# Who may


@KINDS
@pytest.mark.parametrize(
    ("query", "headers", "status", "code"),
    [
        ("channel=news", "", 401, "unauthorized"),
        ("chanel=news", "", 401, "unauthorized"),
        ("channel=news", bearer("wrong"), 401, "unauthorized"),
        ("channel=news&token=x", "", 401, "unauthorized"),
        ("channel=secret", bearer(READER), 403, "forbidden"),
        ("channel=news&channel=secret", bearer(READER), 403, "forbidden"),
        ("", bearer(ALL), 400, "invalid_parameter"),
        ("chanel=news", bearer(ALL), 400, "invalid_parameter"),
        ("channel=news&start=x", bearer(ALL), 400, "invalid_parameter"),
        ("channel=news&end=5", bearer(ALL), 400, "invalid_parameter"),
        ("channel=news&timeout=5", bearer(ALL), 400, "invalid_parameter"),
        ("channel=news&start=1&start=2", bearer(ALL), 400, "invalid_parameter"),
        ("channel=17", bearer(ALL), 404, "channel_not_found"),
        ("channel=news&channel=17", bearer(ALL), 404, "channel_not_found"),
    ],
)
async def test_what_is_wrong_is_a_status(
    access: AccessFile, path: str, query: str, headers: str, status: int, code: str
) -> None:
    """Before the stream begins everything is said as a poll would be told."""
    async with running(access=access.write()) as server:
        reply = await ask(server, f"{path}?{query}", headers)
        assert (reply.status, reply.json["code"]) == (status, code)
        assert reply.headers["content-type"] == "application/problem+json"
        head = await ask(server, f"{path}?{query}", headers, "HEAD")
        assert head.status == status
        await nothing_is_left(server)


@pytest.fixture
def access(tmp_path: Path) -> AccessFile:
    return AccessFile(tmp_path)


@pytest.mark.parametrize("id", ["x", "-1", "1.5", str(MAX_ID + 1), "1 2", "latest", "١"])
async def test_a_wrong_last_event_id_is_named(id: str) -> None:
    """It was never one of ours."""
    async with running() as server:
        reply = await ask(server, "/events?channel=a", f"Last-Event-ID: {id}\r\n")
        assert (reply.status, reply.json["parameter"]) == (400, "Last-Event-ID")


@KINDS
async def test_a_token_that_expires_ends_the_stream(access: AccessFile, path: str) -> None:
    """With the problem in the stream, as its status was sent long ago; the cursor stays good."""
    async with running(access=access.write()) as server:
        async with streaming(server, f"{path}?channel=news&token={token('news', life=0.5)}") as stream:
            last = (await stream.rest())[-1]
            if path == "/events":
                assert last.startswith(b"event: error\ndata: {")
                problem = json.loads(last.partition(b"data: ")[2])
            else:
                problem = json.loads(last)["error"]
            assert (problem["status"], problem["code"]) == (401, "token_expired")
        await nothing_is_left(server)


@KINDS
async def test_a_token_expires_in_the_middle_of_plenty_too(access: AccessFile, path: str) -> None:
    """Also where there is always something to read, so that no poll ever waits."""
    async with running(access=access.write(), answer_bytes_max=1, token_publish_rate_max=1000) as server:
        busy = True

        async def flood() -> None:
            async with connected(server) as client:
                while busy:
                    items = [{"channels": ["news"], "data": 1}] * 100
                    await client.request("POST", "/publish", items, bearer(ALL))

        flooding = asyncio.create_task(flood())
        try:
            async with streaming(server, f"{path}?channel=news&token={token('news', life=0.7)}") as stream:
                last = b""
                async with asyncio.timeout(PATIENCE_S):
                    while block := await stream.block():
                        last = block
            assert b'"code":"token_expired"' in last
        finally:
            busy = False
            await flooding


@KINDS
async def test_a_key_that_is_taken_away_ends_the_stream(access: AccessFile, path: str) -> None:
    """A poll would go on for its two minutes at most, a stream for its next heartbeat."""
    async with running(access=access.write(), heartbeat=0.1) as server:
        async with streaming(server, f"{path}?channel=news", bearer(READER)) as stream:
            await stream.block()
            access.write(keys="")
            server.reload()
            last = (await stream.rest())[-1]
            assert b'"status":401' in last
        await nothing_is_left(server)


@KINDS
async def test_rights_that_are_taken_away_end_the_stream(access: AccessFile, path: str) -> None:
    """The key stays, what it is good for does not."""
    async with (
        running(access=access.write(), heartbeat=0.1) as server,
        streaming(server, f"{path}?channel=news", bearer(READER)) as stream,
    ):
        await stream.block()
        access.write(
            keys=f'[[realms.default.keys]]\nname = "reader"\nhash = "{hash_key(READER)}"\n'
            'actions = ["subscribe"]\nchannels = ["other"]\n'
        )
        server.reload()
        assert b'"code":"forbidden"' in (await stream.rest())[-1]


async def test_streams_count_as_polls(access: AccessFile) -> None:
    """So many may wait with one token, whatever they are."""
    one = token("news", sub="one")
    async with running(access=access.write(), polls_per_token_max=2) as server:
        async with streaming(server, f"/events?channel=news&token={one}") as events:
            async with streaming(server, f"/stream?channel=news&token={one}"):
                for path in ("/events", "/stream", "/poll"):
                    reply = await ask(server, f"{path}?channel=news&token={one}")
                    assert (reply.status, reply.json["code"]) == (429, "too_many_polls")
                    assert int(reply.headers["retry-after"]) >= 1
                async with streaming(server, f"/events?channel=news&token={token('news', sub='two')}"):
                    pass
            await eventually(lambda: server.metrics.streams["application/x-ndjson"] == 0, "one has gone")
            async with streaming(server, f"/stream?channel=news&token={one}"):
                await events.block()
        await nothing_is_left(server)


async def test_a_browser_that_comes_back_is_put_off_with_200(access: AccessFile) -> None:
    """Any other status would be the end of its EventSource. Who was never here sees the status."""
    one = token("news", sub="one")
    async with (
        running(access=access.write(), polls_per_token_max=1) as server,
        streaming(server, f"/events?channel=news&token={one}"),
    ):
        reply = await ask(server, f"/events?channel=news&token={one}", "Last-Event-ID: 5\r\n")
        assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
        assert reply.headers["retry-after"] == "1"
        assert reply.headers["cache-control"] == "no-store"
        match = re.fullmatch(rb"retry: (\d+)\n\n", reply.body)
        assert match
        assert 1000 < int(match[1]) <= 1000 + RETRY_MS[1]
        assert (await ask(server, f"/events?channel=news&token={one}")).status == 429
        assert server.metrics.refused["too_many_polls"] == 2


@KINDS
async def test_the_broker_does_not_answer(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """503 at the beginning; in the middle an error in the stream, and its end."""

    async def fail(*_: Any) -> Any:
        raise Unavailable("not now", retry_after=7)

    async with running(heartbeat=0.1) as server:
        async with streaming(server, f"{path}?channel=a") as stream:
            await stream.block()
            monkeypatch.setattr(server.node.broker, "watch", fail)
            server.node.on_doubt(None)
            assert b'"code":"unavailable"' in (await stream.rest())[-1]
        assert (await ask(server, f"{path}?channel=b")).status == 503
        if path == "/events":
            reply = await ask(server, "/events?channel=b", "Last-Event-ID: 5\r\n")
            assert (reply.status, reply.body[:7]) == (200, b"retry: ")
        await nothing_is_left(server)


@KINDS
async def test_clients_of_a_proxy_are_counted_while_they_stream(path: str) -> None:
    """As for a poll: their address is in X-Forwarded-For."""
    of = "X-Forwarded-For: 203.0.113.5\r\n"
    async with running(connections_per_address_max=1) as server:
        async with streaming(server, f"{path}?channel=a", of):
            reply = await ask(server, f"{path}?channel=a", of)
            assert (reply.status, reply.json["code"]) == (429, "too_many_connections")
            assert (await ask(server, f"{path}?channel=a", "X-Forwarded-For: 203.0.113.6\r\n", "HEAD")).status == 200
        await nothing_is_left(server)


@KINDS
async def test_another_realm(tmp_path: Path, path: str) -> None:
    """The path names it; streams of one hear nothing of the other."""
    file = tmp_path / "access.toml"
    file.write_text(
        f'[realms.default]\nsubscribe = "open"\n[realms.shop]\nsubscribe = "open"\n'
        f'[[realms.shop.keys]]\nname = "shop"\nhash = "{hash_key(ALL)}"\nactions = ["publish"]\n'
    )
    async with running(access=file) as server, connected(server) as client:
        async with streaming(server, f"/realms/shop{path}?channel=a") as stream:
            await stream.block()
            body = {"channels": ["a"], "data": "sold"}
            assert (await client.request("POST", "/realms/shop/publish", body, bearer(ALL))).status == 201
            seen = b""
            while b'"sold"' not in seen:
                seen += await stream.block()
        reply = await ask(server, f"/realms/nowhere{path}?channel=a")
        assert reply.status == 401


# HTTP


@KINDS
async def test_head(path: str) -> None:
    """The header fields of a stream, at once, and the connection goes on."""
    async with running() as server, connected(server) as client:
        reply = await client.request("HEAD", f"{path}?channel=a")
        assert reply.status == 200
        kind = "text/event-stream" if path == "/events" else "application/x-ndjson"
        assert reply.headers["content-type"] == kind
        assert (await client.request("HEAD", f"{path}?channel=a")).status == 200
        assert (await client.get("/poll?channel=a&timeout=0")).status == 200
        assert not any(server.metrics.streams.values())


@KINDS
@pytest.mark.parametrize("headers", ["", "Connection: keep-alive\r\n"])
async def test_http_1_0(path: str, headers: str) -> None:
    """No chunks: the end of the connection is the end of the stream."""
    async with running(drain_window=0) as server, connected(server) as client:
        client.send(f"GET {path}?channel=a HTTP/1.0\r\n{headers}\r\n")
        head = await client.reply()
        assert (head.version, head.status) == ("HTTP/1.0", 200)
        assert "transfer-encoding" not in head.headers
        assert head.headers.get("connection", "close") == "close"
        stream = Stream(client, head)
        id = await publish(server, "a", data=1)
        seen = b""
        while b'"id":%d,' % id not in seen:
            seen += await stream.block()
        await server.node.drain(0)
        await stream.rest()
        assert stream.ended


@KINDS
async def test_connection_close(path: str) -> None:
    """A client that wants the connection closed behind the stream has it closed."""
    async with running() as server, connected(server) as client:
        channel = await create(server)
        stream = await begin(client, f"{path}?channel={channel}", "Connection: close\r\n")
        await parked(server, 1)
        await close(server, channel)
        await stream.rest()
        assert await client.rest() == b""


@KINDS
async def test_only_get(path: str) -> None:
    """Anything else is told which methods there are."""
    async with running() as server, connected(server) as client:
        reply = await client.request("POST", path, {"channels": ["a"]})
        assert (reply.status, reply.headers["allow"]) == (405, "GET,HEAD")


@KINDS
async def test_a_page_of_another_origin(path: str) -> None:
    """It reads the stream if the settings name it."""
    headers = "Origin: https://page.example\r\n"
    async with running(cors_origins="https://page.example") as server:
        async with streaming(server, f"{path}?channel=a", headers) as stream:
            assert stream.head.headers["access-control-allow-origin"] == "https://page.example"
        async with streaming(server, f"{path}?channel=a", "Origin: https://other.example\r\n") as stream:
            assert "access-control-allow-origin" not in stream.head.headers


@KINDS
async def test_a_hundred_channels(path: str) -> None:
    """As many as a poll may have, each heard; one more is too many."""
    names = [f"c{n}" for n in range(100)]
    query = "&".join(f"channel={name}" for name in names)
    async with running() as server:
        async with streaming(server, f"{path}?{query}") as stream:
            await stream.block()
            ids = [await publish(server, name, data=1) for name in names]
            seen = b""
            while b'"id":%d,' % ids[-1] not in seen:
                seen += await stream.block()
            assert [int(id) for id in re.findall(rb'"id":(\d+),', seen)] == ids
        assert (await ask(server, f"{path}?{query}&channel=d")).status == 413


@KINDS
async def test_more_than_an_answer_holds_comes_in_several(path: str) -> None:
    """The largest messages and more of them than `answer_bytes_max`: all come, in order, each once."""
    async with running(answer_bytes_max=200_000) as server:
        data = "x" * (64 * 1024 - 2)
        ids = [await publish(server, "a", data=data) for _ in range(20)]
        async with streaming(server, f"{path}?channel=a") as stream:
            seen: list[int] = []
            while len(seen) < len(ids):
                block = await stream.block()
                assert len(block) < 220_000
                seen += map(int, re.findall(rb'\{"id":(\d+),', block))
            assert seen == ids


# Lines of JSON


async def test_lines_are_answers_of_polls() -> None:
    """To the byte, and the first comes at once."""
    async with running() as server:
        id = await publish(server, "a", data=[7])
        async with streaming(server, "/stream?channel=a") as stream:
            assert stream.head.headers["content-type"] == "application/x-ndjson"
            expected = b'{"messages":[{"id":%d,"channels":["a"],"data":[7]}],"next":%d,"gap":false}\n'
            assert await stream.block() == expected % (id, id + 1)
            second = await publish(server, "a", data=2)
            assert (await stream.line())["messages"] == [{"id": second, "channels": ["a"], "data": 2}]
        async with streaming(server, "/stream?channel=a&start=latest") as stream:
            line = await stream.line()
            assert (line["messages"], line["gap"]) == ([], False)
            assert line["next"] > second


# The node goes away


@KINDS
async def test_drained_streams_end_with_a_cursor_over_the_window(path: str) -> None:
    """Not all at once; each with a cursor behind all it was given, and none is told an error."""
    async with running(heartbeat=NEVER_S) as server:
        loop = asyncio.get_running_loop()
        ended: list[float] = []

        async def follow() -> None:
            async with streaming(server, f"{path}?channel=a") as stream:
                blocks = await stream.rest()
                ended.append(loop.time())
                if path == "/events":
                    assert cursor(blocks[-1]) > 0
                else:
                    assert json.loads(blocks[-1])["next"] > 0

        following = [asyncio.create_task(follow()) for _ in range(20)]
        await parked(server, 20)
        began = loop.time()
        await server.stop(1.0)
        await asyncio.gather(*following)
        took = sorted(end - began for end in ended)
        assert took[0] < 0.4
        assert took[-1] > 0.6
        assert sum(0.25 < moment < 0.75 for moment in took) >= 5
        await server.start()


@KINDS
async def test_a_stream_that_begins_on_a_draining_node_waits(path: str) -> None:
    """A client without another node to go to is not sent round in circles; it hears of what is published."""
    async with running() as server:
        server.node.draining = True
        async with streaming(server, f"{path}?channel=a&start=latest") as stream:
            await parked(server, 1)
            id = await publish(server, "a", data=1)
            assert b'"id":%d,' % id in b"".join(await stream.rest())
        await nothing_is_left(server)


# Clients that do not read, and clients that vanish


def shut(client: Client, *, reset: bool) -> None:
    """Leave without a word."""
    if reset:
        sock = client.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


@KINDS
@pytest.mark.parametrize("reset", [False, True])
async def test_a_client_that_vanishes_frees_everything_at_once(access: AccessFile, path: str, reset: bool) -> None:
    """Its subscription, its place among its token's polls and its address' connections; nothing is logged."""
    async with running(access=access.write(), heartbeat=NEVER_S) as server, connected(server) as client:
        headers = f"X-Forwarded-For: 203.0.113.5\r\n{bearer(token('news', sub='one'))}"
        await begin(client, f"{path}?channel=news", headers)
        await parked(server, 1)
        assert len(server.service.peers) == 1
        shut(client, reset=reset)
        await nothing_is_left(server)
        assert server.metrics.realm("default").answers["gone"] == 1


@KINDS
async def test_messages_for_a_client_that_just_vanished_are_no_error(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection closes in the moment in which something is written."""
    async with running(heartbeat=NEVER_S) as server:
        for _ in range(10):
            async with connected(server) as client:
                await begin(client, f"{path}?channel=a")
                await parked(server, 1)
                lane = next(lane for lane in server._lanes.open if lane._state == 2)
                lane._transport.close()
                await publish(server, "a", data=1)
                await client.rest()
        await nothing_is_left(server)
    assert not caplog.records


def slow(server: Server) -> socket.socket:
    """A connected socket that takes little without being read."""
    host, _, port = server.address.rpartition(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    sock.setblocking(False)
    return sock


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Closed after the test."""
    made: list[socket.socket] = []
    yield made
    for sock in made:
        sock.close()


@KINDS
async def test_a_client_that_does_not_read_is_bounded_and_cut(path: str, sockets: list[socket.socket]) -> None:
    """It costs one answer beyond its write buffer, which is counted; others get all; its time is `write_timeout`."""
    async with running(write_timeout=1, answer_bytes_max=100_000, heartbeat=NEVER_S) as server:
        sockets += [slow(server) for _ in range(5)]
        for sock in sockets:
            sock.send(f"GET {path}?channel=a HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        await parked(server, 5)
        async with streaming(server, f"{path}?channel=a") as stream:
            ids: list[int] = []
            seen: list[int] = []
            for _ in range(200):
                ids.append(await publish(server, "a", data="x" * 50_000))
                while len(seen) < len(ids):
                    seen += map(int, re.findall(rb'\{"id":(\d+),', await stream.block()))
            assert seen == ids
            lanes = server._lanes
            assert 0 < lanes._unread_bytes <= 5 * (64 * 1024 + 110_000)
            held = [lane._transport.get_write_buffer_size() for lane in lanes.open if lane._stuck]
            assert len(held) == 5
            assert sum(held) <= lanes._unread_bytes
            await eventually(lambda: server.metrics.connections_cut["unread"] == 5, "those who do not read are cut")
            await eventually(lambda: sum(server.metrics.streams.values()) == 1, "one is left, who reads")
        await nothing_is_left(server)


@KINDS
async def test_small_answers_do_not_hide_a_large_one(path: str, sockets: list[socket.socket]) -> None:
    """Who reads now and then and stops just above the limit leaves no uncounted answer behind."""
    async with running(
        write_timeout=NEVER_S, message_bytes_max=1_000_000, write_buffer_bytes_max=4096, heartbeat=NEVER_S
    ) as server:
        sock = slow(server)
        sockets.append(sock)
        sock.send(f"GET {path}?channel=a HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        await parked(server, 1)
        lanes = server._lanes
        while not lanes._unread_bytes:
            await publish(server, "a", data="x" * 2000)
            await asyncio.sleep(0)
        for _ in range(3):
            await publish(server, "a", data="x" * 900_000)
        await asyncio.sleep(0.05)
        (stuck,) = [lane for lane in lanes.open if lane._stuck]
        assert stuck._transport.get_write_buffer_size() <= lanes._unread_bytes
        sock.close()
        await nothing_is_left(server)


@KINDS
async def test_all_together_leave_only_so_much_unread(path: str, sockets: list[socket.socket]) -> None:
    """Beyond `unread_bytes_max` who has not read for longest is cut; who reads is not."""
    async with running(
        unread_bytes_max=400_000, write_timeout=NEVER_S, heartbeat=NEVER_S, answer_bytes_max=50_000
    ) as server:
        sockets += [slow(server) for _ in range(8)]
        for sock in sockets:
            sock.send(f"GET {path}?channel=a HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        await parked(server, 8)
        async with streaming(server, f"{path}?channel=a") as stream:
            await stream.block()
            seen = 0
            for n in range(1, 101):
                await publish(server, "a", data="x" * 50_000)
                while seen < n:
                    seen += len(re.findall(rb'\{"id":', await stream.block()))
            assert server._lanes._unread_bytes <= 400_000
            await eventually(lambda: 1 <= server.metrics.connections_cut["unread"] < 8, "some are cut")
        for sock in sockets:
            sock.close()
        await nothing_is_left(server)


async def test_a_stop_does_not_wait_for_who_does_not_read(sockets: list[socket.socket]) -> None:
    """Streams that are stuck hold up the end of a node for a few seconds at most."""
    async with running(write_timeout=NEVER_S, heartbeat=NEVER_S) as server:
        sockets += [slow(server) for _ in range(4)]
        for sock in sockets:
            sock.send(b"GET /events?channel=a HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 4)
        while len([lane for lane in server._lanes.open if lane._stuck]) < 4:
            await publish(server, "a", data="x" * 60_000)
        began = time()
        await server.stop(0)
        assert time() - began < GOODBYE_S + FLUSH_TIMEOUT_S + 2
        await nothing_is_left(server)
        await server.start()


@KINDS
async def test_a_slow_client_catches_up(path: str) -> None:
    """It held up nobody but itself, and everything is there when it reads again."""
    async with running(heartbeat=NEVER_S, answer_bytes_max=20_000) as server, connected(server) as client:
        stream = await begin(client, f"{path}?channel=a")
        ids = [await publish(server, "a", data="x" * 10_000) for _ in range(500)]
        seen: list[int] = []
        while len(seen) < len(ids):
            seen += map(int, re.findall(rb'\{"id":(\d+),', await stream.block()))
        assert seen == ids


@KINDS
async def test_what_a_client_sends_behind_is_bounded(path: str) -> None:
    """A stream may last for hours; what is sent meanwhile is kept up to a limit, and not read beyond it."""
    async with running(heartbeat=NEVER_S) as server, connected(server) as client:
        await begin(client, f"{path}?channel=a")
        client.writer.transport.set_write_buffer_limits(high=0)
        client.send(b"GET /poll?channel=a HTTP/1.1\r\nHost: test\r\n\r\n" * 400_000)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.writer.drain()
        (lane,) = server._lanes.open
        assert len(lane._buffer) < 1024 * 1024
        client.writer.transport.abort()


async def test_a_stream_costs_one_poll() -> None:
    """It waits in the same index as polls do, and is woken by the same answer, which all streams share."""
    async with running(heartbeat=NEVER_S) as server:
        realm = server.service.root
        followers = [Follower(realm, None, ("a",), 0) for _ in range(3)]
        for follower in followers:
            await follower.next()
        waiting = [asyncio.create_task(follower.next()) for follower in followers]
        await parked(server, 3)
        await publish(server, "a", data=1)
        answers = await asyncio.gather(*waiting)
        form = EventStream()
        assert len({id(answer) for answer in answers}) == 1
        assert len({id(form.show(answer)) for answer in answers}) == 1
        assert server.node.parked == 0


async def test_a_cancelled_follower_leaves_its_poll() -> None:
    """Its cursor stays where it was."""
    async with running() as server:
        follower = Follower(server.service.root, None, ("a",), 0)
        before = (await follower.next()).next
        waiting = asyncio.create_task(follower.next())
        await parked(server, 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (server.node.parked, follower.start) == (0, before)


async def test_a_grant_bounds_the_wait(access: AccessFile) -> None:
    """A subscription ends with its token, not with the heartbeat behind it."""
    async with running(access=access.write(), heartbeat=NEVER_S) as server:
        began = time()
        async with streaming(server, f"/stream?channel=news&token={token('news', life=0.4)}") as stream:
            await stream.rest()
        assert time() - began < 2
