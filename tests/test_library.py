"""What happens inside Redis, function by function, in fakeredis and in a real server; and its Python side."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import pairwise
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import redis
from fakeredis import FakeRedis, FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st

from pushup.errors import (
    BrokerRefused,
    ChannelExists,
    ChannelNotFound,
    InvalidParameter,
    InvalidRequest,
    KeyReused,
    PushUpError,
    RealmFull,
    TooLarge,
    Unavailable,
)
from pushup.library import (
    LOAD,
    VERSION,
    Call,
    Echo,
    Event,
    Library,
    NotExecuted,
    parse_echo,
    parse_event,
    parse_histories,
    parse_info,
    parse_message,
    parse_nodes,
    parse_position,
    parse_receipt,
    parse_receipts,
    realm_key,
    translate,
)
from pushup.messages import (
    MAX_ID,
    NESTING_MAX,
    SECOND,
    ChannelInfo,
    ChannelOptions,
    History,
    Message,
    NodeInfo,
    Publication,
    Receipt,
    Retention,
    parse_channel,
)
from tests.redis_server import RedisServer
from tests.support import PATIENCE_S

ABOUT = NodeInfo("me", "127.0.0.1:1", "127.0.0.1:2", "1", "ready", 1, 1, 0, 0, 0, 0, 0)
HOUR = 3600 * SECOND

# The words of the two records that tests change by hand, in the order of library.lua.
REALM = (
    *("run", "kept", "birth", "since", "floor", "unknown", "channels", "closed", "ttl", "window", "max_messages"),
    *("idempotency", "implicit", "message_bytes", "publish_channels", "realm_bytes"),
)
KEY_SENTENCE = re.escape("INVALID the key is pushup:{REALM}")
FACTS = ("tail", "floor", "first", "ttl", "window", "max_messages", "created", "expires", "bytes")

NASTY_NAMES = (
    *("}", "{other}", "}{other}", "a}:m:b", ":names", "names", "m:a", "c:a", "realm", "last", ":", "::", "*", "a b"),
    *("%s%n", "\\", '"', "'", "é", "日本", "😀", "\u00a0", "\u2028", "x" * 255, "é" * 127),
    *(
        "-1",
        "1.0",
        "+1",
        "1e3",
        "٣",
        "  ",
        " a ",
        "?",
        "[a]",
        "[^a]",
        "\\*",
        "^$()%.[]*+-?",
        "%b{}",
        "%w+",
        "$-1",
        "*0",
    ),
)
REFUSED_NAMES = (
    *("", ".", "..", "x" * 256, "é" * 128, "x" * 10_000),
    *("a\nb", "\n", "a\0b", "\0", "\x1f", "\x7f", "\u0085", "a\tb", "}\n{other}", "\r\n*1\r\n$8\r\nFLUSHALL\r\n"),
    *("a\r\n$1\r\nb\r\n", "\r\nSET x 1\r\n", "a\r", "\n\n", "a\x1b[2J"),
    *(b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf"),
    *("0", "007", str(MAX_ID + 1), "9" * 16, "1" * 17, "1" * 300),
)


class Ear:
    """What is announced on a pub/sub channel, from now on."""

    def __init__(self, client: redis.Redis, name: str) -> None:
        self._pubsub: Any = client.pubsub()
        self._pubsub.ssubscribe(name)
        assert self._pubsub.get_message(timeout=PATIENCE_S)["type"] == "ssubscribe"

    def hear(self) -> bytes:
        """The next payload, which was announced before."""
        heard = self._pubsub.get_message(timeout=PATIENCE_S)
        assert heard is not None, "nothing was announced"
        payload = heard["data"]
        assert isinstance(payload, bytes)
        return payload

    def close(self) -> None:
        self._pubsub.close()


class Realm:
    """A realm of this test's own."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.library = Library(uuid4().hex)
        self.key = self.library.key
        self._ears: list[Ear] = []

    def do(self, call: Call) -> Any:
        """A call of the library's, and its reply."""
        return self.client.execute_command(*call)

    def call(self, function: str, *words: str | bytes | int) -> Any:
        """A call in words."""
        return self.do(("FCALL", f"pushup_{function}", 1, self.key, *words))

    def refusal(self, function: str, *words: str | bytes | int) -> str:
        with pytest.raises(redis.ResponseError) as caught:
            self.call(function, *words)
        return str(caught.value)

    def attach(self, seen: int = 0, origin: str = "", seen_there: int = 0, kept: bool = False, **retention: Any) -> str:
        """A node begins; the origin."""
        call = self.library.attach(seen, origin, seen_there, kept, Retention(**retention))
        return parse_position(self.do(call))[1]

    def publish(self, *channels: str, data: str = "1") -> int:
        id = self.call("publish", data, *channels)
        assert isinstance(id, int)
        return id

    def store(self, *channels: str, data: bytes = b"1", key: str | None = None, seen: int = 0) -> Receipt:
        return parse_receipt(self.do(self.library.store(seen, Publication(channels, data, key))))[0]

    def store_all(self, *publications: Publication) -> list[Receipt | PushUpError]:
        told = parse_receipts(self.do(self.library.store_all(0, publications)))
        return [one if isinstance(one, PushUpError) else one[0] for one in told]

    def read(self, name: str, start: int = 0, seen: int = 0) -> History:
        histories, _, _ = parse_histories(self.do(self.library.read(seen, "me", "token", {name: start})), [name])
        history = histories[name]
        assert history is not None
        return history

    def create(self, name: str | None = None, *, ttl_us: int | None = None, **options: Any) -> ChannelInfo:
        if ttl_us is not None:
            options["ttl"] = ttl_us / SECOND
        return parse_info(self.do(self.library.create(0, name, ChannelOptions(**options))))

    def names(self) -> list[str]:
        return [parse_info(info).channel for info in self.do(self.library.list(0, "", 1000))]

    def tick(self, *audited: str) -> None:
        self.do(self.library.tick(0, "me", "token", ABOUT, audited))

    def listen(self, channel: str) -> Ear:
        """To a channel's announcements."""
        return self._listen(self.library.pubsub(self.attach()).announcements(channel))

    def listen_as(self, node: str) -> Ear:
        """To a node's own channel."""
        return self._listen(self.library.pubsub(self.attach()).echoes(node))

    def _listen(self, name: str) -> Ear:
        ear = Ear(self.client, name)
        self._ears.append(ear)
        return ear

    def record(self) -> dict[str, str]:
        """What the realm knows of itself."""
        return dict(zip(REALM, self._field("realm"), strict=True))

    def facts(self, name: str) -> dict[str, str]:
        """What it knows of a channel."""
        return dict(zip(FACTS, self._field(f"c:{name}"), strict=True))

    def bytes(self) -> int:
        """What it counts as cached, checked against what is there and against the channels' own counts."""
        counted = int(self._field("bytes")[0])
        facts = [name[2:].decode() for name in self._fields() if name.startswith(b"c:")]
        assert counted == sum(int(self.facts(name)["bytes"]) for name in facts)
        stored: list[Any] = [text for name in facts for text in self.client.zrange(f"{self.key}:m:{name}", 0, -1)]
        assert counted == sum(len(parse_message(text).data) for text in stored)
        return counted

    def keys(self) -> set[Any]:
        return set(self.client.keys(f"{self.key}*"))

    def _fields(self) -> list[Any]:
        return list(self.client.hkeys(self.key))

    def write(self, **changes: object) -> None:
        """Change the realm's record by hand."""
        self.client.hset(self.key, "realm", " ".join(map(str, (self.record() | changes).values())))

    def write_facts(self, name: str, **changes: object) -> None:
        self.client.hset(self.key, f"c:{name}", " ".join(map(str, (self.facts(name) | changes).values())))

    def age(self, name: str, id: int, microseconds: int) -> int:
        """Make the first message of a channel older; its new id."""
        messages = f"{self.key}:m:{name}"
        text: Any = self.client.zrange(messages, id, id, byscore=True)[0]
        self.client.zrem(messages, text)
        older = id - microseconds
        self.client.zadd(messages, {text.replace(str(id).encode(), str(older).encode()): older})
        sizes = f"{self.key}:s:{name}"
        entry: Any = self.client.lindex(sizes, 0)
        self.client.lset(sizes, 0, entry.replace(str(id).encode(), str(older).encode()))
        self.write_facts(name, first=older, floor=0)
        self.client.zadd(f"{self.key}:stale", {name: older + int(self.facts(name)["window"]) + 1})
        self.write(floor=0)
        return older

    def close(self) -> None:
        for ear in self._ears:
            ear.close()

    def _field(self, name: str) -> list[str]:
        written: Any = self.client.hget(self.key, name)
        return str(written.decode()).split(" ")


def ids(history: History) -> list[int]:
    return [message.id for message in history.messages]


def now(client: redis.Redis) -> int:
    seconds, microseconds = client.execute_command("TIME")
    return int(seconds) * SECOND + int(microseconds)


