"""Who waits for what: the sans-I/O core of a node.

The hub parks subscriptions and says who is to be told what. It never reads, writes, sleeps or looks at a clock: `now`
is seconds on any steady clock, ids are the broker's. Every method that may end polls returns `Replies`; the caller
delivers them. What the hub does not know it puts into `wanted`; the caller asks the broker and comes back with `learn`.

Three rules keep the promise:

* A subscription is registered before its channels are read, so nothing falls between the two.
* It is answered only while *all* its channels are known up to date (`Channel.known`), and only as far as they all are
  (`Channel.position`): a cursor that moves on past one channel's news must not pass another's that is still on its way.
* Answering deletes nothing. The cursor of the next poll is the acknowledgement.
"""

import heapq
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Final, Protocol

import msgspec
from sortedcontainers import SortedDict

from pushup.backlog import Backlog
from pushup.errors import PushUpError
from pushup.messages import LATEST, MAX_ID, Answer, History, Message, Poll

TICKS_PER_SECOND: Final = 16
"""Deadlines are rounded up to this grain, so that those of one tick are one entry of the sorted index."""

DEFAULT_ANSWER_BYTES: Final = 1024 * 1024
DEFAULT_BACKLOG: Final = 1000
DEFAULT_LINGER_S: Final = 60.0

COMPANY_MAX: Final = 64
"""So many polls that ask the same are one subscription: they end together, so it must not be all of them."""

ANSWERS_BYTES_MAX: Final = 4 * 1024 * 1024
"""How much of the latest answers is kept for polls that are to be told the same."""
_ANSWER_BYTES: Final = 500
"""About what an answer takes beside its text."""


class Owner(Protocol):
    """Where a subscription's one answer goes. Exactly one of the two is called, once, unless the owner left before."""

    def answer(self, answer: Answer) -> None: ...

    def fail(self, error: PushUpError) -> None: ...


class Company(dict[Owner, None]):
    """Owners of polls that came one right after the other and asked the same, in that order."""

    __slots__ = ()

    def answer(self, answer: Answer) -> None:
        for owner in self:
            owner.answer(answer)

    def fail(self, error: PushUpError) -> None:
        for owner in self:
            owner.fail(error)


class Subscription(msgspec.Struct, eq=False):
    """What waits here, until the deadline `tick` (in ticks of the hub's clock): one poll, or several with a `Company`.

    `unknown` counts its channels that are not known up to date; it stays silent while there are any.
    """

    channels: tuple["Channel", ...]
    start: int
    end: int
    tick: int
    owner: Owner
    parks: bool = True
    """False: it asked not to wait, and is parked only until its channels are known."""
    unknown: int = 0
    latest: int = 0
    """If it asked for news from now on: an id not later than now. `start` is an estimate until all are known."""

    @property
    def polls(self) -> int:
        """How many polls these are."""
        return len(self.owner) if type(self.owner) is Company else 1


Waiting = tuple[()] | Subscription | dict[Subscription, None]
"""Subscriptions in the order they came. One is there without a container, as many channels have just one."""


def _each(waiting: Waiting) -> Collection[Subscription]:
    return (waiting,) if isinstance(waiting, Subscription) else waiting


def _add(waiting: Waiting, subscription: Subscription) -> Waiting:
    if isinstance(waiting, dict):
        waiting[subscription] = None
        return waiting
    return {waiting: None, subscription: None} if waiting else subscription


def _discard(waiting: Waiting, subscription: Subscription) -> Waiting:
    if isinstance(waiting, dict):
        waiting.pop(subscription, None)
        return waiting or ()
    return () if waiting is subscription else waiting


