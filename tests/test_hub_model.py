"""The promise, against a naive model: any interleaving of publications, polls, reads, announcements, time, faults.

The model keeps every message ever published and what was ever dropped. The store it plays for the hub is as unkind as
the broker's contract allows: announcements are delivered late, reads are answered late, connections break.
"""

from collections import deque
from itertools import pairwise
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pushup.hub import Company, Hub, Read, Replies, Subscription
from pushup.messages import LATEST, MAX_ID, Answer, History, Message, Poll

CHANNELS = ("a", "b", "c")
WINDOW_US = 40
COUNT = 4
BIRTH = 100

WATCHERS = (("a",), ("a",), ("a",), ("b",), ("a", "b"), ("a", "b"), ("b", "c"), ("c", "b", "a"))

some_channels = st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=3, unique=True).map(tuple)


class Client:
    """One client of a fixed set of channels that polls, obeys `next`, and checks every answer."""

    def __init__(self, model: "Model", channels: tuple[str, ...], start: int) -> None:
        self.model = model
        self.channels = channels
        self.start = start
        self.end = MAX_ID
        self.parked: Subscription | None = None
        self.latest = False
        """Whether it asked for news from now on, and may be given a little more."""
        self.owed: set[tuple[int, str]] = set()
        """What it was given a cursor beyond because nobody knew of it yet: it must be told of a gap."""

    def answer(self, answer: Answer) -> None:
        self.parked = None
        self.model.drop_all()
        ids = [message.id for message, _ in answer.messages]
        assert all(a < b for a, b in pairwise(ids)), "not in order, or twice"
        assert all((self.latest or self.start <= id) and id <= self.end for id in ids), "out of range"
        assert answer.next >= max(ids, default=0 if self.latest else self.start - 1) + 1
        expected = [
            id
            for id, channels in self.model.published.items()
            if self.start <= id < min(answer.next, self.end + 1) and not set(channels).isdisjoint(self.channels)
        ]
        lost = [id for id in expected if id not in ids]
        assert self.latest or set(ids) <= set(expected), "a message nobody published to these channels"
        if self.start == 0:
            lost = [id for id in lost if not self.model.dropped(id, self.channels)]
        unheard = {(id, name) for id, name in self.model.unheard if id in lost and name in self.channels}
        self.owed = set() if answer.gap else self.owed | unheard
        lost = [id for id in lost if id not in {id for id, _ in unheard}]
        if self.start > 0 and not answer.gap:
            assert not lost, f"{lost} lost in silence between {self.start} and {answer.next}"
        if self.start == 0:
            assert not lost, f"{lost} is cached but was left out"
        if answer.gap:
            assert self.start > 0
            assert self.latest or self.model.may_have_lost(self.start, self.channels), "a gap where nothing was lost"
        for message, text in answer.messages:
            shown = [name for name in self.channels if name in message.channels]
            assert text == message.json(tuple(shown))
        self.start = answer.next
        self.latest = False

    def fail(self, error: Exception) -> None:
        raise AssertionError(error)


