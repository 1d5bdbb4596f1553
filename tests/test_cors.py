"""Pages of other origins: what they may do here and what they are told, on both sides of a node and in a browser."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import jwt
import pytest
from selenium import webdriver

from pushup.messages import Publication
from tests import browser
from tests.support import PATIENCE_S, Client, Reply, connected, parked, running
from tests.test_cli import Process, serving

chromium = browser.chromium

PAGE: Final = "https://page.test"
OTHER: Final = "https://other.test"
EVIL: Final = "https://evil.test"
LISTED: Final = f"{PAGE}, {OTHER}"
ALLOWED: Final = {
    "access-control-allow-origin": PAGE,
    "access-control-allow-credentials": "true",
    "access-control-expose-headers": "Retry-After",
    "vary": "Origin",
}
SECRET: Final = "a secret of thirty-two bytes or more"


def cors(reply: Reply) -> dict[str, str]:
    """What an answer says to pages."""
    return {name: value for name, value in reply.headers.items() if name == "vary" or name.startswith("access-")}


def ask(method: str, target: str, body: Any = None, *fields: str, chunks: bool = False) -> bytes:
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {target} HTTP/1.1", "Host: test", *fields]
    if chunks:
        lines.append("Transfer-Encoding: chunked")
        data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
    elif body is not None:
        lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join([*lines, "", ""]).encode() + data


def of(origin: str) -> str:
    return f"Origin: {origin}"


POLL: Final = {"channels": ["a"], "timeout": 0}
PUBLICATION: Final = {"channels": ["a"], "data": 1}

REQUESTS: Final[dict[str, tuple[Callable[..., bytes], int]]] = {
    "poll": (lambda *fields: ask("GET", "/poll?channel=a&timeout=0", None, *fields), 200),
    "poll by POST": (lambda *fields: ask("POST", "/poll", POLL, *fields), 200),
    "poll by chunks": (lambda *fields: ask("POST", "/poll", POLL, *fields, chunks=True), 200),
    "publication": (lambda *fields: ask("POST", "/publish", PUBLICATION, *fields), 201),
    "publication by chunks": (lambda *fields: ask("POST", "/publish", PUBLICATION, *fields, chunks=True), 201),
    "listing": (lambda *fields: ask("GET", "/channels", None, *fields), 200),
    "description of the API": (lambda *fields: ask("GET", "/openapi.json", None, *fields), 200),
    "wrong poll": (lambda *fields: ask("GET", "/poll?chanel=a", None, *fields), 400),
    "wrong poll by POST": (lambda *fields: ask("POST", "/poll", b"{", *fields), 400),
    "wrong poll by chunks": (lambda *fields: ask("POST", "/poll", b"{", *fields, chunks=True), 400),
    "wrong publication": (lambda *fields: ask("POST", "/publish", {}, *fields), 400),
    "stranger's poll": (lambda *fields: ask("GET", "/realms/none/poll?channel=a", None, *fields), 401),
    "stranger's publication": (lambda *fields: ask("POST", "/realms/none/publish", PUBLICATION, *fields), 401),
    "unknown channel": (lambda *fields: ask("GET", "/channels/none", None, *fields), 404),
    "unknown path": (lambda *fields: ask("GET", "/nothing", None, *fields), 404),
    "wrong method": (lambda *fields: ask("DELETE", "/poll", None, *fields), 405),
    "too many channels": (lambda *fields: ask("GET", "/poll?channel=a&channel=b&channel=c", None, *fields), 413),
    "too large": (lambda *fields: ask("POST", "/publish", b"x" * 2000, *fields), 413),
}
CASES: Final = pytest.mark.parametrize("case", REQUESTS)


async def once(client: Client, request: bytes) -> Reply:
    """The answer; every field that is for pages is in it at most once."""
    client.send(request)
    head = await client.reader.readuntil(b"\r\n\r\n")
    names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:-2]]
    assert len(names) == len(set(names))
    headers = {
        name.decode(): line.partition(b":")[2].strip().decode()
        for name, line in zip(names, head.split(b"\r\n")[1:-2], strict=True)
    }
    body = await client.reader.readexactly(int(headers.get("content-length", 0)))
    return Reply("HTTP/1.1", int(head.split(b" ")[1]), headers, body)


# Answers


@CASES
async def test_an_allowed_page_may_read_every_answer(case: str) -> None:
    """On either side, errors too: a page has to see what went wrong. Its own origin comes back, and no other."""
    request, status = REQUESTS[case]
    async with running(cors_origins=LISTED, poll_channels_max=2, body_bytes_max=1000) as server:
        async with connected(server) as client:
            reply = await once(client, request(of(PAGE)))

        assert (reply.status, cors(reply)) == (status, ALLOWED)


@CASES
@pytest.mark.parametrize(
    ("origins", "origin", "said"),
    [
        ("", EVIL, {}),
        (LISTED, EVIL, {"vary": "Origin"}),
        (LISTED, "null", {"vary": "Origin"}),
        (LISTED, "", {"vary": "Origin"}),
    ],
    ids=["none", "another", "null", "empty"],
)
async def test_other_pages_may_read_nothing(case: str, origins: str, origin: str, said: dict[str, str]) -> None:
    """They are told nothing, and what would change something is refused whether it makes sense or not."""
    request, status = REQUESTS[case]
    async with running(cors_origins=origins, poll_channels_max=2, body_bytes_max=1000) as server:
        async with connected(server) as client:
            reply = await once(client, request(of(origin)))

        changes = request().split(b" ")[0] in (b"POST", b"DELETE")
        assert (reply.status, cors(reply)) == (403 if changes else status, said)
        if changes:
            assert reply.json["code"] == "origin_not_allowed"
            assert server.metrics.refused["origin_not_allowed"] == 1
            assert server.metrics.realms["default"].publications == 0


@CASES
async def test_any_page_may_read_with_a_star(case: str) -> None:
    """But never with the browser's cookies."""
    request, status = REQUESTS[case]
    async with running(cors_origins="*", poll_channels_max=2, body_bytes_max=1000) as server:
        async with connected(server) as client:
            reply = await once(client, request(of(EVIL)))

        assert (reply.status, cors(reply)) == (
            status,
            {"access-control-allow-origin": "*", "access-control-expose-headers": "Retry-After"},
        )


