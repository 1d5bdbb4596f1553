"""Answers that go on: Server-Sent Events, lines of JSON, and WebSocket.

A stream is a loop of polls on one connection. Hub, cursors, gaps, grants and limits are those of a poll; a client that
does not read holds its own loop up, and catches up from its cursor.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from time import time
from typing import Any, Final, Protocol

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from pushup.access import Grant
from pushup.errors import PushUpError, TokenExpired, TooLarge, Unauthorized
from pushup.messages import MAX_ID, Answer, Poll, is_integer, show_channel
from pushup.realm import Realm
from pushup.wire import Frame, parse_frame, show_receipt

RETRY_MS: Final = (1000, 3000)
"""Between these a browser waits before it comes back, at random, so that not all come at once."""

TOKEN_REFUSED: Final = 4401
MALFORMED: Final = 4400
"""Close codes of our own: those from 4000 on are an application's."""

HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Waiter:
    """A poll that a coroutine waits for."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def answer(self, answer: Answer) -> None:
        if not self.answered.done():
            self.answered.set_result(answer)

    def fail(self, error: PushUpError) -> None:
        if not self.answered.done():
            self.answered.set_exception(error)


async def ask(realm: Realm, grant: Grant | None, poll: Poll) -> Answer:
    """Wait for a poll's answer, but no longer than its grant is good. Raises TokenExpired, and what a poll raises."""
    most = float("inf") if grant is None else grant.expires - time()
    waiter = Waiter()
    answer = realm.node.poll(poll, waiter, most)
    if not isinstance(answer, Answer):
        subscription = answer
        try:
            answer = await waiter.answered
        except asyncio.CancelledError:
            realm.node.leave(subscription)
            raise
        if grant is not None and grant.expires <= time():
            raise TokenExpired("the token expired while the poll waited")
    return answer


class Follower:
    """One subscription of a stream, and its cursor."""

    def __init__(self, realm: Realm, grant: Grant | None, channels: Sequence[str], start: int) -> None:
        self._realm = realm
        self._grant = grant
        self._timeout = 0.0
        self.channels = tuple(channels)
        self.start = start
        """The cursor."""
        self.is_drained = False
        """Whether the node goes away, so that the client had better come back to another one."""

    async def next(self) -> Answer:
        """The next answer: the first at once, so that there is a cursor, then at least one for each heartbeat."""
        answer = await ask(self._realm, self._grant, Poll(self.channels, self.start, MAX_ID, self._timeout))
        self._timeout = self._realm.settings.heartbeat
        self.start = answer.next
        self.is_drained = answer.reason == "drain" or self._realm.node.draining
        if answer.closed is not None and is_integer(answer.closed):
            # It never comes back, and a poll that names it would be an error.
            self.channels = tuple(name for name in self.channels if name != answer.closed)
        return answer


class Form(Protocol):
    """How answers are written on a stream."""

    content_type: str

    def begin(self) -> bytes:
        """What comes before everything."""

    def show(self, answer: Answer) -> bytes:
        """An answer, which may be empty: then the connection is alive, and the cursor moves."""

    def fail(self, error: PushUpError) -> bytes:
        """The last word."""


