"""The express lane: a connection on which polls are parsed, parked and answered with nothing else in the way.

Every connection starts here and stays here. A request that is not a plain poll is *lent* to the web side (aiohttp): its
bytes go to a web connection that writes to the same transport, and when its answer is out the connection is the lane's
again, so a proxy that mixes polls and publications on its pooled connections costs no poll the express lane. What the
lane cannot frame with certainty is *handed over* for good (see `head`).

A parked poll costs this object, its subscription and the transport: no task, no request object, no parser.
"""

import asyncio
import logging
import struct
from collections.abc import Callable, Sequence
from email.utils import formatdate
from functools import partial
from math import inf
from socket import SO_LINGER, SOL_SOCKET
from time import time
from typing import Final, NamedTuple, Protocol, cast

from pushup.asked import Asked, Memory
from pushup.errors import (
    PROBLEM_TYPE,
    HeadTooLarge,
    InvalidRequest,
    OriginNotAllowed,
    PushUpError,
    RequestTimeout,
    TokenExpired,
)
from pushup.head import Head, Way, is_malformed, parse_head
from pushup.hub import Subscription
from pushup.messages import Answer, Receipt
from pushup.node import Node
from pushup.origins import NOT_ALLOWED
from pushup.peers import parse_proxy_header
from pushup.publishing import Order, read_order
from pushup.realm import Realm
from pushup.rush import BUNCH, Rush
from pushup.sender import NOBODY, Sender
from pushup.service import Seat, Service
from pushup.tokens import KeysNeeded
from pushup.wire import find_token, parse_poll_body, parse_poll_query

log = logging.getLogger("pushup.lane")

BODY_BYTES_MAX: Final = 64 * 1024
"""A longer body is read by the web side."""

AHEAD_BYTES_MAX: Final = 64 * 1024
"""How much a client may send ahead of an answer before its connection is no longer read."""

SHORT_HEAD_BYTES: Final = 256
"""An unfinished head up to here is parsed with every byte that comes."""

WARNING_PAUSE_S: Final = 60.0

PUBLISHERS_MAX: Final = 4096
PUBLISHER_BYTES_MAX: Final = 2048
"""So many heads of publications are remembered, and none that is longer."""

TICK_S: Final = 1.0
"""How often `Lanes.tick` is called."""

CUT_AT_ONCE: Final = 50
"""Connections that are cut in one turn of the event loop."""

LONG_ANSWER_BYTES: Final = 64 * 1024
"""A longer answer is written as its parts, which all who get the same messages share."""

BODY_TOO_LATE: Final = "the request's body did not come in time"

# What a connection is doing.
READING: Final = 0
PARKED: Final = 1
LENT: Final = 2
CLOSED: Final = 3
GREETING: Final = 4
"""A proxy has to say first whose connection it is."""
REFUSED: Final = 5
"""It is one of too many; the client is told so when it asks for something."""
PUBLISHING: Final = 6
"""The broker has what it publishes."""
ANSWERED: Final = 7
"""The lent request's answer is out; some of its body is still to come."""

# How an answer is written; a bit each.
KEEP_ALIVE: Final = 1
HTTP10: Final = 2
NO_BODY: Final = 4


_NO_LINGER: Final = struct.pack("ii", 1, 0)


class Publisher(NamedTuple):
    """What a head that publishes says, beside what `head` does: how to answer, and whom; and its idempotency keys."""

    head: Head
    how: int
    sender: Sender
    keys: Sequence[str]


