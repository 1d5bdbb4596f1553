"""EventSource and WebSocket of a real Chromium, through a real HAProxy, with nodes that are killed and drained."""

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from selenium import webdriver

from cluster import Cluster
from cluster.nodes import Node
from pushup import Publisher
from tests.browser import chromium as chromium
from tests.test_cluster_operate import taken_down

pytestmark = pytest.mark.browser

PATIENCE_S: Final = 30.0
"""Longer than elsewhere: a browser comes back after up to three seconds, to a node that has to be found first."""

PAUSE_S: Final = 0.005
TYPES: Final = {"events": "text/event-stream", "socket": "websocket"}

FOLLOW: Final = {
    "events": """
        const page = window.page = {got: [], ids: [], gaps: 0, opened: 0, lost: 0, failed: 0}
        const [channel, start] = arguments
        const connect = () => {
            const source = new EventSource(`/events?channel=${channel}&start=${start}`)
            page.close = () => source.close()
            source.onopen = () => { page.opened++ }
            source.onerror = () => {
                page.lost++
                if (source.readyState !== EventSource.CLOSED) return
                // Until it has been open once HAProxy's former worker may be asked, whose nodes are gone by now.
                if (page.opened) page.failed++
                else setTimeout(connect, 200)
            }
            source.onmessage = (event) => {
                const message = JSON.parse(event.data)
                page.got.push(message.data)
                page.ids.push(Number(event.lastEventId) - message.id)
            }
            source.addEventListener("gap", () => { page.gaps++ })
        }
        connect()
    """,
    "socket": """
        const [channel, start] = arguments
        const page = window.page = {got: [], ids: [], gaps: 0, opened: 0, lost: 0, failed: 0, codes: [], cursor: start}
        const connect = () => {
            const socket = new WebSocket(`ws://${location.host}/ws`)
            page.close = () => { socket.onclose = null; socket.close() }
            socket.onopen = () => { socket.send(JSON.stringify({subscribe: [channel], start: page.cursor})) }
            socket.onmessage = (event) => {
                const said = JSON.parse(event.data)
                if (!said.messages) return
                if (said.gap) page.gaps++
                for (const message of said.messages) page.got.push(message.data)
                page.cursor = said.next
                page.opened++
            }
            socket.onclose = (event) => {
                page.lost++
                page.codes.push(event.code)
                setTimeout(connect, 100 + 200 * Math.random())
            }
        }
        connect()
    """,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes whose streams have short heartbeats."""
    state = tmp_path_factory.mktemp("cluster") / "state"
    with taken_down(Cluster.up(state, nodes=2, settings={"drain_window": "1", "heartbeat": "1"})) as cluster:
        yield cluster


class Publishing:
    """A publisher that goes on, one number after the other."""

    def __init__(self, cluster: Cluster, channel: str) -> None:
        self.count = 0
        self._broker = cluster.broker
        self._channel = channel
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Publishing":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Publish no more."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with Publisher(self._broker) as publisher:
            while not self._ended.wait(PAUSE_S):
                publisher.publish(self._channel, self.count)
                self.count += 1


class Tab:
    """A page that follows one channel."""

    def __init__(self, browser: webdriver.Chrome, cluster: Cluster, kind: str, channel: str, start: int | str) -> None:
        self._browser = browser
        browser.get(f"http://{cluster.public}/")
        browser.execute_script(FOLLOW[kind], channel, start)

    def read(self, name: str) -> Any:
        return self._browser.execute_script(f"return page.{name}")

    def close(self) -> None:
        self._browser.execute_script("page.close()")


def until(condition: Callable[[], bool], hope: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, hope()
        time.sleep(0.02)


def streams(node: Node, kind: str) -> int:
    """How many of them the node serves."""
    with urllib.request.urlopen(f"http://{node.admin_address}/metrics", timeout=PATIENCE_S) as response:
        text = response.read().decode()
    match = re.search(rf'^pushup_open_streams{{type="{TYPES[kind]}"}} (\d+)', text, re.MULTILINE)
    assert match
    return int(match[1])


def holder(cluster: Cluster, kind: str) -> Node:
    """The node that serves the only stream there is."""
    holders: list[Node] = []

    def found() -> bool:
        holders[:] = [node for node in cluster.nodes if node.alive and streams(node, kind)]
        return len(holders) == 1

    until(found, lambda: holders)
    return holders[0]


@pytest.mark.parametrize("kind", FOLLOW)
@pytest.mark.parametrize("end", ["kill", "drain"])
def test_nothing_is_lost_or_doubled_when_its_node_ends(
    chromium: webdriver.Chrome, cluster: Cluster, kind: str, end: str
) -> None:
    """While a publisher goes on, the node that serves the page is killed, or drained: the page comes back to another
    one, and has been given every message once, in order."""
    channel = f"{kind}-{end}"
    with Publishing(cluster, channel) as publishing:
        tab = Tab(chromium, cluster, kind, channel, 0)
        until(lambda: len(tab.read("got")) > 20, lambda: tab.read("got"))
        for _ in range(2):
            node = holder(cluster, kind)
            before = publishing.count
            lost = tab.read("lost")
            if end == "kill":
                cluster.kill(node.name)
            else:
                cluster.drain(node.name)
            until(lambda: tab.read("lost") > lost, lambda: "nothing was noticed")  # noqa: B023
            until(lambda: len(tab.read("got")) > before + 100, lambda: (before, len(tab.read("got"))))  # noqa: B023
            cluster.scale(2)
        publishing.stop()
        until(lambda: len(tab.read("got")) >= publishing.count, lambda: (publishing.count, tab.read("got")[-5:]))
    tab.close()
    assert tab.read("got") == list(range(publishing.count))
    assert (tab.read("gaps"), tab.read("failed")) == (0, 0)
    assert set(tab.read("ids")) <= {1}, "the last id of an event is the cursor behind it"
    if kind == "socket":
        assert set(tab.read("codes")) == {1006 if end == "kill" else 1001}


@pytest.mark.parametrize("kind", FOLLOW)
def test_from_now_on_has_no_hole(chromium: webdriver.Chrome, cluster: Cluster, kind: str) -> None:
    """A page that asked for what is new was cut off before anything came: it is given what was published meanwhile, as
    a block without data has moved its cursor."""
    channel = f"latest-{kind}"
    with Publisher(cluster.broker) as publisher:
        publisher.publish(channel, "old")
        tab = Tab(chromium, cluster, kind, channel, "latest")
        until(lambda: bool(tab.read("opened")), lambda: "it is open")
        cluster.kill(holder(cluster, kind).name)
        publisher.publish(channel, "meanwhile")
        until(lambda: bool(tab.read("got")), lambda: tab.read("lost"))
        publisher.publish(channel, "after")
        until(lambda: len(tab.read("got")) > 1, lambda: tab.read("got"))
    tab.close()
    assert tab.read("got") == ["meanwhile", "after"]
    assert (tab.read("gaps"), tab.read("failed")) == (0, 0)
    cluster.scale(2)


@pytest.mark.parametrize("kind", FOLLOW)
def test_a_page_that_is_closed_frees_its_place(chromium: webdriver.Chrome, cluster: Cluster, kind: str) -> None:
    """Through HAProxy, too, the node hears of it at once."""
    tab = Tab(chromium, cluster, kind, f"closed-{kind}", 0)
    node = holder(cluster, kind)
    until(lambda: bool(tab.read("opened")), lambda: "it is open")
    chromium.get("about:blank")
    until(lambda: streams(node, kind) == 0, lambda: "it is gone")


def test_a_page_is_told_of_a_gap_before_what_follows(chromium: webdriver.Chrome, cluster: Cluster) -> None:
    """The event comes first, and has no id of its own: whoever is cut off behind it is told again."""
    with Publisher(cluster.broker) as publisher:
        ids = [publisher.publish("gap", n) for n in range(3)]
        chromium.get(f"http://{cluster.public}/")
        chromium.execute_script(
            """
            window.seen = []
            const source = window.source = new EventSource(`/events?channel=gap&start=${arguments[0]}`)
            source.onmessage = (event) => { seen.push(["message", JSON.parse(event.data).data, event.lastEventId]) }
            source.addEventListener("gap", (event) => { seen.push(["gap", event.data, event.lastEventId]) })
            """,
            1,
        )
        until(lambda: len(chromium.execute_script("return seen")) >= 4, lambda: chromium.execute_script("return seen"))
    seen = chromium.execute_script("source.close(); return seen")
    assert seen[0] == ["gap", f'{{"next":{ids[-1] + 1}}}', ""]
    assert seen[1:] == [["message", n, str(id + 1)] for n, id in enumerate(ids)]


def test_an_event_source_that_may_not_is_closed_for_good(chromium: webdriver.Chrome, cluster: Cluster) -> None:
    """A status of an error is the end: the browser does not come back, and the page hears of it."""
    chromium.get(f"http://{cluster.public}/")
    chromium.execute_script(
        "window.states = []; const source = new EventSource('/events?channel=17');"
        "source.onerror = () => { states.push(source.readyState) }"
    )
    until(lambda: chromium.execute_script("return states") == [2], lambda: chromium.execute_script("return states"))
