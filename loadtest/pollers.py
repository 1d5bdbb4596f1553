"""Clients of long polling and of pulling, in groups, on one epoll loop, with publications in an open loop.

Every client has one connection, which it keeps, and its own cursor. Publications are sent when they are due, over
connections of their own, whatever became of those before. What a client received counts from the kernel's time stamp
of the segment (SO_TIMESTAMPNS), so how long this process takes to look at thousands of answers is in no trip time.
"""

import gc
import heapq
import select
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Final, NamedTuple, Self

import msgspec

from loadtest.dialects import PushUpDialect, WrongAnswer, make_payload, parse_response
from loadtest.fleet import CONNECT_BURST, RESET_ON_CLOSE
from loadtest.machine import wait_for_events
from loadtest.measures import NO_TRAFFIC, Traffic, read_traffic

READ_BYTES: Final = 8192
KNOWN_ANSWERS_MAX: Final = 64
FIRST_CURSOR: Final = b"0"
"""Everything that is kept: the channels are new, so nothing is passed over before the first poll arrives."""
SPIN_NS: Final = 2_000_000
"""So long before a publication is due the loop no longer sleeps, as it would oversleep by up to a millisecond."""
SLEEP_NS_MAX: Final = 200_000_000
TICK_NS: Final = 1_000_000_000

# Not in Python's socket module. The control message has the same number, and a struct timespec.
SO_TIMESTAMPNS: Final = 35
_TIMESPEC: Final = struct.Struct("qq")
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_TIMESPEC.size)


class PollersError(Exception):
    """The clients cannot begin. The text says why."""


@dataclass(frozen=True)
class Group:
    """Clients of one server and one channel, and when something is published there.

    `hold_s`: how long a poll may wait; with 0 clients pull, each every `pull_s` seconds. `due`: seconds after the
    beginning of each publication.
    """

    address: tuple[str, int]
    channel: str
    clients: int
    hold_s: int
    pull_s: float
    due: Sequence[float]
    message_bytes: int


@dataclass
class Tally:
    """What became of a group's messages.

    `trips`: ns from when a publication was due to each receipt in time. `late`: received after the end. `repeated`,
    `disordered`, `gaps`: messages heard again or in the wrong order, answers that say gap; none of them counts as
    received. `faults`: connections that broke and answers that were wrong, by what they were; such a client polls no
    more. `skipped`: pulls that were due while the one before had no answer.
    """

    trips: list[int] = field(default_factory=list)
    late: int = 0
    repeated: int = 0
    disordered: int = 0
    gaps: int = 0
    skipped: int = 0
    acknowledged: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    traffic: Traffic = NO_TRAFFIC

    @property
    def received(self) -> int:
        """Messages received, late ones too."""
        return len(self.trips) + self.late


class Answer(NamedTuple):
    """What a poll's answer says: the numbers of its messages, all of one channel ("" if there are none)."""

    channel: str
    numbers: tuple[int, ...]
    cursor: int
    gap: bool


class _Message(msgspec.Struct):
    id: int
    channels: list[str]
    data: str


class _Body(msgspec.Struct):
    messages: list[_Message]
    next: int
    gap: bool


_decoder: Final = msgspec.json.Decoder(_Body)


def read_answer(status: int, body: bytes) -> Answer:
    """The answer that the body of a poll's response is. Raises WrongAnswer, also if it contradicts itself."""
    if status != 200:
        raise WrongAnswer(f"a poll was answered {status}: {body[:200].decode(errors='replace')}")
    try:
        said = _decoder.decode(body)
        parts = [message.data.split(".", 2) for message in said.messages]
        names, numbers = {part[0] for part in parts}, tuple(int(part[1]) for part in parts)
    except (msgspec.DecodeError, ValueError, IndexError):
        raise WrongAnswer(f"not a poll's answer: {body[:200]!r}") from None
    ids = [message.id for message in said.messages]
    if len(names) > 1 or any(message.channels != [name] for message in said.messages for name in names):
        raise WrongAnswer("messages of another channel")
    if any(first >= second for first, second in pairwise([*ids, said.next])):
        raise WrongAnswer("ids out of order, or a cursor that passes nothing")
    return Answer(names.pop() if names else "", numbers, said.next, said.gap)


class _Crowd:
    """A group while it runs. `due`: ns of the clock, by number; empty until it has begun."""

    def __init__(self, group: Group) -> None:
        dialect = PushUpDialect(group.hold_s)
        self.group = group
        self.tally = Tally()
        self.due: list[int] = []
        self.before, self.after = dialect.poll([group.channel], b"")
        self.requests = [
            dialect.publish(group.channel, make_payload(group.channel, number, group.message_bytes))
            for number in range(len(group.due))
        ]
        self.publishers: list[_Publisher] = []


class _Poller:
    """One client. `asked`: its poll has no answer yet; `heard`: the number of its latest message."""

    __slots__ = ("asked", "bytes", "crowd", "cursor", "heard", "part", "socket")

    def __init__(self, connection: socket.socket, crowd: _Crowd) -> None:
        self.socket = connection
        self.crowd = crowd
        self.cursor = FIRST_CURSOR
        self.heard = -1
        self.asked = False
        self.part = b""
        self.bytes = 0


