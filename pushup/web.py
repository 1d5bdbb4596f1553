"""The web side: everything that is not a plain poll, served by aiohttp. Complete by itself: it answers polls as well.

`WebConnection` is aiohttp's own connection with three changes: it tells the lane when an answer is out, what it says
about malformed requests is a problem document like every other error, and it says so as soon as they are seen.
"""

import asyncio
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable
from importlib.resources import files
from time import time
from typing import Any, Final

import msgspec
from aiohttp import ETag, HttpVersion10, HttpVersion11, StreamReader, web

from pushup.access import Grant
from pushup.errors import InvalidRequest, OriginNotAllowed, PushUpError, RequestTimeout, TooLarge, TooMany, Unavailable
from pushup.lane import BODY_TOO_LATE, Lane, Lanes, abort
from pushup.messages import Poll
from pushup.origins import NOT_ALLOWED
from pushup.problems import BODY_TOO_LARGE, problem_response, translate
from pushup.publishing import read_order
from pushup.realm import Realm
from pushup.service import Seat, Service
from pushup.streams import (
    GUESTS,
    RETRY_MS,
    SENDER,
    EventStream,
    Follower,
    Form,
    Guests,
    JsonLines,
    Socket,
    ask,
    reader,
    stream,
)
from pushup.wire import (
    find_token,
    parse_channel_options,
    parse_page,
    parse_poll_body,
    parse_poll_query,
    parse_renewal,
    parse_segment,
    parse_stream_query,
    parse_token_query,
    show_info,
    show_page,
)

log = logging.getLogger("pushup.web")

_FOREVER_S: Final = 1e8
"""The keep-alive time of a web connection that a lane looks after."""

_FAILED: Final = "something went wrong here; the log says what"
_NO_HTTP: Final = "the request is not well-formed HTTP"

_LINGERING_S: Final = 2.0
"""How long the rest of a body is read that nobody wanted, so that the client sees its answer."""

_VERSIONS: Final = (HttpVersion10, HttpVersion11)
_SAFE: Final = frozenset(("GET", "HEAD", "OPTIONS"))

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebConnection(web.RequestHandler):
    """aiohttp's connection, which may be on loan."""

    __slots__ = ("_body", "_lane", "_lanes", "_metrics", "_owned", "_stuck_since")

    def __init__(self, manager: web.Server, lanes: Lanes, lane: Lane, *, for_good: bool) -> None:
        settings = lanes.settings
        super().__init__(
            manager,
            loop=lanes.loop,
            keepalive_timeout=settings.keepalive_timeout if for_good else _FOREVER_S,
            max_line_size=settings.head_bytes_max,
            max_field_size=settings.head_bytes_max,
            lingering_time=_LINGERING_S,
            tcp_keepalive=False,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            logger=log,
        )
        self._lanes = lanes
        self._lane = None if for_good else lane
        """Who lends the connection."""
        self._owned = lane if for_good else None
        """Whose connection it was, if it was handed over."""
        self._metrics = lanes.metrics
        self._stuck_since: float | None = None
        """When the client ceased to read."""
        self._body: StreamReader | None = None
        """That of the last request."""

    def release(self) -> None:
        """End, without closing the transport, which goes on being read."""
        self._lane = None
        transport, self.transport = self.transport, None
        self.connection_lost(None)
        if transport is not None:
            transport.resume_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self._owned is not None:
            self._lanes.handed_over.pop(self._owned, None)
            self._lanes.has_read(self)
            self._owned.forget_client()
        # No cycles: collecting the garbage of thousands of connections would hold up all others.
        self._owned = self._lane = self._body = None

    def lateness(self, idle_since: float, slow_since: float, unread_since: float) -> str:
        return "unread" if self._stuck_since is not None and self._stuck_since < unread_since else ""

    @property
    def gone(self) -> bool:
        return self.transport is None

    def abort(self) -> None:
        if self.transport is not None:
            abort(self.transport)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._owned is not None and self.transport is not None:
            self._stuck_since = self._lanes.loop.time()
            self._lanes.leaves_unread(self, self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stuck_since = None
        if self._owned is not None:
            self._lanes.has_read(self)

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        # A body that turned out malformed after its request was answered is nothing that an operator has to know.
        if not isinstance(kwargs.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kwargs)

    def resume_reading(self, *args: Any, **kwargs: Any) -> None:
        super().resume_reading(*args, **kwargs)
        if self._lane is not None:
            self._lane.web_reads_on()

    def data_received(self, data: bytes) -> None:
        done = self._owned is not None and self._body is not None and self._body.is_eof()
        if done and self._payload_parser is None:
            return  # It was the last request of its connection. aiohttp would keep whatever comes behind it.
        super().data_received(data)
        if self._messages:
            body, self._body = self._body, self._messages[-1][1]
            if body is not None and body is not self._body and not body.is_eof():
                # What came behind a body that has not ended is the parser's complaint about it. aiohttp would wait on.
                body.set_exception(web.RequestPayloadError())
                body.feed_eof()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):
            # Raised where no middleware is: the client expects something unheard of, and may hold its body back.
            error = InvalidRequest(resp.text or resp.reason)
            self._metrics.count_refused(error)
            resp = problem_response(error)
            resp.force_close()
        if _is_last(request):
            resp.force_close()
        if request.version not in _VERSIONS:
            # The answer's first line repeats it, from where aiohttp remembers it.
            request._version = request._cache["version"] = HttpVersion11
        self._metrics.requests_web += 1
        resp, reset = await super().finish_response(request, resp, start_time)
        if self._lane is not None:
            self._lane.web_answered(bool(resp.keep_alive) and not reset)
        return resp, reset

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """A problem document for what never reached a handler, and the end of the connection."""
        error: PushUpError
        if isinstance(exc, ConnectionError):
            error = InvalidRequest("the client is gone")  # Nobody reads this.
        elif status >= 500 and not isinstance(exc, UnicodeEncodeError):  # That is aiohttp's echo of an odd Expect.
            log.error("a request failed", exc_info=exc)
            error = PushUpError(_FAILED)
        else:
            error = InvalidRequest(_NO_HTTP)
        self._metrics.count_refused(error)
        response = problem_response(error)
        response.headers["Server"] = "PushUp"  # Else aiohttp tells its name and version; no hook hides them here.
        response.force_close()
        return response


