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
import uvloop
from aiohttp import web
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from cluster import Cluster
from pushup import Publisher
from pushup.messages import ChannelOptions, Publication
from pushup.server import Server
from pushup.version import __version__
from tests import browser
from tests.support import PATIENCE_S, running

chromium = browser.chromium

pytestmark = pytest.mark.browser

CLIENT: Final = Path(__file__).parent.parent / "pushup" / "js"
PAGE: Final = Path(__file__).parent / "js"
SECRET: Final = "a secret of thirty-two bytes or more"

FAST: Final = """\
const began = performance.now(), then = Date.now(), wait = setTimeout;
Date.now = () => then + (performance.now() - began) * 20;
window.setTimeout = (run, time) => wait(run, time / 20);"""
"""Time runs twenty times as fast in the page."""

_T = TypeVar("_T")

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Servers:
    """An event loop in a thread, on which a test has its servers while it drives the browser."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
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
        return [self.call(server.node.publish(Publication((channel,), json.dumps(item).encode()))).id for item in data]

    def stop(self) -> None:
        while self._stops:
            self.call(self._stops.pop()())

    def close(self) -> None:
        left = self.call(_finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert not left, f"tasks were left behind: {left}"


async def _finish() -> "set[asyncio.Task[Any]]":
    """Tasks that do not end by themselves now."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return (await asyncio.wait(tasks, timeout=1))[1] if tasks else set()


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
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
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
    body = path.read_bytes()

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=kind)

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
def test_messages_come_in_order_by_every_transport(transport: str, tab: Tab, servers: Servers, node: Server) -> None:
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


@pytest.mark.parametrize("transport", ["poll", "events", "ws"])
def test_a_gap_is_told_before_what_comes_after_it(transport: str, tab: Tab, servers: Servers, site: Site) -> None:
    """A channel keeps two messages; who has the first of five misses two."""
    node = servers.start(cors_origins=site.origin, channel_max_messages=2)
    first, *_ = servers.publish(node, 1, 2, 3, 4, 5)

    tab.follow(at(node, transport=transport), "a", start=first + 1)

    tab.expect("gap", 4, 5)


def test_a_gap_of_one_subscription_is_not_told_to_another(tab: Tab, servers: Servers, site: Site) -> None:
    """Although both share their polls."""
    node = servers.start(cors_origins=site.origin, channel_max_messages=2)
    first, *_ = servers.publish(node, 1, 2, 3, 4, 5)
    tab.follow(at(node), "b", start=first + 1)

    tab.run(
        "window.other = []; const another = pushup.subscribe(['a'], {start: arguments[0]});"
        "another.on('gap', () => other.push('gap')); another.on('message', ({data}) => other.push(data))",
        first + 1,
    )

    tab.until("other", lambda other: other == ["gap", 4, 5])
    servers.publish(node, 6, channel="b")
    tab.expect(6)
    until(lambda: parked(node) == 1, "for one poll of both")


def test_a_gap_that_nobody_listens_for_is_in_the_console(tab: Tab, servers: Servers, site: Site) -> None:
    """Nothing is lost silently."""
    node = servers.start(cors_origins=site.origin, channel_max_messages=2)
    first, *_ = servers.publish(node, 1, 2, 3, 4)
    tab.complaints()

    read = """return (async (options, start) => {
        const subscription = new PushUp(options).subscribe("a", {start});
        for await (const {data} of subscription) return [data, subscription.cursor];
    })(...arguments)"""
    assert tab.run(read, at(node), first + 1) == [3, first + 1]

    assert [entry["level"] for entry in tab.complaints() if "may have been missed" in entry["message"]] == ["WARNING"]


@pytest.mark.parametrize("transport", ["poll", "events", "ws"])
def test_closed_channels_are_told(transport: str, tab: Tab, servers: Servers, node: Server) -> None:
    """A subscription goes on without an integer channel, waits on for a named one, and ends with its last channel."""
    number = str(servers.call(node.node.broker.create(None, ChannelOptions())).channel)
    servers.publish(node, 0)
    tab.follow(at(node, transport=transport), "a", int(number))
    tab.run("window.alone = pushup.subscribe([arguments[0]]); watch(alone)", int(number))
    tab.until("alone.state", lambda state: state == "open")

    servers.call(node.node.broker.close(number))
    tab.until("alone.state", lambda state: state == "closed")
    servers.call(node.node.broker.close("a"))
    tab.until("seen.length", lambda count: count == 3)
    servers.publish(node, 1)

    tab.expect({"closed": [int(number)]}, {"closed": [int(number)]}, {"closed": ["a"]}, 1)
    assert tab.run("return subscription.state") == "open"


