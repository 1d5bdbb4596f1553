"""Everybody comes back at once: clients whose node was killed ask the other one for all that they missed.

Every client parks on the first of two nodes over Redis and hears a message, so it has a cursor. Then more are
published; some clients still hear one, two or three of them, so cursors differ. The first node is killed, every client
connects to the second (not counted), some more messages are published through that, and then all ask at once.
"""

import gc
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Final

from cluster.stores import ask
from loadtest.answers import hear, number_of, without_boundary
from loadtest.charts import Chart
from loadtest.dialects import Dialect, WrongAnswer, channel_of, make_payload, parse_response
from loadtest.fleet import CONNECT_S, RESET_ON_CLOSE, FleetError
from loadtest.machine import ran
from loadtest.results import Medians, Result, Target, Values, percentile, percentiles_ms
from loadtest.scenario import Bench, Case, Parameters, Samples, Scenario, comparison
from loadtest.servers import Address, NchanRedis, PushUpRedis, Server, ServerError
from loadtest.variants import NchanMultipart

ROUNDS: Final = 5
GROUPS: Final = 4
"""Clients of group g have heard the first message and g more before their node is killed."""

PATIENCE_S: Final = 60.0
PARK_S: Final = 30.0
PUBLISHERS: Final = 20
PUBLISH_S: Final = 10.0
READ_BYTES: Final = 16384
KNOWN_ANSWERS_MAX: Final = 8192
SECONDS_A_TRIAL: Final = 5.0
SECONDS_A_QUICK_TRIAL: Final = 2.5

SPARE_CALLS: Final = 5
"""Calls that do not grow with channels or clients: those that prove each second that the connection holds."""

CALLS: Final = ("fcall", "fcall_ro", "eval", "eval_ro", "evalsha", "evalsha_ro", "subscribe", "ssubscribe")
"""What nodes ask of Redis: what else is counted is done inside of scripts."""

OURS: Final = ("info", "client", "hello", "ping")
"""What this scenario asks itself, and what says nothing."""


@dataclass(frozen=True)
class _Heard:
    """An answer to a poll of that channel: the messages from the first to the last."""

    channel: str
    first: int
    last: int
    cursor: bytes


class _Client:
    __slots__ = ("after", "before", "channel", "cursor", "group", "heard", "part", "polls", "socket", "wanted")

    def __init__(self, channel: str, group: int, before: bytes, after: bytes, cursor: bytes) -> None:
        self.channel = channel
        self.group = group
        self.before = before
        self.after = after
        self.cursor = cursor
        self.heard = -1
        self.wanted = -1
        self.polls = 0
        self.part = b""
        self.socket: socket.socket | None = None


@dataclass
class Listening:
    """What `Clients.listen` saw. `caught_up`: from the first poll of a client being sent to its last message, ns.

    `turns`: how long each turn of the loop took, and so how late the last answer of the turn may have been seen.
    """

    wall: int = 0
    cpu: int = 0
    polls: int = 0
    caught_up: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)


