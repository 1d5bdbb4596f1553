"""The multithreaded server: what it keeps, what it says, and who waits."""

import json
import socket
import threading

import pytest

from loadtest.mlp import KEPT_MESSAGES, Channel, Channels, Refused, Request, answer, converse, read_requests


def poll(channel: Channel, start: int, timeout_s: float = 0) -> tuple[list[object], int, bool]:
    said = json.loads(channel.poll(start, timeout_s))
    return [message["data"] for message in said["messages"]], said["next"], said["gap"]


def test_messages_are_kept_between_polls() -> None:
    channel = Channel("a")
    first, second = channel.publish("one"), channel.publish("two")

    assert first < second
    assert poll(channel, 0) == (["one", "two"], second + 1, False)
    assert poll(channel, first + 1) == (["two"], second + 1, False)
    assert poll(channel, second + 1) == ([], second + 1, False)


def test_who_comes_back_after_what_was_dropped_is_told_of_a_gap() -> None:
    channel = Channel("a")
    first = channel.publish(0)
    for number in range(KEPT_MESSAGES):
        channel.publish(number)

    assert poll(channel, first)[2]
    assert not poll(channel, 0)[2]


def test_a_poll_waits_for_the_next_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        mine = socket.create_connection(listener.getsockname())
        its, _ = listener.accept()
    channels = Channels()
    thread = threading.Thread(target=converse, args=(its, channels))
    with mine:
        mine.settimeout(5)
        thread.start()
        mine.sendall(b"GET /poll?channel=a&start=0&timeout=50 HTTP/1.1\r\n\r\n")
        while channels.waiting() == 0:
            assert thread.is_alive()
        assert answer(Request("POST", "/publish", {}, b'{"channels":["a"],"data":7}'), channels).startswith(
            b"HTTP/1.1 201 "
        )
        assert b'"data":7}],"next":' in mine.recv(10_000)
    thread.join(5)

    assert not thread.is_alive()
    assert channels.waiting() == 0


def test_requests_may_come_in_pieces_and_together() -> None:
    mine, its = socket.socketpair()
    with its:
        mine.sendall(b"POST /publish HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}GET /poll?a=1&b=2 HTTP/1.1\r\n\r\n")
        mine.close()

        assert list(read_requests(its)) == [
            Request("POST", "/publish", {}, b"{}"),
            Request("GET", "/poll", {"a": "1", "b": "2"}, b""),
        ]


@pytest.mark.parametrize(
    "data", [b"hello\r\n\r\n", b"GET /poll?a HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"]
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    mine, its = socket.socketpair()
    with mine, its:
        mine.sendall(data)
        with pytest.raises(Refused):
            list(read_requests(its))


@pytest.mark.parametrize(
    "request_", [Request("GET", "/poll", {"channel": "a"}, b""), Request("POST", "/publish", {}, b"[]")]
)
def test_a_request_that_lacks_something_is_refused(request_: Request) -> None:
    with pytest.raises(Refused, match="needs"):
        answer(request_, Channels())