def test_many_channels_are_asked_for_by_post_and_too_many_in_several_polls(
    tab: Tab, servers: Servers, site: Site
) -> None:
    """A node that takes fewer channels than usual, too; no request is preflighted."""
    node = servers.start(cors_origins=site.origin, poll_channels_max=60)
    names = [f"channel-{number}-{'x' * 40}" for number in range(100)]
    tab.follow(at(node), *names[:50])
    tab.run(
        "window.other = pushup.subscribe(arguments[0]); other.on('message', ({data}) => seen.push(data))", names[50:]
    )

    tab.until("other.state", lambda state: state == "open")
    until(lambda: parked(node) == 2, "for two polls")
    servers.publish(node, 1, channel=names[0])
    tab.expect(1)
    servers.publish(node, 2, channel=names[-1])

    tab.expect(1, 2)
    asked = tab.run("return performance.getEntriesByType('resource').map(({name}) => name)")
    assert any(name.endswith("/poll") for name in asked)


def test_an_error_that_will_not_pass_ends_the_subscription(tab: Tab, node: Server) -> None:
    """It is told, and thrown where it is iterated; other subscriptions go on."""
    tab.follow(at(node), "a")
    tab.run("window.wrong = pushup.subscribe([4711]); watch(wrong)")
    tab.expect({"status": 404, "code": "channel_not_found"})
    assert tab.run("return [wrong.state, subscription.state]") == ["closed", "open"]
    tab.run("iterate(arguments[0], [4711], 'latest'); step()", at(node))

    tab.until("seen.length", lambda count: count == 3)
    assert {"thrown": "channel_not_found"} in tab.run("return seen")


def test_what_nobody_reads_is_bounded(tab: Tab, servers: Servers, node: Server) -> None:
    """The client asks no more, and goes on from there when there is room."""
    servers.publish(node, 0)
    tab.run("iterate(arguments[0], ['a'], 'latest'); step()", at(node))
    tab.until_open()
    for number in range(5):
        servers.publish(node, *range(number * 250 + 1, number * 250 + 251))

    until(lambda: parked(node) == 0, "that it ceases to ask")
    servers.publish(node, *range(1251, 1501))
    assert parked(node) == 0
    tab.run("(async () => { while (seen.at(-1) !== 1500) await step() })()")

    tab.expect(*range(1, 1501))


def test_close_releases_everything(tab: Tab, node: Server) -> None:
    """The poll, and the locks."""
    tab.follow(at(node), "a")
    until(lambda: parked(node) == 1, "for its poll")
    held = "return navigator.locks.query().then(({held, pending}) => held.length + pending.length)"
    assert tab.run(held) == 2

    tab.run("subscription.close()")

    until(lambda: parked(node) == 0, "that it has gone")
    assert tab.run(held) == 0
    assert tab.run("return subscription.state") == "closed"


def test_a_reload_goes_on_from_the_stored_cursor(tab: Tab, servers: Servers, site: Site, node: Server) -> None:
    """With a storage, what was said meanwhile is not missed, and nothing comes twice."""
    follow = "follow({...arguments[0], storage: sessionStorage}, ['a'], 'latest')"
    tab.run(follow, at(node))
    tab.until_open()
    servers.publish(node, 1)
    tab.expect(1)

    tab.driver.get("about:blank")
    servers.publish(node, 2)
    tab.open(site.origin)
    tab.run(follow, at(node))

    tab.expect(2)


def test_publishing_is_tried_again_with_the_same_key(tab: Tab, servers: Servers, node: Server) -> None:
    """A receipt that was lost costs nothing: the message is there once."""
    tab.follow(at(node), "a")
    tab.run(
        "const honest = fetch; window.fetch = async (url, options) => {"
        "  const response = await honest(url, options);"
        "  if (!url.endsWith('/publish')) return response;"
        "  window.fetch = honest; throw new TypeError('the connection broke');"
        "};"
    )

    receipt = tab.run("return pushup.publish('a', 1)")
    servers.publish(node, 2)

    tab.expect(1, 2)
    assert receipt["id"] < tab.run("return subscription.cursor")
    assert node.node.metrics.publications_duplicate == 1


