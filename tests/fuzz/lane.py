"""The target `lane`: what one client sends on a connection, in segments, to a whole server without sockets.

An input is the bytes of the connection with *marks* in them: MARK and a letter is the end of a segment, and something
that happens then (`EVENTS`). The first byte may say that the input is not the connection's bytes but a part of one
request, which the target makes around it: then how many requests there are is known for certain.
"""

import asyncio
import logging
import re
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, TypeVar, cast

import uvloop

from pushup.errors import ChannelNotFound
from pushup.lane import AHEAD_BYTES_MAX
from pushup.messages import Publication
from pushup.server import Server
from tests import pipes
from tests.fuzz.framing import Framed, Response, frame, read_responses
from tests.support import running
from tests.test_lane_differential import AFTER, HOST, exchange, forget, split

MARK: Final = b"\xf5\xf5"
"""Followed by a byte: the end of a segment. Never part of UTF-8."""

# The events: what follows the segment.
PUBLISH: Final = b"p"  # Somebody else publishes to the channels `a` and `b`.
STALL: Final = b"s"  # The client stops reading.
READ: Final = b"r"  # It reads again.
LATER: Final = b"t"  # A long time passes, by the lanes' clock.
HANG_UP: Final = b"h"  # The client is gone.
REPEAT: Final = b"*"  # The segment comes another REPEATS times.
EVENTS: Final = (PUBLISH, STALL, READ, LATER, HANG_UP, REPEAT)
REPEATS: Final = 100

# The modes: what the input is. Any other first byte belongs to the connection's bytes.
BODY: Final = b"\x01"  # The body of a publication, by Content-Length.
CHUNKS: Final = b"\x02"  # The same, in chunks that end at marks.
FIELD: Final = b"\x03"  # The value of a header field of a poll.

SENTINEL: Final = b"GET /poll?channel=sentinel&timeout=0 HTTP/1.1\r\n" + HOST + b"\r\n"

SETTINGS: Final = {"body_bytes_max": 4096, "channel_max_messages": 3, "poll_jitter": 0}
LONG_S: Final = 10_000.0
SEGMENT_BYTES_MAX: Final = 16 * 1024
STATUSES: Final = frozenset((100, 200, 201, 204, 400, 401, 403, 404, 405, 408, 409, 413, 422, 429, 431))
SERVER_LIFE: Final = 4000
"""Inputs until everything begins anew, as servers remember channels."""
COMPARED_BYTES_MAX: Final = 600
COMPARED_EVERY: Final = 8

_LIKE_A_REQUEST: Final = re.compile(rb"[A-Z]{3,}[ \t]")

_T = TypeVar("_T")


class _Ahead:
    """The event loop, some seconds later by its clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds

    def time(self) -> float:
        return self._loop.time() + self._seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class _Complaints(logging.Handler):
    """What anybody logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(self.format(record))


