"""A connection without sockets: what a server is sent arrives in exactly the segments a test chooses."""

import asyncio
import json
from typing import Any, NamedTuple

from pushup.lane import Lane
from pushup.server import Server

TURNS = 25
"""Turns of the event loop in which a server certainly gets on with what needs no further input and no time."""


class Response(NamedTuple):
    """One HTTP response. Header names are in lower case."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def status(self) -> int:
        return int(self.line.split(" ")[1])

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def parse(sent: bytes) -> list[Response]:
    """The responses in what a server sent, interim ones included. Every body is JSON, so that HEAD needs no telling."""
    responses = []
    while sent:
        lines, blank, sent = sent.partition(b"\r\n\r\n")
        assert blank, lines
        line, *fields = lines.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
        size = int(headers.get("content-length", 0)) if sent[:1] in (b"{", b"[") else 0
        body, sent = sent[:size], sent[size:]
        responses.append(Response(line, headers, body))
    return responses


class Pipe(asyncio.Transport):
    """The server's end, a transport in memory, and with it all that the client did and saw."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self._protocol = protocol
        self._coming: list[bytes] = []
        self._lost = False
        self.sent = b""
        """What the client was sent."""
        self.limits: tuple[int | None, int | None] | None = None
        """The write buffer's, high and low."""
        self.waiting = 0
        """Bytes in the write buffer."""
        self.stalled = False
        """Whether what the server wrote never gets out, so that it cannot close in peace."""
        self.reading = True
        self.closing = False
        self.aborted = False
        protocol.connection_made(self)

    # What a client does and sees

    async def receive(self, *segments: bytes) -> list[Response]:
        """Let the server have the segments, and all the turns it needs for each; what it answered meanwhile."""
        start = len(self.sent)
        for segment in segments:
            self.push(segment)
            await self.settle()
        return parse(self.sent[start:])

    def push(self, segment: bytes) -> None:
        """Let the server have a segment, as soon as it reads."""
        self._coming.append(segment)
        self._deliver()

    async def settle(self) -> None:
        """Return once the server has nothing left to do."""
        before = -1
        while len(self.sent) != before:
            before = len(self.sent)
            for _ in range(TURNS):
                await asyncio.sleep(0)

    def hang_up(self) -> None:
        """The client is gone."""
        self.closing = True
        self._lose()

    @property
    def responses(self) -> list[Response]:
        return parse(self.sent)

    @property
    def unread(self) -> int:
        """Bytes that the server has not read yet."""
        return sum(map(len, self._coming))

    @property
    def protocol(self) -> asyncio.Protocol:
        assert isinstance(self._protocol, asyncio.Protocol)
        return self._protocol

    @property
    def lane(self) -> Lane:
        assert isinstance(self._protocol, Lane)
        return self._protocol

    def _deliver(self) -> None:
        while self.reading and self._coming and not self.closing:
            self.protocol.data_received(self._coming.pop(0))

    def _lose(self) -> None:
        if not self._lost:
            self._lost = True
            self._protocol.connection_lost(None)

    # What a protocol does

    def write(self, data: Any) -> None:
        if not self.closing:
            self.sent += bytes(data)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        if not self.reading:
            self.reading = True
            asyncio.get_running_loop().call_soon(self._deliver)

    def is_reading(self) -> bool:
        return self.reading

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            if not self.stalled:
                asyncio.get_running_loop().call_soon(self._lose)

    def abort(self) -> None:
        self.closing = True
        self.aborted = True
        asyncio.get_running_loop().call_soon(self._lose)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.limits = high, low

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol


def lane(server: Server) -> Pipe:
    """A new connection, as the listener would make it."""
    return Pipe(server._lanes())


def aiohttp(server: Server) -> Pipe:
    """A new connection that has no lane: aiohttp's parser sees all of it."""
    protocol = server._borrow(server._lanes(), True)
    protocol._owned = None  # It was nobody's before, and may have any number of requests.
    assert isinstance(protocol, asyncio.Protocol)
    return Pipe(protocol)