def test_publishing_what_is_refused_says_so_at_once(tab: Tab, node: Server) -> None:
    """Nothing is tried again."""
    refused = tab.run(
        "return new PushUp(arguments[0]).publish('a', 'x'.repeat(70000)).catch(({status, code}) => [status, code])",
        at(node),
    )

    assert refused == [413, "too_large"]


# Ten tabs


def test_ten_tabs_share_one_poll_and_miss_nothing_when_the_leader_goes(
    tabs: Callable[[], Tab], servers: Servers, node: Server
) -> None:
    """HTTP/1.1 allows a browser six connections. All get every message once and in order, whoever leads."""
    opened = [tabs() for _ in range(10)]
    for tab in opened:
        tab.follow(at(node), "a")
    until(lambda: parked(node) == 1, "for one poll")
    servers.publish(node, 1, 2)
    for tab in opened:
        tab.expect(1, 2)
    until(lambda: parked(node) == 1, "for one poll again")

    opened.pop(0).close()
    servers.publish(node, 3, 4)
    for tab in opened:
        tab.expect(1, 2, 3, 4)
    until(lambda: parked(node) == 1, "for one poll of the next leader")
    answered = node.node.metrics.answers["message"]
    servers.publish(node, *range(5, 15))
    for tab in opened:
        tab.expect(*range(1, 15))
    assert node.node.metrics.answers["message"] - answered <= 10
    until(lambda: parked(node) == 1, "for one poll at the end")


def test_a_frozen_leader_is_replaced(tabs: Callable[[], Tab], servers: Servers, node: Server) -> None:
    """It lets go of the lock when the browser freezes it, and comes back with its own cursor."""
    leader, follower = tabs(), tabs()
    leader.follow(at(node), "a")
    follower.follow(at(node), "a", "b")

    leader.run("window.frozen = 0; document.addEventListener('freeze', () => frozen++)")

    leader.driver.execute_cdp_cmd("Page.setWebLifecycleState", {"state": "frozen"})
    servers.publish(node, 1, 2)
    follower.expect(1, 2)
    leader.driver.execute_cdp_cmd("Page.setWebLifecycleState", {"state": "active"})

    leader.expect(1, 2)
    assert leader.run("return frozen") == 1
    servers.publish(node, 3)
    for tab in (leader, follower):
        tab.expect(1, 2, 3)
    until(lambda: parked(node) == 1, "for one poll")


def test_a_leader_that_says_nothing_loses_the_lock(tabs: Callable[[], Tab], servers: Servers, node: Server) -> None:
    """A tab that is stuck cannot let go. Who asked it in vain takes over, and it follows when it wakes up."""
    stuck, other = tabs(), tabs()
    stuck.follow(at(node), "a")
    # Its time runs a hundred times as fast.
    other.run(
        "for (const name of ['setInterval', 'setTimeout']) {const honest = window[name];"
        "  window[name] = (run, wait) => honest(run, wait / 100)}"
    )
    other.follow(at(node), "a")

    stuck.run(
        "const honest = BroadcastChannel.prototype.postMessage;"
        "BroadcastChannel.prototype.postMessage = function (said) {if (said.join) honest.call(this, said)}"
    )
    other.run("const now = Date.now; Date.now = () => now() + 60_000")
    servers.publish(node, 1, 2)

    for tab in (other, stuck):
        tab.expect(1, 2)
    servers.publish(node, 3)
    for tab in (stuck, other):
        tab.expect(1, 2, 3)
    until(lambda: parked(node) == 1, "for one poll")


def test_tabs_follow_what_they_like(tabs: Callable[[], Tab], servers: Servers, node: Server) -> None:
    """A follower's channels and cursor count; so does its end."""
    leader, follower = tabs(), tabs()
    leader.follow(at(node), "a")
    servers.publish(node, 1, channel="b")
    follower.follow(at(node), "b", start=0)

    follower.expect(1)
    servers.publish(node, 2, channel="b")
    servers.publish(node, 3, channel="a")
    follower.expect(1, 2)
    leader.expect(3)
    follower.close()
    servers.publish(node, 4)
    leader.expect(3, 4)


