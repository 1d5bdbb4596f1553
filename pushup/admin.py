"""The admin listener: is the node alive, is it ready, what has it counted."""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from aiohttp import web

from pushup.errors import PushUpError
from pushup.metrics import CONTENT_TYPE, Metrics
from pushup.node import Node
from pushup.problems import problem_response, translate
from pushup.version import __version__

log = logging.getLogger("pushup.admin")

INDEX: Final = """\
PushUp {version}, admin listener

/health/live    200 while the process turns
/health/ready   200 while it is ready for polls, 503 while it is not
/metrics        Prometheus metrics
/nodes          the nodes of this realm, with their load
"""


def make_admin_app(node: Node, metrics: Metrics) -> web.Application:
    """The application behind the admin listener."""

    async def index(request: web.Request) -> web.Response:
        return web.Response(text=INDEX.format(version=__version__))

    async def live(request: web.Request) -> web.Response:
        return _health(True, "the event loop turns")

    async def ready(request: web.Request) -> web.Response:
        return _health(node.ready, node.state)

    async def nodes(request: web.Request) -> web.Response:
        found = await node.broker.nodes()
        return web.Response(
            content_type="application/json",
            body=msgspec.json.encode({"nodes": found}),
            headers={"Cache-Control": "no-store"},
        )

    async def metrics_text(request: web.Request) -> web.Response:
        metrics.parked = node.parked
        metrics.channels = node.watched
        metrics.ready = node.ready
        return web.Response(body=metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application(middlewares=[_say_errors])
    app.router.add_get("/", index)
    app.router.add_get("/health/live", live)
    app.router.add_get("/health/ready", ready)
    app.router.add_get("/metrics", metrics_text)
    app.router.add_get("/nodes", nodes)
    return app


@web.middleware
async def _say_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except PushUpError as error:
        return problem_response(error)
    except web.HTTPException as error:
        response = problem_response(translate(error, request))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except Exception:
        log.exception("a request failed", extra={"method": request.method, "path": request.path})
        return problem_response(PushUpError("something went wrong here; the log says what"))


def _health(good: bool, output: str) -> web.Response:
    return web.Response(
        body=msgspec.json.encode({"status": "pass" if good else "fail", "output": output}),
        status=200 if good else 503,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
