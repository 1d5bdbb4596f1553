"""The dashboard: its feed, who may use it, and the page in a real Chromium."""

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import pytest
from aiohttp.test_utils import make_mocked_request
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.support.ui import WebDriverWait

from pushup.dashboard import BUSIEST, HISTORY_EVERY, WATCHED_S, Feed, check_caller, figures, rank
from pushup.errors import Forbidden, OriginNotAllowed, Unavailable
from pushup.messages import MAX_ID, ChannelInfo, Poll
from tests import browser
from tests.redis_server import RedisServer
from tests.support import PATIENCE_S, Client, Reply, connected, eventually, parked, running

chromium = browser.chromium

CLOSED: Final = "".join(
    f"""\
[realms.{realm}]
[[realms.{realm}.keys]]
name = "backend"
hash = "sha256:{"0" * 64}"
actions = ["publish", "subscribe"]
"""
    for realm in ("default", "shop")
)
"""An access file of two realms where nobody may do anything without a key."""

JSON: Final = "Content-Type: application/json\r\n"


async def ask(
    client: Client, method: str, target: str, body: Any = None, headers: str = "", host: str = "localhost"
) -> Reply:
    """A request as a browser or curl sends it."""
    data = b"" if body is None else json.dumps(body).encode()
    length = f"Content-Length: {len(data)}\r\n" if body is not None else ""
    client.send(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{length}{headers}\r\n".encode() + data)
    return await client.reply()


async def samples(client: Client, start: int = 0, query: str = "") -> tuple[list[dict[str, Any]], Any]:
    """The messages that a poll without waiting brings, and its cursor."""
    reply = await ask(client, "GET", f"/dashboard/poll?start={start}&timeout=0{query}")
    assert reply.status == 200, reply
    return reply.json["messages"], reply.json["next"]


def latest(messages: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The data of the last message on the channels of this kind: live, history or tables."""
    data: dict[str, Any] = next(
        message["data"]
        for message in reversed(messages)
        if any(channel.partition(":")[0] == kind for channel in message["channels"])
    )
    return data


# The feed


async def test_the_first_look_is_answered_at_once() -> None:
    """Nobody waits for the next second: the figures of this moment are there, then nodes and channels."""
    async with running() as server, connected(server, admin=True) as client:
        reply = await ask(client, "GET", "/dashboard/poll?start=0&timeout=0")
        messages = reply.json["messages"]

        assert (reply.status, reply.headers["cache-control"]) == (200, "no-store")
        assert latest(messages, "live")["state"] == "ready"
        messages += (await ask(client, "GET", f"/dashboard/poll?start={reply.json['next']}")).json["messages"]
        tables = latest(messages, "tables")
        assert [node["name"] for node in tables["nodes"]] == [server.settings.name]
        assert (tables["broker"], tables["realms"], tables["trouble"]) == ("memory://", ["default"], None)


async def test_figures_are_those_of_the_counters() -> None:
    """What is parked, published, delivered, ended and refused."""
    async with (
        running() as server,
        connected(server) as poller,
        connected(server) as publisher,
        connected(server, admin=True) as client,
    ):
        poller.send("GET /poll?channel=news HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)
        before = latest((await samples(client))[0], "live")
        await publisher.publish("news", data=1)
        await poller.reply()
        await publisher.get("/poll?channel=a&channel=")
        server.service.metrics.connections_cut["flood"] += 1

        after = figures(server.service.root, server.metrics)

        assert (before["parked"], after["parked"]) == (1, 0)
        assert after["publications"] - before["publications"] == 1
        assert after["deliveries"] - before["deliveries"] == 1
        assert after["ends"]["message"] - before["ends"]["message"] == 1
        assert after["lag"][-1] - before["lag"][-1] == 1
        assert after["refused"] == {"invalid_parameter": 1}
        assert after["cut"] == {"flood": 1}
        assert after["connections"] == 2
        assert after["memory"] is None or after["memory"] > 1_000_000


async def test_sampled_every_second_only_while_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one of five samples is kept, and the broker is left alone."""
    async with running() as server:
        feed = Feed(server.service)
        realm = server.service.root
        now = 0.0
        taken: list[tuple[float, bool]] = []

        async def sample(_: Any, at: float, history: bool) -> None:
            taken.append((at, history))

        monkeypatch.setattr(feed, "_sample", sample)
        for count in range(30):
            await feed.sample_due(now := float(count), count)
        assert taken == [(float(count), True) for count in range(0, 30, HISTORY_EVERY)]

        taken.clear()
        feed.look(realm, now)
        for count in range(30, 60):
            await feed.sample_due(float(count), count)
        watched = [at for at, history in taken if not history]
        assert min(watched) > now
        assert max(watched) < now + WATCHED_S
        assert {int(at) for at, _ in taken if at < now + WATCHED_S} == set(range(30, 29 + int(WATCHED_S)))


async def test_a_sample_of_the_history_that_is_looked_at_comes_once() -> None:
    """It is one message in two channels, and a poll over both is told of it once, in its order."""
    async with running() as server, connected(server, admin=True) as client:
        feed = Feed(server.service)
        await feed.start()
        try:
            await feed.poll(server.service.root, Poll(("any",), 0, MAX_ID, 0))
            await eventually(lambda: not feed.listing, "the tables are made")

            await feed.sample_due(asyncio.get_running_loop().time(), HISTORY_EVERY)
            await eventually(lambda: not feed.listing, "the tables are made")
            answer = json.loads((await feed.poll(server.service.root, Poll(("any",), 0, MAX_ID, 0))).body)
        finally:
            await feed.stop()

        ids = [message["id"] for message in answer["messages"]]
        assert ids == sorted(set(ids))
        assert {"history:default", "live:default"} in [set(message["channels"]) for message in answer["messages"]]
        assert (await samples(client))[0] != []


async def test_a_cursor_of_another_life_is_told_of_the_gap() -> None:
    """A page that outlives its node knows that samples are missing."""
    async with running() as server, connected(server, admin=True) as client:
        reply = await ask(client, "GET", f"/dashboard/poll?start={1_700_000_000_000_000}&timeout=0")

        assert reply.json["gap"] is True
        _, cursor = await samples(client)
        assert (await ask(client, "GET", f"/dashboard/poll?start={cursor}")).json["gap"] is False


async def test_each_realm_has_its_own_figures(tmp_path: Path) -> None:
    """Named by the query; one that is not served is not found."""
    access = tmp_path / "access.toml"
    access.write_text('[realms.default]\nsubscribe = "open"\n[realms.shop]\nsubscribe = "open"\n')
    async with (
        running(access=access) as server,
        connected(server) as poller,
        connected(server, admin=True) as client,
    ):
        poller.send("GET /realms/shop/poll?channel=a HTTP/1.1\r\nHost: test\r\n\r\n")
        await eventually(lambda: server.service.realms["shop"].node.parked == 1, "the poll parks")

        shop, _ = await samples(client, query="&realm=shop")
        root, _ = await samples(client)
        nowhere = await ask(client, "GET", "/dashboard/poll?start=0&realm=nowhere")

        assert (latest(shop, "live")["parked"], latest(root, "live")["parked"]) == (1, 0)
        assert all(channel.endswith(":shop") for message in shop for channel in message["channels"])
        assert (nowhere.status, nowhere.json["code"]) == (404, "not_found")


async def test_the_feed_is_no_part_of_the_service() -> None:
    """Its realm is neither served nor counted, and cannot be asked for other channels."""
    async with running() as server, connected(server) as public, connected(server, admin=True) as client:
        await samples(client)

        assert (await public.get("/realms/dashboard/poll?channel=live:default&timeout=0")).status == 401
        assert b'realm="dashboard"' not in (await ask(client, "GET", "/metrics")).body
        assert (await public.get("/poll?channel=live:default&timeout=0&start=0")).json["messages"] == []
        reply = await ask(client, "GET", "/dashboard/poll?channel=live:other&start=0")
        assert (reply.status, reply.json["parameter"]) == (400, "channel")
        reply = await ask(client, "GET", "/dashboard/poll?strat=0")
        assert (reply.status, reply.json["parameter"]) == (400, "strat")


async def test_the_end_of_the_node_answers_who_waits() -> None:
    """A page that polls, or listens in the console, does not hold up a stop."""
    async with running() as server, connected(server, admin=True) as page, connected(server, admin=True) as console:
        _, cursor = await samples(page)
        page.send(f"GET /dashboard/poll?start={cursor + 10**12} HTTP/1.1\r\nHost: localhost\r\n\r\n")
        console.send("GET /dashboard/listen?channel=a&start=latest HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await parked(server, 1)

        began = time.monotonic()
        await server.stop(0)

        assert time.monotonic() - began < PATIENCE_S / 2
        for client in (page, console):
            reply = await client.reply()
            assert (reply.status, reply.json["messages"]) == (200, [])


async def test_a_broker_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Takes the lists of nodes and channels away, says why, and leaves the figures alone; a fault is logged."""

    async def gone() -> Any:
        raise Unavailable("the broker did not answer in time")

    async with running() as server, connected(server, admin=True) as client:
        with monkeypatch.context() as broken:
            broken.setattr(server.node.broker, "nodes", gone)
            messages, cursor = await samples(client)
            while not [message for message in messages if "tables:default" in message["channels"]]:
                reply = await ask(client, "GET", f"/dashboard/poll?start={cursor}")
                messages, cursor = messages + reply.json["messages"], reply.json["next"]

            assert latest(messages, "live")["state"] == "ready"
            tables = latest(messages, "tables")
            assert (tables["nodes"], tables["trouble"]) == ([], "the broker did not answer in time")

            broken.setattr(server.node, "busiest", None)
            await eventually(lambda: bool(caplog.records), "the fault is logged")
            assert caplog.records[0].getMessage() == "cannot list nodes and channels"
        assert (await ask(client, "GET", f"/dashboard/poll?start={cursor}")).json["messages"] != []


# Busy channels


def info(channel: str, messages: int, last: int | None = None) -> ChannelInfo:
    return ChannelInfo(channel, 0, 0, 1.0, 1.0, 1, messages, None, last)


def test_the_busiest_channels() -> None:
    """Those with the most polls here first; among equals, those with the most messages; integers as numbers."""
    here = [("news", 1, 9), ("news", 7, 2), ("7", 3, 0), ("quiet", 0, 0)]
    listed = [info("news", 5, 99), info("archive", 50, 42), info("empty", 0)]

    assert rank(here, listed) == [
        {"channel": "news", "parked": 7, "messages": 5, "last": 99},
        {"channel": 7, "parked": 3, "messages": 0, "last": None},
        {"channel": "archive", "parked": 0, "messages": 50, "last": 42},
    ]


def test_channels_with_many_messages_have_a_place_beside_those_with_many_polls() -> None:
    """However many channels are polled here."""
    here = [(f"polled{number:02}", 100 - number, 0) for number in range(20)]
    listed = [info(f"full{number}", 1000 - number) for number in range(20)]

    names = [channel["channel"] for channel in rank(here, listed)]

    assert len(names) == BUSIEST
    assert names[:5] == [f"polled{number:02}" for number in range(5)]
    assert names[5:] == [f"full{number}" for number in range(5)]


# Who may use it


@pytest.mark.parametrize(
    ("host", "listen", "headers"),
    [
        ("localhost:8081", "127.0.0.1", {}),
        ("LocalHost", "127.0.0.1", {}),
        ("127.0.0.1:8081", "127.0.0.1", {"Origin": "http://127.0.0.1:8081", "Sec-Fetch-Site": "same-origin"}),
        ("192.168.1.5:8081", "0.0.0.0", {"Sec-Fetch-Site": "none"}),
        ("[::1]:8081", "::1", {"Origin": "http://[::1]:8081"}),
        ("[::1]", "::1", {}),
        ("push.internal:8081", "push.internal", {"Origin": "http://push.internal:8081"}),
        ("localhost", "127.0.0.1", {"Origin": "https://localhost"}),
    ],
)
def test_who_is_let_in(host: str, listen: str, headers: dict[str, str]) -> None:
    """Programs, and pages of this listener, called by an address, localhost or its own name."""
    check_caller(make_mocked_request("GET", "/dashboard/poll", {"Host": host, **headers}), listen)


@pytest.mark.parametrize(
    "host",
    [
        "",
        ":8081",
        "a b",
        "evil.example",
        "evil.example:8081",
        "localhost.evil.example",
        "127.0.0.1.evil.example:80",
        "127.0.0.1@evil.example",
        "127.1",
        "[::1",
        "localhost:",
        "localhost.",
        "localhost:99999",
        "node-7:8081",
    ],
)
def test_a_name_that_leads_here(host: str) -> None:
    """May be anybody's whose DNS says so: such a page would be of the same origin."""
    with pytest.raises(Forbidden, match="use an address or localhost"):
        check_caller(make_mocked_request("GET", "/dashboard/poll", {"Host": host}), "127.0.0.1")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost"},
        {"Origin": "http://localhost:8080"},
        {"Origin": "http://127.0.0.1:8081"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://localhost:8081", "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_a_page_of_another_origin(headers: dict[str, str]) -> None:
    """Is refused, one on another port of this machine as well."""
    with pytest.raises(OriginNotAllowed):
        check_caller(make_mocked_request("GET", "/dashboard/poll", {"Host": "localhost:8081", **headers}), "127.0.0.1")


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/dashboard/poll?start=0&timeout=0"),
        ("GET", "/dashboard/listen?channel=a&timeout=0"),
        ("POST", "/dashboard/publish"),
    ],
)
async def test_every_request_is_checked(method: str, target: str) -> None:
    """Before anything is done; and no answer invites other origins."""
    body = {"channels": ["a"], "data": 1} if method == "POST" else None
    async with running() as server, connected(server, admin=True) as client:
        for host, headers in (("evil.example", ""), ("localhost", "Origin: https://evil.example\r\n")):
            reply = await ask(client, method, target, body, JSON + headers, host)

            assert reply.status == 403
            assert reply.headers["content-type"] == "application/problem+json"
            assert not [name for name in reply.headers if name.startswith("access-control")]
        good = await ask(client, method, target, body, JSON + "Origin: http://localhost\r\n")
        assert good.status in (200, 201)
        assert not [name for name in good.headers if name.startswith("access-control")]
        assert server.node.metrics.publications == (1 if method == "POST" else 0)


async def test_no_preflight_is_answered() -> None:
    """A browser that asks whether another origin may send JSON hears no."""
    async with running() as server, connected(server, admin=True) as client:
        asked = "Origin: https://evil.example\r\nAccess-Control-Request-Method: POST\r\n"
        reply = await ask(client, "OPTIONS", "/dashboard/publish", headers=asked)

        assert reply.status == 405
        assert not [name for name in reply.headers if name.startswith("access-control")]


# The console's requests


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_only_json_is_published(kind: str) -> None:
    """What a form or a simple request of another page can send is refused."""
    async with running() as server, connected(server, admin=True) as client:
        header = f"Content-Type: {kind}\r\n" if kind else ""
        reply = await ask(client, "POST", "/dashboard/publish", {"channels": ["a"], "data": 1}, header)

        assert (reply.status, reply.json["code"]) == (400, "invalid_request")
        assert "application/json" in reply.json["detail"]
        assert server.node.metrics.publications == 0


async def test_an_operator_publishes_and_listens_past_keys_and_tokens(tmp_path: Path) -> None:
    """Where everybody else needs credentials; with a cursor, and once for each idempotency key."""
    access = tmp_path / "access.toml"
    access.write_text(CLOSED)
    async with (
        running(access=access) as server,
        connected(server) as stranger,
        connected(server, admin=True) as listening,
        connected(server, admin=True) as client,
    ):
        assert (await stranger.get("/poll?channel=a")).status == 401
        first = await ask(listening, "GET", "/dashboard/listen?channel=a&start=latest&timeout=0&realm=shop")
        target = f"/dashboard/listen?realm=shop&channel=a&start={first.json['next']}"
        listening.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await eventually(lambda: server.service.realms["shop"].node.parked == 1, "it listens")

        publication = {"channels": ["a"], "data": {"x": 1}, "key": "k"}
        reply = await ask(client, "POST", "/dashboard/publish?realm=shop", publication, JSON)
        again = await ask(client, "POST", "/dashboard/publish?realm=shop", publication, JSON)
        heard = (await listening.reply()).json

        assert (reply.status, again.json) == (201, {**reply.json, "duplicate": True})
        assert heard == {
            "messages": [{"id": reply.json["id"], "channels": ["a"], "data": {"x": 1}}],
            "next": reply.json["id"] + 1,
            "gap": False,
        }
        assert (await ask(client, "GET", "/dashboard/listen?channel=a&timeout=0")).json["messages"] == []


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        ("POST", "/dashboard/publish", {"channels": []}, 400),
        ("POST", "/dashboard/publish?x=1", {"channels": ["a"], "data": 1}, 400),
        ("POST", "/dashboard/publish?realm=nowhere", {"channels": ["a"], "data": 1}, 404),
        ("POST", "/dashboard/publish", {"channels": ["a"], "data": "x" * 70_000}, 413),
        ("POST", "/dashboard/publish", {"channels": ["7"], "data": 1}, 404),
        ("GET", "/dashboard/listen", None, 400),
        ("GET", "/dashboard/listen?channel=007", None, 400),
        ("GET", "/dashboard/publish", None, 405),
        ("GET", "/dashboard/../admin.py", None, 404),
        ("GET", "/dashboard/index.html", None, 404),
    ],
)
async def test_wrong_requests(method: str, target: str, body: Any, status: int) -> None:
    """Are told what is wrong, as on the public listener."""
    async with running() as server, connected(server, admin=True) as client:
        reply = await ask(client, method, target, body, JSON if body else "")

        assert reply.status == status
        assert reply.headers["content-type"] == "application/problem+json"


