"""WebSocket, frame by frame, through a whole server and raw connections. https://www.rfc-editor.org/rfc/rfc6455"""

import asyncio
import base64
import hashlib
import json
import os
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from pushup.access import hash_key
from pushup.errors import Unavailable
from pushup.messages import MAX_ID
from pushup.realm import Realm
from pushup.server import Server
from pushup.streams import GOODBYE_S
from tests.support import PATIENCE_S, Client, Reply, connected, eventually, parked, running
from tests.test_access_http import ALL, READER, AccessFile, bearer, token
from tests.test_streams import NEVER_S, ask, close, create, nothing_is_left, publish, shut, slow

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
FIN: Final = 0x80


class Frame(NamedTuple):
    """One frame of the server."""

    opcode: int
    payload: bytes

    @property
    def code(self) -> int:
        """That of a close frame."""
        assert self.opcode == CLOSE, self
        return int.from_bytes(self.payload[:2], "big")


def encode(opcode: int, payload: bytes, *, flags: int = FIN, mask: bool = True) -> bytes:
    """A frame of a client."""
    size = len(payload)
    bit = 0x80 if mask else 0
    if size < 126:
        head = struct.pack("!BB", flags | opcode, bit | size)
    elif size < 65536:
        head = struct.pack("!BBH", flags | opcode, bit | 126, size)
    else:
        head = struct.pack("!BBQ", flags | opcode, bit | 127, size)
    return head + (bytes(4) if mask else b"") + payload  # A mask of zeros is one.


class Peer:
    """A WebSocket as its client has it. Answers no ping by itself."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def send(self, frame: Any) -> None:
        self.send_text(json.dumps(frame))

    def send_text(self, text: str | bytes) -> None:
        self.client.send(encode(TEXT, text.encode() if isinstance(text, str) else text))

    async def frame(self) -> Frame:
        """The next frame, whatever it is."""
        reader = self.client.reader
        async with asyncio.timeout(PATIENCE_S):
            first, size = await reader.readexactly(2)
            assert first & 0xF0 == FIN, "whole, and without extensions"
            if size == 126:
                (size,) = struct.unpack("!H", await reader.readexactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", await reader.readexactly(8))
            return Frame(first & 0x0F, await reader.readexactly(size))

    async def text(self) -> bytes:
        """The next frame of text."""
        while (frame := await self.frame()).opcode == PING:
            self.client.send(encode(PONG, frame.payload))
        assert frame.opcode == TEXT, frame
        return frame.payload

    async def take(self) -> Any:
        """The next frame of text, decoded."""
        return json.loads(await self.text())

    async def subscribe(self, *channels: str | int, start: int | str = 0, **more: Any) -> Any:
        """Subscribe and return the first answer."""
        self.send({"subscribe": channels, "start": start, **more})
        said = await self.take()
        assert said == {"subscribed": list(channels), **more}, said
        return await self.take()

    async def error(self) -> Any:
        return (await self.take())["error"]

    async def closed(self) -> int:
        """The code the server closes with, after everything else it had to say."""
        while (frame := await self.frame()).opcode != CLOSE:
            pass
        self.client.send(encode(CLOSE, frame.payload[:2]))
        assert await self.client.rest() == b""
        return frame.code

    async def bye(self) -> None:
        """Close as a browser does."""
        self.client.send(encode(CLOSE, struct.pack("!H", 1000)))
        while (await self.frame()).opcode != CLOSE:
            pass
        assert await self.client.rest() == b""


KEY: Final = base64.b64encode(bytes(16)).decode()


def handshake(target: str = "/ws", headers: str = "", key: str = KEY) -> str:
    return (
        f"GET {target} HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n{headers}\r\n"
    )


async def refused(server: Server, target: str = "/ws", headers: str = "", key: str = KEY) -> Reply:
    """The answer to a handshake that fails."""
    async with connected(server) as client:
        client.send(handshake(target, headers, key))
        return await client.reply()


async def join(client: Client, target: str = "/ws", headers: str = "") -> Peer:
    """Make this connection a WebSocket."""
    client.send(handshake(target, headers))
    reply = await client.reply()
    assert reply.status == 101, reply
    return Peer(client)


@asynccontextmanager
async def joined(server: Server, target: str = "/ws", headers: str = "") -> AsyncIterator[Peer]:
    """A WebSocket on a connection of its own."""
    async with connected(server) as client:
        yield await join(client, target, headers)


@pytest.fixture
def access(tmp_path: Path) -> AccessFile:
    return AccessFile(tmp_path)


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Closed after the test."""
    made: list[socket.socket] = []
    yield made
    for sock in made:
        sock.close()


# The handshake


