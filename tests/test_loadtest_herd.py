"""Cheap clients, against a server that says what the test wants."""

import json
import socket
import time
from collections.abc import Iterator

import pytest

from loadtest.dialects import make_payload
from loadtest.fleet import FleetError
from loadtest.herd import Channel, Herd


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        opened.settimeout(10)
        yield opened


def answer(*numbers: int, channel: str = "c", gap: bool = False, following: int = 7) -> bytes:
    messages = [{"id": 1, "data": make_payload(channel, number, 20).decode()} for number in numbers]
    body = json.dumps({"messages": messages, "next": following, "gap": gap}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def client(herd: Herd, listener: socket.socket, channel: Channel) -> tuple[socket.socket, bytes]:
    """The server's end of one more client, and its first poll."""
    herd.add(listener.getsockname(), channel)
    connection, _ = listener.accept()
    connection.settimeout(10)
    return connection, connection.recv(4096)


def turn(herd: Herd) -> None:
    herd.run(time.monotonic_ns() + 20_000_000)


def test_a_message_is_counted_from_when_it_was_due_and_the_next_poll_has_its_cursor(listener: socket.socket) -> None:
    channel = Channel("c")
    with Herd(60) as herd:
        server, first = client(herd, listener, channel)
        with server:
            assert b"start=latest&timeout=60 " in first
            herd.expect(channel, time.monotonic_ns() - 5_000_000)
            server.send(answer(1))
            turn(herd)

            assert herd.unanswered == 0
            assert herd.tally.bad == 0
            assert herd.tally.latencies[0] >= 5_000_000
            assert b"start=7&" in server.recv(4096)


def test_clients_that_rest_poll_when_they_are_told_to(listener: socket.socket) -> None:
    channel = Channel("c")
    with Herd(60, again=False) as herd:
        server, _ = client(herd, listener, channel)
        with server:
            herd.expect(channel, time.monotonic_ns())
            server.send(answer(1))
            turn(herd)
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recv(1)
            herd.poll_again()
            assert b"start=7&" in server.recv(4096)


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ([answer(1), answer(1, following=8)], "duplicates"),
        ([answer(2)], "lost"),
        ([answer(2, 1)], "lost"),
        ([answer(1, gap=True)], "gaps"),
        ([answer(9)], "wrong"),
        ([answer(1, channel="d")], "wrong"),
        ([b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"], "wrong"),
    ],
)
def test_what_should_not_be_is_counted(listener: socket.socket, answers: list[bytes], kind: str) -> None:
    channel = Channel("c")
    with Herd(60) as herd:
        server, _ = client(herd, listener, channel)
        with server:
            herd.expect(channel, time.monotonic_ns())
            herd.expect(channel, time.monotonic_ns())
            for one in answers:
                server.send(one)
                turn(herd)
        assert getattr(herd.tally, kind) == 1


def test_what_never_came_is_lost_in_the_end(listener: socket.socket) -> None:
    channel = Channel("c")
    with Herd(60) as herd:
        server, _ = client(herd, listener, channel)
        with server:
            herd.expect(channel, time.monotonic_ns())
            herd.settle()
    assert herd.tally.lost == 1


def test_an_answer_may_come_in_parts_and_a_closed_connection_is_counted(listener: socket.socket) -> None:
    channel = Channel("c")
    with Herd(60) as herd:
        server, _ = client(herd, listener, channel)
        with server:
            herd.expect(channel, time.monotonic_ns())
            server.send(answer(1)[:50])
            turn(herd)
            server.send(answer(1)[50:])
            turn(herd)
            assert (len(herd.tally.latencies), herd.tally.bad) == (1, 0)
        turn(herd)
        assert (herd.tally.broken, len(herd), channel.clients) == (1, 0, 0)


def test_publications_go_out_when_due_and_who_comes_later_asks_for_what_comes_after_them(
    listener: socket.socket,
) -> None:
    channel = Channel("c", after=0)
    with Herd(60) as herd:
        herd.add_publisher(listener.getsockname())
        publisher, _ = listener.accept()
        with publisher:
            due = time.monotonic_ns()
            herd.plan([(due, lambda: herd.publish(channel, due, 30))])
            turn(herd)
            assert publisher.recv(4096).startswith(b"POST /publish ")
            publisher.send(b'HTTP/1.1 201 Created\r\nContent-Length: 9\r\n\r\n{"id":41}')
            turn(herd)
            assert (herd.tally.acknowledged, channel.acknowledged) == (1, 1)
            server, first = client(herd, listener, channel)
            server.close()
            assert b"start=42&" in first


def test_the_oldest_clients_leave_first(listener: socket.socket) -> None:
    channel = Channel("c")
    with Herd(60, reset=False) as herd:
        first, _ = client(herd, listener, channel)
        second, _ = client(herd, listener, channel)
        with first, second:
            herd.leave(1)
            assert first.recv(1) == b""
            assert len(herd) == 1
            second.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.recv(1)


def test_who_comes_or_leaves_while_a_message_is_on_its_way_changes_what_is_still_to_come(
    listener: socket.socket,
) -> None:
    channel = Channel("c", published=1, due={1: 0})
    with Herd(60) as herd:
        first, _ = client(herd, listener, channel)
        second, _ = client(herd, listener, channel)
        with first, second:
            assert herd.unanswered == 2
            second.send(answer(1))
            turn(herd)
            assert herd.unanswered == 1
            herd.leave(1)
            assert herd.unanswered == 0
            herd.settle()
    assert herd.tally.bad == 0


def test_nobody_there_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    with Herd(60) as herd, pytest.raises(FleetError, match="cannot connect after 0 clients"):
        herd.add(address, Channel("c"))
