"""The contract of `broker.Broker`, run against every broker there is."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast
from uuid import uuid4

import pytest
from fakeredis import FakeAsyncRedisConnection, FakeServer
from redis.asyncio.connection import AbstractConnection

from cluster import Cluster
from cluster.state import Kind
from pushup.address import Address
from pushup.broker import Broker
from pushup.errors import ChannelExists, ChannelNotFound, KeyReused, RealmFull
from pushup.memory import MemoryBroker
from pushup.messages import ChannelOptions, History, Message, NodeInfo, Publication, Receipt, Retention
from pushup.redis_broker import RedisBroker
from pushup.redis_url import Servers, parse_servers
from tests.redis_server import RedisServer
from tests.resp import encode_again
from tests.support import PATIENCE_S, eventually

ABOUT = NodeInfo("me", "127.0.0.1:1", "127.0.0.1:2", "1", "ready", 1, 1, 0, 0, 0, 0, 0)


class Recorder:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, int]] = []
        self.closed: list[str] = []
        self.doubted: list[str] = []

    def on_message(self, channel: str, message: Message, prev: int) -> None:
        self.heard.append((channel, message.id, prev))

    def on_closed(self, channel: str) -> None:
        self.closed.append(channel)

    def on_doubt(self, channels: Sequence[str] | None) -> None:
        self.doubted += channels if channels is not None else ["everything"]

    def on_position(self) -> None:
        pass

    def about(self) -> NodeInfo:
        return ABOUT


Started = AbstractAsyncContextManager[tuple[Broker, Recorder]]


@asynccontextmanager
async def memory(retention: Retention) -> AsyncIterator[tuple[Broker, Recorder]]:
    broker, recorder = MemoryBroker(retention), Recorder()
    await broker.start(recorder)
    try:
        yield broker, recorder
    finally:
        await broker.stop()


class Encoded:
    """What fakeredis replies, objects, as the bytes in which Redis would."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    async def read(self, size: int) -> bytes:
        return encode_again(await self._reader.read(size))


class FakeConnection(FakeAsyncRedisConnection):
    """One whose stream can be read."""

    async def connect(self) -> None:
        await super().connect()  # type: ignore[no-untyped-call]
        self._reader = cast(Any, Encoded(self._reader))


@asynccontextmanager
async def fake(retention: Retention) -> AsyncIterator[tuple[Broker, Recorder]]:
    """fakeredis: the same functions in a Redis that is not one."""
    server = FakeServer()
    async with redis_broker(
        parse_servers("redis://fake"), retention, lambda address: FakeConnection(server=server, protocol=2)
    ) as started:
        yield started


@asynccontextmanager
async def redis_broker(
    servers: Servers, retention: Retention, dialer: Callable[[Address], AbstractConnection] | None = None
) -> AsyncIterator[tuple[Broker, Recorder]]:
    """In a realm of its own."""
    broker = RedisBroker(servers, f"test-{uuid4().hex}", retention, node="me", timeout=PATIENCE_S, dialer=dialer)
    recorder = Recorder()
    await broker.start(recorder)
    try:
        yield broker, recorder
    finally:
        await broker.stop()


@pytest.fixture(scope="module")
def sentinel_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A master and two replicas, which three sentinels watch."""
    yield from _url(tmp_path_factory, "sentinel")


@pytest.fixture(scope="module")
def cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Three masters, over which the tests' realms spread, with a replica each."""
    yield from _url(tmp_path_factory, "cluster")


def _url(tmp_path_factory: pytest.TempPathFactory, store: Kind) -> Iterator[str]:
    cluster = Cluster.up(tmp_path_factory.mktemp(store), nodes=1, store=store)
    try:
        yield cluster.broker
    finally:
        cluster.down()


USERS: Final = Path(__file__).parent.parent / "compose/redis/users.acl"


def rules(user: str) -> list[str]:
    """What the file lets a user of Redis do, selectors in one piece."""
    (line,) = [line for line in USERS.read_text().splitlines() if line.startswith(f"user {user} ")]
    return re.findall(r"\([^)]*\)|\S+", line)[2:]