async def test_the_handshake() -> None:
    """As the RFC has it; compression is not agreed on, as it would cost more memory than everything else."""
    async with running() as server, connected(server) as client:
        client.send(handshake(headers="Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"))
        reply = await client.reply()
        assert reply.status == 101
        accept = hashlib.sha1(f"{KEY}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
        assert reply.headers["sec-websocket-accept"] == base64.b64encode(accept).decode()
        assert "sec-websocket-extensions" not in reply.headers
        assert "server" not in reply.headers
        assert server.metrics.streams["websocket"] == 1
        await Peer(client).bye()
        await nothing_is_left(server)


@pytest.mark.parametrize("key", ["", "short", "é" * 24, "AAAA", "\x01" * 24])
async def test_a_wrong_key_is_an_error_of_the_client(key: str, caplog: pytest.LogCaptureFixture) -> None:
    """400, whatever it is made of."""
    async with running() as server:
        reply = await refused(server, key=key)
        assert (reply.status, reply.json["code"]) == (400, "invalid_request")
        await nothing_is_left(server)
    assert not caplog.records


@pytest.mark.parametrize(
    ("target", "status"),
    [("/ws?channel=a", 400), ("/ws?token=a&token=b", 400), ("/ws?token=%zz", 400), ("/ws/", 404), ("/wss", 404)],
)
async def test_a_handshake_of_nonsense(target: str, status: int) -> None:
    """Channels are subscribed to by frames, so a query has at most a token."""
    async with running() as server:
        assert (await refused(server, target)).status == status


async def test_who_does_not_ask_for_a_websocket() -> None:
    """Plain requests are told what this path speaks."""
    async with running() as server, connected(server) as client:
        reply = await client.get("/ws")
        assert (reply.status, reply.json["code"]) == (400, "invalid_request")
        assert (await client.request("HEAD", "/ws")).status == 405
        assert (await client.request("POST", "/ws", {})).status == 405
        assert (await client.get("/poll?channel=a&timeout=0")).status == 200
        assert server.metrics.streams["websocket"] == 0


async def test_frames_before_the_upgrade_is_done() -> None:
    """A client must wait for the answer. Frames behind the handshake in its segment are served, later ones not kept."""
    async with running() as server, connected(server) as client:
        client.send(handshake().encode() + encode(TEXT, b'{"subscribe":["a"]}'))
        assert (await client.reply()).status == 101
        peer = Peer(client)
        assert await peer.take() == {"subscribed": ["a"]}
        assert (await peer.take())["messages"] == []
        await peer.bye()


async def test_a_flood_before_the_upgrade_is_not_kept(access: AccessFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the node still finds out who it is, a client cannot have it remember anything."""
    let_in = asyncio.Event()
    meet = Realm.meet

    async def slowly(*args: Any) -> Any:
        await let_in.wait()
        return await meet(*args)

    monkeypatch.setattr(Realm, "meet", slowly)
    async with running(access=access.write()) as server, connected(server) as client:
        client.send(handshake("/ws", bearer(READER)))
        await eventually(lambda: bool(server._lanes.handed_over), "the request is there")
        for _ in range(50):
            client.send(encode(TEXT, b'{"subscribe":["news"]}') * 1000)
            await asyncio.sleep(0.002)
        (web,) = server._lanes.handed_over.values()
        assert len(web._message_tail) < 1024 * 1024  # type: ignore[attr-defined]
        let_in.set()
        assert (await client.reply()).status == 101
        peer = Peer(client)
        assert (await peer.subscribe("news"))["messages"] == []
        client.writer.transport.abort()
        await nothing_is_left(server)


# Frames


async def test_subscribe_and_publish() -> None:
    """The bytes of every frame."""
    async with running() as server, joined(server) as peer:
        peer.send_text('{"subscribe":["a","b"]}')
        assert await peer.text() == b'{"subscribed":["a","b"]}'
        match = re.fullmatch(rb'\{"messages":\[\],"next":(\d+),"gap":false,"for":\["a","b"\]\}', await peer.text())
        assert match
        peer.send_text('{"publish":{"channels":["b","c"],"data":[1, 2]},"ref":"x"}')
        match = re.fullmatch(rb'\{"published":\{"id":(\d+)\},"ref":"x"\}', await peer.text())
        assert match
        id = int(match[1])
        expected = b'{"messages":[{"id":%d,"channels":["b"],"data":[1, 2]}],"next":%d,"gap":false,"for":["a","b"]}'
        assert await peer.text() == expected % (id, id + 1)
        peer.send_text('{"unsubscribe":["b"],"ref":null}')
        assert await peer.text() == b'{"unsubscribed":["b"],"ref":null}'
        await publish(server, "b", data=3)
        id = await publish(server, "a", data=4)
        expected = b'{"messages":[{"id":%d,"channels":["a"],"data":4}],"next":%d,"gap":false,"for":["a"]}'
        assert await peer.text() == expected % (id, id + 1)
        await peer.bye()
        await nothing_is_left(server)


async def test_an_idempotency_key() -> None:
    """A retry has the id of the first, and says so."""
    async with running() as server, joined(server) as peer:
        ids = []
        for _ in range(2):
            peer.send({"publish": {"channels": ["a"], "data": 1, "key": "k"}})
            ids.append((await peer.take())["published"])
        assert ids[1] == {"id": ids[0]["id"], "duplicate": True}
        peer.send({"publish": {"channels": ["a"], "data": 2, "key": "k"}, "ref": 7})
        said = await peer.take()
        assert (said["error"]["code"], said["ref"]) == ("idempotency_key_reused", 7)


@pytest.mark.parametrize(
    "ref", ["null", "false", "0", '""', '"\\u0000\u2028"', "[[[]]]", '{"a": {"ref": 1}}', "1e300", "[" * 90 + "]" * 90]
)
async def test_any_ref_comes_back(ref: str) -> None:
    """As it was, with what was done and with what was not."""
    async with running() as server, joined(server) as peer:
        peer.send_text(f'{{"ref":{ref},"publish":{{"channels":["a"],"data":1}}}}')
        assert (await peer.text()).endswith(f',"ref":{ref}}}'.encode())
        for wrong in ('"publish":{"channels":[],"data":1}', '"subscribe":[]', '"strat":5', '"unsubscribe":"a"'):
            peer.send_text(f'{{{wrong},"ref":{ref}}}')
            said = await peer.text()
            assert b'"status":400' in said
            assert said.endswith(f',"ref":{ref}}}'.encode())


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ({}, "invalid_request"),
        ({"ref": 1}, "invalid_request"),
        ({"subscribe": ["a"], "unsubscribe": ["a"]}, "invalid_request"),
        ({"subscribe": []}, "invalid_parameter"),
        ({"subscribe": None}, "invalid_parameter"),
        ({"subscribe": [""]}, "invalid_parameter"),
        ({"subscribe": ["a\n"]}, "invalid_parameter"),
        ({"subscribe": ["a"], "start": "first"}, "invalid_parameter"),
        ({"subscribe": ["a"], "start": -1}, "invalid_parameter"),
        ({"subscribe": ["a"], "start": MAX_ID + 1}, "invalid_parameter"),
        ({"subscribe": ["a"], "start": 1.5}, "invalid_parameter"),
        ({"unsubscribe": ["a"], "start": 1}, "invalid_parameter"),
        ({"publish": {}}, "invalid_parameter"),
        ({"publish": [1]}, "invalid_request"),
        ({"publish": {"channels": ["a"]}}, "invalid_parameter"),
        ({"publish": {"channels": ["a"], "data": "x" * 70_000}}, "too_large"),
        ({"subscribe": [f"c{n}" for n in range(101)]}, "too_large"),
        ({"subscribe": [17]}, "channel_not_found"),
        ({"subscribe": ["a", 17]}, "channel_not_found"),
        ({"publish": {"channels": [17], "data": 1}}, "channel_not_found"),
    ],
)
async def test_a_wrong_frame_is_answered_and_the_connection_goes_on(frame: Any, code: str) -> None:
    """With a problem document; nothing else happens."""
    async with running() as server, joined(server) as peer:
        peer.send({**frame, "ref": 5})
        said = await peer.take()
        assert (said["error"]["code"], said["ref"]) == (code, 5)
        assert (await peer.subscribe("a"))["messages"] == []
        assert server.node.parked <= 1
        await peer.bye()
        await nothing_is_left(server)


@pytest.mark.parametrize("data", [r'"\ud800"', r'"\udc00\ud800"', "[" * 101 + "]" * 101], ids=["high", "low", "deep"])
async def test_data_that_no_message_may_have(data: str) -> None:
    """Lone surrogates and too deep nesting are the publication's errors."""
    async with running() as server, joined(server) as peer:
        peer.send_text(f'{{"publish":{{"channels":["a"],"data":{data}}},"ref":1}}')
        said = await peer.take()
        assert (said["error"]["status"], said["error"].get("parameter", "data"), said["ref"]) == (400, "data", 1)


@pytest.mark.parametrize(
    "text",
    ["", " ", "x", "[]", "1", "null", '"a"', '{"subscribe":["a"]', "{} {}", '{"ref":' + "[" * 100_000, "\ufeff{}"],
    ids=["empty", "blank", "word", "array", "number", "null", "string", "unfinished", "two", "deep", "bom"],
)
async def test_what_is_no_json_object_ends_the_connection(text: str) -> None:
    """The client does not speak this protocol: it is told so, and closed with 4400."""
    async with running() as server, joined(server) as peer:
        peer.send_text(text)
        assert (await peer.error())["code"] == "invalid_request"
        assert await peer.closed() == 4400
        await nothing_is_left(server)


async def test_binary_frames_end_the_connection() -> None:
    """Frames are text."""
    async with running() as server, joined(server) as peer:
        peer.client.send(encode(BINARY, b'{"subscribe":["a"]}'))
        assert (await peer.error())["detail"] == "a frame is text"
        assert await peer.closed() == 4400
        await nothing_is_left(server)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encode(TEXT, b'{"ref":"\xff"}'), 1007),
        (encode(TEXT, b'{"ref":"\xed\xa0\x80"}'), 1007),
        (encode(TEXT, b"x", flags=0xC0), 1002),
        (encode(3, b"x"), 1002),
        (encode(CONTINUATION, b"x"), 1002),
        (encode(PING, b"x", flags=0), 1002),
        (encode(PING, b"x" * 126), 1002),
        (encode(TEXT, b"a", flags=0) + encode(TEXT, b"b"), 1002),
        (encode(CLOSE, b"x"), 1002),
        (struct.pack("!BBQ", FIN | TEXT, 0xFF, 2**40), 1009),
        (struct.pack("!BBQ", FIN | TEXT, 0xFF, 2**63), 1009),
        (encode(TEXT, b"x" * 3000), 1009),
        (encode(TEXT, b"x" * 1000, flags=0) + encode(CONTINUATION, b"x" * 2000), 1009),
    ],
    ids=[
        *("not UTF-8", "a surrogate", "compressed", "unknown", "continuation of nothing", "a ping in parts"),
        *(
            "a long ping",
            "text within text",
            "a close of one byte",
            "huge",
            "negative",
            "too long",
            "too long in parts",
        ),
    ],
)
async def test_frames_against_the_rfc_end_the_connection(data: bytes, code: int) -> None:
    """With the code that the RFC has for it, before the rest is read."""
    async with running(body_bytes_max=2000, message_bytes_max=1000) as server, joined(server) as peer:
        peer.client.send(data)
        frame = await peer.frame()
        assert frame.code in (code, 1002)
        peer.client.send(encode(CLOSE, frame.payload[:2]))
        assert await peer.client.rest() == b""
        await nothing_is_left(server)