class Model(RuleBasedStateMachine):
    """Ids and window are in small units, so that messages age out within a run."""

    def __init__(self) -> None:
        super().__init__()
        self.hub = Hub(answer_bytes=120, backlog=3, linger=5.0)
        self.now = 0.0
        self.clock = BIRTH
        self.published: dict[int, tuple[str, ...]] = {}
        self.cached: dict[str, list[Message]] = {name: [] for name in CHANNELS}
        self.tails = dict.fromkeys(CHANNELS, 0)
        self.floors = dict.fromkeys(CHANNELS, BIRTH)
        self.watched: set[str] = set()
        self.stream: deque[tuple[str, Message | None, int]] = deque()
        self.reads: list[list[tuple[Read, History]]] = []
        self.unheard: list[tuple[int, str]] = []
        """Announcements that got lost, although the connection held."""
        self.clients = [Client(self, channels, 0) for channels in WATCHERS]
        self.polls: dict[tuple[tuple[str, ...], int, int, float], Poll] = {}

    # The naive store

    def dropped(self, id: int, channels: tuple[str, ...]) -> bool:
        return all(id < self.floors[name] for name in channels if name in self.published[id])

    def may_have_lost(self, start: int, channels: tuple[str, ...]) -> bool:
        return any(start < self.floors[name] for name in channels) or any(
            name in channels and id < start for id, name in self.unheard
        )

    def drop(self, name: str) -> None:
        kept = [m for m in self.cached[name] if m.id > self.clock - WINDOW_US][-COUNT:]
        for message in self.cached[name]:
            if message not in kept:
                self.floors[name] = message.id + 1
        self.cached[name] = kept

    def drop_all(self) -> None:
        for name in CHANNELS:
            self.drop(name)

    def position(self) -> int:
        head = self.stream[0] if self.stream else None
        if head is None:
            return self.clock + 1
        return head[1].id if head[1] is not None else head[2]

    def tell(self, replies: Replies) -> None:
        for answer, subscriptions in replies:
            for subscription in subscriptions:
                owner = subscription.owner
                for client in list(owner) if isinstance(owner, Company) else [owner]:
                    assert isinstance(client, Client)
                    assert client.parked is subscription, "answered twice"
                    client.answer(answer)

    # What publishers and the broker do

    @rule(channels=some_channels, step=st.integers(1, 15))
    def publish(self, channels: tuple[str, ...], step: int) -> None:
        self.clock += step
        message = Message(self.clock, channels, b'"%d"' % self.clock)
        self.published[message.id] = channels
        for name in channels:
            prev = self.tails[name]
            self.tails[name] = message.id
            self.cached[name].append(message)
            self.drop(name)
            if name in self.watched:
                self.stream.append((name, message, prev))

    @rule(name=st.sampled_from(CHANNELS), dice=st.integers(0, 3))
    def close(self, name: str, dice: int) -> None:
        if dice:
            return
        if self.cached[name]:
            self.floors[name] = self.tails[name] + 1
            self.cached[name] = []
        if name in self.watched:
            self.stream.append((name, None, self.clock + 1))

    @precondition(lambda self: self.stream)
    @rule(count=st.integers(1, 3))
    def announce(self, count: int) -> None:
        for _ in range(min(count, len(self.stream))):
            name, message, prev = self.stream.popleft()
            if message is None:
                self.forget_owed(name)
                self.tell(self.hub.close(name, self.now))
                self.forget_owed(name)
            else:
                self.tell(self.hub.deliver(name, message, prev, self.now))

    @precondition(lambda self: self.hub.wanted)
    @rule()
    def start_read(self) -> None:
        wanted, self.hub.wanted = self.hub.wanted, {}
        answers = []
        for name, read in wanted.items():
            self.watched.add(name)
            self.drop(name)
            whole = read.start <= self.floors[name]
            floor = self.floors[name] if whole else read.start
            messages = [m for m in self.cached[name] if m.id >= floor]
            history = History(messages, floor, self.tails[name], self.clock + 1, whole, WINDOW_US / 1e6, COUNT)
            answers.append((read, history))
        self.reads.append(answers)

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def finish_read(self, data: Any) -> None:
        for read, history in self.reads.pop(data.draw(st.integers(0, len(self.reads) - 1))):
            self.tell(self.hub.learn(read, history, self.now))

    @rule(dice=st.integers(0, 7))
    def break_connection(self, dice: int) -> None:
        if dice == 0:
            self.stream.clear()
            self.watched.clear()
            self.hub.doubt()

    @rule()
    def hear_position(self) -> None:
        self.tell(self.hub.advance(self.position(), self.now))

    # What clients do

    @rule(data=st.data(), start=st.sampled_from((0, 1, BIRTH, LATEST)), ahead=st.integers(0, 30))
    def start_over(self, data: Any, start: int, ahead: int) -> None:
        """One client forgets its cursor and takes another one, which may lie in the past."""
        client = data.draw(st.sampled_from(self.clients))
        if client.parked is None:
            client.start = max(self.clock - ahead, 1) if start == BIRTH else start
            client.owed.clear()

    @rule(data=st.data())
    def follow(self, data: Any) -> None:
        """Clients of the same channels go on from where one of them is, as they do who are told the same."""
        leader = data.draw(st.sampled_from(self.clients))
        for client in self.clients:
            if client.parked is None and client.channels == leader.channels and client is not leader:
                client.start = max(client.start, leader.start)
                client.owed = client.owed | leader.owed

    @precondition(lambda self: self.stream)
    @rule()
    def lose_announcement(self) -> None:
        """The connection holds, and yet an event is lost on it. Who comes with a cursor beyond may be told a gap."""
        name, message, _ = self.stream.popleft()
        if message is not None:
            self.unheard.append((message.id, name))

    @rule(name=st.sampled_from(CHANNELS))
    def audit(self, name: str) -> None:
        """The broker compares tails behind everything it has announced."""
        channel = self.hub._channels.get(name)
        if not self.stream and channel is not None and channel.known and self.tails[name] > channel.backlog.tail:
            self.hub.doubt([name])

    @rule(
        timeout=st.sampled_from((0.0, 1.0, 30.0)),
        span=st.sampled_from((0, 5, None, None)),
        skew=st.sampled_from((0, 10_000)),
        jitter=st.sampled_from((0.0, 2.0)),
    )
    def poll(self, timeout: float, span: int | None, skew: int, jitter: float) -> None:
        """Every client that is not waiting polls. What it takes for now may be far in the future."""
        for client in self.clients:
            if client.parked is None:
                self.poll_one(client, timeout, span, skew, jitter)

    def poll_one(self, client: Client, timeout: float, span: int | None, skew: int, jitter: float = 0.0) -> None:
        start, latest = client.start, self.clock + 1
        if start == LATEST:
            client.start, client.latest = latest, True
            latest += skew
        client.end = MAX_ID if span is None else max(client.start, self.clock) + span
        # As on the lane, what several ask alike is one object.
        poll = self.polls.setdefault(key := (client.channels, start, client.end, timeout), Poll(*key))
        result = (
            self.hub.join(poll, client, self.now + timeout - jitter)
            or self.hub.park(poll, client, self.now + timeout)
            or self.hub.subscribe(poll, client, self.now, latest=latest)
        )
        if isinstance(result, Answer):
            client.answer(result)
        else:
            client.parked = result

    @precondition(lambda self: any(client.parked for client in self.clients))
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        client = data.draw(st.sampled_from([client for client in self.clients if client.parked]))
        assert self.hub.leave(client.parked, client, self.now)
        assert not self.hub.leave(client.parked, client, self.now)
        client.parked = None

    @rule(seconds=st.sampled_from((0.1, 1.0, 6.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.tell(self.hub.expire(self.now))
        for name in self.hub.forget_idle(self.now):
            self.watched.discard(name)
            self.stream = deque(event for event in self.stream if event[0] != name)
            self.forget_owed(name)

    def forget_owed(self, name: str) -> None:
        """What a node knew of a channel ends with its linger, also that it passed something over."""
        for client in self.clients:
            client.owed = {(id, on) for id, on in client.owed if on != name}

    @rule(dice=st.integers(0, 3))
    def drain(self, dice: int) -> None:
        if dice == 0:
            self.tell(self.hub.drain(self.hub.waiting(), self.now))

    # Always

    @invariant()
    def parked_is_counted(self) -> None:
        assert self.hub.parked == sum(client.parked is not None for client in self.clients)

    def settle(self) -> None:
        while self.stream or self.reads or self.hub.wanted:
            if self.stream:
                self.announce(4)
            elif self.hub.wanted:
                self.start_read()
            else:
                for read, history in self.reads.pop(0):
                    self.tell(self.hub.learn(read, history, self.now))

    def teardown(self) -> None:
        """When the dust settles, nobody waits for something that is there, and every gap was told."""
        self.settle()
        for name in CHANNELS:
            self.audit(name)
        self.settle()
        self.tell(self.hub.advance(self.position(), self.now))
        self.drop_all()
        for client in self.clients:
            if client.parked:
                waiting = [
                    message.id
                    for name in client.channels
                    for message in self.cached[name]
                    if client.start <= message.id <= client.end
                ]
                assert not waiting, f"{client.channels} from {client.start} starves: {waiting} is cached"
        self.tell(self.hub.advance(self.clock + 2, self.now))
        self.tell(self.hub.expire(self.now + 1000))
        assert self.hub.parked == 0
        for client in self.clients:
            if client.owed and client.start:
                owed = set(client.owed)
                self.poll_one(client, 0.0, None, 0)
                self.settle()
                assert not client.owed, f"{owed} was passed over, and no word of it"


Model.TestCase.settings = settings(
    max_examples=600,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
)
TestModel = Model.TestCase