@CASES
@pytest.mark.parametrize("origins", ["", LISTED, "*"])
async def test_who_is_no_page_sees_nothing_of_it(case: str, origins: str) -> None:
    """Without an Origin an answer is as ever."""
    request, status = REQUESTS[case]
    async with running(cors_origins=origins, poll_channels_max=2, body_bytes_max=1000) as server:
        async with connected(server) as client:
            reply = await once(client, request())

        assert (reply.status, cors(reply)) == (status, {})


@CASES
@pytest.mark.parametrize("origin", ["http://test", "https://test"])
@pytest.mark.parametrize("origins", ["", LISTED])
async def test_pages_of_the_same_host_pass(case: str, origin: str, origins: str) -> None:
    """Whatever the list says; behind a proxy that ends TLS, too."""
    request, status = REQUESTS[case]
    async with running(cors_origins=origins, poll_channels_max=2, body_bytes_max=1000) as server:
        async with connected(server) as client:
            reply = await once(client, request(of(origin)))

        assert reply.status == status
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("chunks", [False, True])
async def test_each_waiting_page_is_told_its_own(chunks: bool) -> None:
    """Polls that get the same answer share its bytes, but not who may read it; nor do requests that are alike."""
    origins = [PAGE, OTHER, EVIL, None, PAGE, "http://test", None, OTHER]
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(cors_origins=LISTED))
        clients = []
        for number, origin in enumerate(origins):
            client = await stack.enter_async_context(connected(server))
            fields = [] if origin is None else [of(origin)]
            if chunks and origin != EVIL:
                client.send(ask("POST", "/poll", {"channels": ["a"]}, *fields, chunks=True))
            else:
                client.send(ask("GET", "/poll?channel=a", None, *fields))
            await parked(server, number + 1)
            clients.append(client)

        await server.node.publish(Publication(("a",), b"1"))
        replies = [await client.reply() for client in clients]

    assert {reply.status for reply in replies} == {200}
    assert [reply.headers.get("access-control-allow-origin") for reply in replies] == [
        origin if origin in (PAGE, OTHER) else None for origin in origins
    ]


async def test_a_refusal_for_a_while_may_be_read(tmp_path: Path) -> None:
    """429 and its Retry-After, of the lane."""
    flags = {"cors_origins": PAGE, "polls_per_token_max": 1, "access": access(tmp_path)}
    bearer = f"Authorization: Bearer {token()}"
    async with running(**flags) as server, connected(server) as first, connected(server) as second:
        first.send(ask("GET", "/poll?channel=a", None, bearer, of(PAGE)))
        await parked(server, 1)

        reply = await once(second, ask("GET", "/poll?channel=a", None, bearer, of(PAGE)))

        assert (reply.status, cors(reply)) == (429, ALLOWED)
        assert reply.headers["retry-after"] == "1"


# Preflights

PREFLIGHT: Final = {
    **ALLOWED,
    "access-control-allow-methods": "GET, POST, DELETE",
    "access-control-allow-headers": "Authorization, Content-Type, Idempotency-Key",
    "access-control-max-age": "7200",
}
TARGETS: Final = ["/poll", "/publish", "/channels", "/channels/a", "/channels/a/renew", "/realms/none/publish"]


