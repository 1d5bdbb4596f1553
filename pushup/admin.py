"""The admin listener: is the node alive, is it ready, what has it counted; and the dashboard, for people."""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from aiohttp import web

from pushup.dashboard import make_dashboard
from pushup.errors import NotFound, PushUpError
from pushup.metrics import CONTENT_TYPE
from pushup.problems import problem_response, translate
from pushup.realm import Realm
from pushup.service import Service
from pushup.version import __version__

log = logging.getLogger("pushup.admin")

INDEX: Final = """\
PushUp {version}, admin listener

/               the dashboard, for browsers; this list for everything else
/health/live    200 while the process turns
/health/ready   200 while it is ready for polls, 503 while it is not
/metrics        Prometheus metrics
/nodes          the nodes of the realm, with their load; ?realm=NAME for one of the others
"""


def make_admin_app(service: Service) -> web.Application:
    """The application behind the admin listener."""
    metrics = service.metrics

    async def index(request: web.Request) -> web.StreamResponse:
        if "text/html" in request.headers.get("Accept", "").lower():
            response = await page(request)
        else:
            response = web.Response(text=INDEX.format(version=__version__))
        response.headers["Vary"] = "Accept"
        return response

    async def live(request: web.Request) -> web.Response:
        return _health(True, "the event loop turns")

    async def ready(request: web.Request) -> web.Response:
        # A realm whose server is gone is no reason to send nobody here any more.
        states = [realm.node.state for realm in service.realms.values()]
        return _health("ready" in states, "ready" if "ready" in states else states[0])

    async def nodes(request: web.Request) -> web.Response:
        found = await _find(service, request).node.broker.nodes()
        return web.Response(
            content_type="application/json",
            body=msgspec.json.encode({"nodes": found}),
            headers={"Cache-Control": "no-store"},
        )

    async def metrics_text(request: web.Request) -> web.Response:
        for realm in service.realms.values():
            counted = realm.node.metrics
            counted.parked = realm.node.parked
            counted.channels = realm.node.watched
            counted.ready = realm.node.ready
        return web.Response(body=metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application(middlewares=[_say_errors], client_max_size=service.settings.body_bytes_max)
    page = make_dashboard(app, service)
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


def _find(service: Service, request: web.Request) -> Realm:
    name = request.query.get("realm", service.settings.realm)
    if name not in service.realms:
        raise NotFound(f"this node does not serve a realm {name[:64]!r}")
    return service.realms[name]


def _health(good: bool, output: str) -> web.Response:
    return web.Response(
        body=msgspec.json.encode({"status": "pass" if good else "fail", "output": output}),
        status=200 if good else 503,
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
