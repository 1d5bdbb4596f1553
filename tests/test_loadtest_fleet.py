"""The clients of load tests against a server that says what it is told to."""

import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest

from loadtest.dialects import PushUpDialect, make_payload
from loadtest.fleet import Fleet, FleetError, Publication

DIALECT = PushUpDialect(120)
PATIENCE_S = 5.0

Say = Callable[[list[socket.socket], bytes], None]


def respond(connection: socket.socket, body: bytes, status: str = "200 OK") -> None:
    connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def answer(connection: socket.socket, payload: bytes) -> None:
    messages = [{"id": 1, "channels": ["a"], "data": payload.decode()}]
    respond(connection, json.dumps({"messages": messages, "next": 2, "gap": False}).encode())


def tell_all(parked: list[socket.socket], payload: bytes) -> None:
    for connection in parked:
        answer(connection, payload)
    parked.clear()


@dataclass
class Scripted:
    """The server's address, and the connections on which polls wait."""

    address: tuple[str, int]
    parked: list[socket.socket]

    def await_parked(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(self.parked) != count:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@contextmanager
def scripted(say: Say = tell_all) -> Iterator[Scripted]:
    """A server that calls `say` with the parked polls and the payload of each publication, then acknowledges."""
    with socket.create_server(("127.0.0.1", 0)) as listener, selectors.DefaultSelector() as selector:
        ending, ended = socket.socketpair()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        parked: list[socket.socket] = []

        def serve() -> None:
            connections: list[socket.socket] = []
            while True:
                for key, _ in selector.select():
                    holder = key.fileobj
                    if holder is ended:
                        for connection in connections:
                            connection.close()
                        return
                    if holder is listener:
                        connections.append(listener.accept()[0])
                        selector.register(connections[-1], selectors.EVENT_READ)
                        continue
                    assert isinstance(holder, socket.socket)
                    try:
                        data = holder.recv(65536)
                    except ConnectionResetError:
                        data = b""
                    if not data:
                        selector.unregister(holder)
                    elif data.startswith(b"GET /poll?"):
                        parked.append(holder)
                    else:
                        with suppress(OSError):  # The fleet goes when it has seen enough.
                            say(parked, json.loads(data.partition(b"\r\n\r\n")[2])["data"].encode())
                            respond(holder, b'{"id":1}', "201 Created")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Scripted(listener.getsockname(), parked)
        finally:
            ending.send(b"x")
            thread.join(PATIENCE_S)
            ending.close()
            ended.close()


def publication(number: int, polls: int, channel: str = "a") -> Publication:
    payload = make_payload(channel, number, 100)
    return Publication(DIALECT.publish(channel, payload), (payload,), polls)


def parked_fleet(server: Scripted, polls: int, *, spin: bool = False) -> Fleet:
    fleet = Fleet([server.address], DIALECT, spin=spin)
    fleet.add_publishers(1)
    fleet.add_pollers([("a",)] * polls)
    fleet.park()
    server.await_parked(polls)
    return fleet


def test_every_poll_is_answered_and_timed_again_and_again() -> None:
    with scripted() as server, parked_fleet(server, 300) as fleet:
        for number in range(3):
            delivery = fleet.publish([publication(number, 300)], PATIENCE_S)
            fleet.park()
            server.await_parked(300)

            assert len(delivery.answers) == 300
            assert len(delivery.acknowledgements) == 1
            assert 0 < max(delivery.answers) <= delivery.wall
            assert delivery.client.cpu > 0


def test_clients_may_poll_again_at_once() -> None:
    with scripted() as server, parked_fleet(server, 20) as fleet:
        for number in range(3):
            assert len(fleet.publish([publication(number, 20)], PATIENCE_S, again=True).answers) == 20
            server.await_parked(20)


def test_a_client_that_spins_says_how_long() -> None:
    def late(parked: list[socket.socket], payload: bytes) -> None:
        time.sleep(0.02)
        tell_all(parked, payload)

    with scripted(late) as server, parked_fleet(server, 3, spin=True) as fleet:
        delivery = fleet.publish([publication(0, 3)], PATIENCE_S)

        assert len(delivery.answers) == 3
        assert 0 < delivery.idle < delivery.wall


def test_an_answer_in_pieces_counts_when_it_is_whole() -> None:
    def slowly(parked: list[socket.socket], payload: bytes) -> None:
        body = json.dumps({"messages": [{"data": payload.decode()}], "next": 2, "gap": False}).encode()
        data = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        for connection in parked:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for first in range(0, len(data), 50):
                connection.sendall(data[first : first + 50])

    with scripted(slowly) as server, parked_fleet(server, 3) as fleet:
        assert len(fleet.publish([publication(0, 3)], PATIENCE_S).answers) == 3


def test_a_missing_answer_fails() -> None:
    with (
        scripted(lambda parked, payload: tell_all(parked[:-1], payload)) as server,
        parked_fleet(server, 3) as fleet,
        pytest.raises(FleetError, match=r"answers still missing after 0\.1 s: 1$"),
    ):
        fleet.publish([publication(0, 3)], 0.1)


def test_an_old_message_fails() -> None:
    def repeat(parked: list[socket.socket], payload: bytes) -> None:
        tell_all(parked, make_payload("a", 99, 100))

    with (
        scripted(repeat) as server,
        parked_fleet(server, 3) as fleet,
        pytest.raises(FleetError, match="nobody is waiting for"),
    ):
        fleet.publish([publication(0, 3)], PATIENCE_S)


def test_a_message_of_another_channel_fails() -> None:
    with (
        scripted() as server,
        parked_fleet(server, 3) as fleet,
        pytest.raises(FleetError, match="not polled"),
    ):
        fleet.publish([publication(0, 3, "b")], PATIENCE_S)


def test_a_message_told_twice_fails() -> None:
    def twice(parked: list[socket.socket], payload: bytes) -> None:
        first = parked[0]
        answer(first, payload)
        tell_all(parked, payload)

    with scripted(twice) as server, parked_fleet(server, 3) as fleet, pytest.raises(FleetError):
        fleet.publish([publication(0, 3)], PATIENCE_S)


def test_a_closed_connection_fails() -> None:
    def hang_up(parked: list[socket.socket], payload: bytes) -> None:
        parked[0].shutdown(socket.SHUT_RDWR)

    with (
        scripted(hang_up) as server,
        parked_fleet(server, 3) as fleet,
        pytest.raises(FleetError, match="closed a connection"),
    ):
        fleet.publish([publication(0, 3)], PATIENCE_S)


def test_an_answer_nobody_waited_for_fails() -> None:
    with scripted() as server, parked_fleet(server, 3) as fleet:
        fleet.publish([publication(0, 3)], PATIENCE_S)
        fleet.expect_silence()
        with socket.create_connection(server.address) as stranger:
            fleet.park()
            server.await_parked(3)
            stranger.sendall(DIALECT.publish("a", make_payload("a", 1, 100)))
            stranger.recv(1000)
        with pytest.raises(FleetError, match="before there was a message"):
            fleet.expect_silence()


def test_nobody_listening_fails() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with Fleet([taken.getsockname()], DIALECT) as fleet, pytest.raises(FleetError, match="cannot connect"):
            fleet.add_publishers(1)


def test_clients_and_publishers_go_to_the_nodes_in_turn() -> None:
    with scripted() as one, scripted() as two, Fleet([one.address, two.address], DIALECT) as fleet:
        fleet.add_pollers([("a",)] * 5)
        fleet.park()

        one.await_parked(3)
        two.await_parked(2)


def test_so_many_polls_are_sent_as_are_wanted() -> None:
    with scripted() as server, Fleet([server.address], DIALECT) as fleet:
        fleet.add_pollers([("a",)] * 5)

        assert [fleet.park(2) for _ in range(4)] == [2, 2, 1, 0]
        server.await_parked(5)


def test_a_publisher_may_have_a_connection_for_each_request() -> None:
    class OneShot(PushUpDialect):
        one_shot = True

    accepted = []

    def close_after(parked: list[socket.socket], payload: bytes) -> None:
        accepted.append(payload)
        tell_all(parked, payload)

    with scripted(close_after) as server, Fleet([server.address], OneShot(120), spin=True) as fleet:
        fleet.add_publishers(2)
        fleet.expect_silence()
        delivery = fleet.publish([publication(number, 0) for number in range(5)], PATIENCE_S)

        assert len(delivery.acknowledgements) == len(accepted) == 5
        assert not fleet._publishers
