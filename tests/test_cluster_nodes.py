"""Nodes as a cluster sees them: their settings, and what their admin listener says."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster.errors import ClusterError, Refused
from cluster.nodes import Node, check_settings, drain, fetch
from cluster.processes import HOST, free_ports
from tests.support import PATIENCE_S, running


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"poll_timeot": "5"}, "poll_timeot is not a setting of a node; did you mean poll_timeout?"),
        ({"wings": "2"}, "wings is not a setting of a node"),
        ({"listen": "127.0.0.1:1"}, "listen is set by the cluster for each of its nodes"),
        ({"name": "one"}, "name is set by the cluster for each of its nodes"),
        (
            {"linger": "long"},
            "linger = 'long' (from --linger) is wrong: it must be a number of seconds, 0 to 1000000000",
        ),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, str], sentence: str) -> None:
    """In the node's own words where it has some."""
    with pytest.raises(Refused) as refused:
        check_settings(settings)

    assert str(refused.value) == sentence


def test_settings_may_be_what_only_redis_allows() -> None:
    """Nodes of a cluster always have Redis."""
    settings = check_settings({"workers": "3", "poll_timeout_max": "200", "demo": "yes"})

    assert (settings.workers, settings.poll_timeout_max, settings.demo) == (3, 200, True)


async def test_a_node_is_ready_when_it_says_so(tmp_path: Path) -> None:
    """Its load is what it says of itself."""
    async with running(name="node1") as server:
        ports = port_of(server.address), port_of(server.admin_address)
        node = Node(tmp_path, "node1", *ports, {}, check_settings({}))

        assert node.admin_address == server.admin_address
        assert await asyncio.to_thread(node.ready)
        assert await asyncio.to_thread(node.load) == {
            server.address: {"parked": 0, "channels": 0, "publications": 0, "deliveries": 0}
        }

    assert not await asyncio.to_thread(node.ready)
    assert await asyncio.to_thread(node.load) == {}


def test_a_node_of_several_workers(tmp_path: Path) -> None:
    """It is ready when all of them are, and its load is the sum of theirs."""
    workers = [
        {"address": f"{HOST}:7", "parked": parked, "channels": 1, "publications": 10, "deliveries": 2, "name": "any"}
        for parked in (3, 4)
    ]
    (admin_port,) = free_ports(1, row=2)
    node = Node(tmp_path, "node1", 7, admin_port, {}, check_settings({"workers": "2"}))

    with admin(admin_port, {"/health/ready": {}, "/nodes": {"nodes": workers}}):
        assert not node.ready()
        assert node.load() == {f"{HOST}:7": {"parked": 7, "channels": 2, "publications": 20, "deliveries": 4}}
        with admin(admin_port + 1, {"/health/ready": {}}):
            assert node.ready()
    assert node.load() == {}


@contextmanager
def admin(port: int, answers: Mapping[str, object]) -> Iterator[None]:
    """An admin listener that says this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(self.path)).encode())

        def log_message(self, format: str, *arguments: object) -> None: ...

    with HTTPServer((HOST, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def test_answers_that_are_none() -> None:
    """Nobody listens, or what comes is not JSON."""
    with socket.create_server((HOST, 0)) as server:
        address = f"{HOST}:{server.getsockname()[1]}"
        thread = threading.Thread(target=talk_nonsense, args=(server,))
        thread.start()
        assert fetch(address, "/nodes") == (0, None)
        thread.join()

    assert fetch(address, "/nodes") == (0, None)


def talk_nonsense(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nnonsense")


def test_a_node_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    """Its own sentence is the end of it."""
    with socket.create_server((HOST, 0)) as server:
        taken = server.getsockname()[1]
        node = Node(tmp_path, "node1", taken, free_ports(1)[0], {}, check_settings({}))
        node.start("memory://")

        with pytest.raises(ClusterError) as failed:
            node.expect(node.ready, PATIENCE_S)

    assert str(failed.value) == (
        "node1 ended before it was ready. The end of its log:\n"
        f"  pushup: listen = '{HOST}:{taken}': cannot listen there: Address already in use"
    )


def test_a_node_drains(tmp_path: Path) -> None:
    """SIGTERM, and the end within its drain window; with its settings."""
    port, admin_port = free_ports(2)
    node = Node(tmp_path, "node1", port, admin_port, {"poll_timeout": "0", "realm": "mine"}, check_settings({}))
    node.start("memory://")
    node.expect(node.ready, PATIENCE_S)

    assert fetch(node.address, "/poll?channel=a")[0] == 200
    assert node.drain()

    assert not node.alive
    assert drain([node]) == []
