"""Servers that speak Redis' protocol by a script, and one that cuts connections to a real Redis at a chosen moment."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from enum import Enum, auto
from typing import Any

from pushup.address import Address
from tests.redis_server import RedisServer


class Deed(Enum):
    """What a scripted server does instead of answering."""

    SILENCE = auto()
    """Goes on without a reply."""
    CUT = auto()
    """Closes the connection."""
    STUPOR = auto()
    """Neither reads nor writes any more."""


Script = Callable[..., object]
"""Takes a command's words; gives a deed or the reply: an int, text, None, a list of these, an exception with Redis'
words, or bytes in Redis' protocol."""


def ok(*words: str) -> object:
    """A script that has nothing against anything."""
    return "OK"


class ScriptedServer:
    """What clients said to a server, and how many there were. What every connection says first is not counted."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.commands: list[tuple[str, ...]] = []
        self.connections = 0
        self.address: Address
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = asyncio.Event()

    @property
    def url(self) -> str:
        return f"redis://{self.address}"

    def cut(self) -> None:
        """Close every connection."""
        for writer in self._writers:
            writer.transport.abort()

    def say(self, reply: object) -> None:
        """Send something on every connection that nobody asked for."""
        for writer in self._writers:
            writer.write(encode(reply))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._converse(reader, writer)
        self._writers.discard(writer)
        writer.transport.abort()

    async def end(self) -> None:
        self._ending.set()
        self.cut()
        await asyncio.gather(*self._tasks)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            words = await _read_command(reader)
            if words[0] == "CLIENT":
                writer.write(b"+OK\r\n")
                continue
            self.commands.append(words)
            reply = self.script(*words)
            if reply is Deed.CUT:
                return
            if reply is Deed.STUPOR:
                await self._ending.wait()
                return
            if reply is not Deed.SILENCE:
                writer.write(encode(reply))


async def _read_command(reader: asyncio.StreamReader) -> tuple[str, ...]:
    words = []
    for _ in range(int((await reader.readuntil(b"\r\n"))[1:])):
        size = int((await reader.readuntil(b"\r\n"))[1:])
        words.append((await reader.readexactly(size + 2))[:-2].decode(errors="surrogateescape"))
    return tuple(words)


def encode(reply: Any) -> bytes:
    """A reply in Redis' protocol."""
    match reply:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % reply
        case str():
            text = reply.encode(errors="surrogateescape")
            return b"$%d\r\n%b\r\n" % (len(text), text)
        case bytes():
            return reply
        case list():
            return b"*%d\r\n%b" % (len(reply), b"".join(map(encode, reply)))
    return f"-{reply}\r\n".encode()


def encode_again(reply: Any) -> bytes:
    """The same, of a reply as a client has it: strings are bytes."""
    match reply:
        case bytes():
            return encode(reply.decode(errors="surrogateescape"))
        case list():
            return encode(list(map(encode_again, reply)))
    return encode(reply)


@asynccontextmanager
async def scripted(script: Script = ok) -> AsyncIterator[ScriptedServer]:
    """A scripted server on a free port."""
    server = ScriptedServer(script)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.address = Address(*listener.sockets[0].getsockname()[:2])
    try:
        yield server
    finally:
        listener.close()
        await server.end()
        await listener.wait_closed()


class Proxy:
    """Stands before a real Redis, and can lose a reply together with the connection it was to come on."""

    def __init__(self, redis: RedisServer) -> None:
        self._port = redis.port
        self.address: Address
        self.connections = 0
        self.lost = 0
        """How many replies were lost."""
        self._fatal: bytes | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://{self.address}"

    def lose_reply_to(self, part: bytes) -> None:
        """Once: what contains this is executed, and its reply is lost."""
        self._fatal = part

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        from_redis, to_redis = await asyncio.open_connection("127.0.0.1", self._port)
        ends = {writer, to_redis}
        self._writers |= ends
        fatal = False

        async def forth() -> None:
            nonlocal fatal
            while data := await reader.read(65536):
                if self._fatal is not None and self._fatal in data:
                    self._fatal, fatal = None, True
                to_redis.write(data)

        async def back() -> None:
            while data := await from_redis.read(65536):
                if fatal:
                    self.lost += 1
                    return
                writer.write(data)

        async def pipe(direction: Coroutine[None, None, None]) -> None:
            with suppress(ConnectionError):
                await direction
            for end in ends:
                end.transport.abort()

        await asyncio.gather(pipe(forth()), pipe(back()))
        self._writers -= ends

    async def end(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks)


@asynccontextmanager
async def proxied(redis: RedisServer) -> AsyncIterator[Proxy]:
    """A proxy on a free port."""
    proxy = Proxy(redis)
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.address = Address(*listener.sockets[0].getsockname()[:2])
    try:
        yield proxy
    finally:
        listener.close()
        await proxy.end()
        await listener.wait_closed()
