"""Nchan's subscriber protocol as a form of polls: a page made for Nchan's JavaScript client needs no change.

One URL names the channels, and the request says what it wants: WebSocket, Server-Sent Events, or else a long poll. A
message's id is PushUp's cursor, the one behind the message. https://nchan.io/#subscriber-endpoints
"""

import asyncio
import logging
import random
import re
import secrets
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple
from urllib.parse import unquote

import msgspec
from aiohttp import WSCloseCode, web

from pushup.access import Grant
from pushup.errors import (
    InvalidParameter,
    InvalidRequest,
    PushUpError,
    TooLarge,
    TooMany,
    Unauthorized,
    Unavailable,
)
from pushup.messages import LATEST, MAX_ID, SECOND, Answer, Message, Poll, show_channel
from pushup.realm import Realm
from pushup.service import Service
from pushup.settings import Settings
from pushup.streams import (
    GOODBYE_S,
    GUESTS,
    HEADERS,
    RETRY_MS,
    SENDER,
    TOKEN_REFUSED,
    Follower,
    Guests,
    ask,
    reader,
    stream,
)
from pushup.wire import TOKEN, find_token, parse_segment

log = logging.getLogger("pushup.nchan")

META: Final = "ws+meta.nchan"
"""The WebSocket protocol whose frames begin with the message's id and type."""

GAP: Final = "X-PushUp-Gap"
"""A header field of Nchan's own for what was missed does not exist."""

ASKED: Final = "If-None-Match, If-Modified-Since, Etag, Cache-Control"
TOLD: Final = f"Etag, Content-Type, {GAP}"
"""Header fields that pages of other origins send and read besides those of PushUp itself."""

FRAME_BYTES_MAX: Final = 4096
"""What a subscriber sends on a WebSocket is read and has no meaning."""

_CURSOR: Final = re.compile(r"[1-9][0-9]{15}")
_SECOND: Final = re.compile(r"([1-9][0-9]{0,9}):\S*")
_ANY_PART: Final = frozenset(("*/*", "multipart/*", "multipart/mixed"))


class Wanted(NamedTuple):
    """What a subscriber asks for: distinct channels, and a cursor or LATEST."""

    channels: tuple[str, ...]
    start: int


def add_nchan(app: web.Application, service: Service, path: str) -> None:
    """Serve subscribers below `path` in every realm, in an application that `make_app` made."""
    mount = _Mount(service, app[GUESTS], path)
    for realm in ("", "/realms/{realm:[^/]+}"):
        app.router.add_get(f"{realm}{path}", mount.subscribe)
        app.router.add_get(f"{realm}{path}/{{channels:.*}}", mount.subscribe)
    app.on_response_prepare.append(mount.let_pages_in)


def parse_wanted(segments: Sequence[str], query: str, headers: Mapping[str, str], settings: Settings) -> Wanted:
    """From the raw segments behind the mount, the raw query, and the header fields.

    Channels are separated by slashes and commas in the path, and by commas in `id=a,b`. `start` is for clients that
    have no message id yet. Raises InvalidRequest, TooLarge.
    """
    names = [name for segment in segments for name in segment.split(",")]
    fields: dict[str, str] = {}
    for name, _, value in (pair.partition("=") for pair in query.split("&") if pair):
        if name not in ("id", "last_event_id", "start", TOKEN):
            raise InvalidParameter(name[:100], f"{name[:100]!r} is not a parameter of a subscriber")
        if name == "id":
            names += value.replace("+", "%20").split(",")
        else:
            fields.setdefault(name, value)
    channels = tuple(dict.fromkeys(map(parse_segment, names)))
    if not channels:
        raise InvalidParameter("id", "a subscriber names at least one channel, in the path or as id")
    if len(channels) > settings.poll_channels_max:
        raise TooLarge(f"a subscriber names at most {settings.poll_channels_max} channels")
    start = find_id(headers, unquote(fields.get("last_event_id", "")))
    if start is None:
        first = fields.get("start", "0")
        start = LATEST if first == "latest" else 0 if first == "0" else parse_id(first)
    return Wanted(channels, start)


def find_id(headers: Mapping[str, str], last_event_id: str) -> int | None:
    """The cursor of the message id that a client has; None if it has none. `last_event_id` is the one in the query.

    Each transport keeps an old id in one place while a newer one is in another, so the order matters: what a long poll
    was answered, what a page had stored when it was loaded, what a browser has seen of events, what a URL began with.
    """
    tag = headers.get("If-None-Match", "")
    since = headers.get("If-Modified-Since", "")
    if since and not _CURSOR.fullmatch(_bare(tag)):
        return _parse_date(since)  # Nchan's own id, in two fields. We send no Last-Modified.
    for text in (tag, headers.get("Etag", ""), headers.get("Last-Event-ID", ""), last_event_id):
        if text:
            return parse_id(text)
    return None