async def test_a_console_that_goes_away_leaves_no_poll_behind() -> None:
    """Its subscription ends with its connection."""
    async with running() as server:
        async with connected(server, admin=True) as client:
            client.send("GET /dashboard/listen?channel=a HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await parked(server, 1)

        await parked(server, 0)


# The page as it is served


class _Links(HTMLParser):
    """What a page loads, what it has inline, and its elements by id."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: set[str] = set()
        self.inline: list[str] = []
        self.ids: list[str] = []
        self.refers: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        if tag in ("link", "script", "img"):
            self.loads |= {value for name, value in attributes if name in ("src", "href") and value}
        self.inline += [name for name in names if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.refers |= {value for name, value in attributes if name in ("for", "aria-labelledby") and value}


async def test_the_page_is_served_whole_under_a_strict_policy() -> None:
    """All it loads is here, nothing is inline, and the policy would stop anything else."""
    async with running() as server, connected(server, admin=True) as client:
        page = await ask(client, "GET", "/", headers="Accept: text/html,*/*;q=0.8\r\n")
        links = _Links()
        links.feed(page.body.decode())
        parts = {target: await ask(client, "GET", target) for target in sorted(links.loads)}

    assert links.inline == []
    assert len(links.ids) == len(set(links.ids))
    assert links.refers <= set(links.ids)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["vary"] == "Accept"
    assert {target: part.headers["content-type"] for target, part in parts.items()} == {
        "/dashboard/dashboard.css": "text/css; charset=utf-8",
        "/dashboard/dashboard.js": "text/javascript; charset=utf-8",
        "/dashboard/icon.svg": "image/svg+xml; charset=utf-8",
    }
    for reply in (page, *parts.values()):
        assert reply.status == 200
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in reply.headers["content-security-policy"]


# The page in a browser


class Node:
    """`pushup serve`, as a process, with its dashboard."""

    def __init__(self, **settings: str) -> None:
        given = {
            "listen": "127.0.0.1:0",
            "admin_listen": "127.0.0.1:0",
            "log_level": "error",
            "drain_window": "0",
            **settings,
        }
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PUSHUP_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pushup", "serve", *flags], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        said = [next((line for line in self._process.stdout if "http://" in line), "") for _ in range(2)]
        if not said[1]:
            self.stop()
            pytest.fail("the server did not start")
        self.address, self.admin = (line.split("http://")[1].split()[0] for line in said)

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=PATIENCE_S)

    def kill(self) -> None:
        """As a power cut would."""
        self._process.kill()
        self._process.communicate(timeout=PATIENCE_S)

    def request(self, method: str, path: str, body: Any = None) -> int:
        """One request on a connection of its own; the status."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE_S)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            return connection.getresponse().status
        finally:
            connection.close()

    def publish(self, channel: str, data: Any) -> None:
        assert self.request("POST", "/publish", {"channels": [channel], "data": data}) == 201

    @contextmanager
    def polls(self, channel: str, count: int) -> Iterator[None]:
        """So many polls that wait."""
        host, _, port = self.address.rpartition(":")
        request = f"GET /poll?channel={channel}&start=latest&timeout=60 HTTP/1.1\r\nHost: test\r\n\r\n".encode()
        connections = [socket.create_connection((host, int(port))) for _ in range(count)]
        try:
            for connection in connections:
                connection.sendall(request)
            yield
        finally:
            for connection in connections:
                connection.close()


class Dashboard:
    """The page in a window of its own."""

    def __init__(self, chromium: webdriver.Chrome) -> None:
        self._browser = chromium
        chromium.switch_to.new_window("window")
        self._window = chromium.current_window_handle

    @property
    def browser(self) -> webdriver.Chrome:
        if self._browser.current_window_handle != self._window:
            self._browser.switch_to.window(self._window)
        return self._browser

    def open(self, address: str) -> None:
        self.browser.get(f"http://{address}/")
        self.until(lambda: self.text("state") == "ready" and self.rows("nodes") != [], "hoped for the first samples")

    def text(self, id: str) -> str:
        return self.browser.find_element("id", id).text

    def number(self, id: str) -> float:
        text = self.text(id).replace(",", "")
        return float(text) if text.replace(".", "").isdigit() else 0.0

    def rows(self, table: str) -> list[list[str]]:
        """The words of each row of a table."""
        script = (
            "return [...document.getElementById(arguments[0]).tBodies[0].rows]"
            ".map(row => [...row.cells].map(cell => cell.textContent))"
        )
        found: list[list[str]] = self.browser.execute_script(script, table)
        return found

    def fill(self, id: str, text: str) -> None:
        field = self.browser.find_element("id", id)
        field.clear()
        field.send_keys(text)

    def click(self, selector: str) -> None:
        """Once, also while the page draws its tables anew."""

        def clicked() -> bool:
            try:
                self.browser.find_element("css selector", selector).click()
            except StaleElementReferenceException:
                return False
            return True

        self.until(clicked, f"hoped to click {selector}")

    def complaints(self) -> list[Any]:
        return list(self.browser.get_log("browser"))  # type: ignore[no-untyped-call]

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def until(self, condition: Callable[[], bool], hope: str, patience: float = PATIENCE_S) -> None:
        WebDriverWait(self.browser, patience, 0.05).until(
            lambda _: condition(), f"{hope}; shown: {self.text('state')!r}"
        )

    def until_has(self, id: str, text: str) -> None:
        self.until(lambda: text in self.text(id), f"hoped for {text!r} in {id}")


@pytest.fixture
def page(chromium: webdriver.Chrome) -> Iterator[Dashboard]:
    home = chromium.current_window_handle
    opened = Dashboard(chromium)
    opened.complaints()  # Those of a test that failed are not the next one's.
    yield opened
    opened.browser.close()
    chromium.switch_to.window(home)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node(name="one")
    try:
        yield node
    finally:
        node.stop()


@pytest.mark.browser
def test_figures_move_when_polls_park_and_publications_are_made(page: Dashboard, node: Node) -> None:
    """And the browser has nothing to complain of, breaches of the policy included."""
    page.open(node.admin)
    assert page.text("parked") == "0"

    with node.polls("moves", 3):
        page.until(lambda: page.text("parked") == "3", "hoped for three parked polls")
        page.until(lambda: ["moves", "3"] in [row[:2] for row in page.rows("channels")], "hoped for the channel")
        page.until(lambda: page.rows("nodes")[0][4] == "3", "hoped for the node's row")
        node.publish("moves", "x")
        page.until(lambda: page.number("publications") > 0 and page.number("deliveries") > 0, "hoped for rates")
        page.until(lambda: page.text("p99") != "–", "hoped for a lag")
        page.until(lambda: "with messages" in page.text("ends"), "hoped for ends of polls")
        label = page.browser.find_element("css selector", "[data-chart=deliveries] svg").get_attribute("aria-label")
        assert label is not None
        assert label.startswith("Deliveries per second, last 10 min: now ")
    page.until(lambda: page.text("parked") == "0", "hoped for no parked polls")

    assert node.request("GET", "/poll?chanel=a") == 400
    page.until(lambda: "invalid parameter" in page.text("refused"), "hoped for the refusal")
    assert page.complaints() == []


@pytest.mark.browser
def test_the_console_publishes_and_listens(page: Dashboard, node: Node) -> None:
    """JSON as it is, anything else as text; markup stays text; a wrong channel is explained."""
    page.open(node.admin)
    page.fill("listen-channel", "console")
    page.click("#toggle")
    page.until(lambda: "cursor" in page.text("listening"), "hoped to listen")

    evil = "<img src=x onerror=alert(1)>"
    page.fill("publish-channel", "console")
    for text, heard in (('{"a": [1, 2]}', '{"a":[1,2]}'), ("12345678901234567890", "1234567890123456"), (evil, evil)):
        page.fill("data", text)
        page.click("#send")
        page.until_has("log", heard)
        page.until_has("outcome", "Stored as ")
    assert page.browser.find_elements("css selector", "#log img") == []
    assert page.text("toggle") == "Stop"
    page.click("#toggle")
    node.publish("console", "later")

    page.until(lambda: "console" in [row[0] for row in page.rows("channels")], "hoped for the channel")
    page.click("[data-listen=console]")
    page.until(lambda: '"later"' in page.text("log"), "hoped for what is cached")
    page.click("#toggle")
    page.fill("publish-channel", "007")
    page.click("#send")
    page.until(lambda: "a name of digits only" in page.text("outcome"), "hoped for the reason")
    (complaint,) = page.complaints()
    assert "/dashboard/publish" in complaint["message"]
    assert "400" in complaint["message"]


@pytest.mark.browser
def test_a_closed_channel_and_a_gap_are_said(page: Dashboard, node: Node) -> None:
    """In the console, at their place."""
    page.open(node.admin)
    page.fill("listen-channel", "ends")
    page.click("#toggle")
    page.until(lambda: "cursor" in page.text("listening"), "hoped to listen")
    node.publish("ends", 1)
    page.until(lambda: "1 message," in page.text("listening"), "hoped for a message")

    assert node.request("DELETE", "/channels/ends") == 204
    page.until(lambda: "The channel ends was closed." in page.text("log"), "hoped for the word")
    page.click("#toggle")


@pytest.mark.browser
def test_a_node_that_dies_goes_from_the_list(page: Dashboard, redis_server: RedisServer) -> None:
    """First it is silent, and when it has been for a minute it is gone; the totals are of those that live."""
    realm = f"dash{os.getpid()}"
    shared = {"broker": redis_server.url, "realm": realm}
    one = Node(name="one", **shared)
    two = Node(name="two", **shared)
    try:
        page.open(one.admin)
        with two.polls("a", 2):
            page.until(
                lambda: [row[:2] for row in page.rows("nodes")] == [["one this one", "ready"], ["two", "ready"]], "2"
            )
            page.until(lambda: page.text("parked-all") == "2 on all 2 nodes", "hoped for the sum")
            link = page.browser.find_element("css selector", "[data-node=two] a")
            assert link.get_attribute("href") == f"http://{two.admin}/"
            two.kill()
        page.until(lambda: "silent" in page.rows("nodes")[1][1], "hoped that it falls silent")
        page.until(lambda: page.text("nodes-note").startswith("1 node,"), "hoped for one node")

        with redis_server.client() as redis:
            said = redis.hget(f"pushup:{{{realm}}}:nodes", "two")
            assert isinstance(said, bytes)
            heard, _, about = said.partition(b" ")
            redis.hset(f"pushup:{{{realm}}}:nodes", "two", b"%d %b" % (int(heard) - 61_000_000, about))
        page.until(lambda: [row[0] for row in page.rows("nodes")] == ["one this one"], "hoped that it is gone")
        assert page.complaints() == []
    finally:
        one.stop()
        two.kill()


@pytest.mark.browser
def test_a_lost_connection_is_said_and_found_again(page: Dashboard, node: Node) -> None:
    """The figures stay, dimmed, with their time; when the node is there again they go on."""
    page.open(node.admin)
    conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.enable", {})
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **conditions})
    try:
        page.until(lambda: page.text("state") == "offline", "hoped for the word")
        assert page.text("reason") == "This browser is offline."
        assert "as of" in page.text("about")
        assert page.text("parked") == "0"
    finally:
        page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **conditions})
    page.until(lambda: page.text("state") == "ready", "hoped to be back")
    assert not page.browser.find_element("id", "trouble").is_displayed()
    page.complaints()


