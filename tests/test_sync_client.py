"""The blocking client alone. What holds for both clients is in test_client.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pushup import SyncClient
from pushup.errors import PushUpError


class Server:
    """Answers each request with what it is given, one after the other, from a thread of its own."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.lines: list[str] = []
        self.connections = 0
        self._answers = list(answers)
        self._thread = threading.Thread(target=self._serve)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._thread.join()
        self.listener.close()

    def _serve(self) -> None:
        while self._answers:
            connection, _ = self.listener.accept()
            self.connections += 1
            with connection, connection.makefile("rb") as lines:
                while self._answers and (line := lines.readline()):
                    self.lines.append(line.decode().strip())
                    while lines.readline() not in (b"\r\n", b""):
                        ...
                    body = json.dumps(self._answers.pop(0)).encode()
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@contextmanager
def serving(*answers: dict[str, Any]) -> Iterator[Server]:
    server = Server(*answers)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def poll_answer(*ids: int, next: int) -> dict[str, Any]:
    return {"messages": [{"id": id, "channels": ["a"], "data": None} for id in ids], "next": next, "gap": False}


def test_it_needs_no_event_loop() -> None:
    """It loads neither aiohttp nor redis-py."""
    loaded = "import sys, pushup; pushup.SyncClient; print({'aiohttp', 'redis'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True) == "set()\n"


def test_in_a_for_loop() -> None:
    """One connection, poll after poll; leaving the loop leaves nothing behind."""
    answers = [poll_answer(next=1), poll_answer(1, 2, next=3), poll_answer(3, next=4)]
    with serving(*answers) as server, SyncClient(server.url) as client:
        got = []
        for message in client.subscribe("a"):
            got.append(message.id)
            if message.id == 3:
                break

    assert got == [1, 2, 3]
    assert server.connections == 1
    assert [line.split("&")[1] for line in server.lines] == ["start=latest", "start=1", "start=3"]


class Interrupted(Exception):
    """What the signal's handler raises."""


def test_waiting_may_be_interrupted() -> None:
    """By a signal whose handler raises, as Ctrl-C does: the iteration may go on, on another connection."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    server = Server(poll_answer(7, next=8))
    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        with SyncClient(server.url) as client:
            news = client.subscribe("a", start=5)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupted):
                next(news)
            first, _ = server.listener.accept()
            with first:
                assert b"start=5" in first.recv(4096)
                assert first.recv(4096) == b"", "its connection is closed"
            server.start()
            assert next(news).id == 7
    finally:
        signal.signal(signal.SIGALRM, former)
        server.stop()


def test_a_closed_client() -> None:
    """Says so; a subscription that was closed is at its end."""
    with SyncClient("http://127.0.0.1:1") as client:
        left, kept = client.subscribe("a"), client.subscribe("a")
        left.close()
    assert list(left) == []
    with pytest.raises(PushUpError, match="the client is closed"):
        next(kept)


def test_many_descriptors() -> None:
    """An idle connection is looked at, whatever the number of its descriptor."""
    with serving(poll_answer(1, next=2), poll_answer(2, next=3)) as server, SyncClient(server.url) as client:
        held = [os.open(os.devnull, os.O_RDONLY)]
        try:
            while held[-1] < 1100:
                held.append(os.dup(held[0]))
        except OSError:
            pytest.skip("this machine allows too few")
        finally:
            news = client.subscribe("a", start=0)
            ids = [next(news).id for _ in range(2)]
            for descriptor in held:
                os.close(descriptor)
    assert ids == [1, 2]
    assert server.connections == 1