def parse_id(text: str) -> int:
    """The cursor that a message id is; of an id of Nchan's own (`SECOND:TAG`) the second. Raises InvalidParameter."""
    text = _bare(text)
    if _CURSOR.fullmatch(text) and int(text) <= MAX_ID:
        return int(text)
    second = _SECOND.fullmatch(text)
    if second is None:
        raise InvalidParameter("last_event_id", "a message id is the 16 digits of a cursor")
    return _bounded(int(second[1]) * SECOND)


def _bare(tag: str) -> str:
    """An entity tag without what proxies put around it."""
    return tag.strip().removeprefix("W/").strip('"')


def _parse_date(text: str) -> int:
    try:
        return _bounded(max(int(parsedate_to_datetime(text).timestamp()), 0) * SECOND)
    except (ValueError, OverflowError):
        raise InvalidParameter("If-Modified-Since", "If-Modified-Since is a date as HTTP writes it") from None


def _bounded(cursor: int) -> int:
    if cursor > MAX_ID:
        raise InvalidParameter("last_event_id", f"a message id is at most {MAX_ID}")
    return cursor


def show_data(message: Message) -> tuple[str, bytes]:
    """Media type and text of a message: a JSON string is its characters, anything else is JSON."""
    if message.data[:1] == b'"':
        try:
            return "text/plain", msgspec.json.decode(message.data, type=str).encode()
        except (msgspec.DecodeError, UnicodeError):
            pass  # Published past the nodes, and half a character.
    return "application/json", message.data


def takes_parts(accept: str) -> bool:
    """Whether an answer of several messages, or of none, may be multipart/mixed, by the field Accept."""
    return not accept or not _ANY_PART.isdisjoint(part.partition(";")[0].strip().lower() for part in accept.split(","))


def show_parts(messages: Sequence[Message]) -> tuple[str, bytes]:
    """Media type and body of any number of messages. Lines end as Nchan's client needs it, at LF."""
    boundary = secrets.token_hex(16)  # At random, as data may hold anything.
    parts = []
    for kind, data in map(show_data, messages):
        parts.append(b"--%b\nContent-Type: %b\n\n%b\n" % (boundary.encode(), kind.encode(), data))
    return f"multipart/mixed; boundary={boundary}", b"".join(parts) + b"--%b--\n" % boundary.encode()


def show_answer(answer: Answer, *, parts: bool) -> web.Response:
    """The answer to a long poll. Without `parts` one message at a time, and 408 for none, as Nchan does."""
    messages = [message for message, _ in (answer.messages if parts else answer.messages[:1])]
    whole = len(messages) == len(answer.messages)
    headers = {"Etag": str(answer.next if whole else messages[-1].id + 1)}
    if answer.gap:
        headers[GAP] = "true"
    if len(messages) == 1:
        headers["Content-Type"], body = show_data(messages[0])
        return web.Response(body=body, headers=headers)
    if not messages and answer.closed is not None:
        return web.Response(status=410, headers=headers)
    if not parts:
        return web.Response(status=408, headers=headers)
    headers["Content-Type"], body = show_parts(messages)
    return web.Response(body=body, headers=headers)


def show_frame(message: Message, *, meta: bool) -> str:
    """The message as a WebSocket frame."""
    kind, data = show_data(message)
    text = data.decode()
    return f"id: {message.id + 1}\ncontent-type: {kind}\n\n{text}" if meta else text


class Events:
    """Server-Sent Events. Nchan's client sees those without a name; the others are for who listens to them."""

    content_type = "text/event-stream; charset=utf-8"

    def begin(self) -> bytes:
        return b": hi\n\nretry: %d\n\n" % random.randint(*RETRY_MS)

    def show(self, answer: Answer) -> bytes:
        # All who get the same answer share it.
        shown = answer.rendered.get(Events)
        if shown is None:
            shown = answer.rendered[Events] = self._render(answer)
        return shown

    def _render(self, answer: Answer) -> bytes:
        blocks = [b'event: gap\ndata: {"next":%d}\n\n' % answer.next] if answer.gap else []
        for message, _ in answer.messages:
            # To a browser CR ends a line, too.
            lines = re.split(rb"\r\n|\r|\n", show_data(message)[1])
            blocks.append(b"id: %d\n%b\n" % (message.id + 1, b"".join(b"data: %b\n" % line for line in lines)))
        if answer.closed is not None:
            closed = msgspec.json.encode([show_channel(answer.closed)])
            blocks.append(b'event: closed\ndata: {"closed":%b}\n\n' % closed)
        blocks.append(b": \nid: %d\n\n" % answer.next)
        return b"".join(blocks)

    def fail(self, error: PushUpError) -> bytes:
        return b":%d: %d %b\n\n" % (error.status, error.status, error.title.encode())