async def test_a_message_in_parts_is_one() -> None:
    """With a ping between them."""
    async with running() as server, joined(server) as peer:
        peer.client.send(encode(TEXT, b'{"subscr', flags=0))
        peer.client.send(encode(PING, b"hello"))
        peer.client.send(encode(CONTINUATION, b"", flags=0))
        peer.client.send(encode(CONTINUATION, b'ibe":["a"]}'))
        assert await peer.frame() == Frame(PONG, b"hello")
        assert await peer.take() == {"subscribed": ["a"]}


async def test_a_frame_byte_by_byte() -> None:
    """However it arrives."""
    async with running() as server, joined(server) as peer:
        for byte in encode(TEXT, b'{"subscribe":["a"],"ref":"' + b"x" * 200 + b'"}'):
            peer.client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await peer.take())["subscribed"] == ["a"]


# Subscriptions


async def test_each_subscription_has_its_own_cursor() -> None:
    """`for` says whose it is; the same message may come for two channels of two subscriptions."""
    async with running() as server, joined(server) as peer:
        old = [await publish(server, "a", data=n) for n in range(3)]
        first = await peer.subscribe("a", start=old[1])
        assert ([message["id"] for message in first["messages"]], first["for"]) == (old[1:], ["a"])
        second = await peer.subscribe("b", "c", start="latest")
        assert (second["messages"], second["for"]) == ([], ["b", "c"])
        id = await publish(server, "a", "c", data="both")
        answers = sorted([await peer.take(), await peer.take()], key=lambda answer: str(answer["for"]))
        assert [(answer["for"], answer["next"]) for answer in answers] == [(["a"], id + 1), (["b", "c"], id + 1)]
        assert [answer["messages"][0]["channels"] for answer in answers] == [["a"], ["c"]]
        assert server.node.parked <= 2


