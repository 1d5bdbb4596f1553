"""The admin listener: health, metrics, and errors like everywhere else."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pushup import __version__
from tests.support import Client, connected, parked, running


async def metric(client: Client, name: str) -> float:
    text = (await client.get("/metrics")).body.decode()
    (value,) = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    ]
    return value


async def test_the_index_says_what_there_is() -> None:
    """Each path that it names is answered."""
    async with running() as server, connected(server, admin=True) as client:
        index = await client.get("/")
        paths = [line.split()[0] for line in index.body.decode().splitlines() if line.startswith("/")]

        assert index.status == 200
        assert index.headers["content-type"] == "text/plain; charset=utf-8"
        assert index.body.decode().splitlines()[0] == f"PushUp {__version__}, admin listener"
        assert paths == ["/", "/health/live", "/health/ready", "/metrics", "/nodes"]
        for path in paths:
            assert (await client.get(path)).status == 200


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "text/plain"),
        ("*/*", "text/plain"),
        ("text/plain", "text/plain"),
        ("application/json", "text/plain"),
        ("text/html", "text/html"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html"),
        ("Text/HTML", "text/html"),
    ],
)
async def test_browsers_get_the_dashboard_there(accept: str | None, kind: str) -> None:
    """Whoever asks for HTML; curl and everything else gets the list."""
    async with running() as server, connected(server, admin=True) as client:
        reply = await client.request("GET", "/", headers=f"Accept: {accept}\r\n" if accept else "")

        assert (reply.status, reply.headers["vary"]) == (200, "Accept")
        assert reply.headers["content-type"] == f"{kind}; charset=utf-8"
        assert reply.body.startswith(b"<!doctype html>" if kind == "text/html" else b"PushUp ")


async def test_a_scraper_may_call_the_listener_by_any_name() -> None:
    """Health, metrics and nodes are for programs, which know it by the name of a service."""
    async with running() as server, connected(server, admin=True) as client:
        for path in ("/health/live", "/health/ready", "/metrics", "/nodes"):
            client.send(f"GET {path} HTTP/1.1\r\nHost: node-1.push.svc:8081\r\n\r\n")
            assert (await client.reply()).status == 200


@pytest.mark.parametrize(("path", "output"), [("/health/live", "the event loop turns"), ("/health/ready", "ready")])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health(method: str, path: str, output: str) -> None:
    """200 and the word `pass`, never cached."""
    async with running() as server, connected(server, admin=True) as client:
        reply = await client.request(method, path)

        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["cache-control"] == "no-store"
        if method == "GET":
            assert reply.json == {"status": "pass", "output": output}


async def test_health_while_draining() -> None:
    """The process still lives, and is no longer ready, from the first moment of the drain to its end."""
    async with running() as server, connected(server) as poller, connected(server, admin=True) as client:
        poller.send("GET /poll?channel=news HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)
        draining = asyncio.create_task(server.node.drain(0.1))
        await asyncio.sleep(0)

        ready, live = await client.get("/health/ready"), await client.get("/health/live")

        assert (ready.status, ready.json) == (503, {"status": "fail", "output": "draining"})
        assert ready.headers["cache-control"] == "no-store"
        assert (live.status, live.json["status"]) == (200, "pass")
        await draining
        assert (await client.get("/health/ready")).status == 503


async def test_health_before_the_broker_is_there() -> None:
    """A node that has not started says so."""
    async with running() as server, connected(server, admin=True) as client:
        server.node._started = False

        reply = await client.get("/health/ready")

        assert (reply.status, reply.json) == (503, {"status": "fail", "output": "starting"})


async def test_metrics_are_of_this_moment() -> None:
    """What is parked, watched and open now, in the text format of Prometheus."""
    async with running() as server, connected(server) as poller, connected(server, admin=True) as client:
        poller.send("GET /poll?channel=a&channel=b HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)

        reply = await client.get("/metrics")

        assert reply.status == 200
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert await metric(client, "pushup_parked_polls") == 1
        assert await metric(client, "pushup_watched_channels") == 2
        assert await metric(client, "pushup_open_connections") == 1
        assert await metric(client, "pushup_ready") == 1
        await server.node.drain(0)
        assert await metric(client, "pushup_parked_polls") == 0
        assert await metric(client, "pushup_ready") == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "detail", "allow"),
    [
        ("GET", "/nowhere", 404, "not_found", "there is nothing at /nowhere", None),
        ("GET", "/metrics/", 404, "not_found", "there is nothing at /metrics/", None),
        ("GET", "/poll?channel=a", 404, "not_found", "there is nothing at /poll", None),
        ("POST", "/metrics", 405, "method_not_allowed", "/metrics does not take POST", {"GET", "HEAD"}),
        ("DELETE", "/", 405, "method_not_allowed", "/ does not take DELETE", {"GET", "HEAD"}),
    ],
)
async def test_errors(method: str, path: str, status: int, code: str, detail: str, allow: set[str] | None) -> None:
    """Problem documents, as on the public listener."""
    async with running() as server, connected(server, admin=True) as client:
        reply = await client.request(method, path)

        assert reply.status == status
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.headers["cache-control"] == "no-store"
        assert (reply.json["status"], reply.json["code"], reply.json["detail"]) == (status, code, detail)
        assert allow is None or set(reply.headers["allow"].split(",")) == allow


async def test_a_fault(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Is a problem document and a line in the log, and ends nothing."""
    async with running() as server, connected(server, admin=True) as client:
        with monkeypatch.context() as broken:
            broken.setattr(server.metrics, "exposition", None)

            reply = await client.get("/metrics")

        assert reply.status == 500
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.json["code"] == "internal_error"
        assert reply.json["detail"] == "something went wrong here; the log says what"
        assert [(record.getMessage(), record.__dict__["path"]) for record in caplog.records] == [
            ("a request failed", "/metrics")
        ]
        assert (await client.get("/metrics")).status == 200