class EventStream:
    """Server-Sent Events. https://html.spec.whatwg.org/multipage/server-sent-events.html"""

    content_type = "text/event-stream"

    def begin(self) -> bytes:
        return b"retry: %d\n\n" % random.randint(*RETRY_MS)

    def show(self, answer: Answer) -> bytes:
        # A block without data has the browser note the id and nothing else.
        blocks = []
        if answer.gap:
            blocks.append(b'event: gap\ndata: {"next":%d}\n\n' % answer.next)
        blocks += [b"id: %d\ndata: %b\n\n" % (message.id + 1, text) for message, text in answer.messages]
        if answer.closed is not None:
            closed = msgspec.json.encode([show_channel(answer.closed)])
            blocks.append(b'event: closed\ndata: {"closed":%b}\n\n' % closed)
        blocks.append(b": \nid: %d\n\n" % answer.next)
        return b"".join(blocks)

    def fail(self, error: PushUpError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error.body()


class JsonLines:
    """A JSON object a line: the answers of polls, one after the other."""

    content_type = "application/x-ndjson"

    def begin(self) -> bytes:
        return b""

    def show(self, answer: Answer) -> bytes:
        return answer.body + b"\n"

    def fail(self, error: PushUpError) -> bytes:
        return b'{"error":%b}\n' % error.body()


async def stream(request: web.Request, follower: Follower, form: Form) -> web.StreamResponse:
    """Write answers until the client goes, the node drains or something ends it."""
    answer = await follower.next()  # What is wrong so far is a status.
    response = web.StreamResponse(headers={**HEADERS, "Content-Type": form.content_type})
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    await response.write(form.begin() + form.show(answer))
    try:
        while follower.channels and not follower.is_drained:
            answer = await follower.next()
            await response.write(form.show(answer))
    except PushUpError as error:
        await response.write(form.fail(error))
    await response.write_eof()
    return response


class Socket:
    """One WebSocket: any number of subscriptions, each a task with a cursor of its own, and publications."""

    def __init__(
        self,
        realm: Realm,
        reader: Callable[[Sequence[str]], Awaitable[Grant | None]],
        writer: Callable[[], Awaitable[Grant]],
    ) -> None:
        """`reader` lets a subscription in, `writer` says what the sender may publish; both may object by raising."""
        self._realm = realm
        self._reader = reader
        self._writer = writer
        settings = realm.settings
        self._socket = web.WebSocketResponse(heartbeat=settings.heartbeat, max_msg_size=settings.body_bytes_max)
        self._tasks: dict[Follower, asyncio.Task[None]] = {}

    def can_serve(self, request: web.Request) -> bool:
        """Whether the request asks for a WebSocket."""
        return self._socket.can_prepare(request).ok

    async def run(self, request: web.Request) -> web.WebSocketResponse:
        """Serve the client until one side closes."""
        socket = self._socket
        await socket.prepare(request)
        try:
            async for message in socket:
                if message.type is not WSMsgType.TEXT:
                    await socket.close(code=MALFORMED, message=b"frames are text")
                    break
                await self._take(message.data)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        return socket

    async def close(self) -> None:
        """The node goes away."""
        await self._socket.close(code=WSCloseCode.GOING_AWAY)

    async def _take(self, text: str) -> None:
        ref: dict[str, Any] = {}
        try:
            frame = parse_frame(text.encode(errors="surrogatepass"), self._realm.settings)
            ref = frame.ref
            if frame.publication is not None:
                await self._publish(frame)
            elif frame.unsubscribe:
                await self._drop(frame.unsubscribe)
                await self._say({"unsubscribed": [show_channel(name) for name in frame.unsubscribe], **ref})
            else:
                await self._subscribe(frame)
        except Unauthorized as error:
            await self._refuse(error)
        except PushUpError as error:
            await self._say({"error": error.problem(), **ref})

    async def _publish(self, frame: Frame) -> None:
        assert frame.publication is not None
        grant = await self._writer()
        self._realm.charge(grant, 1)
        grant.check("publish", frame.publication.channels)
        receipt = await self._realm.node.publish(grant.mark(frame.publication))
        await self._say({"published": show_receipt(receipt), **frame.ref})

    async def _subscribe(self, frame: Frame) -> None:
        grant = await self._reader(frame.subscribe)
        watched = {name for follower in self._tasks for name in follower.channels}
        most = self._realm.settings.poll_channels_max
        if len(watched | set(frame.subscribe)) > most:
            raise TooLarge(f"a connection subscribes to at most {most} channels")
        follower = Follower(self._realm, grant, frame.subscribe, frame.start)
        answer = await follower.next()  # From here on there is a cursor, and "latest" is a moment.
        await self._drop(frame.subscribe)
        await self._say({"subscribed": [show_channel(name) for name in frame.subscribe], **frame.ref})
        await self._show(answer, frame.subscribe)
        self._start(follower)

    def _start(self, follower: Follower) -> None:
        self._tasks[follower] = asyncio.create_task(self._follow(follower))

    async def _drop(self, channels: Sequence[str]) -> None:
        """Take channels out of the subscriptions they are in; the rest of these goes on from its cursor."""
        for follower, task in list(self._tasks.items()):
            if set(follower.channels).isdisjoint(channels):
                continue
            del self._tasks[follower]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            follower.channels = tuple(name for name in follower.channels if name not in channels)
            if follower.channels:
                self._start(follower)

    async def _follow(self, follower: Follower) -> None:
        try:
            while follower.channels:
                channels = follower.channels
                answer = await follower.next()
                await self._show(answer, channels)
                if follower.is_drained:
                    await self.close()
                    return
        except Unauthorized as error:
            await self._refuse(error)
        except PushUpError as error:
            await self._say({"error": error.problem(), "for": [show_channel(name) for name in follower.channels]})
        except ConnectionError:
            pass  # The client is gone; the reader of its frames hears of it, too.
        finally:
            if self._tasks.get(follower) is asyncio.current_task():
                del self._tasks[follower]

    async def _show(self, answer: Answer, channels: Sequence[str]) -> None:
        names = msgspec.json.encode([show_channel(name) for name in channels])
        await self._socket.send_frame(answer.body[:-1] + b',"for":%b}' % names, WSMsgType.TEXT)

    async def _say(self, frame: dict[str, Any]) -> None:
        await self._socket.send_frame(msgspec.json.encode(frame), WSMsgType.TEXT)

    async def _refuse(self, error: Unauthorized) -> None:
        await self._say({"error": error.problem()})
        await self._socket.close(code=TOKEN_REFUSED, message=error.code.encode())