async def test_subscribing_again_moves_a_channel() -> None:
    """It has one cursor at a time; the others of its former subscription keep theirs."""
    async with running() as server, joined(server) as peer:
        await peer.subscribe("a", "b", start="latest")
        ids = [await publish(server, "a", "b", data=n) for n in range(3)]
        for id in ids:
            assert (await peer.take())["next"] == id + 1
        again = await peer.subscribe("a", start=ids[1])
        assert ([message["id"] for message in again["messages"]], again["for"]) == (ids[1:], ["a"])
        await parked(server, 2)
        id = await publish(server, "a", "b", data=3)
        answers = [await peer.take(), await peer.take()]
        assert sorted(answer["for"] for answer in answers) == [["a"], ["b"]]
        assert {answer["messages"][0]["id"] for answer in answers} == {id}


async def test_unsubscribing_from_what_one_is_not_subscribed_to() -> None:
    """Nothing to do, and that is said."""
    async with running() as server, joined(server) as peer:
        peer.send({"unsubscribe": ["a", 5]})
        assert await peer.take() == {"unsubscribed": ["a", 5]}
        await peer.subscribe("a")
        peer.send({"unsubscribe": ["a"]})
        assert await peer.take() == {"unsubscribed": ["a"]}
        await parked(server, 0)


async def test_a_gap_is_in_the_answer() -> None:
    """As in that of a poll, with the messages behind it."""
    async with running(channel_max_messages=2) as server, joined(server) as peer:
        ids = [await publish(server, "a", data=n) for n in range(5)]
        answer = await peer.subscribe("a", start=ids[0])
        assert (answer["gap"], [message["id"] for message in answer["messages"]]) == (True, ids[3:])
        await publish(server, "a", data=5)
        assert (await peer.take())["gap"] is False


async def test_channels_that_close() -> None:
    """An integer channel leaves its subscription for good, a named one stays; an empty subscription is none."""
    async with running() as server, joined(server) as peer:
        one, two = await create(server), await create(server)
        await publish(server, "a", data=0)
        await peer.subscribe("a", one, start="latest")
        await peer.subscribe(two)
        await parked(server, 2)
        await close(server, one)
        answer = await peer.take()
        assert (answer["closed"], answer["for"]) == ([one], ["a", one])
        await close(server, two)
        answer = await peer.take()
        assert (answer["closed"], answer["for"]) == ([two], [two])
        await parked(server, 1)
        await close(server, "a")
        answer = await peer.take()
        assert (answer["closed"], answer["for"]) == (["a"], ["a"])
        id = await publish(server, "a", data=1)
        answer = await peer.take()
        assert (answer["messages"][0]["id"], answer["for"]) == (id, ["a"])


async def test_heartbeats_move_each_cursor() -> None:
    """An empty answer for each subscription."""
    async with running(heartbeat=0.1) as server, joined(server) as peer:
        first = {"a": (await peer.subscribe("a"))["next"], "b": (await peer.subscribe("b"))["next"]}
        later: dict[str, int] = {}
        while len(later) < 2:
            answer = await peer.take()
            assert answer["messages"] == []
            later[answer["for"][0]] = answer["next"]
        assert all(later[name] > first[name] for name in first)


class Model:
    """What a client may expect: of each channel, from the cursor it was last subscribed with on, every message once and
    in order, until it is unsubscribed or moved."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str], int]] = []
        """Verb, channels and start of the frames that are not answered yet."""
        self.cursors: dict[str, int] = {}
        """Of the channels that are subscribed to."""
        self._starts: dict[str, int] = {}
        self._seen: dict[str, list[int]] = {}
        self._spans: list[tuple[str, int, int, list[int]]] = []
        """Channel, from, below, and the ids that came."""

    def take(self, said: Any) -> None:
        """The server said this."""
        if "messages" not in said:
            verb, channels, start = self.asked.pop(0)
            assert said == {f"{verb}d": channels}
            for name in channels:
                self.end(name)
                if verb == "subscribe":
                    self._starts[name] = self.cursors[name] = start
                    self._seen[name] = []
            return
        assert said["gap"] is False
        for message in said["messages"]:
            assert message["channels"] == [name for name in said["for"] if name in message["data"]]
            for name in message["channels"]:
                assert message["id"] >= self.cursors[name]
                self._seen[name].append(message["id"])
        for name in said["for"]:
            assert self.cursors[name] <= said["next"]
            self.cursors[name] = said["next"]

    def end(self, name: str) -> None:
        """The channel is not followed any more."""
        if name in self.cursors:
            self._spans.append((name, self._starts[name], self.cursors.pop(name), self._seen[name]))

    def check(self, published: list[tuple[int, list[str]]]) -> None:
        """Compare what came with what was published."""
        for name, start, below, seen in self._spans:
            assert seen == [id for id, channels in published if name in channels and start <= id < below]


@pytest.mark.parametrize("seed", range(20))
async def test_nothing_is_lost_or_doubled_while_channels_move(seed: int) -> None:
    """Random frames while publications go on, against a model that knows nothing of how it is done."""
    rng = random.Random(seed)
    names = list("abcde")
    published: list[tuple[int, list[str]]] = []
    busy = True

    async def produce(server: Server) -> None:
        async with connected(server) as client:
            while busy:
                some = rng.sample(names, rng.randint(1, 3))
                published.append((await client.publish(*some, data=some), some))
                await asyncio.sleep(rng.choice([0, 0, 0.001, 0.005]))

    small = rng.choice([{"answer_bytes_max": 1}, {"answer_bytes_max": 200, "backlog_messages": 3}, {}])
    async with running(heartbeat=0.2, **small) as server, joined(server) as peer:
        producing = asyncio.create_task(produce(server))
        model = Model()
        for _ in range(80):
            channels = rng.sample(names, rng.randint(1, 4))
            verb = rng.choice(["subscribe", "subscribe", "unsubscribe"])
            start = rng.choice([0, *(id for id, _ in published[-10:]), *model.cursors.values()])
            peer.send({verb: channels, **({"start": start} if verb == "subscribe" else {})})
            model.asked.append((verb, channels, start))
            for _ in range(rng.randint(0, 6)):
                if model.asked or model.cursors:
                    model.take(await peer.take())
        busy = False
        await producing
        while model.asked or any(cursor <= published[-1][0] for cursor in model.cursors.values()):
            model.take(await peer.take())
        for name in names:
            model.end(name)
        model.check(published)
        await peer.bye()
        await nothing_is_left(server)


async def test_a_subscription_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on; the client subscribes again from its cursor."""
    async with running() as server, joined(server) as peer:
        await peer.subscribe("a")
        await peer.subscribe("b")
        await parked(server, 2)

        async def fail(channels: Any) -> Any:
            raise Unavailable("not now")

        with monkeypatch.context() as patch:
            patch.setattr(server.node.broker, "watch", fail)
            server.node.on_doubt(["a"])
            said = await peer.take()
        assert (said["error"]["code"], said["for"]) == ("unavailable", ["a"])
        await parked(server, 1)
        id = await publish(server, "b", data=1)
        assert (await peer.take())["messages"][0]["id"] == id
        assert (await peer.subscribe("a"))["messages"] == []
        await peer.bye()
        await nothing_is_left(server)


