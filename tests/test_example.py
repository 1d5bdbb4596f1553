"""The example web application: by itself with a publisher that is a double, and behind a real cluster."""

import asyncio
import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from cluster import Cluster
from cluster.processes import free_ports
from compose.example.app import BODY_BYTES_MAX, CHANNELS_MAX, make_app
from compose.example.questions import Question, Questions
from compose.rehearse import Poller
from pushup import Publisher
from pushup.errors import KeyReused, Unavailable
from tests import browser
from tests.browser import Page
from tests.support import PATIENCE_S, connected, running

chromium, pages, page = browser.chromium, browser.pages, browser.page

ROOT: Final = Path(__file__).parent.parent

ANN: Final = {"author": "ann", "question": "Does XADD trim?", "tags": ["redis", "streams"], "key": "k1"}


PUBLISH_BEFORE_LOADING: Final = """\
const honest = window.fetch;
window.fetch = async (url, options) => {
    if (!url.startsWith("/questions?")) return honest(url, options);
    window.fetch = honest;
    const body = JSON.stringify({ author: "bob", question: "In between?", tags: ["css"] });
    await honest("/questions", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    return honest(url, options);
};"""

READ_REQUESTS: Final = """\
return performance.getEntriesByType("resource").map((entry) => entry.name)
    .filter((name) => /\\/(poll|questions)\\?/.test(name)).map((name) => name.replace(/.*\\/|channel=[^&]*&?/g, ""))"""


class FakePublisher:
    """Publishes once for each key, like PushUp, under ids from 1001 on; or is told to fail."""

    def __init__(self) -> None:
        self.published: list[tuple[Sequence[str], Any, str | None]] = []
        self.calls = 0
        self.down = False
        self.loses_answers = False

    def publish(self, channels: Sequence[str], data: Any, *, key: str | None = None) -> int:
        self.calls += 1
        if self.down:
            raise Unavailable("Redis did not answer in time")
        keys = [known for _, _, known in self.published]
        if key not in keys:
            self.published.append((channels, data, key))
            keys.append(key)
        elif self.published[keys.index(key)] != (channels, data, key):
            raise KeyReused("another publication had this key")
        if self.loses_answers:
            raise Unavailable("the connection broke before the answer was here")
        return 1001 + keys.index(key)


@pytest.fixture
def publisher() -> FakePublisher:
    return FakePublisher()


@pytest.fixture
def questions() -> Iterator[Questions]:
    stored = Questions()
    yield stored
    stored.close()


@pytest.fixture
def client(questions: Questions, publisher: FakePublisher) -> FlaskClient:
    return make_app(questions, publisher).test_client()


def stored(client: FlaskClient, *channels: str) -> list[dict[str, Any]]:
    answer = client.get("/questions", query_string=[("channel", channel) for channel in channels])
    assert answer.status_code == 200, answer.text
    messages: list[dict[str, Any]] = answer.json["messages"]  # type: ignore[index]
    return messages


def refused(answer: TestResponse, status: int) -> str:
    """The sentence of a problem document."""
    assert answer.status_code == status, answer.text
    assert answer.mimetype == "application/problem+json"
    assert answer.json is not None
    detail: str = answer.json["detail"]
    return detail


def test_a_question_is_stored_and_published_to_its_author_and_tags(
    client: FlaskClient, publisher: FakePublisher
) -> None:
    """The answer has PushUp's id; what is stored has the form of a poll's messages."""
    answer = client.post("/questions", json=ANN)

    data = {"number": 1, "author": "ann", "question": "Does XADD trim?", "tags": ["redis", "streams"]}
    channels = ["author:ann", "tag:redis", "tag:streams"]
    assert (answer.status_code, answer.json) == (201, {"number": 1, "id": 1001, "channels": channels})
    ((to, published, key),) = publisher.published
    assert (list(to), {**published, "tags": list(published["tags"])}, key) == (channels, data, "k1")
    assert stored(client, "tag:streams", "author:bob", "author:ann") == [
        {"id": 1001, "channels": ["tag:streams", "author:ann"], "data": data}
    ]