@pytest.mark.parametrize(
    "locks", ["undefined", "{request: async () => {throw new DOMException('no', 'SecurityError')}}"]
)
def test_without_web_locks_each_tab_asks_for_itself(
    locks: str, tabs: Callable[[], Tab], servers: Servers, node: Server
) -> None:
    """So in pages that came without TLS or are sandboxed, and wherever sharing is not wanted."""
    pair = [tabs(), tabs()]
    pair[0].run(f"Object.defineProperty(navigator, 'locks', {{value: {locks}}})")
    pair[0].follow(at(node), "a")
    pair[1].follow(at(node, share=False), "a")

    until(lambda: parked(node) == 2, "for two polls")
    servers.publish(node, 1)
    for tab in pair:
        tab.expect(1)


def test_a_page_that_is_come_back_to_goes_on(tab: Tab, servers: Servers, site: Site, node: Server) -> None:
    """The browser keeps it for the way back; meanwhile it holds no poll, and afterwards it has missed nothing."""
    tab.follow(at(node), "a")
    servers.publish(node, 1)
    tab.expect(1)

    tab.driver.get(f"{site.origin}/page.js")
    until(lambda: parked(node) == 0, "that it lets go of its poll")
    servers.publish(node, 2)
    tab.driver.back()

    tab.expect(1, 2)


# Tokens


@pytest.fixture
def guarded(servers: Servers, site: Site, tmp_path: Path) -> Server:
    """A node that knows everybody by a token."""
    secret, file = tmp_path / "secret", tmp_path / "access.toml"
    secret.write_text(SECRET)
    file.write_text(f'[realms.default.tokens]\nsecret_file = "{secret}"\npublish = true\n')
    return servers.start(cors_origins=site.origin, access=file)


def token(sub: str = "ann", life: float = 3600.0) -> str:
    claims = {"exp": time() + life, "sub": sub, "pushup": {"subscribe": ["*"], "publish": ["*"]}}
    return jwt.encode(claims, SECRET, "HS256")


@pytest.mark.parametrize("transport", ["poll", "events", "ws"])
def test_an_expired_token_is_replaced_and_nothing_is_missed(
    transport: str, tab: Tab, servers: Servers, guarded: Server
) -> None:
    """The function is asked once for each; the second token is got while the first one's request waits."""
    tokens = [token(life=1.2), token()]
    tab.run("window.tokens = arguments[0]; window.asked = 0", tokens)
    options = at(guarded, transport=transport)
    tab.run("follow({...arguments[0], token: async () => tokens[asked++]}, ['a'], 'latest')", options)
    tab.until_open()
    servers.publish(guarded, 1)
    tab.expect(1)

    tab.until("asked", lambda asked: asked == 2)
    servers.publish(guarded, 2)

    tab.expect(1, 2)
    assert tab.run("return asked") == 2


def test_a_token_that_is_refused_twice_is_an_error(tab: Tab, guarded: Server) -> None:
    """The function is asked once more, not for ever."""
    tab.run("window.asked = 0")
    expired = token(life=-1)
    tab.run(
        "follow({...arguments[0], token: () => {asked++; return arguments[1]}}, ['a'])".replace(
            "arguments[1]", json.dumps(expired)
        ),
        at(guarded),
    )

    tab.expect({"status": 401, "code": "token_expired"})
    assert tab.run("return asked") == 2
    assert tab.run("return subscription.state") == "closed"


def test_tabs_share_by_whose_token_it_is(tabs: Callable[[], Tab], servers: Servers, guarded: Server) -> None:
    """A later token of the same person is the same; another person's is not."""
    ann, again, bob = tabs(), tabs(), tabs()
    for tab, mine in ((ann, token()), (again, token(life=7200.0)), (bob, token("bob"))):
        tab.follow(at(guarded, token=mine), "a")

    until(lambda: parked(guarded) == 2, "for one poll of each person")
    servers.publish(guarded, 1)
    for tab in (ann, again, bob):
        tab.expect(1)
    until(lambda: parked(guarded) == 2, "for one poll of each person again")


def test_a_token_costs_one_preflight(tab: Tab, servers: Servers, guarded: Server) -> None:
    """A page of another origin shows it to one URL, whatever the cursor, and to another one to publish."""
    tab.follow(at(guarded, token=token()), "a")
    tab.run("return pushup.publish('a', 1)")
    tab.expect(1)
    servers.publish(guarded, 2)
    tab.expect(1, 2)

    names = tab.run("return performance.getEntriesByType('resource').map(({name}) => name)")
    asked = [name.rpartition("/")[2] for name in names if guarded.address in name]
    assert set(asked) == {"poll", "publish"}


