"""A connection without sockets: what a server is sent arrives in exactly the segments a test chooses."""

import asyncio
from typing import Any

from pushup.server import Server

TURNS: int = 25
"""Turns of the event loop in which a server certainly finishes what needs no further input and no time."""


class Pipe(asyncio.Transport):
    """The server's end, a transport in memory, and with it all that the client did and saw."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self._protocol = protocol
        self._waiting: list[bytes] = []
        self._lost = False
        self.sent = b""
        """What the client has been sent."""
        self.reading = True
        self.closing = False
        self.aborted = False
        protocol.connection_made(self)

    # What a client does

    async def receive(self, *segments: bytes) -> bytes:
        """Let the server have the segments, and all the turns it needs for each; what it sent meanwhile."""
        start = len(self.sent)
        for segment in segments:
            self.push(segment)
            await self.settle()
        return self.sent[start:]

    async def settle(self) -> None:
        """Return once the server has nothing left to do."""
        before = -1
        while len(self.sent) != before:
            before = len(self.sent)
            await turns()

    def push(self, segment: bytes) -> None:
        """Let the server have a segment; while it does not read, it gets that later."""
        self._waiting.append(segment)
        self._deliver()

    def hang_up(self) -> None:
        """The client is gone."""
        self.closing = True
        self._lose()

    @property
    def waiting(self) -> int:
        """Bytes that the server has not read yet."""
        return sum(map(len, self._waiting))

    def _deliver(self) -> None:
        while self.reading and self._waiting and not self.closing:
            segment = self._waiting.pop(0)
            assert isinstance(self._protocol, asyncio.Protocol)
            self._protocol.data_received(segment)

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
            asyncio.get_running_loop().call_soon(self._lose)

    def abort(self) -> None:
        self.aborted = True
        self.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def _lose(self) -> None:
        if not self._lost:
            self._lost = True
            self._protocol.connection_lost(None)


async def turns(count: int = TURNS) -> None:
    """Let the event loop turn."""
    for _ in range(count):
        await asyncio.sleep(0)


def lane(server: Server) -> Pipe:
    """A new connection, as the listener would make it."""
    return Pipe(server._lanes())


def aiohttp(server: Server) -> Pipe:
    """A new connection that has no lane: aiohttp's parser sees all of it."""
    protocol = server._borrow(None)
    assert isinstance(protocol, asyncio.Protocol)
    return Pipe(protocol)