class _Mount:
    """The handlers."""

    def __init__(self, service: Service, guests: Guests, path: str) -> None:
        self._service = service
        self._guests = guests
        self._segments = path.count("/")
        self._below = re.compile(rf"(/realms/[^/]+)?{re.escape(path)}(/|\Z)")

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        query = request.rel_url.raw_query_string
        token = find_token(query)
        sender = request[SENDER]
        realm = self._service.find(request.match_info.get("realm", ""), sender, token)
        is_socket = request.headers.get("Upgrade", "").lower() == "websocket"
        is_stream = not is_socket and "text/event-stream" in request.headers.get("Accept", "").lower()

        meet = reader(realm, sender, token)
        try:
            grant = await meet()
            skipped = 1 + self._segments + (2 if "realm" in request.match_info else 0)
            wanted = parse_wanted(request.rel_url.raw_parts[skipped:], query, request.headers, realm.settings)
            if grant is not None:
                realm.admit(grant, wanted.channels)
            follower = Follower(realm, grant, wanted.channels, wanted.start, meet)
            with self._guests.seat(request, sender, grant):
                if is_socket:
                    with self._guests.stream("websocket"):
                        return await _serve_socket(request, realm, follower)
                if is_stream:
                    with self._guests.stream("text/event-stream"):
                        return await stream(request, follower, Events())
                return await _serve_poll(request, realm, grant, wanted)
        except (TooMany, Unavailable) as error:
            if not is_stream:
                raise
            # Any other status would end a browser's EventSource for good.
            self._service.metrics.count_refused(error)
            wait = 1000 * int(error.members["retry_after"]) + random.randint(*RETRY_MS)
            headers = {**HEADERS, **error.headers, "Content-Type": Events.content_type}
            return web.Response(body=b"retry: %d\n\n" % wait + Events().fail(error), headers=headers)

    async def let_pages_in(self, request: web.Request, response: web.StreamResponse) -> None:
        """Name the protocol's own header fields to pages of other origins."""
        if self._below.match(request.rel_url.raw_path):
            for name, more in (("Access-Control-Allow-Headers", ASKED), ("Access-Control-Expose-Headers", TOLD)):
                if name in response.headers:
                    response.headers[name] += f", {more}"


async def _serve_poll(request: web.Request, realm: Realm, grant: Grant | None, wanted: Wanted) -> web.Response:
    # Who asks for what is new is told at once from where on, so that the next poll goes on from there.
    timeout = 0.0 if wanted.start == LATEST else realm.settings.poll_timeout
    answer = await ask(realm, grant, Poll(wanted.channels, wanted.start, MAX_ID, timeout))
    return show_answer(answer, parts=takes_parts(request.headers.get("Accept", "")))


async def _serve_socket(request: web.Request, realm: Realm, follower: Follower) -> web.WebSocketResponse:
    """Write frames until one side closes. A gap cannot be told: a frame that is no message breaks Nchan's client."""
    socket = web.WebSocketResponse(
        protocols=(META,),
        timeout=GOODBYE_S,
        heartbeat=realm.settings.heartbeat,
        compress=False,
        max_msg_size=FRAME_BYTES_MAX,
        writer_limit=0,
    )
    try:
        well_formed = socket.can_prepare(request).ok
    except ValueError:
        well_formed = False
    if not well_formed:
        raise InvalidRequest("the WebSocket handshake is not well-formed")
    answer = await follower.next()  # What is wrong so far is a status.
    await socket.prepare(request)
    writing = asyncio.create_task(_write_frames(socket, follower, answer))
    try:
        async for _ in socket:
            ...
    except ConnectionError:
        pass  # The client is gone.
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    return socket


async def _write_frames(socket: web.WebSocketResponse, follower: Follower, answer: Answer) -> None:
    meta = socket.ws_protocol == META
    code, reason = int(WSCloseCode.GOING_AWAY), ""
    try:
        while True:
            for message, _ in answer.messages:
                await socket.send_str(show_frame(message, meta=meta))
            if follower.is_drained or not follower.channels:
                reason = "" if follower.channels else "410 Gone"
                break
            answer = await follower.next()
    except ConnectionError:
        return  # The client is gone; whoever reads its frames hears of it, too.
    except Unauthorized as error:
        code, reason = TOKEN_REFUSED, error.code
    except PushUpError as error:
        code, reason = WSCloseCode.TRY_AGAIN_LATER, error.code
    except Exception:
        log.exception("a subscriber's WebSocket failed")
        code = WSCloseCode.INTERNAL_ERROR
    await socket.close(code=code, message=reason.encode())
