"""The node: hub and broker on the event loop, with a broker that answers when it is told to."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec import structs

from pushup.errors import ChannelNotFound, PushUpError, Unavailable
from pushup.memory import MemoryBroker
from pushup.messages import MAX_ID, Answer, ChannelOptions, History, Poll, Publication
from pushup.metrics import Metrics
from pushup.node import Node
from pushup.settings import Settings


class SlowBroker(MemoryBroker):
    """A memory broker whose reads wait for `gate`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.reads: list[Mapping[str, int]] = []
        self.unwatched: list[str] = []

    async def watch(self, wanted: Mapping[str, int]) -> Mapping[str, History | None]:
        self.reads.append(dict(wanted))
        await self.gate.wait()
        histories = await super().watch(wanted)
        return {name: history and self._cut(history, wanted[name]) for name, history in histories.items()}

    def _cut(self, history: History, start: int) -> History:
        """No more than was asked for, as from a broker far away."""
        if start <= history.floor:
            return history
        messages = [message for message in history.messages if message.id >= start]
        return structs.replace(history, messages=messages, floor=start, whole=False)

    def unwatch(self, channels: Sequence[str]) -> None:
        self.unwatched += channels
        super().unwatch(channels)


class Owner:
    """Waits for what a poll is told."""

    def __init__(self) -> None:
        self.told: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def answer(self, answer: Answer) -> None:
        self.told.set_result(answer)

    def fail(self, error: PushUpError) -> None:
        self.told.set_exception(error)


@asynccontextmanager
async def running(**settings: float) -> AsyncIterator[tuple[Node, SlowBroker]]:
    broker = SlowBroker()
    node = Node(broker, Settings(**settings), Metrics())  # type: ignore[arg-type]
    await node.start()
    try:
        yield node, broker
    finally:
        await node.stop()


async def turns() -> None:
    """Let the event loop do what is due, and what follows from it."""
    for _ in range(5):
        await asyncio.sleep(0)


def poll(*channels: str, start: int = 0, timeout: float = 30.0) -> Poll:
    return Poll(channels, start, MAX_ID, timeout)


async def test_polls_for_one_channel_share_one_read() -> None:
    """A thousand polls of a channel that the node does not watch cost one read."""
    async with running() as (node, broker):
        owners = [Owner() for _ in range(1000)]
        for owner in owners:
            node.poll(poll("a"), owner)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        broker.gate.set()
        await node.publish(Publication(("a",), b"1"))
        await asyncio.gather(*[owner.told for owner in owners])

        assert broker.reads == [{"a": 0}]
        assert node.parked == 0


async def test_polls_that_come_during_a_read_share_it() -> None:
    """Also those with an older cursor: a channel that is new here is read from somewhat further back."""
    async with running() as (node, broker):
        ids = [(await node.publish(Publication(("a",), b"1"))).id for _ in range(3)]
        owners = []
        for start in reversed(ids):
            owners.append(Owner())
            node.poll(poll("a", start=start), owners[-1])
            await turns()
        broker.gate.set()
        answers = await asyncio.gather(*[owner.told for owner in owners])
        await turns()

        assert [len(answer.messages) for answer in answers] == [1, 2, 3]
        assert [list(read) for read in broker.reads] == [["a"]]


async def test_a_poll_from_long_before_a_read_that_is_under_way_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """After that one, and it alone waits for it."""
    monkeypatch.setattr("pushup.node.READ_BEHIND_S", 0)
    async with running() as (node, broker):
        old_id, recent_id = [(await node.publish(Publication(("a",), b"1"))).id for _ in range(2)]
        recent, old = Owner(), Owner()
        node.poll(poll("a", start=recent_id), recent)
        await turns()
        node.poll(poll("a", start=old_id), old)
        await turns()
        under_way = len(broker.reads)
        broker.gate.set()
        answers = await asyncio.gather(recent.told, old.told)

        assert [len(answer.messages) for answer in answers] == [1, 2]
        assert (under_way, broker.reads) == (1, [{"a": recent_id}, {"a": old_id}])


async def test_a_doubt_does_not_wait_for_a_read_that_is_under_way() -> None:
    """What that one brings is worth nothing any more."""
    async with running() as (node, broker):
        owner = Owner()
        node.poll(poll("a"), owner)
        await turns()
        node.on_doubt(["a"])
        await turns()
        under_way = len(broker.reads)
        await node.publish(Publication(("a",), b"1"))
        broker.gate.set()
        await owner.told

        assert under_way == 2


async def test_after_a_read_that_failed_the_next_poll_is_read_for() -> None:
    """Nothing is left of the one that failed."""
    async with running(broker_timeout=0.01) as (node, broker):
        first, second = Owner(), Owner()
        node.poll(poll("a"), first)
        await asyncio.gather(first.told, return_exceptions=True)
        broker.gate.set()
        node.poll(poll("a", timeout=0.0), second)

        assert (await second.told).reason == "timeout"


async def test_a_fan_out_and_the_polls_that_come_right_back_cost_no_read() -> None:
    """Once a channel is watched, parking and answering need nothing from the broker."""
    async with running() as (node, broker):
        broker.gate.set()
        start = 0
        for _ in range(3):
            owners = [Owner() for _ in range(10)]
            for owner in owners:
                node.poll(poll("a", start=start), owner)
            await asyncio.sleep(0.001)
            await node.publish(Publication(("a",), b"1"))
            answers = await asyncio.gather(*[owner.told for owner in owners])
            start = answers[0].next

        assert len(broker.reads) == 1