class Clients:
    """Keep-alive connections to one node at a time, in one process on one epoll loop.

    A channel's messages are numbered from 0 on. Whatever comes out of order, twice or not at all raises FleetError.
    """

    def __init__(self, dialect: Dialect, count: int, channels: Sequence[str]) -> None:
        self._dialect = dialect
        self._epoll = select.epoll()
        self._by_descriptor: dict[int, _Client] = {}
        self._known: dict[bytes, _Heard] = {}
        polls = {channel: dialect.poll([channel], b"") for channel in channels}
        owners = [channels[index % len(channels)] for index in range(count)]
        self.all = [
            _Client(owner, index // len(channels) % GROUPS, *polls[owner], dialect.first_cursor)
            for index, owner in enumerate(owners)
        ]

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *about: object) -> None:
        self.disconnect()
        self._epoll.close()

    def connect(self, address: Address) -> None:
        """Connect all of them."""
        deadline = time.monotonic() + CONNECT_S
        for client in self.all:
            connection = socket.socket()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            client.socket = connection
            try:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                connection.connect(address)
            except OSError as error:
                raise FleetError(f"cannot connect: {error}") from None
            connection.setblocking(False)
            self._by_descriptor[connection.fileno()] = client
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def disconnect(self) -> None:
        """Close all connections."""
        self._by_descriptor.clear()
        for client in self.all:
            if client.socket is not None:
                client.socket.close()
                client.socket = None
                client.part = b""

    def park(self) -> None:
        """Send a poll of each."""
        for client in self.all:
            self._poll(client)

    def hear(self, until: int, patience_s: float) -> None:
        """Wait until each has heard the message of that number. All must have a poll waiting."""
        self._listen(self.all, until, patience_s, Listening())

    def ask(self, clients: Sequence[_Client], until: int, patience_s: float) -> None:
        """Let these clients poll until each has heard the message of that number."""
        self._listen(clients, until, patience_s, Listening(), ask=True)

    def catch_up(self, until: int, patience_s: float) -> Listening:
        """Let all poll at once, and on and on, until each has heard the message of that number; what that took."""
        seen = Listening()
        gc.collect()
        gc.disable()
        cpu = time.process_time_ns()
        try:
            for client in self.all:
                client.polls = 0
            self._listen(self.all, until, patience_s, seen, ask=True)
        finally:
            seen.cpu = time.process_time_ns() - cpu
            gc.enable()
        seen.polls = sum(client.polls for client in self.all)
        return seen

    def _listen(
        self, clients: Sequence[_Client], until: int, patience_s: float, seen: Listening, *, ask: bool = False
    ) -> None:
        now = time.monotonic_ns
        begin = last = now()
        deadline = begin + int(patience_s * 1e9)
        sent: dict[_Client, int] = {}
        for client in clients:
            sent[client] = now()
            if ask:
                self._poll(client)
        missing = len(clients)
        while missing:
            events = self._epoll.poll(1.0, 512)
            woken = now()
            if woken > deadline:
                raise FleetError(f"{missing} clients have not caught up after {patience_s:g} s")
            for descriptor, _ in events:
                client = self._by_descriptor[descriptor]
                if not self._read(client):
                    continue
                if client.heard < until:
                    self._poll(client)
                    continue
                last = now()
                seen.caught_up.append(last - sent[client])
                missing -= 1
            seen.turns.append(now() - woken)
        seen.wall = last - begin

    def _poll(self, client: _Client) -> None:
        assert client.socket is not None
        client.polls += 1
        data = client.before + client.cursor + client.after
        try:
            if client.socket.send(data) != len(data):
                raise FleetError("the server does not read")
        except OSError as error:
            raise FleetError(f"cannot send: {error.strerror}") from None

    def _read(self, client: _Client) -> bool:
        """Take what came; whether that completes an answer."""
        assert client.socket is not None
        try:
            data = client.socket.recv(READ_BYTES)
        except OSError as error:
            raise FleetError(f"a connection broke: {error.strerror}") from None
        if not data:
            raise FleetError("the server closed a connection")
        if client.part:
            data = client.part + data
        heard = self._known.get(data)
        if heard is None:
            alike = without_boundary(data)
            heard = self._known.get(alike) or self._parse(client, alike)
            if heard is None:
                client.part = data
                return False
            if len(self._known) < KNOWN_ANSWERS_MAX:
                self._known[alike] = heard
        if heard.channel != client.channel or heard.first != client.heard + 1:
            raise FleetError(
                f"message {heard.first} of {heard.channel} after {client.heard} of {client.channel}: {data[:300]!r}"
            )
        client.part = b""
        client.heard = heard.last
        client.cursor = heard.cursor
        return True

    def _parse(self, client: _Client, data: bytes) -> _Heard | None:
        try:
            response = parse_response(data)
            if response is None:
                return None
            answer = hear(self._dialect, client.cursor, response)
            numbers = [number_of(payload) for payload in answer.payloads]
        except WrongAnswer as error:
            raise FleetError(str(error)) from None
        channels = {channel_of(payload) for payload in answer.payloads}
        if answer.gap or len(channels) != 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise FleetError(f"not messages of one channel in order, without a gap: {data[:400]!r}")
        return _Heard(channels.pop(), numbers[0], numbers[-1], answer.cursor)


