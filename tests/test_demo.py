"""The question board: a real Chromium, and a node in a process of its own."""

import http.client
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any, Final
from urllib.parse import quote

import pytest

from tests import browser
from tests.browser import Page
from tests.support import PATIENCE_S, connected, running

chromium, pages, page = browser.chromium, browser.pages, browser.page

LOSE_ONE_RECEIPT: Final = """\
const honest = window.fetch;
window.fetch = async (url, options) => {
    const response = await honest(url, options);
    if (url !== "/publish") return response;
    window.fetch = honest;
    throw new TypeError("the connection broke before the answer was here");
};"""


class Node:
    """`pushup serve --demo`, as a process."""

    def __init__(self, listen: str = "127.0.0.1:0") -> None:
        command = [sys.executable, "-m", "pushup", "serve", "--demo", "--log-level", "error", "--drain-window", "0"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PUSHUP_")}
        self._process = subprocess.Popen(
            [*command, "--listen", listen, "--admin-listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        said = next((line for line in self._process.stdout if "http://" in line), "")
        if not said:
            self.stop()
            pytest.fail(f"the server did not start on {listen}")
        self.address = said.split("http://")[1].split()[0]

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=PATIENCE_S)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request on a connection of its own; the status and the JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE_S)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read() or "null")
        finally:
            connection.close()

    def ask(self, text: str, *channels: str) -> None:
        """Publish a question past the page, as a back end or curl would."""
        self.publish({"author": "terminal", "question": text, "tags": []}, *channels)

    def publish(self, data: Any, *channels: str) -> None:
        status, answer = self.request("POST", "/publish", {"channels": channels, "data": data})
        assert status == 201, answer

    def close(self, channel: str) -> None:
        status, answer = self.request("DELETE", "/channels/" + quote(channel, safe=""))
        assert status == 204, answer

    def close_all(self) -> None:
        _, page = self.request("GET", "/channels?limit=1000")
        for channel in page["channels"]:
            self.close(channel["channel"])


@pytest.fixture(scope="module")
def shared_node() -> Iterator[Node]:
    node = Node()
    try:
        yield node
    finally:
        node.stop()


@pytest.fixture
def node(shared_node: Node) -> Iterator[Node]:
    """A node without any channel."""
    yield shared_node
    shared_node.close_all()


class _Links(HTMLParser):
    """What a page loads, and what it has inline."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: set[str] = set()
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        self.loads |= {value for name, value in attributes if name in ("src", "href") and value}
        self.inline += [name for name in names if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)


async def test_the_page_is_served_whole_by_the_node_under_a_strict_policy() -> None:
    """All it loads is here, nothing is inline, and the policy would stop anything else."""
    async with running(demo="true") as server, connected(server) as client:
        page = await client.get("/")
        links = _Links()
        links.feed(page.body.decode())
        parts = {target: await client.get(target) for target in sorted(links.loads)}

    assert links.inline == []
    assert {target: part.headers["content-type"] for target, part in parts.items()} == {
        "/demo/board.css": "text/css; charset=utf-8",
        "/demo/board.js": "text/javascript; charset=utf-8",
        "/demo/icon.svg": "image/svg+xml; charset=utf-8",
    }
    for reply in (page, *parts.values()):
        assert reply.status == 200
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in reply.headers["content-security-policy"]


async def test_without_the_demo_there_is_no_page() -> None:
    """The board is served in demo mode only."""
    async with running() as server, connected(server) as client:
        assert (await client.get("/")).status == 404
        assert (await client.get("/demo/board.js")).status == 404


@pytest.mark.browser
def test_a_question_asked_in_one_window_appears_in_another(pages: Callable[[], Page], node: Node) -> None:
    """The demo's whole point, and the browser has nothing to complain of."""
    asking, watching = pages(), pages()
    asking.open(node.address, "tag:css")
    watching.open(node.address)

    asking.ask("ann", "Does XADD trim?", "#Redis, streams")
    asking.until_outcome("published")

    watching.until_lines("Does XADD trim?")
    (question,) = watching.entries()
    assert question["author"] == "ann"
    assert question["matched"] == ["tag:redis"]
    assert question["others"] == ["author:ann", "tag:streams"]
    assert asking.entries() == []
    assert "follows none of these" in asking.text("outcome")
    for page in (asking, watching):
        assert page.complaints() == []


@pytest.mark.browser
def test_a_question_to_several_followed_channels_appears_once(page: Page, node: Node) -> None:
    """The server says it once, and on which of the followed channels it came."""
    page.open(node.address, "tag:python", "tag:redis", "author:ann")

    page.ask("ann", "Once?", "redis python css")
    page.until_lines("Once?")
    node.ask("And then?", "tag:redis")

    page.until_lines("Once?", "And then?")
    assert page.entries()[0]["matched"] == ["tag:python", "tag:redis", "author:ann"]
    assert page.entries()[0]["others"] == ["tag:css"]
    assert page.text("received") == "2"


@pytest.mark.browser
def test_what_was_asked_while_a_window_was_offline_comes_when_it_is_back(pages: Callable[[], Page], node: Node) -> None:
    """Ten questions, no more and no fewer, in their order."""
    away, present = pages(), pages()
    away.open(node.address, "tag:python", "tag:redis")
    present.open(node.address, "tag:python", "tag:redis")
    node.ask("before", "tag:python")
    away.until_lines("before")
    questions = [f"question {number}" for number in range(10)]

    with away.offline():
        for number, question in enumerate(questions):
            node.ask(question, *(("tag:python",), ("tag:redis",), ("tag:redis", "tag:python"))[number % 3])
        present.until_lines("before", *questions)
        assert away.lines() == ["before"]
        assert "offline" in away.text("trouble")
    away.until_lines("before", *questions)
    away.until_state("waiting")
    node.ask("after", "tag:redis")

    for page in (away, present):
        page.until_lines("before", *questions, "after")
        assert page.text("received") == "12"
        assert page.text("gaps") == "0"


