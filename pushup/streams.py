"""Answers that go on: Server-Sent Events, lines of JSON, and WebSocket.

A stream is a loop of polls on one connection. Hub, cursors, gaps, grants and limits are those of a poll; a client that
does not read holds its own loop up, and catches up from its cursor.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from time import time
from typing import Any, Final, Protocol

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from pushup.access import Grant
from pushup.errors import ChannelNotFound, InvalidRequest, PushUpError, TokenExpired, TooLarge, Unauthorized
from pushup.messages import MAX_ID, Answer, Poll, is_integer, show_channel
from pushup.realm import Realm
from pushup.sender import Sender
from pushup.service import Seat, Service
from pushup.wire import Frame, parse_frame, show_receipt

RETRY_MS: Final = (1000, 3000)
"""Between these a browser waits before it comes back, at random, so that not all come at once."""

TOKEN_REFUSED: Final = 4401
MALFORMED: Final = 4400
"""Close codes of our own: those from 4000 on are an application's."""

HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

GOODBYE_S: Final = 2.0
"""How long a WebSocket client may take to agree that its connection is closed."""

Meet = Callable[[], Awaitable[Grant | None]]
"""Says what a client may do now; None where nobody has to be known. Raises Unauthorized, Unavailable."""


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
            realm.node.leave(subscription, waiter)
            raise
        if grant is not None and grant.expires <= time():
            raise TokenExpired("the token expired while the poll waited")
    return answer


class Guests:
    """Whoever is served for a while: counted while it lasts, and sent away when the server stops."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._serving: set[asyncio.Task[Any]] = set()
        self.sockets: set[Socket] = set()

    @contextmanager
    def seat(self, request: web.Request, sender: Sender, grant: Grant | None) -> Iterator[None]:
        """Count a poll or stream of its token, and of the client a proxy speaks for. Raises TooManyConnections."""
        peers = self._service.peers
        peer = self._forwarded(request, sender)
        if peer is not None:
            peers.count(peer)
        seat = Seat(peers, grant, peer)
        try:
            if peer is not None and peers.is_over(peer):
                raise peers.refusal(peer)
            yield
        finally:
            seat.leave()

    @contextmanager
    def stream(self, kind: str) -> Iterator[None]:
        """Count a stream, of one of the kinds in `Metrics.streams`."""
        streams = self._service.metrics.streams
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        streams[kind] += 1
        try:
            yield
        finally:
            streams[kind] -= 1
            self._serving.discard(task)

    async def end(self, app: web.Application) -> None:
        """The server stops: whoever reads is told so, nobody else is waited for."""
        await asyncio.gather(*(realm.node.drain(0) for realm in self._service.realms.values()))
        closing = [asyncio.create_task(socket.close()) for socket in self.sockets]
        serving = [*closing, *self._serving]
        if serving:
            _, late = await asyncio.wait(serving, timeout=GOODBYE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)

    def _forwarded(self, request: web.Request, sender: Sender) -> str | None:
        """The client that a trusted proxy speaks for, if the connection does not count as that client's already."""
        if sender.forwarded is None or self._service.settings.proxy_protocol:
            return None
        address = request.transport.get_extra_info("peername") if request.transport is not None else None
        return sender.forwarded if isinstance(address, tuple) and address[0] in self._service.proxies else None


GUESTS: Final = web.AppKey("guests", Guests)
SENDER: Final = web.RequestKey("sender", Sender)
"""Under this name a request has its Sender."""


def reader(realm: Realm, sender: Sender, token: str | None) -> Meet:
    """Who reads a stream, asked again whenever it goes on."""

    async def meet() -> Grant | None:
        return None if realm.open_to_read else await realm.meet(sender, token, time())

    return meet


