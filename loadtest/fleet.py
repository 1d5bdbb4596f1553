"""The clients: thousands of keep-alive connections to a server, in one process, on one epoll loop.

Every answer gets the time at which `recv` returned it, and is checked to the last byte before it counts.
"""

import gc
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple, Self

from loadtest.dialects import Dialect, Heard, WrongAnswer, channel_of, parse_response
from loadtest.machine import NEVER_RAN, Ran, ran

Address = tuple[str, int]

CONNECT_BURST: Final = 256
CONNECT_S: Final = 30.0
READ_BYTES: Final = 8192
KNOWN_ANSWERS_MAX: Final = 64
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: close with a reset, so that no port stays behind in TIME_WAIT."""


class FleetError(Exception):
    """The server answered wrongly, too late or not at all. The text says what."""


class Publication(NamedTuple):
    """One request to publish. `payloads`: the messages in it; `polls`: how many polls each must answer."""

    request: bytes
    payloads: tuple[bytes, ...]
    polls: int


@dataclass
class Delivery:
    """What `publish` saw. Times are ns; those of answers count from the sending of their publication.

    `wall`: from the first sending to the last answer of a poll, or of a publication where none polls. `client`: how
    long this process ran meanwhile, `idle` of it spinning.
    """

    wall: int = 0
    idle: int = 0
    client: Ran = NEVER_RAN
    answers: list[int] = field(default_factory=list)
    acknowledgements: list[int] = field(default_factory=list)


class _Poller:
    """One client's connection."""

    __slots__ = ("after", "before", "channels", "cursor", "heard", "parked", "part", "socket")

    def __init__(self, connection: socket.socket, channels: frozenset[str], before: bytes, after: bytes) -> None:
        self.socket = connection
        self.channels = channels
        self.before = before
        self.after = after
        self.cursor = b""
        self.parked = False
        self.part = b""
        self.heard = b""


class _Publisher:
    """One publisher's connection. `sent_at` is None while nothing is outstanding."""

    __slots__ = ("address", "messages", "part", "sent_at", "socket")

    def __init__(self, connection: socket.socket, address: Address) -> None:
        self.socket = connection
        self.address = address
        self.messages = 0
        self.part = b""
        self.sent_at: int | None = None


