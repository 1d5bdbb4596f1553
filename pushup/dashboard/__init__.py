"""The dashboard: what a node does, as a page on the admin listener, fed by PushUp itself.

A realm of its own, in this process and served to nobody else, has channels for every realm that the node serves:

* `live:REALM`: the node's figures, every second while somebody looks,
* `history:REALM`: the same figures, every five seconds, for an hour,
* `tables:REALM`: nodes and busy channels, every second while somebody looks.

The page polls all three with one cursor. Figures that belong to two of them are one message, so they come once.
Counters are as they stand, since the node began; the page makes rates of them.
"""

import asyncio
import logging
import math
import os
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

from pushup.address import parse_address
from pushup.errors import (
    Forbidden,
    InvalidParameter,
    InvalidRequest,
    NotFound,
    OriginNotAllowed,
    PushUpError,
    Unavailable,
)
from pushup.memory import MemoryBroker
from pushup.messages import Answer, ChannelInfo, ChannelOptions, Poll, Publication, Retention, show_channel
from pushup.metrics import LAG_BUCKETS_S, Histogram, Metrics
from pushup.node import Node
from pushup.realm import Realm
from pushup.service import Service
from pushup.settings import Settings
from pushup.streams import ask
from pushup.wire import parse_poll_query, parse_publication, show_receipt

log = logging.getLogger("pushup.dashboard")

SAMPLE_S: Final = 1.0
HISTORY_EVERY: Final = 5
"""So many samples make one of the history."""
HISTORY_S: Final = 3600.0
LIVE_S: Final = 120.0
TABLES_S: Final = 15.0
WATCHED_S: Final = 10.0
"""So long after the last poll somebody still looks."""
FOREVER_S: Final = 1e9

BUSIEST: Final = 10
PEAK_S: Final = 5.0
"""A channel's polls are the most there were in so long, as all of them are away for a moment after each message."""
CHANNELS_LISTED: Final = 500
"""So many channels, by name, are asked of the broker; busy ones are found among them and those polled here."""
LIST_EVERY_S: Final = 2.0
LIST_SHARE: Final = 0.02
"""At most this share of the time the broker is busy with that."""
CHANNELS_PER_S: Final = 10_000
"""A node that watches more channels than this is looked through less often than every second."""

_TYPES: Final = {
    "index.html": "text/html; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml; charset=utf-8",
}

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Only this server's files and requests; nothing inline, no frame around it, and no text that becomes HTML."""

_PORT: Final = re.compile(r":[0-9]*\Z")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Feed:
    """Samples of what the node does, one realm after the other, kept where the page polls for them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        retention = Retention(ttl=FOREVER_S, window=HISTORY_S, max_messages=int(HISTORY_S / HISTORY_EVERY))
        settings = Settings(realm="dashboard", name=service.settings.name)
        self._own = Realm(Node(MemoryBroker(retention), settings, Metrics()), None)
        self._looked_at: dict[str, float] = {}
        """When somebody last polled for a realm, on the loop's clock."""
        self._sampled_at: dict[str, float] = {}
        self._tables: dict[str, _Tables] = {}
        self.listing: dict[str, asyncio.Task[None]] = {}
        """Whose tables are being made, by realm."""
        self._sampler: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin with the history."""
        await self._own.node.start()
        for name in self._service.realms:
            for kind, window in (("live", LIVE_S), ("tables", TABLES_S)):
                await self._own.node.broker.create(f"{kind}:{name}", ChannelOptions(window=window))
        self._sampler = asyncio.create_task(self._sample_on())

    async def end(self) -> None:
        """Answer whoever waits."""
        await self._own.node.drain(0)

    async def stop(self) -> None:
        """Let go of everything."""
        tasks = [task for task in (self._sampler, *self.listing.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._own.stop()

    async def poll(self, realm: Realm, poll: Poll) -> Answer:
        """Wait for a realm's samples, in the range of `poll`. A first look does not wait for the next second."""
        if self._own.node.draining:
            raise Unavailable("the node is going away")
        name = realm.settings.realm
        now = asyncio.get_running_loop().time()
        self.look(realm, now)
        if now - self._sampled_at.get(name, -math.inf) >= SAMPLE_S:
            await self._sample(realm, now, history=False)
        channels = (f"live:{name}", f"history:{name}", f"tables:{name}")
        try:
            return await ask(self._own, None, Poll(channels, poll.start, poll.end, poll.timeout))
        finally:
            self.look(realm, asyncio.get_running_loop().time())

    async def _sample_on(self) -> None:
        loop = asyncio.get_running_loop()
        due, count = loop.time(), 0
        while True:
            now = loop.time()
            await self.sample_due(now, count)
            count += 1
            due = max(due + SAMPLE_S, now)
            await asyncio.sleep(due - now)

    async def sample_due(self, now: float, count: int) -> None:
        """The samples of this second, the `count`th: of realms that somebody looks at, and now and then of all."""
        for name, realm in self._service.realms.items():
            history = count % HISTORY_EVERY == 0
            if realm.node.state != "starting" and (history or self._is_watched(name, now)):
                try:
                    await self._sample(realm, now, history)
                except Exception:
                    log.exception("a sample failed", extra={"realm": name})

    def look(self, realm: Realm, now: float) -> None:
        """Somebody looks at this realm."""
        self._looked_at[realm.settings.realm] = now

    def _is_watched(self, name: str, now: float) -> bool:
        return now - self._looked_at.get(name, -math.inf) < WATCHED_S

    async def _sample(self, realm: Realm, now: float, history: bool) -> None:
        name = realm.settings.realm
        watched = self._is_watched(name, now)
        channels = [f"history:{name}"] if history else []
        if watched:
            channels.append(f"live:{name}")
            self._sampled_at[name] = now
        data = msgspec.json.encode(figures(realm, self._service.metrics))
        await self._own.node.publish(Publication(tuple(channels), data))
        if watched and name not in self.listing and not self._service.closing:
            # A task: the broker may take its time, or be gone.
            task = self.listing[name] = asyncio.create_task(self._list(realm, now))
            task.add_done_callback(lambda _: self.listing.pop(name, None))

    async def _list(self, realm: Realm, now: float) -> None:
        name = realm.settings.realm
        tables = self._tables.setdefault(name, _Tables(self._service, realm))
        try:
            data = msgspec.json.encode(await tables.show(now))
        except Exception:
            log.exception("cannot list nodes and channels", extra={"realm": name})
            return
        await self._own.node.publish(Publication((f"tables:{name}",), data))