def preflight(target: str, origin: str, method: str = "POST") -> bytes:
    fields = (of(origin), f"Access-Control-Request-Method: {method}", "Access-Control-Request-Headers: authorization")
    return ask("OPTIONS", target, None, *fields)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("closed", [False, True], ids=["open", "with keys"])
async def test_a_preflight_is_answered(target: str, closed: bool, tmp_path: Path) -> None:
    """Without credentials, which browsers do not send then; and it says nothing of what is there."""
    flags = {"access": access(tmp_path)} if closed else {}
    async with running(cors_origins=LISTED, **flags) as server, connected(server) as client:
        reply = await once(client, preflight(target, PAGE))

        assert (reply.status, reply.body, cors(reply)) == (204, b"", PREFLIGHT)
        assert (await once(client, ask("GET", "/poll?channel=a&timeout=0"))).status == (401 if closed else 200)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("origins", ["", LISTED])
@pytest.mark.parametrize("origin", [EVIL, "null", f"{PAGE}.evil.test", f"{PAGE}:8443", PAGE.replace("https", "http")])
async def test_a_preflight_of_another_page_gets_no_permission(target: str, origins: str, origin: str) -> None:
    """A browser takes any answer without these fields for a no."""
    async with running(cors_origins=origins) as server, connected(server) as client:
        reply = await once(client, preflight(target, origin))

        assert reply.status in (401, 403, 405)
        assert not any(name.startswith("access-control-") for name in reply.headers)


async def test_options_that_are_no_preflight_are_refused() -> None:
    """There is nothing to ask for."""
    async with running(cors_origins=LISTED) as server, connected(server) as client:
        assert (await once(client, ask("OPTIONS", "/publish", None, of(PAGE)))).status == 405
        assert (await once(client, ask("OPTIONS", "/publish"))).status == 405


# What needs no preflight


@pytest.mark.parametrize("origins", ["", LISTED])
@pytest.mark.parametrize("origin", [EVIL, "null"])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
@pytest.mark.parametrize("chunks", [False, True])
async def test_a_foreign_page_cannot_publish_without_asking(
    origins: str, origin: str, kind: str | None, chunks: bool
) -> None:
    """A browser sends what a form could have sent without a preflight; bodies are JSON whatever their type says."""
    fields = [of(origin), *([f"Content-Type: {kind}"] if kind else [])]
    async with running(cors_origins=origins) as server:
        async with connected(server) as client:
            reply = await once(client, ask("POST", "/publish", PUBLICATION, *fields, chunks=chunks))
            assert (reply.status, reply.json["code"]) == (403, "origin_not_allowed")
        async with connected(server) as client:
            assert (await client.get("/channels")).json["channels"] == []


@pytest.mark.parametrize(
    ("method", "target", "body"),
    [
        ("POST", "/channels", {}),
        ("POST", "/channels/a/renew", {}),
        ("DELETE", "/channels/a", None),
        ("PUT", "/publish", PUBLICATION),
        ("POST", "/poll", POLL),
        ("POST", "/realms/none/publish", PUBLICATION),
    ],
)
async def test_a_foreign_page_changes_nothing(method: str, target: str, body: Any) -> None:
    """Whatever the way."""
    async with running() as server, connected(server) as client:
        await client.publish("a")

        reply = await once(client, ask(method, target, body, of(EVIL)))

        assert (reply.status, reply.json["code"]) == (403, "origin_not_allowed")
        assert [each["channel"] for each in (await client.get("/channels")).json["channels"]] == ["a"]


async def test_two_origins_are_foreign() -> None:
    """Of two none can be believed, not even if both are allowed."""
    async with running(cors_origins=LISTED) as server, connected(server) as client:
        reply = await once(client, ask("POST", "/publish", PUBLICATION, of(PAGE), of(PAGE)))

        assert reply.status == 403
        assert "access-control-allow-origin" not in reply.headers


UPGRADE: Final = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


@pytest.mark.parametrize("target", ["/poll?channel=a&timeout=0", "/publish", "/nothing"])
@pytest.mark.parametrize(("origins", "origin"), [("", EVIL), (LISTED, EVIL), (LISTED, "null"), ("", PAGE)])
async def test_a_websocket_of_a_foreign_page_is_refused(target: str, origins: str, origin: str) -> None:
    """Browsers send no preflight for it and leave it to the server to look at the origin."""
    async with running(cors_origins=origins) as server, connected(server) as client:
        reply = await once(client, ask("GET", target, None, *UPGRADE, of(origin)))

        assert (reply.status, reply.json["code"]) == (403, "origin_not_allowed")


@pytest.mark.parametrize(("origins", "origin"), [("", "http://test"), (LISTED, PAGE), ("*", EVIL), ("", None)])
async def test_a_websocket_of_an_allowed_page_is_not_refused_for_that(origins: str, origin: str | None) -> None:
    """The offer is ignored, as no WebSocket is spoken here."""
    fields = [] if origin is None else [of(origin)]
    async with running(cors_origins=origins) as server, connected(server) as client:
        reply = await once(client, ask("GET", "/poll?channel=a&timeout=0", None, *UPGRADE, *fields))

        assert reply.status == 200