# Who may


async def test_strangers_learn_nothing(access: AccessFile) -> None:
    """401 before anything is said of the request, and of realms that there are not."""
    async with running(access=access.write()) as server:
        for target in ("/ws", "/ws?chanel=a", "/ws?token=x", "/realms/nowhere/ws", "/realms/default/ws?x=1"):
            reply = await refused(server, target)
            assert (reply.status, reply.json["code"]) == (401, "unauthorized"), target
            assert (await ask(server, target)).status == 401
        await nothing_is_left(server)


@pytest.mark.parametrize("where", ["query", "cookie", "header"])
async def test_where_a_token_may_be(access: AccessFile, where: str) -> None:
    """A browser cannot set header fields of a WebSocket, so it may be in the URL or in a cookie."""
    good = token("news")
    target = f"/ws?token={good}" if where == "query" else "/ws"
    headers = {"query": "", "cookie": f"Cookie: pushup_token={good}\r\n", "header": bearer(good)}[where]
    async with running(access=access.write()) as server, joined(server, target, headers) as peer:
        assert (await peer.subscribe("news"))["messages"] == []
        peer.send({"subscribe": ["secret"], "ref": 1})
        said = await peer.take()
        assert (said["error"]["code"], said["ref"]) == ("forbidden", 1)
        peer.send({"subscribe": ["news", "secret"]})
        assert (await peer.error())["code"] == "forbidden"
        await parked(server, 1)


async def test_a_key_is_not_shown_in_a_url(access: AccessFile) -> None:
    """URLs and cookies are in logs."""
    async with running(access=access.write()) as server:
        assert (await refused(server, f"/ws?token={ALL}")).status == 401
        async with joined(server, "/ws", bearer(ALL)) as peer:
            await peer.subscribe("anything")


@pytest.mark.parametrize("cookie", ["", "Cookie: pushup_token={}\r\n"])
async def test_pages_of_other_origins(access: AccessFile, cookie: str) -> None:
    """A browser lets any page open a WebSocket to anywhere, cookies and all; so the server has to look."""
    good = token("news")
    target = "/ws" if cookie else f"/ws?token={good}"
    headers = cookie.format(good)
    async with running(access=access.write(), cors_origins="https://page.example") as server:
        reply = await refused(server, target, f"{headers}Origin: https://evil.example\r\n")
        assert (reply.status, reply.json["code"]) == (403, "origin_not_allowed")
        assert (await refused(server, target, f"{headers}Origin: null\r\n")).status == 403
        for origin in ("https://page.example", "http://test"):
            async with joined(server, target, f"{headers}Origin: {origin}\r\n") as peer:
                await peer.subscribe("news")


async def test_publishing_needs_a_grant(access: AccessFile) -> None:
    """That of the credentials which opened the connection; a refusal has the ref, and the connection goes on."""
    good = token("news", publish=["chat"])
    async with running(access=access.write()) as server, joined(server, f"/ws?token={good}") as peer:
        peer.send({"publish": {"channels": ["chat"], "data": 1}, "ref": 1})
        assert (await peer.take())["published"]["id"]
        peer.send({"publish": {"channels": ["chat", "news"], "data": 1}, "ref": 2})
        said = await peer.take()
        assert (said["error"]["code"], said["ref"]) == ("forbidden", 2)
    async with running(access=access.write(tokens="")) as server, joined(server, f"/ws?token={good}") as peer:
        peer.send({"publish": {"channels": ["chat"], "data": 1}, "ref": 1})
        assert (await peer.error())["code"] == "forbidden"


async def test_nobody_publishes_where_only_reading_is_open(access: AccessFile) -> None:
    """Without credentials the connection is closed: nothing but others could help."""
    async with running(access=access.write(subscribe="open")) as server, joined(server) as peer:
        await peer.subscribe("news")
        peer.send({"publish": {"channels": ["news"], "data": 1}, "ref": 8})
        said = await peer.take()
        assert (said["error"]["code"], said["ref"]) == ("unauthorized", 8)
        assert await peer.closed() == 4401
        await nothing_is_left(server)


async def test_an_expired_token_ends_the_connection(access: AccessFile) -> None:
    """While a subscription waits; with the problem, and 4401."""
    async with running(access=access.write()) as server:
        async with joined(server, f"/ws?token={token('news', 'b', life=0.5)}") as peer:
            await peer.subscribe("news")
            await peer.subscribe("b")
            assert (await peer.error())["code"] == "token_expired"
            assert await peer.closed() == 4401
        await nothing_is_left(server)