@pytest.mark.browser
def test_a_node_that_comes_back_is_found_again(page: Dashboard) -> None:
    """Its samples are gone and its counters begin anew: the page says that it missed some, and goes on."""
    node = Node(name="phoenix")
    try:
        page.open(node.admin)
        node.publish("before", 1)
        page.until(lambda: page.number("publications") > 0, "hoped for a rate")
    finally:
        node.kill()
    page.until_has("state", "no connection")
    assert page.text("reason") == "The connection to this node is lost."
    assert page.browser.title.startswith("(lost) phoenix")

    again = Node(name="phoenix", listen=node.address, admin_listen=node.admin)
    try:
        # Not by the pointer: the page may just have found it by itself, and the button is gone.
        page.browser.execute_script("document.getElementById('retry').click()")
        page.until(lambda: page.text("state") == "ready", "hoped to be back")
        page.until_has("samples", "1 gap")
        again.publish("after", 1)
        page.until(lambda: page.number("publications") > 0, "hoped for a rate")
        page.until(lambda: [row[0] for row in page.rows("channels")] == ["after"], "hoped for the channel")
    finally:
        again.stop()
    page.complaints()


@pytest.mark.browser
def test_a_page_that_nobody_sees_does_not_ask(page: Dashboard, node: Node) -> None:
    """It goes on where it was as soon as it is seen again."""

    def turn(hidden: bool) -> None:
        page.browser.execute_script(
            "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))",
            hidden,
        )

    page.open(node.admin)
    turn(True)
    # An answer may have come just before; give the page the time to show it.
    page.browser.execute_async_script("setTimeout(arguments[0], 250)")
    cursor = page.text("cursor")
    connection = http.client.HTTPConnection(node.admin, timeout=PATIENCE_S)
    later = int(cursor) + 2_500_000
    try:
        connection.request("GET", f"/dashboard/poll?start={later}", headers={"Host": "localhost"})
        assert json.loads(connection.getresponse().read())["next"] > later
    finally:
        connection.close()
    assert page.text("cursor") == cursor

    turn(False)
    page.until(lambda: int(page.text("cursor")) > later, "hoped to go on")
    assert page.text("samples").endswith(", 0 gaps")
    assert page.complaints() == []