# Cookies


def access(folder: Path) -> Path:
    secret, file = folder / "secret", folder / "access.toml"
    secret.write_text(SECRET)
    file.write_text(f'[realms.default.tokens]\nsecret_file = "{secret}"\npublish = true\n')
    return file


def token() -> str:
    claims = {"exp": 4e9, "sub": "ann", "pushup": {"subscribe": ["*"], "publish": ["*"]}}
    return jwt.encode(claims, SECRET, "HS256")


@pytest.mark.parametrize(
    ("origins", "origin", "counts"),
    [
        ("", None, True),
        ("", "http://test", True),
        ("", EVIL, False),
        (LISTED, PAGE, True),
        (LISTED, EVIL, False),
        ("*", EVIL, False),
        ("*", "null", False),
        (f"*, {PAGE}", PAGE, True),
    ],
)
@pytest.mark.parametrize("chunks", [False, True])
async def test_a_cookie_counts_for_pages_that_are_known(
    origins: str, origin: str | None, counts: bool, chunks: bool, tmp_path: Path
) -> None:
    """A browser sends it with whatever any page asks for; only a page that is named acts for the browser's owner."""
    fields = [f"Cookie: pushup_token={token()}", *([] if origin is None else [of(origin)])]
    async with running(cors_origins=origins, access=access(tmp_path)) as server:
        async with connected(server) as client:
            polled = await once(client, ask("GET", "/poll?channel=a&timeout=0", None, *fields))
            published = await once(client, ask("POST", "/publish", PUBLICATION, *fields, chunks=chunks))

        assert polled.status == (200 if counts else 401)
        assert published.status == (201 if counts else 401 if "*" in origins else 403)


# A browser


class Site:
    """A web server for one empty page, at an origin of its own."""

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(b"<!doctype html><link rel=icon href=data:,><title>page</title>")

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.stop()


FETCH: Final = """\
const [url, options, done] = arguments;
fetch(url, options)
    .then(async (response) => [response.status, JSON.parse((await response.text()) || "null")])
    .then(done, (error) => done([0, error.name]));
"""


def fetch(chromium: webdriver.Chrome, node: Process, target: str, options: dict[str, Any]) -> tuple[int, Any]:
    """What a page sees of a request: status and JSON, or 0 and the error's name."""
    chromium.set_script_timeout(PATIENCE_S)
    status, seen = chromium.execute_async_script(FETCH, f"http://{node.address}{target}", options)
    return status, seen


JSON: Final = {"method": "POST", "headers": {"Content-Type": "application/json"}, "body": json.dumps(PUBLICATION)}
SIMPLE: Final = {"method": "POST", "headers": {"Content-Type": "text/plain"}, "body": json.dumps(PUBLICATION)}


@pytest.mark.browser
def test_a_page_that_is_allowed_polls_and_publishes(chromium: webdriver.Chrome, site: Site) -> None:
    """A real browser asks first, is told yes, and shows the page every answer, errors too."""
    with serving("--cors-origins", site.origin) as node:
        chromium.get(site.origin)

        assert fetch(chromium, node, "/publish", JSON)[0] == 201
        assert fetch(chromium, node, "/publish", SIMPLE)[0] == 201
        status, answer = fetch(chromium, node, "/poll?channel=a&timeout=0", {"credentials": "include"})
        assert (status, [message["data"] for message in answer["messages"]]) == (200, [1, 1])
        poll = {**JSON, "body": json.dumps(POLL)}
        assert fetch(chromium, node, "/poll", poll)[0] == 200
        assert fetch(chromium, node, "/poll?chanel=a", {})[1]["code"] == "invalid_parameter"
        delete = {"method": "DELETE", "headers": {"Authorization": "Bearer key"}}
        assert fetch(chromium, node, "/channels/a", delete) == (204, None)


@pytest.mark.browser
def test_a_page_that_is_not_allowed_does_neither(chromium: webdriver.Chrome, site: Site) -> None:
    """The browser keeps answers from it; what it may send without asking is refused here."""
    with serving("--cors-origins", "http://other.test") as node:
        chromium.get(site.origin)

        assert fetch(chromium, node, "/poll?channel=a&timeout=0", {}) == (0, "TypeError")
        assert fetch(chromium, node, "/publish", JSON) == (0, "TypeError")
        assert fetch(chromium, node, "/publish", SIMPLE) == (0, "TypeError")
        blind = {**SIMPLE, "mode": "no-cors", "credentials": "include"}
        assert fetch(chromium, node, "/publish", blind) == (0, None)
        assert node.get("/channels")[1]["channels"] == []