class WebConnection(Protocol):
    """What the lane needs of the web side's connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...

    def connection_lost(self, exc: BaseException | None) -> None: ...

    def data_received(self, data: bytes) -> None: ...

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None: ...

    def release(self) -> None:
        """End without closing the transport."""

    def lateness(self, idle_since: float, slow_since: float, unread_since: float) -> str:
        """As `Lane.lateness`, of one that was handed over."""

    @property
    def gone(self) -> bool:
        """Whether the connection is closed."""

    def close(self) -> None:
        """Close the transport once what was written is out."""

    def abort(self) -> None:
        """Close the transport now."""


class Lanes:
    """What all connections of a server share."""

    def __init__(self, service: Service, borrow: "Callable[[Lane, bool], WebConnection]") -> None:
        self.service = service
        self.settings = service.settings
        self.metrics = service.metrics
        self.loop = asyncio.get_running_loop()
        self.body_bytes_max = min(BODY_BYTES_MAX, service.settings.body_bytes_max)
        self.borrow = borrow
        """Makes a web connection, which tells the lane when an answer is out; or (True) one for good."""
        self.memory = Memory()
        self.publishers: dict[bytes, Publisher] = {}
        """By the head's bytes: a back end sends the same with all its publications of a length."""
        self.open: set[Lane] = set()
        self.handed_over: dict[Lane, WebConnection] = {}
        self._late: list[Lane | WebConnection] = []
        self._unread: dict[Lane | WebConnection, int] = {}
        """What clients were sent and do not read, in bytes; who began it first comes first."""
        self._unread_bytes = 0
        self._warn_again = 0.0
        self.rush = Rush(self.loop, lambda: self.metrics.requests_lane)
        self.date = b""
        self.tick()

    def __call__(self) -> "Lane":
        """The protocol factory."""
        return Lane(self)

    def tick(self) -> None:
        """Once a second: the `Date` header, and connections that have had their time. O(connections)."""
        self.date = formatdate(usegmt=True).encode()
        settings = self.settings
        now = self.loop.time()
        self.next_tick = now + TICK_S
        if not self._late:
            since = now - settings.keepalive_timeout, now - settings.request_timeout, now - settings.write_timeout
            self._late += [lane for lane in self.open if lane.lateness(*since)]
            self._late += [web for web in self.handed_over.values() if web.lateness(*since)]
            self._cut(since)

    def _cut(self, since: tuple[float, float, float]) -> None:
        # In portions, as thousands that were late together would hold up all others.
        for _ in range(min(len(self._late), CUT_AT_ONCE)):
            connection = self._late.pop()
            why = connection.lateness(*since)  # It may have asked meanwhile.
            if why and not connection.gone:
                self.cut(connection, why)
        if self._late:
            self.loop.call_soon(self._cut, since)

    def cut(self, connection: "Lane | WebConnection", why: str) -> None:
        """Close a connection, to make an end of what its client does. Who was merely idle may go in peace."""
        self.metrics.connections_cut[why] += 1
        if why == "idle":
            connection.close()
        elif why == "slow" and isinstance(connection, Lane):
            connection.give_up()
        else:
            connection.abort()

    def warn_of(self, peer: str) -> None:
        """Say that an address has too many connections, now and then."""
        now = self.loop.time()
        if now >= self._warn_again:
            self._warn_again = now + WARNING_PAUSE_S
            log.warning("too many connections; if this is a proxy, name it in trusted_proxies", extra={"address": peer})

    def leaves_unread(self, connection: "Lane | WebConnection", size: int) -> None:
        """The client does not read, and has `size` bytes to. If all have too many, who has not read longest is cut."""
        self.has_read(connection)
        self._unread[connection] = size
        self._unread_bytes += size
        while self._unread_bytes > self.settings.unread_bytes_max:
            longest = next(iter(self._unread))
            self.has_read(longest)
            self.cut(longest, "unread")

    def has_read(self, connection: "Lane | WebConnection") -> None:
        """The client reads again, or is gone."""
        self._unread_bytes -= self._unread.pop(connection, 0)

    def newcomer_since(self) -> float:
        """Since when a new connection counts as idle.

        It has request_timeout to begin its first request, not keepalive_timeout as one that proved good.
        """
        settings = self.settings
        return self.loop.time() - max(settings.keepalive_timeout - settings.request_timeout, 0)

    def close_idle(self) -> None:
        """Close the connections that are between requests."""
        for lane in [lane for lane in self.open if lane.idle]:
            lane.close()

    def meet(self, head: Head, data: bytes) -> Publisher:
        """Who sends this head, to be remembered by its bytes unless it has a key, which comes once."""
        keys = [value.decode(errors="surrogateescape") for name, value in head.headers if name == b"idempotency-key"]
        publisher = Publisher(head, answer_form(head), self.service.sender(head.headers), keys)
        head.headers = []  # They take ten times what the rest does.
        if not keys and len(data) <= PUBLISHER_BYTES_MAX:
            if len(self.publishers) >= PUBLISHERS_MAX:
                self.publishers.clear()
            self.publishers[data] = publisher
        return publisher

    def render(self, status: bytes, content_type: bytes, body: bytes, how: int, extra: bytes = b"") -> bytes:
        """A whole response."""
        return self.render_head(status, content_type, len(body), how, extra) + (b"" if how & NO_BODY else body)

    def render_head(self, status: bytes, content_type: bytes, length: int, how: int, extra: bytes = b"") -> bytes:
        """A response up to its body, which has `length` bytes."""
        if how & KEEP_ALIVE:
            connection = b"Connection: keep-alive\r\n" if how & HTTP10 else b""
        else:
            connection = b"" if how & HTTP10 else b"Connection: close\r\n"
        return (
            b"HTTP/1.%d %b\r\nContent-Type: %b\r\nCache-Control: no-store\r\n%bContent-Length: %d\r\nDate: %b\r\n%b\r\n"
        ) % (
            0 if how & HTTP10 else 1,
            status,
            content_type,
            extra,
            length,
            self.date,
            connection,
        )


