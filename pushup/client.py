"""The asynchronous client: follows channels by long polls, publishes, and looks after channels, over HTTP.

    async with Client("http://localhost:8080") as client:
        async for message in client.subscribe("news"):
            print(message.id, message.data)

`SyncClient` is the same for blocking programs. What they do is decided in `dialogue`; here it is done.
"""

import asyncio
import inspect
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Generic, Self, TypeVar
from weakref import WeakSet

import aiohttp
from yarl import URL

import pushup.dialogue as dialogue
from pushup.dialogue import (
    BODY_BYTES_MAX,
    POLL_TIMEOUT_S,
    TIMEOUT_S,
    AskToken,
    Base,
    Callbacks,
    Channel,
    Dialogue,
    Failure,
    Hand,
    Message,
    Pause,
    Place,
    Reply,
    Send,
    Step,
    Surroundings,
    Tell,
    header_fields,
    parse_base,
    parse_channels,
    parse_start,
)
from pushup.errors import PushUpError
from pushup.messages import Receipt
from pushup.publications import Channels

log = logging.getLogger("pushup.client")

CONNECT_S: Final = 10.0
IDLE_S: Final = 15.0
"""A connection that has been idle for longer may be about to be closed by the server, so it is not used again."""

Token = str | Callable[[], str | None] | Callable[[], Awaitable[str | None]] | None

_T = TypeVar("_T")