def test_a_repeated_post_is_answered_the_same_and_published_once(client: FlaskClient, publisher: FakePublisher) -> None:
    """Once PushUp has acknowledged, the application answers by itself, however late the repetition comes."""
    first = client.post("/questions", json=ANN)
    second = client.post("/questions", json=ANN)

    assert second.status_code == 201
    assert first.json == second.json
    assert publisher.calls == 1
    assert len(stored(client, "author:ann")) == 1


def test_while_redis_is_down_a_post_is_not_acknowledged_and_its_repetition_is(
    client: FlaskClient, publisher: FakePublisher
) -> None:
    """503 with Retry-After; the question is stored once, and published when Redis is back."""
    publisher.down = True
    answer = client.post("/questions", json=ANN)
    assert refused(answer, 503) == "Redis did not answer in time"
    assert answer.headers["Retry-After"] == "1"

    publisher.down = False
    assert client.post("/questions", json=ANN).status_code == 201

    assert [key for _, _, key in publisher.published] == ["k1"]
    assert [message["id"] for message in stored(client, "author:ann")] == [1001]


def test_a_publication_whose_answer_was_lost_is_not_made_twice(client: FlaskClient, publisher: FakePublisher) -> None:
    """The browser's key is PushUp's key, and what is published again is the same to the letter."""
    publisher.loses_answers = True
    assert client.post("/questions", json=ANN).status_code == 503

    publisher.loses_answers = False
    answer = client.post("/questions", json=ANN)

    assert answer.status_code == 201
    assert publisher.calls == 2
    assert len(publisher.published) == 1


def test_what_is_published_can_be_loaded_before_it_is_acknowledged(
    client: FlaskClient, publisher: FakePublisher
) -> None:
    """A page that took its cursor after the message finds the question in what is stored."""
    publisher.loses_answers = True

    client.post("/questions", json=ANN)

    assert [message["data"]["number"] for message in stored(client, "tag:redis")] == [1]


def test_a_key_belongs_to_one_question(client: FlaskClient, publisher: FakePublisher) -> None:
    """The same key with another question is refused before anything is published."""
    client.post("/questions", json=ANN)

    answer = client.post("/questions", json={**ANN, "question": "Another one?"})

    assert refused(answer, 422) == "the key k1 belongs to another question"
    assert publisher.calls == 1


def test_without_a_key_every_post_is_a_question_of_its_own(client: FlaskClient) -> None:
    """As with curl: nobody said that it is a repetition."""
    for _ in range(2):
        assert client.post("/questions", json={"author": "curl", "question": "Hello?"}).status_code == 201

    assert [message["id"] for message in stored(client, "author:curl")] == [1001, 1002]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (b"{", "the body is not JSON"),
        (b"[" * 20_000, "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"[]", "the body is not a JSON object with author, question and tags"),
        ({"question": "?"}, "author is missing"),
        ({"author": "ann"}, "question is missing"),
        ({"author": "ann", "question": "?", "channels": ["a"]}, "channels is not a member of a question"),
        ({"author": "", "question": "?"}, "author must be text of 1 to 60 characters"),
        ({"author": 7, "question": "?"}, "author must be text of 1 to 60 characters"),
        ({"author": "a" * 61, "question": "?"}, "author must be text of 1 to 60 characters"),
        ({"author": "a\nb", "question": "?"}, "author must be one line, without control characters"),
        ({"author": "ann", "question": " \n"}, "question must be text of 1 to 4000 characters"),
        ({"author": "ann", "question": "x" * 4001}, "question must be text of 1 to 4000 characters"),
        ({"author": "ann", "question": "\ud800"}, "question must be valid Unicode, without lone surrogates"),
        ({"author": "ann", "question": "?", "tags": "redis"}, "tags must be an array of at most 20 strings"),
        ({"author": "ann", "question": "?", "tags": ["t"] * 21}, "tags must be an array of at most 20 strings"),
        ({"author": "ann", "question": "?", "tags": [None]}, "tags must be text of 1 to 60 characters"),
        ({"author": "ann", "question": "?", "key": None}, "key must be text of 1 to 100 characters"),
    ],
)
def test_what_is_no_question_is_refused_with_a_sentence(client: FlaskClient, given: Any, sentence: str) -> None:
    """400, and nothing is stored."""
    body = {"data": given, "content_type": "application/json"} if isinstance(given, bytes) else {"json": given}

    answer = client.post("/questions", **body)

    assert refused(answer, 400) == sentence
    assert stored(client, "author:ann", "author:") == []


