"""Thousands of PushUp's clients in one process, each no more than a descriptor and some numbers.

They poll one channel each, publish on a schedule, and check every answer: the messages of a channel are numbered, so
that what is missing, comes twice or in the wrong order is seen at once. Publications are due at a time, and latencies
count from it, however late this process was to send them.
"""

import gc
import json
import os
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from loadtest.dialects import PushUpDialect, WrongAnswer, make_payload, parse_response
from loadtest.fleet import RESET_ON_CLOSE, FleetError
from loadtest.machine import wait_for_events

READ_BYTES: Final = 65536
EVENTS: Final = 512
BURST: Final = 256
KNOWN_ANSWERS_MAX: Final = 256
DUES_KEPT: Final = 10_000
"""Of one channel; a message that comes when it is older than so many others counts as wrong."""
IP_BIND_ADDRESS_NO_PORT: Final = 24
"""The kernel finds the port when it connects: the same one may be used for different servers."""

Address = tuple[str, int]
Job = tuple[int, Callable[[], None]]
"""When it is due (time.monotonic_ns) and what to do."""


@dataclass
class Channel:
    """A channel, the number of its last publication, and of its last acknowledged one."""

    name: str
    published: int = 0
    acknowledged: int = 0
    after: int | None = None
    """A cursor for who wants all that comes after the acknowledged one; None for whatever comes from now on."""
    clients: int = 0
    due: dict[int, int] = field(default_factory=dict)
    """When its latest publications were due, ns, by number."""

    def publish(self, due_ns: int) -> int:
        """The number of its next publication."""
        self.published += 1
        self.due[self.published] = due_ns
        self.due.pop(self.published - DUES_KEPT, None)
        return self.published


@dataclass
class Tally:
    """What became of the messages. Times are ns; `lags`: how late this process looked at what was there or due."""

    latencies: "array[int]" = field(default_factory=lambda: array("q"))
    lags: "array[int]" = field(default_factory=lambda: array("q"))
    empty: int = 0
    """Answers without a message: the time was up, or the channel was closed."""
    published: int = 0
    acknowledged: int = 0
    lost: int = 0
    duplicates: int = 0
    gaps: int = 0
    wrong: int = 0
    broken: int = 0
    """Connections that the server ended."""
    complaint: str = ""
    """The first wrong answer."""

    @property
    def bad(self) -> int:
        """All that should not have been."""
        return self.lost + self.duplicates + self.gaps + self.wrong + self.broken


class _Answer(NamedTuple):
    numbers: tuple[int, ...]
    gap: bool
    request: bytes
    """The next poll."""


class _Sent(NamedTuple):
    channel: Channel
    number: int