class Follower:
    """One subscription of a stream, and its cursor.

    With `meet` its rights are looked at again with every poll, so that a key that is taken away ends it, and a token
    that expires while there is always something to read.
    """

    def __init__(
        self, realm: Realm, grant: Grant | None, channels: Sequence[str], start: int, meet: Meet | None = None
    ) -> None:
        self._realm = realm
        self._grant = grant
        self._meet = meet
        self._timeout = 0.0
        self.channels = tuple(channels)
        self.start = start
        """The cursor."""
        self.is_drained = False
        """Whether the node goes away, so that the client had better come back to another one."""

    async def next(self) -> Answer:
        """The next answer, handed over: `ask` and `take`."""
        answer = await self.ask()
        self.take(answer)
        return answer

    async def ask(self) -> Answer:
        """The next answer: the first at once, so that there is a cursor, then at least one for each heartbeat."""
        if self._timeout and self._meet is not None:
            self._grant = await self._meet()
            if self._grant is not None:
                self._grant.check("subscribe", self.channels)
        try:
            return await ask(self._realm, self._grant, Poll(self.channels, self.start, MAX_ID, self._timeout))
        except ChannelNotFound as error:
            name = str(error.members["channel"])
            if not self._timeout or name not in self.channels:
                raise
            # It was closed between two polls.
            return Answer((), self.start, "gone", closed=name)

    def take(self, answer: Answer) -> None:
        """The client was sent the answer: go on behind it."""
        self._timeout = self._realm.settings.heartbeat
        self.start = answer.next
        self.is_drained = answer.reason == "drain" or self._realm.node.draining
        if answer.closed is not None and (is_integer(answer.closed) or answer.reason == "gone"):
            # A poll that names it would be an error.
            self.channels = tuple(name for name in self.channels if name != answer.closed)


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
        # All who get the same answer share it.
        shown = answer.rendered.get(self.content_type)
        if shown is None:
            shown = answer.rendered[self.content_type] = self._render(answer)
        return shown

    def _render(self, answer: Answer) -> bytes:
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
    """Write answers until the client goes, the node drains or something ends it.

    A stream that begins on a node that drains already waits for its second answer, as a poll does.
    """
    answer = await follower.next()  # What is wrong so far is a status.
    response = web.StreamResponse(headers={**HEADERS, "Content-Type": form.content_type})
    writer = await response.prepare(request)
    assert writer is not None
    if request.method == "HEAD":
        return response
    try:
        await response.write(form.begin() + form.show(answer))
        try:
            while follower.channels:
                await writer.drain()  # `write` waits for a client that does not read only now and then.
                answer = await follower.next()
                await response.write(form.show(answer))
                if follower.is_drained:
                    break
        except PushUpError as error:
            await response.write(form.fail(error))
        await response.write_eof()
    except ConnectionError:
        pass  # The client is gone.
    return response