class LaneTarget:
    """Servers, kept for many inputs. Call it with an input: AssertionError, or any other exception, is a finding.

    `compare_all`: every short input is also compared with what aiohttp alone answers, not only some.
    """

    def __init__(self, *, compare_all: bool = False) -> None:
        self._compare_all = compare_all
        self._loop = uvloop.new_event_loop()
        self._complaints = _Complaints()
        self._loop.set_exception_handler(lambda _, context: self._complaints.heard.append(str(context)))
        logging.getLogger().addHandler(self._complaints)
        self._left = 0
        self._stack = AsyncExitStack()
        self._server: Server
        self._twins: Sequence[Server]

    def close(self) -> None:
        """Stop the servers."""
        self._run(self._stack.aclose())
        logging.getLogger().removeHandler(self._complaints)
        self._loop.close()

    def __call__(self, data: bytes) -> None:
        if not self._left:
            self._run(self._renew())
            self._left = SERVER_LIFE
        left, self._left = self._left, 0  # After a finding everything begins anew.
        self._complaints.heard.clear()
        self._run(self._play(data))
        heard = self._complaints.heard
        assert not heard, heard
        self._left = left - 1

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return self._loop.run_until_complete(coroutine)

    async def _renew(self) -> None:
        await self._stack.aclose()
        self._server, *twins = [await self._stack.enter_async_context(running(**SETTINGS)) for _ in range(3)]
        self._twins = twins

    async def _play(self, data: bytes) -> None:
        mode, rest = data[:1], data[1:]
        await forget(self._server)
        if mode == BODY:
            await self._play_body(rest)
        elif mode == CHUNKS:
            await self._play_chunks(rest)
        elif mode == FIELD:
            await self._play_field(rest)
        else:
            await self._play_connection(data)

    # One request, of which the input is a part

    async def _play_body(self, content: bytes) -> None:
        segments = _marked(content)
        body = b"".join(segment for segment, _ in segments)
        head = b"POST /publish HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (HOST, len(body))
        sent, client = await self._talk([(head, b""), *segments, (SENTINEL, b"")], events=False)
        self._expect_two(read_responses(sent), client.closing)

    async def _play_chunks(self, content: bytes) -> None:
        chunks = [segment for segment, _ in _marked(content) if segment]
        head = b"POST /publish HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n" % HOST
        framed = [(b"%x\r\n%b\r\n" % (len(chunk), chunk), b"") for chunk in chunks]
        sent, client = await self._talk([(head, b""), *framed, (b"0\r\n\r\n", b""), (SENTINEL, b"")], events=False)
        self._expect_two(read_responses(sent), client.closing)

    async def _play_field(self, content: bytes) -> None:
        value = re.sub(rb"[\x00\r\n]", b"", content)
        line = b"GET /poll?channel=a&timeout=0 HTTP/1.1\r\n"
        sent, client = await self._talk([(b"%b%bX-Field: %b\r\n\r\n" % (line, HOST, value), b""), (SENTINEL, b"")])
        self._expect_two(read_responses(sent), client.closing)

    def _expect_two(self, responses: Sequence[Response], closed: bool) -> None:
        """The request's answer and the sentinel's, unless the server closed the connection after the first one."""
        statuses = [response.status for response in responses]
        assert statuses, "no answer"
        assert statuses[0] in STATUSES, statuses
        assert statuses[1:] == [200] or (closed and len(statuses) == 1), statuses

    # A whole connection

    async def _play_connection(self, data: bytes) -> None:
        segments = _marked(data)
        before = self._server.node.metrics.publications
        sent, client = await self._talk(segments)
        events = {event for _, event in segments}
        whole = b"".join(segment * (1 + REPEATS * (event == REPEAT)) for segment, event in segments)
        published = self._server.node.metrics.publications - before - client.published_by_others
        responses = read_responses(sent)
        framed = frame(whole)
        check_answers(responses, whole, framed)
        if framed.plain:
            reads = not events & {STALL, HANG_UP, LATER}
            check_plain(framed, responses, published, open_=reads and not client.closing and not client.waited)
            await self._expect_not_hidden(framed)
        compared = self._compare_all or sum(data) % COMPARED_EVERY == 0
        # Of a body that does not end aiohttp answers some requests, and the lane waits for it.
        ends = not frame(whole + AFTER).rest or not framed.plain
        if compared and ends and len(whole) <= COMPARED_BYTES_MAX and events <= {b""}:
            await self._compare(whole + AFTER)

    async def _expect_not_hidden(self, framed: Framed) -> None:
        asked = [request for request in framed.requests if b"hidden" in request.body or b"\\u" in request.body]
        if not any(request.target.startswith((b"/publish", b"/channels")) for request in asked):
            try:
                await self._server.node.broker.describe("hidden")
            except ChannelNotFound:
                return
            raise AssertionError("what lies in a body was executed")

    async def _compare(self, data: bytes) -> None:
        """The lane and aiohttp alone agree. Byte by byte, so that what aiohttp makes of segments has no part in it."""
        server, reference = self._twins
        seen = expected = None
        for patient in (False, True, True):
            await forget(server, reference)
            seen = await exchange(pipes.lane, server, split(data), patient=patient)
            expected = await exchange(pipes.aiohttp, reference, split(data), patient=patient)
            if seen == expected:
                return
        raise AssertionError(f"the lane and aiohttp differ: {seen} and {expected}")

    # What happens on a connection

    async def _talk(self, segments: Sequence[tuple[bytes, bytes]], *, events: bool = True) -> tuple[bytes, "_Client"]:
        """Play the client's part on a new connection; what it was sent, and the connection, which is gone."""
        client = _Client(self._server)
        for segment, event in segments:
            if client.pipe.closing:
                break
            client.push(segment)
            await client.settle()
            if events:
                await self._happen(client, segment, event)
                await client.settle()
        client.finish()
        await client.settle()
        assert not self._server.node.parked, "a poll waits for a client that is gone"
        assert not self._server._lanes.open, "a connection is counted that is gone"
        return client.pipe.sent, client

    async def _happen(self, client: "_Client", segment: bytes, event: bytes) -> None:
        if event == PUBLISH:
            await self._server.node.publish(Publication(("a", "b"), b"1"))
            client.published_by_others += 1
        elif event == STALL:
            client.stall()
        elif event == READ:
            client.read()
        elif event == LATER:
            lanes = self._server._lanes
            loop = lanes.loop
            lanes.loop = cast(asyncio.AbstractEventLoop, _Ahead(loop, LONG_S))
            try:
                lanes.tick()
            finally:
                lanes.loop = loop
        elif event == HANG_UP:
            client.pipe.hang_up()
        elif event == REPEAT:
            flood = segment * REPEATS
            for n in range(0, len(flood), SEGMENT_BYTES_MAX):
                client.push(flood[n : n + SEGMENT_BYTES_MAX])
            await client.settle()