async def test_an_expired_token_subscribes_and_publishes_nothing(access: AccessFile) -> None:
    """Also where nothing waited when it expired."""
    for frame in ({"subscribe": ["news"]}, {"publish": {"channels": ["news"], "data": 1}}):
        soon = token("news", publish=["news"], life=0.3)
        async with running(access=access.write()) as server, joined(server, f"/ws?token={soon}") as peer:
            await asyncio.sleep(0.4)
            peer.send({**frame, "ref": 3})
            said = await peer.take()
            assert (said["error"]["code"], said["ref"]) == ("token_expired", 3)
            assert await peer.closed() == 4401


async def test_a_key_that_is_taken_away_ends_the_connection(access: AccessFile) -> None:
    """With the next heartbeat."""
    async with running(access=access.write(), heartbeat=0.5) as server:
        async with joined(server, "/ws", bearer(READER)) as peer:
            await peer.subscribe("news")
            access.write(keys="")
            server.reload()
            assert await peer.closed() == 4401
        await nothing_is_left(server)


async def test_another_realm(tmp_path: Path) -> None:
    """The path names it; both say the same words and hear nothing of each other."""
    file = tmp_path / "access.toml"
    file.write_text(
        f'[realms.default]\nsubscribe = "open"\n[realms.shop]\nsubscribe = "open"\n'
        f'[[realms.shop.keys]]\nname = "shop"\nhash = "{hash_key(ALL)}"\nactions = ["publish"]\n'
        "[realms.shop.settings]\npoll_channels_max = 2\n"
    )
    async with (
        running(access=file) as server,
        joined(server, "/realms/shop/ws", bearer(ALL)) as shop,
        joined(server) as root,
    ):
        await root.subscribe("a")
        await shop.subscribe("a", "b")
        shop.send({"subscribe": ["c"]})
        assert (await shop.error())["code"] == "too_large"
        shop.send({"publish": {"channels": ["a"], "data": "sold"}})
        assert "published" in await shop.take()
        assert (await shop.take())["messages"][0]["data"] == "sold"
        root.send({"unsubscribe": ["a"]})
        assert await root.take() == {"unsubscribed": ["a"]}


# Limits


async def test_channels_of_one_connection() -> None:
    """All its subscriptions together have as many as a poll may; moving one is none more."""
    async with running(poll_channels_max=3) as server, joined(server) as peer:
        await peer.subscribe("a", "b")
        await peer.subscribe("c")
        peer.send({"subscribe": ["d"], "ref": 1})
        said = await peer.take()
        assert (said["error"]["code"], said["ref"]) == ("too_large", 1)
        await peer.subscribe("a", "c")
        peer.send({"unsubscribe": ["b"]})
        assert await peer.take() == {"unsubscribed": ["b"]}
        await peer.subscribe("d")
        await peer.bye()
        await nothing_is_left(server)


async def test_subscriptions_count_as_polls(access: AccessFile) -> None:
    """Each waits, so each is one of those that may wait with the token; on all connections together."""
    one = token("*", sub="one")
    async with running(access=access.write(), polls_per_token_max=3) as server:
        async with joined(server, f"/ws?token={one}") as peer, joined(server, f"/ws?token={one}") as other:
            await peer.subscribe("a")
            await peer.subscribe("b")
            await other.subscribe("a")
            other.send({"subscribe": ["c"], "ref": 1})
            said = await other.take()
            assert (said["error"]["code"], said["error"]["retry_after"], said["ref"]) == ("too_many_polls", 1, 1)
            assert (await ask(server, f"/poll?channel=a&token={one}")).status == 429
            peer.send({"unsubscribe": ["b"]})
            await peer.take()
            await other.subscribe("c")
            await peer.bye()
            await eventually(lambda: server.node.parked == 2, "one connection has gone")
            await other.subscribe("d")
            await other.bye()
        await nothing_is_left(server)


async def test_a_subscription_that_failed_is_not_counted(access: AccessFile) -> None:
    """Nothing waits, so nothing is held."""
    one = token("*", sub="one")
    async with running(access=access.write(), polls_per_token_max=1) as server:
        async with joined(server, f"/ws?token={one}") as peer:
            for _ in range(3):
                peer.send({"subscribe": [17]})
                assert (await peer.error())["code"] == "channel_not_found"
            await peer.subscribe("a")
            await peer.bye()
        await nothing_is_left(server)


async def test_publications_of_a_token_are_counted(access: AccessFile) -> None:
    """As many a second as over HTTP, and beyond it 429 with the ref; the refused are none of the stored."""
    good = token("news", publish=["news"], sub="one")
    async with (
        running(access=access.write(), token_publish_rate_max=5) as server,
        joined(server, f"/ws?token={good}") as peer,
    ):
        for n in range(20):
            peer.send({"publish": {"channels": ["news"], "data": n}, "ref": n})
        said = [await peer.take() for _ in range(20)]
        assert [answer["ref"] for answer in said] == list(range(20))
        stored = [answer for answer in said if "published" in answer]
        assert 5 <= len(stored) <= 8
        codes = {answer["error"]["code"] for answer in said if "error" in answer}
        assert codes == {"too_many_publications"}
        assert server.metrics.realm("default").publications == len(stored)


async def test_clients_of_a_proxy_are_counted() -> None:
    """For as long as the WebSocket is open."""
    of = "X-Forwarded-For: 203.0.113.5\r\n"
    async with running(connections_per_address_max=1) as server:
        async with joined(server, "/ws", of):
            reply = await refused(server, "/ws", of)
            assert (reply.status, reply.json["code"]) == (429, "too_many_connections")
            async with joined(server, "/ws", "X-Forwarded-For: 203.0.113.6\r\n"):
                pass
        await nothing_is_left(server)


# Pings


async def test_pings_keep_a_silent_connection(access: AccessFile) -> None:
    """One for each heartbeat; who answers stays, also without any subscription."""
    async with running(heartbeat=0.1) as server, joined(server) as peer:
        for _ in range(5):
            frame = await peer.frame()
            assert frame.opcode == PING
            peer.client.send(encode(PONG, frame.payload))
        await peer.subscribe("a")