class Herd:
    """Clients, until the end of the `with` block. `again`: each polls at once after its answer, else at `poll_again`.

    `reset`: connections end with a reset, so that no port stays behind. Raises FleetError if it cannot connect; wrong
    answers are counted.
    """

    def __init__(self, timeout_s: int, *, again: bool = True, reset: bool = True) -> None:
        self.tally = Tally()
        self.unanswered = 0
        """Deliveries that are still to come, to those who are here."""
        self._dialect = PushUpDialect(timeout_s)
        self._again = again
        self._reset = reset
        self._epoll = select.epoll()
        self._channels: dict[int, Channel] = {}
        self._last: dict[int, int] = {}
        self._next: dict[int, bytes] = {}
        self._parts: dict[int, bytes] = {}
        self._known: dict[tuple[str, bytes], _Answer] = {}
        self._publishers: dict[int, _Sent | None] = {}
        self._idle: deque[int] = deque()
        self._waiting: deque[tuple[_Sent, bytes]] = deque()
        self._jobs: Iterator[Job] = iter(())
        self._job: Job | None = None

    def __enter__(self) -> Self:
        # A collection among so many objects takes up to half a second, which would be taken for the server's.
        gc.collect()
        gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        gc.enable()
        for descriptor in (*self._channels, *self._publishers):
            os.close(descriptor)
        self._epoll.close()

    def __len__(self) -> int:
        return len(self._channels)

    def add_publisher(self, address: Address) -> None:
        """Connect one more publisher; they take turns."""
        descriptor = self._connect(address, "")
        self._publishers[descriptor] = None
        self._idle.append(descriptor)

    def add(self, address: Address, channel: Channel, count: int = 1, source: str = "") -> None:
        """Connect so many clients and send their polls, for what comes after the last acknowledged publication."""
        start = self._dialect.first_cursor if channel.after is None else b"%d" % channel.after
        request = self._poll(channel.name, start)
        for _ in range(count):
            descriptor = self._connect(address, source)
            self._channels[descriptor] = channel
            self._last[descriptor] = channel.acknowledged
            self.unanswered += channel.published - channel.acknowledged
            channel.clients += 1
            self._send(descriptor, request)

    def leave(self, count: int) -> None:
        """Those who have been here for the longest go, without a word."""
        for _ in range(min(count, len(self._channels))):
            self._forget(next(iter(self._channels)))

    def poll_again(self) -> None:
        """Send the next poll of every client that has had its answer."""
        for descriptor, request in self._next.items():
            self._send(descriptor, request)
        self._next.clear()

    def expect(self, channel: Channel, due_ns: int) -> None:
        """Somebody else publishes the next message of the channel."""
        channel.publish(due_ns)
        channel.acknowledged = channel.published
        self.unanswered += channel.clients

    def publish(self, channel: Channel, due_ns: int, size: int) -> None:
        """Publish now what was due then; after others, if no publisher is idle."""
        number = channel.publish(due_ns)
        self.tally.published += 1
        self.unanswered += channel.clients
        payload = make_payload(channel.name, number, size)
        self._waiting.append((_Sent(channel, number), self._dialect.publish(channel.name, payload)))
        self._publish_next()

    def plan(self, jobs: Iterable[Job]) -> None:
        """What `run` has to do, in order of time, instead of what was planned before."""
        self._jobs = iter(jobs)
        self._job = next(self._jobs, None)

    def run(self, until_ns: int, *, enough: Callable[[], bool] = lambda: False) -> None:
        """Do each planned job when it is due, and deal with answers, until then or until it is `enough`."""
        now = time.monotonic_ns()
        while now < until_ns and not enough():
            job = self._job
            if job is not None and job[0] <= now:
                self.tally.lags.append(now - job[0])
                job[1]()
                self._job = next(self._jobs, None)
                now = time.monotonic_ns()
                continue
            wake = until_ns if job is None else min(job[0], until_ns)
            events = wait_for_events(self._epoll, wake - now, EVENTS)
            woke = time.monotonic_ns()
            for descriptor, _ in events:
                self._read(descriptor)
            now = time.monotonic_ns()
            if events:
                self.tally.lags.append(now - woke)

    def settle(self) -> None:
        """Count as lost what has not come by now, after all publications."""
        self.tally.lost += self.unanswered
        self.unanswered = 0
        for descriptor, channel in self._channels.items():
            self._last[descriptor] = channel.published

    # Inside

    def _connect(self, address: Address, source: str) -> int:
        connection = socket.socket()
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            if source:
                connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                connection.bind((source, 0))
            connection.connect(address)
            connection.setblocking(False)
            self._epoll.register(connection.fileno(), select.EPOLLIN)
        except OSError as error:
            connection.close()
            raise FleetError(f"cannot connect after {len(self._channels):,} clients: {error}") from None
        return connection.detach()

    def _poll(self, name: str, start: bytes) -> bytes:
        before, after = self._dialect.poll([name], b"")
        return before + start + after

    def _send(self, descriptor: int, data: bytes) -> None:
        try:
            if os.write(descriptor, data) != len(data):
                self._complain(f"the server does not read {len(data)} bytes")
        except OSError as error:
            self._lose(descriptor, f"cannot send: {error.strerror}")

    def _read(self, descriptor: int) -> None:
        # A client may have gone while its answer was among the events.
        channel = self._channels.get(descriptor)
        if channel is None and descriptor not in self._publishers:
            return
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        at = time.monotonic_ns()
        if not data:
            self._lose(descriptor, "the server closed a connection")
            return
        if self._parts:
            data = self._parts.pop(descriptor, b"") + data
        if channel is None:
            self._take_receipt(descriptor, data)
            return
        answer = self._known.get((channel.name, data))
        if answer is None:
            try:
                answer = self._understand(channel, data)
            except (WrongAnswer, ValueError, KeyError, TypeError) as error:
                self._complain(str(error))
                self._forget(descriptor)
                return
            if answer is None:
                self._parts[descriptor] = data
                return
        self._count(descriptor, channel, answer, at)
        if self._again:
            self._send(descriptor, answer.request)
        else:
            self._next[descriptor] = answer.request

    def _count(self, descriptor: int, channel: Channel, answer: _Answer, at: int) -> None:
        tally, last = self.tally, self._last[descriptor]
        if answer.gap:
            tally.gaps += 1
        if not answer.numbers:
            tally.empty += 1
        for number in answer.numbers:
            if number <= last:
                tally.duplicates += 1
                continue
            tally.lost += number - last - 1
            self.unanswered -= number - last
            last = number
            tally.latencies.append(at - channel.due[number])
        self._last[descriptor] = last

    def _understand(self, channel: Channel, data: bytes) -> _Answer | None:
        response = parse_response(data)
        if response is None:
            return None
        if response.status != 200:
            raise WrongAnswer(f"a poll was answered {response.status}: {response.body[:200]!r}")
        said = json.loads(response.body)
        numbers = tuple(self._number(channel, message["data"]) for message in said["messages"])
        answer = _Answer(numbers, said["gap"], self._poll(channel.name, b"%d" % said["next"]))
        if len(self._known) >= KNOWN_ANSWERS_MAX:
            self._known.clear()
        self._known[channel.name, data] = answer
        return answer

    @staticmethod
    def _number(channel: Channel, text: str) -> int:
        number = int(text.split(".", 2)[1])
        if text.encode() != make_payload(channel.name, number, len(text)) or number not in channel.due:
            raise WrongAnswer(f"not a message that was published to {channel.name}: {text[:100]!r}")
        return number

    def _take_receipt(self, descriptor: int, data: bytes) -> None:
        try:
            response = parse_response(data)
            if response is None:
                self._parts[descriptor] = data
                return
            self._dialect.check_published(response, 1)
            stored = int(json.loads(response.body)["id"])
        except (WrongAnswer, ValueError, KeyError, TypeError) as error:
            self._complain(str(error))
        else:
            self.tally.acknowledged += 1
            sent = self._publishers[descriptor]
            if sent is not None and sent.number > sent.channel.acknowledged:
                sent.channel.acknowledged, sent.channel.after = sent.number, stored + 1
        self._publishers[descriptor] = None
        self._idle.append(descriptor)
        self._publish_next()

    def _publish_next(self) -> None:
        while self._waiting and self._idle:
            sent, request = self._waiting.popleft()
            descriptor = self._idle.popleft()
            self._publishers[descriptor] = sent
            self._send(descriptor, request)

    def _complain(self, text: str) -> None:
        self.tally.wrong += 1
        self.tally.complaint = self.tally.complaint or text

    def _lose(self, descriptor: int, text: str) -> None:
        self.tally.broken += 1
        self.tally.complaint = self.tally.complaint or text
        self._forget(descriptor)

    def _forget(self, descriptor: int) -> None:
        if channel := self._channels.get(descriptor):
            channel.clients -= 1
            self.unanswered -= channel.published - self._last[descriptor]
        for known in (self._channels, self._last, self._next, self._parts, self._publishers):
            known.pop(descriptor, None)
        os.close(descriptor)
