"""Good clients while others misbehave: they poll on and on, and a publisher that keeps its pace whatever happens.

The publisher is an open loop: publications have a time at which they should be sent, and the lag of a delivery counts
from there, so a server that stalls cannot hide its delay. Every answer is compared with what the channel's other
clients heard: each message once, in order, none left out.
"""

import gc
import json
import select
import socket
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple, Self

from loadtest.dialects import PushUpDialect, WrongAnswer, make_payload, parse_response
from loadtest.fleet import RESET_ON_CLOSE, FleetError
from loadtest.machine import wait_for_events

CONNECT_S: Final = 10.0
RECONNECT_S: Final = 1.0
TICK_NS: Final = 1_000_000_000
READ_BYTES: Final = 65536
KNOWN_ANSWERS_MAX: Final = 256
EXAMPLES_MAX: Final = 10
POLL_TIMEOUT_S: Final = 25
FIRST_CURSOR: Final = b"0"


class _Heard(NamedTuple):
    """A poll's answer: ids and data of its messages."""

    messages: tuple[tuple[int, str], ...]
    next: bytes
    gap: bool


@dataclass
class Phase:
    """What belongs to one stretch of time. Publications belong to the phase in which they should have been sent.

    `lags`: of each delivery; `delays`: how late each publication was sent, by this process or for want of an answer to
    an earlier one. ns.
    """

    name: str
    begin: int = 0
    end: int = 0
    lags: "array[int]" = field(default_factory=lambda: array("q"))
    delays: "array[int]" = field(default_factory=lambda: array("q"))
    client_cpu: int = 0


@dataclass
class Losses:
    """Everything that must not happen to good clients. Counted per client, `refused` and `unacknowledged` once each.

    `lost` includes messages that were acknowledged and that no client heard.
    """

    lost: int = 0
    repeated: int = 0
    disordered: int = 0
    gaps: int = 0
    wrong: int = 0
    cut: int = 0
    refused: int = 0
    unacknowledged: int = 0

    @property
    def none(self) -> bool:
        """Whether nothing happened."""
        return not any(vars(self).values())


class _Publication(NamedTuple):
    intended: int
    phase: Phase
    channel: int
    request: bytes


class _Poller:
    __slots__ = ("after", "before", "channel", "cursor", "part", "place", "socket", "source")

    def __init__(self, channel: int, source: str, before: bytes, after: bytes) -> None:
        self.channel = channel
        self.source = source
        self.before = before
        self.after = after
        self.cursor = FIRST_CURSOR
        self.place = 0
        """How many of the channel's messages it has heard."""
        self.part = b""
        self.socket: socket.socket | None = None


