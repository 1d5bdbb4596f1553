"""One node on the event loop: joins the hub (who waits) with the broker (what was said), and owns the one timer."""

import asyncio
import logging
import math
import random
from collections.abc import Mapping, Sequence
from itertools import islice

from pushup.broker import Broker, Tell, now_us
from pushup.errors import ChannelNotFound, PushUpError, Unavailable
from pushup.hub import TICKS_PER_SECOND, Hub, Owner, Read, Replies, Subscription, count_polls
from pushup.messages import SECOND, Answer, Message, NodeInfo, Poll, Publication, Receipt, show_channel
from pushup.metrics import Metrics, RealmMetrics
from pushup.settings import Settings
from pushup.version import __version__

log = logging.getLogger("pushup.node")

HOUSEKEEPING_INTERVAL_S = 1.0
DRAIN_STEP_S = 0.05
READ_AT_ONCE = 512
"""Channels that share the time the broker has for a read."""
READ_BEHIND_S = 30
"""Of a channel that is new here so much more is read than its first poll wants: others come back, from about there."""
NEVER = 2**62


class Node:
    """Parks and answers polls, and is the broker's listener. Everything happens on one event loop."""

    def __init__(self, broker: Broker, settings: Settings, metrics: Metrics) -> None:
        self.broker = broker
        self.settings = settings
        self.metrics: RealmMetrics = metrics.realm(settings.realm)
        self._process = metrics
        self.draining = False
        self.address = ""
        """Where clients reach it, for the list of nodes; as `admin_address`, set by whoever listens."""
        self.admin_address = ""
        self._started = 0
        self._hub = Hub(
            answer_bytes=settings.answer_bytes_max, backlog=settings.backlog_messages, linger=settings.linger
        )
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_tick = NEVER
        """The tick the timer is set for."""
        self._jitter = settings.poll_jitter
        self._housekeeper: asyncio.TimerHandle | None = None
        self._reading = False
        self._reads: set[asyncio.Task[None]] = set()
        self._under_way: dict[str, Read] = {}

    @property
    def parked(self) -> int:
        """How many polls wait here."""
        return self._hub.parked

    @property
    def ready(self) -> bool:
        """Whether clients should be sent here."""
        return bool(self._started) and not self.draining and self.broker.ready

    @property
    def state(self) -> str:
        """In a word: starting, ready, unready (the broker is not heard) or draining."""
        if self.draining:
            return "draining"
        return "ready" if self.ready else "unready" if self._started else "starting"

    @property
    def watched(self) -> int:
        """How many channels this node keeps a backlog of."""
        return len(self._hub)

    def busiest(self, count: int) -> list[tuple[str, int, int]]:
        """The channels of this node with the most polls and with the most messages: see `Hub.busiest`."""
        return self._hub.busiest(count)

    async def start(self) -> None:
        """Connect to the broker."""
        await self.broker.start(self)
        self._started = now_us()
        self._housekeep()

    async def stop(self) -> None:
        """Let go of the broker. Polls that still wait are failed."""
        for timer in (self._timer, self._housekeeper):
            if timer is not None:
                timer.cancel()
        for task in self._reads:
            task.cancel()
        await asyncio.gather(*self._reads, return_exceptions=True)
        await self.broker.stop()

    # Polls

    def poll(self, poll: Poll, owner: Owner, most: float = math.inf) -> Answer | Subscription:
        """Answer at once, or park, for `most` seconds at most: then `owner` is told later, once. O(log n)."""
        hub = self._hub
        now = self._loop.time()
        if most >= poll.timeout:
            parked = hub.join(poll, owner, now + poll.timeout * (1 - self._jitter))
            if parked is not None:
                return parked
        timeout = poll.timeout * (1 - self._jitter * random.random())
        if most < timeout:
            timeout = most
        parked = hub.park(poll, owner, now + timeout)
        if parked is None:
            self._advance(now)
            result = hub.subscribe(poll, owner, now, timeout, self.broker.latest())
            if isinstance(result, Answer):
                self._count(result, 1)
                return result
            if hub.wanted:
                self._read_soon()
            parked = result
        if parked.tick < self._timer_tick:
            self._rearm()
        return parked

    def leave(self, subscription: Subscription, owner: Owner) -> None:
        """The client has gone."""
        if self._hub.leave(subscription, owner, self._loop.time()):
            self.metrics.answers["gone"] += 1

    async def drain(self, window: float) -> None:
        """Answer the polls that are parked now with their cursors, spread evenly over `window` seconds.

        Polls that come meanwhile wait for the end of the window: a client that comes back here, because nobody else
        takes it, is not sent round in circles. Returns as soon as nothing is parked.
        """
        self.draining = True
        loop = self._loop
        end = loop.time() + window
        waiting = self._hub.waiting()
        while self._hub.parked and (remaining := end - loop.time()) > 0:
            share = math.ceil(len(waiting) * min(DRAIN_STEP_S / remaining, 1))
            self._drain(waiting[:share])
            del waiting[:share]
            await asyncio.sleep(min(DRAIN_STEP_S, remaining))
        while self._reading or self._reads:
            # Polls in the middle of being set up: their reads end, one way or another, within the broker's time.
            await (asyncio.wait(self._reads) if self._reads else asyncio.sleep(0))
        self._drain(self._hub.waiting())

    def _drain(self, subscriptions: Sequence[Subscription]) -> None:
        now = self._loop.time()
        self._advance(now)
        self._send(self._hub.drain(subscriptions, now))

    # Publications

    async def publish(self, publication: Publication) -> Receipt:
        """Publish one message. Raises what the broker has against it."""
        (result,) = await self.publish_all([publication])
        if isinstance(result, PushUpError):
            raise result
        return result

    async def publish_all(self, publications: Sequence[Publication]) -> Sequence[Receipt | PushUpError]:
        """Publish in order; a result for each."""
        return self._count_results(await self.broker.publish(publications))

    def submit(self, publications: Sequence[Publication], tell: Tell) -> None:
        """Publish in order; `tell` is called once, at once or later, with a result for each."""
        self.broker.submit(publications, lambda results: tell(self._count_results(results)))

    def _count_results(self, results: Sequence[Receipt | PushUpError]) -> Sequence[Receipt | PushUpError]:
        stored = 0
        for result in results:
            if type(result) is Receipt and not result.duplicate:
                stored += 1
            elif isinstance(result, PushUpError):
                self.metrics.publications_refused += 1
            else:
                self.metrics.publications_duplicate += 1
        self.metrics.publications += stored
        return results

    # The broker's listener

    def on_message(self, channel: str, message: Message, prev: int) -> None:
        replies = self._hub.deliver(channel, message, prev, self._loop.time())
        if replies:
            self._send(replies, message)
        if self._hub.wanted:
            self._read_soon()

    def on_closed(self, channel: str) -> None:
        self._advance(self._loop.time())
        self._send(self._hub.close(channel, self._loop.time()))

    def on_doubt(self, channels: Sequence[str] | None) -> None:
        self.metrics.broker_doubts += 1
        self._hub.doubt(channels)
        if self._hub.wanted:
            self._read_soon()

    def on_position(self) -> None:
        self._advance(self._loop.time())

    def about(self) -> NodeInfo:
        metrics = self.metrics
        now = now_us()
        return NodeInfo(
            name=self.settings.name,
            address=self.address,
            admin_address=self.admin_address,
            version=__version__,
            state=self.state,
            started=self._started or now,
            seen=now,
            parked=self.parked,
            channels=self.watched,
            connections=self._process.connections_opened - self._process.connections_closed,
            publications=metrics.publications,
            deliveries=metrics.messages_delivered,
        )

    # Inside

    def _advance(self, now: float) -> None:
        replies = self._hub.advance(self.broker.position(), now)
        if replies:
            self._send(replies)
        if self._hub.wanted:
            self._read_soon()

    def _send(self, replies: Replies, message: Message | None = None) -> None:
        for answer, subscriptions in replies:
            for subscription in subscriptions:
                subscription.owner.answer(answer)
            polls = count_polls(subscriptions)
            self._count(answer, polls)
            if message is not None:
                self.metrics.lag.observe(max(now_us() - message.id, 0) / 1e6, polls)

    def _count(self, answer: Answer, times: int) -> None:
        self.metrics.answers[answer.reason] += times
        self.metrics.messages_delivered += len(answer.messages) * times

    def _read_soon(self) -> None:
        # On the next turn of the loop, so that all polls of this turn share one read.
        if not self._reading:
            self._reading = True
            self._loop.call_soon(self._start_read)

    def _start_read(self) -> None:
        self._reading = False
        # A channel that is being read is read again only after that, if still need be: as a rule it serves all.
        due = [name for name in self._hub.wanted if not self._is_read(name)]
        wanted = iter([(name, self._hub.wanted.pop(name)) for name in due])
        _shrink(self._hub.wanted)
        while reads := dict(islice(wanted, READ_AT_ONCE)):
            self._under_way.update(reads)
            task = self._loop.create_task(self._read(reads))
            self._reads.add(task)
            task.add_done_callback(self._reads.discard)

    def _is_read(self, name: str) -> bool:
        read = self._under_way.get(name)
        return read is not None and self._hub.holds(read)

    async def _read(self, reads: Mapping[str, Read]) -> None:
        self.metrics.broker_reads += len(reads)
        try:
            await self._fetch(reads)
        finally:
            for name, read in reads.items():
                if self._under_way.get(name) is read:
                    del self._under_way[name]
            _shrink(self._under_way)
        if self._hub.wanted:
            self._read_soon()
        self._rearm()

    async def _fetch(self, reads: Mapping[str, Read]) -> None:
        try:
            async with asyncio.timeout(self.settings.broker_timeout):
                histories = await self.broker.watch({name: _reach(read) for name, read in reads.items()})
        except (PushUpError, TimeoutError) as error:
            self.metrics.broker_read_errors += len(reads)
            log.warning("cannot read channels", extra={"channels": len(reads), "error": str(error) or "time-out"})
            self._fail_all(reads)
            return
        except Exception:
            log.exception("a read failed")
            self._fail_all(reads)
            return
        self._advance(self._loop.time())
        for name, read in reads.items():
            history = histories[name]
            if history is None:
                self._fail(read, ChannelNotFound(show_channel(name)))
            elif name not in self._hub:
                self.broker.unwatch([name])
            else:
                self._send(self._hub.learn(read, history, self._loop.time()))

    def _fail_all(self, reads: Mapping[str, Read]) -> None:
        for read in reads.values():
            self._fail(read, Unavailable("the broker did not answer in time"))

    def _fail(self, read: Read, error: PushUpError) -> None:
        for subscription in self._hub.fail(read, self._loop.time()):
            self.metrics.answers["error"] += subscription.polls
            subscription.owner.fail(error)

    def _rearm(self) -> None:
        tick = self._hub.next_tick()
        if tick is not None and tick < self._timer_tick:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_tick = tick
            self._timer = self._loop.call_at(tick / TICKS_PER_SECOND, self._expire)

    def _expire(self) -> None:
        self._timer, self._timer_tick = None, NEVER
        now = self._loop.time()
        self._advance(now)
        self._send(self._hub.expire(now))
        self._rearm()

    def _housekeep(self) -> None:
        self._hub.forget_answers()
        forgotten = self._hub.forget_idle(self._loop.time())
        if forgotten:
            self.broker.unwatch(forgotten)
        self._housekeeper = self._loop.call_later(HOUSEKEEPING_INTERVAL_S, self._housekeep)


def _shrink(reads: dict[str, Read]) -> None:
    """Free the memory of what is empty again: a dict keeps as much as it ever needed."""
    if not reads:
        reads.clear()


def _reach(read: Read) -> int:
    """From where on to ask for a channel's messages."""
    return max(read.start - READ_BEHIND_S * SECOND, 0) if read.first else read.start
