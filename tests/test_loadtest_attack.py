"""Load under attack: hostile clients, good clients that miss nothing unnoticed, and the report."""

import fcntl
import json
import re
import resource
import selectors
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loadtest.attack import DESCRIPTORS_MAX, FULL, AttackError, Plan, make_crowds, run
from loadtest.attack_report import AttackResult, PhaseResult, judge, memory_bound_mib, render, save, write
from loadtest.attackers import SEGMENT_BYTES, Attackers, Crowd, Siege
from loadtest.audience import Audience, Losses, Phase
from tests.support import PATIENCE_S

ROOT = Path(__file__).parent.parent
QUICK_S = 120
CLIENTS = 3
CUT = ("closed", "reset", "408")


# Hostile clients


@contextmanager
def besieged(*crowds: Crowd, per_source: int = 10) -> Iterator[tuple[Attackers, socket.socket]]:
    """The attackers and the listener that they attack."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        listener.settimeout(PATIENCE_S)
        siege = Siege(listener.getsockname(), ["127.2.0.1", "127.2.0.2"], per_source, crowds)
        attackers = Attackers(Siege.from_json(siege.to_json()))
        try:
            yield attackers, listener
        finally:
            attackers.close()


def turn_until(attackers: Attackers, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        attackers.turn()


def accept(attackers: Attackers, listener: socket.socket, count: int) -> list[socket.socket]:
    turn_until(attackers, lambda: sum(attackers.toll().open.values()) == count)
    accepted = [listener.accept()[0] for _ in range(count)]
    for connection in accepted:
        connection.setblocking(False)
    return accepted


def heard(attackers: Attackers, connection: socket.socket, count: int) -> bytes:
    """The first bytes that come on the connection."""
    data = b""

    def enough() -> bool:
        nonlocal data
        with suppress(BlockingIOError):
            data += connection.recv(count - len(data))
        return len(data) == count

    turn_until(attackers, enough)
    return data


def test_attackers_come_when_told_to_and_no_address_has_too_many() -> None:
    with besieged(Crowd("idle", 15)) as (attackers, listener):
        attackers.turn()
        assert attackers.toll().open == {"idle": 0}

        attackers.command("attack")
        accepted = accept(attackers, listener, 15)

        sources = [connection.getpeername()[0] for connection in accepted]
        assert (sources.count("127.2.0.1"), sources.count("127.2.0.2")) == (10, 5)
        for connection in accepted:
            connection.close()


def test_more_attackers_than_the_addresses_may_have_are_refused() -> None:
    with pytest.raises(ValueError, match="21 connections are too many"), besieged(Crowd("idle", 21)):
        pass


def test_a_slow_attacker_says_its_beginning_and_goes_on_by_bytes() -> None:
    with besieged(Crowd("slow", 1, "GET /{number} HTTP/1.1\r\nX: ", "a", interval_s=0.01)) as (attackers, listener):
        attackers.command("attack")
        [connection] = accept(attackers, listener, 1)

        assert heard(attackers, connection, 27) == b"GET /1 HTTP/1.1\r\nX: aaaaaaa"
        connection.close()


@pytest.mark.parametrize(
    ("answer", "linger", "reason"),
    [(b"HTTP/1.1 408 Request Timeout\r\n\r\n", False, "408"), (b"", False, "closed"), (b"", True, "reset")],
)
def test_an_attacker_whose_connection_ends_comes_again_and_says_how_it_ended(
    answer: bytes, linger: bool, reason: str
) -> None:
    with besieged(Crowd("slow", 1, "G", "E", interval_s=60)) as (attackers, listener):
        attackers.command("attack")
        [connection] = accept(attackers, listener, 1)
        heard(attackers, connection, 1)
        connection.send(answer)
        if linger:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()

        turn_until(attackers, lambda: attackers.toll().opened == {"slow": 2})
        assert attackers.toll().ended == {"slow": {reason: 1}}


def test_who_never_reads_leaves_everything_unread_and_knows_when_it_was_cut() -> None:
    with besieged(Crowd("deaf", 1, "GET / HTTP/1.1\r\n\r\n", "x", interval_s=0.01, reads=False)) as (
        attackers,
        listener,
    ):
        attackers.command("attack")
        [connection] = accept(attackers, listener, 1)
        sent = 0
        with suppress(BlockingIOError):
            while True:
                sent += connection.send(b"a" * 65536)
        for _ in range(5):
            attackers.turn()
        unread = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]
        assert 0 < sent - unread <= 2 * SEGMENT_BYTES
        assert attackers.toll().ended == {"deaf": {}}

        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()

        turn_until(attackers, lambda: attackers.toll().ended == {"deaf": {"reset": 1}})


def test_attackers_go_when_told_to() -> None:
    with besieged(Crowd("idle", 3)) as (attackers, listener):
        attackers.command("attack")
        accepted = accept(attackers, listener, 3)
        attackers.command("rest")
        attackers.turn()

        assert attackers.toll().open == {"idle": 0}
        assert attackers.toll().ended == {"idle": {}}
        for connection in accepted:
            connection.setblocking(True)
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
            connection.close()


def test_the_crowds_of_a_plan_are_as_many_as_it_says() -> None:
    slow, unread = make_crowds(FULL)

    assert (sum(crowd.count for crowd in slow), sum(crowd.count for crowd in unread)) == (10_000, 2000)
    assert all(crowd.reads for crowd in slow)
    assert not any(crowd.reads for crowd in unread)


# Good clients

Say = Callable[[list[socket.socket], int, str], None]


def respond(connection: socket.socket, body: Any, status: str = "200 OK") -> None:
    data = json.dumps(body).encode()
    connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


def tell(connection: socket.socket, id: int, *messages: tuple[int, str], gap: bool = False) -> None:
    """Answer a poll up to that id."""
    shown = [{"id": number, "data": data} for number, data in messages]
    respond(connection, {"messages": shown, "next": id + 1, "gap": gap})


def tell_all(parked: list[socket.socket], id: int, data: str) -> None:
    for connection in parked:
        tell(connection, id, (id, data))


class Script:
    """What a server of one channel says: `say` to those that wait, once all `CLIENTS` do, then the acknowledgement.

    A poll that comes from before the last id is answered at once, with all that there is.
    """

    def __init__(self, say: Say, acknowledge: Callable[[int], tuple[Any, str]]) -> None:
        self._say = say
        self._acknowledge = acknowledge
        self._log: list[tuple[int, str]] = []
        self._parked: list[socket.socket] = []
        self._publishing: list[tuple[socket.socket, str]] = []

    def hear(self, connection: socket.socket, data: bytes) -> None:
        poll = re.match(rb"GET /poll\?.*start=(\d+)", data)
        if poll is None:
            self._publishing.append((connection, json.loads(data.partition(b"\r\n\r\n")[2])["data"]))
        elif (start := int(poll[1])) and start <= len(self._log):
            tell(connection, len(self._log), *self._log[start - 1 :])
        else:
            self._parked.append(connection)
        while self._publishing and len(self._parked) == CLIENTS:
            publisher, text = self._publishing.pop(0)
            told, self._parked = self._parked, []
            self._log.append((len(self._log) + 1, text))
            self._say(told, *self._log[-1])
            respond(publisher, *self._acknowledge(len(self._log)))

    def lose(self, connection: socket.socket) -> None:
        if connection in self._parked:
            self._parked.remove(connection)


@contextmanager
def serving(script: Script) -> Iterator[tuple[str, int]]:
    """The address of a server that follows the script."""
    with socket.create_server(("127.0.0.1", 0)) as listener, selectors.DefaultSelector() as selector:
        ending, ended = socket.socketpair()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)

        def serve() -> None:
            connections: list[socket.socket] = []
            while True:
                for key, _ in selector.select():
                    holder = key.fileobj
                    assert isinstance(holder, socket.socket)
                    if holder is ended:
                        for connection in connections:
                            connection.close()
                        return
                    if holder is listener:
                        connections.append(listener.accept()[0])
                        selector.register(connections[-1], selectors.EVENT_READ)
                        continue
                    data = b""
                    with suppress(ConnectionResetError):
                        data = holder.recv(65536)
                    if data:
                        with suppress(OSError):  # The clients go when they have heard enough.
                            script.hear(holder, data)
                    else:
                        selector.unregister(holder)
                        script.lose(holder)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            ending.send(b"x")
            thread.join(PATIENCE_S)
            ending.close()
            ended.close()


def acknowledged(id: int) -> tuple[Any, str]:
    return {"id": id}, "201 Created"


def listen(say: Say, acknowledge: Callable[[int], tuple[Any, str]] = acknowledged) -> tuple[Audience, Phase]:
    """What the clients of a channel have seen when a few messages were published."""
    with (
        serving(Script(say, acknowledge)) as address,
        Audience(
            address,
            pollers=CLIENTS,
            channels=1,
            per_second=100,
            message_bytes=50,
            publishers=1,
            sources=["127.1.0.1"],
            per_source=10,
        ) as audience,
    ):
        phase = Phase("test")
        audience.run(phase, 0.2, lambda: False)
        audience.finish(PATIENCE_S)
    return audience, phase


def test_good_clients_hear_everything_and_every_delivery_is_timed() -> None:
    audience, phase = listen(tell_all)

    assert audience.losses.none, audience.examples
    assert audience.published > 5
    assert len(phase.lags) == CLIENTS * audience.published
    assert min(phase.lags) > 0


def test_lag_counts_from_when_a_message_should_have_been_sent() -> None:
    """A server that stalls for 100 ms delays the ten publications that were due meanwhile."""

    def stall(parked: list[socket.socket], id: int, data: str) -> None:
        if id == 3:
            time.sleep(0.1)
        tell_all(parked, id, data)

    audience, phase = listen(stall)

    assert audience.losses.none, audience.examples
    assert sum(lag > 20e6 for lag in phase.lags) >= CLIENTS * 5


def lying_once(at: int, instead: Callable[[socket.socket, int, str], None]) -> Say:
    """Everybody is told everything, but one client something else at the publication of that id."""

    def say(parked: list[socket.socket], id: int, data: str) -> None:
        first, *others = parked
        tell_all(others, id, data)
        if id == at:
            instead(first, id, data)
        else:
            tell(first, id, (id, data))

    return say


@pytest.mark.parametrize(
    ("instead", "losses"),
    [
        (lambda connection, id, data: tell(connection, id), Losses(lost=1)),
        (lambda connection, id, data: tell(connection, id, (id, data), (id, data)), Losses(repeated=1)),
        (lambda connection, id, data: tell(connection, id, (id, data), gap=True), Losses(gaps=1)),
        (lambda connection, id, data: tell(connection, id, (id, data), (id, "stranger")), Losses(wrong=1)),
    ],
    ids=["lost", "repeated", "gap", "wrong"],
)
def test_what_a_good_client_should_not_hear_is_counted(
    instead: Callable[[socket.socket, int, str], None], losses: Losses
) -> None:
    audience, _ = listen(lying_once(3, instead))

    assert audience.losses == losses, audience.examples
    assert audience.examples


def test_what_was_acknowledged_and_told_to_nobody_is_lost_to_everybody() -> None:
    def silent(parked: list[socket.socket], id: int, data: str) -> None:
        for connection in parked:
            tell(connection, id, *([(id, data)] if id != 3 else []))

    audience, _ = listen(silent)

    assert audience.losses == Losses(lost=CLIENTS), audience.examples


def test_a_refused_publication_is_counted_and_not_lost() -> None:
    def refuse(id: int) -> tuple[Any, str]:
        return acknowledged(id) if id != 3 else ({}, "503 Service Unavailable")

    audience, _ = listen(tell_all, refuse)

    assert audience.losses == Losses(refused=1), audience.examples


def test_a_good_client_that_is_cut_comes_again() -> None:
    def cut(connection: socket.socket, id: int, data: str) -> None:
        connection.shutdown(socket.SHUT_RDWR)

    audience, _ = listen(lying_once(3, cut))

    assert audience.losses == Losses(cut=1), audience.examples


# The report


def phase(name: str, pair: int, p99: float, memory: float, **more: Any) -> PhaseResult:
    fields = {
        "seconds": 10.0,
        "publications": 500,
        "deliveries": 50_000,
        "lag_p50_ms": 1.0,
        "lag_p99_ms": p99,
        "lag_p999_ms": p99 * 2,
        "lag_max_ms": p99 * 3,
        "lag_percentiles_ms": [1.0] * 101,
        "sent_late_p99_ms": 0.5,
        "sent_late_max_ms": 1.0,
        "node_cpu_s": 2.0,
        "node_waited_s": 0.1,
        "client_cpu_s": 1.0,
        "attackers_cpu_s": 0.5,
        "attackers_late_ms": 3.0,
        "connections": 1000,
        "node_memory_mib": [memory - 5, memory],
        "kernel_tcp_mib": [10.0],
        "orphans": [0],
    }
    return PhaseResult(name, pair, **{**fields, **more})


def attack_phase(pair: int, p99: float, memory: float, is_open: float = 10.0, **more: Any) -> PhaseResult:
    counts = {
        "attackers_open": {"head": is_open, "deaf": 5.0},
        "attackers_opened": {"head": 20, "deaf": 0},
        "attackers_ended": {"head": {"408": 7, "closed": 3}},
        "refused": {"request_timeout": 7},
    }
    return phase("attack", pair, p99, memory, **{**counts, **more})


RESULT = AttackResult(
    command="python -m loadtest attack",
    started="20260102T030405Z",
    seconds=100.0,
    quick=False,
    machine={"processor": "abacus", "cores": 2},
    versions={"pushup": "1.0"},
    pinning="server pinned to core 0",
    parameters={
        "pollers": 1000,
        "channels": 10,
        "per_second": 50,
        "message_bytes": 100,
        "calm_s": 10.0,
        "attack_s": 10.0,
        "slow_opens_per_s": 100.0,
        "unread_opens_per_s": 50.0,
        "drip_s": 5.0,
    },
    limits={
        "answer_bytes_max": 2**20,
        "write_buffer_bytes_max": 65536,
        "unread_bytes_max": 2**22,
        "head_bytes_max": 16384,
        "body_bytes_max": 2**22,
    },
    slow={"head": 10},
    unread={"deaf": 5},
    sources=1,
    phases=[
        phase("warm-up", 0, 9.0, 90.0),
        phase("calm", 1, 2.0, 100.0),
        phase("come", 1, 4.0, 105.0),
        attack_phase(1, 3.0, 110.0),
        phase("calm", 2, 2.0, 100.0),
        attack_phase(2, 5.0, 111.0),
        phase("calm", 3, 2.0, 100.0),
        attack_phase(3, 2.0, 112.0),
    ],
    published=1500,
    losses=vars(Losses()),
    examples=[],
)


def with_phases(**changes: PhaseResult) -> AttackResult:
    return replace(RESULT, phases=[changes.get(f"{phase.name}{phase.pair}", phase) for phase in RESULT.phases])


def met(result: AttackResult) -> list[bool | None]:
    return [target["met"] for target in judge(result)]


def test_the_ratio_is_the_median_of_the_pairs_and_all_is_well() -> None:
    assert judge(RESULT)[0]["value"] == 1.5
    assert met(RESULT) == [True] * 5


@pytest.mark.parametrize(
    ("result", "target"),
    [
        (with_phases(attack1=attack_phase(1, 4.5, 110.0)), 0),
        (replace(RESULT, losses=vars(Losses(gaps=1))), 1),
        (with_phases(come1=phase("come", 1, 4.0, 1000.0)), 2),
        (with_phases(attack3=attack_phase(3, 2.0, 125.0)), 3),
        (with_phases(attack2=attack_phase(2, 2.0, 110.0, is_open=9.0)), 4),
    ],
    ids=["ratio", "losses", "memory", "growth", "absent attackers"],
)
def test_each_target_can_be_missed(result: AttackResult, target: int) -> None:
    assert met(result) == [number != target for number in range(5)]


def test_attackers_that_are_cut_faster_than_they_may_come_are_there() -> None:
    """Five deaf ones may come at 50/s; the server has ended nearly all that came in ten seconds."""
    gone = {"head": 10.0, "deaf": 0.5}
    busy, lazy = (
        with_phases(
            attack2=attack_phase(2, 2.0, 110.0, attackers_open=gone, attackers_opened={"head": 20, "deaf": came})
        )
        for came in (450, 400)
    )

    assert judge(busy)[4]["value"] == 1.0
    assert judge(lazy)[4]["value"] == 0.1


def test_the_bound_of_memory_is_that_of_the_limits() -> None:
    """What all together may leave unread, unless they are too few for it."""
    rest = 5 * (65536 + 16384) + 10 * (16384 + 16384) + 2**24 + 2 * 2**22
    wide = replace(RESULT, limits={**RESULT.limits, "unread_bytes_max": 2**30})

    assert memory_bound_mib(RESULT) == (2**22 + 2**20 + rest) / 2**20
    assert memory_bound_mib(wide) == (5 * (2**20 + 65536) + rest) / 2**20


def test_the_report_says_what_the_raw_file_says(tmp_path: Path) -> None:
    raw = save(RESULT, tmp_path / "attack.json")
    report = write(raw)

    assert report.name == "ATTACK.md"
    assert AttackResult.from_json(json.loads(raw.read_text())) == RESULT
    text = report.read_text()
    assert text == render("attack.json", RESULT)
    assert "| good clients' p99 under attack / without, median of the pairs | ≤ 2 | 1.5 | yes |" in text
    assert "| 1 | 1.00 → 1.00 | 2.00 → 3.00 | 1.50 |" in text
    assert "| head | 10 | 10 | 60 | 408 21, closed 9 |" in text
    assert "in the whole run: request timeout 21." in text
    assert "| 3 | 95–100 | 107–112 |" in text


def test_doubts_are_shown() -> None:
    result = with_phases(attack2=attack_phase(2, 5.0, 111.0, client_cpu_s=9.0, node_waited_s=2.0))
    text = render("attack.json", replace(result, quick=True, examples=["a gap\non good1"]))

    assert "**client-bound: pair 2**" in text
    assert "**disturbed: pair 2, attack**" in text
    assert "A quick run" in text
    assert "- a gap on good1\n" in text


# The whole


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2000, reason="needs 2,000 descriptors")
def test_good_clients_lose_nothing_while_attackers_come_are_cut_and_come_again(tmp_path: Path) -> None:
    """The whole attack in small; how fast it is depends on the machine, and is not judged here."""
    raw = tmp_path / "attack.json"
    done = subprocess.run(
        [sys.executable, "-m", "loadtest", "attack", "--quick", "--no-pin", "--json", str(raw)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=QUICK_S,
        check=False,
    )
    assert raw.exists(), done.stderr
    result = AttackResult.from_json(json.loads(raw.read_text()))

    assert not any(result.losses.values()), result.examples
    assert result.published > 300
    calm, attack = result.pairs()[1]
    assert calm.deliveries == 10 * calm.publications
    assert judge(result)[4]["value"] > 0.5
    assert attack.connections > calm.connections + 400
    for kind in ("nothing sent", "head", "body of a poll", *result.unread):
        assert sum(phase.attackers_ended[kind].get(how, 0) for phase in result.phases[1:] for how in CUT) > 0, kind
    assert raw.with_name("ATTACK.md").read_text() == render(raw.name, result)


def test_a_plan_beyond_the_descriptors_is_refused_in_words() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    plan = Plan(slow=max(hard, DESCRIPTORS_MAX))

    with pytest.raises(AttackError, match=r"descriptors and the node needs \d+: raise ulimit -Hn"):
        run(plan, quick=True, pin=False, command="", note=print)