class _Publisher:
    __slots__ = ("part", "publication", "socket", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self.part = b""
        self.publication: _Publication | None = None
        self.socket: socket.socket | None = None


class Audience:
    """Pollers, evenly over the channels, and the publisher, which takes the channels in turn.

    Each source address has at most `per_source` connections. Broken connections are made again, and counted.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        pollers: int,
        channels: int,
        per_second: int,
        message_bytes: int,
        publishers: int,
        sources: Sequence[str],
        per_source: int,
    ) -> None:
        self._address = address
        self._interval = 1_000_000_000 // per_second
        self._message_bytes = message_bytes
        self._dialect = PushUpDialect(POLL_TIMEOUT_S)
        self._channels = [f"good{index}" for index in range(channels)]
        self._epoll = select.epoll()
        self._holders: dict[int, _Poller | _Publisher] = {}
        polls = [self._dialect.poll([channel], b"") for channel in self._channels]
        self._pollers = [
            _Poller(index % channels, sources[index // per_source], *polls[index % channels])
            for index in range(pollers)
        ]
        self._publishers = [_Publisher(sources[(pollers + index) // per_source]) for index in range(publishers)]
        self._everybody: list[_Poller | _Publisher] = [*self._pollers, *self._publishers]
        self._idle: deque[_Publisher] = deque()
        self._waiting: deque[_Publication] = deque()
        self._broken: list[_Poller | _Publisher] = []
        self._sent: dict[str, _Publication] = {}
        self._logs: list[list[int]] = [[] for _ in range(channels)]
        """The ids of each channel, in the order in which they were first heard."""
        self._acknowledged: list[set[int]] = [set() for _ in range(channels)]
        self._known: dict[bytes, _Heard] = {}
        self._number = 0
        self._due = 0
        self._ticked = 0
        self.losses = Losses()
        self.examples: list[str] = []
        """The first few things that went wrong, in words."""

    def __enter__(self) -> Self:
        for holder in self._everybody:
            if not self._connect(holder, CONNECT_S):
                raise FleetError("good clients cannot connect")
        for poller in self._pollers:
            self._poll(poller)
        self._idle.extend(self._publishers)
        self._due = self._ticked = time.monotonic_ns()
        gc.collect()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.enable()
        for holder in self._everybody:
            self._drop(holder)
        self._epoll.close()

    def run(self, phase: Phase, seconds: float, tick: Callable[[], bool]) -> None:
        """Publish and poll for so long, or until `tick`, called once a second, says that it is enough."""
        cpu = time.process_time_ns()
        phase.begin = time.monotonic_ns()
        end = phase.begin + int(seconds * 1e9)
        self._due = max(self._due, phase.begin)
        while True:
            now = time.monotonic_ns()
            if now >= end:
                break
            if now >= self._ticked + TICK_NS:
                self._ticked = now
                self._reconnect()
                if tick():
                    break
            self._turn(phase, min(end, self._due, self._ticked + TICK_NS))
        phase.end = time.monotonic_ns()
        phase.client_cpu += time.process_time_ns() - cpu

    def finish(self, patience_s: float) -> None:
        """Publish no more, wait until all is heard, and count what was not."""
        deadline = time.monotonic_ns() + int(patience_s * 1e9)
        while time.monotonic_ns() < deadline and not self._complete():
            self._reconnect()
            self._turn(None, time.monotonic_ns() + 100_000_000)
        self.losses.unacknowledged += len(self._waiting)
        self.losses.unacknowledged += sum(publisher.publication is not None for publisher in self._publishers)
        for poller in self._pollers:
            self._lose(len(self._logs[poller.channel]) - poller.place, "not heard in the end")
        audience = [0] * len(self._channels)
        for poller in self._pollers:
            audience[poller.channel] += 1
        for channel, ids in enumerate(self._acknowledged):
            self._lose(len(ids.difference(self._logs[channel])) * audience[channel], "acknowledged and heard by nobody")

    @property
    def published(self) -> int:
        """How many publications were acknowledged so far."""
        return sum(len(ids) for ids in self._acknowledged)

    def _complete(self) -> bool:
        return (
            len(self._idle) == len(self._publishers)
            and not self._waiting
            and all(poller.place == len(self._logs[poller.channel]) for poller in self._pollers)
        )

    def _turn(self, phase: Phase | None, until: int) -> None:
        now = time.monotonic_ns()
        for descriptor, _ in wait_for_events(self._epoll, until - now, 512):
            holder = self._holders.get(descriptor)
            if holder is None:
                continue
            try:
                if isinstance(holder, _Poller):
                    self._hear(holder)
                else:
                    self._acknowledge(holder)
            except (OSError, WrongAnswer) as error:
                self._break(holder, str(error))
            if phase is not None and time.monotonic_ns() >= self._due:
                self._publish(phase)
        if phase is not None and time.monotonic_ns() >= self._due:
            self._publish(phase)

    # Publishing

    def _publish(self, phase: Phase) -> None:
        now = time.monotonic_ns()
        while self._due <= now:
            channel = self._number % len(self._channels)
            payload = make_payload(self._channels[channel], self._number, self._message_bytes)
            self._number += 1
            publication = _Publication(
                self._due, phase, channel, self._dialect.publish(self._channels[channel], payload)
            )
            self._sent[payload.decode()] = publication
            self._waiting.append(publication)
            self._due += self._interval
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting and self._idle:
            publisher, publication = self._idle.popleft(), self._waiting.popleft()
            publication.phase.delays.append(time.monotonic_ns() - publication.intended)
            publisher.publication = publication
            assert publisher.socket is not None
            try:
                publisher.socket.send(publication.request)
            except OSError as error:
                self._break(publisher, str(error))

    def _acknowledge(self, publisher: _Publisher) -> None:
        assert publisher.socket is not None
        data = publisher.socket.recv(READ_BYTES)
        if not data:
            raise WrongAnswer("the server closed a publisher's connection")
        response = parse_response(publisher.part + data)
        if response is None:
            publisher.part += data
            return
        publisher.part = b""
        publication, publisher.publication = publisher.publication, None
        if publication is None:
            raise WrongAnswer(f"a publisher was answered without having asked: {data[:300]!r}")
        if response.status == 201:
            self._acknowledged[publication.channel].add(json.loads(response.body)["id"])
        else:
            self.losses.refused += 1
            self._note(f"a publication was answered {response.status}: {response.body[:200]!r}")
        self._idle.append(publisher)
        self._send_waiting()

    # Polling

    def _poll(self, poller: _Poller) -> None:
        assert poller.socket is not None
        poller.socket.send(poller.before + poller.cursor + poller.after)

    def _hear(self, poller: _Poller) -> None:
        assert poller.socket is not None
        data = poller.socket.recv(READ_BYTES)
        now = time.monotonic_ns()
        if not data:
            raise WrongAnswer("the server closed a poller's connection")
        if poller.part:
            data = poller.part + data
        heard = self._known.get(data)
        if heard is None:
            response = parse_response(data)
            if response is None:
                poller.part = data
                return
            heard = _parse(response.status, response.body)
            if len(self._known) >= KNOWN_ANSWERS_MAX:
                self._known.clear()
            self._known[data] = heard
        poller.part = b""
        if heard.gap:
            self.losses.gaps += 1
            self._note(f"a gap on {self._channels[poller.channel]}")
        for id, payload in heard.messages:
            publication = self._sent.get(payload)
            if publication is None or publication.channel != poller.channel:
                self.losses.wrong += 1
                self._note(f"a message that was not published to this channel: {payload[:100]}")
                continue
            if self._check(poller, id):
                publication.phase.lags.append(now - publication.intended)
        poller.cursor = heard.next
        self._poll(poller)

    def _check(self, poller: _Poller, id: int) -> bool:
        """Whether the message is new to the client; counts what it should have heard before."""
        log = self._logs[poller.channel]
        place = poller.place
        if place == len(log) and (not log or id > log[-1]):
            log.append(id)
        elif place == len(log) or log[place] != id:
            found = bisect_left(log, id)
            if found == len(log):
                log.append(id)
            elif log[found] != id:
                self.losses.disordered += 1
                self._note(f"message {id} came after later ones")
                return False
            if found < place:
                self.losses.repeated += 1
                self._note(f"message {id} came twice")
                return False
            self._lose(found - place, f"passed over, up to {id}")
            place = found
        poller.place = place + 1
        return True

    def _lose(self, messages: int, how: str) -> None:
        if messages:
            self.losses.lost += messages
            self._note(f"{messages} messages {how}")

    # Connections

    def _connect(self, holder: _Poller | _Publisher, patience_s: float) -> bool:
        connection = socket.socket()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        connection.settimeout(patience_s)
        try:
            connection.bind((holder.source, 0))
            connection.connect(self._address)
        except OSError as error:
            connection.close()
            self._note(f"cannot connect: {error}")
            return False
        connection.setblocking(False)
        holder.socket = connection
        self._holders[connection.fileno()] = holder
        self._epoll.register(connection.fileno(), select.EPOLLIN)
        return True

    def _break(self, holder: _Poller | _Publisher, reason: str) -> None:
        self.losses.cut += 1
        self._note(f"a good client's connection ended: {reason}")
        if isinstance(holder, _Publisher) and holder.publication is not None:
            self.losses.unacknowledged += 1
            holder.publication = None
        elif isinstance(holder, _Publisher):
            self._idle.remove(holder)
        self._drop(holder)
        self._broken.append(holder)

    def _drop(self, holder: _Poller | _Publisher) -> None:
        holder.part = b""
        if holder.socket is not None:
            del self._holders[holder.socket.fileno()]
            holder.socket.close()
            holder.socket = None

    def _reconnect(self) -> None:
        broken, self._broken = self._broken, []
        for holder in broken:
            if not self._connect(holder, RECONNECT_S):
                self._broken.append(holder)
            elif isinstance(holder, _Publisher):
                self._idle.append(holder)
            else:
                try:
                    self._poll(holder)
                except OSError as error:
                    self._break(holder, str(error))

    def _note(self, text: str) -> None:
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(text)


def _parse(status: int, body: bytes) -> _Heard:
    if status != 200:
        raise WrongAnswer(f"a poll was answered {status}: {body[:200]!r}")
    answer = json.loads(body)
    messages = tuple((message["id"], message["data"]) for message in answer["messages"])
    return _Heard(messages, b"%d" % answer["next"], answer["gap"])