class Fleet:
    """Connections to one server, open from their making to the end of the `with` block.

    `addresses`: those of its nodes; clients go to each in turn, and so do publishers, to `publish_addresses` if they
    are others. `spin`: never sleep while answers are due; to wake a sleeping client costs the server time that it would
    not spend on a client elsewhere. Raises FleetError for whatever the server does wrong; the fleet is then of no
    further use.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        dialect: Dialect,
        *,
        spin: bool = False,
        publish_addresses: Sequence[Address] = (),
    ) -> None:
        self._addresses = addresses
        self._publish_addresses = publish_addresses or addresses
        self._dialect = dialect
        self._spin = spin
        self._epoll = select.epoll()
        self._pollers: dict[int, _Poller] = {}
        self._publishers: dict[int, _Publisher] = {}
        self._closed: list[_Publisher] = []
        """Publishers whose server wants a new connection for each request."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connections in (self._pollers, self._publishers):
            for connection in connections.values():
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                connection.socket.close()
        self._epoll.close()

    def add_publishers(self, count: int) -> None:
        """Connect so many publishers."""
        addresses = self._publish_addresses
        for number, connection in enumerate(self._connect(count, addresses)):
            publisher = _Publisher(connection, addresses[number % len(addresses)])
            self._publishers[connection.fileno()] = publisher
            if self._dialect.one_shot:
                self._close(publisher)
                self._closed.append(publisher)

    def add_pollers(
        self, subscriptions: Sequence[Sequence[str]], headers: Callable[[int], bytes] = lambda index: b""
    ) -> None:
        """Connect one client per list of channels. `headers`: more lines for the polls of the client of that index."""
        shared: dict[tuple[str, ...], tuple[frozenset[str], bytes, bytes]] = {}
        for index, connection in enumerate(self._connect(len(subscriptions), self._addresses)):
            channels = tuple(subscriptions[index])
            lines = headers(index)
            if lines:
                parts = (frozenset(channels), *self._dialect.poll(channels, lines))
            else:
                parts = shared.get(channels) or (frozenset(channels), *self._dialect.poll(channels, b""))
                shared[channels] = parts
            poller = _Poller(connection, *parts)
            poller.cursor = self._dialect.first_cursor
            self._pollers[connection.fileno()] = poller

    def park(self, most: int = sys.maxsize) -> int:
        """Send the next poll of every client that has none waiting, of so many at most; how many were sent."""
        resting = [poller for poller in self._pollers.values() if not poller.parked][:most]
        for poller in resting:
            self._send(poller.socket, poller.before + poller.cursor + poller.after)
            poller.parked = True
        return len(resting)

    def expect_silence(self) -> None:
        """Raises FleetError if the server has said something that nobody waited for."""
        for descriptor, _ in self._epoll.poll(0):
            holder = self._pollers.get(descriptor) or self._publishers[descriptor]
            raise FleetError(f"an answer before there was a message: {holder.socket.recv(READ_BYTES)[:300]!r}")

    def publish(self, publications: Sequence[Publication], patience_s: float, *, again: bool = False) -> Delivery:
        """Publish in order, one request outstanding per publisher, until every answer is there.

        `again`: a client polls at once after its answer; otherwise it rests until `park`. Raises FleetError after
        `patience_s` seconds.
        """
        delivery = Delivery()
        gc.collect()
        gc.disable()
        cpu, waited = time.process_time_ns(), ran((os.getpid(),)).waited
        try:
            self._publish(publications, patience_s, again, delivery)
        except WrongAnswer as error:
            raise FleetError(str(error)) from None
        except OSError as error:
            raise FleetError(f"a connection broke: {error.strerror}") from None
        finally:
            delivery.client = Ran(time.process_time_ns() - cpu, ran((os.getpid(),)).waited - waited)
            gc.enable()
        return delivery

    def _publish(self, publications: Sequence[Publication], patience_s: float, again: bool, delivery: Delivery) -> None:
        now = time.monotonic_ns
        poll, pollers, publishers = self._epoll.poll, self._pollers, self._publishers
        answered, acknowledged = delivery.answers.append, delivery.acknowledgements.append
        upcoming = iter(publications)
        sent: dict[bytes, int] = {}
        known: dict[bytes, Heard] = {}
        due = sum(publication.polls * len(publication.payloads) for publication in publications) + len(publications)
        wait = 0 if self._spin else 1.0
        begin = last = now()
        deadline = begin + int(patience_s * 1e9)

        def send_next(publisher: _Publisher) -> None:
            publication = next(upcoming, None)
            if publication is None:
                publisher.sent_at = None
                if self._dialect.one_shot:
                    self._closed.append(publisher)
                return
            publisher.messages = len(publication.payloads)
            publisher.sent_at = at = now()
            if publication.polls:
                for payload in publication.payloads:
                    sent[payload] = at
            if self._dialect.one_shot:
                self._open(publisher)
            self._send(publisher.socket, publication.request)

        idle = [*publishers.values(), *self._closed]
        self._closed.clear()
        for publisher in idle:
            send_next(publisher)
        while due:
            asked = now()
            events = poll(wait, 512)
            if not events and self._spin:
                delivery.idle += now() - asked
            if asked > deadline:
                raise FleetError(f"answers still missing after {patience_s:g} s: {due}")
            for descriptor, _ in events:
                poller = pollers.get(descriptor)
                if poller is None:
                    publisher = publishers[descriptor]
                    data = publisher.part + publisher.socket.recv(READ_BYTES)
                    at = now()
                    response = parse_response(data)
                    if response is None:
                        publisher.part = self._unfinished(publisher.part, data)
                        continue
                    publisher.part = b""
                    if publisher.sent_at is None:
                        raise FleetError(f"a publisher was answered without having asked: {data[:300]!r}")
                    self._dialect.check_published(response, publisher.messages)
                    acknowledged(at - publisher.sent_at)
                    if self._dialect.one_shot:
                        self._close(publisher)
                    if not sent:
                        last = at
                    due -= 1
                    send_next(publisher)
                    continue
                data = poller.socket.recv(READ_BYTES)
                last = now()
                if poller.part:
                    data = poller.part + data
                heard = known.get(data)
                if heard is None:
                    response = parse_response(data)
                    if response is None:
                        poller.part = self._unfinished(poller.part, data)
                        continue
                    heard = self._dialect.hear(response)
                    if len(known) < KNOWN_ANSWERS_MAX:
                        known[data] = heard
                poller.part = b""
                payload = heard.payload
                if not poller.parked or payload not in sent or payload == poller.heard:
                    raise FleetError(f"a message nobody is waiting for: {data[:400]!r}")
                if channel_of(payload) not in poller.channels:
                    raise FleetError(f"a message of a channel that was not polled: {data[:400]!r}")
                poller.heard = payload
                poller.cursor = heard.cursor
                answered(last - sent[payload])
                due -= 1
                if again:
                    self._send(poller.socket, poller.before + heard.cursor + poller.after)
                else:
                    poller.parked = False
        delivery.wall = last - begin

    def _close(self, publisher: _Publisher) -> None:
        del self._publishers[publisher.socket.fileno()]
        publisher.socket.close()

    def _open(self, publisher: _Publisher) -> None:
        (publisher.socket,) = self._connect(1, [publisher.address])
        self._publishers[publisher.socket.fileno()] = publisher

    @staticmethod
    def _unfinished(before: bytes, data: bytes) -> bytes:
        if len(before) == len(data):
            raise FleetError("the server closed a connection" + (f" after {data[:300]!r}" if data else ""))
        return data

    @staticmethod
    def _send(connection: socket.socket, data: bytes) -> None:
        try:
            sent = connection.send(data)
        except OSError as error:
            raise FleetError(f"cannot send: {error.strerror}") from None
        if sent != len(data):
            raise FleetError(f"the server does not read: {sent} of {len(data)} bytes could be sent")

    def _connect(self, count: int, addresses: Sequence[Address]) -> Iterable[socket.socket]:
        deadline = time.monotonic() + CONNECT_S
        for first in range(0, count, CONNECT_BURST):
            burst = []
            for number in range(first, min(first + CONNECT_BURST, count)):
                connection = socket.socket()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                burst.append(connection)
                try:
                    connection.settimeout(max(deadline - time.monotonic(), 0.001))
                    connection.connect(addresses[number % len(addresses)])
                except OSError as error:
                    for opened in burst:
                        opened.close()
                    raise FleetError(f"cannot connect: {error}") from None
                connection.setblocking(False)
                self._epoll.register(connection.fileno(), select.EPOLLIN)
            yield from burst
