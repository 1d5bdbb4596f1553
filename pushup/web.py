"""The web side: everything that is not a plain poll, served by aiohttp. Complete by itself: it answers polls as well.

`WebConnection` is aiohttp's own connection with three changes: it tells the lane when an answer is out, what it says
about malformed requests is a problem document like every other error, and it says so as soon as they are seen.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any, Final

import msgspec
from aiohttp import StreamReader, web

from pushup.errors import InvalidRequest, PushUpError
from pushup.lane import Lane
from pushup.messages import Answer
from pushup.metrics import Metrics
from pushup.node import Node
from pushup.problems import problem_response, translate
from pushup.wire import (
    is_batch,
    parse_channel_options,
    parse_page,
    parse_poll_body,
    parse_poll_query,
    parse_publication,
    parse_publications,
    parse_renewal,
    parse_segment,
    show_info,
    show_page,
    show_receipt,
)

log = logging.getLogger("pushup.web")

_FOREVER_S: Final = 1e8
"""The keep-alive time of a web connection that a lane looks after."""

_FAILED: Final = "something went wrong here; the log says what"
_NO_HTTP: Final = "the request is not well-formed HTTP"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebConnection(web.RequestHandler):
    """aiohttp's connection, which may be on loan."""

    __slots__ = ("_body", "_for_good", "_lane", "_metrics")

    def __init__(self, manager: web.Server, lane: Lane | None, keepalive_timeout: float, metrics: Metrics) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=keepalive_timeout if lane is None else _FOREVER_S,
            tcp_keepalive=False,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            logger=log,
        )
        self._lane = lane
        self._for_good = lane is None
        self._metrics = metrics
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
        if self._for_good:
            self._for_good = False
            self._metrics.connections_closed += 1

    def resume_reading(self, *args: Any, **kwargs: Any) -> None:
        super().resume_reading(*args, **kwargs)
        if self._lane is not None:
            self._lane.web_reads_on()

    def data_received(self, data: bytes) -> None:
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
        if status >= 500 and not isinstance(exc, UnicodeEncodeError):  # That is aiohttp's echo of an odd Expect header.
            log.error("a request failed", exc_info=exc)
            error = PushUpError(_FAILED)
        else:
            error = InvalidRequest(_NO_HTTP)
        self._metrics.count_refused(error)
        response = problem_response(error)
        response.headers["Server"] = "PushUp"  # Else aiohttp tells its name and version; no hook hides them here.
        response.force_close()
        return response


def make_app(node: Node, settings_body_max: int, metrics: Metrics) -> web.Application:
    """The application behind the public listener."""
    api = _Api(node)

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
        except Exception:
            log.exception("a request failed", extra={"method": request.method, "path": request.path})
            response = refuse(PushUpError(_FAILED))
        response.headers.setdefault("Cache-Control", "no-store")
        if node.draining:
            response.force_close()
        return response

    async def hide_server(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.pop("Server", None)

    app = web.Application(middlewares=[say_errors], client_max_size=settings_body_max)
    app.on_response_prepare.append(hide_server)
    app.router.add_get("/poll", api.poll_query)
    app.router.add_post("/poll", api.poll_body)
    app.router.add_post("/publish", api.publish)
    app.router.add_get("/channels", api.channels)
    app.router.add_post("/channels", api.create)
    app.router.add_get("/channels/{channel:[^/]+}", api.describe)
    app.router.add_delete("/channels/{channel:[^/]+}", api.close)
    app.router.add_post("/channels/{channel:[^/]+}/renew", api.renew)
    app.router.add_get("/openapi.json", api.openapi)
    return app


class _Waiter:
    """A poll that waits on the web side."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def answer(self, answer: Answer) -> None:
        if not self.answered.done():
            self.answered.set_result(answer)

    def fail(self, error: PushUpError) -> None:
        if not self.answered.done():
            self.answered.set_exception(error)


class _Api:
    """The handlers. Each is what DESIGN.md says of its path."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._broker = node.broker
        self._settings = node.settings
        self._openapi = files("pushup").joinpath("openapi.json").read_bytes()

    async def poll_query(self, request: web.Request) -> web.Response:
        return await self._poll(parse_poll_query(request.rel_url.raw_query_string, self._settings))

    async def poll_body(self, request: web.Request) -> web.Response:
        if request.rel_url.raw_query_string:
            raise InvalidRequest("a poll is in the query or in the body, not both")
        return await self._poll(parse_poll_body(await self._body(request), self._settings))

    async def _poll(self, poll: Any) -> web.Response:
        waiter = _Waiter()
        answer = self._node.poll(poll, waiter)
        if not isinstance(answer, Answer):
            subscription = answer
            try:
                answer = await waiter.answered
            except asyncio.CancelledError:
                self._node.leave(subscription)
                raise
        return web.Response(body=answer.body, content_type="application/json")

    async def publish(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        header, *more = request.headers.getall("Idempotency-Key", [None])
        if more:
            raise InvalidRequest("the Idempotency-Key header is given more than once")
        if not is_batch(body):
            receipt = await self._node.publish(parse_publication(body, self._settings, header))
            return _json(show_receipt(receipt), 201)
        if header is not None:
            raise InvalidRequest("an array of publications has a key in each item, not an Idempotency-Key header")
        parsed = parse_publications(body, self._settings)
        results = iter(await self._node.publish_all([item for item in parsed if not isinstance(item, PushUpError)]))
        return _json([show_receipt(item if isinstance(item, PushUpError) else next(results)) for item in parsed])

    async def channels(self, request: web.Request) -> web.Response:
        after, limit = parse_page(request.rel_url.raw_query_string)
        return _json(show_page(await self._broker.channels(after, limit + 1), limit))

    async def create(self, request: web.Request) -> web.Response:
        name, options = parse_channel_options(await self._body(request))
        return _json(show_info(await self._broker.create(name, options)), 201)

    async def renew(self, request: web.Request) -> web.Response:
        ttl = parse_renewal(await self._body(request))
        return _json(show_info(await self._broker.renew(_channel(request), ttl)))

    async def close(self, request: web.Request) -> web.Response:
        await self._broker.close(_channel(request))
        return web.Response(status=204)

    async def describe(self, request: web.Request) -> web.Response:
        return _json(show_info(await self._broker.describe(_channel(request))))

    async def openapi(self, request: web.Request) -> web.Response:
        return web.Response(body=self._openapi, content_type="application/json")

    async def _body(self, request: web.Request) -> bytes:
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise InvalidRequest("a request's body is sent as it is, without a Content-Encoding")
        try:
            async with asyncio.timeout(self._settings.request_timeout):
                return await request.read()
        except TimeoutError:
            raise InvalidRequest("the request's body did not come in time") from None


def _channel(request: web.Request) -> str:
    # Not match_info, which leaves alone what it cannot decode.
    return parse_segment(request.rel_url.raw_parts[2])


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
