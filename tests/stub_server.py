"""What tests of clients share: a server that answers what a test says, and both clients behind one interface."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from pushup import AsyncHttpPublisher, Client, HttpPublisher, SyncClient
from tests.support import PATIENCE_S


class Answer(NamedTuple):
    """Bytes of a response; `cut`: the connection ends behind them."""

    data: bytes
    cut: bool = False


def answer(value: Any, status: str = "200 OK", kind: str = "application/json", headers: str = "") -> Answer:
    """A response with a JSON body."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return Answer(head.encode() + body, cut="connection: close" in headers.lower())


def poll_answer(*ids: int, next: int, gap: bool = False, **more: Any) -> Answer:
    """A poll's answer: messages whose data is their id."""
    messages = [{"id": id, "channels": ["a"], "data": id} for id in ids]
    return answer({"messages": messages, "next": next, "gap": gap, **more})


def problem(status: int, code: str, headers: str = "", **members: Any) -> Answer:
    """A problem document."""
    document = {"type": "about:blank", "title": "T", "status": status, "code": code, "detail": f"it is {code}"}
    return answer({**document, **members}, f"{status} T", "application/problem+json", headers)


class Asked(NamedTuple):
    """A request. Header names are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def start(self) -> str:
        """The cursor of a poll."""
        return parse_qs(urlsplit(self.target).query)["start"][0]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Stub:
    """Answers requests in turn. When it has no answers left, it says nothing, until the test ends."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0

    @property
    def starts(self) -> list[str]:
        """The cursors of the polls."""
        return [asked.start for asked in self.asked]


@asynccontextmanager
async def stub(*answers: Answer) -> AsyncIterator[Stub]:
    """A stub server on a free port."""
    it = Stub(answers=list(answers))
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        it.connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                pairs = (line.partition(": ") for line in lines if line)
                headers = {name.lower(): value for name, _, value in pairs}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, target, _ = head.split(" ")
                it.asked.append(Asked(method, target, headers, body))
                if not it.answers:
                    await reader.read()
                    break
                data, cut = it.answers.pop(0)
                writer.write(data)
                if cut:
                    break
        writer.close()
        with suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    it.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield it
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await server.wait_closed()


END = "the end"
"""In place of a message: the iteration has ended."""


class Follower:
    """A subscription of either client, for tests that await."""

    def __init__(self, subscription: Any) -> None:
        self.it = subscription

    async def next(self) -> Any:
        """The next message, or END."""
        async with asyncio.timeout(PATIENCE_S):
            if hasattr(self.it, "__anext__"):
                return await anext(self.it, END)
            return await asyncio.to_thread(next, self.it, END)

    async def data(self, count: int) -> list[Any]:
        """The data of the next messages."""
        return [(await self.next()).data for _ in range(count)]

    async def close(self) -> None:
        """End the iteration."""
        if hasattr(self.it, "aclose"):
            await self.it.aclose()
        else:
            self.it.close()


class Either:
    """A client or publisher of either kind, for tests that await. `slept` is how long it would have paused."""

    def __init__(self, make: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self.slept: list[float] = []
        self.asynchronous = make in (Client, AsyncHttpPublisher)
        given = {"sleep": self._sleep if self.asynchronous else self.slept.append, "random": lambda: 0.5}
        self.it = make(*arguments, **{**given, **options})

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def subscribe(self, *channels: Any, **options: Any) -> Follower:
        return Follower(self.it.subscribe(*channels, **options))

    async def do(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The result of a method."""
        method = getattr(self.it, name)
        async with asyncio.timeout(PATIENCE_S):
            if self.asynchronous:
                return await method(*arguments, **options)
            return await asyncio.to_thread(method, *arguments, **options)

    async def channels(self) -> list[Any]:
        """All channels."""
        if self.asynchronous:
            return [channel async for channel in self.it.channels()]
        return await asyncio.to_thread(lambda: list(self.it.channels()))


@asynccontextmanager
async def either(make: Callable[..., Any], *arguments: Any, **options: Any) -> AsyncIterator[Either]:
    """One of Client, SyncClient, AsyncHttpPublisher and HttpPublisher, closed at the end."""
    it = Either(make, *arguments, **options)
    try:
        yield it
    finally:
        result: Awaitable[None] | None = it.it.close()
        if result is not None:
            await result


CLIENTS = [Client, SyncClient]
PUBLISHERS = [AsyncHttpPublisher, HttpPublisher]