def test_a_post_over_the_limit_is_not_read(client: FlaskClient) -> None:
    """Whatever it holds."""
    answer = client.post("/questions", data=b"x" * (BODY_BYTES_MAX + 1), content_type="application/json")

    assert "exceeds the capacity limit" in refused(answer, 413)


@pytest.mark.parametrize("type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_what_a_form_of_another_site_could_send_is_refused(
    client: FlaskClient, publisher: FakePublisher, type: str | None
) -> None:
    """Only application/json is taken: a browser asks before it sends that to another site, and nobody allows it."""
    answer = client.post("/questions", data=b'{"author":"ann","question":"?"}', content_type=type)

    assert refused(answer, 415) == "a question is posted as application/json"
    assert publisher.calls == 0
    asked = client.options("/questions", headers={"Origin": "http://evil.test"})
    assert "Access-Control-Allow-Origin" not in asked.headers


@pytest.mark.parametrize("count", [0, CHANNELS_MAX + 1])
def test_stored_questions_are_asked_for_by_channel(client: FlaskClient, count: int) -> None:
    """One at least, and not more than a poll may have."""
    answer = client.get("/questions", query_string=[("channel", f"tag:{n}") for n in range(count)])

    assert refused(answer, 400) == "ask for 1 to 100 channels: /questions?channel=tag:python"


def test_the_newest_stored_questions_come_in_the_order_of_their_ids(questions: Questions) -> None:
    """By PushUp's id, or the time of asking until there is one; each once, by whatever channels."""
    for key, asked, message in (("a", 10, 25), ("b", 20, None), ("c", 15, 16), ("d", 5, 6)):
        number = questions.add(key, Question("ann", key, ("t",)), asked).number
        if message is not None:
            questions.acknowledged(number, message)

    newest = questions.newest(["author:ann", "tag:t", "tag:none"], 3)

    assert [found.question.question for found in newest] == ["c", "b", "a"]


def test_questions_survive_a_restart(tmp_path: Any) -> None:
    """They are in the file."""
    file = str(tmp_path / "questions.db")
    first = Questions(file)
    added = first.add("k", Question("ann", "Still here?", ("a", "b")), 7)
    first.close()

    second = Questions(file)
    found = second.newest(["tag:b"], 10)
    second.close()

    assert found == [added]


def test_the_page_is_the_demos_and_belongs_to_the_application(client: FlaskClient) -> None:
    """Same files, same policy; only where questions go differs."""
    page = client.get("/")
    parts = [client.get(path) for path in ("/demo/board.js", "/demo/board.css", "/demo/icon.svg")]

    assert '<body data-questions="/questions">' in page.text
    assert [part.status_code for part in (page, *parts)] == [200] * 4
    for answer in (page, *parts, client.get("/nothing"), client.get("/health")):
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_an_unknown_path_is_a_problem_document(client: FlaskClient) -> None:
    """Also for PushUp's own paths, which the proxy must not send here."""
    assert "not found on the server" in refused(client.get("/publish"), 404)
    assert client.delete("/questions").status_code == 405


def test_the_rehearsal_notices_what_a_poller_missed() -> None:
    """What lacks, came twice, came in the wrong order or was never acknowledged; other channels do not matter."""
    asked = [(10, frozenset("ab")), (20, frozenset("bc")), (30, frozenset("cd")), (40, frozenset("ad"))]

    assert Poller(frozenset("ab"), received=[10, 20, 40]).check(asked) == []
    assert Poller(frozenset("ab"), received=[20, 10, 10, 50]).check(asked) == [
        "40 is missing",
        "10 came 2 times",
        "50 was never acknowledged",
        "10 came after 20",
    ]


# With Redis


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    """The URL of a Redis server of its own, which keeps nothing on disk."""
    (port,) = free_ports(1)
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert any("Ready to accept connections" in line for line in server.stdout)
        try:
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.communicate(timeout=PATIENCE_S)


