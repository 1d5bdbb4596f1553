"""The built-in broker: one process, nothing to install, messages gone when it stops.

`MemoryStore` is synchronous and is told the time (microseconds since the Unix epoch); `MemoryBroker` gives it a clock,
a timer and the broker's coroutines.
"""

import asyncio
import contextlib
import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Final

from sortedcontainers import SortedDict

from pushup.backlog import Backlog, size_of
from pushup.broker import Listener, Tell, now_us
from pushup.errors import ChannelExists, ChannelNotFound, KeyReused, PushUpError, RealmFull
from pushup.messages import (
    MAX_ID,
    SECOND,
    ChannelInfo,
    ChannelOptions,
    History,
    Message,
    NodeInfo,
    Publication,
    Receipt,
    Retention,
    is_integer,
    show_channel,
)

SWEEP_INTERVAL_S: Final = 1.0
CLOSED_REMEMBERED: Final = 10_000
RETRY_MAX_S: Final = 60
"""The longest a publisher is told to wait for room in a realm that is full."""


class _Channel:
    __slots__ = ("backlog", "created", "expires", "lasts", "looked_at", "max_messages", "ttl", "window")

    def __init__(self, backlog: Backlog, options: ChannelOptions, defaults: Retention, now: int) -> None:
        self.backlog = backlog
        self.created = now
        self.window = defaults.window if options.window is None else options.window
        self.max_messages = defaults.max_messages if options.max_messages is None else options.max_messages
        self.renew(defaults.ttl if options.ttl is None else options.ttl, now)
        self.looked_at = MAX_ID
        """When the store will next look at this channel for something to drop: never after `due`."""

    def renew(self, ttl: float, now: int) -> None:
        """It lasts so many seconds from now on, and as long from each publication."""
        self.ttl = ttl
        self.lasts = _in_ids(ttl)
        self.expires = now + self.lasts

    @property
    def due(self) -> int:
        """When something of this channel expires next: its oldest message, or itself."""
        first = self.backlog.first
        return self.expires if first is None else min(self.expires, first + _in_ids(self.window) + 1)

    def trim(self, now: int) -> int:
        """Drop what is too old or too much; the size of the data that went."""
        return size_of(self.backlog.trim(self.max_messages, now - _in_ids(self.window)))


@lru_cache
def _in_ids(seconds: float) -> int:
    """So many seconds in ids: one object for all channels that have the same."""
    return int(seconds * SECOND)


