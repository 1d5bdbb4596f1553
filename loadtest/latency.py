"""Publications on a schedule, over Redis: how long after one was due does each poll of its channel have it?"""

import select
import socket
import time
from collections import deque
from statistics import fmean
from typing import Final, Self

from loadtest.answers import Answer, hear, published_id
from loadtest.crowds import QUICK_ROUNDS, ROUNDS
from loadtest.dialects import WrongAnswer, make_payload, parse_response
from loadtest.fleet import RESET_ON_CLOSE, FleetError
from loadtest.ledger import Ledger
from loadtest.machine import wait_for_events
from loadtest.results import Medians, Target, Values, percentile, percentiles_ms
from loadtest.scenario import Bench, Case, Parameters, Samples, Scenario, comparison
from loadtest.servers import FloorRedis, NchanRedis, PushUpRedis, Server

READ_BYTES: Final = 65536
KNOWN_ANSWERS_MAX: Final = 1024
PUBLISHERS: Final = 64
PARK_S: Final = 20.0
DRAIN_S: Final = 10.0
"""How long the last deliveries may take."""


class _Poller:
    __slots__ = ("after", "before", "cursor", "number", "part", "socket")

    def __init__(self, connection: socket.socket, number: int, request: tuple[bytes, bytes], cursor: bytes) -> None:
        self.socket = connection
        self.number = number
        self.before, self.after = request
        self.cursor = cursor
        self.part = b""

    def ask(self) -> None:
        self.socket.send(self.before + self.cursor + self.after)


class _Publisher:
    __slots__ = ("message", "part", "socket")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.message = 0
        self.part = b""