class AsyncPerformer:
    """Performs the steps of dialogues with one server, any number of them at a time, on one event loop."""

    def __init__(
        self,
        base: Base,
        token: Token,
        ssl_context: ssl.SSLContext | None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._base = base
        self._token = token
        self._ssl = ssl_context
        self._sleep = sleep
        self._session: aiohttp.ClientSession | None = None
        self._lock = asyncio.Lock()
        self._known: str | None = None
        self._asked = False
        self.closed = False

    async def run(self, steps: Dialogue[_T]) -> _T:
        """A dialogue's result."""
        outcome = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                result: _T = end.value
                return result
            outcome = await self.perform(step)

    async def perform(self, step: Step) -> Any:
        """What came of one step. It may be cancelled, and the step done again."""
        match step:
            case Send():
                return await self._send(step)
            case AskToken(refused):
                return await self._ask_token(refused)
            case Pause(seconds, reason):
                log.info("%s: %s; trying again in %.1f s", self._base.url, reason, seconds)
                await self._sleep(seconds)
            case Tell(callback, argument):
                result = callback(argument)
                if inspect.isawaitable(result):
                    await result
            case Hand():
                raise AssertionError("a value is for the consumer")
        return None

    async def close(self) -> None:
        """Close the connections. Later steps fail."""
        self.closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _send(self, step: Send) -> Reply | Failure:
        if self.closed:
            raise PushUpError("the client is closed")
        if self._session is None:
            # A session's own limit of 100 connections would let other polls wait for a free one.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
            # It would repeat GET and DELETE once by itself, and at once: dialogues know better.
            self._session._retry_connection = False
        request = step.request
        if request.body is not None:
            # The loop may not have seen yet that an idle connection has ended, and this may have to be sent only once.
            for _ in range(3):
                await asyncio.sleep(0)
        timeout = aiohttp.ClientTimeout(connect=min(CONNECT_S, step.silence), sock_read=step.silence, total=None)
        try:
            # aiohttp does not bound how long a body is written to who does not read.
            async with asyncio.timeout(min(CONNECT_S, step.silence) + step.silence):
                answer = await self._session.request(
                    request.method,
                    URL(self._base.url + request.target, encoded=True),
                    data=request.body,
                    headers=header_fields(request, step.token),
                    allow_redirects=False,
                    timeout=timeout,
                    ssl=self._ssl if self._ssl is not None else True,
                )
            async with answer as response:
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > BODY_BYTES_MAX:
                        return Failure(f"the answer is longer than {BODY_BYTES_MAX} bytes", sent=True)
                headers = {name.lower(): value for name, value in response.headers.items()}
                return Reply(response.status, headers, bytes(body))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Failure(f"cannot reach {self._base.url}: {error}", sent=False)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Some have no text, and a time-out is an OSError.
            return Failure(f"{self._base.url} did not answer: {str(error) or type(error).__name__}", sent=True)

    async def _ask_token(self, refused: str | None) -> str | None:
        if not callable(self._token):
            return self._token
        async with self._lock:
            if not self._asked or (refused is not None and self._known == refused):
                token = self._token()
                self._known = await token if inspect.isawaitable(token) else token
                self._asked = True
            return self._known


class Stream(Generic[_T]):
    """An asynchronous iterator over what a dialogue hands over. It is at work only while the next one is waited for.

    Waiting may be cancelled, for example by a time-out, and the iteration goes on later: nothing is lost.
    """

    def __init__(self, performer: AsyncPerformer, steps: Dialogue[None]) -> None:
        self._performer = performer
        self._steps = steps
        self._step: Step | None = None
        self._outcome: Any = None
        self._waiting: asyncio.Timeout | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        if self._waiting is not None:
            raise RuntimeError("another task waits for the next one already")
        try:
            async with asyncio.timeout(None) as self._waiting:
                return await self._next()
        except TimeoutError:
            if not self._closed:
                raise
            raise StopAsyncIteration from None
        finally:
            self._waiting = None

    async def aclose(self) -> None:
        """End the iteration, also for a task that waits for the next one."""
        self._closed = True
        self._steps.close()
        self._step = None
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def _next(self) -> _T:
        while True:
            if self._step is None:
                try:
                    self._step = self._steps.send(self._outcome)
                except StopIteration:
                    raise StopAsyncIteration from None
                self._outcome = None
            if isinstance(self._step, Hand):
                value: _T = self._step.value
                self._step = None
                return value
            self._outcome = await self._performer.perform(self._step)
            self._step = None


class Subscription(Stream[Message]):
    """An asynchronous iterator over the messages of some channels; see `Client.subscribe`."""

    def __init__(self, performer: AsyncPerformer, steps: Dialogue[None], place: Place) -> None:
        super().__init__(performer, steps)
        self._place = place

    @property
    def cursor(self) -> int | None:
        """The `start` with which another subscription goes on behind the last message that this one handed over.

        None as long as one that began with the latest has not heard from the server.
        """
        return self._place.cursor


class Client:
    """Speaks with one realm of a service over HTTP. Use it from one event loop, from any number of its tasks.

    `url` is `http(s)://HOST[:PORT][/PREFIX]`. `token` is a token or a key, or a function, async or not, that gets one:
    it is called before the first request, and again when the server says that its token has expired. What it raises
    comes out where the client was used. `timeout` is the seconds that a call may take, tries included; `poll_timeout`
    those that the server is asked to hold a poll. `clock`, `random` and `sleep` are for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        realm: str | None = None,
        token: Token = None,
        timeout: float = TIMEOUT_S,
        poll_timeout: float = POLL_TIMEOUT_S,
        ssl_context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._performer = AsyncPerformer(parse_base(url, realm), token, ssl_context, sleep)
        self._around = Surroundings(clock, random, timeout, poll_timeout)
        self._streams: WeakSet[Stream[Any]] = WeakSet()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all subscriptions, and close the connections."""
        for stream in list(self._streams):
            await stream.aclose()
        await self._performer.close()

    def subscribe(
        self,
        *channels: str | int,
        start: int | str = "latest",
        on_gap: Callable[[int], object] | None = None,
        on_closed: Callable[[tuple[str | int, ...]], object] | None = None,
        on_cursor: Callable[[int], object] | None = None,
    ) -> Subscription:
        """Follow channels by long polls: an iterator over their messages, each once and in the order of their ids.

        `start` is a cursor (the first id wanted), 0 for all that is cached, or "latest" for messages from the
        moment of the first answer on. Connections that break and servers that cannot answer are tried again, with
        pauses; what is wrong with the request itself is raised, as Unauthorized, Forbidden, ChannelNotFound,
        InvalidParameter, TooLarge or another PushUpError.

        The callbacks may be async. `on_gap(next)` says that messages may be lost before `next`, and is called before
        the messages that follow: load afresh what you need. `on_closed(channels)` names channels that were closed. A
        named one stays subscribed, as it may come into being again; integer ones do not, and the iteration ends with
        the last. `on_cursor(cursor)` is for cursors that outlive the process: it is called when the loop has come
        back for more, so that after a crash the last message comes again and none is left out (at least once). A
        callback that raises is called again if the iteration goes on.
        """
        names = parse_channels(channels)
        place = Place(parse_start(start))
        steps = dialogue.subscribe(self._around, names, place, Callbacks(on_gap, on_closed, on_cursor))
        subscription = Subscription(self._performer, steps, place)
        self._streams.add(subscription)
        return subscription

    async def publish(self, channels: Channels, data: Any, *, key: str | None = None) -> int:
        """Publish one message to one or more channels; its id. See AsyncHttpPublisher.publish."""
        return await self._performer.run(dialogue.publish(self._around, channels, data, key, lambda: None))

    async def publish_many(self, items: Iterable[Mapping[str, Any]]) -> list[Receipt | PushUpError]:
        """Publish `{"channels": …, "data": …, "key": …}` in order; for each the receipt or the error."""
        return await self._performer.run(dialogue.publish_many(self._around, items, lambda: None))

    async def create(
        self,
        name: str | None = None,
        *,
        ttl: float | None = None,
        window: float | None = None,
        max_messages: int | None = None,
    ) -> Channel:
        """Create a channel, an integer one if it has no name. It is not tried again once the server may have it.

        `ttl` and `window` are seconds. Raises ChannelExists, InvalidParameter, Unavailable, …
        """
        options = {"ttl": ttl, "window": window, "max_messages": max_messages}
        return await self._performer.run(dialogue.create(self._around, name, options))

    async def renew(self, channel: str | int, *, ttl: float | None = None) -> Channel:
        """Put off a channel's expiry by its ttl in seconds, or give it another one. Raises ChannelNotFound, …"""
        return await self._performer.run(dialogue.renew(self._around, channel, ttl))

    async def close_channel(self, channel: str | int) -> None:
        """Close a channel. Raises ChannelNotFound, …"""
        await self._performer.run(dialogue.close_channel(self._around, channel))

    async def describe(self, channel: str | int) -> Channel:
        """A channel's facts. Raises ChannelNotFound, …"""
        return await self._performer.run(dialogue.describe(self._around, channel))

    def channels(self) -> AsyncIterator[Channel]:
        """The facts of all channels, sorted by name: an asynchronous iterator, which reads a page at a time."""
        stream: Stream[Channel] = Stream(self._performer, dialogue.list_channels(self._around))
        self._streams.add(stream)
        return stream