class _Tables:
    """What a sample says beside the figures of a realm: its nodes and its busiest channels."""

    def __init__(self, service: Service, realm: Realm) -> None:
        self._service = service
        self._realm = realm
        self._listed: Sequence[ChannelInfo] = ()
        self._looks: deque[tuple[float, list[tuple[str, int, int]]]] = deque()
        """The busiest channels of this node at the latest moments."""
        self._list_at = 0.0
        self._look_at = 0.0

    async def show(self, now: float) -> dict[str, Any]:
        """As JSON shows them. `now` is of any steady clock. O(channels watched here), at times."""
        node = self._realm.node
        trouble = None
        nodes: Sequence[Any] = ()
        try:
            nodes = await node.broker.nodes()
            if now >= self._list_at:
                began = time.monotonic()
                self._listed = await node.broker.channels("", CHANNELS_LISTED)
                self._list_at = now + max(LIST_EVERY_S, (time.monotonic() - began) / LIST_SHARE)
        except PushUpError as error:
            trouble = error.detail
        if now >= self._look_at:
            self._look_at = now + node.watched / CHANNELS_PER_S
            self._looks.append((now, node.busiest(BUSIEST)))
        while len(self._looks) > 1 and self._looks[0][0] < now - PEAK_S:
            self._looks.popleft()
        return {
            "node": self._service.settings.name,
            "broker": node.broker.name,
            "realms": list(self._service.realms),
            "bounds": LAG_BUCKETS_S,
            "nodes": nodes,
            "trouble": trouble,
            "channels": rank([found for _, here in self._looks for found in here], self._listed),
            "listed": len(self._listed),
            "more": len(self._listed) == CHANNELS_LISTED,
        }


