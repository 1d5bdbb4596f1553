"""Publishing past the nodes: messages are the same as over HTTP, from threads, forks and event loops."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest

import pushup
from pushup import AsyncPublisher, Publisher
from pushup.errors import (
    ChannelNotFound,
    InvalidParameter,
    InvalidRequest,
    KeyReused,
    PushUpError,
    TooLarge,
    Unavailable,
)
from pushup.library import LOAD, VERSION, Library, parse_histories
from pushup.memory import MemoryBroker
from pushup.messages import ChannelOptions, Message, Receipt
from pushup.publications import make_publication
from pushup.publisher import PUBLISHED_AT_ONCE
from pushup.settings import Settings
from pushup.wire import parse_publication
from tests.redis_server import RedisServer
from tests.resp import Deed, proxied, scripted
from tests.support import PATIENCE_S, connected, eventually, parked, running

VALUES: list[Any] = [
    None,
    True,
    0,
    -1.5,
    2**63,
    "",
    "é\n\0😀\u2028",
    [],
    {},
    {"b": [1, {"c": None}], "a": "x"},
    ["</script>", '"', "\\", "/"],
    "x" * 60_000,
]


CHANNEL_SENTENCE = "a channel is a string, or an integer that was handed out"
ITEM_SENTENCE = "a publication is a mapping with channels, data and perhaps a key"


@pytest.fixture
def realm() -> str:
    return uuid4().hex


@pytest.fixture
def publisher(redis_server: RedisServer, realm: str) -> Any:
    with Publisher(redis_server.url, realm=realm, timeout=PATIENCE_S) as one:
        yield one


def stored(redis: RedisServer, realm: str, channel: str) -> list[Message]:
    """What Redis has of a channel."""
    with redis.client() as client:
        reply: Any = client.execute_command(*Library(realm).read(0, "me", "token", {channel: 0}))
    histories, _, _ = parse_histories(reply, [channel])
    history = histories[channel]
    assert history is not None
    return list(history.messages)


def integer_channel(redis: RedisServer, realm: str) -> int:
    with redis.client() as client:
        client.execute_command(*LOAD)
        reply: Any = client.execute_command(*Library(realm).create(0, None, ChannelOptions()))
    return int(reply[0])


def refusal(publish: Callable[[], object]) -> PushUpError:
    with pytest.raises(PushUpError) as caught:
        publish()
    return caught.value


def test_the_package_offers_both() -> None:
    """Without loading them for those who do not ask."""
    assert (pushup.Publisher, pushup.AsyncPublisher) == (Publisher, AsyncPublisher)
    loaded = "import sys, pushup; print('redis' in sys.modules, 'pushup.publisher' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True) == "False False\n"
    with pytest.raises(AttributeError, match="module 'pushup' has no attribute 'Publishers'"):
        pushup.Publishers  # noqa: B018


def test_to_one_channel_or_several(redis_server: RedisServer, realm: str, publisher: Publisher) -> None:
    """A name, an integer that was handed out, or any sequence of these; the id is that of all of them."""
    integer = integer_channel(redis_server, realm)

    given = [
        publisher.publish("a", 1),
        publisher.publish(integer, 2),
        publisher.publish(["a", integer, "b c"], 3),
        publisher.publish(("b c", "a", "b c"), 4),
        publisher.publish(str(integer), 5),
    ]

    assert all(one < two for one, two in pairwise(given))
    assert [(m.id, m.channels, m.data) for m in stored(redis_server, realm, "a")] == [
        (given[0], ("a",), b"1"),
        (given[2], ("a", str(integer), "b c"), b"3"),
        (given[3], ("b c", "a"), b"4"),
    ]
    assert [m.id for m in stored(redis_server, realm, str(integer))] == [given[1], given[2], given[4]]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:16])
async def test_messages_are_the_same_as_over_http(redis_server: RedisServer, value: Any) -> None:
    """Byte for byte what a node makes of the same publication in JSON."""
    realm = uuid4().hex
    compact = json.dumps({"channels": ["b", "a"], "data": value}, ensure_ascii=False, separators=(",", ":")).encode()
    over_http = parse_publication(compact, Settings())
    broker = MemoryBroker()
    await broker.publish([over_http])
    history = (await broker.watch({"a": 0}))["a"]
    assert history is not None

    async with AsyncPublisher(redis_server.url, realm=realm) as publisher:
        await publisher.publish(["b", "a"], value)
    (direct,) = stored(redis_server, realm, "a")

    assert make_publication(["b", "a"], value) == over_http
    assert [(m.channels, m.data) for m in history.messages] == [(direct.channels, direct.data)]


async def test_polls_cannot_tell_the_difference(redis_server: RedisServer, realm: str) -> None:
    """A parked poll is answered with the same bytes, but for the id."""
    data = {"x": [1, "é\n"], "y": None}
    async with (
        running(broker=redis_server.url, realm=realm) as server,
        connected(server) as polling,
        connected(server) as publishing,
        AsyncPublisher(redis_server.url, realm=realm) as publisher,
    ):
        bodies = []
        for publish in (publisher.publish("a", data), publishing.publish("a", data=data)):
            polling.send("GET /poll?channel=a&start=latest HTTP/1.1\r\nHost: test\r\n\r\n")
            await parked(server, 1)
            id = await publish
            body = (await polling.reply()).body
            bodies.append(body.replace(b"%d" % (id + 1), b"NEXT").replace(b"%d" % id, b"ID"))

    # HTTP data goes through with the spaces it came with.
    assert bodies[0] == bodies[1].replace(b": ", b":").replace(b", ", b",").replace(b"\\u00e9", "é".encode())
    assert b'"id":ID,"channels":["a"]' in bodies[0]


def test_a_key_stores_once(redis_server: RedisServer, realm: str, publisher: Publisher) -> None:
    """However often it is repeated, here or by another publisher; another publication with it is refused."""
    first = publisher.publish("a", {"x": 1}, key="k")
    with Publisher(redis_server.url, realm=realm) as other:
        again = [publisher.publish("a", {"x": 1}, key="k"), other.publish(["a", "a"], {"x": 1}, key="k")]
        error = refusal(lambda: other.publish("a", {"x": 2}, key="k"))

    assert again == [first, first]
    assert isinstance(error, KeyReused)
    assert len(stored(redis_server, realm, "a")) == 1


def test_many_at_once(redis_server: RedisServer, realm: str, publisher: Publisher) -> None:
    """More than fit in one write, in order; any iterable will do."""
    count = PUBLISHED_AT_ONCE * 2 + 1

    receipts = publisher.publish_many({"channels": ["a"], "data": number} for number in range(count))

    given = [receipt.id for receipt in receipts if isinstance(receipt, Receipt)]
    assert len(given) == count
    assert all(one < two for one, two in pairwise(given))
    assert [int(message.data) for message in stored(redis_server, realm, "a")] == list(range(count))[-1000:]


def test_one_of_many_spoils_no_other(redis_server: RedisServer, realm: str, publisher: Publisher) -> None:
    """For each there is a result, in its place: a receipt, a refusal of ours, or one of Redis."""
    results = publisher.publish_many(
        [
            {"channels": "a", "data": 0},
            {"channels": [], "data": 1},
            {"data": 2},
            {"channels": ["a"]},
            {"channels": ["a"], "data": 4, "kee": "k"},
            {"channels": ["a"], "data": {1j: 5}},
            {"channels": ["a", "b\n"], "data": 6},
            {"channels": ["a", 17], "data": 7},
            {"channels": ["a"], "data": "x" * 70_000},
            {"channels": ("a",), "data": 9, "key": "k"},
            {"channels": ["a"], "data": 9, "key": "k"},
            {"channels": ["a"], "data": 10, "key": "k"},
            {"channels": ["a"], "data": 11, "key": ""},
            {"channels": ["a"], "data": None, "key": None},
        ]
    )

    kinds = [type(result) for result in results]
    wrong = InvalidParameter
    assert kinds[:7] == [Receipt, wrong, wrong, wrong, wrong, wrong, wrong]
    assert kinds[7:] == [ChannelNotFound, TooLarge, Receipt, Receipt, KeyReused, wrong, Receipt]
    assert [message.data for message in stored(redis_server, realm, "a")] == [b"0", b"9", b"null"]
    first, again = results[9], results[10]
    assert isinstance(first, Receipt)
    assert again == Receipt(first.id, duplicate=True)


def test_nothing_at_all(publisher: Publisher) -> None:
    """No publications, no results."""
    assert publisher.publish_many([]) == []


@pytest.mark.parametrize(
    ("item", "parameter", "sentence"),
    [
        ({"data": 1}, "channels", "a publication names at least one channel"),
        ({"channels": ["a"]}, "data", "data is missing"),
        ({"channels": ["a"], "data": 1, "chanels": 2}, "chanels", "chanels is not a field of a publication"),
        ({"channels": ["a"], "data": 1, "key": "k" * 256}, "key", "key is a string of 1 to 255 characters"),
        ({"channels": ["a"], "data": 1, "key": 5}, "key", "key is a string of 1 to 255 characters"),
        ({"channels": None, "data": 1}, "channels", CHANNEL_SENTENCE),
        ({"channels": [None], "data": 1}, "channels", CHANNEL_SENTENCE),
        ({"channels": 1.5, "data": 1}, "channels", CHANNEL_SENTENCE),
        ({"channels": ["a", ["b"]], "data": 1}, "channels", CHANNEL_SENTENCE),
        ({"channels": b"news", "data": 1}, "channels", CHANNEL_SENTENCE),
        ({"channels": [b"a"], "data": 1}, "channels", CHANNEL_SENTENCE),
        ("a", None, ITEM_SENTENCE),
        (None, None, ITEM_SENTENCE),
    ],
)
def test_wrong_items(publisher: Publisher, item: Any, parameter: str | None, sentence: str) -> None:
    """Whatever is wrong with an item, its error says so, and the next one is stored."""
    wrong, good = publisher.publish_many([item, {"channels": ["a"], "data": 1}])

    assert isinstance(wrong, InvalidRequest)
    assert isinstance(good, Receipt)
    assert wrong.members.get("parameter") == parameter
    if sentence is not None:
        assert wrong.detail == sentence


@pytest.mark.parametrize(
    "channels", [[], (), "", ".", "..", "a\nb", "x" * 256, "0", "017", 0, -1, 2**53, True, "\ud800", ["a", ""]]
)
def test_wrong_channels(publisher: Publisher, channels: Any) -> None:
    """Are refused before Redis is asked."""
    assert isinstance(refusal(lambda: publisher.publish(channels, 1)), InvalidParameter)


@pytest.mark.parametrize("channels", [None, 1.5, b"news", [b"a"], [None], object()])
def test_channels_of_another_type(publisher: Publisher, channels: Any) -> None:
    """As a node would say of JSON like that."""
    assert isinstance(refusal(lambda: publisher.publish(channels, 1)), InvalidParameter)


@pytest.mark.parametrize(
    "data", [object(), {1j: 1}, "\ud800", {"a": {(1, 2): 3}}], ids=["object", "key", "surrogate", "tuple"]
)
def test_data_that_cannot_be_json(publisher: Publisher, data: Any) -> None:
    """Says why."""
    error = refusal(lambda: publisher.publish("a", data))

    assert isinstance(error, InvalidParameter)
    assert error.detail.startswith("data cannot be JSON: ")


@pytest.mark.parametrize("depth", [101, 5000])
def test_data_that_is_too_deep(publisher: Publisher, depth: int) -> None:
    """No deeper than over HTTP."""
    data: list[Any] = []
    for _ in range(depth - 1):
        data = [data]

    assert isinstance(refusal(lambda: publisher.publish("a", data)), InvalidParameter)


@pytest.mark.parametrize("key", ["", "k" * 256, 5, b"k", "\ud800"])
def test_wrong_keys(publisher: Publisher, key: Any) -> None:
    """A key is a string of a length that a node takes too; what is published afterwards is not disturbed."""
    error = refusal(lambda: publisher.publish("a", 1, key=key))
    started = time.monotonic()

    assert isinstance(error, InvalidParameter)
    assert publisher.publish("a", 1, key="k" * 255) > 0
    assert time.monotonic() - started < PATIENCE_S / 2


def test_what_redis_has_against_it(publisher: Publisher) -> None:
    """Is raised as what a node would answer."""
    missing, large = refusal(lambda: publisher.publish(17, 1)), refusal(lambda: publisher.publish("a", "x" * 70_000))

    assert isinstance(missing, ChannelNotFound)
    assert str(missing) == "channel 17 does not exist"
    assert isinstance(large, TooLarge)
    assert str(large) == "data is 70002 bytes of JSON; the limit is 65536"


@pytest.mark.parametrize("kind", [Publisher, AsyncPublisher])
@pytest.mark.parametrize("url", ["http://there", "", "redis://me@there", "redis://a,b"])
def test_wrong_urls(kind: Any, url: str) -> None:
    """Are refused when the publisher is made, not with the first publication."""
    with pytest.raises(ValueError, match=r"it must be|a user needs|several servers"):
        kind(url)


@pytest.mark.parametrize("realm", ["", "a}b", "a b", "a{b", "é", "a\n"])
def test_wrong_realms(redis_server: RedisServer, realm: str) -> None:
    """What no node can serve is not published to."""
    with Publisher(redis_server.url, realm=realm) as publisher:
        error = refusal(lambda: publisher.publish("a", 1))

    assert isinstance(error, InvalidRequest)


def test_a_server_that_cannot_be_reached() -> None:
    """Is tried for the time that one call may take."""

    async def publish() -> None:
        async with scripted() as gone:
            pass
        async with AsyncPublisher(gone.url, timeout=0.2) as publisher:
            await publisher.publish("a", 1)

    started = time.monotonic()
    error = refusal(lambda: asyncio.run(publish()))

    assert isinstance(error, Unavailable)
    assert str(error).startswith("cannot reach Redis: 127.0.0.1:")
    assert time.monotonic() - started < PATIENCE_S / 2


async def test_a_lost_reply(redis_server: RedisServer, realm: str) -> None:
    """Without a key the truth is told and nothing is repeated; with one it is stored once."""
    async with proxied(redis_server) as proxy, AsyncPublisher(proxy.url, realm=realm) as publisher:
        await publisher.publish("a", 0)
        proxy.lose_reply_to(b'"unsafe"')
        with pytest.raises(Unavailable, match="this may have been done or not"):
            await publisher.publish("a", "unsafe")
        proxy.lose_reply_to(b'"safe"')
        id = await publisher.publish("a", "safe", key="k")

    messages = await asyncio.to_thread(stored, redis_server, realm, "a")
    assert [message.data for message in messages] == [b"0", b'"unsafe"', b'"safe"']
    assert messages[2].id == id
    assert proxy.lost == 2


async def test_what_a_publisher_has_seen_goes_with_the_next() -> None:
    """So that ids do not go back behind its back."""

    def script(*words: str) -> object:
        return VERSION if words[1] == "pushup_version" else [int(words[4]) + 10, 0, "run:1"]

    async with scripted(script) as server, AsyncPublisher(server.url) as publisher:
        given = [await publisher.publish("a", 1) for _ in range(3)]

    assert given == [10, 20, 30]


async def test_publications_of_one_loop_share_a_connection(redis_server: RedisServer, realm: str) -> None:
    """However many are under way."""
    async with proxied(redis_server) as proxy, AsyncPublisher(proxy.url, realm=realm) as publisher:
        given = await asyncio.gather(*[publisher.publish("a", number) for number in range(50)])

        assert len(set(given)) == 50
        assert proxy.connections == 1


async def test_an_async_publisher_that_was_closed() -> None:
    """Opens no connection any more, and says so at once."""
    async with scripted(lambda *words: VERSION) as server:
        publisher = AsyncPublisher(server.url)
        await publisher.close()
        await publisher.close()
        started = time.monotonic()
        with pytest.raises(Unavailable):
            await publisher.publish("a", 1)

    assert server.connections == 0
    assert time.monotonic() - started < 2.5


async def test_threads_share_a_connection(redis_server: RedisServer, realm: str) -> None:
    """Every thread gets its own ids, and its publications keep their order."""
    async with proxied(redis_server) as proxy:
        with Publisher(proxy.url, realm=realm) as publisher, ThreadPoolExecutor(8) as pool:

            def publish(thread: int) -> list[int]:
                return [publisher.publish("a", [thread, number]) for number in range(10)]

            loop = asyncio.get_running_loop()
            given = await asyncio.gather(*[loop.run_in_executor(pool, publish, thread) for thread in range(8)])
            await asyncio.to_thread(publisher.close)

        assert proxy.connections == 1
    messages = stored(redis_server, realm, "a")
    assert [message.id for message in messages] == sorted(id for ids in given for id in ids)
    for thread, ids in enumerate(given):
        mine = {message.id: json.loads(message.data) for message in messages if message.id in ids}
        assert list(mine.values()) == [[thread, number] for number in range(10)]


def test_closing_and_publishing_again(redis_server: RedisServer, realm: str) -> None:
    """A closed publisher opens another connection when it is used; closing twice, or unused, is nothing."""
    publisher = Publisher(redis_server.url, realm=realm)
    publisher.close()
    first = publisher.publish("a", 1)
    publisher.close()
    publisher.close()
    second = publisher.publish("a", 2)
    publisher.close()

    assert first < second
    assert not [thread for thread in threading.enumerate() if thread.name == "pushup-publisher"]


async def test_closing_while_another_thread_publishes() -> None:
    """That one is told at once that there will be no answer; it does not wait for ever."""
    errors: list[BaseException] = []

    def publish(publisher: Publisher) -> None:
        try:
            publisher.publish("a", 1, key="k")
        except PushUpError as error:
            errors.append(error)

    async with scripted(lambda *words: VERSION if words[1] == "pushup_version" else Deed.SILENCE) as server:
        publisher = Publisher(server.url, timeout=PATIENCE_S)
        thread = threading.Thread(target=publish, args=(publisher,), daemon=True)
        thread.start()
        await eventually(lambda: len(server.commands) == 2, "it is asked")
        await asyncio.to_thread(publisher.close)
        await asyncio.to_thread(thread.join, PATIENCE_S / 2)

        assert not thread.is_alive()
        assert [type(error) for error in errors] == [Unavailable]


def run_script(*lines: str, arguments: tuple[str, ...]) -> str:
    """What the script prints; it ends well and in time."""
    script = "\n".join(["import os, sys", "from pushup import Publisher", *lines])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    ).stdout


@pytest.mark.parametrize("child", ["publisher.publish('a', 'child')", "publisher.close()", "pass"])
def test_after_a_fork(redis_server: RedisServer, realm: str, child: str) -> None:
    """The child has a connection of its own, if it publishes; the parent's goes on, whatever the child does."""
    printed = run_script(
        "publisher = Publisher(sys.argv[1], realm=sys.argv[2])",
        "publisher.publish('a', 'parent')",
        "pid = os.fork()",
        "if pid == 0:",
        f"    {child}",
        "    publisher.close()",
        "    sys.exit(7)",
        "_, status = os.waitpid(pid, 0)",
        "publisher.publish('a', 'parent again')",
        "publisher.close()",
        "print(os.waitstatus_to_exitcode(status))",
        arguments=(redis_server.url, realm),
    )

    said = [json.loads(message.data) for message in stored(redis_server, realm, "a")]
    assert said == ["parent", *(["child"] if "publish(" in child else []), "parent again"]
    assert printed == "7\n"


def test_a_program_that_does_not_close_it(redis_server: RedisServer, realm: str) -> None:
    """Ends all the same."""
    printed = run_script(
        "publisher = Publisher(sys.argv[1], realm=sys.argv[2])",
        "print(publisher.publish('a', 1))",
        arguments=(redis_server.url, realm),
    )

    assert [message.id for message in stored(redis_server, realm, "a")] == [int(printed)]


async def test_a_new_server_hears_what_the_one_before_had_given(redis_server: RedisServer) -> None:
    """If that is more than it has, both served at the same time, and everybody is told of a gap."""
    realm = uuid4().hex
    with redis_server.client() as client:
        async with AsyncPublisher(redis_server.url, realm=realm) as publisher:
            first = await publisher.publish("a", 1)
            publisher._origin = "another:1"
            publisher._seen_there = first
            second = await publisher.publish("a", 2)
        call = Library(realm).read(0, "me", "token", {"a": 0})
        history = parse_histories(client.execute_command(*call), ["a"])[0]["a"]

    assert history is not None
    assert history.floor > second
