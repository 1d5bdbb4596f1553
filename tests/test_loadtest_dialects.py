"""What goes over the wire in load tests, and which answers count."""

import json

import pytest

from loadtest.dialects import (
    Heard,
    NchanDialect,
    PushpinDialect,
    PushUpDialect,
    Response,
    WrongAnswer,
    channel_of,
    make_payload,
    parse_response,
)

PUSHUP = PushUpDialect(120)
NCHAN = NchanDialect()
PUSHPIN = PushpinDialect()


def poll_answer(*data: str, gap: bool = False) -> Response:
    messages = [{"id": 7 + index, "channels": ["a"], "data": text} for index, text in enumerate(data)]
    return Response(200, b"HTTP/1.1 200 OK", json.dumps({"messages": messages, "next": 8, "gap": gap}).encode())


def test_a_response_is_whole_only_with_its_last_byte() -> None:
    data = b"HTTP/1.1 201 Created\r\ncontent-LENGTH: 5\r\n\r\nhello"

    assert all(parse_response(data[:end]) is None for end in range(len(data)))
    assert parse_response(data) == Response(201, b"HTTP/1.1 201 Created\r\ncontent-LENGTH: 5", b"hello")


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na",
    ],
)
def test_a_response_without_a_certain_end_is_wrong(data: bytes) -> None:
    with pytest.raises(WrongAnswer):
        parse_response(data)


def test_a_payload_names_its_channel_and_has_its_size() -> None:
    payload = make_payload("news", 12, 100)

    assert len(payload) == 100
    assert payload.startswith(b"news.12.")
    assert channel_of(payload) == "news"
    assert payload != make_payload("news", 1, 100)


def test_a_payload_too_small_for_its_name_is_refused() -> None:
    with pytest.raises(ValueError, match="8 bytes are too few"):
        make_payload("news", 100, 8)


def test_the_bytes_of_pushups_polls_and_publications() -> None:
    before, after = PUSHUP.poll(("a", "b"), b"Accept: */*\r\n")

    assert before + PUSHUP.first_cursor + after == (
        b"GET /poll?channel=a&channel=b&start=latest&timeout=120 HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n\r\n"
    )
    assert PUSHUP.publish("a", b"hello") == (
        b"POST /publish HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 33\r\n\r\n"
        b'{"channels":["a"],"data":"hello"}'
    )
    assert PUSHUP.publish_batch([("a", b"x"), ("b", b"y")]).endswith(
        b'\r\n\r\n[{"channels":["a"],"data":"x"},{"channels":["b"],"data":"y"}]'
    )


def test_the_bytes_of_nchans_polls_and_publications() -> None:
    before, after = NCHAN.poll(("a", "b"), b"Accept: */*\r\n")

    assert before + NCHAN.first_cursor + after == (
        b"GET /sub?id=a,b HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n\r\n"
    )
    assert NCHAN.publish("a", b"hello") == (
        b"POST /pub?id=a HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
    )


def test_what_a_poll_hears_and_asks_for_next() -> None:
    head = b"HTTP/1.1 200 OK\r\nLast-Modified: Mon, 23 Nov 2026 13:33:30 GMT\r\nEtag: 0,[1],-\r\nVary: x"

    assert PUSHUP.hear(poll_answer("hello")) == Heard(b"hello", b"8")
    assert NCHAN.hear(Response(200, head, b"hello")) == Heard(
        b"hello", b"If-Modified-Since: Mon, 23 Nov 2026 13:33:30 GMT\r\nIf-None-Match: 0,[1],-\r\n"
    )


@pytest.mark.parametrize(
    "response",
    [poll_answer(), poll_answer("a", "b"), poll_answer("a", gap=True), Response(503, b"HTTP/1.1 503 No", b"{}")],
)
def test_pushups_answer_counts_only_with_one_message_and_no_gap(response: Response) -> None:
    with pytest.raises(WrongAnswer):
        PUSHUP.hear(response)


@pytest.mark.parametrize("response", [Response(408, b"", b""), Response(200, b"HTTP/1.1 200 OK", b"hello")])
def test_nchans_answer_counts_only_with_a_cursor(response: Response) -> None:
    with pytest.raises(WrongAnswer):
        NCHAN.hear(response)


def test_a_publication_counts_only_if_every_message_was_taken() -> None:
    PUSHUP.check_published(Response(201, b"", b'{"id":1}'), 1)
    PUSHUP.check_published(Response(200, b"", b'[{"id":1},{"id":2}]'), 2)
    NCHAN.check_published(Response(202, b"", b"queued"), 1)

    with pytest.raises(WrongAnswer):
        PUSHUP.check_published(Response(200, b"", b'[{"id":1},{"error":{"code":"x"}}]'), 2)
    with pytest.raises(WrongAnswer):
        PUSHUP.check_published(Response(503, b"", b"{}"), 1)
    with pytest.raises(WrongAnswer):
        NCHAN.check_published(Response(507, b"", b""), 1)


def test_the_bytes_of_pushpins_polls_and_publications() -> None:
    before, after = PUSHPIN.poll(["a", "b"], b"X: y\r\n")

    assert before + after == b"GET /poll?id=a,b HTTP/1.1\r\nHost: 127.0.0.1\r\nX: y\r\n\r\n"
    head, _, body = PUSHPIN.publish_batch([("a", b"one"), ("b", b"two")]).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /publish/ HTTP/1.1\r\n")
    assert json.loads(body) == {
        "items": [
            {"channel": "a", "formats": {"http-response": {"body": "one"}}},
            {"channel": "b", "formats": {"http-response": {"body": "two"}}},
        ]
    }
    assert PUSHPIN.publish("a", b"one") == PUSHPIN.publish_batch([("a", b"one")])


def test_pushpin_gives_no_cursor_and_says_when_it_took_what_was_published() -> None:
    assert PUSHPIN.hear(Response(200, b"", b"one")) == Heard(b"one", b"")
    PUSHPIN.check_published(Response(200, b"", b"Published\n"), 2)

    with pytest.raises(WrongAnswer, match="a poll was answered 502: b'Error"):
        PUSHPIN.hear(Response(502, b"", b"Error"))
    with pytest.raises(WrongAnswer, match="1 messages were answered 200: b''"):
        PUSHPIN.check_published(Response(200, b"", b""), 1)
