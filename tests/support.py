"""What tests share: a whole server in this process, and a client that shows every byte."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pushup.server import Server
from pushup.settings import load

PATIENCE_S = 10.0
"""How long a test waits for what should come at once, before it fails."""


@asynccontextmanager
async def running(**flags: Any) -> AsyncIterator[Server]:
    """A server on free ports of this machine; settings by name."""
    defaults = {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", "log_level": "error"}
    server = Server(load({name: str(value) for name, value in {**defaults, **flags}.items()}, {}).settings)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


@dataclass(frozen=True)
class Reply:
    """One HTTP response. Header names are in lower case."""

    version: str
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One raw connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes | str) -> None:
        self.writer.write(data.encode() if isinstance(data, str) else data)

    async def reply(self, *, head: bool = False) -> Reply:
        """The next response; `head`: it answers a HEAD request, so no body follows."""
        async with asyncio.timeout(PATIENCE_S):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            version, status, _ = lines[0].split(" ", 2)
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}
            length = 0 if head else int(headers.get("content-length", 0))
            return Reply(version, int(status), headers, await self.reader.readexactly(length))

    async def rest(self) -> bytes:
        """Everything until the server closes the connection."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()

    async def request(self, method: str, target: str, body: Any = None, headers: str = "") -> Reply:
        """One request with a JSON body, and its response."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        length = f"Content-Length: {len(data)}\r\n" if body is not None else ""
        self.send(f"{method} {target} HTTP/1.1\r\nHost: test\r\n{length}{headers}\r\n".encode() + data)
        return await self.reply(head=method == "HEAD")

    async def get(self, target: str) -> Reply:
        return await self.request("GET", target)

    async def publish(self, *channels: str | int, data: Any = None, key: str | None = None) -> int:
        """Publish and return the id."""
        reply = await self.request(
            "POST", "/publish", {"channels": channels, "data": data, **({"key": key} if key else {})}
        )
        assert reply.status == 201, reply
        id = reply.json["id"]
        assert isinstance(id, int)
        return id

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


@asynccontextmanager
async def connected(server: Server, *, admin: bool = False) -> AsyncIterator[Client]:
    """A connection to the server's public or admin listener."""
    host, _, port = (server.admin_address if admin else server.address).rpartition(":")
    client = Client(*await asyncio.open_connection(host, int(port)))
    try:
        yield client
    finally:
        await client.close()


async def eventually(condition: Callable[[], bool], hope: str) -> None:
    """Return once the condition holds."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"hoped that {hope}") from None


async def parked(server: Server, count: int) -> None:
    """Return once `count` polls are parked on the server."""
    async with asyncio.timeout(PATIENCE_S):
        while server.node.parked != count:
            await asyncio.sleep(0.001)