class Publishers:
    """Publish a message to each channel, through one node, over a few connections."""

    def __init__(self, dialect: Dialect, channels: Sequence[str], message_bytes: int) -> None:
        self._dialect = dialect
        self._channels = channels
        self._message_bytes = message_bytes

    def publish(self, address: Address, numbers: Sequence[int], after_each: Callable[[int], None]) -> None:
        """Messages of these numbers, one after the other; all channels have each when `after_each` is called."""
        sockets = [socket.create_connection(address, PUBLISH_S) for _ in range(min(PUBLISHERS, len(self._channels)))]
        try:
            for number in numbers:
                for first in range(0, len(self._channels), len(sockets)):
                    channels = self._channels[first : first + len(sockets)]
                    for connection, channel in zip(sockets, channels, strict=False):
                        payload = make_payload(channel, number, self._message_bytes)
                        connection.sendall(self._dialect.publish(channel, payload))
                    for connection, _ in zip(sockets, channels, strict=False):
                        self._await_answer(connection)
                after_each(number)
        except (OSError, WrongAnswer) as error:
            raise FleetError(f"cannot publish: {error}") from None
        finally:
            for connection in sockets:
                connection.close()

    def _await_answer(self, connection: socket.socket) -> None:
        data = b""
        while (response := parse_response(data)) is None:
            more = connection.recv(READ_BYTES)
            if not more:
                raise FleetError("the server closed a publisher's connection")
            data += more
        self._dialect.check_published(response, 1)


def measure_catch_up(bench: Bench) -> tuple[Values, Samples]:
    """One trial."""
    server, parameters = bench.server, bench.parameters
    channels = [f"c{index}" for index in range(parameters["channels"])]
    before, meanwhile = parameters["messages_before"], parameters["messages_meanwhile"]
    first, second = server.addresses
    publishers = Publishers(server.dialect, channels, parameters["message_bytes"])
    with Clients(server.dialect, parameters["clients"], channels) as clients:
        clients.connect(first)
        clients.park()
        _await_parked(server, len(clients.all))
        publishers.publish(first, [0], lambda number: clients.hear(number, PATIENCE_S))

        def hear_some(number: int) -> None:
            clients.ask([client for client in clients.all if client.group >= number], number, PATIENCE_S)

        publishers.publish(first, range(1, before), hear_some)
        bench.step()
        server.kill_node(0)
        clients.disconnect()
        clients.connect(second)
        last = before + meanwhile - 1
        publishers.publish(second, range(before, last + 1), lambda number: None)
        bench.step()
        start, redis_start = server.settle(), ran(server.redis_pids)
        asked = _commands(server)
        seen = clients.catch_up(last, PATIENCE_S)
        answering = server.ran() - start
        commands = {name: calls - asked.get(name, 0) for name, calls in _commands(server).items()}
        used, redis_used = server.settle() - start, ran(server.redis_pids) - redis_start
    values: Values = {
        "catch_up_cpu_ms": used.cpu / 1e6,
        "catch_up_redis_cpu_ms": redis_used.cpu / 1e6,
        "server_busy": answering.cpu / seen.wall,
        "waited": answering.waited / seen.wall,
        **_of_clients(seen),
        **_of_redis(commands, parameters),
    }
    samples: Samples = {
        "caught_up_percentiles_ms": _percentiles_ms(seen.caught_up),
        **{f"redis_{name}": [float(calls)] for name, calls in commands.items() if calls},
    }
    return values, samples


def _of_clients(seen: Listening) -> Values:
    times = sorted(seen.caught_up)
    return {
        "catch_up_ms": seen.wall / 1e6,
        "catch_up_polls_per_client": seen.polls / len(times),
        "caught_up_mean_ms": fmean(times) / 1e6,
        **percentiles_ms("caught_up", times),
        "client_busy": seen.cpu / seen.wall,
        "client_lag_ms": percentile(sorted(seen.turns), 99) / 1e6,
    }


def _percentiles_ms(times: Sequence[int]) -> list[float]:
    ordered = sorted(times)
    return [round(percentile(ordered, percent) / 1e6, 3) for percent in range(101)]


def _of_redis(commands: Mapping[str, int], parameters: Parameters) -> Values:
    calls = sum(commands.get(name, 0) for name in CALLS)
    return {
        "redis_calls": calls,
        "redis_calls_per_channel": calls / parameters["channels"],
        "redis_calls_per_client": calls / parameters["clients"],
        "redis_commands_per_channel": sum(commands.values()) / parameters["channels"],
    }