async def test_a_poll_on_a_node_gets_what_the_application_published(questions: Questions, redis: str) -> None:
    """Once, with the id that the application answered with, although it was posted twice and stored anew."""
    with Publisher(redis) as publisher:
        client = make_app(questions, publisher).test_client()
        async with running(broker=redis) as server, connected(server) as node:
            node.send("GET /poll?channel=tag:redis&timeout=20 HTTP/1.1\r\nHost: test\r\n\r\n")
            answer = await asyncio.to_thread(client.post, "/questions", json=ANN)
            (message,) = (await node.reply()).json["messages"]
            other = make_app(questions, publisher).test_client()
            again = await asyncio.to_thread(other.post, "/questions", json=ANN)
            (cached,) = (await node.get("/poll?channel=author:ann&timeout=0")).json["messages"]

    assert answer.json is not None
    assert answer.json == again.json
    assert (message["id"], message["data"]) == (answer.json["id"], cached["data"])
    assert message["data"] == {"number": 1, **{name: ANN[name] for name in ("author", "question", "tags")}}


def test_the_program_serves_and_stops_in_good_order(redis: str, tmp_path: Path) -> None:
    """It says where; SIGTERM ends it with 0, and the questions are in its file."""
    command = [sys.executable, "-m", "compose.example", "--listen", "127.0.0.1:0", "--broker", redis]
    file = tmp_path / "questions.db"
    with subprocess.Popen([*command, "--database", file], stdout=subprocess.PIPE, text=True, cwd=ROOT) as program:
        assert program.stdout is not None
        said = program.stdout.readline()
        try:
            assert post(said.split("http://")[1].strip(), "Are you there?") == 201
        finally:
            program.send_signal(signal.SIGTERM)
            program.communicate(timeout=PATIENCE_S)

    kept = Questions(str(file))
    assert [found.question.question for found in kept.newest(["tag:python"], 10)] == ["Are you there?"]
    kept.close()
    assert program.returncode == 0


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--broker", "mysql://there"], "--broker: it must be "),
        (["--broker", "redis://there", "--listen", "8000"], "--listen 8000: it must be HOST:PORT"),
        (["--broker", "redis://there", "--listen", "192.0.2.1:80"], "cannot listen on 192.0.2.1:80: "),
        (["--broker", "redis://there", "--database", "/no/such"], "cannot use the database /no/such: unable to open"),
    ],
)
def test_the_program_says_what_is_wrong_with_its_options(wrong: list[str], sentence: str) -> None:
    """In a sentence on stderr, and not with a traceback."""
    command = [sys.executable, "-m", "compose.example", *wrong]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)

    assert done.returncode in (1, 2)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def post(address: str, question: str, *tags: str, key: str | None = None) -> int:
    """Ask a question past the page; the status of the answer."""
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        asked = {
            "author": "terminal",
            "question": question,
            "tags": tags or ("python",),
            **({"key": key} if key else {}),
        }
        connection.request("POST", "/questions", json.dumps(asked), {"Content-Type": "application/json"})
        return connection.getresponse().status
    finally:
        connection.close()


# A whole cluster, and a browser in front of its proxy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes and the application, behind HAProxy."""
    made = Cluster.up(tmp_path_factory.mktemp("cluster") / "state", nodes=2, example=True)
    try:
        yield made
    finally:
        made.down()