def make_app(service: Service) -> web.Application:
    """The application behind the public listener."""
    guests = Guests(service)
    api = _Api(service, guests)
    metrics = service.metrics

    def refuse(error: PushUpError) -> web.Response:
        metrics.count_refused(error)
        return problem_response(error)

    @web.middleware
    async def say_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        response: web.StreamResponse
        try:
            response = await handler(request)
        except PushUpError as error:
            response = refuse(error)
        except web.HTTPException as error:
            response = refuse(translate(error, request))
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except web.RequestPayloadError:
            response = refuse(InvalidRequest(_NO_HTTP))
            response.force_close()
        except ConnectionError:
            raise  # The client is gone in the middle of its answer, which is no failure here.
        except Exception:
            log.exception("a request failed", extra={"method": request.method, "path": request.path})
            response = refuse(PushUpError(_FAILED))
        response.headers.setdefault("Cache-Control", "no-store")
        if service.closing or service.root.node.draining:
            response.force_close()
        return response

    @web.middleware
    async def check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
        """What a page of another origin may do here: what the settings say."""
        if request.version not in _VERSIONS:
            raise InvalidRequest("HTTP is spoken here in the versions 1.0 and 1.1")
        if request.version == HttpVersion10 and "Transfer-Encoding" in request.headers:
            raise InvalidRequest("HTTP/1.0 has no Transfer-Encoding")
        sender = request[SENDER] = service.sender([(name.lower(), value) for name, value in request.raw_headers])
        origin = request.headers.get("Origin")
        if request.method == "OPTIONS" and origin is not None and "Access-Control-Request-Method" in request.headers:
            headers = service.origins.preflight(origin)
            if headers is not None:
                return web.Response(status=204, headers=headers)
        changes = request.method not in _SAFE or request.headers.get("Upgrade", "").lower() == "websocket"
        if sender.foreign and changes:
            raise OriginNotAllowed(NOT_ALLOWED)
        return await handler(request)

    async def finish_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.pop("Server", None)
        sender = request.get(SENDER)
        if sender is not None and request.method != "OPTIONS":
            response.headers.update(sender.cors)

    app = web.Application(middlewares=[say_errors, check_origin], client_max_size=service.settings.body_bytes_max)
    app.on_response_prepare.append(finish_headers)
    app[GUESTS] = guests
    app.on_shutdown.append(guests.end)
    for realm in ("", "/realms/{realm:[^/]+}"):
        app.router.add_get(f"{realm}/poll", api.poll_query)
        app.router.add_post(f"{realm}/poll", api.poll_body)
        app.router.add_get(f"{realm}/events", api.events)
        app.router.add_get(f"{realm}/stream", api.lines)
        app.router.add_get(f"{realm}/ws", api.socket, allow_head=False)
        app.router.add_post(f"{realm}/publish", api.publish)
        app.router.add_get(f"{realm}/channels", api.channels)
        app.router.add_post(f"{realm}/channels", api.create)
        app.router.add_get(f"{realm}/channels/{{channel:[^/]+}}", api.describe)
        app.router.add_delete(f"{realm}/channels/{{channel:[^/]+}}", api.close)
        app.router.add_post(f"{realm}/channels/{{channel:[^/]+}}/renew", api.renew)
    app.router.add_get("/openapi.json", api.openapi)
    app.router.add_get("/pushup.js", api.script)
    return app