class Channel:
    """What this node knows of one channel, and who waits for it here."""

    __slots__ = (
        "alone",
        "backlog",
        "blind",
        "changes",
        "doubts",
        "early",
        "known",
        "max_messages",
        "name",
        "parked",
        "passed",
        "position",
        "unsure",
        "window",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.alone: tuple[Channel, ...] = (self,)
        self.parked: Waiting = ()
        """In the order they came. So a fan-out meets connections, and their memory, in the order they were made."""
        self.unsure: Waiting = ()
        """Those of `parked` that wait for `learn`, in the same order."""
        self.backlog = Backlog(MAX_ID, whole=False)
        self.changes = 0
        """How often the backlog has changed."""
        self.known = False
        """Whether the backlog holds every message the channel had since `backlog.floor`."""
        self.doubts = 0
        """How often `known` ceased to be true. A read that was begun before the last time proves nothing."""
        self.position = 0
        """Up to here it did when it was read, which may be ahead of what was announced to other channels."""
        self.passed = 0
        """How far cursors had been given out when the channel ceased to be known, as if nothing had been missed."""
        self.blind = (0, 0)
        """A cursor above the first and up to the second was given out here although it passes a message over."""
        self.early: Sequence[tuple[Message, int]] = ()
        """(message, prev) pairs that came while the channel was being read."""
        self.window = 0.0
        self.max_messages = 0

    def count_parked(self) -> int:
        """How many polls wait here. O(subscriptions)."""
        return count_polls(_each(self.parked))

    def gap(self, start: int) -> bool:
        """Whether a poll from `start` on may have missed something of this channel. O(1)."""
        return self.backlog.gap(start) or self.blind[0] < start <= self.blind[1]


class Read:
    """A channel that the broker must be asked for, from the id `start` on."""

    __slots__ = ("channel", "doubts", "first", "start")

    def __init__(self, channel: Channel, start: int) -> None:
        self.channel = channel
        self.start = start
        self.doubts = channel.doubts
        self.first = not channel.known and not channel.backlog.tail
        """Whether nothing is known of the channel yet."""


def count_polls(subscriptions: Iterable[Subscription]) -> int:
    """How many polls these subscriptions are. O(their number)."""
    return sum([subscription.polls for subscription in subscriptions])


Replies = Sequence[tuple[Answer, Sequence[Subscription]]]
"""Answers, each with the subscriptions that get it. Those are no longer parked."""


class Hub:
    """The subscriptions of one realm on one node.

    `answer_bytes` bounds the messages of one answer (the first always fits), `backlog` the messages kept per channel,
    `linger` the seconds a channel is kept after its last poll.
    """

    def __init__(
        self,
        *,
        answer_bytes: int = DEFAULT_ANSWER_BYTES,
        backlog: int = DEFAULT_BACKLOG,
        linger: float = DEFAULT_LINGER_S,
    ) -> None:
        self._answer_bytes = answer_bytes
        self._backlog = backlog
        self._linger = linger
        self._channels: dict[str, Channel] = {}
        self._ticks: SortedDict[int, tuple[int, dict[Subscription, None]]] = SortedDict()
        """Who waits until then, with the one integer that is the `tick` of them all."""
        self._idle: dict[Channel, float] = {}
        """Channels nobody waits for, the longest idle first, with the time they became so."""
        self._held: set[Subscription] = set()
        """Parked, though one of their channels has a message: the others have not been announced as far yet."""
        self._answers: dict[tuple[tuple[Channel, ...], int, int, bool], tuple[int, Answer]] = {}
        """The latest answers with messages, each with its channels' `changes` at the time, by what was asked."""
        self._answers_bytes = 0
        self._last: Subscription | None = None
        """What was parked last, while it is certain to be parked still and its channels are known."""
        self._last_poll: Poll | None = None
        """What that asked."""
        self.position = 0
        """Every message of a known channel with a smaller id has been delivered; what comes later is not smaller."""
        self.parked = 0
        self.wanted: dict[str, Read] = {}
        """What somebody must read from the broker, by channel name. The caller takes it and leaves an empty one."""

    def __len__(self) -> int:
        """How many channels are kept."""
        return len(self._channels)

    def __contains__(self, name: str) -> bool:
        return name in self._channels

    def advance(self, position: int, now: float) -> Replies:
        """The broker says: every message below `position` has been delivered here, and no later one is below. O(1)."""
        if position <= self.position:
            return ()
        self.position = position
        return self._settle(self._held, now) if self._held else ()

    # Subscribing

    def join(self, poll: Poll, owner: Owner, earliest: float) -> Subscription | None:
        """The short cut of `park` for thousands who ask the same: what was parked last is their subscription, too.

        None if that is not of this very `Poll`, or ends before `earliest`: by then the deadline may be. What is still
        parked has been told nothing from its start on, which is as true of a new poll with the same start. O(1).
        """
        subscription = self._last
        if subscription is None or poll is not self._last_poll:
            return None
        if subscription.tick < earliest * TICKS_PER_SECOND or subscription.unknown:
            return None
        company = subscription.owner
        if type(company) is not Company:
            subscription.owner = Company({company: None, owner: None})
        elif len(company) < COMPANY_MAX:
            company[owner] = None
        else:
            return None
        self.parked += 1
        return subscription

    def park(self, poll: Poll, owner: Owner, deadline: float) -> Subscription | None:
        """The short cut of `subscribe` for the most frequent poll: all channels known, and nothing new. Else None.

        O(1) per channel, or O(log n) for the first poll of a tick.
        """
        start = poll.start
        if not poll.timeout or poll.end != MAX_ID:
            return None
        channels: list[Channel] = []
        for name in poll.channels:
            channel = self._channels.get(name)
            if channel is None or not channel.known:
                return None
            backlog = channel.backlog
            if start <= backlog.tail or start < backlog.floor or start <= channel.blind[1]:
                return None
            channels.append(channel)
        tick = math.ceil(deadline * TICKS_PER_SECOND)
        known = tuple(channels) if len(channels) > 1 else channels[0].alone
        subscription = Subscription(known, start, MAX_ID, tick, owner)
        for channel in channels:
            parked = channel.parked
            if type(parked) is dict:
                parked[subscription] = None
            else:
                if not parked:
                    self._idle.pop(channel, None)
                channel.parked = _add(parked, subscription)
        self._await_deadline(subscription)
        self.parked += 1
        self._last, self._last_poll = subscription, poll
        return subscription

    def subscribe(
        self, poll: Poll, owner: Owner, now: float, timeout: float | None = None, latest: int = 0
    ) -> Answer | Subscription:
        """Answer the poll at once, or park it until one of the other methods replies to it.

        `timeout` overrides the poll's own; `latest` estimates the id a message would get now, for who asks for the
        latest of a channel that has to be read. O(log n) for its deadline, O(1) per channel.
        """
        start = poll.start
        timeout = poll.timeout if timeout is None else timeout
        parks = timeout > 0
        if poll.end < MAX_ID:
            timeout = min(timeout, max(poll.end + 1 - self.position, 0) / 1e6)
        channels = tuple([self._channels.get(name) or self._open(name) for name in poll.channels])
        if len(channels) == 1:
            channels = channels[0].alone
        poll.channels = tuple([channel.name for channel in channels])  # Equal, but shared by all who remember polls.
        tick = math.ceil((now + timeout) * TICKS_PER_SECOND)
        subscription = Subscription(channels, start, poll.end, tick, owner, parks)
        if start == LATEST:
            subscription.latest = max(self.position, 1)
            start = subscription.start = max(self.position, latest)
            if all(channel.known for channel in channels):
                start = subscription.start = max(self.position, *[channel.backlog.tail + 1 for channel in channels])
        for channel in channels:
            if not (channel.known and channel.backlog.covers(start)):
                self._want(channel, start)
                channel.unsure = _add(channel.unsure, subscription)
                subscription.unknown += 1
        if not subscription.unknown:
            answer = self._answer_now(subscription)
            if answer is not None:
                for channel in channels:
                    if not channel.parked:
                        self._idle.pop(channel, None)
                        self._idle[channel] = now
                return answer
            self._await_deadline(subscription)
        for channel in channels:
            if not channel.parked:
                self._idle.pop(channel, None)
            channel.parked = _add(channel.parked, subscription)
        self.parked += 1
        if not subscription.unknown and subscription not in self._held:
            self._last, self._last_poll = subscription, poll
        return subscription

    def leave(self, subscription: Subscription, owner: Owner, now: float) -> bool:
        """The client has gone. False, and nothing done, if it does not wait any more. O(its channels)."""
        if subscription not in _each(subscription.channels[0].parked):
            return False
        company = subscription.owner
        if type(company) is Company:
            if owner not in company:
                return False
            if len(company) > 1:
                del company[owner]
                self.parked -= 1
                return True
        self._remove((subscription,), now)
        return True

    # What the broker says

    def learn(self, read: Read, history: History, now: float) -> Replies:
        """A read from `wanted` was answered: merge with what came meanwhile, reply to those who waited.

        `history` is whole or reaches down to the id that was wanted. O(messages + polls of the channel).
        """
        if not self.holds(read):
            return ()
        channel = read.channel
        channel.window = history.window
        channel.max_messages = history.max_messages
        had = channel.backlog
        messages, floor = list(history.messages), history.floor
        passed = self.position if channel.known else channel.passed
        # The first message that this node should have heard of, whether the broker still has it or not.
        missed = next((message.id for message in messages if message.id > had.tail), passed)
        if history.whole and floor > (known_from := max(had.tail + 1, had.floor)):
            missed = known_from
        if missed < passed:
            # Of an answer with a message, the cursor was one more.
            channel.blind = (min(missed, channel.blind[0] or missed), passed + 1)
        if not history.whole and had.floor < floor <= had.tail + 1:
            # Read on from where this node left off: what it had joins what it got.
            messages[:0] = had.range(0, floor - 1)
            floor = had.floor
        channel.backlog = Backlog(floor, history.tail, history.whole, messages)
        channel.changes += 1
        if channel.known:
            # A read for older messages, while newer ones went on being delivered.
            for message in had.range(history.tail + 1, MAX_ID):
                channel.backlog.append(message)
        channel.position = history.position
        early, channel.early = channel.early, ()
        for message, prev in early:
            if message.id > channel.backlog.tail:
                if prev != channel.backlog.tail:
                    self._doubt(channel)
                    return ()
                channel.backlog.append(message)
        channel.known = True
        ready = []
        if channel.backlog.tail > had.tail:
            # Read ahead of its announcement, which will not be news any more when it comes.
            ready = [subscription for subscription in _each(channel.parked) if not subscription.unknown]
        waited, channel.unsure = channel.unsure, ()
        for subscription in _each(waited):
            ahead = subscription.latest and subscription.start > history.position
            if ahead and channel.name in self.wanted:
                # It may have come after this read; the next one will tell.
                channel.unsure = _add(channel.unsure, subscription)
            elif channel.backlog.covers(subscription.start):
                subscription.unknown -= 1
                if ahead:
                    # The broker's clock was set back since it was last heard of: the estimate is worth nothing.
                    subscription.start = subscription.latest
                if not subscription.unknown:
                    ready.append(subscription)
            else:
                channel.unsure = _add(channel.unsure, subscription)
                self._want(channel, subscription.start)
        if not channel.unsure:
            # Whoever wanted another read, while this one was under way, has what it needs.
            self.wanted.pop(channel.name, None)
        return self._settle(ready, now)

    def deliver(self, name: str, message: Message, prev: int, now: float) -> Replies:
        """A message was published to the channel; `prev` is the id of the one before it there.

        A message that does not follow on the last means that something was missed: the channel is wanted again, and
        its polls wait until it is known. One that was read before it is announced is not new, but polls may have been
        held until all their channels had come as far. O(polls of the channel).
        """
        # Not id + 1: the same message may still have to be delivered to another of its channels.
        replies = self.advance(message.id, now)
        channel = self._channels.get(name)
        if channel is None:
            return replies
        backlog = channel.backlog
        if not channel.known:
            self._keep_early(channel, message, prev)
        elif message.id > backlog.tail:
            if prev != backlog.tail:
                self._doubt(channel)
                return replies
            backlog.append(message)
            channel.changes += 1
            self._trim(channel, channel.max_messages)
            if backlog.trim(self._backlog, 0):
                # This node's own limit, not the channel's: the broker still has what was dropped here.
                backlog.whole = False
            if message.id <= channel.blind[1]:
                return [*replies, *self._settle([s for s in _each(channel.parked) if not s.unknown], now)]
            if channel.parked:
                return [*replies, *self._answer_message(channel, message, now)]
        return replies

    def close(self, name: str, now: float) -> Replies:
        """The channel was closed. Every poll of it ends, and what is known of it is forgotten. O(its polls)."""
        channel = self._channels.get(name)
        if channel is None:
            return ()
        replies = self._end(list(_each(channel.parked)), "closed", now, closed=name)
        self._forget(channel)
        return replies

    def holds(self, read: Read) -> bool:
        """Whether the answer to this read is still of use. O(1)."""
        return self._channels.get(read.channel.name) is read.channel and read.doubts == read.channel.doubts

    def fail(self, read: Read, now: float) -> Sequence[Subscription]:
        """A read from `wanted` failed: the subscriptions that waited for it, no longer parked. O(their number)."""
        if not self.holds(read):
            return ()
        self.wanted.pop(read.channel.name, None)
        failed = list(_each(read.channel.unsure))
        self._remove(failed, now)
        return failed

    def doubt(self, names: Iterable[str] | None = None) -> None:
        """These channels (None: all) may have changed unheard: they must be read before their polls are answered."""
        for name in list(self._channels if names is None else names):
            channel = self._channels.get(name)
            if channel is not None:
                self._doubt(channel)

    # Time

    def next_tick(self) -> int | None:
        """When to call `expire`, in ticks of the clock. O(1)."""
        return self._ticks.peekitem(0)[0] if self._ticks else None

    def expire(self, now: float) -> Replies:
        """End the polls whose time is up, with a cursor. O(their number)."""
        due: list[Subscription] = []
        tick = math.floor(now * TICKS_PER_SECOND)
        while self._ticks and self._ticks.peekitem(0)[0] <= tick:
            due += self._ticks.popitem(0)[1][1]
        return self._end(due, "timeout", now)

    def waiting(self) -> list[Subscription]:
        """Every parked poll whose channels are known, those that would expire first first. O(their number)."""
        return [subscription for _, bucket in self._ticks.values() for subscription in bucket]

    def drain(self, subscriptions: Iterable[Subscription], now: float) -> Replies:
        """End those of these polls that still wait, before their time. O(their number)."""
        return self._end([s for s in subscriptions if s in _each(s.channels[0].parked)], "drain", now)

    def forget_idle(self, now: float) -> list[str]:
        """Forget channels that nobody has waited for since `linger` seconds; their names. O(their number)."""
        forgotten = []
        for channel, since in self._idle.items():
            if since + self._linger > now:
                break
            forgotten.append(channel)
        for channel in forgotten:
            self._forget(channel)
        return [channel.name for channel in forgotten]

    def forget_answers(self) -> None:
        """Share no answer from before with a later poll. To be called now and then: transports may date them. O(1)."""
        self._answers.clear()
        self._answers_bytes = 0

    # Inside

    def busiest(self, count: int) -> list[tuple[str, int, int]]:
        """Up to `count` channels with the most parked polls here, then up to `count` with the most messages kept here.

        Name, polls, messages; a channel may be in both. O(channels + subscriptions).
        """
        found: list[Channel] = []
        for measure in (Channel.count_parked, lambda channel: len(channel.backlog)):
            found += heapq.nlargest(count, self._channels.values(), key=measure)
        return [(channel.name, channel.count_parked(), len(channel.backlog)) for channel in found]

    def _open(self, name: str) -> Channel:
        channel = self._channels[name] = Channel(name)
        return channel

    def _forget(self, channel: Channel) -> None:
        del self._channels[channel.name]
        self._idle.pop(channel, None)
        self.wanted.pop(channel.name, None)
        channel.alone = ()  # It would keep itself, with all its messages, until garbage is collected.

    def _want(self, channel: Channel, start: int) -> None:
        if channel.passed and not channel.known:
            # Whatever was missed must show.
            start = min(start, channel.backlog.tail + 1)
        read = self.wanted.get(channel.name)
        self.wanted[channel.name] = Read(channel, min(start, read.start) if read else start)

    def _await_deadline(self, subscription: Subscription) -> None:
        bucket = self._ticks.get(subscription.tick)
        if bucket is None:
            self._ticks[subscription.tick] = subscription.tick, {subscription: None}
        else:
            subscription.tick = bucket[0]
            bucket[1][subscription] = None

    def _ignore_deadline(self, subscription: Subscription) -> None:
        bucket = self._ticks.get(subscription.tick)
        if bucket is not None:
            bucket[1].pop(subscription, None)

    def _remove(self, subscriptions: Sequence[Subscription], now: float) -> None:
        """Take parked subscriptions out of every index. O(their channels)."""
        ticks = self._ticks
        for subscription in subscriptions:
            bucket = ticks.get(subscription.tick)
            if bucket is not None:
                waiting = bucket[1]
                waiting.pop(subscription, None)
                if not waiting:
                    waiting.clear()  # Until its tick comes, it would take as much memory as ever.
            for channel in subscription.channels:
                parked = channel.parked
                if type(parked) is dict and len(parked) > 1:
                    parked.pop(subscription, None)
                elif parked is subscription or (type(parked) is dict and subscription in parked):
                    channel.parked = ()
                    self._idle[channel] = now
                if subscription.unknown:
                    channel.unsure = _discard(channel.unsure, subscription)
        if self._held:
            self._held.difference_update(subscriptions)
        self._last = None
        self.parked -= count_polls(subscriptions)

    def _keep_early(self, channel: Channel, message: Message, prev: int) -> None:
        # Dropping the oldest breaks the chain of `prev`, which `learn` sees: then the channel is read once more.
        channel.early = [*channel.early, (message, prev)][-self._backlog :]

    def _doubt(self, channel: Channel) -> None:
        channel.doubts += 1
        if channel.known:
            channel.passed = self.position
        channel.known = False
        # What is here stays true: reading on from the tail is enough, unless somebody waits for older messages.
        self._want(channel, channel.backlog.tail + 1)
        channel.early = ()
        for subscription in [s for s in _each(channel.parked) if s not in _each(channel.unsure)]:
            self._silence(subscription, channel)

    def _trim(self, channel: Channel, count: int) -> None:
        """Drop what the channel itself has dropped by now."""
        if channel.backlog.trim(count, self.position - int(channel.window * 1e6)):
            channel.changes += 1

    def _settle(self, subscriptions: Iterable[Subscription], now: float) -> Replies:
        """Reply to those of these parked subscriptions, all of known channels, for which there is something to say."""
        groups: dict[Answer, list[Subscription]] = {}
        for subscription in list(subscriptions):
            if not self._covers(subscription):
                continue
            answer = self._answer_now(subscription)
            if answer is None:
                self._await_deadline(subscription)
            else:
                groups.setdefault(answer, []).append(subscription)
        for answered in groups.values():
            self._remove(answered, now)
        return list(groups.items())

    def _covers(self, subscription: Subscription) -> bool:
        """Whether its channels' backlogs still reach down to its start. While it waited, the node may have dropped some
        of what the broker keeps; then it waits for that to be read."""
        for channel in subscription.channels:
            if not channel.backlog.covers(subscription.start):
                self._want(channel, subscription.start)
                self._silence(subscription, channel)
        return not subscription.unknown

    def _silence(self, subscription: Subscription, channel: Channel) -> None:
        """Not a word to this parked subscription before the channel was read."""
        if not subscription.unknown:
            self._ignore_deadline(subscription)
            self._held.discard(subscription)
        subscription.unknown += 1
        channel.unsure = _add(channel.unsure, subscription)

    def _answer_now(self, subscription: Subscription) -> Answer | None:
        """What there is to say to a subscription whose channels are all known; None: nothing yet."""
        start, end = subscription.start, subscription.end
        held = False
        if len(subscription.channels) > 1:
            known = min([max(channel.position - 1, self.position) for channel in subscription.channels])
            if known < end:
                end = known
                held = any(channel.backlog.tail > known for channel in subscription.channels)
        gap = news = False
        changes = 0
        for channel in subscription.channels:
            backlog = channel.backlog
            if backlog:
                self._trim(channel, len(backlog))
            gap = gap or channel.gap(start)
            news = news or start <= backlog.tail
            changes += channel.changes
        if news:
            asked = (subscription.channels, start, end, gap)
            told = self._answers.get(asked)
            if told is not None and told[0] == changes:
                return told[1]
            answer = self._answer_messages(subscription.channels, start, end, gap)
            if answer is not None:
                self._remember(asked, changes, answer)
                return answer
        if gap:
            # Past all of it, or the next poll would be told of the same gap at once.
            beyond = max(channel.backlog.floor for channel in subscription.channels)
            next = max(self._next(subscription), beyond)
            if subscription.parks and next <= max(channel.blind[1] for channel in subscription.channels):
                self._hold(subscription)
                return None
            return Answer((), next, "gap", gap=True)
        if not subscription.parks or self.position > subscription.end:
            return Answer((), self._next(subscription), "timeout")
        if held:
            self._hold(subscription)
        return None

    def _hold(self, subscription: Subscription) -> None:
        self._held.add(subscription)
        self._last = None  # Who asks for the latest now may not be told what this one is to be told.

    def _remember(self, asked: tuple[tuple[Channel, ...], int, int, bool], changes: int, answer: Answer) -> None:
        self._answers_bytes += _ANSWER_BYTES + sum([len(text) for _, text in answer.messages])
        if self._answers_bytes > ANSWERS_BYTES_MAX:
            self.forget_answers()
        self._answers[asked] = changes, answer

    def _answer_messages(self, channels: tuple[Channel, ...], start: int, end: int, gap: bool) -> Answer | None:
        names = tuple([channel.name for channel in channels])
        found = [message for channel in channels for message in channel.backlog.range(start, end)]
        if not found:
            return None
        if len(names) > 1:
            found = sorted({message.id: message for message in found}.values(), key=lambda message: message.id)
        shown: list[tuple[Message, bytes]] = []
        size = 0
        for message in found:
            text = message.json(names)
            size += len(text)
            if shown and size > self._answer_bytes:
                break
            shown.append((message, text))
        next = shown[-1][0].id + 1
        if gap and len(shown) == len(found):
            # Past every floor, or the next poll would be told of the same gap.
            next = max(next, min(end + 1, max(channel.backlog.floor for channel in channels)))
        return Answer(shown, next, "message", gap=gap)

    def _answer_message(self, channel: Channel, message: Message, now: float) -> Replies:
        """Group the polls that wait for this message by what they are shown of it, which is one group as a rule."""
        id = message.id
        parked = _each(channel.parked)
        ready = [s for s in parked if not s.unknown and s.start <= id <= s.end]
        groups: dict[tuple[str, ...], list[Subscription]] = {}
        if len(message.channels) == 1:
            groups[message.channels] = ready
        else:
            published_to = frozenset(message.channels)
            for subscription in ready:
                shown = tuple([c.name for c in subscription.channels if c.name in published_to])
                groups.setdefault(shown, []).append(subscription)
        if len(ready) == len(parked):
            channel.parked = ()  # All at once rather than one by one.
            self._idle[channel] = now
        self._remove(ready, now)
        return [
            (Answer(((message, message.json(shown)),), id + 1, "message"), subscriptions)
            for shown, subscriptions in groups.items()
            if subscriptions
        ]

    def _next(self, subscription: Subscription) -> int:
        """The cursor after an answer without messages. An `end` that has passed is passed by it."""
        if subscription.unknown:
            return subscription.latest or subscription.start
        return max(subscription.start, min(self.position, subscription.end + 1))

    def _end(self, ended: Iterable[Subscription], reason: str, now: float, *, closed: str | None = None) -> Replies:
        groups: dict[tuple[int, bool], list[Subscription]] = {}
        for subscription in ended:
            gap = subscription in self._held and any(
                channel.gap(subscription.start) for channel in subscription.channels
            )
            groups.setdefault((self._next(subscription), gap), []).append(subscription)
        for subscriptions in groups.values():
            self._remove(subscriptions, now)
        return [(Answer((), next, reason, gap=gap, closed=closed), ended) for (next, gap), ended in groups.items()]