@pytest.fixture(scope="module")
def user_url(redis_server: RedisServer) -> Iterator[str]:
    """A Redis in which the node may do no more than it must, in any realm."""
    with redis_server.client() as operator:
        operator.execute_command("ACL", "SETUSER", "node", "reset", *rules("node"), "~pushup:*", "&pushup:*")
        yield redis_server.url.replace("//", "//node:NODE-PASSWORD@")
        operator.execute_command("ACL", "DELUSER", "node")


@pytest.fixture(params=["memory", "fakeredis", "redis", "user", "sentinel", "cluster"])
def broker(request: pytest.FixtureRequest) -> "Make":
    match request.param:
        case "memory":
            return lambda **retention: memory(Retention(**retention))
        case "fakeredis":
            return lambda **retention: fake(Retention(**retention))
        case "redis":
            url = request.getfixturevalue("redis_server").url
        case store:
            url = request.getfixturevalue(f"{store}_url")
    return lambda **retention: redis_broker(parse_servers(url), Retention(**retention))


Make = Callable[..., Started]


def publication(*channels: str, data: bytes = b"1", key: str | None = None) -> Publication:
    return Publication(channels, data, key)


async def publish(broker: Broker, *channels: str, data: bytes = b"1", key: str | None = None) -> int:
    (receipt,) = await broker.publish([publication(*channels, data=data, key=key)])
    assert isinstance(receipt, Receipt), receipt
    return receipt.id


async def watch(broker: Broker, channel: str, start: int = 0) -> History:
    history = (await broker.watch({channel: start}))[channel]
    assert history is not None
    return history


async def caught_up(broker: Broker, id: int) -> None:
    """Return once everything announced up to this id has been heard."""
    await eventually(lambda: broker.position() > id, "the broker catches up")


async def test_ids_increase_over_all_channels(broker: Make) -> None:
    """No two messages of a realm share an id, and later ones have larger ones."""
    async with broker() as (store, _):
        ids = [await publish(store, "ab"[n % 2]) for n in range(100)]

        assert all(a < b for a, b in pairwise(ids))


async def test_a_history_holds_what_was_published_before(broker: Make) -> None:
    """Reading a channel yields its messages in order, with their data and all their channels."""
    async with broker() as (store, _):
        first, second = await publish(store, "a", data=b'{"x":1}'), await publish(store, "b", "a")

        history = await watch(store, "a")

        assert [(m.id, m.channels, m.data) for m in history.messages] == [
            (first, ("a",), b'{"x":1}'),
            (second, ("b", "a"), b"1"),
        ]
        assert (history.tail, history.whole) == (second, True)
        assert history.position > second


async def test_a_watched_channel_is_heard_with_its_prev(broker: Make) -> None:
    """Every message stored after watch returned reaches the listener, chained by prev; other channels' do not."""
    async with broker() as (store, recorder):
        first = await publish(store, "a")
        await watch(store, "a")
        second, _, third = await publish(store, "a"), await publish(store, "b"), await publish(store, "a", "b")
        await caught_up(store, third)

        assert recorder.heard == [("a", second, first), ("a", third, second)]


async def test_a_message_to_two_watched_channels_is_announced_on_both(broker: Make) -> None:
    """Each channel hears it with its own prev."""
    async with broker() as (store, recorder):
        first = await publish(store, "a")
        await store.watch({"a": 0, "b": 0})
        both = await publish(store, "a", "b")
        await caught_up(store, both)

        assert recorder.heard == [("a", both, first), ("b", both, 0)]


async def test_an_unwatched_channel_falls_silent(broker: Make) -> None:
    """After unwatch nothing of the channel is announced."""
    async with broker() as (store, recorder):
        await watch(store, "a")
        store.unwatch(["a"])
        await caught_up(store, await publish(store, "a"))

        assert recorder.heard == []


async def test_position_is_between_what_was_announced_and_what_comes(broker: Make) -> None:
    """Messages announced so far are below the position, later ones are not."""
    async with broker() as (store, _):
        await watch(store, "a")
        before = await publish(store, "a")
        await caught_up(store, before)
        position = store.position()
        after = await publish(store, "a")

        assert before < position <= after