def parked_polls(admin_address: str) -> int:
    """How many polls wait on a node, as it says itself."""
    connection = http.client.HTTPConnection(admin_address, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read()
        found = re.search(rb'^pushup_parked_polls{realm="default"} (\d+)', text, re.MULTILINE)
        assert found is not None
        return int(found[1])
    finally:
        connection.close()


def holders(cluster: Cluster) -> list[str]:
    """The names of the nodes on which a poll waits."""
    return [node.name for node in cluster.nodes if node.alive and parked_polls(node.admin_address)]


def test_a_rehearsal_while_the_cluster_is_scaled(cluster: Cluster) -> None:
    """Pollers and publishers through HAProxy, and nothing missed."""
    command = [sys.executable, "-m", "compose.rehearse", "--front", cluster.public, "--seconds", "3", "--pollers", "40"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as rehearsal:
        cluster.scale(3)
        said, _ = rehearsal.communicate(timeout=6 * PATIENCE_S)
    cluster.scale(2)

    assert rehearsal.returncode == 0, said
    rows = dict(re.findall(r"^(\S.*?) {2,}(\d+)$", said, re.MULTILINE))
    assert int(rows["questions acknowledged"]) > 20
    assert int(rows["messages received"]) > int(rows["questions acknowledged"])
    assert rows["missed, doubled or out of order"] == "0"


@pytest.mark.browser
def test_a_question_goes_through_application_redis_and_node_to_another_window(
    pages: Callable[[], Page], cluster: Cluster
) -> None:
    """The paper's figures 3 and 4, with a browser that has nothing to complain of."""
    asking, watching = pages(), pages()
    asking.open(cluster.public, "tag:css")
    watching.open(cluster.public, "tag:figures")

    asking.ask("ann", "Does it work?", "figures, paper")
    asking.until_outcome("published")

    watching.until_lines("Does it work?")
    (question,) = watching.entries()
    assert question["author"] == "ann"
    assert (question["matched"], question["others"]) == (["tag:figures"], ["author:ann", "tag:paper"])
    for page in (asking, watching):
        assert page.complaints() == []


@pytest.mark.browser
def test_a_page_takes_its_cursor_before_it_loads_what_is_stored(page: Page, cluster: Cluster) -> None:
    """So that what is published in between comes both ways, and is shown once."""
    assert post(cluster.public, "Before?", "order") == 201

    page.open(cluster.public, "tag:order")
    page.until_lines("Before?")
    page.until(lambda: len(page.browser.execute_script(READ_REQUESTS)) >= 2, "hoped for requests")
    first, second = page.browser.execute_script(READ_REQUESTS)[:2]
    page.browser.execute_script(PUBLISH_BEFORE_LOADING)
    page.fill("name", "css")
    page.click("#add button")
    page.until_lines("Before?", "In between?")
    page.until(lambda: page.text("received") == "1", "hoped for the question as a message, too")
    assert post(cluster.public, "After?", "order") == 201

    page.until_lines("Before?", "In between?", "After?")
    assert (first, second) == ("poll?start=latest&timeout=0", "questions?")


@pytest.mark.browser
def test_nothing_is_missed_whatever_ends_the_node_that_holds_the_poll(page: Page, tmp_path: Path) -> None:
    """SIGKILL, draining, SIGKILL; questions are asked before anybody has noticed, and each is shown once, in order."""
    cluster = Cluster.up(tmp_path / "state", nodes=2, example=True, settings={"drain_window": "1"})
    try:
        page.open(cluster.public, "tag:end")
        asked = []
        for end in (cluster.kill, cluster.drain, cluster.kill):
            page.until(lambda: len(holders(cluster)) == 1, "hoped for one node that holds the poll")
            (holder,) = holders(cluster)

            end(holder)
            for number in range(4):
                asked.append(f"question {number} without {holder}")
                assert post(cluster.public, asked[-1], "end") == 201

            page.until_lines(*asked)
            cluster.scale(2)
            assert holder not in [node.name for node in cluster.nodes]
        assert page.text("received") == str(len(asked))
        assert page.text("gaps") == "0"
    finally:
        cluster.down()


@pytest.mark.browser
def test_when_redis_comes_back_empty_the_page_loads_what_is_stored(page: Page, cluster: Cluster) -> None:
    """A post meanwhile is not acknowledged, and is when Redis is back; the gap costs no question, and doubles none."""
    page.open(cluster.public, "tag:lost", "author:eve")
    assert post(cluster.public, "Before?", "lost") == 201
    page.until_lines("Before?")
    (store,) = cluster.stores

    store.kill()
    page.ask("eve", "Meanwhile?", "lost")
    page.until_outcome("trying")
    store.restart(empty=True)
    page.until_outcome("published")
    page.until(lambda: page.text("gaps") == "1" and "Meanwhile?" in page.lines(), "hoped for a gap")
    page.until_state("waiting")
    assert post(cluster.public, "After?", "lost") == 201

    page.until(lambda: "After?" in page.lines(), "hoped for what was asked after the gap")
    assert [line for line in page.lines() if line != "[gap]"] == ["Before?", "Meanwhile?", "After?"]
    assert "loaded the questions from the application again" in page.text("questions")