class Socket:
    """One WebSocket: any number of subscriptions, each a task with a cursor of its own, and publications."""

    def __init__(
        self,
        realm: Realm,
        reader: Meet,
        writer: Callable[[], Awaitable[Grant]],
        seat: Callable[[Grant | None], Seat],
    ) -> None:
        """`reader` and `writer` say who subscribes and who publishes; `seat` counts a subscription as a poll."""
        self._realm = realm
        self._reader = reader
        self._writer = writer
        self._seat = seat
        settings = realm.settings
        self._socket = web.WebSocketResponse(
            timeout=GOODBYE_S,
            heartbeat=settings.heartbeat,
            compress=False,  # Browsers offer it; a connection would take five times the memory.
            max_msg_size=settings.body_bytes_max,
            writer_limit=0,
        )
        self._tasks: dict[Follower, asyncio.Task[None]] = {}
        self._seats: dict[Follower, Seat] = {}
        self._sending = asyncio.Lock()
        """Held until the client has room for more: all subscriptions together leave one frame unread, not one each."""

    def can_serve(self, request: web.Request) -> bool:
        """Whether the request asks for a WebSocket."""
        try:
            return self._socket.can_prepare(request).ok
        except ValueError:  # A key that is not even ASCII.
            return False

    async def run(self, request: web.Request) -> web.WebSocketResponse:
        """Serve the client until one side closes."""
        socket = self._socket
        await socket.prepare(request)
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await self._take(message.data)
                elif message.type is WSMsgType.BINARY:
                    await self._end(InvalidRequest("a frame is text"), MALFORMED)
        except ConnectionError:
            pass  # The client is gone.
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            for follower in list(self._seats):
                self._forget(follower)
            # Last, as the connection may be lost while this waits, which cancels whoever serves it.
            await asyncio.gather(*tasks, return_exceptions=True)
        return socket

    async def close(self) -> None:
        """The node goes away."""
        await self._socket.close(code=WSCloseCode.GOING_AWAY)

    async def _take(self, text: str) -> None:
        try:
            frame = parse_frame(text.encode(), self._realm.settings)
        except InvalidRequest as error:
            await self._end(error, MALFORMED)
            return
        try:
            if frame.error is not None:
                raise frame.error
            if frame.publication is not None:
                await self._publish(frame)
            elif frame.unsubscribe:
                await self._drop(frame.unsubscribe)
                await self._say({"unsubscribed": [show_channel(name) for name in frame.unsubscribe], **frame.ref})
            else:
                await self._subscribe(frame)
        except Unauthorized as error:
            await self._end(error, TOKEN_REFUSED, frame.ref)
        except PushUpError as error:
            await self._say({"error": error.problem(), **frame.ref})

    async def _publish(self, frame: Frame) -> None:
        assert frame.publication is not None
        grant = await self._writer()
        self._realm.charge(grant, 1)
        grant.check("publish", frame.publication.channels)
        receipt = await self._realm.node.publish(grant.mark(frame.publication))
        await self._say({"published": show_receipt(receipt), **frame.ref})

    async def _subscribe(self, frame: Frame) -> None:
        grant = await self._reader()
        if grant is not None:
            self._realm.admit(grant, frame.subscribe)
        watched = {name for follower in self._tasks for name in follower.channels}
        most = self._realm.settings.poll_channels_max
        if len(watched | set(frame.subscribe)) > most:
            raise TooLarge(f"a connection subscribes to at most {most} channels")
        follower = Follower(self._realm, grant, frame.subscribe, frame.start, self._reader)
        self._seats[follower] = self._seat(grant)
        try:
            answer = await follower.ask()  # From here on there is a cursor, and "latest" is a moment.
        except PushUpError:
            self._forget(follower)
            raise
        await self._drop(frame.subscribe)
        await self._say({"subscribed": [show_channel(name) for name in frame.subscribe], **frame.ref})
        await self._show(follower, answer)
        if follower.channels:
            self._start(follower)
        else:
            self._forget(follower)

    def _start(self, follower: Follower) -> None:
        self._tasks[follower] = asyncio.create_task(self._follow(follower))

    def _forget(self, follower: Follower) -> None:
        """The subscription has ended."""
        self._tasks.pop(follower, None)
        seat = self._seats.pop(follower, None)
        if seat is not None:
            seat.leave()

    async def _drop(self, channels: Sequence[str]) -> None:
        """Take channels out of the subscriptions they are in; the rest of these goes on from its cursor."""
        for follower in list(self._tasks):
            task = self._tasks.get(follower)
            if task is None or set(follower.channels).isdisjoint(channels):
                continue
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if follower not in self._tasks:
                continue  # It has ended by itself.
            follower.channels = tuple(name for name in follower.channels if name not in channels)
            if follower.channels:
                self._start(follower)
            else:
                self._forget(follower)

    async def _follow(self, follower: Follower) -> None:
        try:
            while follower.channels:
                await self._show(follower, await follower.ask())
                if follower.is_drained:
                    await self.close()
                    break
        except asyncio.CancelledError:
            raise  # It goes on with other channels, or the connection has ended.
        except Unauthorized as error:
            await self._end(error, TOKEN_REFUSED)
        except PushUpError as error:
            await self._say({"error": error.problem(), "for": [show_channel(name) for name in follower.channels]})
        except ConnectionError:
            pass  # The client is gone; the reader of its frames hears of it, too.
        self._forget(follower)

    async def _show(self, follower: Follower, answer: Answer) -> None:
        names = msgspec.json.encode([show_channel(name) for name in follower.channels])
        frame = answer.body[:-1] + b',"for":%b}' % names
        async with self._sending:
            # Not before, as whoever waits for the lock may be cancelled, and not after, as the frame is out by then.
            follower.take(answer)
            await self._socket.send_frame(frame, WSMsgType.TEXT)

    async def _say(self, frame: dict[str, Any]) -> None:
        async with self._sending:
            await self._socket.send_frame(msgspec.json.encode(frame), WSMsgType.TEXT)

    async def _end(self, error: PushUpError, code: int, ref: dict[str, Any] | None = None) -> None:
        """Say what is wrong, and close."""
        await self._say({"error": error.problem(), **(ref or {})})
        await self._socket.close(code=code, message=error.code.encode())