async def test_the_floor_of_an_untouched_channel_admits_what_came_before(broker: Make) -> None:
    """A store knows nothing of the time before it existed: that is below every floor."""
    async with broker() as (store, _):
        birth = store.position()

        assert 0 < (await watch(store, "never")).floor <= birth


async def test_max_messages_trims_and_says_so(broker: Make) -> None:
    """Only the newest messages are kept, and the floor moves above the newest one dropped."""
    async with broker(max_messages=2) as (store, _):
        ids = [await publish(store, "a") for _ in range(4)]

        history = await watch(store, "a")

        assert [m.id for m in history.messages] == ids[2:]
        assert ids[1] < history.floor <= ids[2]


async def test_a_window_of_nothing_keeps_nothing(broker: Make) -> None:
    """A channel whose window is over has no messages, a tail, and a floor above it."""
    async with broker(window=0.0) as (store, _):
        await publish(store, "a")
        tail = await publish(store, "a")
        store.position()

        history = await watch(store, "a")

        assert history.tail == tail
        assert [m.id for m in history.messages if m.id < tail] == []


async def test_a_key_makes_a_retry_safe(broker: Make) -> None:
    """The same publication with the same key gets the first one's id and is stored once."""
    async with broker() as (store, recorder):
        await watch(store, "a")
        first = await store.publish([publication("a", key="k")])
        again = await store.publish([publication("a", key="k")])

        assert isinstance(first[0], Receipt)
        await caught_up(store, await publish(store, "b"))
        assert again == [Receipt(first[0].id, duplicate=True)]
        assert len(recorder.heard) == 1


async def test_a_key_belongs_to_one_publication(broker: Make) -> None:
    """The same key with other data or channels is refused, and nothing is stored."""
    async with broker() as (store, recorder):
        await watch(store, "a")
        await publish(store, "a", key="k")
        results = await store.publish([publication("a", data=b"2", key="k"), publication("b", key="k")])
        await caught_up(store, await publish(store, "c"))

        assert [type(result) for result in results] == [KeyReused, KeyReused]
        assert len(recorder.heard) == 1


async def test_a_key_is_forgotten_after_the_window(broker: Make) -> None:
    """With no window, the same key stores again."""
    async with broker(idempotency=0.0) as (store, _):
        first, second = await publish(store, "a", key="k"), await publish(store, "a", key="k")

        assert second > first


async def test_a_batch_has_a_result_for_each_item(broker: Make) -> None:
    """One bad publication spoils no other, and order is kept."""
    async with broker() as (store, _):
        one, bad, two = await store.publish([publication("a"), publication("17"), publication("a")])

        assert isinstance(one, Receipt)
        assert isinstance(bad, ChannelNotFound)
        assert isinstance(two, Receipt)
        assert one.id < two.id


async def test_a_batch_of_nothing_has_no_results(broker: Make) -> None:
    """An array of which every item was wrong."""
    async with broker() as (store, _):
        async with asyncio.timeout(PATIENCE_S):
            assert list(await store.publish([])) == []


async def test_a_publication_is_stored_everywhere_or_nowhere(broker: Make) -> None:
    """If one of its channels does not exist, none gets it."""
    async with broker() as (store, _):
        (result,) = await store.publish([publication("a", "17")])

        assert isinstance(result, ChannelNotFound)
        assert list((await watch(store, "a")).messages) == []


async def test_a_full_realm_takes_nothing_more(broker: Make) -> None:
    """A publication that does not fit is refused alone: it is not stored, not heard, and nobody is told a gap."""
    async with broker(realm_bytes=10) as (store, recorder):
        await store.watch({"a": 0, "b": 0})
        first = await publish(store, "a", "b", data=b"1234")
        big, small, none = await store.publish(
            [publication("a", data=b"123"), publication("a", data=b"12"), publication("c")]
        )
        assert isinstance(small, Receipt)
        await caught_up(store, small.id)
        history = await watch(store, "a")

        assert isinstance(big, RealmFull)
        assert isinstance(none, RealmFull)
        assert 1 <= big.members["retry_after"] <= 60
        assert big.detail == "8 bytes of data are cached in the realm; the limit is 10"
        assert recorder.heard == [("a", first, 0), ("b", first, 0), ("a", small.id, first)]
        assert [m.id for m in history.messages] == [first, small.id]
        assert history.floor <= first
        assert [info.channel for info in await store.channels("", 10)] == ["a", "b"]


