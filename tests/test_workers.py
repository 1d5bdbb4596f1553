"""Several processes on one port: their settings, their port, and whole services from start-up to the last answer."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pushup.errors import SettingsError
from pushup.settings import Settings
from pushup.workers import Workers, worker_settings
from tests.redis_server import RedisServer
from tests.support import PATIENCE_S
from tests.test_cli import PRIVATE, answer, clean_environment, requesting

COUNT = 2


class Service:
    """One `pushup serve --workers 2` with its processes."""

    def __init__(self, redis: RedisServer, *arguments: str) -> None:
        self.realm = uuid4().hex
        self.popen = subprocess.Popen(
            [
                *(sys.executable, "-m", "pushup", "serve", "--workers", str(COUNT)),
                *("--broker", redis.url, "--realm", self.realm, *arguments),
            ],
            env={**clean_environment(), **PRIVATE},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def announced(self) -> list[str]:
        """What it prints once it serves: its five lines. Sets the addresses."""
        assert self.popen.stdout is not None
        lines = [self.popen.stdout.readline().rstrip() for _ in range(5)]
        addresses = re.findall(r"http://([^\s,]+)", "\n".join(lines))
        assert len(addresses) == 1 + COUNT, (lines, self.popen.communicate())
        self.address, *self.admin_addresses = addresses
        return lines

    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [pid for pid in _children(self.popen.pid) if b"spawn_main" in _command(pid)]

    def nodes(self) -> dict[str, tuple[str, str]]:
        """Name and address of each by its admin address, as one of those that were there first lists them."""
        for admin in self.admin_addresses:
            try:
                found = get(admin, "/nodes")[1]["nodes"]
            except ConnectionError:
                continue
            return {node["admin_address"]: (node["name"], node["address"]) for node in found}
        raise AssertionError("nobody answers")

    def errors_until(self, part: str) -> None:
        """Read what it writes to standard error, up to the line with this in it."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            if part in line:
                return
        raise AssertionError(f"it never said {part}")

    def end(self, *signals: int) -> tuple[int, str]:
        """Send the signals; the exit status and what was written to standard error."""
        for number in signals:
            self.popen.send_signal(number)
        _, errors = self.popen.communicate(timeout=PATIENCE_S)
        return self.popen.returncode, errors

    def kill(self) -> None:
        """Whatever is left of it."""
        for pid in [*self.pids(), self.popen.pid]:
            os.kill(pid, signal.SIGKILL)
        self.popen.communicate()


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _ended(pid: int) -> bool:
    """Whether a process has ended, be there somebody to take notice of it or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def service(redis: RedisServer, *arguments: str) -> Iterator[Service]:
    """Started, and killed at the end if it has not ended before."""
    one = Service(redis, *arguments)
    try:
        yield one
    finally:
        if one.popen.poll() is None:
            one.kill()


def wait_until(condition: Callable[[], bool], hope: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"hoped that {hope}"
        time.sleep(0.01)


def get(address: str, path: str) -> tuple[int, Any]:
    with requesting(address, path) as connection:
        return answer(connection)


def is_ready(admin_address: str) -> bool:
    try:
        return get(admin_address, "/health/ready")[0] == 200
    except ConnectionError:
        return False


def parked(admin_address: str) -> int:
    with requesting(admin_address, "/metrics") as connection:
        text = connection.getresponse().read().decode()
    (count,) = re.findall(r'^pushup_parked_polls{realm="[^"]+"} (\d+)\.0$', text, re.MULTILINE)
    return int(count)


def publish(address: str, channel: str) -> int:
    connection = HTTPConnection(address, timeout=PATIENCE_S)
    connection.request("POST", "/publish", json.dumps({"channels": [channel], "data": 1}))
    status, body = answer(connection)
    connection.close()
    assert status == 201
    return int(body["id"])


@contextmanager
def polls(address: str, count: int) -> Iterator[list[HTTPConnection]]:
    """So many polls for what is published from now on, each on a connection of its own."""
    connections = [HTTPConnection(address, timeout=PATIENCE_S) for _ in range(count)]
    for connection in connections:
        connection.request("GET", "/poll?channel=a&start=latest")
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


# Settings


def test_every_worker_has_settings_of_its_own() -> None:
    """The service's address, the next admin port, a name with its number; it has no workers itself."""
    given = Settings(
        listen="127.0.0.1:0", admin_listen="127.0.0.1:9000", name="edge", workers=3, broker="redis://there"
    )

    made = [worker_settings(given, number, "127.0.0.1:8080") for number in range(3)]

    assert [one.listen for one in made] == ["127.0.0.1:8080"] * 3
    assert [one.admin_listen for one in made] == ["127.0.0.1:9000", "127.0.0.1:9001", "127.0.0.1:9002"]
    assert [one.name for one in made] == ["edge-1", "edge-2", "edge-3"]
    assert {one.workers for one in made} == {1}
    assert {one.broker for one in made} == {"redis://there"}


