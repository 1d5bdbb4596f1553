"""Answers with many messages, and publications that may be sent twice."""

import json

import pytest

from loadtest.answers import Answer, hear, number_of, publish_once, published_id, without_boundary
from loadtest.dialects import NchanDialect, PushUpDialect, Response, WrongAnswer, make_payload, parse_response

PUSHUP = PushUpDialect(25)
NCHAN = NchanDialect()
ONE, TWO = make_payload("c1", 1, 20), make_payload("c1", 2, 20)


def pushup(*payloads: bytes, gap: bool = False) -> Response:
    messages = [{"id": 40 + index, "data": payload.decode()} for index, payload in enumerate(payloads)]
    return Response(200, b"", json.dumps({"messages": messages, "next": 50, "gap": gap}).encode())


def nchan(body: bytes, content_type: bytes = b"text/plain") -> Response:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nLast-Modified: Tue\r\nEtag: 3" % content_type
    return Response(200, head, body)


def test_pushup_answers_with_any_number_of_messages() -> None:
    assert hear(PUSHUP, b"40", pushup(ONE, TWO)) == Answer((ONE, TWO), b"50")
    assert hear(PUSHUP, b"40", pushup()) == Answer((), b"50")


def test_a_gap_covers_what_was_asked_for() -> None:
    assert hear(PUSHUP, b"30", pushup(ONE, gap=True)).gap == (30, 50)
    assert hear(PUSHUP, b"latest", pushup(ONE, gap=True)).gap == (0, 50)


def test_nchan_answers_with_one_message_or_with_parts() -> None:
    cursor = b"If-Modified-Since: Tue\r\nIf-None-Match: 3\r\n"
    parts = (
        b"--B.b\r\nContent-Type: text/plain\r\n\r\n" + ONE + b"\r\n--B.b\r\nContent-Type: text/plain\r\n\r\n" + TWO
    ) + b"\r\n--B.b--\r\n"

    assert hear(NCHAN, b"", nchan(ONE)) == Answer((ONE,), cursor)
    assert hear(NCHAN, b"", nchan(parts, b"multipart/mixed; boundary=B.b")) == Answer((ONE, TWO), cursor)


def test_answers_that_differ_in_their_boundary_alone_are_alike() -> None:
    def answer(boundary: bytes) -> bytes:
        return b"Content-Type: multipart/mixed; boundary=%b\r\n\r\n--%b\r\n\r\nx\r\n--%b--" % ((boundary,) * 3)

    assert without_boundary(answer(b"1+B-.")) == without_boundary(answer(b"Qq/+7")) == answer(b"BBBBB")
    assert without_boundary(b"Content-Type: text/plain\r\n\r\nx") == b"Content-Type: text/plain\r\n\r\nx"


@pytest.mark.parametrize("dialect", [PUSHUP, NCHAN])
def test_a_refusal_is_not_an_answer(dialect: PushUpDialect | NchanDialect) -> None:
    with pytest.raises(WrongAnswer, match="a poll was answered 503"):
        hear(dialect, b"", Response(503, b"", b"later"))
    with pytest.raises(WrongAnswer, match="1 messages were answered 503"):
        published_id(dialect, Response(503, b"", b"later"))


def test_a_multipart_answer_without_parts_is_wrong() -> None:
    with pytest.raises(WrongAnswer, match="without parts"):
        hear(NCHAN, b"", nchan(b"nothing", b"multipart/mixed; boundary=B"))


def test_only_pushup_is_told_which_publications_are_the_same() -> None:
    request = publish_once(PUSHUP, "c1", ONE)

    assert b"\r\nIdempotency-Key: c1.1\r\n\r\n" in request
    assert request.replace(b"\r\nIdempotency-Key: c1.1", b"") == PUSHUP.publish("c1", ONE)
    assert publish_once(NCHAN, "c1", ONE) == NCHAN.publish("c1", ONE)


def test_a_publication_has_an_id_where_ids_are_numbers() -> None:
    assert published_id(PUSHUP, Response(201, b"", b'{"id":17}')) == 17
    taken = parse_response(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")
    assert taken
    assert published_id(NCHAN, taken) == 0


def test_a_payload_has_its_number() -> None:
    assert [number_of(make_payload("c1", number, 30)) for number in (0, 7, -2)] == [0, 7, -2]
    for payload in (b"", b"c1", b"c1.x.", b"hello"):
        with pytest.raises(WrongAnswer, match="nobody published"):
            number_of(payload)