class MemoryStore:
    """Channels and messages of one realm. Calls the listener in the middle of its methods, in id order."""

    def __init__(self, retention: Retention, now: int) -> None:
        self._retention = retention
        self.next = now + 1
        """Above every id given so far. (What `position` said last is one object, as thousands keep it.)"""
        self._floor = now
        """What a channel not known here had before this id is not known either."""
        self._channels: SortedDict[str, _Channel] = SortedDict()
        self._bytes = 0
        """Of data in all of them."""
        self._closed: OrderedDict[str, int] = OrderedDict()
        """Tails of channels that were closed, so that who comes back to one is told of the gap."""
        self._looks: list[tuple[int, str]] = []
        """A heap of when to look at which channel; an entry that is not the channel's `looked_at` is stale."""
        self._keys: OrderedDict[str, tuple[int, bytes, int]] = OrderedDict()
        """Idempotency keys: when to forget, a digest of what was published, its id. The oldest first."""
        self._watched: set[str] = set()
        self.listener: Listener | None = None

    def position(self, now: int) -> int:
        """An id above every one given so far; none below it is given from now on. O(1)."""
        self.next = max(self.next, now)
        return self.next

    def watch(self, name: str, now: int) -> History | None:
        """Watch the channel and read all of it; None if it would have to be created. O(messages)."""
        channel = self._channels.get(name)
        if channel is None:
            if not self._comes_into_being(name):
                return None
            self._watched.add(name)
            tail = self._closed.get(name, 0)
            floor = max(tail + 1, self._floor)
            keep = self._retention
            return History((), floor, tail, self.position(now), True, keep.window, keep.max_messages)
        self._watched.add(name)
        self._trim(channel, now)
        backlog = channel.backlog
        messages = backlog.range(0, MAX_ID)
        return History(
            messages, backlog.floor, backlog.tail, self.position(now), True, channel.window, channel.max_messages
        )

    def unwatch(self, name: str) -> None:
        self._watched.discard(name)

    def publish(self, publication: Publication, now: int) -> Receipt:
        """Store and announce. O(channels + polls). Raises ChannelNotFound, KeyReused, RealmFull."""
        channels, data, key = publication.channels, publication.data, publication.key
        known, watched = self._channels, self._watched
        size, room = len(data), self._retention.realm_bytes - self._bytes
        if key is None and len(channels) == 1 and size <= room:
            # The short cut, for there may be hundreds of thousands in a second: nobody polls, nothing comes into being.
            (name,) = channels
            channel = known.get(name)
            if channel is not None and name not in watched:
                id = self._give_id(now)
                self._keep(name, channel, Message(id, channels, data), size, now)
                return Receipt(id)
        if key is not None:
            self._forget_keys(now)
            seen = self._keys.get(key)
            if seen is not None:
                _, digest, id = seen
                if digest != publication.digest():
                    raise KeyReused(f"key {key!r} was used for a different publication")
                return Receipt(id, duplicate=True)
        for name in channels:
            if name not in known and not self._comes_into_being(name):
                raise ChannelNotFound(show_channel(name))
        if len(channels) * size > room:
            self._make_room(publication, now)
        id = self._give_id(now)
        if key is not None:
            self._keys[key] = (now + _in_ids(self._retention.idempotency), publication.digest(), id)
        message = Message(id, channels, data)
        announcements: list[tuple[str, int]] = []
        for name in channels:
            channel = known.get(name) or self._add(name, ChannelOptions(), now)
            if name in watched:
                announcements.append((name, channel.backlog.tail))
            self._keep(name, channel, message, size, now)
        if self.listener is not None:
            for name, prev in announcements:
                if name in watched:
                    self.listener.on_message(name, message, prev)
        return Receipt(id)

    def _keep(self, name: str, channel: _Channel, message: Message, size: int, now: int) -> None:
        count = channel.backlog.append(message)
        self._bytes += size
        expires = channel.expires = now + channel.lasts
        if channel.looked_at <= now:
            self._trim(channel, now)  # Otherwise nothing of it is too old yet.
        elif count > channel.max_messages:
            self._bytes -= channel.backlog.drop_oldest().size
        if count == 1 or expires < channel.looked_at:
            self._look(name, channel)  # Otherwise it had messages, and is due no earlier than before.

    def create(self, name: str | None, options: ChannelOptions, now: int) -> ChannelInfo:
        if name is None:
            name = str(self._give_id(now))
        elif name in self._channels:
            raise ChannelExists(show_channel(name))
        channel = self._add(name, options, now)
        self._look(name, channel)
        if name in self._watched and self.listener is not None:
            # Who watched the name before it was a channel took it to have the defaults.
            self.listener.on_doubt([name])
        return self._info(name, channel)

    def renew(self, name: str, ttl: float | None, now: int) -> ChannelInfo:
        channel = self._get(name)
        channel.renew(channel.ttl if ttl is None else ttl, now)
        self._trim(channel, now)
        self._look(name, channel)
        return self._info(name, channel)

    def close(self, name: str) -> None:
        """O(log channels + polls)."""
        channel = self._get(name)
        del self._channels[name]
        self._bytes -= channel.backlog.pushed_out(0)
        if channel.backlog.tail and not is_integer(name):
            self._closed[name] = channel.backlog.tail
            if len(self._closed) > CLOSED_REMEMBERED:
                _, tail = self._closed.popitem(last=False)
                self._floor = max(self._floor, tail + 1)
        if name in self._watched:
            self._watched.discard(name)
            if self.listener is not None:
                self.listener.on_closed(name)

    def describe(self, name: str, now: int) -> ChannelInfo:
        channel = self._get(name)
        self._trim(channel, now)
        return self._info(name, channel)

    def channels(self, after: str, limit: int, now: int) -> list[ChannelInfo]:
        """O(log channels + limit)."""
        names = list(islice(self._channels.irange(after, inclusive=(False, True)), limit))
        return [self.describe(name, now) for name in names]

    def sweep(self, now: int) -> None:
        """Drop what is too old: messages, and channels whose ttl is over. O(log channels) for each that is due."""
        self._forget_keys(now)
        for name in self._trim_due(now):
            self.close(name)

    def _give_id(self, now: int) -> int:
        id = now if now > self.next else self.next
        self.next = id + 1
        return id

    def _trim_due(self, now: int) -> list[str]:
        """Drop the messages that are too old; the channels whose ttl is over, at which nobody will look again."""
        over = []
        while self._looks and self._looks[0][0] <= now:
            at, name = heapq.heappop(self._looks)
            channel = self._channels.get(name)
            if channel is None or channel.looked_at != at:
                continue
            self._trim(channel, now)
            channel.looked_at = MAX_ID
            if channel.expires <= now:
                over.append(name)
            else:
                self._look(name, channel)
        return over

    def _make_room(self, publication: Publication, now: int) -> None:
        """Drop what is too old. Raises RealmFull if that is not enough.

        What the publication would push out of its channels, because they are full by count, makes room, too.
        """
        over = self._trim_due(now)
        for name in over:
            self._look(name, self._channels[name])
        targets = [self._channels[name] for name in publication.channels if name in self._channels]
        pushed_out = sum(channel.backlog.pushed_out(channel.max_messages - 1) for channel in targets)
        limit = self._retention.realm_bytes
        if self._bytes - pushed_out + len(publication.channels) * len(publication.data) > limit:
            due = self._looks[0][0] if self._looks else MAX_ID
            seconds = math.ceil(min(due - now, RETRY_MAX_S * SECOND) / SECOND)
            detail = f"{self._bytes} bytes of data are cached in the realm; the limit is {limit}"
            raise RealmFull(detail, max(1, seconds))

    def _trim(self, channel: _Channel, now: int) -> None:
        self._bytes -= channel.trim(now)

    def _get(self, name: str) -> _Channel:
        channel: _Channel | None = self._channels.get(name)
        if channel is None:
            raise ChannelNotFound(show_channel(name))
        return channel

    def _add(self, name: str, options: ChannelOptions, now: int) -> _Channel:
        """A new channel, still to be looked at."""
        tail = self._closed.pop(name, 0)
        channel = _Channel(Backlog(max(tail + 1, self._floor), tail), options, self._retention, now)
        self._channels[name] = channel
        return channel

    def _look(self, name: str, channel: _Channel) -> None:
        due = channel.due
        if due < channel.looked_at:
            channel.looked_at = due
            heapq.heappush(self._looks, (due, name))

    def _comes_into_being(self, name: str) -> bool:
        return self._retention.implicit and not is_integer(name)

    def _forget_keys(self, now: int) -> None:
        while self._keys:
            key, (until, _, _) = next(iter(self._keys.items()))
            if until > now:
                return
            del self._keys[key]

    def _info(self, name: str, channel: _Channel) -> ChannelInfo:
        backlog = channel.backlog
        return ChannelInfo(
            channel=name,
            created=channel.created,
            expires=channel.expires,
            ttl=channel.ttl,
            window=channel.window,
            max_messages=channel.max_messages,
            messages=len(backlog),
            first=backlog.first,
            last=backlog.tail if backlog else None,
        )