async def test_a_broker_that_does_not_answer_ends_the_poll_with_an_error() -> None:
    """503 after the broker's time, rather than an empty answer that might be a lie."""
    async with running(broker_timeout=0.01) as (node, _):
        owner = Owner()
        node.poll(poll("a"), owner)

        error = (await asyncio.gather(owner.told, return_exceptions=True))[0]

        assert isinstance(error, Unavailable)
        assert node.parked == 0
        assert node.metrics.broker_read_errors == 1


async def test_polling_an_integer_channel_that_does_not_exist_is_an_error() -> None:
    """404, also for a batch in which only one channel is missing."""
    async with running() as (node, broker):
        broker.gate.set()
        owner = Owner()
        node.poll(poll("a", "17"), owner)

        error = (await asyncio.gather(owner.told, return_exceptions=True))[0]

        assert isinstance(error, ChannelNotFound)
        assert error.members == {"channel": 17}


async def test_a_poll_that_leaves_while_it_is_set_up_is_freed() -> None:
    """Nothing is left of it when the read comes back."""
    async with running() as (node, broker):
        owner = Owner()
        subscription = node.poll(poll("a"), owner)
        assert not isinstance(subscription, Answer)
        await asyncio.sleep(0)
        node.leave(subscription, owner)
        broker.gate.set()
        await node.publish(Publication(("a",), b"1"))

        assert node.parked == 0
        assert not owner.told.done()
        assert node.metrics.answers["gone"] == 1


async def test_the_timer_ends_polls_in_time() -> None:
    """One timer serves all deadlines, and moves forward for an earlier one."""
    async with running() as (node, broker):
        broker.gate.set()
        long, short = Owner(), Owner()
        node.poll(poll("a", timeout=30.0), long)
        node.poll(poll("a", timeout=0.01), short)

        answer = await asyncio.wait_for(short.told, 5.0)

        assert (answer.reason, list(answer.messages)) == ("timeout", [])
        assert answer.next > 0
        assert node.parked == 1


async def test_idle_channels_are_unwatched() -> None:
    """After the linger the broker need not announce the channel any more."""
    async with running(linger=0.0) as (node, broker):
        broker.gate.set()
        owner = Owner()
        node.poll(poll("a", timeout=0.0), owner)
        await owner.told

        node._housekeep()

        assert broker.unwatched == ["a"]
        assert node.watched == 0


async def test_draining_answers_everyone_with_a_cursor() -> None:
    """Readiness goes off first, then every poll is told where to go on."""
    async with running() as (node, broker):
        broker.gate.set()
        owners = [Owner() for _ in range(20)]
        for owner in owners:
            node.poll(poll("a"), owner)
        await asyncio.sleep(0.001)

        draining = asyncio.ensure_future(node.drain(0.2))
        await asyncio.sleep(0)
        ready = node.ready
        answers = await asyncio.gather(*[owner.told for owner in owners])
        await draining

        assert ready is False
        assert {answer.reason for answer in answers} == {"drain"}
        assert all(answer.next > 0 for answer in answers)


async def test_draining_answers_polls_that_are_being_set_up() -> None:
    """A poll whose channel is still being read is answered too, not cut off."""
    async with running() as (node, broker):
        owner = Owner()
        node.poll(poll("a"), owner)
        draining = asyncio.ensure_future(node.drain(0.0))
        await asyncio.sleep(0)
        broker.gate.set()
        await draining

        assert (await owner.told).reason == "drain"


async def test_a_client_that_comes_back_while_draining_waits_for_the_end() -> None:
    """A client is answered once and then held, not sent round in circles for the whole window."""
    async with running() as (node, broker):
        broker.gate.set()
        owner = Owner()
        node.poll(poll("a"), owner)
        await asyncio.sleep(0.001)
        draining = asyncio.ensure_future(node.drain(0.2))
        rounds = 0
        while not draining.done():
            either: list[asyncio.Future[Any]] = [owner.told, draining]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if owner.told.done():
                rounds += 1
                owner = Owner()
                node.poll(poll("a"), owner)
        node._drain(node._hub.waiting())

        assert rounds <= 3


async def test_a_channel_made_after_it_was_polled_keeps_its_own_window() -> None:
    """Creating a channel that is watched already is heard by the node, which had taken it for a default one."""
    async with running() as (node, broker):
        broker.gate.set()
        first, second = Owner(), Owner()
        node.poll(poll("a", timeout=0.0), first)
        await first.told
        await broker.create("a", ChannelOptions(max_messages=1))
        for data in (b"1", b"2"):
            await node.publish(Publication(("a",), data))

        node.poll(poll("a", timeout=0.0), second)

        assert [message.data for message, _ in (await second.told).messages] == [b"2"]


async def test_answers_are_counted_by_reason() -> None:
    """Metrics count every poll once, by what ended it."""
    async with running() as (node, broker):
        broker.gate.set()
        for timeout in (0.0, 30.0):
            owner = Owner()
            node.poll(poll("a", timeout=timeout), owner)
            if timeout:
                await asyncio.sleep(0.001)
                await node.publish(Publication(("a",), b"1"))
            await owner.told

        assert (node.metrics.answers["timeout"], node.metrics.answers["message"]) == (1, 1)
        assert node.metrics.messages_delivered == 1