# Servers that misbehave


def empty(next: int = 1, *messages: dict[str, Any]) -> web.Response:
    return web.json_response({"messages": messages, "next": next, "gap": False})


def message(number: int) -> dict[str, Any]:
    return {"id": number, "channels": ["a"], "data": number}


async def park() -> web.Response:
    await asyncio.sleep(20)
    return empty()


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(status: int, tab: Tab, site: Site) -> None:
    """Whatever happens in the page meanwhile; what comes then was not missed."""
    times: list[float] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        times.append(monotonic())
        match len(times):
            case 1:
                return empty(5)
            case 2:
                problem = {"status": status, "code": "too_many", "detail": "wait", "retry_after": 1}
                return web.json_response(problem, status=status, headers={"Retry-After": "1"})
            case 3:
                return empty(6, message(5))
        return await park()

    site.answer = answer
    tab.run("follow({}, ['a'])")
    tab.until("subscription.state", lambda state: state == "waiting")
    tab.run("window.dispatchEvent(new Event('online')); document.dispatchEvent(new Event('visibilitychange'))")

    tab.expect(5)
    assert 1.0 <= times[2] - times[1] < 4.0


def test_back_off_is_cut_short_when_it_helps(tab: Tab, site: Site) -> None:
    """Delays grow with every failure, up to half a minute; coming online ends one at once."""
    asked = 0
    good = False

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        return await park() if asked > 8 else empty(5) if good else web.Response(status=500)

    site.answer = answer
    tab.run("Math.random = () => 0.999; follow({}, ['a'])")
    until(lambda: asked == 3, "for 0.5 and 1 second")
    threading.Event().wait(0.3)
    assert asked == 3
    good = True

    tab.run("window.dispatchEvent(new Event('online'))")

    tab.until("subscription.state", lambda state: state == "open")


def test_a_server_that_never_waits_is_not_asked_in_a_tight_loop(tab: Tab, site: Site) -> None:
    """One early answer is a node that drains, and followed by the next poll at once."""
    times: list[float] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        times.append(monotonic())
        return empty(5)

    site.answer = answer
    tab.run("Math.random = () => 0.999; follow({}, ['a'])")
    until(lambda: len(times) == 5, "for some polls")

    assert times[2] - times[1] < 0.3
    assert times[4] - times[3] > 0.3


def test_a_poll_that_is_silent_for_too_long_is_given_up(tab: Tab, site: Site) -> None:
    """As when a laptop slept: its connection is gone, and nobody says so."""
    asked = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked == 2:
            return await park()
        return empty(5) if asked == 1 else empty(6, message(5)) if asked == 3 else await park()

    site.answer = answer
    tab.run(FAST)
    tab.run("follow({}, ['a'])")

    tab.expect(5)
    assert tab.run("return states") == ["open", "waiting", "open"]


def test_a_token_that_cannot_be_had_is_asked_for_again(tab: Tab, servers: Servers, guarded: Server) -> None:
    """Where tokens come from may be down for a while, too."""
    tab.run(
        "window.asked = 0; Math.random = () => 0;"
        "const token = () => {if (++asked < 4) throw new Error('down'); return arguments[1]};"
        "follow({...arguments[0], token}, ['a'])",
        at(guarded),
        token(),
    )

    tab.until_open()
    assert tab.run("return [asked, states]") == [4, ["waiting", "open"]]


@pytest.mark.parametrize("refusal", ["websocket refused", "events refused too", "events kept back"])
def test_auto_falls_back_to_what_gets_through(refusal: str, tab: Tab, site: Site) -> None:
    """From WebSocket to events to polls, with the same cursor; and stays with it."""
    if refusal == "events kept back":
        tab.run(FAST)
    paths: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        paths.append(request.path.strip("/"))
        if request.path == "/ws":
            return web.Response(status=403)
        if request.path == "/events":
            if refusal == "events refused too":
                return web.Response(status=502)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            if refusal == "websocket refused":
                await response.write(b"retry: 2000\n\n: \nid: 9\n\nid: 10\ndata: " + json.dumps(message(9)).encode())
                await response.write(b"\n\n")
            await asyncio.sleep(20)
            return response
        start = request.query["start"]
        if request.query["timeout"] == "0":
            return empty(9)
        return empty(10, message(9)) if start == "9" else await park()

    site.answer = answer
    tab.run("follow({transport: 'auto'}, ['a'])")

    tab.expect(9)
    expected = {
        "websocket refused": ["poll", "ws", "poll", "events"],
        "events refused too": ["poll", "ws", "poll", "events", "poll", "poll", "poll"],
        "events kept back": ["poll", "ws", "poll", "events", "poll", "poll", "poll"],
    }[refusal]
    until(lambda: len(paths) >= len(expected), f"for {expected}")
    assert paths[: len(expected)] == expected