async def test_a_full_realm_knows_what_it_has(broker: Make) -> None:
    """Who repeats a publication that is stored gets its id."""
    async with broker(realm_bytes=4) as (store, _):
        first = await publish(store, "a", data=b"1234", key="k")
        again, other = await store.publish([publication("a", data=b"1234", key="k"), publication("a", key="l")])

        assert again == Receipt(first, duplicate=True)
        assert isinstance(other, RealmFull)


async def test_a_full_realm_has_room_again(broker: Make) -> None:
    """When a channel is closed, when a message pushes out an older one, and when messages are too old."""
    async with broker(realm_bytes=4, max_messages=2) as (store, _):
        await store.create("short", ChannelOptions(window=0.0))
        await publish(store, "a", data=b"12")
        await publish(store, "a", data=b"34")
        pushing = await store.publish([publication("a", data=b"567"), publication("a", data=b"56")])
        refused = await store.publish([publication("b")])
        await store.close("a")
        await publish(store, "short", data=b"1234")
        later = await publish(store, "b", data=b"1234")

        assert [type(result) for result in [*pushing, *refused]] == [RealmFull, Receipt, RealmFull]
        assert [m.id for m in (await watch(store, "b")).messages] == [later]


async def test_create_hands_out_integers_never_used_before(broker: Make) -> None:
    """A channel without a name has a unique integer id, an expiry, and takes publications."""
    async with broker(ttl=50.0) as (store, _):
        one, two = await store.create(None, ChannelOptions()), await store.create(None, ChannelOptions())
        await publish(store, one.channel)

        assert one.channel.isdecimal()
        assert one.channel != two.channel
        assert one.expires == one.created + 50_000_000
        assert list((await watch(store, two.channel)).messages) == []


async def test_a_channel_keeps_its_own_options(broker: Make) -> None:
    """ttl, window and max_messages given at creation win over the defaults."""
    async with broker() as (store, _):
        info = await store.create("a", ChannelOptions(ttl=5.0, window=2.0, max_messages=1))
        await publish(store, "a")
        last = await publish(store, "a")

        history = await watch(store, "a")

        assert (info.ttl, info.window, info.max_messages) == (5.0, 2.0, 1)
        assert (history.window, history.max_messages) == (2.0, 1)
        assert [m.id for m in history.messages] == [last]


async def test_making_a_channel_that_is_watched_gives_reason_for_doubt(broker: Make) -> None:
    """Who watched a name before it was created hears that its options are not what they seemed."""
    async with broker() as (store, recorder):
        await watch(store, "a")
        await store.create("a", ChannelOptions(window=7.0))
        await eventually(lambda: recorder.doubted != [], "the doubt is heard")

        assert recorder.doubted == ["a"]
        assert (await watch(store, "a")).window == 7.0


async def test_a_name_is_taken_once(broker: Make) -> None:
    """Creating a channel that exists is refused."""
    async with broker() as (store, _):
        await store.create("a", ChannelOptions())

        with pytest.raises(ChannelExists):
            await store.create("a", ChannelOptions())


async def test_renew_puts_off_the_expiry(broker: Make) -> None:
    """Renewing counts the ttl from now on, and may change it."""
    async with broker(ttl=10.0) as (store, _):
        created = await store.create("a", ChannelOptions())
        same = await store.renew("a", None)
        longer = await store.renew("a", 100.0)

        assert same.expires >= created.expires
        assert longer.expires >= created.expires + 90_000_000
        assert longer.ttl == 100.0