@pytest.mark.browser
def test_a_name_that_the_node_does_not_trust(page: Dashboard, node: Node) -> None:
    """The page cannot do anything, and says what to do about it."""
    port = node.admin.rpartition(":")[2]
    page.browser.get(f"http://push.localhost:{port}/")
    page.until_has("reason", "use an address or localhost, or name the host in admin_listen")
    page.complaints()


@pytest.mark.browser
def test_a_realm_is_chosen(page: Dashboard, tmp_path: Path) -> None:
    """And the address of the page keeps the choice."""
    access = tmp_path / "access.toml"
    access.write_text(CLOSED)
    node = Node(access=str(access))
    try:
        page.open(node.admin)
        page.click("#realm [value=shop]")
        page.until(lambda: page.browser.current_url.endswith("#realm=shop"), "hoped for the address")
        page.fill("publish-channel", "sales")
        page.fill("data", "1")
        page.click("#send")
        page.until(lambda: ["sales", "0", "1"] in [row[:3] for row in page.rows("channels")], "hoped for the channel")
        page.browser.refresh()
        page.until(lambda: [row[0] for row in page.rows("channels")] == ["sales"], "hoped for the same realm")
        page.click("#realm [value=default]")
        page.until(lambda: page.rows("channels") == [] and page.rows("nodes") != [], "hoped for the other one")
        assert page.complaints() == []
    finally:
        node.stop()