def answer_form(head: Head) -> int:
    """How the answer to this head is written."""
    return head.keep_alive * KEEP_ALIVE | head.http10 * HTTP10 | (head.method == b"HEAD") * NO_BODY


def abort(transport: asyncio.Transport) -> None:
    """Close a connection now, and have the kernel forget what the client did not read."""
    socket = transport.get_extra_info("socket")
    if socket is not None:
        socket.setsockopt(SOL_SOCKET, SO_LINGER, _NO_LINGER)
    transport.abort()


class Lane(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "_body_left",
        "_buffer",
        "_how",
        "_lanes",
        "_node",
        "_peer",
        "_seat",
        "_sender",
        "_since",
        "_state",
        "_stuck",
        "_subscription",
        "_transport",
        "_web",
    )

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._state = READING
        self._buffer = b""
        """What came and was not looked at yet."""
        self._peer: str | None = None
        """Whose connection is counted; None if it is a trusted proxy's."""
        self._how = 0
        self._sender = NOBODY
        self._subscription: Subscription | None = None
        self._node: Node
        """Where the subscription is parked."""
        self._seat: Seat | None = None
        """What is counted of the parked poll, if anything is."""
        self._stuck = False
        """Whether the client does not read what it is sent."""
        self._web: WebConnection | None = None
        self._body_left = 0
        """Bytes of the lent request's body that are still to come."""
        self._since = 0.0
        """When the connection began to wait for what it waits for now; of no meaning while a poll is parked."""

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        lanes = self._lanes
        settings = lanes.settings
        self._since = lanes.newcomer_since()
        lanes.metrics.connections_opened += 1
        lanes.open.add(self)
        high = settings.write_buffer_bytes_max
        self._transport.set_write_buffer_limits(high=high, low=high // 4)
        peer = transport.get_extra_info("peername")
        host = peer[0] if isinstance(peer, tuple) else ""
        if not host:
            return  # A Unix socket.
        if host not in lanes.service.proxies:
            self._enter(host)
        elif settings.proxy_protocol:
            self._state = GREETING
            self._since = lanes.loop.time()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._state = CLOSED
        self._lanes.open.discard(self)
        if self._stuck:
            self._lanes.has_read(self)
        self.forget_client()
        if self._subscription is not None:
            self._node.leave(self._subscription, self)
            self._subscription = None
        if self._seat is not None:
            self._seat.leave()
            self._seat = None
        if self._web is not None:
            self._web.connection_lost(exc)
            self._web = None
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        if self._state == READING and not self._stuck:
            if not self._buffer:
                # The short cut for a poll like others before it.
                known = self._lanes.memory.recall(data)
                if known is not None:
                    asked, self._how, self._sender = known
                    self._ask(asked, data)
                    return
                # And for a publication, whole, with a head like one before it.
                end = data.find(b"\r\n\r\n") + 4
                publisher = self._lanes.publishers.get(data[:end])
                if publisher is not None and len(data) == end + publisher.head.length:
                    self._publish(publisher, data, end)
                    return
            if self._buffer:
                data = self._buffer + data
            else:
                data = data.lstrip(b"\r\n")
                if not data:
                    return  # Blank lines before a request are allowed, and mean nothing. They earn no time either.
                self._since = self._lanes.loop.time()
            self._read(data)
        elif self._state in (LENT, ANSWERED) and self._body_left:
            self._feed(data)
        elif self._state == GREETING:
            self._greet(self._buffer + data)
        elif self._state == REFUSED:
            self._refuse()
        elif self._state != CLOSED:
            self._buffer += data
            if self._full:
                self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._stuck = True
        self._since = self._lanes.loop.time()
        if self._web is not None:
            self._web.pause_writing()
        self._lanes.leaves_unread(self, self._transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stuck = False
        self._lanes.has_read(self)
        if self._web is not None:
            self._web.resume_writing()
        self._read_on()

    # Called by Lanes

    @property
    def gone(self) -> bool:
        """Whether the connection is closed."""
        return self not in self._lanes.open

    @property
    def idle(self) -> bool:
        """Whether it is between requests."""
        return self._state == READING and not self._buffer

    def lateness(self, idle_since: float, slow_since: float, unread_since: float) -> str:
        """What the client took too long for, if anything, each since before a moment. Lent requests are the web side's.

        unread: to read what it is sent; slow: to finish asking; idle: to ask.
        """
        state = self._state
        if self._stuck:
            return "unread" if self._since < unread_since else ""
        if state == READING and not self._buffer:
            return "idle" if self._since < idle_since else ""
        if state in (PARKED, PUBLISHING) or (state in (LENT, ANSWERED) and not self._transport.is_closing()):
            return ""
        return "slow" if self._since < slow_since else ""

    def close(self) -> None:
        """Close once what was written is out."""
        self._state = CLOSED
        self._since = self._lanes.loop.time()
        self._transport.close()

    def give_up(self) -> None:
        """Close on a client that does not send the rest of its request; to one that publishes say so."""
        head = parse_head(self._buffer[: self._buffer.find(b"\r\n\r\n") + 4])
        if self._state != READING or head.way is not Way.PUBLISH:
            self.abort()
            return
        self._how = answer_form(head) & ~KEEP_ALIVE
        self._sender = self._lanes.service.sender(head.headers)
        self._write_error(RequestTimeout(BODY_TOO_LATE))

    def abort(self) -> None:
        """Close now."""
        self._state = CLOSED
        abort(self._transport)

    def forget_client(self) -> None:
        """The connection is closed, whoever has it."""
        self._lanes.metrics.connections_closed += 1
        if self._peer is not None:
            self._lanes.service.peers.leave(self._peer)
            self._peer = None

    # Called by the node

    def answer(self, answer: Answer) -> None:
        self._subscription = None
        if self._seat is not None and self._rise():
            self._expire()
        elif self._state == PARKED:
            self._write_answer(answer)
            if self._buffer:
                self._read_on()

    def fail(self, error: PushUpError) -> None:
        self._subscription = None
        if self._seat is not None:
            self._rise()
        if self._state == PARKED:
            self._write_error(error)
            self._read_on()

    # Called by the web side

    def web_answered(self, keep_alive: bool) -> None:
        """The answer to the lent request is written. `keep_alive`: the connection goes on."""
        if self._state != LENT:
            # Two answers to one request: the two sides disagree on what was one request.
            self.abort()
        elif keep_alive:
            self._state = ANSWERED
            self._take_back()
        else:
            # The web side closes the transport, as soon as the rest of the body has come.
            self._since = self._lanes.loop.time()

    def web_reads_on(self) -> None:
        """The web side had the transport read on, whatever was sent ahead."""
        if self._full:
            self._transport.pause_reading()

    # Inside

    def _read(self, data: bytes) -> None:
        """Serve the requests in `data`, up to one that has to wait for something."""
        size = len(data)
        while data and self._state == READING and not self._stuck:
            if data[0] in b"\r\n":
                data = data.lstrip(b"\r\n")
                continue
            most = self._lanes.settings.head_bytes_max
            blank = data.find(b"\r\n\r\n", 0, most)
            if blank < 0:
                # Looked at again where a line has ended, else whoever sends a byte at a time has all parsed each time.
                seen = len(self._buffer) if len(data) == size else 0
                if (len(data) < SHORT_HEAD_BYTES or b"\n" in data[seen:]) and is_malformed(data[:most]):
                    self._hand_over(data)
                    return
                if len(data) >= most:
                    self._how, self._sender = 0, NOBODY
                    self._write_error(HeadTooLarge(f"the request's line and header fields are over {most} bytes"))
                    return
                break
            end = blank + 4
            publisher = self._lanes.publishers.get(data[:end])
            head = parse_head(data[:end]) if publisher is None else publisher.head
            if head.way is Way.HAND_OVER:
                self._hand_over(data)
                return
            if head.way is Way.LEND or head.length > self._lanes.body_bytes_max:
                self._lend(data, end + head.length)
                return
            total = end + head.length
            if len(data) < total:
                break
            request, data = data[:total], data[total:]
            if head.way is Way.POLL:
                self._poll(head, request, end)
            else:
                self._publish(publisher or self._lanes.meet(head, request[:end]), request, end)
        if data and len(data) < size:
            self._since = self._lanes.loop.time()  # Here the next request began.
        self._buffer = data

    def _read_on(self) -> None:
        """Look at what was sent ahead, when the event loop has time for it."""
        if self._state == READING and not self._stuck:
            self._since = self._lanes.loop.time()
            if self._buffer:
                self._lanes.loop.call_soon(self._read_buffer)

    def _read_buffer(self) -> None:
        if self._state == READING and not self._stuck:
            data, self._buffer = self._buffer, b""
            self._read(data)
            if self._full:
                self._transport.pause_reading()
            elif len(data) > AHEAD_BYTES_MAX:
                self._transport.resume_reading()

    @property
    def _full(self) -> bool:
        """Whether the client has sent enough ahead. What a request still needs is never too much."""
        return len(self._buffer) > AHEAD_BYTES_MAX and (self._state != READING or self._stuck)

    def _enter(self, host: str) -> None:
        """Count the connection as this client's."""
        peers = self._lanes.service.peers
        self._peer = peers.enter(host)
        if peers.is_flooding(self._peer):
            self._lanes.cut(self, "flood")
        elif peers.is_over(self._peer):
            self._lanes.warn_of(self._peer)
            self._state = REFUSED
            self._since = self._lanes.loop.time()

    def _greet(self, data: bytes) -> None:
        """A proxy's first words."""
        try:
            proxied = parse_proxy_header(data)
        except ValueError:
            self._lanes.metrics.count_refused(InvalidRequest("no PROXY header"))
            self.abort()
            return
        if proxied is None:
            self._buffer = data
            return
        self._state = READING
        self._buffer = b""
        self._since = self._lanes.newcomer_since()
        if proxied.client is not None:
            self._enter(proxied.client)
        rest = data[proxied.length :]
        if rest:
            self.data_received(rest)

    def _refuse(self) -> None:
        assert self._peer is not None
        self._write_error(self._lanes.service.peers.refusal(self._peer))

    def _poll(self, head: Head, request: bytes, end: int) -> None:
        lanes = self._lanes
        service = lanes.service
        self._how = answer_form(head)
        sender = self._sender = service.sender(head.headers)
        try:
            if head.method == b"POST":
                if sender.foreign:
                    raise OriginNotAllowed(NOT_ALLOWED)
                if head.query:
                    raise InvalidRequest("a poll is in the query or in the body, not both")
                realm = self._find(head.realm, sender, None)
                asked = Asked(realm, parse_poll_body(request[end:], realm.settings), None)
            else:
                token = find_token(head.query)
                realm = self._find(head.realm, sender, token)
                asked = Asked(realm, parse_poll_query(head.query, realm.settings), token)
                lanes.memory.learn(request, asked, self._how, sender)
        except KeysNeeded:
            self._lend(request, len(request))
            return
        except PushUpError as error:
            lanes.metrics.requests_lane += 1
            self._write_error(error)
            return
        self._ask(asked, request)

    def _find(self, name: str, sender: Sender, token: str | None) -> Realm:
        """The realm of a poll, if its sender is known there: a stranger learns nothing of what is wrong with a poll."""
        realm = self._lanes.service.find(name, sender, token)
        if not realm.open_to_read:
            realm.recognise(sender, token, time())
        return realm

    def _ask(self, asked: Asked, request: bytes) -> None:
        """Answer a poll or park it, if its sender may."""
        lanes = self._lanes
        realm, poll, token = asked
        sender = self._sender
        grant = peer = None
        most = inf
        if not realm.open_to_read:
            now = time()
            try:
                grant = realm.recognise(sender, token, now)
                realm.admit(grant, poll.channels)
            except KeysNeeded:
                self._lend(request, len(request))
                return
            except PushUpError as error:
                lanes.metrics.requests_lane += 1
                self._write_error(error)
                return
            most = grant.expires - now
        metrics = lanes.metrics
        metrics.requests_lane += 1
        if not metrics.requests_lane % BUNCH:
            lanes.rush()
        if sender.forwarded is not None and self._peer is None and not lanes.settings.proxy_protocol:
            peers = lanes.service.peers
            peer = sender.forwarded
            peers.count(peer)
            if peers.is_over(peer):
                lanes.warn_of(peer)
                peers.leave(peer)
                self._write_error(peers.refusal(peer))
                return
        result = realm.node.poll(poll, self, most)
        if isinstance(result, Answer):
            if peer is not None:
                lanes.service.peers.leave(peer)
            self._write_answer(result)
            return
        self._node = realm.node
        self._subscription = result
        self._state = PARKED
        self._since = 0.0  # One for all: thousands wait.
        if grant is not None or peer is not None:
            self._seat = Seat(lanes.service.peers, grant, peer)
        if self._web is not None:
            self._web.release()
            self._web = None

    def _publish(self, publisher: Publisher, request: bytes, end: int) -> None:
        lanes = self._lanes
        self._how = publisher.how
        sender = self._sender = publisher.sender
        try:
            if sender.foreign:
                raise OriginNotAllowed(NOT_ALLOWED)
            realm = lanes.service.find(publisher.head.realm, sender, None)
            grant = realm.recognise(sender, None, time())
            order = read_order(realm, grant, request[end:], publisher.keys)
        except KeysNeeded:
            self._lend(request, len(request))
            return
        except PushUpError as error:
            lanes.metrics.requests_lane += 1
            self._write_error(error)
            return
        lanes.metrics.requests_lane += 1
        self._state = PUBLISHING
        realm.node.submit(order.publications, partial(self._published, order))

    def _published(self, order: Order, results: Sequence[Receipt | PushUpError]) -> None:
        if self._state != PUBLISHING:
            return  # The client is gone.
        try:
            body = order.show(results)
        except PushUpError as error:
            self._write_error(error)
        else:
            status = b"201 Created" if order.items is None else b"200 OK"
            self._write(status, b"application/json", body, self._sender.cors_lines)
        if self._buffer:
            self._read_on()

    def _rise(self) -> bool:
        """The poll waits no longer. Whether its token has expired meanwhile."""
        seat, self._seat = self._seat, None
        assert seat is not None
        seat.leave()
        return seat.has_expired(time())

    def _expire(self) -> None:
        if self._state == PARKED:
            self._write_error(TokenExpired("the token expired while the poll waited"))
            self._read_on()

    def _write_answer(self, answer: Answer) -> None:
        lanes = self._lanes
        how = self._how & ~KEEP_ALIVE if lanes.service.closing else self._how
        extra = self._sender.cors_lines
        form = (how, extra) if extra else how
        response = answer.rendered.get(form)
        self._state = READING
        self._since = lanes.next_tick  # Up to a second too late, but one object for thousands.
        if response is not None:
            self._transport.write(response)
        elif (size := sum(map(len, answer.parts))) < LONG_ANSWER_BYTES:
            response = answer.rendered[form] = lanes.render(b"200 OK", b"application/json", answer.body, how, extra)
            self._transport.write(response)
        else:
            head = lanes.render_head(b"200 OK", b"application/json", size, how, extra)
            self._transport.writelines([head] if how & NO_BODY else [head, *answer.parts])
        if not how & KEEP_ALIVE:
            self.close()

    def _write_error(self, error: PushUpError) -> None:
        self._lanes.metrics.count_refused(error)
        extra = b"".join([b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in error.headers.items()])
        extra += self._sender.cors_lines
        status = f"{error.status} {error.title}".encode()
        self._write(status, PROBLEM_TYPE.encode(), error.body(), extra)

    def _write(self, status: bytes, content_type: bytes, body: bytes, extra: bytes) -> None:
        """Answer what was asked for last, and nobody else."""
        lanes = self._lanes
        how = self._how & ~KEEP_ALIVE if lanes.service.closing else self._how
        self._state = READING
        self._since = lanes.loop.time()
        self._transport.write(lanes.render(status, content_type, body, how, extra))
        if not how & KEEP_ALIVE:
            self.close()

    # The web side's turn

    def _lend(self, data: bytes, total: int) -> None:
        self._state = LENT
        self._body_left = max(total - len(data), 0)
        self._buffer = data[total:]
        if self._web is None:
            self._web = self._lanes.borrow(self, False)
            self._web.connection_made(self._transport)
        self._web.data_received(data[:total])

    def _feed(self, data: bytes) -> None:
        assert self._web is not None
        part, self._buffer = data[: self._body_left], data[self._body_left :]
        self._body_left -= len(part)
        self._web.data_received(part)
        self._take_back()

    def _take_back(self) -> None:
        if self._state == ANSWERED and not self._body_left:
            self._state = READING
            self._read_on()

    def _hand_over(self, data: bytes) -> None:
        self._state = CLOSED
        self._lanes.open.discard(self)
        if self._web is not None:
            self._web.release()
            self._web = None
        web = self._lanes.handed_over[self] = self._lanes.borrow(self, True)
        self._transport.set_protocol(cast(asyncio.BaseProtocol, web))
        web.connection_made(self._transport)
        web.data_received(data)