async def test_publishing_puts_off_the_expiry(broker: Make) -> None:
    """A channel expires its ttl after its last publication."""
    async with broker(ttl=10.0) as (store, _):
        created = await store.create("a", ChannelOptions())
        id = await publish(store, "a")

        info = await store.describe("a")

        assert info.expires >= max(created.expires, id + 10_000_000 - 1)


async def test_closing_is_announced_and_final(broker: Make) -> None:
    """A closed channel's watchers hear of it; an integer channel is gone for good."""
    async with broker() as (store, recorder):
        channel = (await store.create(None, ChannelOptions())).channel
        await watch(store, channel)
        await store.close(channel)
        await eventually(lambda: recorder.closed != [], "the end is heard")

        assert recorder.closed == [channel]
        assert (await store.watch({channel: 0}))[channel] is None
        with pytest.raises(ChannelNotFound):
            await store.describe(channel)


async def test_what_a_closed_channel_had_is_below_its_floor(broker: Make) -> None:
    """A named channel may come back, empty; who was in the middle of it finds a floor above what was lost."""
    async with broker() as (store, _):
        await publish(store, "a")
        last = await publish(store, "a")
        await store.close("a")

        empty = await watch(store, "a")
        again = await publish(store, "a")
        reborn = await watch(store, "a")

        assert (list(empty.messages), empty.whole) == ([], True)
        assert last < empty.floor <= again
        assert [m.id for m in reborn.messages] == [again]
        assert last < reborn.floor <= again


@pytest.mark.parametrize("operation", ["renew", "close", "describe"])
async def test_what_does_not_exist_is_said(broker: Make, operation: str) -> None:
    """Renewing, closing and describing need a channel."""
    async with broker() as (store, _):
        arguments = ["nothing", None] if operation == "renew" else ["nothing"]

        with pytest.raises(ChannelNotFound, match="channel nothing does not exist"):
            await getattr(store, operation)(*arguments)


async def test_explicit_channels_only(broker: Make) -> None:
    """Where names do not come into being by themselves, an unknown name is as unknown as an integer."""
    async with broker(implicit=False) as (store, _):
        (result,) = await store.publish([publication("a")])
        unknown = (await store.watch({"a": 0}))["a"]
        await store.create("a", ChannelOptions())

        assert isinstance(result, ChannelNotFound)
        assert unknown is None
        assert await publish(store, "a")


async def test_describe_counts(broker: Make) -> None:
    """A description holds the number of cached messages, the first and the last id."""
    async with broker() as (store, _):
        await store.create("a", ChannelOptions())
        empty = await store.describe("a")
        first, last = await publish(store, "a"), await publish(store, "a")
        full = await store.describe("a")

        assert (empty.messages, empty.first, empty.last) == (0, None, None)
        assert (full.messages, full.first, full.last) == (2, first, last)


async def test_channels_are_listed_by_name_in_pages(broker: Make) -> None:
    """Pages follow on each other by the last name, and leave nothing out."""
    async with broker() as (store, _):
        for name in ("c", "a", "d", "b"):
            await store.create(name, ChannelOptions())

        first = await store.channels("", 3)
        second = await store.channels(first[-1].channel, 3)

        assert [info.channel for info in first] == ["a", "b", "c"]
        assert [info.channel for info in second] == ["d"]


async def test_a_broker_that_is_connected_is_ready_and_lists_its_node(broker: Make) -> None:
    """The node says of itself what its listener does."""
    async with broker() as (store, _):
        (node,) = await store.nodes()

        assert store.ready
        assert (node.name, node.address, node.state) == (ABOUT.name, ABOUT.address, ABOUT.state)


async def test_odd_names_and_data_come_back_as_they_were(broker: Make) -> None:
    """Whatever a channel may be called, and whatever JSON holds."""
    name, data = 'a b"{}\\/:* é 🎈', '{"é":["\\"",1.50,-0,null]}'.encode()
    async with broker() as (store, recorder):
        await watch(store, name)
        id = await publish(store, name, data=data)
        await caught_up(store, id)
        (message,) = (await watch(store, name)).messages
        (info,) = await store.channels("", 10)

        assert recorder.heard == [(name, id, 0)]
        assert (message.channels, message.data) == ((name,), data)
        assert info.channel == name