async def test_a_dead_peer_is_closed_within_two_heartbeats() -> None:
    """No pong came; everything of it is freed."""
    loop = asyncio.get_running_loop()
    async with running(heartbeat=0.4) as server, joined(server) as peer:
        await peer.subscribe("a")
        began = loop.time()
        async with asyncio.timeout(PATIENCE_S):
            while await peer.client.reader.read(65536):
                pass
        assert loop.time() - began < 0.8
        await nothing_is_left(server)


async def test_a_dead_peer_with_unread_messages_is_closed_too(sockets: list[socket.socket]) -> None:
    """Its pings are behind what it does not read."""
    async with running(heartbeat=0.3, write_timeout=1) as server:
        sock = slow(server)
        sockets.append(sock)
        sock.send(handshake().encode() + encode(TEXT, b'{"subscribe":["a"]}'))
        await parked(server, 1)
        for _ in range(100):
            await publish(server, "a", data="x" * 60_000)
        await eventually(lambda: server.metrics.streams["websocket"] == 0, "it is closed")
        await nothing_is_left(server)


# The node goes away


async def test_a_draining_node_says_so_over_the_window() -> None:
    """1001 for each, spread; all had cursors, none is told an error."""
    async with running(heartbeat=NEVER_S) as server:
        loop = asyncio.get_running_loop()
        ended: list[float] = []

        async def follow() -> None:
            async with joined(server) as peer:
                await peer.subscribe("a")
                await peer.subscribe("b")
                assert await peer.closed() == 1001
                ended.append(loop.time())

        following = [asyncio.create_task(follow()) for _ in range(20)]
        await parked(server, 40)
        began = loop.time()
        await server.stop(1.0)
        await asyncio.gather(*following)
        took = sorted(end - began for end in ended)
        assert took[0] < 0.4
        assert took[-1] > 0.4
        assert len({round(moment, 1) for moment in took}) >= 4
        await nothing_is_left(server)
        await server.start()


async def test_a_connection_without_subscriptions_is_told_at_the_end() -> None:
    """It is closed with 1001 when the server stops."""
    async with running() as server, joined(server) as peer:
        stopping = asyncio.create_task(server.stop(0.2))
        assert await peer.closed() == 1001
        await stopping
        await server.start()


async def test_nothing_is_lost_when_a_node_drains_while_messages_come() -> None:
    """Whatever came before the close is whole, and its cursors go on from there."""
    async with running() as server:
        ids: list[int] = []
        busy = True

        async def produce() -> None:
            while busy:
                ids.append(await publish(server, "a", data=1))

        producing = asyncio.create_task(produce())
        async with joined(server) as peer:
            cursor = 0
            seen: list[int] = []
            peer.send({"subscribe": ["a"]})
            draining = asyncio.create_task(later_drain(server))
            while (frame := await peer.frame()).opcode != CLOSE:
                said = json.loads(frame.payload)
                if "messages" in said:
                    seen += [message["id"] for message in said["messages"]]
                    cursor = said["next"]
            assert frame.code == 1001
        await draining
        busy = False
        await producing
        async with connected(server) as client:
            rest = (await client.get(f"/poll?channel=a&start={cursor}&timeout=0")).json
        assert not rest["gap"]
        assert seen + [message["id"] for message in rest["messages"]] == ids


async def later_drain(server: Server) -> None:
    await asyncio.sleep(0.1)
    await server.node.drain(0.3)


# Clients that do not read, and clients that vanish