@pytest.mark.parametrize(
    ("admin_listen", "second"),
    [("127.0.0.1:0", "127.0.0.1:0"), ("[::1]:9000", "[::1]:9001"), (":9000", "0.0.0.0:9001")],
)
def test_admin_ports(admin_listen: str, second: str) -> None:
    """Any free port is any free port; a host keeps its form."""
    assert worker_settings(Settings(admin_listen=admin_listen), 1, "127.0.0.1:8080").admin_listen == second


def test_a_name_that_is_left_to_chance() -> None:
    """Every worker chooses its own."""
    assert worker_settings(Settings(), 1, "127.0.0.1:8080").name == "auto"


def test_admin_ports_that_do_not_exist(redis_server: RedisServer) -> None:
    """The last worker's would be above the highest one: that is a wrong setting, said in a sentence."""
    with service(redis_server, "--admin-listen", "127.0.0.1:65535") as one:
        status, errors = one.end()

    assert status == 2
    assert re.fullmatch(r"pushup: admin_listen = '127\.0\.0\.1:65535'.*\n", errors)


# The port


@pytest.mark.parametrize("sharing", [False, True])
def test_a_port_that_is_taken(sharing: bool) -> None:
    """Is said before any process is started, also if whoever has it would share it: it is another service's."""
    with socket.socket() as taken:
        if sharing:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(SettingsError) as caught:
            Workers(Settings(listen=address, workers=2), lambda settings, ready: None)

    assert str(caught.value) == f"listen = '{address}': cannot listen there: Address already in use"


def test_an_address_of_another_machine() -> None:
    """Cannot be listened on."""
    with pytest.raises(SettingsError) as caught:
        Workers(Settings(listen="192.0.2.1:0", workers=2), lambda settings, ready: None)

    assert str(caught.value) == "listen = '192.0.2.1:0': cannot listen there: Cannot assign requested address"


def test_a_host_that_does_not_exist() -> None:
    """Is said as it is for one process."""
    with pytest.raises(SettingsError) as caught:
        Workers(Settings(listen="nowhere.invalid:0", workers=2), lambda settings, ready: None)

    assert str(caught.value).startswith("listen = 'nowhere.invalid:0': cannot listen there: ")


# Whole services