def _is_last(request: web.BaseRequest) -> bool:
    """Whether it is one of those that the lane does not frame: nothing may come behind it, so nothing hides there."""
    headers = request.headers
    return (
        "Transfer-Encoding" in headers
        or request.method == "CONNECT"
        or any(name.lower() == "upgrade" and "websocket" in value.lower() for name, value in headers.items())
        or request.version not in _VERSIONS
        or ("Host" not in headers and request.version == HttpVersion11)
    )


class _Api:
    """The handlers. Each is what DESIGN.md says of its path."""

    def __init__(self, service: Service, guests: Guests) -> None:
        self._service = service
        self._guests = guests
        self._openapi = files("pushup").joinpath("openapi.json").read_bytes()
        self._script = files("pushup").joinpath("js", "pushup.js").read_bytes()
        self._script_tag = ETag(hashlib.sha256(self._script).hexdigest()[:32])

    async def poll_query(self, request: web.Request) -> web.Response:
        query = request.rel_url.raw_query_string
        token = find_token(query)
        realm, grant = await self._let_in(request, token)
        return await self._poll(request, realm, grant, parse_poll_query(query, realm.settings))

    async def poll_body(self, request: web.Request) -> web.Response:
        if request.rel_url.raw_query_string:
            raise InvalidRequest("a poll is in the query or in the body, not both")
        realm, grant = await self._let_in(request, None)
        return await self._poll(request, realm, grant, parse_poll_body(await self._body(request), realm.settings))

    async def _let_in(self, request: web.Request, token: str | None) -> tuple[Realm, Grant | None]:
        """The realm of a poll; and what the sender may do there, where that matters."""
        realm = self._realm(request, token)
        return realm, None if realm.open_to_read else await realm.meet(request[SENDER], token, time())

    async def _poll(self, request: web.Request, realm: Realm, grant: Grant | None, poll: Poll) -> web.Response:
        if grant is not None:
            realm.admit(grant, poll.channels)
        with self._guests.seat(request, request[SENDER], grant):
            answer = await ask(realm, grant, poll)
        return web.Response(body=answer.body, content_type="application/json")

    async def events(self, request: web.Request) -> web.StreamResponse:
        last = request.headers.get("Last-Event-ID")
        try:
            return await self._stream(request, EventStream(), last)
        except (TooMany, Unavailable) as error:
            if not last:
                raise
            # A browser that comes back takes any status but 200 for the end.
            self._service.metrics.count_refused(error)
            seconds = error.members["retry_after"]
            body = b"retry: %d\n\n" % (1000 * seconds + random.randint(*RETRY_MS))
            return web.Response(body=body, content_type=EventStream.content_type, headers={"Retry-After": str(seconds)})

    async def lines(self, request: web.Request) -> web.StreamResponse:
        return await self._stream(request, JsonLines(), None)

    async def _stream(self, request: web.Request, form: Form, last: str | None) -> web.StreamResponse:
        query = request.rel_url.raw_query_string
        realm, grant = await self._let_in(request, find_token(query))
        poll = parse_stream_query(query, last, realm.settings)
        if grant is not None:
            realm.admit(grant, poll.channels)
        with self._guests.seat(request, request[SENDER], grant), self._guests.stream(form.content_type):
            meet = reader(realm, request[SENDER], find_token(query))
            return await stream(request, Follower(realm, grant, poll.channels, poll.start, meet), form)

    async def socket(self, request: web.Request) -> web.StreamResponse:
        query = request.rel_url.raw_query_string
        token = find_token(query)
        realm, _ = await self._let_in(request, token)
        parse_token_query(query)
        sender = request[SENDER]
        peers = self._service.peers
        socket = Socket(
            realm,
            reader=reader(realm, sender, token),
            writer=lambda: realm.meet(sender, token, time()),
            seat=lambda grant: Seat(peers, grant, None),
        )
        if not socket.can_serve(request):
            raise InvalidRequest("this path speaks WebSocket")
        self._guests.sockets.add(socket)
        try:
            with self._guests.seat(request, sender, None), self._guests.stream("websocket"):
                return await socket.run(request)
        finally:
            self._guests.sockets.discard(socket)

    async def publish(self, request: web.Request) -> web.Response:
        realm, grant = await self._enter(request)
        body = await self._body(request)
        order = read_order(realm, grant, body, request.headers.getall("Idempotency-Key", []))
        text = order.show(await realm.node.publish_all(order.publications))
        return web.Response(body=text, status=order.status, content_type="application/json")

    async def channels(self, request: web.Request) -> web.Response:
        realm, grant = await self._enter(request)
        grant.check_all("manage")
        after, limit = parse_page(request.rel_url.raw_query_string)
        return _json(show_page(await realm.node.broker.channels(after, limit + 1), limit))

    async def create(self, request: web.Request) -> web.Response:
        realm, grant = await self._enter(request)
        name, options = parse_channel_options(await self._body(request))
        if name is None:
            grant.check_all("manage")
        else:
            grant.check("manage", [name])
        return _json(show_info(await realm.node.broker.create(name, options)), 201)

    async def renew(self, request: web.Request) -> web.Response:
        realm, channel = await self._manage(request)
        ttl = parse_renewal(await self._body(request))
        return _json(show_info(await realm.node.broker.renew(channel, ttl)))

    async def close(self, request: web.Request) -> web.Response:
        realm, channel = await self._manage(request)
        await realm.node.broker.close(channel)
        return web.Response(status=204)

    async def describe(self, request: web.Request) -> web.Response:
        realm, channel = await self._manage(request)
        return _json(show_info(await realm.node.broker.describe(channel)))

    async def openapi(self, request: web.Request) -> web.Response:
        return web.Response(body=self._openapi, content_type="application/json")

    async def script(self, request: web.Request) -> web.Response:
        """The client for browsers. Any page may load it: it is nobody's secret, and modules need CORS."""
        headers = {
            "Access-Control-Allow-Origin": "*",
            "Cache-Control": "no-cache",
            "Cross-Origin-Resource-Policy": "cross-origin",
            "X-Content-Type-Options": "nosniff",
        }
        known = request.if_none_match or ()
        if any(tag.value in (self._script_tag.value, "*") for tag in known):
            response = web.Response(status=304, headers=headers)
        else:
            response = web.Response(body=self._script, content_type="text/javascript", charset="utf-8", headers=headers)
        response.etag = self._script_tag
        return response

    def _realm(self, request: web.Request, token: str | None = None) -> Realm:
        return self._service.find(request.match_info.get("realm", ""), request[SENDER], token)

    async def _enter(self, request: web.Request) -> tuple[Realm, Grant]:
        """The realm, and what the sender may do there."""
        realm = self._realm(request)
        return realm, await realm.meet(request[SENDER], None, time())

    async def _manage(self, request: web.Request) -> tuple[Realm, str]:
        """The realm and the channel in the path, if the sender may manage it."""
        realm, grant = await self._enter(request)
        # Not match_info, which leaves alone what it cannot decode.
        channel = parse_segment(request.rel_url.raw_parts[4 if "realm" in request.match_info else 2])
        grant.check("manage", [channel])
        return realm, channel

    async def _body(self, request: web.Request) -> bytes:
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise InvalidRequest("a request's body is sent as it is, without a Content-Encoding")
        if (request.content_length or 0) > self._service.settings.body_bytes_max:
            raise TooLarge(BODY_TOO_LARGE)
        try:
            async with asyncio.timeout(self._service.settings.request_timeout):
                return await request.read()
        except TimeoutError:
            raise RequestTimeout(BODY_TOO_LATE) from None


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