def test_what_is_not_pushup_is_not_believed(tab: Tab, site: Site) -> None:
    """A sign-in page of a hotel's network, say. It is no error, as it passes."""
    pages = 2

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal pages
        pages -= 1
        if pages >= 0:
            return web.Response(text="<h1>Welcome</h1>", content_type="text/html")
        return empty(5) if request.query["timeout"] == "0" else await park()

    site.answer = answer
    tab.run("Math.random = () => 0; follow({}, ['a'])")

    tab.until("subscription.state", lambda state: state == "open")
    assert tab.run("return states") == ["waiting", "open"]


@pytest.mark.parametrize("transport", ["poll", "events"])
def test_offline_and_online_again(transport: str, tab: Tab, servers: Servers, node: Server) -> None:
    """What was said meanwhile comes as soon as the network is back."""
    tab.follow(at(node, transport=transport), "a")
    servers.publish(node, 1)
    tab.expect(1)

    tab.offline(on=True)
    tab.until("subscription.state", lambda state: state == "offline")
    servers.publish(node, 2, 3)
    tab.offline(on=False)

    tab.expect(1, 2, 3)
    assert tab.run("return states") == ["open", "offline", "open"]


# Two nodes behind HAProxy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, shared_site: Site) -> Iterator[Cluster]:
    settings = {"cors_origins": shared_site.origin, "drain_window": "0.5"}
    made = Cluster.up(tmp_path_factory.mktemp("cluster") / "state", nodes=2, settings=settings)
    try:
        yield made
    finally:
        made.down()


def load(cluster: Cluster, metric: str) -> dict[str, float]:
    """One metric of each node that lives, by its name."""
    found = {}
    for node in cluster.nodes:
        if node.alive:
            connection = http.client.HTTPConnection(node.admin_address, timeout=PATIENCE_S)
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            connection.close()
            found[node.name] = sum(map(float, re.findall(rf"^{metric}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))
    return found


@pytest.mark.parametrize("transport", ["poll", "events", "ws"])
def test_nothing_is_missed_whatever_ends_the_node(transport: str, tab: Tab, cluster: Cluster) -> None:
    """A node that holds the connection is killed, the next one drained, while messages are published."""
    sent = 0
    with Publisher(cluster.broker) as publisher:
        tab.follow({"url": f"http://{cluster.public}", "transport": transport}, transport)
        for end in (cluster.kill, cluster.drain):
            cluster.scale(2)
            until(lambda: sum(load(cluster, "pushup_parked_polls").values()) >= 1, "for a poll")
            holder, _ = max(load(cluster, "pushup_parked_polls").items(), key=lambda item: item[1])

            publisher.publish(transport, sent + 1)
            end(holder)
            for number in range(sent + 2, sent + 6):
                publisher.publish(transport, number)
            sent += 5

            tab.expect(*range(1, sent + 1))
        assert tab.run("return subscription.cursor") > 0


# The package


def test_the_package_has_the_version_of_the_server() -> None:
    """And names files that are there, one module with its types."""
    package = json.loads((CLIENT / "package.json").read_text())

    assert (package["name"], package["version"]) == ("pushup-client", __version__)
    assert all((CLIENT / name).is_file() for name in package["files"])
    assert package["exports"]["."] == {"types": "./pushup.d.ts", "default": "./pushup.js"}
    assert "dependencies" not in package


def test_a_node_serves_the_module(tab: Tab, node: Server) -> None:
    """To pages of every origin."""
    assert tab.run("return import(arguments[0]).then(({PushUp}) => PushUp.name)", f"http://{node.address}/pushup.js")


def test_the_module_depends_on_nothing() -> None:
    """One file, which a node can serve as it is."""
    assert not re.search(r"^\s*(import|export .* from)\b|\bimport\(", (CLIENT / "pushup.js").read_text(), re.MULTILINE)