class _Publisher:
    """A publisher's connection. `busy`: its publication has no answer yet."""

    def __init__(self, connection: socket.socket, crowd: _Crowd) -> None:
        self.socket = connection
        self.crowd = crowd
        self.busy = False
        self.part = b""


class Pollers:
    """Groups of clients, and what is published to them; `tallies` are in the order of the groups.

    `connect`, `begin` and `run` until the trial is over, then `end`; connections close with the `with` block.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._crowds = [_Crowd(group) for group in groups]
        self._epoll = select.epoll()
        self._pollers: dict[int, _Poller] = {}
        self._publishers: dict[int, _Publisher] = {}
        self._pulls: list[tuple[int, int]] = []
        self._publications: deque[tuple[int, _Crowd, int]] = deque()
        self._known: dict[bytes, Answer] = {}
        self._end: int | None = None
        self.lags: list[int] = []
        """How late this process was with what it had to do at a certain time, ns."""

    @property
    def tallies(self) -> Sequence[Tally]:
        """What became of each group's messages."""
        return [crowd.tally for crowd in self._crowds]

    @property
    def clients(self) -> int:
        """How many there are to be, all groups together."""
        return sum(crowd.group.clients for crowd in self._crowds)

    @property
    def missing(self) -> int:
        """Messages that clients have not received yet, of all that are due."""
        return sum(
            len(crowd.group.due) * crowd.group.clients - crowd.tally.received
            for crowd in self._crowds
            if not crowd.tally.faults
        )

    def __enter__(self) -> Self:
        gc.collect()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connections in (self._pollers, self._publishers):
            for connection in connections.values():
                _close(connection.socket)
        self._epoll.close()
        gc.enable()

    def connect(self, patience_s: float) -> None:
        """Connect everybody, and poll. Raises PollersError if a connection is refused or takes too long."""
        deadline = time.monotonic() + patience_s
        total = self.clients
        for crowd in self._crowds:
            self._add_publisher(crowd)
            for _ in range(crowd.group.clients):
                try:
                    connection = _connect(crowd.group.address, max(deadline - time.monotonic(), 0.001))
                except OSError as error:
                    raise PollersError(
                        f"connections refused: {len(self._pollers):,} of {total:,} could connect ({error})"
                    ) from None
                connection.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
                poller = self._pollers[connection.fileno()] = _Poller(connection, crowd)
                self._epoll.register(connection, select.EPOLLIN)
                if crowd.group.hold_s:
                    self._ask(poller)
                if len(self._pollers) % CONNECT_BURST == 0:
                    self._look(0)

    def begin(self, trial_s: float) -> None:
        """The trial begins now, and takes so long: clients that pull begin, evenly spread; publications are due."""
        begin = time.monotonic_ns()
        self._end = begin + int(trial_s * 1e9)
        for crowd in self._crowds:
            crowd.due = [begin + int(due_s * 1e9) for due_s in crowd.group.due]
        planned = [(due, crowd, number) for crowd in self._crowds for number, due in enumerate(crowd.due)]
        self._publications.extend(sorted(planned, key=lambda entry: entry[0]))
        places = dict.fromkeys(map(id, self._crowds), 0)
        for descriptor, poller in self._pollers.items():
            group = poller.crowd.group
            if not group.hold_s:
                share = places[id(poller.crowd)] / group.clients
                places[id(poller.crowd)] += 1
                self._pulls.append((begin + int(share * group.pull_s * 1e9), descriptor))
        heapq.heapify(self._pulls)

    def run(self, seconds: float, tick: Callable[[], None] = lambda: None) -> None:
        """Do what is due, and look at what comes, so long. `tick` is called about every second."""
        now = time.monotonic_ns()
        until, ticked = now + int(seconds * 1e9), now
        while now < until:
            self._act(now)
            self._look(min(self._upcoming(), until) - time.monotonic_ns())
            now = time.monotonic_ns()
            if now - ticked >= TICK_NS:
                ticked = now
                tick()

    def end(self) -> None:
        """The trial is over: what was received until now is traffic; no more is published."""
        for poller in self._pollers.values():
            poller.crowd.tally.traffic += read_traffic(poller.socket, poller.bytes)
        self._publications.clear()

    def _upcoming(self) -> int:
        """When there is something to do."""
        times = [time.monotonic_ns() + SLEEP_NS_MAX]
        if self._publications:
            times.append(self._publications[0][0] - SPIN_NS)
        if self._pulls:
            times.append(self._pulls[0][0])
        return min(times)

    def _act(self, now: int) -> None:
        """Send what is due."""
        while self._publications and self._publications[0][0] <= now:
            due, crowd, number = self._publications.popleft()
            self.lags.append(now - due)
            publisher = next((one for one in crowd.publishers if not one.busy), None)
            try:
                publisher = publisher or self._add_publisher(crowd)
                publisher.busy = True
                publisher.socket.sendall(crowd.requests[number])
            except (OSError, PollersError) as error:
                crowd.tally.faults[f"cannot publish: {error}"] += 1
        while self._pulls and self._pulls[0][0] <= now:
            due, descriptor = self._pulls[0]
            poller = self._pollers.get(descriptor)
            if poller is None:
                heapq.heappop(self._pulls)
                continue
            self.lags.append(now - due)
            heapq.heapreplace(self._pulls, (due + int(poller.crowd.group.pull_s * 1e9), descriptor))
            if poller.asked:
                poller.crowd.tally.skipped += 1
            else:
                self._ask(poller)

    def _look(self, patience_ns: int) -> None:
        """Handle what has come; wait for something so long."""
        for descriptor, _ in wait_for_events(self._epoll, patience_ns, 4096):
            poller = self._pollers.get(descriptor)
            if poller is not None:
                self._hear(poller)
            elif descriptor in self._publishers:
                self._hear_publisher(self._publishers[descriptor])

    def _ask(self, poller: _Poller) -> None:
        crowd = poller.crowd
        request = crowd.before + poller.cursor + crowd.after
        poller.asked = True
        poller.bytes += len(request)
        try:
            poller.socket.sendall(request)
        except OSError as error:
            self._drop(poller, f"a connection broke: {error.strerror}")

    def _hear(self, poller: _Poller) -> None:
        try:
            data, ancillary, _, _ = poller.socket.recvmsg(READ_BYTES, _ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(poller, f"a connection broke: {error.strerror}")
            return
        if not data:
            self._drop(poller, "the server closed a connection")
            return
        seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
        at = time.monotonic_ns() - (time.time_ns() - seconds * 1_000_000_000 - nanoseconds)
        poller.bytes += len(data)
        try:
            answer = self._parse(poller, poller.part + data)
            if answer is not None:
                self._take(poller, answer, at)
        except WrongAnswer as error:
            self._drop(poller, str(error))

    def _parse(self, poller: _Poller, data: bytes) -> Answer | None:
        answer = self._known.get(data)
        if answer is None:
            response = parse_response(data)
            if response is None:
                poller.part = data
                return None
            answer = read_answer(response.status, response.body)
            if answer.numbers:
                if len(self._known) >= KNOWN_ANSWERS_MAX:
                    self._known.clear()
                self._known[data] = answer
        poller.part = b""
        return answer

    def _take(self, poller: _Poller, answer: Answer, at: int) -> None:
        """Count the answer's messages and poll again, or wait for the next pull. Raises WrongAnswer."""
        crowd = poller.crowd
        tally = crowd.tally
        if not poller.asked:
            raise WrongAnswer("an answer without a poll")
        if answer.numbers and answer.channel != crowd.group.channel:
            raise WrongAnswer("messages of another channel")
        if answer.cursor < int(poller.cursor):
            raise WrongAnswer("a cursor that goes back")
        tally.gaps += answer.gap
        for number in answer.numbers:
            if number == poller.heard:
                tally.repeated += 1
            elif number < poller.heard:
                tally.disordered += 1
            else:
                poller.heard = number
                if self._end is not None and at > self._end:
                    tally.late += 1
                else:
                    tally.trips.append(at - crowd.due[number])
        poller.cursor = b"%d" % answer.cursor
        poller.asked = False
        if crowd.group.hold_s:
            self._ask(poller)

    def _hear_publisher(self, publisher: _Publisher) -> None:
        tally = publisher.crowd.tally
        try:
            data = publisher.socket.recv(READ_BYTES)
            if not data:
                raise WrongAnswer("the server closed a publisher's connection")
            publisher.part += data
            response = parse_response(publisher.part)
            if response is None:
                return
            if response.status != 201 or not publisher.busy:
                raise WrongAnswer(f"a publication was answered {response.status}: {response.body[:200]!r}")
        except (OSError, WrongAnswer) as error:
            tally.faults[str(error)] += 1
            publisher.crowd.publishers.remove(publisher)
            del self._publishers[publisher.socket.fileno()]
            _close(publisher.socket)
            return
        tally.acknowledged += 1
        publisher.busy = False
        publisher.part = b""

    def _add_publisher(self, crowd: _Crowd) -> _Publisher:
        try:
            connection = _connect(crowd.group.address, 1.0)
        except OSError as error:
            raise PollersError(f"a publisher cannot connect: {error}") from None
        publisher = _Publisher(connection, crowd)
        crowd.publishers.append(publisher)
        self._publishers[connection.fileno()] = publisher
        self._epoll.register(connection, select.EPOLLIN)
        return publisher

    def _drop(self, poller: _Poller, why: str) -> None:
        """The client is lost; what it has used of the network is counted."""
        tally = poller.crowd.tally
        tally.faults[why] += 1
        tally.traffic += read_traffic(poller.socket, poller.bytes)
        del self._pollers[poller.socket.fileno()]
        _close(poller.socket)


def _connect(address: tuple[str, int], patience_s: float) -> socket.socket:
    connection = socket.socket()
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(patience_s)
        connection.connect(address)
        connection.setblocking(False)
    except OSError:
        connection.close()
        raise
    return connection


def _close(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    connection.close()