def test_a_service_from_its_start_to_its_end(redis_server: RedisServer) -> None:
    """All on one port; each is in the list of nodes; one that is killed is replaced; SIGTERM drains all."""
    with service(redis_server, "--name", "edge", "--drain-window", "0.3") as one:
        lines = one.announced()
        assert lines[1].endswith(f"http://{one.address}  (2 processes)")
        assert lines[2].count("http://") == 2
        assert all(map(is_ready, one.admin_addresses))
        nodes = one.nodes()
        assert nodes == dict(zip(one.admin_addresses, [("edge-1", one.address), ("edge-2", one.address)], strict=True))

        with polls(one.address, 16) as waiting:
            wait_until(lambda: sum(map(parked, one.admin_addresses)) == 16, "all polls wait")
            assert all(parked(admin) for admin in one.admin_addresses), "the kernel deals connections out"
            id = publish(one.address, "a")
            answers = [answer(connection) for connection in waiting]
        assert [[message["id"] for message in body["messages"]] for _, body in answers] == [[id]] * 16

        victim, survivor = one.pids()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: one.nodes().keys() != nodes.keys(), "the dead one is replaced")
        assert survivor in one.pids()
        admins = list(one.nodes())
        wait_until(lambda: all(map(is_ready, admins)), "the new one is ready")

        with polls(one.address, 16) as waiting:
            wait_until(lambda: sum(map(parked, admins)) == 16, "all polls wait")
            assert all(map(parked, admins)), "the new one has its share"
            status, errors = one.end(signal.SIGTERM)
            drained = [answer(connection) for connection in waiting]

    assert status == 0
    assert [(status, body["messages"]) for status, body in drained] == [(200, [])] * 16
    assert "a worker died worker=" in errors
    assert errors.count("\n") == 1


def test_ctrl_c_ends_all_at_once(redis_server: RedisServer) -> None:
    """Without waiting for the drain window; the exit status is 0."""
    with service(redis_server, "--drain-window", "60") as one:
        one.announced()
        pids = one.pids()
        with polls(one.address, 4) as waiting:
            wait_until(lambda: sum(map(parked, one.admin_addresses)) == 4, "all polls wait")
            result = one.end(signal.SIGINT)
            answers = [answer(connection)[0] for connection in waiting]

    assert result == (0, "")
    assert answers == [200] * 4
    assert all(map(_ended, pids))


def test_workers_do_not_outlive_who_minds_them(redis_server: RedisServer) -> None:
    """Killed, it can pass nothing on; they notice, answer their polls, and end."""
    with service(redis_server, "--drain-window", "0.2") as one:
        one.announced()
        pids = one.pids()
        with polls(one.address, 4) as waiting:
            wait_until(lambda: sum(map(parked, one.admin_addresses)) == 4, "all polls wait")
            one.popen.kill()
            answers = [answer(connection)[0] for connection in waiting]
        one.popen.communicate()
        wait_until(lambda: all(map(_ended, pids)), "they end")

    assert len(pids) == COUNT
    assert answers == [200] * 4


def test_a_signal_while_a_worker_is_being_replaced(redis_server: RedisServer) -> None:
    """Ends the service all the same: the one that comes in its place is not forgotten."""
    with service(redis_server, "--drain-window", "0.1") as one:
        one.announced()
        os.kill(one.pids()[0], signal.SIGKILL)
        one.errors_until("a worker died")

        status, _ = one.end(signal.SIGTERM)

    assert status == 0


def test_a_signal_while_workers_are_starting(redis_server: RedisServer) -> None:
    """Ends the service, whoever of them is there already."""
    with service(redis_server) as one:
        wait_until(lambda: one.pids() != [], "the first one is started")

        one.end(signal.SIGTERM)

        assert one.popen.returncode is not None
        assert one.pids() == []


def test_a_worker_that_cannot_start_ends_all(redis_server: RedisServer) -> None:
    """An admin port that is taken: exit status 2, and the sentence of the one that found out."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with service(redis_server, "--admin-listen", address) as one:
            status, errors = one.end()

    # The next port, which is the other worker's, may be taken too.
    assert f"pushup: admin_listen = '{address}': cannot listen there: Address already in use" in errors.splitlines()
    assert status == 2


def test_a_broker_that_cannot_be_reached(redis_server: RedisServer) -> None:
    """Exit status 1, and a sentence from each."""
    with service(redis_server, "--broker", "redis://127.0.0.1:1", "--broker-timeout", "0.2") as one:
        status, errors = one.end()

    said = {line for line in errors.splitlines() if line.startswith("pushup: ")}
    assert status == 1
    assert len(said) == 1
    assert said.pop().startswith("pushup: cannot reach the broker redis://127.0.0.1:1: ")