class OpenLoop:
    """Pollers that poll again at once, and publishers that keep to a schedule, until the end of the `with` block.

    Pollers are spread over channels and nodes; what is said and heard is in the `ledger`. `lags`: how late this process
    looked at what was due, ns. A publication waits only while all publishers have one outstanding.
    """

    def __init__(self, server: Server, polls: int, channels: int) -> None:
        self._dialect = server.dialect
        self._epoll = select.epoll()
        self._channels = [f"c{index}" for index in range(channels)]
        owners = [self._channels[index % channels] for index in range(polls)]
        self.ledger = Ledger(owners)
        self.lags: list[int] = []
        self.wrong = 0
        self.complaint = ""
        self._known: dict[bytes, Answer] = {}
        self._waiting: deque[tuple[int, int, bytes]] = deque()
        self._pollers: dict[int, _Poller] = {}
        self._publishers: dict[int, _Publisher] = {}
        self._idle: deque[_Publisher] = deque()
        nodes = server.addresses
        for number, channel in enumerate(owners):
            # Neighbours on a channel are on different nodes.
            connection = self._connect(nodes[number // channels % len(nodes)])
            request = self._dialect.poll([channel], b"")
            self._pollers[connection.fileno()] = _Poller(connection, number, request, self._dialect.first_cursor)
        for number in range(PUBLISHERS):
            connection = self._connect(server.publish_addresses[number % len(nodes)])
            self._publishers[connection.fileno()] = publisher = _Publisher(connection)
            self._idle.append(publisher)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connections in (self._pollers, self._publishers):
            for holder in connections.values():
                holder.socket.close()
        self._epoll.close()

    def park(self) -> None:
        """Send everybody's first poll."""
        for poller in self._pollers.values():
            poller.ask()

    def publish(self, number: int, due: int, size: int) -> None:
        """Publish the message of that number, which was due then, to the channel whose turn it is."""
        channel = self._channels[number % len(self._channels)]
        self.lags.append(time.monotonic_ns() - due)
        self._waiting.append((number, due, self._dialect.publish(channel, make_payload(channel, number, size))))
        self._publish_next()

    def listen(self, until: int) -> None:
        """Deal with what comes, until then or, at least once, a little longer."""
        while True:
            wait = until - time.monotonic_ns()
            for descriptor, _ in wait_for_events(self._epoll, wait, 512):
                poller = self._pollers.get(descriptor)
                try:
                    if poller is not None:
                        self._hear(poller)
                    else:
                        self._take_receipt(self._publishers[descriptor])
                except WrongAnswer as error:
                    self.wrong += 1
                    self.complaint = self.complaint or str(error)
                    if self.wrong > len(self._pollers):
                        raise FleetError(f"too many wrong answers, the first one: {self.complaint}") from None
            if time.monotonic_ns() >= until:
                return

    def _connect(self, address: tuple[str, int]) -> socket.socket:
        connection = socket.create_connection(address, PARK_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        connection.setblocking(False)
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        return connection

    def _publish_next(self) -> None:
        while self._waiting and self._idle:
            number, due, request = self._waiting.popleft()
            publisher = self._idle.popleft()
            now = time.monotonic_ns()
            self.ledger.sending(number, self._channels[number % len(self._channels)], due, now)
            publisher.message = number
            publisher.socket.send(request)

    def _hear(self, poller: _Poller) -> None:
        data = poller.part + self._receive(poller.socket)
        now = time.monotonic_ns()
        answer = self._known.get(data)
        if answer is None:
            response = parse_response(data)
            if response is None:
                poller.part = data
                return
            poller.part = b""
            answer = hear(self._dialect, poller.cursor, response)
            if answer.gap is None and len(self._known) < KNOWN_ANSWERS_MAX:
                self._known[data] = answer
        poller.part = b""
        if answer.gap:
            self.ledger.told(poller.number, *answer.gap)
        for payload in answer.payloads:
            self.wrong += not self.ledger.heard(poller.number, int(payload.split(b".", 2)[1]), now)
        poller.cursor = answer.cursor
        poller.ask()

    def _take_receipt(self, publisher: _Publisher) -> None:
        data = publisher.part + self._receive(publisher.socket)
        response = parse_response(data)
        publisher.part = b"" if response else data
        if response is None:
            return
        self._idle.append(publisher)
        self.ledger.acknowledged(publisher.message, published_id(self._dialect, response), time.monotonic_ns())
        self._known.clear()
        self._publish_next()

    @staticmethod
    def _receive(connection: socket.socket) -> bytes:
        data = connection.recv(READ_BYTES)
        if not data:
            raise FleetError("the server closed a connection")
        return data


def measure(bench: Bench) -> tuple[Values, Samples]:
    """`publications_per_s` for `seconds`, open loop."""
    server, parameters = bench.server, bench.parameters
    rate, seconds = parameters["publications_per_s"], parameters["sweeps"]
    server.keep_off_the_disk()
    with OpenLoop(server, parameters["polls"], parameters["channels"]) as clients:
        clients.park()
        deadline = time.monotonic() + PARK_S
        while server.parked() != parameters["polls"]:
            if time.monotonic() > deadline:
                raise FleetError(f"{server.parked()} of {parameters['polls']} polls are parked after {PARK_S:.0f} s")
            clients.listen(time.monotonic_ns() + 50_000_000)
        bench.step()
        begin, cpu = time.monotonic_ns(), time.process_time_ns()
        nodes_before, beside_before = server.ran(), server.ran_beside()
        for number in range(rate * seconds):
            due = begin + number * 1_000_000_000 // rate
            clients.listen(due)
            clients.publish(number, due, parameters["message_bytes"])
            if number % rate == rate - 1:
                bench.step()
        wall = time.monotonic_ns() - begin
        busy = (time.process_time_ns() - cpu) / wall
        end = time.monotonic_ns() + int(DRAIN_S * 1e9)
        while time.monotonic_ns() < end and not (
            clients.ledger.complete and time.monotonic_ns() > begin + wall + 10**9
        ):
            clients.listen(time.monotonic_ns() + 20_000_000)
        nodes = server.ran() - nodes_before
        redis = server.ran_beside()["redis"] - beside_before["redis"]
        verdict = clients.ledger.verdict(time.monotonic_ns())
    latencies = sorted(verdict.latencies)
    if verdict.unacknowledged or verdict.received < verdict.expected:
        raise FleetError(
            f"{verdict.unacknowledged} publications were not acknowledged, and {verdict.expected - verdict.received} "
            f"of {verdict.expected} deliveries are missing"
        )
    values: Values = {
        "latency_mean_ms": fmean(latencies) / 1e6,
        **percentiles_ms("latency", latencies),
        "deliveries_expected": verdict.expected,
        "deliveries_received": verdict.received,
        "messages_lost": verdict.lost,
        "messages_gap": verdict.gaps,
        "messages_repeated": verdict.repeated,
        "messages_disordered": verdict.disordered,
        "answers_wrong": clients.wrong,
        "publications_unacknowledged": verdict.unacknowledged,
        "node_cpu_publication_us": nodes.cpu / (rate * seconds) / 1e3,
        "redis_cpu_publication_us": redis.cpu / (rate * seconds) / 1e3,
        "client_busy": busy,
        "client_lag_ms": percentile(sorted(clients.lags), 99) / 1e6,
    }
    return values, {
        "latency_percentiles_ms": [round(percentile(latencies, percent) / 1e6, 3) for percent in range(101)]
    }


def _ratio(case: str, metric: str) -> Target:
    def value(medians: Medians) -> float | None:
        return medians.ratio(case, metric, NchanRedis.name)

    return Target("p99 of publication due → delivery ≤ 0.5 × that of Nchan over Redis", value, 0.5)


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """The one of this module."""
    parameters: Parameters = {
        "polls": 200 if quick else 1000,
        "channels": 20 if quick else 100,
        "publications_per_s": 100 if quick else 500,
        "message_bytes": 100,
        # Seconds, each of which is a step.
        "sweeps": 2 if quick else 8,
    }
    case = f"{parameters['publications_per_s']} publications/s"
    return (
        comparison(
            "latency-redis",
            f"{parameters['polls']:,} polls of {parameters['channels']} channels at two nodes over Redis, publications "
            "on a schedule: how long from when one was due to each delivery?",
            (Case(case, parameters, measure, (PushUpRedis, NchanRedis, FloorRedis)),),
            (_ratio(case, "latency_p99_ms"),),
            rounds=QUICK_ROUNDS if quick else ROUNDS,
            pinned=False,
        ),
    )