class MemoryBroker:
    """A MemoryStore on the event loop. See `broker.Broker` for the contract."""

    name = "memory://"

    def __init__(self, retention: Retention | None = None, clock: Callable[[], int] = now_us) -> None:
        self._clock = clock
        self._store = MemoryStore(retention or Retention(), clock())
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return True

    async def start(self, listener: Listener) -> None:
        self._store.listener = listener
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            self._store.sweep(self._clock())

    def position(self) -> int:
        return self._store.position(self._clock())

    def latest(self) -> int:
        return self._store.next

    async def watch(self, wanted: Mapping[str, int]) -> Mapping[str, History | None]:
        now = self._clock()
        return {name: self._store.watch(name, now) for name in wanted}

    def unwatch(self, channels: Sequence[str]) -> None:
        for name in channels:
            self._store.unwatch(name)

    async def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | PushUpError]:
        return self._publish(publications)

    def submit(self, publications: Sequence[Publication], tell: Tell) -> None:
        tell(self._publish(publications))

    def _publish(self, publications: Sequence[Publication]) -> list[Receipt | PushUpError]:
        now = self._clock()  # Once: the rest of an array is stored within microseconds, and ids go on by themselves.
        publish = self._store.publish
        results: list[Receipt | PushUpError] = []
        for publication in publications:
            try:
                results.append(publish(publication, now))
            except PushUpError as error:
                results.append(error)
        return results

    async def create(self, name: str | None, options: ChannelOptions) -> ChannelInfo:
        return self._store.create(name, options, self._clock())

    async def renew(self, name: str, ttl: float | None) -> ChannelInfo:
        return self._store.renew(name, ttl, self._clock())

    async def close(self, name: str) -> None:
        self._store.close(name)

    async def describe(self, name: str) -> ChannelInfo:
        return self._store.describe(name, self._clock())

    async def channels(self, after: str, limit: int) -> Sequence[ChannelInfo]:
        return self._store.channels(after, limit, self._clock())

    async def nodes(self) -> Sequence[NodeInfo]:
        return [self._store.listener.about()] if self._store.listener is not None else []