@pytest.mark.parametrize("reset", [False, True])
async def test_a_client_that_vanishes_frees_everything_at_once(
    access: AccessFile, reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its subscriptions, their places among its token's polls, its address' connections; nothing is logged."""
    async with running(access=access.write(), heartbeat=NEVER_S) as server, connected(server) as client:
        headers = f"X-Forwarded-For: 203.0.113.5\r\n{bearer(token('*', sub='one'))}"
        peer = await join(client, "/ws", headers)
        for name in "abc":
            await peer.subscribe(name)
        await parked(server, 3)
        shut(client, reset=reset)
        await nothing_is_left(server)
    assert not caplog.records


async def test_a_client_that_vanishes_in_the_middle_of_its_frames(
    access: AccessFile, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the node was doing for it."""
    rng = random.Random(1)
    async with running(access=access.write(), heartbeat=NEVER_S) as server:
        for _ in range(60):
            async with connected(server) as client:
                peer = await join(client, "/ws", bearer(ALL))
                for _ in range(rng.randint(1, 6)):
                    names = rng.sample("abcde", 2)
                    peer.send(rng.choice([{"subscribe": names}, {"unsubscribe": names}]))
                    peer.send({"publish": {"channels": names, "data": 1}})
                for _ in range(rng.randint(0, 12)):
                    await asyncio.sleep(0)
                shut(client, reset=rng.random() < 0.5)
        await nothing_is_left(server)
    assert not caplog.records


async def test_a_client_that_does_not_read_is_bounded_and_cut(sockets: list[socket.socket]) -> None:
    """However many subscriptions it has: one answer beyond its write buffer, which is counted. Others get all."""
    async with running(
        write_timeout=2, answer_bytes_max=100_000, heartbeat=NEVER_S, write_buffer_bytes_max=16_384
    ) as server:
        sockets += [slow(server) for _ in range(3)]
        for sock in sockets:
            sock.send(handshake().encode())
        await eventually(lambda: server.metrics.streams["websocket"] == 3, "they are open")
        for sock in sockets:
            sock.send(b"".join(encode(TEXT, b'{"subscribe":["c%d"]}' % n) for n in range(50)))
        await parked(server, 150)
        async with joined(server) as peer:
            await peer.subscribe(*(f"c{n}" for n in range(50)))
            for _ in range(2):
                for n in range(50):
                    id = await publish(server, f"c{n}", data="x" * 50_000)
                    assert (await peer.take())["messages"][0]["id"] == id
            lanes = server._lanes
            held = [web.transport.get_write_buffer_size() for web in lanes.handed_over.values()]  # type: ignore[attr-defined]
            assert 0 < sum(held) <= lanes._unread_bytes <= 3 * (16_384 + 110_000)
            await eventually(lambda: server.metrics.connections_cut["unread"] == 3, "those who do not read are cut")
            await eventually(lambda: server.metrics.streams["websocket"] == 1, "one is left, who reads")
            await peer.bye()
        await nothing_is_left(server)


async def test_an_answer_that_waits_for_a_slow_client_is_not_lost() -> None:
    """Its subscription is changed while the answer could not be written yet: so its cursor had not moved."""
    async with running(heartbeat=NEVER_S, write_buffer_bytes_max=4096) as server, joined(server) as peer:
        await peer.subscribe("a", "b", start="latest")
        await peer.subscribe("c", start="latest")
        ids: list[int] = []
        while not server._lanes._unread_bytes:
            ids.append(await publish(server, "c", data="x" * 60_000))
            await asyncio.sleep(0)
        held = await publish(server, "a", "b", data=1)
        await parked(server, 0)
        peer.send({"unsubscribe": ["a"]})
        await asyncio.sleep(0.1)
        frames: list[Any] = []
        while not frames or frames[-1].get("for") != ["b"]:
            frames.append(await peer.take())
        assert {"unsubscribed": ["a"]} in frames
        seen = [(frame["for"], message["id"]) for frame in frames for message in frame.get("messages", ())]
        assert seen == [*((["c"], id) for id in ids), (["b"], held)]


async def test_answers_that_nobody_reads_hold_the_asker_up(sockets: list[socket.socket]) -> None:
    """A client that publishes and does not read what becomes of it is not read either, beyond a bound."""
    async with running(heartbeat=NEVER_S, write_timeout=NEVER_S) as server:
        sock = slow(server)
        sockets.append(sock)
        sock.send(handshake().encode())
        await eventually(lambda: server.metrics.streams["websocket"] == 1, "it is open")
        frame = encode(TEXT, b'{"publish":{"channels":["a"],"data":1},"ref":"%b"}' % (b"x" * 2000))
        sent = await flood(sock, frame)
        (web,) = server._lanes.handed_over.values()
        assert web.transport.get_write_buffer_size() < 200_000  # type: ignore[attr-defined]
        assert web.transport.is_reading() is False  # type: ignore[attr-defined]
        assert server.metrics.realm("default").publications < sent
        sock.close()
        await nothing_is_left(server)


@pytest.mark.parametrize("payload", [b"", b"x" * 100, b"x" * 60_000], ids=["empty", "small", "large"])
async def test_what_a_client_sends_ahead_is_bounded(
    sockets: list[socket.socket], monkeypatch: pytest.MonkeyPatch, payload: bytes
) -> None:
    """While the broker takes its time for a frame, only so much more is read, and the kernel keeps the rest."""
    never = asyncio.Event()

    async def wait(*_: Any) -> Any:
        await never.wait()

    async with running(heartbeat=NEVER_S, broker_timeout=NEVER_S) as server:
        monkeypatch.setattr(server.node.broker, "publish", wait)
        sock = slow(server)
        sockets.append(sock)
        sock.send(handshake().encode())
        await eventually(lambda: server.metrics.streams["websocket"] == 1, "it is open")
        sock.send(encode(TEXT, b'{"publish":{"channels":["a"],"data":1}}'))
        await flood(sock, encode(TEXT, payload))
        (web,) = server._lanes.handed_over.values()
        assert not web.transport.is_reading()  # type: ignore[attr-defined]
        sock.close()
        never.set()
        await nothing_is_left(server)


async def flood(sock: socket.socket, frame: bytes) -> int:
    """Send as many of these frames as the server takes; their number."""
    data = memoryview(frame * 2000)
    sent = 0
    idle = 0
    while idle < 20 and sent < 20_000_000:
        try:
            sent += sock.send(data[sent % len(frame) :])
            idle = 0
        except BlockingIOError:
            idle += 1
            await asyncio.sleep(0.01)
    assert sent < 20_000_000, "the server reads without bound"
    return sent // len(frame)


async def test_a_slow_client_catches_up() -> None:
    """It held up nobody but itself, and everything is there when it reads again."""
    async with running(heartbeat=NEVER_S, answer_bytes_max=20_000) as server, joined(server) as peer:
        peer.send({"subscribe": ["a"]})
        ids = [await publish(server, "a", data="x" * 10_000) for _ in range(500)]
        seen: list[int] = []
        while len(seen) < len(ids):
            seen += [message["id"] for message in (await peer.take()).get("messages", ())]
        assert seen == ids


async def test_odd_data_comes_as_it_was() -> None:
    """What is published over one WebSocket comes over another byte for byte."""
    texts = ['"\u2028\u0085\ufeff"', r'"\u0000\ud83d\ude00"', '{ "a" : [1.0, -0, 1e5] }', '"' + "é" * 30_000 + '"']
    async with running() as server, joined(server) as one, joined(server) as other:
        await other.subscribe("a")
        for text in texts:
            one.send_text(f'{{"publish":{{"channels":["a"],"data":{text}}}}}')
            assert "published" in await one.take()
            assert f'"data":{text}}}'.encode() in await other.text()
        one.send_text('{"publish":{"channels":["a"],"data":[1,\n2\r]}}')
        assert b'"data":[1, 2 ]}' in await other.text()


async def test_a_goodbye_that_is_not_answered() -> None:
    """A client that is closed has a moment to agree, and is gone after it."""
    async with running() as server, joined(server) as peer:
        peer.send_text("nonsense")
        assert (await peer.error())["code"] == "invalid_request"
        assert (await peer.frame()).code == 4400
        began = asyncio.get_running_loop().time()
        assert await peer.client.rest() == b""
        assert asyncio.get_running_loop().time() - began < GOODBYE_S + 1
        await nothing_is_left(server)


async def test_masks(access: AccessFile) -> None:
    """Frames are unmasked with whatever mask the client chose."""
    async with running() as server, joined(server) as peer:
        payload, mask = b'{"subscribe":["a"]}', os.urandom(4)
        masked = bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))
        peer.client.send(struct.pack("!BB", FIN | TEXT, 0x80 | len(payload)) + mask + masked)
        assert await peer.take() == {"subscribed": ["a"]}
