"""The example web application: by itself with a publisher that is a double, and behind a real cluster."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from compose.example.app import BODY_BYTES_MAX, CHANNELS_MAX, make_app
from compose.example.questions import Question, Questions
from pushup.errors import KeyReused, Unavailable

ANN = {"author": "ann", "question": "Does XADD trim?", "tags": ["redis", "streams"], "key": "k1"}


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