@pytest.fixture(scope="module")
def real(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """The real server with the functions. It need not keep what these tests write, so they are fast."""
    with redis_server.client() as client:
        client.execute_command(*LOAD)
        client.config_set("appendfsync", "no")
        yield client
        client.config_set("appendfsync", "always")


@pytest.fixture(params=["fakeredis", "redis"])
def client(request: pytest.FixtureRequest) -> Iterator[redis.Redis]:
    if request.param == "redis":
        yield request.getfixturevalue("real")
        return
    with FakeRedis(server=FakeServer()) as fake:
        fake.execute_command(*LOAD)
        yield fake


@pytest.fixture
def realm(client: redis.Redis) -> Iterator[Realm]:
    with closing(Realm(client)) as one:
        yield one


@pytest.fixture
def real_realm(real: redis.Redis) -> Iterator[Realm]:
    """In the real server only."""
    with closing(Realm(real)) as one:
        yield one


# Ids


def test_ids_are_the_servers_time(realm: Realm) -> None:
    """A message's id is the microsecond it was stored in."""
    realm.publish("a")
    before = now(realm.client)
    id = realm.publish("a")

    assert before <= id <= now(realm.client)


def test_ids_increase_over_all_channels(realm: Realm) -> None:
    """Also when many are stored in a microsecond, and those of channels come from the same clock."""
    given = [realm.publish("ab"[n % 2]) if n % 3 else int(realm.create().channel) for n in range(60)]

    assert all(a < b for a, b in pairwise(given))


def test_ids_go_on_above_what_was_given(realm: Realm) -> None:
    """Also if the server's clock is behind it now."""
    last = realm.publish("a")
    realm.client.hset(realm.key, "last", last + HOUR)

    assert realm.publish("a") == last + HOUR + 1
    assert realm.publish("b") == last + HOUR + 2


def test_ids_go_on_above_what_a_caller_has_seen(realm: Realm) -> None:
    """Who has seen a later id than was ever given here proves a loss: nobody's cursor is good any more."""
    first = realm.publish("a")
    seen = first + HOUR

    second = realm.store("a", seen=seen).id
    history = realm.read("a", first + 1)

    assert second > seen
    assert seen < history.floor <= second
    assert realm.read("never").floor > seen
    assert realm.publish("a") > second


@pytest.mark.parametrize(
    "function", ["store", "create", "renew", "close", "describe", "list", "read", "tick", "attach"]
)
def test_a_caller_from_far_in_the_future_is_refused(realm: Realm, function: str) -> None:
    """One broken clock must not move the ids of all by years: more than a day ahead, nothing is done."""
    words: dict[str, tuple[str | int, ...]] = {
        "store": ("", "1", "a"),
        "create": ("b", "", "", ""),
        "list": ("", 10),
        "read": ("me", "token", "a", 0),
        "tick": ("me", "token", "{}"),
        "attach": ("", 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    }
    realm.publish("a")
    before = realm.client.hgetall(realm.key)

    sentence = realm.refusal(function, now(realm.client) + 24 * HOUR + SECOND * 60, *words.get(function, ("a", "")))

    assert sentence == "INVALID the id seen lies more than a day ahead of the clock of Redis"
    assert realm.client.hgetall(realm.key) == before


def test_a_position_is_never_given_to_an_earlier_message(realm: Realm) -> None:
    """Everything below it was there when it was told; what comes later is not below it."""
    id = realm.publish("a")
    position = realm.read("a").position

    assert id < position <= realm.publish("a")


# Publishing


def test_one_message_in_several_channels(realm: Realm) -> None:
    """One id, stored in each; all its channels are in it, in order, each once."""
    id = realm.publish("b", "a", "b", "17a", "a", data='{"x": [1]}')

    for name in ("a", "b", "17a"):
        (message,) = realm.read(name).messages
        assert (message.id, message.channels, message.data) == (id, ("b", "a", "17a"), b'{"x": [1]}')
    assert realm.names() == ["17a", "a", "b"]


def test_announcements_say_what_came_before(realm: Realm) -> None:
    """In each channel the message and the id before it there; 0: there was none."""
    a, b = realm.listen("a"), realm.listen("b")
    one, two, three = realm.publish("a"), realm.publish("b", "a"), realm.publish("a", "b")

    assert [parse(a.hear()) for _ in range(3)] == [(one, 0), (two, one), (three, two)]
    assert [parse(b.hear()) for _ in range(2)] == [(two, 0), (three, two)]


def parse(payload: bytes) -> tuple[int, int]:
    event = parse_event(payload)
    assert isinstance(event, tuple), event
    return event[0].id, event[1]


def test_an_announcement_is_the_message_as_stored(realm: Realm) -> None:
    """Byte for byte, with line breaks between values made spaces."""
    ear = realm.listen("a")
    id = realm.publish("a", data='[1,\r\n"é\\n😀"\n]')

    said, _, stored = ear.hear().partition(b" ")

    assert said == b"0"
    assert stored == f'[{id},["a"],[1,  "é\\n😀" ]]'.encode()
    assert realm.client.zrange(f"{realm.key}:m:a", 0, -1) == [stored]


def test_a_key_stores_once(realm: Realm) -> None:
    """The same publication gets the first one's id, is announced once, and may come in other words."""
    ear = realm.listen("a")
    first = realm.store("a", "b", key="k")
    again = [realm.store("a", "b", key="k"), realm.store("a", "b", "a", key="k")]
    once = realm.call("publish_once", "k", "1", "a", "b")
    last = realm.publish("a")

    assert not first.duplicate
    assert again == [Receipt(first.id, duplicate=True)] * 2
    assert once == first.id
    assert [parse(ear.hear()) for _ in range(2)] == [(first.id, 0), (last, first.id)]


@pytest.mark.parametrize(
    ("data", "channels"), [("2", ("a", "b")), ("1", ("b", "a")), ("1", ("a",)), ("1 ", ("a", "b"))]
)
def test_a_key_belongs_to_one_publication(realm: Realm, data: str, channels: tuple[str, ...]) -> None:
    """Other data or other channels under the same key are refused, and change nothing."""
    realm.call("publish_once", "k", "1", "a", "b")
    before = realm.client.hgetall(realm.key)

    assert realm.refusal("publish_once", "k", data, *channels) == (
        "KEYREUSED the idempotency key was used for a different publication"
    )
    assert realm.client.hgetall(realm.key) == before


def test_keys_are_forgotten_in_time(realm: Realm) -> None:
    """A key lasts for the realm's window; with none, it means nothing."""
    realm.attach(idempotency=100.0)
    realm.store("a", key="long")
    left = int(realm.client.pttl(f"{realm.key}:k:long"))
    realm.attach(idempotency=0.0)
    one, two = realm.store("a", key="none"), realm.store("a", key="none")

    assert 100_000 - PATIENCE_S * 1000 < left <= 100_000
    assert one.id < two.id
    assert not realm.client.exists(f"{realm.key}:k:none")


def test_a_key_of_a_refused_publication_is_free(realm: Realm) -> None:
    """What was not stored is not remembered."""
    realm.refusal("publish_once", "k", "no JSON", "a")
    realm.refusal("publish_once", "k", "1", "17")

    assert realm.call("publish_once", "k", "1", "a") > 0


def test_keys_of_every_kind(realm: Realm) -> None:
    """A key is any 1 to 255 characters; keys that look alike are different."""
    keys: list[str | bytes] = ["k", "K", "k ", "k\n", "k\0", "}k{", "k:k", "é", "😀" * 255, b"\xff", "0"]

    given = [realm.call("publish_once", key, "1", "a") for key in keys]

    assert len(set(given)) == len(keys)
    assert [realm.call("publish_once", key, "1", "a") for key in keys] == given
    for wrong in ("", "k" * 1021):
        assert realm.refusal("publish_once", wrong, "1", "a") == "INVALID an idempotency key is 1 to 255 characters"


# Several at once


def test_several_publications_in_one_call(realm: Realm) -> None:
    """Are stored in order, as by as many calls, and announced in that order once all are stored."""
    ear, other = realm.listen("a"), realm.listen("b")

    told = realm.store_all(
        Publication(("a",), b"1"),
        Publication(("b", "a"), b"2"),
        Publication(("a",), b"3", "k"),
        Publication(("b",), b"4"),
    )

    first, second, third, fourth = [receipt.id for receipt in told if isinstance(receipt, Receipt)]
    assert first < second < third < fourth
    assert [ids(realm.read(name)) for name in "ab"] == [[first, second, third], [second, fourth]]
    assert [ear.hear() for _ in range(3)] == [
        b'0 [%d,["a"],1]' % first,
        b'%d [%d,["b","a"],2]' % (first, second),
        b'%d [%d,["a"],3]' % (second, third),
    ]
    assert [other.hear() for _ in range(2)] == [b'0 [%d,["b","a"],2]' % second, b'%d [%d,["b"],4]' % (second, fourth)]
    assert realm.bytes() == 5


def test_a_refused_one_of_several_changes_nothing_for_the_others(realm: Realm) -> None:
    realm.attach(message_bytes=10, publish_channels=2)

    told = realm.store_all(
        Publication(("a",), b"1"),
        Publication(("17",), b"1"),
        Publication(("a",), b"{"),
        Publication(("a",), b'"' + b"x" * 10 + b'"'),
        Publication(("a", "b", "c"), b"1"),
        Publication((".",), b"1"),
        Publication((), b"1"),
        Publication(("a",), b"2"),
    )

    assert [type(one) for one in told] == [
        Receipt,
        ChannelNotFound,
        InvalidRequest,
        TooLarge,
        TooLarge,
        InvalidRequest,
        InvalidRequest,
        Receipt,
    ]
    assert [message.data for message in realm.read("a").messages] == [b"1", b"2"]
    assert realm.names() == ["a"]


def test_of_several_refused_ones_nothing_is_left(realm: Realm) -> None:
    before = realm.publish("a")

    assert [type(one) for one in realm.store_all(*[Publication(("17",), b"1")] * 2)] == [ChannelNotFound] * 2
    assert ids(realm.read("a")) == [before]
    assert realm.names() == ["a"]


def test_a_key_given_twice_in_one_call(realm: Realm) -> None:
    """The second publication is a duplicate of the first, or the key's misuse."""
    one, same, different = (
        Publication(("a",), b"1", "k"),
        Publication(("a",), b"1", "k"),
        Publication(("a",), b"2", "k"),
    )

    stored, again, refused = realm.store_all(one, same, different)

    assert isinstance(stored, Receipt)
    assert again == Receipt(stored.id, duplicate=True)
    assert isinstance(refused, KeyReused)
    assert ids(realm.read("a")) == [stored.id]


def test_several_that_fill_a_channel(realm: Realm) -> None:
    realm.attach(max_messages=2)

    told = realm.store_all(*[Publication(("a",), b"%d" % n) for n in range(5)])

    history = realm.read("a")
    assert [message.data for message in history.messages] == [b"3", b"4"]
    assert isinstance(told[2], Receipt)
    assert history.floor == told[2].id + 1
    assert realm.bytes() == 2


def test_several_that_fill_a_realm(realm: Realm) -> None:
    """Those for which there is no room are refused, whatever their order."""
    realm.attach(realm_bytes=10)

    told = realm.store_all(
        *[Publication((name,), b'"%b"' % (b"x" * size)) for name, size in (("a", 4), ("b", 4), ("c", 2))]
    )

    assert [type(one) for one in told] == [Receipt, RealmFull, Receipt]
    assert realm.bytes() == 10


@pytest.mark.parametrize(
    "words",
    [("", "1"), ("", "1", "x", "a"), ("", "1", -1, "a"), ("", "1", 2, "a"), ("", "1", 1, "a", "")],
    ids=["no count", "not a number", "negative", "too few channels", "half a publication"],
)
def test_several_must_be_counted_right(realm: Realm, words: tuple[str | int, ...]) -> None:
    """Else nothing is stored of any of them."""
    assert realm.refusal("store_all", 0, *words).startswith("INVALID")
    assert realm.names() == []


def test_several_name_so_many_channels(realm: Realm) -> None:
    """As many as Redis should be asked for at once."""
    realm.attach(publish_channels=600)
    many = [Publication(tuple(f"{letter}{n}" for n in range(501)), b"1") for letter in "ab"]

    assert "at most 1000 channels" in realm.refusal("store_all", *realm.library.store_all(0, many)[4:])
    assert realm.names() == []


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([""], "INVALID a channel's name is not empty, '.' or '..'"),
        (["."], "INVALID a channel's name is not empty, '.' or '..'"),
        ([".."], "INVALID a channel's name is not empty, '.' or '..'"),
        (["x" * 256], "INVALID a channel's name is at most 255 bytes long in UTF-8"),
        (["é" * 128], "INVALID a channel's name is at most 255 bytes long in UTF-8"),
        (["a\nb"], "INVALID a channel's name has no control characters"),
        (["a\0b"], "INVALID a channel's name has no control characters"),
        (["a\x7f"], "INVALID a channel's name has no control characters"),
        (["a\u009f"], "INVALID a channel's name has no control characters"),
        ([b"a\xff"], "INVALID a channel's name is UTF-8"),
        ([b"\xc3"], "INVALID a channel's name is UTF-8"),
        ([b"\xed\xa0\x80"], "INVALID a channel's name is UTF-8"),
        (["0"], f"INVALID a name of digits only is an integer channel, between 1 and {MAX_ID}"),
        (["017"], f"INVALID a name of digits only is an integer channel, between 1 and {MAX_ID}"),
        ([str(MAX_ID + 1)], f"INVALID a name of digits only is an integer channel, between 1 and {MAX_ID}"),
        (["1" * 17], f"INVALID a name of digits only is an integer channel, between 1 and {MAX_ID}"),
        ([], "INVALID a publication names at least one channel"),
        ([f"c{n}" for n in range(101)], "TOOLARGE a publication names at most 100 channels"),
        ([f"c{n}" for n in range(10_000)], "TOOLARGE a publication names at most 100 channels"),
        (["17"], "NOCHANNEL 17"),
        ([str(MAX_ID)], f"NOCHANNEL {MAX_ID}"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_channels(realm: Realm, names: list[str | bytes], sentence: str) -> None:
    """One wrong channel, and the publication is stored in none."""
    realm.publish("a")
    before = realm.client.hgetall(realm.key)

    assert realm.refusal("publish", "1", *names) == sentence
    assert realm.refusal("publish_once", "k", "1", *names) == sentence
    if len(names) == 1:
        assert realm.refusal("publish", "1", "a", *names, "b") == sentence
    assert realm.client.hgetall(realm.key) == before


def test_a_name_given_twice_counts_once(realm: Realm) -> None:
    """The limit is on channels, not on words."""
    realm.attach(publish_channels=2)

    assert realm.publish("a", "b", "a", "b", "a") > 0
    assert realm.publish(*["a", "b"] * 5000) > 0
    assert realm.refusal("publish", "1", "a", "b", "c") == "TOOLARGE a publication names at most 2 channels"


def test_more_channels_than_redis_should_be_asked_for(realm: Realm) -> None:
    """A thousand are stored in one go; more are refused, whatever the realm would allow."""
    realm.attach(publish_channels=20_000)
    names = [f"c{number}" for number in range(1000)]

    id = realm.publish(*names)

    assert [ids(realm.read(name)) for name in ("c0", "c999")] == [[id], [id]]
    for count in (1001, 10_000):
        assert realm.refusal("publish", "1", *[f"c{number}" for number in range(count)]) == (
            "TOOLARGE a publication names at most 1000 channels"
        )


@pytest.mark.parametrize(
    "data",
    [
        *("", " ", "\n", "x", "{", "[1,]", '{"a":1,}', "{1:2}", "1 2", "1]", "[1", "]1,[", "1],[2", "/**/1", "'a'"),
        *('"a', "1,2", '1,"x"', '1,["x"],2', ",1", "1,", '"a":1', "nul", "True", "undefined", "\0", '"\\ud800"'),
        *(b'"\xff"', b"\xff"),
    ],
)
def test_data_that_is_not_json(realm: Realm, data: str | bytes) -> None:
    """Exactly one JSON value in UTF-8, or nothing is stored."""
    sentence = realm.refusal("publish", data, "a")

    assert sentence == "INVALID data is not valid JSON"
    assert realm.names() == []


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"]":', "}]")])
def test_data_nests_as_deep_as_over_http(realm: Realm, opening: str, closing: str) -> None:
    """A hundred levels, arrays and objects together; more would be too much for somebody's parser."""
    levels = NESTING_MAX // (opening.count("[") + opening.count("{"))

    assert realm.publish("a", data=opening * levels + "1" + closing * levels) > 0
    for more in (1, 900, 3000):
        data = opening * (levels + more) + "1" + closing * (levels + more)
        assert realm.refusal("publish", data, "a").startswith("INVALID ")


@pytest.mark.parametrize(
    "data",
    [
        f'"{"[" * 200}"',
        f'"\\"{"{" * 200}"',
        f'["\\\\",{"[]," * 200}1]',
        f"[{'[1,{}],' * 200}1]",
    ],
    ids=lambda data: data[:5],
)
def test_brackets_that_do_not_nest(realm: Realm, data: str) -> None:
    """However many are in strings, or beside each other."""
    realm.publish("a", data=data)

    assert realm.read("a").messages[0].data == data.encode()


def test_data_has_a_limit(realm: Realm) -> None:
    """In bytes, as given by the realm; nothing is stored."""
    realm.attach(message_bytes=10)

    assert realm.publish("a", data='"12345678"') > 0
    assert realm.refusal("publish", '"éééé9"', "a") == "TOOLARGE data is 11 bytes of JSON; the limit is 10"
    assert len(realm.read("a").messages) == 1


def test_a_named_channel_may_have_to_be_made(realm: Realm) -> None:
    """Where names do not come into being by being used, an unknown one is refused in all channels of a publication."""
    realm.attach(implicit=False)
    realm.create("a")

    assert realm.refusal("publish", "1", "a", "b c") == "NOCHANNEL b c"
    assert realm.read("a").messages == []
    assert realm.publish("a") > 0


def test_no_name_reaches_beyond_its_realm(realm: Realm) -> None:
    """Whatever a channel, a key or a node is called, nothing outside the realm comes into being or goes."""
    realm.publish("a")
    other = Realm(realm.client)
    id = other.publish("a")
    before = set(realm.client.keys("*"))
    theirs = (other.client.hgetall(other.key), [id])

    for name in (*NASTY_NAMES, *REFUSED_NAMES):
        for function, *words in (
            ("publish", "1", name),
            ("publish_once", name, "2", "a"),
            ("store", 0, name, "3", name, "a"),
            ("create", 0, name, "", "", ""),
            ("renew", 0, name, ""),
            ("describe", 0, name),
            ("list", 0, name, 10),
            ("read", 0, name, "token", name, 0),
            ("tick", 0, name, "token", "{}", name),
            ("leave", name),
            ("close", 0, name),
        ):
            with suppress(redis.ResponseError):
                realm.call(str(function), *words)

    fresh: set[Any] = set(realm.client.keys("*")) - before
    assert [key for key in fresh if not key.startswith(f"{realm.key}:".encode())] == []
    assert (other.client.hgetall(other.key), ids(other.read("a"))) == theirs


@pytest.mark.parametrize("name", NASTY_NAMES)
def test_names_of_every_kind(realm: Realm, name: str) -> None:
    """What a name is made of is nobody's business: it is published to, listed, read, heard and closed."""
    ear = realm.listen(name)
    node = realm.listen_as("me")
    id = realm.publish(name)
    realm.tick(name)

    assert realm.names() == [name]
    assert ids(realm.read(name)) == [id]
    assert realm.read(name).messages[0].channels == (name,)
    assert parse(ear.hear()) == (id, 0)
    assert parse_echo(node.hear()).tails == {name: id}
    assert realm.call("close", 0, name) == b"OK"
    assert realm.names() == []


def test_the_key_is_a_realms(client: redis.Redis) -> None:
    """A typing error must not become a realm nobody listens to, nor a key that others use."""
    client.set("mine", "1")

    for key in ("mine", "pushup:default", "pushup:{}", "pushup:{a}b", "pushup:{a b}", "pushup:{a}:m:{b}", "Pushup:{a}"):
        with pytest.raises(redis.ResponseError, match=KEY_SENTENCE):
            client.execute_command("FCALL", "pushup_publish", 1, key, "1", "a")
    with pytest.raises(redis.ResponseError, match=KEY_SENTENCE):
        client.execute_command("FCALL", "pushup_publish", 0, "1", "a")
    assert client.get("mine") == b"1"
    client.delete("mine")


# What is kept


def test_a_channel_keeps_the_newest(realm: Realm) -> None:
    """Beyond the count the oldest go, and the floor rises above them."""
    realm.attach(max_messages=2)
    given = [realm.publish("a") for _ in range(5)]

    history = realm.read("a")

    assert ids(history) == given[3:]
    assert given[2] < history.floor <= given[3]
    assert (history.tail, history.whole, history.max_messages) == (given[4], True, 2)


def test_a_channel_keeps_messages_for_its_window(realm: Realm) -> None:
    """Older ones are not read, and the floor rises above them."""
    realm.attach(window=60.0)
    first, second = realm.publish("a"), realm.publish("a")
    old = realm.age("a", first, 61 * SECOND)

    history = realm.read("a")

    assert ids(history) == [second]
    assert (history.floor, history.window) == (old + 1, 60.0)


def test_publishing_drops_old_messages_many_at_once(realm: Realm) -> None:
    """One that is a little too old waits for others; one that is older than an eighth more is dropped."""
    realm.attach(window=80.0)
    old = realm.age("a", realm.publish("a"), 85 * SECOND)
    late, later = realm.publish("a"), realm.publish("a")
    waiting = realm.client.zcard(f"{realm.key}:m:a")
    realm.age("a", old, 10 * SECOND)
    last = realm.publish("a")

    assert waiting == 3
    assert realm.client.zcard(f"{realm.key}:m:a") == 3
    assert ids(realm.read("a")) == [late, later, last]


def test_a_window_of_nothing_keeps_nothing(realm: Realm) -> None:
    """The tail is remembered, and the floor lies above it."""
    realm.attach(window=0.0)
    realm.publish("a")
    last = realm.publish("a")

    history = realm.read("a")

    assert (ids(history), history.tail, history.floor) == ([], last, last + 1)


def test_redis_drops_messages_by_itself_after_the_window(realm: Realm) -> None:
    """A channel nobody publishes to any more takes no memory for messages, an eighth of the window later."""
    realm.attach(window=100.0)
    realm.publish("a")

    for kind in "ms":
        left = int(realm.client.pttl(f"{realm.key}:{kind}:a"))
        assert 112_500 - PATIENCE_S * 1000 < left <= 113_500


def test_redis_keeps_messages_for_their_window(realm: Realm) -> None:
    """Publishing puts off the end of the keys, not with every message but before any is in danger."""
    realm.attach(window=100.0)
    last = realm.publish("a")
    for kind in "ms":
        realm.client.pexpire(f"{realm.key}:{kind}:a", 20_000)
    realm.write_facts("a", tail=last - 13 * SECOND)
    realm.publish("a")

    for kind in "ms":
        assert int(realm.client.pttl(f"{realm.key}:{kind}:a")) > 100_000
        realm.client.pexpire(f"{realm.key}:{kind}:a", 20_000)
    realm.client.hset(realm.key, "last", realm.publish("a") + HOUR)
    realm.publish("a")
    for kind in "ms":
        realm.client.pexpire(f"{realm.key}:{kind}:a", 20_000)
    realm.publish("a")

    for kind in "ms":
        assert int(realm.client.pttl(f"{realm.key}:{kind}:a")) > 100_000


@pytest.mark.parametrize("loss", ["ms", "m", "s", "expired"])
def test_lost_messages_are_below_the_floor(realm: Realm, loss: str) -> None:
    """Also if the next thing that happens is a publication, and whether messages, their sizes or both were lost."""
    for name in ("a", "b"):
        realm.publish(name)
        last = realm.publish(name)
        for kind in "ms" if loss == "expired" else loss:
            key = f"{realm.key}:{kind}:{name}"
            assert realm.client.pexpireat(key, 1) if loss == "expired" else realm.client.delete(key)
        if name == "a":
            history = realm.read(name)
            assert (ids(history), history.tail, history.floor) == ([], last, last + 1)
        new = realm.publish(name)
        history = realm.read(name)

        assert (ids(history), history.tail, history.floor) == ([new], new, last + 1)
    assert realm.bytes() == 2


def test_channels_with_the_same_facts_stay_apart(realm: Realm) -> None:
    """Two that were begun by one publication differ in nothing but their names, and each goes on by itself."""
    both = realm.publish("a", "b")
    assert realm.facts("a") == realm.facts("b")
    a = [realm.publish("a", data="11") for _ in range(2)]
    b = realm.publish("b")

    assert ids(realm.read("a")) == [both, *a]
    assert ids(realm.read("b")) == [both, b]
    assert (realm.facts("a")["tail"], realm.facts("b")["tail"]) == (str(a[-1]), str(b))
    assert (realm.facts("a")["bytes"], realm.facts("b")["bytes"]) == ("5", "2")


def test_a_refused_publication_leaves_nothing_behind(realm: Realm) -> None:
    """Also where the same channel was published to just before, and what is refused made room first."""
    realm.attach(realm_bytes=10)
    realm.create("a", window=60)
    first = realm.publish("a", data="12345")
    before = realm.record(), realm.facts("a")
    refusals = [realm.refusal("publish", data, "a") for data in ("1234567", "no JSON")]
    after = realm.record(), realm.facts("a")
    last = realm.publish("a", data="12345")

    assert [refusal.split(" ")[0] for refusal in refusals] == ["REALMFULL", "INVALID"]
    assert before == after
    assert ids(realm.read("a")) == [first, last]
    assert realm.bytes() == 10


def test_a_lost_channel_is_described_as_it_is(realm: Realm) -> None:
    """Without messages, there is no first and no last."""
    realm.publish("a")
    realm.client.delete(f"{realm.key}:m:a")

    info = parse_info(realm.call("describe", 0, "a"))

    assert (info.messages, info.first, info.last) == (0, None, None)


def test_a_channel_that_lost_some_of_its_messages_has_lost_all(realm: Realm) -> None:
    """What Redis did not drop as a whole was changed by someone else; nothing that is left is vouched for."""
    _, _, last = realm.publish("a"), realm.publish("a"), realm.publish("a")
    realm.client.zremrangebyrank(f"{realm.key}:m:a", 0, 1)

    history = realm.read("a")

    assert (ids(history), history.tail, history.floor) == ([], last, last + 1)
    assert realm.bytes() == 0
    assert not realm.client.exists(f"{realm.key}:m:a", f"{realm.key}:s:a")


@pytest.mark.parametrize("field", [None, "last", "realm"])
def test_a_lost_realm_begins_above_everything(realm: Realm, field: str | None) -> None:
    """The floor of every channel, known or not, is above every id that was given; old messages do not come back."""
    last = max(realm.publish("a"), realm.publish("b"), int(realm.create().channel))
    assert realm.client.delete(realm.key) if field is None else realm.client.hdel(realm.key, field)

    empty = realm.read("a")
    new = realm.publish("a")
    again = realm.read("a")

    assert (ids(empty), empty.tail) == ([], 0)
    assert last < empty.floor <= new
    assert (ids(again), again.floor) == ([new], empty.floor)
    assert realm.read("never").floor == empty.floor
    assert realm.names() == ["a"]


def test_a_lost_realm_begins_above_what_callers_have_seen(realm: Realm) -> None:
    """Also if the clock of this server is behind."""
    seen = realm.publish("a") + HOUR
    realm.client.delete(realm.key)

    history = realm.read("a", seen=seen)

    assert history.floor > seen
    assert realm.publish("a") > seen


def test_a_new_life_of_a_realm_has_another_origin(realm: Realm) -> None:
    """Who heard the old one's announcements does not take the new one's for a continuation."""
    one = realm.attach()
    realm.client.delete(realm.key)
    two = realm.attach()

    assert one != two
    assert realm.library.pubsub(one).announcements("a") != realm.library.pubsub(two).announcements("a")


@pytest.mark.parametrize("index", ["names", "due", "stale"])
def test_lost_indexes_are_rebuilt(realm: Realm, index: str) -> None:
    """By the next tick: all channels are listed, and close in their time."""
    for name in ("a", "b", "é"):
        realm.create(name)
    realm.create("short", ttl_us=1)
    realm.client.delete(f"{realm.key}:{index}")

    realm.tick()

    assert realm.names() == ["a", "b", "é"]
    assert realm.record()["channels"] == "3"
    assert realm.client.zcard(f"{realm.key}:due") == realm.client.zcard(f"{realm.key}:stale") == 3


def test_a_lost_entry_of_an_index_is_enough(realm: Realm) -> None:
    """Counts are compared."""
    for name in ("a", "b"):
        realm.create(name)
    realm.client.zrem(f"{realm.key}:names", "a")
    assert realm.names() == ["b"]

    realm.tick()

    assert realm.names() == ["a", "b"]


# What a realm may hold


def test_a_realm_has_room_for_so_many_bytes(realm: Realm) -> None:
    """Of data, counted in every channel it is stored in. What is refused leaves no trace, and nobody is told a gap."""
    realm.attach(realm_bytes=10)
    ear = realm.listen("a")
    realm.attach(realm_bytes=10)
    first = realm.publish("a", "b", data="1234")
    before = realm.client.hgetall(realm.key), realm.keys()
    sentence = realm.refusal("publish_once", "k", '"a"', "a")
    after = realm.client.hgetall(realm.key), realm.keys()
    last = realm.publish("a", data="12")

    assert re.fullmatch("REALMFULL [1-9][0-9]? 8 bytes of data are cached in the realm; the limit is 10", sentence), (
        sentence
    )
    assert before == after
    assert realm.refusal("publish", "1", "new").startswith("REALMFULL ")
    assert "new" not in realm.names()
    assert [parse(ear.hear()) for _ in range(2)] == [(first, 0), (last, first)]
    assert realm.read("a").floor <= first
    assert realm.bytes() == 10


def test_the_wait_is_told_in_seconds(realm: Realm) -> None:
    """Until the oldest message is too old; a minute at the most, as more room may come by other ways."""
    realm.attach(window=40.0, realm_bytes=1)
    realm.publish("a")
    soon = translate(realm.refusal("publish", "1", "b"))
    realm.attach(window=4000.0, realm_bytes=1)
    realm.call("close", 0, "a")
    realm.publish("a")
    late = translate(realm.refusal("publish", "1", "b"))

    assert isinstance(soon, RealmFull)
    assert isinstance(late, RealmFull)
    assert 40 - PATIENCE_S < soon.members["retry_after"] <= 41
    assert late.members["retry_after"] == 60


def test_a_repeat_needs_no_room(realm: Realm) -> None:
    """What is stored already gets its id, and another publication under its key is told so."""
    realm.attach(realm_bytes=4)
    id = realm.call("publish_once", "k", "1234", "a")

    assert realm.call("publish_once", "k", "1234", "a") == id
    assert realm.refusal("publish_once", "k", "123", "a").startswith("KEYREUSED ")
    assert realm.refusal("publish_once", "l", "1", "a").startswith("REALMFULL ")


def test_what_a_message_pushes_out_makes_room(realm: Realm) -> None:
    """A channel that holds as many messages as it may goes on in a full realm; bigger ones do not fit."""
    realm.attach(realm_bytes=4, max_messages=2)
    given = [realm.publish("a", data="12") for _ in range(4)]

    assert ids(realm.read("a")) == given[2:]
    assert realm.refusal("publish", "123", "a").startswith("REALMFULL ")
    assert ids(realm.read("a")) == given[2:]
    assert realm.publish("a", data="1") > 0
    assert realm.bytes() == 3


@pytest.mark.parametrize("how", ["close", "window", "ttl", "evicted", "evicted sizes", "lost"])
def test_room_comes_back(realm: Realm, how: str) -> None:
    """However messages go, a realm that is full takes publications to other channels; the full one is not touched."""
    realm.attach(realm_bytes=4, window=100.0)
    realm.create("a")
    id = realm.publish("a", data="1234")
    assert realm.refusal("publish", "1", "b").startswith("REALMFULL ")
    match how:
        case "close":
            realm.call("close", 0, "a")
        case "window":
            realm.age("a", id, 101 * SECOND)
        case "ttl":
            realm.write_facts("a", expires=1)
            realm.client.zadd(f"{realm.key}:due", {"a": 1})
            realm.tick()
        case "lost":
            realm.client.delete(realm.key)
        case "evicted" | "evicted sizes":
            # Redis says nothing of it; it is found where room is looked for, when the messages would have gone.
            realm.client.delete(f"{realm.key}:{'m' if how == 'evicted' else 's'}:a")
            realm.client.zadd(f"{realm.key}:stale", {"a": 1})

    assert realm.publish("b") > id
    assert realm.bytes() == 1


def test_room_is_made_a_part_at_a_time(realm: Realm) -> None:
    """Redis does nothing else meanwhile: a hundred channels are looked at, and the publisher may come back at once."""
    realm.attach(realm_bytes=1)
    realm.publish("full")
    for number in range(150):
        realm.create(f"c{number}")
        realm.client.zadd(f"{realm.key}:stale", {f"c{number}": number + 1})

    sentence = realm.refusal("publish", "1", "b")
    left = realm.client.zcount(f"{realm.key}:stale", 0, 1000)

    assert sentence.startswith("REALMFULL 1 ")
    assert left == 50


def test_ticks_make_room_in_a_realm_that_is_half_full(realm: Realm) -> None:
    """So that there is room before somebody is refused. One that is not leaves it to Redis."""
    realm.attach(realm_bytes=8, window=100.0)
    counts = []
    for name, data in (("a", "1234"), ("b", "1")):
        realm.age(name, realm.publish(name, data=data), 101 * SECOND)
        realm.tick()
        counts.append(realm.bytes())

    assert counts == [4, 1]


def test_an_entry_of_a_channel_that_is_gone_makes_no_room(realm: Realm) -> None:
    """It is removed where it is found."""
    realm.attach(realm_bytes=1)
    realm.publish("a")
    realm.client.zadd(f"{realm.key}:stale", {"gone": 1})

    assert realm.refusal("publish", "1", "b").startswith("REALMFULL ")
    assert realm.client.zscore(f"{realm.key}:stale", "gone") is None


def test_a_lower_limit_lets_nothing_go(realm: Realm) -> None:
    """What is there stays for its window; nothing is added until there is room."""
    realm.attach(realm_bytes=8)
    id = realm.publish("a", data="12345678")
    realm.attach(realm_bytes=4)

    assert realm.refusal("publish", "1", "a").startswith("REALMFULL ")
    assert ids(realm.read("a")) == [id]


def test_a_realm_of_version_1(realm: Realm) -> None:
    """It had no sizes: its channels stay, their messages go as if lost, the limit is the default's, the count exact."""
    realm.attach(window=7.0)
    realm.create("empty", ttl=5000.0)
    first, last = realm.publish("a", "b"), realm.publish("a", "b")
    record = realm.record()
    del record["realm_bytes"]
    realm.client.hset(realm.key, "realm", " ".join(record.values()))
    realm.client.hdel(realm.key, "bytes")
    for name in ("a", "b", "empty"):
        facts = realm.facts(name)
        del facts["bytes"]
        realm.client.hset(realm.key, f"c:{name}", " ".join(facts.values()))
    realm.client.delete(f"{realm.key}:stale", *(f"{realm.key}:s:{name}" for name in "ab"))

    new = realm.publish("a")
    realm.tick()

    assert first < last
    assert [ids(realm.read(name)) for name in ("a", "b", "empty")] == [[new], [], []]
    assert [realm.read(name).floor for name in ("a", "b")] == [last + 1] * 2
    assert realm.read("a").window == 7.0
    assert parse_info(realm.call("describe", 0, "empty")).ttl == 5000.0
    assert realm.publish("empty") > new
    assert realm.bytes() == 2
    assert realm.record()["realm_bytes"] == str(Retention().realm_bytes)
    assert realm.client.zcard(f"{realm.key}:stale") == 3


def test_a_node_of_version_1_says_nothing_of_bytes(realm: Realm) -> None:
    """What the realm may hold stays as another one said."""
    realm.attach(realm_bytes=4)
    realm.call("attach", 0, "", 0, 0, 10**9, 10**9, 10, 10**9, 1, 65536, 100)

    assert realm.refusal("publish", "12345", "a").startswith("REALMFULL ")


# Channels


def test_integer_channels_are_handed_out_once(realm: Realm) -> None:
    """Each is a number never given before, with the realm's defaults."""
    realm.attach(ttl=50.0, window=5.0, max_messages=7)
    one, two = realm.create(), realm.create()

    assert int(one.channel) < int(two.channel)
    assert (one.ttl, one.window, one.max_messages, one.messages, one.first, one.last) == (50, 5, 7, 0, None, None)
    assert one.expires == one.created + 50 * SECOND
    assert realm.publish(one.channel) > int(two.channel)
    assert realm.publish(two.channel, one.channel) > 0


def test_a_channels_own_options(realm: Realm) -> None:
    """Win over the defaults, also those that come later, and hold when it is used."""
    info = realm.create("a", ttl=50.5, window=5.25, max_messages=1)
    realm.attach(ttl=1.0, window=1.0, max_messages=100)
    realm.publish("a")
    last = realm.publish("a")

    described = parse_info(realm.call("describe", 0, "a"))

    assert (info.ttl, info.window, info.max_messages) == (50.5, 5.25, 1)
    assert (described.ttl, described.window, described.max_messages) == (50.5, 5.25, 1)
    assert (described.messages, described.first, described.last) == (1, last, last)
    assert last + 50_500_000 - SECOND < described.expires <= last + 50_500_000 + SECOND


def test_a_name_is_taken_once(realm: Realm) -> None:
    """By being made or by being used; the one that is there stays as it is."""
    realm.create("a", ttl=50.0)
    realm.publish("b c")

    assert realm.refusal("create", 0, "a", "", "", "") == "EXISTS a"
    assert realm.refusal("create", 0, "b c", "", "", "") == "EXISTS b c"
    assert parse_info(realm.call("describe", 0, "a")).ttl == 50.0


def test_integers_cannot_be_chosen(realm: Realm) -> None:
    """They are handed out, so that nobody meets another one's."""
    assert realm.refusal("create", 0, "17", "", "", "") == (
        "INVALID a name of digits only is an integer channel, and those are handed out"
    )


@pytest.mark.parametrize(
    "odd", ["-1", "1.5", "1e3", "0x10", "nan", "inf", "x", " 1", "1\n", str(MAX_ID + 1), "9" * 400, "é"]
)
def test_numbers_that_are_none(realm: Realm, odd: str) -> None:
    """Are refused before anything is done, so that none is written that nobody can read."""
    id = realm.publish("a")
    realm.attach()
    good = ("0", "1", "1", "1", "1", "1", "1", "1", "1")
    before = realm.client.hgetall(realm.key)

    calls: list[tuple[str | int, ...]] = [
        ("renew", 0, "a", odd),
        ("read", 0, "me", "t", "a", odd),
        ("witness", 0, "", odd),
    ]
    for wrong in range(3):
        calls.append(("create", 0, "b", *(odd if at == wrong else "" for at in range(3))))
    for wrong in range(9):
        calls.append(("attach", 0, "", 0, *(odd if at == wrong else number for at, number in enumerate(good))))
    for function, *words in calls:
        assert realm.refusal(str(function), *words).startswith("INVALID an argument that must be a whole number"), words
    assert realm.client.hgetall(realm.key) == before
    assert ids(realm.read("a")) == [id]


def test_a_channel_keeps_at_least_one_message(realm: Realm) -> None:
    """Also if it was asked for none."""
    assert realm.refusal("create", 0, "a", "", "", 0).startswith("INVALID an argument that must be a whole number")


def test_making_and_closing_is_announced(realm: Realm) -> None:
    """Closing with a position: above all that was in the channel, and nothing later is below it."""
    ear = realm.listen("a")
    realm.create("a")
    id = realm.publish("a")
    realm.call("close", 0, "a")
    later = realm.publish("b")

    assert parse_event(ear.hear()) is None
    assert parse(ear.hear()) == (id, 0)
    position = parse_event(ear.hear())
    assert isinstance(position, int)
    assert id < position <= later


@pytest.mark.parametrize("words", [("renew", 0, "a b", ""), ("close", 0, "a b"), ("describe", 0, "a b")])
def test_what_does_not_exist_is_said(realm: Realm, words: tuple[Any, ...]) -> None:
    """With its name as it was given."""
    assert realm.refusal(*words) == "NOCHANNEL a b"


def test_channels_are_listed_in_pages(realm: Realm) -> None:
    """By name in the order of code points, the name after which to go on left out."""
    names = ["Z", "a", "aa", "b", "é", "日本", "😀"]
    for name in reversed(names):
        realm.publish(name)

    pages = []
    after = ""
    while page := [parse_info(info).channel for info in realm.do(realm.library.list(0, after, 3))]:
        pages.append(page)
        after = page[-1]

    assert pages == [names[:3], names[3:6], names[6:]]


def test_renewing_counts_from_now(realm: Realm) -> None:
    """By the channel's own ttl, or by another one that is its own from then on."""
    created = realm.create("a", ttl=10.0)
    same = parse_info(realm.do(realm.library.renew(0, "a", None)))
    longer = parse_info(realm.do(realm.library.renew(0, "a", 100.0)))

    assert (same.ttl, longer.ttl) == (10.0, 100.0)
    assert created.expires < same.expires < now(realm.client) + 10 * SECOND
    assert longer.expires > created.expires + 89 * SECOND


def test_a_channel_nobody_publishes_to_closes_itself(realm: Realm) -> None:
    """Its ttl after it was made, with the next tick; an announcement says so."""
    ear = realm.listen("quiet")
    realm.create("quiet", ttl_us=1)
    realm.create("lively")
    realm.tick()

    assert parse_event(ear.hear()) is None
    assert isinstance(parse_event(ear.hear()), int)
    assert realm.names() == ["lively"]
    assert realm.refusal("describe", 0, "quiet") == "NOCHANNEL quiet"
    assert not realm.client.exists(f"{realm.key}:m:quiet")


def test_renewing_puts_off_the_end(realm: Realm) -> None:
    """A longer ttl keeps it, a shorter one ends it sooner."""
    realm.create("longer", ttl_us=1)
    realm.do(realm.library.renew(0, "longer", 100.0))
    realm.create("shorter")
    realm.do(realm.library.renew(0, "shorter", 0.000001))

    realm.tick()

    assert realm.names() == ["longer"]


def test_publishing_puts_off_the_end(realm: Realm) -> None:
    """The ttl counts from the last publication."""
    realm.create("a")
    realm.publish("a")
    realm.write_facts("a", expires=1)
    realm.client.zadd(f"{realm.key}:due", {"a": 1})
    realm.publish("a")

    realm.tick()

    assert realm.names() == ["a"]
    assert realm.client.zscore(f"{realm.key}:due", "a") == float(realm.facts("a")["expires"])


def test_many_channels_close_a_part_at_a_time(realm: Realm) -> None:
    """Redis does nothing else meanwhile, so a tick closes a hundred at the most, the next one goes on."""
    for number in range(130):
        realm.create(f"c{number}", ttl_us=1)

    counts = []
    for _ in range(2):
        realm.tick()
        counts.append(len(realm.names()))

    assert counts == [30, 0]


def test_an_entry_without_a_channel_is_swept_away(realm: Realm) -> None:
    """It would be looked at with every tick."""
    realm.create("a")
    realm.create("gone")
    realm.client.hdel(realm.key, "c:gone")
    realm.client.zadd(f"{realm.key}:due", {"gone": 1})

    realm.tick()

    assert realm.client.zscore(f"{realm.key}:due", "gone") is None
    assert realm.names() == ["a"]


def test_what_a_closed_channel_had_is_below_its_floor(realm: Realm) -> None:
    """Who was in the middle of it is told of a gap, before and after it comes into being again."""
    ear = realm.listen("a")
    realm.publish("a")
    last = realm.publish("a")
    realm.call("close", 0, "a")

    empty = realm.read("a")
    new = realm.publish("a")
    again = realm.read("a")

    assert (ids(empty), empty.tail, empty.floor) == ([], last, last + 1)
    assert (ids(again), again.floor) == ([new], last + 1)
    assert [ear.hear()[:6] for _ in range(3)][2] == b"closed"
    assert parse(ear.hear()) == (new, last)
    assert realm.record()["closed"] == "0"
    assert not realm.client.exists(f"{realm.key}:closed")


def test_closed_channels_are_remembered_up_to_a_number(realm: Realm) -> None:
    """What is forgotten raises the floor of everything unknown: rather a gap too many than one too few."""
    realm.attach()
    realm.client.zadd(f"{realm.key}:closed", {f"c{number}": number + 1 for number in range(10_000)})
    realm.write(closed=10_000, unknown=1, floor=1)
    last = realm.publish("a")
    before = realm.read("never").floor

    realm.call("close", 0, "a")

    assert before == 1
    assert realm.client.zcard(f"{realm.key}:closed") == 10_000
    assert realm.client.zscore(f"{realm.key}:closed", "c0") is None
    assert realm.read("c0").floor == realm.read("never").floor == 2
    assert (realm.read("c1").floor, realm.read("a").floor) == (3, last + 1)


def test_lost_memory_of_closed_channels_raises_the_floor(realm: Realm) -> None:
    """Of channels that are not known only."""
    kept = realm.publish("kept")
    closed = realm.publish("closed")
    realm.call("close", 0, "closed")
    before = realm.read("kept").floor
    realm.client.delete(f"{realm.key}:closed")

    assert realm.read("closed").floor > closed
    assert realm.read("never").floor > closed
    assert (ids(realm.read("kept")), realm.read("kept").floor) == ([kept], before)


def test_an_integer_channel_is_gone_for_good(realm: Realm) -> None:
    """It cannot come back, so it is not remembered either."""
    name = realm.create().channel
    realm.publish(name)
    realm.call("close", 0, name)

    assert realm.refusal("publish", "1", name) == f"NOCHANNEL {name}"
    assert not realm.client.exists(f"{realm.key}:closed")


def test_closing_an_empty_channel_leaves_nothing_behind(realm: Realm) -> None:
    """Nobody can have been in the middle of it."""
    realm.create("a")
    realm.call("close", 0, "a")

    assert not realm.client.exists(f"{realm.key}:closed")
    assert set(realm.client.hgetall(realm.key)) == {b"last", b"realm", b"bytes"}


# For nodes


def test_reading_from_somewhere(realm: Realm) -> None:
    """From a start above the floor on, a part is read, and it says so; else all there is."""
    given = [realm.publish("a") for _ in range(4)]
    floor = realm.read("a").floor

    part, all_of_it, ahead = realm.read("a", given[2]), realm.read("a", floor), realm.read("a", given[3] + 1)

    assert (ids(part), part.floor, part.whole, part.tail) == (given[2:], given[2], False, given[3])
    assert (ids(all_of_it), all_of_it.floor, all_of_it.whole) == (given, floor, True)
    assert (ids(ahead), ahead.floor, ahead.whole, ahead.tail) == ([], given[3] + 1, False, given[3])


def test_reading_many_channels(realm: Realm) -> None:
    """Each has its answer, in order, also those that would have to be made, wherever they stand."""
    a, b = realm.publish("a"), realm.publish("b")
    names = ["17", "b", "18", "never", "a", "19", "20"]

    reply = realm.do(realm.library.read(0, "me", "token", dict.fromkeys(names, 0)))
    histories, position, _ = parse_histories(reply, names)

    assert list(histories) == names
    assert [name for name, history in histories.items() if history is None] == ["17", "18", "19", "20"]
    assert [ids(history) for history in histories.values() if history] == [[b], [], [a]]
    assert {history.position for history in histories.values() if history} == {position}


def test_reads_and_ticks_are_echoed(realm: Realm) -> None:
    """On the node's own channel: position, floor, origin, token, and for a tick the tails of the channels it names."""
    origin = realm.attach()
    ear = realm.listen_as("me")
    id = realm.publish("a", "é b")
    read = parse_position(realm.do(realm.library.read(0, "me", "one", {"a": 0})))
    tick = parse_position(realm.do(realm.library.tick(0, "me", "two", ABOUT, ["é b", "never", "17"])))

    floor = int(realm.record()["floor"])
    assert parse_echo(ear.hear()) == Echo(read[0], floor, origin, "one", {})
    assert parse_echo(ear.hear()) == Echo(tick[0], floor, origin, "two", {"é b": id, "never": 0, "17": 0})
    assert id < read[0] <= tick[0]
    assert read[1] == tick[1] == origin


def test_a_node_sets_the_defaults(realm: Realm) -> None:
    """What the last one to begin said holds from then on, for channels that come into being."""
    realm.attach(window=10.0)
    realm.publish("a")
    realm.attach(window=20.0)
    realm.publish("b")

    assert [realm.read(name).window for name in ("a", "b", "never")] == [10.0, 20.0, 20.0]


@pytest.mark.parametrize(("ahead", "told"), [(1, True), (0, False), (-1, False)])
def test_a_node_from_another_server_that_served_meanwhile(realm: Realm, ahead: int, told: bool) -> None:
    """If it knows an id from there above the last one before this run, what the other acknowledged is not here."""
    last = realm.publish("a")
    since = int(realm.record()["since"])

    realm.attach(0, "another:1", since + ahead)

    assert (realm.read("a").floor > last) is told
    assert realm.publish("a") > last


def test_a_node_that_comes_back_to_the_same_server(realm: Realm) -> None:
    """Whatever it knows from there is here."""
    origin = realm.attach()
    last = realm.publish("a")
    before = realm.read("a").floor

    realm.attach(last, origin, last)

    assert realm.read("a").floor == before


@pytest.mark.parametrize("kept", [True, False])
def test_another_run_of_the_server(realm: Realm, kept: bool) -> None:
    """What was acknowledged before is here, if the server keeps everything; else nobody can say."""
    realm.attach(kept=kept)
    last = realm.publish("a")
    before = realm.read("a")
    realm.write(run="another")

    after = realm.read("a")
    new = realm.publish("a")

    assert (after.floor == before.floor) is kept
    assert (after.floor > last) is not kept
    assert int(realm.record()["since"]) >= last
    assert ids(realm.read("a")) == [last, new]
    assert realm.read("a").floor == after.floor


def test_nodes_are_listed_while_they_are_heard_of(realm: Realm) -> None:
    """Each by what it said last; one that was silent for a minute is forgotten, one that left is gone."""
    for name in ("b", "a", "left"):
        realm.do(realm.library.tick(0, name, "token", msgspec.structs.replace(ABOUT, name=name), []))
    realm.client.hset(f"{realm.key}:nodes", "old", f"{now(realm.client) - 60 * SECOND} {{}}")
    realm.do(realm.library.leave("left"))

    nodes, time = parse_nodes(realm.do(realm.library.nodes()))

    assert [node.name for node in nodes] == ["a", "b"]
    assert all(time - PATIENCE_S * SECOND < node.seen <= time for node in nodes)
    assert set(realm.client.hkeys(f"{realm.key}:nodes")) == {b"a", b"b"}
    assert realm.do(realm.library.leave("left")) == 0


def test_a_realm_without_nodes(realm: Realm) -> None:
    """Asking makes nothing."""
    nodes, time = parse_nodes(realm.do(realm.library.nodes()))

    assert nodes == []
    assert time <= now(realm.client)
    assert not realm.client.exists(realm.key, f"{realm.key}:nodes")


def test_the_version_is_ours(realm: Realm) -> None:
    """So nodes know whether the server has what they need."""
    assert realm.do(realm.library.version()) == VERSION


# In the real server only


names_in_bytes = st.one_of(st.binary(max_size=6), st.text(max_size=6).map(lambda text: text.encode(errors="replace")))


@given(name=st.one_of(names_in_bytes, st.integers(0, 2 * MAX_ID).map(lambda number: b"%d" % number)))
@settings(max_examples=300, deadline=None)
def test_names_are_what_they_are_over_http(real: redis.Redis, name: bytes) -> None:
    """Redis and the node agree on every name."""
    try:
        parse_channel(name.decode())
        good = True
    except (UnicodeDecodeError, InvalidParameter):
        good = False

    with pytest.raises(redis.ResponseError) as caught:
        real.execute_command("FCALL", "pushup_describe", 1, realm_key("names"), 0, name)

    assert str(caught.value).partition(" ")[0] == ("NOCHANNEL" if good else "INVALID")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=10,
)


@given(value=json_values, ascii_only=st.booleans(), indent=st.sampled_from((None, 1)))
@settings(max_examples=100, deadline=None)
def test_all_json_goes_through(real: redis.Redis, value: Any, ascii_only: bool, indent: int | None) -> None:
    """Byte for byte, but for line breaks."""
    data = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    realm = Realm(real)
    realm.store("a", data=data)
    (message,) = realm.read("a").messages

    assert message.data == data.replace(b"\n", b" ")


CRUMBS = (
    *(
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        '"',
        "\\",
        " ",
        "0",
        "1",
        ".",
        "e",
        "E",
        "+",
        "-",
        "\n",
        "\t",
        "\0",
        "x",
        "[[[",
        "]]]",
    ),
    *("null", "true", "NaN", "Infinity", "nan", "0x1F", '"a"', "\\u00", "\\ud800", "1e999"),
    *("é", "\u2028", "//", "/*"),
)
json_crumbs = st.lists(st.sampled_from(CRUMBS), max_size=8).map("".join)


@given(data=st.one_of(json_crumbs.map(str.encode), st.binary(max_size=5)))
@settings(max_examples=300, deadline=None)
def test_whatever_goes_through_spoils_no_answer(real: redis.Redis, data: bytes) -> None:
    """Redis checks less strictly than we do; what a node makes of it is JSON, and one line."""
    realm = Realm(real)
    stored = 1
    try:
        realm.store("a", data=data)
    except redis.ResponseError as error:
        stored = 0
        assert str(error) == "INVALID data is not valid JSON"  # noqa: PT017
    messages = realm.read("a").messages

    assert len(messages) == stored
    for message in messages:
        text = message.data.decode()
        json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert "\n" not in text
        assert message.channels == ("a",)


def test_a_server_without_memory(real_realm: Realm) -> None:
    """Stores nothing and makes nothing, but goes on telling, closing and ticking."""
    client = real_realm.client
    real_realm.create("a")
    real_realm.publish("b")
    client.config_set("maxmemory", "1")
    try:
        refusals = [real_realm.refusal("publish", "1", "a"), real_realm.refusal("create", 0, "c", "", "", "")]
        real_realm.tick("b")
        histories = real_realm.read("b")
        real_realm.do(real_realm.library.renew(0, "b", 5.0))
        real_realm.call("close", 0, "a")
        names = real_realm.names()
    finally:
        client.config_set("maxmemory", "0")

    assert [str(translate(sentence)) for sentence in refusals] == ["Redis has no memory left"] * 2
    assert len(histories.messages) == 1
    assert names == ["b"]


def test_a_user_without_the_right_to_notice_a_restart(redis_server: RedisServer, real_realm: Realm) -> None:
    """Is told which permission is missing."""
    client = real_realm.client
    client.execute_command("ACL", "SETUSER", "blind", "on", ">secret", "~*", "&*", "+@all", "-info")
    client.execute_command(*LOAD)  # The functions remember what they once were told.
    try:
        with redis.Redis(port=redis_server.port, username="blind", password="secret") as blind:
            sentence = Realm(blind).refusal("publish", "1", "a")
    finally:
        client.execute_command("ACL", "DELUSER", "blind")
        client.execute_command(*LOAD)

    assert "PushUp needs the permission +info to notice a restart" in sentence
    assert isinstance(translate(sentence), BrokerRefused)


def redis_cli(server: RedisServer, *words: str) -> str:
    command = ["redis-cli", "-p", str(server.port), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout.strip()


def test_one_documented_call(redis_server: RedisServer, real_realm: Realm) -> None:
    """Any program publishes with the words that the README says; the answer is the id."""
    published = redis_cli(
        redis_server, "FCALL", "pushup_publish", "1", real_realm.key, '{"headline":"It works"}', "news", "sports"
    )
    once = [
        redis_cli(redis_server, "FCALL", "pushup_publish_once", "1", real_realm.key, "order-4711", '"Once"', "news")
        for _ in range(2)
    ]
    refused = redis_cli(redis_server, "FCALL", "pushup_publish", "1", real_realm.key, "It works", "news")

    assert [(m.id, m.channels, m.data) for m in real_realm.read("news").messages] == [
        (int(published), ("news", "sports"), b'{"headline":"It works"}'),
        (int(once[0]), ("news",), b'"Once"'),
    ]
    assert once[0] == once[1]
    assert refused == "INVALID data is not valid JSON"


# The Python side


def test_calls_in_words() -> None:
    """Each begins with the realm's key, and with the id that was seen."""
    library = Library("r")
    retention = Retention(1.5, 2.5, 3, 4.5, False, 5, 6, 7)

    def words(function: str, *rest: str | bytes | int) -> Call:
        return ("FCALL", f"pushup_{function}", 1, "pushup:{r}", *rest)

    assert library.store(5, Publication(("a", "b"), b"{}")) == words("store", 5, "", b"{}", "a", "b")
    assert library.store(5, Publication(("a",), b"1", "k")) == words("store", 5, "k", b"1", "a")
    assert library.store_all(5, [Publication(("a", "b"), b"{}"), Publication(("a",), b"1", "k")]) == words(
        "store_all", 5, "", b"{}", 2, "a", "b", "k", b"1", 1, "a"
    )
    assert library.create(5, None, ChannelOptions()) == words("create", 5, "", "", "", "")
    assert library.create(5, "a", ChannelOptions(1.5, 0.0, 7)) == words("create", 5, "a", 1_500_000, 0, 7)
    assert library.renew(5, "a", None) == words("renew", 5, "a", "")
    assert library.renew(5, "a", 0.1) == words("renew", 5, "a", 100_000)
    assert library.close(5, "a") == words("close", 5, "a")
    assert library.describe(5, "a") == words("describe", 5, "a")
    assert library.list(5, "a", 7) == words("list", 5, "a", 7)
    assert library.read(5, "me", "t", {"a": 1, "b": 0}) == words("read", 5, "me", "t", "a", 1, "b", 0)
    assert library.attach(5, "run:1", 4, True, retention) == words(
        "attach", 5, "run:1", 4, 1, 1_500_000, 2_500_000, 3, 4_500_000, 0, 5, 6, 7
    )
    assert library.leave("me") == words("leave", "me")
    assert library.nodes() == words("nodes")
    assert library.version() == ("FCALL", "pushup_version", 0)
    about = msgspec.json.encode(ABOUT)
    assert library.tick(5, "me", "t", ABOUT, ["a", "b"]) == words("tick", 5, "me", "t", about, "a", "b")


def test_pubsub_names() -> None:
    """Those of channels and of nodes never meet, nor do two lives of a realm; what is heard is taken apart again."""
    library = Library("r")
    pubsub = library.pubsub("run:7")

    assert pubsub.announcements("a:n:b") == "pushup:{r}:7:a:a:n:b"
    assert pubsub.echoes("a") == "pushup:{r}:7:n:a"
    assert pubsub.channel_of("pushup:{r}:7:a:a:n:b") == "a:n:b"
    assert pubsub.channel_of(pubsub.echoes("a:a")) is None
    assert library.pubsub("run:8").channel_of(pubsub.announcements("a")) is None


def test_replies() -> None:
    """As Redis gives them, and as Python has them."""
    assert parse_receipt([5, 1, b"run:7"]) == (Receipt(5, duplicate=True), "run:7")
    assert parse_receipt([5, 0, b"run:7"]) == (Receipt(5), "run:7")
    assert parse_receipts([b"run:7", 5, [4], 6]) == [
        (Receipt(5), "run:7"),
        (Receipt(4, duplicate=True), "run:7"),
        (Receipt(6), "run:7"),
    ]
    refused, elsewhere = parse_receipts([b"run:7", b"NOCHANNEL 17", b"READONLY You can't write"])
    assert (type(refused), type(elsewhere)) == (ChannelNotFound, Unavailable)
    assert parse_position([b"9007199254740991", b"run:7"]) == (MAX_ID, "run:7")
    assert parse_info([b"\xc3\xa9", b"1", b"2", b"1500000", b"0", b"3", 4, b"5", b"6"]) == ChannelInfo(
        "é", 1, 2, 1.5, 0.0, 3, 4, 5, 6
    )
    assert parse_info([b"a", b"1", b"2", b"1", b"0", b"3", 0, b"0", b"0"]) == ChannelInfo(
        "a", 1, 2, 0.000001, 0.0, 3, 0, None, None
    )
    assert parse_nodes([b"7"]) == ([], 7)


def test_histories_end_before_what_must_be_made() -> None:
    """Lua's lists end before a trailing false, and have none for those in the middle."""
    known = [b"5", b"4", 0, b"1000000", b"10", [b'[5,["b"],1]']]

    histories, position, origin = parse_histories([b"9", b"run:7", [None, known]], ["a", "b", "c", "d"])

    assert (list(histories), position, origin) == (["a", "b", "c", "d"], 9, "run:7")
    assert [histories[name] for name in "acd"] == [None] * 3
    history = histories["b"]
    assert history is not None
    assert (ids(history), history.floor, history.tail, history.position) == ([5], 4, 5, 9)
    assert (history.whole, history.window, history.max_messages) == (False, 1.0, 10)


@pytest.mark.parametrize(
    ("text", "channels", "data"),
    [
        (b'[5,["a"],1]', ("a",), b"1"),
        (b'[5,["a","b"],{"x": [1, 2]}]', ("a", "b"), b'{"x": [1, 2]}'),
        (b'[5,["\\"],1]","\\u00e9\\/"],"x"]', ('"],1]', "é/"), b'"x"'),
        (b'[5,["17"],"17"]', ("17",), b'"17"'),
    ],
)
def test_messages(text: bytes, channels: tuple[str, ...], data: bytes) -> None:
    """Id, channels, and data byte for byte."""
    message = parse_message(text)

    assert (message.id, message.channels, message.data) == (5, channels, data)


@pytest.mark.parametrize(
    "data",
    [
        *(b"NaN", b"-Infinity", b"1e999", b"0x10", b"01", b"+1", b"1.", b'"a\nb"', b'"a\tb"', b'"\xff"', b"\xff"),
        *(b"1,2", b"", b"]", b"],[", b'"\\x"', b"\0", b'{"a":' * 500 + b"1" + b"}" * 500),
        *(b"[" * 101 + b"]" * 101, b"[" * 100_000),
    ],
    ids=lambda data: repr(data[:16]),
)
def test_strange_data_is_a_string(data: bytes) -> None:
    """It spoils nothing: the message keeps its id and its channels, and is valid JSON on one line."""
    message = parse_message(b'[5,["a","],"],%b]' % data)

    assert (message.id, message.channels) == (5, ("a", "],"))
    assert json.loads(message.data) == data.decode(errors="replace")
    assert b"\n" not in message.data


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"[5]", b'["5",["a"],1]', b'[5,"a",1]', b"\xff", b"[5,[1],1]"])
def test_what_is_no_message(text: bytes) -> None:
    """Somebody else has written there."""
    with pytest.raises(Unavailable, match="Redis holds something that PushUp did not write there"):
        parse_message(text)


@pytest.mark.parametrize(
    ("payload", "event"), [(b"made", None), (b"closed 9007199254740991", MAX_ID), (b'4 [5,["a"],"made"]', (5, 4))]
)
def test_events(payload: bytes, event: object) -> None:
    """A channel was made, was closed, or has a message."""
    heard: Event = parse_event(payload)

    assert (heard if not isinstance(heard, tuple) else (heard[0].id, heard[1])) == event
    assert not isinstance(heard, tuple) or isinstance(heard[0], Message)


@pytest.mark.parametrize(
    "payload", [b"", b"hello", b"closed", b"closed x", b'x [5,["a"],1]', b"1", b"\xff\xff", b"4 5"]
)
def test_what_is_no_event(payload: bytes) -> None:
    """An error that the broker knows how to take."""
    with pytest.raises((PushUpError, ValueError)):
        parse_event(payload)


@pytest.mark.parametrize("name", [*NASTY_NAMES, "a b", "1 2"])
def test_echoes_with_names_of_every_kind(name: str) -> None:
    """Names are in hex, so a space in one is nothing special."""
    payload = f"9 7 run:5 token {name.encode().hex()} 3 61 0".encode()

    assert parse_echo(payload) == Echo(9, 7, "run:5", "token", {name: 3, "a": 0})


def test_echoes_without_names() -> None:
    """As they come after a read."""
    assert parse_echo(b"9 7 run:5 token") == Echo(9, 7, "run:5", "token", {})


@pytest.mark.parametrize(
    "payload", [b"", b"1 2 3", b"x 7 run:5 token", b"9 7 run:5 token 61", b"9 7 run:5 token zz 1", b"\xff"]
)
def test_what_is_no_echo(payload: bytes) -> None:
    """An error that the broker knows how to take."""
    with pytest.raises(ValueError):  # noqa: PT011
        parse_echo(payload)


@pytest.mark.parametrize(
    ("text", "error", "detail"),
    [
        ("NOCHANNEL a b", ChannelNotFound, "channel a b does not exist"),
        ("NOCHANNEL 17", ChannelNotFound, "channel 17 does not exist"),
        ("EXISTS a b", ChannelExists, "channel a b exists already"),
        ("KEYREUSED the key", KeyReused, "the key"),
        ("TOOLARGE data is", TooLarge, "data is"),
        ("INVALID a name", InvalidRequest, "a name"),
        ("REALMFULL 7 8 bytes of data", RealmFull, "8 bytes of data"),
        ("OOM command not allowed when used memory > 'maxmemory'.", BrokerRefused, "Redis has no memory left"),
        ("command not allowed when used memory > 'maxmemory'.", BrokerRefused, "Redis has no memory left"),
        ("NOPERM this user", BrokerRefused, "Redis refused: NOPERM this user"),
        ("WRONGTYPE Operation", BrokerRefused, "Redis refused: WRONGTYPE Operation"),
        ("", BrokerRefused, "Redis refused: "),
    ],
)
def test_refusals(text: str, error: type[PushUpError], detail: str) -> None:
    """Each is the error that HTTP has for it, with the sentence."""
    meaning = translate(text)

    assert type(meaning) is error
    assert str(meaning) == detail


def test_a_refused_channel_is_a_member_of_the_problem() -> None:
    """An integer channel as a number."""
    one, two = translate("NOCHANNEL 17"), translate("EXISTS a b")

    assert isinstance(one, PushUpError)
    assert isinstance(two, PushUpError)
    assert (one.members["channel"], two.members["channel"]) == (17, "a b")


@pytest.mark.parametrize(
    "text",
    [
        "MOVED 5718 127.0.0.1:1",
        "ASK 5718 127.0.0.1:1",
        "CLUSTERDOWN The cluster is down",
        "READONLY You can't write against a read only replica.",
        "You can't write against a read only replica.",
        "MASTERDOWN Link with MASTER is down",
        "LOADING Redis is loading the dataset in memory",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "UNBLOCKED force unblock from blocking operation",
        "BUSY Redis is busy running a script.",
        "NOREPLICAS Not enough good replicas to write.",
        "MISCONF Redis is configured to save RDB snapshots",
    ],
)
def test_what_was_not_done_may_be_asked_again(text: str) -> None:
    """Of this server or of another one."""
    meaning = translate(text)

    assert isinstance(meaning, NotExecuted)
    assert (str(meaning), meaning.missing) == (text, False)


@pytest.mark.parametrize("text", ["ERR Function not found", "Function not found"])
def test_a_missing_library_is_told_apart(text: str) -> None:
    """It can be loaded."""
    meaning = translate(text)

    assert isinstance(meaning, NotExecuted)
    assert meaning.missing