class _Client:
    """A connection, and what may be said of it at any time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.pipe = pipes.lane(server)
        self._lane = self.pipe.lane
        self._stalled_at: int | None = None
        self.closing = False
        """Whether the server had closed it before the client did."""
        self.waited = False
        """Whether a poll waited at the end."""
        self.published_by_others = 0

    def push(self, data: bytes) -> None:
        self.pipe.push(data)
        limits = self._server.settings
        bound = max(AHEAD_BYTES_MAX, limits.head_bytes_max + limits.body_bytes_max) + SEGMENT_BYTES_MAX
        kept = len(self._lane._buffer)
        assert kept <= bound, f"the lane keeps {kept} bytes"

    async def settle(self) -> None:
        await self.pipe.settle()
        if self._stalled_at is not None:
            written = read_responses(self.pipe.sent[self._stalled_at :])
            assert len(written) <= 2, f"{len(written)} answers for a client that does not read"

    def stall(self) -> None:
        if self._stalled_at is None and not self.pipe.closing:
            self._stalled_at = len(self.pipe.sent)
            self.pipe.protocol.pause_writing()

    def read(self) -> None:
        if self._stalled_at is not None:
            self._stalled_at = None
            if not self.pipe.closing:
                self.pipe.protocol.resume_writing()

    def finish(self) -> None:
        self.closing = self.pipe.closing
        self.waited = bool(self._server.node.parked)
        self.pipe.hang_up()


def _marked(data: bytes) -> list[tuple[bytes, bytes]]:
    """Segments, each with the event that follows it (empty: none)."""
    first, *rest = data.split(MARK)
    segments = [first]
    events = []
    for part in rest:
        events.append(part[:1] if part[:1] in EVENTS else b"")
        segments.append(part[1:])
    return list(zip(segments, [*events, b""], strict=True))


def check_answers(responses: Sequence[Response], data: bytes, framed: Framed) -> None:
    """What holds for whatever was sent."""
    final = [response for response in responses if response.status != 100]
    for response in responses:
        assert response.status in STATUSES, f"status {response.status}: {response.body!r}"
        if response.status >= 400:
            assert response.headers[b"content-type"] == b"application/problem+json", response
    assert len(final) <= len(_LIKE_A_REQUEST.findall(data)) + 1, f"{len(final)} answers"
    bodiless = sum(response.headers.get(b"content-length", b"0") != b"0" and not response.body for response in final)
    assert bodiless <= data.count(b"HEAD"), "an answer lacks its body"
    closing = [b"close" in response.headers.get(b"connection", b"") for response in final]
    assert not any(closing[:-1]), "an answer after the last one"


def check_plain(framed: Framed, responses: Sequence[Response], published: int, *, open_: bool) -> None:
    """What holds where it is beyond doubt which requests were sent. `open_`: nothing keeps any from being answered."""
    final = [response for response in responses if response.status != 100]
    # One more may have been refused before it was all there.
    assert len(final) <= len(framed.requests) + bool(framed.rest), f"{len(final)} answers to {len(framed.requests)}"
    if open_:
        assert len(final) >= len(framed.requests), f"{len(final)} answers to {len(framed.requests)}"
    wanted = sum(
        request.body.count(b"data") for request in framed.requests if request.target.startswith(b"/publish")
    ) + sum(request.body.count(b"\\u") for request in framed.requests)
    assert published <= wanted, f"{published} publications of {wanted}"
