"""The least a Python process on uvloop can do: a protocol that parks everything, keeps everything, looks at nothing.

Not a server: `GET /parked` says how many wait, `POST` answers all of them, every other `GET` waits. Of a request only
the body of a publication is decoded. What PushUp costs above this is PushUp's; this is what the kernel, the event loop
and the JSON cost. Over Redis publications are relayed by `PUBLISH`, kept nowhere, and answer those who wait for their
channel.

    python -m loadtest.floor PORT [REDIS_PORT]
"""

import asyncio
import sys
import time
from collections import defaultdict, deque
from functools import partial
from typing import ClassVar, cast

import hiredis
import msgspec
import uvloop

ACCEPT_BACKLOG = 4096
KEPT = 100


class Publication(msgspec.Struct, gc=False):
    """As it came."""

    channels: tuple[str, ...]
    data: msgspec.Raw


_one = msgspec.json.Decoder(Publication)
_many = msgspec.json.Decoder(list[Publication])


class Floor(asyncio.Protocol):
    """One connection."""

    # Of the whole process, on purpose.
    waiting: ClassVar[list["Floor"]] = []
    kept: ClassVar[defaultdict[str, deque[tuple[int, bytes]]]] = defaultdict(partial(deque, maxlen=KEPT))
    latest: ClassVar[int] = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.part = b""

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET /poll"):
            Floor.waiting.append(self)
        elif data.startswith(b"GET"):
            self.transport.write(response(b"%d" % len(Floor.waiting)))
        else:
            data = self.part + data
            head, _, body = data.partition(b"\r\n\r\n")
            if len(body) < int(head[head.index(b"Content-Length: ") + 16 :].partition(b"\r\n")[0]):
                self.part = data
                return
            self.part = b""
            if body.startswith(b"["):
                ids = [self.take(publication) for publication in _many.decode(body)]
                self.transport.write(response(msgspec.json.encode([{"id": id} for id in ids])))
            else:
                self.transport.write(response(b'{"id":%d}' % self.take(_one.decode(body)), b"201 Created"))

    def take(self, publication: Publication) -> int:
        """Keep it, and answer all who wait, whatever for."""
        id = Floor.latest = max(Floor.latest + 1, time.time_ns() // 1000)
        data = bytes(publication.data)
        for channel in publication.channels:
            Floor.kept[channel].append((id, data))
        if Floor.waiting:
            message = {"id": id, "channels": publication.channels, "data": publication.data}
            answer = response(msgspec.json.encode({"messages": [message], "next": id + 1, "gap": False}))
            waiting, Floor.waiting = Floor.waiting, []
            for connection in waiting:
                connection.transport.write(answer)
        return id


class Relay(asyncio.Protocol):
    """One connection to a node over Redis."""

    waiting: ClassVar[defaultdict[bytes, list[asyncio.Transport]]] = defaultdict(list)
    redis: ClassVar["Publisher"]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET /poll"):
            Relay.waiting[data[data.index(b"=") + 1 : data.index(b"&")]].append(self.transport)
        elif data.startswith(b"GET"):
            self.transport.write(response(b"%d" % sum(map(len, Relay.waiting.values()))))
        else:
            publication = _one.decode(data.partition(b"\r\n\r\n")[2])
            id = time.time_ns() // 1000
            message = {"id": id, "channels": publication.channels, "data": publication.data}
            answer = msgspec.json.encode({"messages": [message], "next": id + 1, "gap": False})
            Relay.redis.publish(publication.channels[0].encode() + b" " + answer, self.transport, id)


class Publisher(asyncio.Protocol):
    """The connection over which a node publishes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.reader = hiredis.Reader()
        self.told: deque[tuple[asyncio.Transport, int]] = deque()

    def publish(self, what: bytes, publisher: asyncio.Transport, id: int) -> None:
        """The publisher gets its receipt when Redis has said yes."""
        self.told.append((publisher, id))
        self.transport.write(hiredis.pack_command((b"PUBLISH", b"floor", what)))  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while self.reader.gets() is not False:
            publisher, id = self.told.popleft()
            publisher.write(response(b'{"id":%d}' % id, b"201 Created"))


class Subscriber(asyncio.Protocol):
    """The connection on which a node hears what all publish."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.reader = hiredis.Reader()
        cast(asyncio.Transport, transport).write(b"SUBSCRIBE floor\r\n")

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not False:
            kind, _, what = reply
            if kind == b"message":
                channel, _, answer = what.partition(b" ")
                written = response(answer)
                for transport in Relay.waiting.pop(channel, ()):
                    transport.write(written)


def response(body: bytes, status: bytes = b"200 OK") -> bytes:
    """The same headers as PushUp's."""
    return (
        b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nCache-Control: no-store\r\nContent-Length: %d\r\n"
        b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n%b"
    ) % (status, len(body), body)


async def main(port: int, redis_port: int | None) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    if redis_port is not None:
        _, Relay.redis = await loop.create_connection(Publisher, "127.0.0.1", redis_port)
        await loop.create_connection(Subscriber, "127.0.0.1", redis_port)
    protocol = Floor if redis_port is None else Relay
    server = await loop.create_server(protocol, "127.0.0.1", port, backlog=ACCEPT_BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