def rank(here: Iterable[tuple[str, int, int]], listed: Iterable[ChannelInfo]) -> list[dict[str, Any]]:
    """The busiest channels, as JSON shows them: those with the most polls here, then those with the most messages.

    `here` are names with polls and messages, the latest last, `listed` what the broker says of messages, which wins.
    """
    polls: dict[str, int] = {}
    messages: dict[str, int] = {}
    last: dict[str, int | None] = {}
    for name, parked, kept in here:
        polls[name] = max(parked, polls.get(name, 0))
        messages[name] = kept
    for info in listed:
        messages[info.channel] = info.messages
        last[info.channel] = info.last
    names = sorted(messages, key=lambda name: (-polls.get(name, 0), -messages[name], name))
    by_messages = sorted(messages, key=lambda name: (-messages[name], name))[: BUSIEST // 2]
    chosen = names[:BUSIEST]
    missing = [name for name in by_messages if name not in chosen]
    chosen = chosen[: BUSIEST - len(missing)] + missing
    return [
        {
            "channel": show_channel(name),
            "parked": polls.get(name, 0),
            "messages": messages[name],
            "last": last.get(name),
        }
        for name in chosen
        if polls.get(name, 0) or messages[name]
    ]


def figures(realm: Realm, process: Metrics) -> dict[str, Any]:
    """The node's counters as they stand, as JSON shows them."""
    node, counted = realm.node, realm.node.metrics
    about = node.about()
    return {
        "started": about.started,
        "version": about.version,
        "state": about.state,
        "parked": about.parked,
        "watched": about.channels,
        "connections": about.connections,
        "opened": process.connections_opened,
        "publications": about.publications,
        "deliveries": about.deliveries,
        "duplicates": counted.publications_duplicate,
        "unstored": counted.publications_refused,
        "ends": counted.answers,
        "lag": _counts(counted.lag),
        "loop": _counts(process.loop_lag),
        "loop_sum": round(process.loop_lag.sum, 6),
        "refused": {code: count for code, count in process.refused.items() if count},
        "cut": {reason: count for reason, count in process.connections_cut.items() if count},
        "lane": process.requests_lane,
        "web": process.requests_web,
        "read_errors": counted.broker_read_errors,
        "doubts": counted.broker_doubts,
        "cpu": round(time.process_time(), 3),
        "memory": _resident(),
    }


def _counts(histogram: Histogram) -> list[int]:
    """Cumulative, by the bounds of LAG_BUCKETS_S and infinity."""
    return [int(count) for _, count in histogram.buckets()]


def _resident() -> int | None:
    """Bytes of memory in use, where the system says so (Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def make_dashboard(app: web.Application, service: Service) -> Handler:
    """Serve the dashboard's parts and requests under `/dashboard/`; returns what serves the page itself."""
    feed = Feed(service)
    listen_host = parse_address(service.settings.admin_listen).host

    def guarded(handler: Handler) -> Handler:
        async def guard(request: web.Request) -> web.StreamResponse:
            check_caller(request, listen_host)
            response = await handler(request)
            response.headers.update({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
            return response

        return guard

    async def poll(request: web.Request) -> web.Response:
        realm, query = _realm(service, request)
        if "channel" in request.query:
            raise InvalidParameter("channel", "'channel' is not a parameter of a poll for the dashboard's figures")
        return _json((await feed.poll(realm, parse_poll_query(f"channel=figures&{query}", realm.settings))).body)

    async def listen(request: web.Request) -> web.Response:
        realm, query = _realm(service, request)
        poll = parse_poll_query(query, realm.settings)
        if realm.node.draining:
            raise Unavailable("the node is going away")
        return _json((await ask(realm, None, poll)).body)

    async def publish(request: web.Request) -> web.Response:
        realm, query = _realm(service, request)
        if query:
            raise InvalidRequest("a publication is in the body; the query has the realm only")
        if request.content_type != "application/json":
            raise InvalidRequest("what is published here comes with Content-Type: application/json")
        publication = parse_publication(await request.read(), realm.settings)
        return _json(msgspec.json.encode(show_receipt(await realm.node.publish(publication))), 201)

    async def begin(app: web.Application) -> None:
        await feed.start()

    async def end(app: web.Application) -> None:
        await feed.end()

    async def stop(app: web.Application) -> None:
        await feed.stop()

    for name in _TYPES:
        if name != "index.html":
            app.router.add_get(f"/dashboard/{name}", _serve(name))
    app.router.add_get("/dashboard/poll", guarded(poll))
    app.router.add_get("/dashboard/listen", guarded(listen))
    app.router.add_post("/dashboard/publish", guarded(publish))
    app.on_startup.append(begin)
    app.on_shutdown.append(end)
    app.on_cleanup.append(stop)
    return _serve("index.html")


def check_caller(request: web.Request, listen_host: str) -> None:
    """Let no page of another origin in, also none whose host name was made to lead here. Raises Forbidden.

    A browser says where a page is from; the name by which this listener is called must be an address, localhost or the
    one it was told to listen on, as only those cannot be somebody else's.
    """
    host = request.headers.get("Host", "").lower()
    try:
        name = parse_address(host if _PORT.search(host) else f"{host}:80").host
    except ValueError:
        name = ""
    if host[:1] in ("", ":") or not (name and (name in ("localhost", listen_host.lower()) or _is_address(name))):
        raise Forbidden(
            f"the dashboard is not called {host[:100]!r}: use an address or localhost, or name the host in admin_listen"
        )
    origin = request.headers.get("Origin")
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    if (origin is not None and origin.partition("://")[2] != host) or site not in ("same-origin", "none"):
        raise OriginNotAllowed("pages of other origins may not use the dashboard")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _realm(service: Service, request: web.Request) -> tuple[Realm, str]:
    """The realm that the query names, else that of the root; and the rest of the query."""
    name = request.query.get("realm", service.settings.realm)
    if name not in service.realms:
        raise NotFound(f"this node does not serve a realm {name[:64]!r}")
    pairs = request.rel_url.raw_query_string.split("&")
    return service.realms[name], "&".join(pair for pair in pairs if pair.partition("=")[0] != "realm")


def _serve(name: str) -> Handler:
    body = files("pushup.dashboard").joinpath(name).read_bytes()
    headers = {**HEADERS, "Content-Type": _TYPES[name]}

    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body, headers=headers)

    return handler


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")