@pytest.mark.browser
def test_the_empty_page_says_what_would_be_there(page: Dashboard) -> None:
    """A node that nobody has used."""
    node = Node()
    try:
        page.open(node.admin)
        assert page.text("channels-empty").startswith("No channel has messages or polls.")
        assert page.text("refused-empty").startswith("No request was refused")
        assert page.text("ends-empty") == "No poll has ended in this time."
        assert page.text("p99") == "–"
    finally:
        node.stop()


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_width_scrolls_sideways(page: Dashboard, node: Node, width: int) -> None:
    """From a phone on; long names are broken."""
    node.publish("a-very-long-name-of-a-channel." * 8, "x" * 300)
    page.resize(width)
    page.open(node.admin)
    page.until(lambda: any(row[0].startswith("a-very-long") for row in page.rows("channels")), "hoped for the channel")
    page.click("[data-listen^='a-very-long']")
    page.until(lambda: "xxx" in page.text("log"), "hoped for the message")
    page.click("#toggle")

    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.browser.execute_script("return innerWidth") == width
    cut = page.browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => e.getClientRects().length"
        " && !e.closest('.unseen, thead') && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []


@pytest.mark.browser
def test_light_and_dark(page: Dashboard, node: Node) -> None:
    """As the system prefers; text stays readable on its ground in both."""
    page.open(node.admin)
    grounds = {}
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        grounds[scheme] = [
            page.browser.execute_script(
                "const s = getComputedStyle(document.querySelector(arguments[0])); return [s.color, s.backgroundColor]",
                selector,
            )
            for selector in ("body", ".card", "#state", "#send")
        ]
        for ink, ground in grounds[scheme]:
            assert contrast(ink, ground) >= 4.5
    assert all(light != dark for light, dark in zip(grounds["light"], grounds["dark"], strict=True))


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two colours, each `rgb(R, G, B)`."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        red, green, blue = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
def test_the_focus_stays_on_its_channel(page: Dashboard, node: Node) -> None:
    """Also when busier channels move it down the table; nothing that changes every second is read out."""
    node.publish("focus", 1)
    page.open(node.admin)
    page.until(lambda: "focus" in [row[0] for row in page.rows("channels")], "hoped for the channel")
    page.browser.execute_script("document.querySelector('[data-listen=focus]').focus()")
    before = [row[0] for row in page.rows("channels")].index("focus")

    with node.polls("busier", 2):
        page.until(lambda: [row[0] for row in page.rows("channels")].index("focus") > before, "hoped for a move")
        assert page.browser.execute_script("return document.activeElement.dataset.listen") == "focus"

    live = page.browser.execute_script(
        "return [...document.querySelectorAll('output, [aria-live], [role=status], [role=alert], [role=log]')]"
        ".map(e => e.id)"
    )
    assert sorted(live) == ["log", "outcome", "reason", "state"]


@pytest.mark.browser
def test_everything_has_a_name(page: Dashboard, node: Node) -> None:
    """What can be reached by keyboard says what it is, and so do charts."""
    page.open(node.admin)
    nameless = page.browser.execute_script(
        "return [...document.querySelectorAll('a, button, input, select, textarea, [role=img], section, article')]"
        ".filter(e => e.getClientRects().length && !(e.getAttribute('aria-label') || e.labels?.length"
        " || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent || e.textContent.trim()))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