def _commands(server: Server) -> Mapping[str, int]:
    """How often Redis has done each command so far, by its name, but for those that only this scenario asks."""
    host, port = server.redis_address
    facts = ask(f"{host}:{port}", "INFO", "commandstats")
    if not isinstance(facts, dict):
        raise ServerError("Redis does not say what it has done")
    calls = {name.removeprefix("cmdstat_"): int(fact["calls"]) for name, fact in facts.items()}
    return {name: number for name, number in calls.items() if name.partition("|")[0] not in OURS}


def _await_parked(server: Server, count: int) -> None:
    deadline = time.monotonic() + PARK_S
    while (parked := server.parked()) != count:
        if time.monotonic() > deadline:
            raise FleetError(f"{parked} of {count} polls are parked after {PARK_S:.0f} s")
        time.sleep(0.05)


# The catalogue


def _ratio(case: str, metric: str, peer: type[Server]) -> Callable[[Medians], float | None]:
    return lambda medians: medians.quotient(case, metric, PushUpRedis.name, peer.name)


def _median(case: str, metric: str) -> Callable[[Medians], float | None]:
    return lambda medians: medians.of(case, metric, PushUpRedis.name)


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """In the order to run them. `quick`: fewer clients and rounds."""
    rounds = 1 if quick else ROUNDS
    shared = {
        "clients": 1000 if quick else 10_000,
        "messages_before": 21,
        "messages_meanwhile": 5,
        "message_bytes": 100,
        "sweeps": 2,
    }
    kinds = (PushUpRedis, NchanRedis) if quick else (PushUpRedis, NchanRedis, NchanMultipart)
    cases = {"one channel": 1, "100 channels": 100}
    targets = []
    for name, channels in cases.items():
        targets += [
            Target(f"{name}: time ≤ 0.5 × Nchan's over Redis", _ratio(name, "catch_up_ms", NchanRedis), 0.5),
            Target(
                f"{name}: time ≤ that of Nchan with multipart answers", _ratio(name, "catch_up_ms", NchanMultipart), 1
            ),
            Target(
                f"{name}: PushUp's calls to Redis ≤ one per channel and {SPARE_CALLS}",
                _median(name, "redis_calls"),
                channels + SPARE_CALLS,
            ),
        ]
    scenario = comparison(
        "catch-up",
        f"{shared['clients']:,} clients of a node that was killed come back to another at once: how long, and at what "
        "cost, until each has all that it missed?",
        [Case(name, {**shared, "channels": channels}, measure_catch_up, kinds) for name, channels in cases.items()],
        targets,
        rounds=rounds,
    )
    seconds = rounds * len(cases) * len(kinds) * (SECONDS_A_QUICK_TRIAL if quick else SECONDS_A_TRIAL)
    return (replace(scenario, seconds=seconds, show=show),)


# The report

_EXPLANATION: Final = """\
Clients have heard the first message and none to three of the other 20 when their node is killed; five more come before
they are back, over connections that are already there. A client has caught up when it has every message, in order: with
one poll where an answer holds what there is, as PushUp's do; with some 24 where it holds one message, as Nchan's do by
default (with `nchan_longpoll_multipart_response` they hold all, so that is measured, too). Then the many polls, and the
client's work for them, are part of the time; the node's CPU tells both from the client's. Calls to Redis are what the
node asks for (functions, scripts, subscriptions), counted by Redis (`INFO commandstats`); commands count what is done
inside of functions and scripts as well. Clients and Redis share a core, the node has the other."""


def show(result: Result) -> Sequence[str | Chart]:
    """How to read it, and how many have caught up over time."""
    charts = []
    for number, case in enumerate(dict.fromkeys(one.case for one in result.measurements if not one.failure), 1):
        lines: dict[str, list[tuple[float, float]]] = {}
        for one in result.measurements:
            # One round, the first, is shown: the curves of several cannot be averaged.
            if one.case == case and not one.failure and one.server not in lines:
                times = one.samples["caught_up_percentiles_ms"]
                lines[one.server] = [(time, float(percent)) for percent, time in enumerate(times)]
        charts.append(
            Chart(
                name=f"catch-up-{number}",
                title=f"Clients that have caught up: {case}",
                x="time since their first poll, ms",
                y="clients, %",
                lines=lines,
                log="x",
            )
        )
    return [_EXPLANATION, *charts]
