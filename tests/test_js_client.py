"""The JavaScript client in a real Chromium: at a node, behind HAProxy with two nodes, and at servers that misbehave."""

import asyncio
import http.client
import json
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from time import monotonic, time
from typing import Any, Final, TypeVar

import jwt
import pytest
from aiohttp import web
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from cluster import Cluster
from pushup import Publisher
from pushup.messages import Publication
from pushup.server import Server
from pushup.version import __version__
from tests import browser
from tests.support import PATIENCE_S, running

chromium = browser.chromium

pytestmark = pytest.mark.browser

CLIENT: Final = Path(__file__).parent.parent / "pushup" / "js"
PAGE: Final = Path(__file__).parent / "js"
SECRET: Final = "a secret of thirty-two bytes or more"

_T = TypeVar("_T")

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Servers:
    """An event loop in a thread, on which a test has its servers while it drives the browser."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._stops: list[Callable[[], Coroutine[Any, Any, None]]] = []

    def call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    def start(self, **settings: Any) -> Server:
        """A node in this process, which is stopped at the end of the test."""
        context = running(**{"drain_window": 0, **settings})
        server = self.call(context.__aenter__())

        async def stop() -> None:
            await context.__aexit__(None, None, None)

        self._stops.append(stop)
        return server

    def publish(self, server: Server, *data: Any, channel: str = "a") -> list[int]:
        """Publish in this order, and return the ids."""
        return [
            self.call(server.node.publish(Publication((channel,), json.dumps(item).encode()))).id for item in data
        ]

    def stop(self) -> None:
        while self._stops:
            self.call(self._stops.pop()())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Site:
    """The origin of the pages. What is not theirs is answered by `answer`, which a test may set."""

    def __init__(self, servers: Servers) -> None:
        self.answer: Answer = _nothing
        self._servers = servers
        self.port = servers.call(self._start())
        self.origin = f"http://127.0.0.1:{self.port}"

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_get("/", _file(PAGE / "page.html", "text/html"))
        app.router.add_get("/page.js", _file(PAGE / "page.js", "text/javascript"))
        app.router.add_get("/pushup.js", _file(CLIENT / "pushup.js", "text/javascript"))
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port: int = self._runner.addresses[0][1]
        return port

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        return await self.answer(request)

    def close(self) -> None:
        self._servers.call(self._runner.cleanup())


async def _nothing(request: web.Request) -> web.StreamResponse:
    return web.Response(status=404)


def _file(path: Path, kind: str) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=path.read_bytes(), content_type=kind)

    return answer


class Tab:
    """One tab with the test's page."""

    def __init__(self, driver: webdriver.Chrome, origin: str) -> None:
        self._driver = driver
        driver.switch_to.new_window("tab")
        self._handle = driver.current_window_handle
        self.open(origin)

    def open(self, origin: str) -> None:
        """Load the page, in place of the one that is there."""
        self.driver.get(origin)
        self.until("window.ready", lambda ready: ready is True)

    @property
    def driver(self) -> webdriver.Chrome:
        self._driver.switch_to.window(self._handle)
        return self._driver

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a function's body; a promise is waited for."""
        return self.driver.execute_script(script, *arguments)

    def follow(self, options: dict[str, Any], *channels: str | int, start: Any = "latest") -> None:
        """Subscribe, collect what comes, and wait until the server has answered."""
        self.run("follow(arguments[0], arguments[1], arguments[2])", options, channels, start)
        self.until_open()

    def until_open(self) -> None:
        self.until("subscription.state", lambda state: state == "open")

    def until(self, expression: str, condition: Callable[[Any], bool]) -> None:
        driver, last = self.driver, None

        def holds(_: object) -> bool:
            nonlocal last
            last = driver.execute_script(f"return {expression}")
            return condition(last)

        try:
            WebDriverWait(driver, PATIENCE_S, 0.02).until(holds)
        except Exception as error:
            raise AssertionError(f"{expression} is {last!r}; {self.complaints()}") from error

    def expect(self, *seen: Any) -> None:
        """Wait for as many things to be seen; then these are all, in this order."""
        self.until("seen", lambda found: len(found) >= len(seen))
        assert self.run("return seen") == list(seen)

    def complaints(self) -> list[Any]:
        return list(self.driver.get_log("browser"))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.driver.close()

    def offline(self, *, on: bool) -> None:
        """Cut this tab, and no other, off the network, or let it in again."""
        self.driver.execute_cdp_cmd("Network.enable", {})
        conditions = {"offline": on, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self._driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


@pytest.fixture(scope="module")
def loop() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.close()


@pytest.fixture
def servers(loop: Servers) -> Iterator[Servers]:
    yield loop
    loop.stop()


@pytest.fixture(scope="module")
def shared_site(loop: Servers) -> Iterator[Site]:
    made = Site(loop)
    yield made
    made.close()


@pytest.fixture
def tabs(chromium: webdriver.Chrome, shared_site: Site) -> Iterator[Callable[[], Tab]]:
    """Opens tabs, and closes them after the test."""
    home = chromium.current_window_handle
    yield lambda: Tab(chromium, shared_site.origin)
    for window in chromium.window_handles:
        if window != home:
            chromium.switch_to.window(window)
            chromium.close()
    chromium.switch_to.window(home)


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    yield shared_site
    shared_site.answer = _nothing


@pytest.fixture
def tab(tabs: Callable[[], Tab]) -> Tab:
    return tabs()


@pytest.fixture
def node(servers: Servers, site: Site) -> Server:
    """A node that pages of the site may use."""
    return servers.start(cors_origins=site.origin)


def at(server: Server, **options: Any) -> dict[str, Any]:
    """The options of a client of this node."""
    return {"url": f"http://{server.address}", **options}


def parked(server: Server) -> int:
    return server.node.parked


def until(condition: Callable[[], bool], hope: str) -> None:
    deadline = monotonic() + PATIENCE_S
    while not condition():
        assert monotonic() < deadline, f"hoped {hope}"
        threading.Event().wait(0.005)


# One tab, one node


@pytest.mark.parametrize("transport", ["poll", "events", "ws", "auto"])
def test_messages_come_in_order_by_every_transport(
    transport: str, tab: Tab, servers: Servers, node: Server
) -> None:
    """And the cursor is where the last one ends."""
    tab.follow(at(node, transport=transport), "a", "b")
    first = servers.publish(node, 1, 2)
    tab.expect(1, 2)
    servers.publish(node, 3, channel="b")
    servers.publish(node, 0, channel="c")
    (last,) = servers.publish(node, 4)

    tab.expect(1, 2, 3, 4)
    assert tab.run("return subscription.cursor") > last > first[1]


@pytest.mark.parametrize("transport", ["poll", "events", "ws"])
def test_the_cursor_moves_when_the_next_message_is_asked_for(
    transport: str, tab: Tab, servers: Servers, node: Server
) -> None:
    """So whoever goes on from it has every message that was not dealt with, once more."""
    one, two = servers.publish(node, 1, 2)
    tab.run("iterate(arguments[0], ['a'], 0)", at(node, transport=transport))

    tab.run("step()")
    tab.expect(1)
    assert tab.run("return subscription.cursor") == 0
    tab.run("step()")
    tab.expect(1, 2)
    assert tab.run("return subscription.cursor") == one + 1
    tab.run("step()")
    tab.until("subscription.cursor", lambda cursor: cursor > two)
    servers.publish(node, 3)
    tab.expect(1, 2, 3)
    tab.run("leave()")
    cursor = tab.run("return subscription.cursor")
    tab.run("seen.length = 0; follow(arguments[0], ['a'], arguments[1])", at(node, transport=transport), cursor)
    tab.expect(3)
