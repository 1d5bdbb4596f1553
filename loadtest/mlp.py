"""Multithreaded long polling: a small honest server with a thread for each connection, the paper's MLP.

    python -m loadtest.mlp PORT

It speaks as much of PushUp's API as the clients of load tests use: `GET /poll?channel=&start=&timeout=` of one channel
and `POST /publish` of one message; names are not percent-decoded. `GET /status` says how many polls wait. Messages are
kept, so a client loses nothing between two polls. Sockets block; a poll waits on its channel's condition variable.
Who cannot have a thread is told 503, with the reason, and hung up on.
"""

import json
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import formatdate
from functools import lru_cache
from threading import Condition, Lock, Thread, stack_size
from typing import Final, NamedTuple

HOST: Final = "127.0.0.1"
ACCEPT_BACKLOG: Final = 4096
KEPT_MESSAGES: Final = 100
"""Messages kept per channel, as on the other servers under test."""
STACK_BYTES: Final = 256 * 1024
"""Address space of a thread's stack; what it does not touch takes no memory."""
READ_BYTES: Final = 16 * 1024
REQUEST_BYTES_MAX: Final = 1024 * 1024
PAUSE_S: Final = 0.1
"""Before another connection is accepted, where there were no descriptors for the last one."""


class Refused(Exception):
    """The request cannot be served. The text says why."""


class Message(NamedTuple):
    """A publication. `encoded`: as it stands in answers."""

    id: int
    encoded: bytes


class Channel:
    """A channel's latest messages, and the threads that wait for the next."""

    def __init__(self, name: str) -> None:
        self.waiting = 0
        self._name = name
        self._changed = Condition()
        self._messages: deque[Message] = deque(maxlen=KEPT_MESSAGES)
        self._tail = -1
        self._floor = 0

    def publish(self, data: object) -> int:
        """Keep the message and wake all who wait; its id."""
        with self._changed:
            self._tail = id = max(time.time_ns() // 1000, self._tail + 1)
            if len(self._messages) == KEPT_MESSAGES:
                self._floor = self._messages[0].id + 1
            text = json.dumps({"id": id, "channels": [self._name], "data": data}, separators=(",", ":"))
            self._messages.append(Message(id, text.encode()))
            self._changed.notify_all()
        return id

    def poll(self, start: int, timeout_s: float) -> bytes:
        """The answer to a poll from that id on: as soon as there is a message, without one after `timeout_s`."""
        with self._changed:
            if self._tail < start and timeout_s > 0:
                self.waiting += 1
                self._changed.wait_for(lambda: self._tail >= start, timeout_s)
                self.waiting -= 1
            found = [message.encoded for message in self._messages if message.id >= start]
            after, gap = max(start, self._tail + 1), b"true" if 0 < start < self._floor else b"false"
        return b'{"messages":[%b],"next":%d,"gap":%b}' % (b",".join(found), after, gap)


class Channels:
    """All channels, by name."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._channels: dict[str, Channel] = {}

    def get(self, name: str) -> Channel:
        """The channel; it comes into being when first used."""
        with self._lock:
            return self._channels.setdefault(name, Channel(name))

    def waiting(self) -> int:
        """How many polls wait."""
        with self._lock:
            return sum(channel.waiting for channel in self._channels.values())


class Request(NamedTuple):
    """One request; `query` by name."""

    method: str
    path: str
    query: Mapping[str, str]
    body: bytes


def serve(port: int) -> None:
    """Accept connections, each with a thread, until killed."""
    stack_size(STACK_BYTES)
    channels = Channels()
    with socket.create_server((HOST, port), backlog=ACCEPT_BACKLOG) as listener:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                print(f"cannot accept a connection: {error.strerror}", file=sys.stderr, flush=True)
                time.sleep(PAUSE_S)
                continue
            try:
                Thread(target=converse, args=(connection, channels), daemon=True).start()
            except (RuntimeError, MemoryError) as error:
                print(f"cannot start a thread: {error}", file=sys.stderr, flush=True)
                with connection, suppress(OSError):
                    connection.sendall(respond("503 Service Unavailable", _problem(f"no thread: {error}")))


def converse(connection: socket.socket, channels: Channels) -> None:
    """Serve the requests of one connection, one after the other, until the client goes."""
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for request in read_requests(connection):
                connection.sendall(answer(request, channels))
        except Refused as error:
            with suppress(OSError):
                connection.sendall(respond("400 Bad Request", _problem(str(error))))
        except OSError:
            return


def answer(request: Request, channels: Channels) -> bytes:
    """The response; of a poll that waits, when there is something to say. Raises Refused."""
    match request.method, request.path:
        case "GET", "/poll":
            try:
                channel = channels.get(request.query["channel"])
                start, timeout_s = int(request.query["start"]), float(request.query["timeout"])
            except (KeyError, ValueError):
                raise Refused("a poll needs channel, start and timeout") from None
            return respond("200 OK", channel.poll(start, timeout_s))
        case "POST", "/publish":
            try:
                publication = json.loads(request.body)
                [name], data = publication["channels"], publication["data"]
            except (KeyError, TypeError, ValueError):
                raise Refused("a publication needs one channel and data") from None
            return respond("201 Created", b'{"id":%d}' % channels.get(name).publish(data))
        case "GET", "/status":
            return respond("200 OK", b'{"waiting":%d}' % channels.waiting())
    raise Refused(f"nothing to {request.method} at {request.path}")


def read_requests(connection: socket.socket) -> Iterator[Request]:
    """The requests that come. Raises Refused if something else comes."""
    data = b""
    while True:
        while (end := data.find(b"\r\n\r\n")) < 0:
            if not (more := connection.recv(READ_BYTES)):
                return
            data += more
            if len(data) > REQUEST_BYTES_MAX:
                raise Refused("the request is too long")
        line, _, fields = data[:end].decode("latin-1").partition("\r\n")
        length, data = _content_length(fields), data[end + 4 :]
        while len(data) < length:
            if not (more := connection.recv(READ_BYTES)):
                return
            data += more
        try:
            method, target, _ = line.split(" ")
            path, _, query = target.partition("?")
            values = dict(part.split("=", 1) for part in query.split("&")) if query else {}
        except ValueError:
            raise Refused("that is not an HTTP request of this API") from None
        yield Request(method, path, values, data[:length])
        data = data[length:]


def respond(status: str, body: bytes) -> bytes:
    """A response with the header fields that PushUp sends."""
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
        f"Content-Length: {len(body)}\r\nDate: {_date(int(time.time()))}\r\n\r\n"
    ).encode() + body


def _content_length(fields: str) -> int:
    for field in fields.split("\r\n"):
        name, _, value = field.partition(":")
        if name.lower() == "content-length":
            if not value.strip().isdecimal() or int(value) > REQUEST_BYTES_MAX:
                raise Refused("the length of the body is no number, or too large")
            return int(value)
    return 0


def _problem(detail: str) -> bytes:
    return json.dumps({"detail": detail}).encode()


@lru_cache(1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