@pytest.mark.browser
def test_a_publication_is_sent_until_it_is_acknowledged_and_stored_once(page: Page, node: Node) -> None:
    """Neither a missing network nor an answer lost on its way loses or doubles a question."""
    page.open(node.address, "author:ann")

    with page.offline():
        page.ask("ann", "Sent offline?")
        page.until_outcome("trying")
    page.until_lines("Sent offline?")
    page.until_outcome("published")
    page.browser.execute_script(LOSE_ONE_RECEIPT)
    page.ask("ann", "Acknowledged?")
    page.until_outcome("published")
    node.ask("And then?", "author:ann")

    page.until_lines("Sent offline?", "Acknowledged?", "And then?")


@pytest.mark.browser
def test_the_line_for_a_terminal_publishes_to_what_is_followed(page: Page, node: Node) -> None:
    """As a shell reads it, whatever the channel is called."""
    page.open(node.address, 'tag:it\'s $(here) & "there"')

    program, url, flag, body = shlex.split(page.text("curl"))
    assert (program, url, flag) == ("curl", f"http://{node.address}/publish", "-d")
    assert node.request("POST", "/publish", json.loads(body))[0] == 201
    page.until_lines("Can you hear me?")

    page.click("#copy")
    page.until(lambda: page.text("copy") == "Copied", "hoped for a copy")


@pytest.mark.browser
def test_markup_in_a_question_is_text(page: Page, node: Node) -> None:
    """What people write never becomes part of the page, wherever it is shown."""
    evil = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    page.open(node.address, "author:" + evil, "tag:<b>bold</b>")

    page.ask(evil, evil, "<b>bold</b>")
    page.until_lines(evil)

    (question,) = page.entries()
    assert question["author"] == evil
    assert question["matched"] == ["author:" + evil, "tag:<b>bold</b>"]
    assert page.browser.find_elements("css selector", "main :is(script, b), main img") == []
    assert page.browser.title == "PushUp question board"


@pytest.mark.browser
def test_messages_that_are_no_questions_do_not_break_the_page(page: Page, node: Node) -> None:
    """Anybody may publish anything to these channels."""
    strange: list[Any] = [None, 7, "text", [], {}, {"author": 1, "question": 2, "tags": 3}, {"tags": [4, "", "x"]}]
    page.open(node.address, "tag:python")

    for data in strange:
        node.publish(data, "tag:python")
    node.ask("Still here?", "tag:python")

    page.until_lines(*[json.dumps(data, separators=(",", ":")) for data in strange], "Still here?")


@pytest.mark.browser
def test_the_user_reads_what_the_server_has_against_the_input(page: Page, node: Node) -> None:
    """The server's own sentence is shown, by the form that asked and by the poll."""
    page.open(node.address)

    page.ask("a" * 300, "Too long a name?")
    page.until_outcome("failed")
    assert page.text("outcome") == "a channel's name is at most 255 bytes long in UTF-8"
    page.ask("ann", "A good name?")
    page.until_lines("A good name?")

    page.open(node.address, "tag:redis", "007")
    page.until_state("retrying")
    assert "a name of digits only is an integer channel" in page.text("trouble")
    page.click("[data-channel='007'] button")
    page.until_state("waiting")


@pytest.mark.browser
def test_a_restarted_server_shows_as_a_gap_and_the_page_goes_on(page: Page) -> None:
    """The memory broker forgets; the page says so at the place where something may be missing."""
    node = Node()
    try:
        page.open(node.address, "tag:python")
        node.ask("before", "tag:python")
        page.until_lines("before")
    finally:
        node.stop()
    page.until_state("retrying")

    restarted = Node(node.address)
    try:
        page.until_lines("before", "[gap]")
        page.until_state("waiting")
        restarted.ask("after", "tag:python")
        page.until_lines("before", "[gap]", "after")
        assert page.text("gaps") == "1"
    finally:
        restarted.stop()


@pytest.mark.browser
def test_a_closed_channel_is_said_and_followed_on(page: Page, node: Node) -> None:
    """Closing ends the poll, not the page's interest."""
    page.open(node.address, "tag:python", "tag:redis")
    node.ask("before", "tag:python")
    page.until_lines("before")

    node.close("tag:python")
    page.until_lines("before", "[closed]")
    node.ask("after", "tag:python")

    page.until_lines("before", "[closed]", "after")
    assert page.text("gaps") == "0"


@pytest.mark.browser
def test_following_is_changed_by_hand_and_survives_a_reload(page: Page, node: Node) -> None:
    """What is cached of a new channel takes its place among the rest."""
    node.ask("one", "tag:css")
    node.ask("two", "tag:python")
    node.ask("three", "author:ann lee")
    page.open(node.address)
    page.until_lines("two")

    page.fill("name", "#CSS")
    page.click("#add button")
    page.until_lines("one", "two")
    page.browser.find_element("css selector", "#kind [value=author]").click()
    page.fill("name", "ann lee")
    page.click("#add button")
    page.until_lines("one", "two", "three")
    page.click("[data-channel='tag:python'] button")
    page.until_lines("one", "three")
    page.browser.refresh()
    page.until_lines("one", "three")

    page.click("[data-follow='author:terminal']")
    page.until(lambda: "author:terminal" in page.text("followed"), "hoped to follow the author of a question")
    for _ in range(4):
        page.click("#followed button")
    page.until_state("idle")
    assert page.entries() == []
