"""Redis users who may do no more than they must, in a real Redis: the rules of `compose/redis/users.acl`.

Every "may" is done by the real broker and the real Publisher, with user and password in the URL. Every "may not" is the
raw command.
"""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from cluster.processes import free_ports
from pushup import AsyncPublisher, Publisher
from pushup.errors import BrokerRefused, ChannelNotFound, InvalidRequest, PushUpError, RealmFull, Unavailable
from pushup.library import LOAD, SOURCE, Library
from pushup.messages import ChannelOptions, Publication, Receipt, Retention
from pushup.redis_broker import RedisBroker
from pushup.redis_url import parse_servers
from tests.redis_server import RedisServer
from tests.support import PATIENCE_S, eventually
from tests.test_broker_contract import USERS, Recorder, caught_up, publish, rules, watch
from tests.test_library import NASTY_NAMES, REFUSED_NAMES

SECRET: Final = '"a secret"'
ALWAYS_ALLOWED: Final = {"auth", "hello", "quit", "reset"}
"""What Redis lets everybody do."""
FUNCTIONS: Final = set(re.findall(r"^register\('(\w+)'", SOURCE, re.MULTILINE)) | {"version"}
FUNCTIONS_OF_PUBLISHERS: Final = {"publish", "publish_once", "store", "store_all", "witness", "version"}


def granted(user: str) -> set[str]:
    """The commands the user may use at all, `fcall|NAME` and `config|get` included."""
    return set(re.findall(r"\+(\S+?)(?=[\s)]|$)", " ".join(rules(user)))) - {"@all"}


class Server:
    """A Redis with these users, and the operator's view of it."""

    def __init__(self, server: RedisServer) -> None:
        self.port = server.port
        self.operator = server.client()
        self.operator.execute_command(*LOAD)

    def allow(self, user: str, *more: str) -> None:
        self.operator.execute_command("ACL", "SETUSER", user, "reset", *rules(user), *more)

    def url(self, user: str) -> str:
        return f"redis://{user}:{user.upper()}-PASSWORD@127.0.0.1:{self.port}"

    def client(self, user: str) -> redis.Redis:
        return redis.Redis(port=self.port, username=user, password=f"{user.upper()}-PASSWORD", protocol=2)

    def close(self) -> None:
        self.operator.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with (
        RedisServer(tmp_path_factory.mktemp("acl"), "appendfsync no", "enable-module-command yes") as process,
        closing(Server(process)) as server,
    ):
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    """Empty, with its functions and the two users."""
    shared.operator.flushall()
    shared.operator.execute_command(*LOAD)
    shared.allow("node")
    shared.allow("publisher")
    return shared


@pytest.fixture
def publisher(server: Server) -> Iterator[Publisher]:
    with Publisher(server.url("publisher"), timeout=PATIENCE_S) as one:
        yield one


@pytest.fixture
def stolen(server: Server) -> Iterator[redis.Redis]:
    """A connection with the publisher's password."""
    with server.client("publisher") as client:
        yield client


@asynccontextmanager
async def node(
    server: Server, *, realm: str = "default", **retention: Any
) -> AsyncIterator[tuple[RedisBroker, Recorder]]:
    """A broker with the node's password."""
    broker = RedisBroker(
        parse_servers(server.url("node")), realm, Retention(**retention), node="me", timeout=PATIENCE_S
    )
    recorder = Recorder()
    await broker.start(recorder)
    try:
        yield broker, recorder
    finally:
        await broker.stop()


def refusal(client: redis.Redis, *words: str | bytes | int) -> str:
    """What Redis has against a command."""
    with pytest.raises(redis.ResponseError) as caught:
        client.execute_command(*words)
    return str(caught.value)


def is_forbidden(client: redis.Redis, *words: str | bytes | int) -> bool:
    """Whether Redis says that the user may not."""
    return "this user has no permissions to " in refusal(client, *words)


def commands(client: redis.Redis) -> dict[str, list[str]]:
    """Everything this Redis can do, `config|get` and the like included, each with words that make it a command."""
    connection = client.connection_pool.get_connection()
    connection.send_command("COMMAND")
    infos: list[Any] = list(connection.read_response())
    client.connection_pool.release(connection)
    found: dict[str, list[str]] = {}
    while infos:
        name, arity, *_, subcommands = infos.pop()
        words = name.decode().split("|")
        infos += subcommands
        if not subcommands:
            found["|".join(words)] = words + ["1"] * (abs(arity) - len(words))
    return found


# The file


def test_redis_takes_the_file(tmp_path: Path) -> None:
    """As it is, and then nobody gets in without a password."""
    file = tmp_path / "users.acl"
    file.touch()
    with RedisServer(tmp_path, f"aclfile {file}") as process, process.client() as before:
        file.write_text(USERS.read_text())
        assert before.execute_command("ACL", "LOAD") == b"OK"

        with redis.Redis(port=process.port, protocol=2) as anyone, pytest.raises(redis.AuthenticationError):
            anyone.ping()
        for user in ("operator", "node", "publisher"):
            with redis.Redis(port=process.port, username=user, password=f"{user.upper()}-PASSWORD") as client:
                assert "redis_version" in client.info("server")


def test_nodes_may_what_the_functions_do() -> None:
    """Each command in the library, whether a test below meets it or not."""
    used = {command.lower() for command in re.findall(r"redis\.p?call\('([A-Z]+)'", SOURCE)}

    assert used <= granted("node")


# What a node may


async def test_a_node_does_its_work(server: Server) -> None:
    """It gives Redis the functions, publishes, watches, hears, makes, closes, lists, and sweeps what has expired."""
    server.operator.function_flush()
    async with node(server, max_messages=2) as (broker, recorder):
        await watch(broker, "a")
        given = [await publish(broker, "a", data=SECRET.encode(), key=f"k{number}") for number in range(4)]
        await caught_up(broker, given[-1])
        short = await broker.create(None, ChannelOptions(ttl=0.001, window=0.001))
        named = await broker.create("b", ChannelOptions())
        await broker.renew("b", 50.0)
        assert (await broker.describe("b")).ttl == 50.0
        await broker.close("b")
        await publish(broker, "b")
        await eventually(lambda: broker.sessions == 1, "there is a session")
        assert [id for _, id, _ in recorder.heard] == given
        assert [message.id for message in (await watch(broker, "a")).messages] == given[2:]
        assert [info.channel for info in await broker.channels("", 10) if info.channel != short.channel] == ["a", "b"]
        assert [one.name for one in await broker.nodes()] == ["me"]
        assert named.channel == "b"


async def test_a_node_repairs_and_sweeps(server: Server) -> None:
    """Lost indexes, closed channels, a realm that is full: with what it may, and no more."""
    library = Library("default")
    async with node(server, realm_bytes=4) as (broker, _):
        await publish(broker, "a", data=b"1234")
        server.operator.delete(f"{library.key}:names", f"{library.key}:due", f"{library.key}:stale")
        server.operator.zadd(f"{library.key}:closed", {f"c{number}": number + 1 for number in range(10_001)})
        words = server.operator.hget(library.key, "realm")
        assert isinstance(words, bytes)
        record = words.split(b" ")
        record[7] = b"10001"
        server.operator.hset(library.key, "realm", b" ".join(record))
        await eventually(lambda: server.operator.zcard(f"{library.key}:names") == 1, "the indexes are rebuilt")
        (full,) = await broker.publish([Publication(("b",), b"1")])
        await broker.close("a")

        assert isinstance(full, RealmFull)
        assert server.operator.zscore(f"{library.key}:closed", "c0") is None
        assert await publish(broker, "b", data=b"1234")


@pytest.mark.parametrize("realm", ["default", "other"])
async def test_a_node_of_all_realms(server: Server, realm: str) -> None:
    """With the same rules on all keys and pub/sub channels of PushUp."""
    server.operator.execute_command("ACL", "SETUSER", "node", "resetkeys", "resetchannels", "~pushup:*", "&pushup:*")
    async with node(server, realm=realm) as (broker, recorder):
        await watch(broker, "a")
        id = await publish(broker, "a")
        await caught_up(broker, id)

        assert recorder.heard == [("a", id, 0)]


@pytest.mark.parametrize("kept", [True, False])
async def test_a_node_need_not_see_the_configuration(server: Server, kept: bool) -> None:
    """Then it cannot know that the server keeps everything, and says so: after a restart everyone is told a gap."""
    server.operator.config_set("appendfsync", "always")
    if not kept:
        server.allow("node", "-config|get")
    async with node(server) as (broker, _):
        await publish(broker, "a")
        record: Any = server.operator.hget("pushup:{default}", "realm")
    server.operator.config_set("appendfsync", "no")

    assert record.split()[1] == (b"1" if kept else b"0")


async def test_a_node_need_not_load_functions(server: Server) -> None:
    """If somebody else has. If nobody has, it says what it lacks."""
    server.allow("node", "-function|load")
    async with node(server) as (broker, _):
        assert await publish(broker, "a")
    server.operator.function_flush()
    broker = RedisBroker(parse_servers(server.url("node")), "default", Retention(), node="me", timeout=0.5)

    with pytest.raises(Unavailable, match="cannot reach the broker"):
        await broker.start(Recorder())


async def test_a_node_of_a_cluster_or_of_another_database(server: Server, tmp_path: Path) -> None:
    """Needs one permission more: to ask where the realm is, or to choose the database. So does a publisher."""
    for user in ("node", "publisher"):
        server.allow(user, "+select")
    broker = RedisBroker(
        parse_servers(f"{server.url('node')}/3"), "default", Retention(), node="me", timeout=PATIENCE_S
    )
    await broker.start(Recorder())
    async with AsyncPublisher(f"{server.url('publisher')}/3", timeout=PATIENCE_S) as publisher:
        elsewhere = await publisher.publish("a", 1)
    assert [message.id for message in (await watch(broker, "a")).messages] == [elsewhere]
    await broker.stop()

    bus = f"cluster-port {free_ports(1)[0]}"
    with RedisServer(tmp_path, "cluster-enabled yes", bus) as process, closing(Server(process)) as cluster:
        cluster.operator.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        for user in ("node", "publisher"):
            cluster.allow(user, "+cluster|slots")
        url = cluster.url("node").replace("redis:", "redis+cluster:")
        broker = RedisBroker(parse_servers(url), "default", Retention(), node="me", timeout=PATIENCE_S)
        await broker.start(Recorder())
        async with AsyncPublisher(url.replace("node", "publisher").replace("NODE", "PUBLISHER")) as publisher:
            id = await publisher.publish("a", 1)
        assert [message.id for message in (await watch(broker, "a")).messages] == [id]
        await broker.stop()


# What a node may not


async def test_a_node_may_no_more(server: Server) -> None:
    """Of all that Redis can do, exactly what the file grants."""
    mine = granted("node")
    assert not mine & {"flushall", "keys", "scan", "eval", "config|set", "function|flush", "acl|list", "subscribe"}
    with server.client("node") as client:
        for name, words in commands(server.operator).items():
            if name not in mine | ALWAYS_ALLOWED:
                assert is_forbidden(client, *words), name


def test_a_node_may_not_touch_another_realm(server: Server) -> None:
    """Neither by the functions, whatever key they are given, nor directly, nor by listening."""
    other = Library("other")
    server.operator.execute_command(*other.store(0, Publication(("a",), SECRET.encode())))
    before = server.operator.hgetall(other.key)
    with server.client("node") as client:
        for words in (
            other.store(0, Publication(("a",), b"1")),
            other.read(0, "me", "token", {"a": 0}),
            other.nodes(),
            other.close(0, "a"),
            ("FCALL", "pushup_read", 2, "pushup:{default}", other.key, 0, "me", "token", "a", 0),
            ("HGETALL", other.key),
            ("ZRANGE", f"{other.key}:m:a", 0, -1),
            ("DEL", other.key),
            ("GET", "pushup:{default"),
            ("SET", "mine", 1),
        ):
            assert is_forbidden(client, *words), words
        for name in (f"{other.key}:1:a:a", "pushup:{default}", "*"):
            assert is_forbidden(client, "SSUBSCRIBE", name), name
            assert is_forbidden(client, "SPUBLISH", name, "1"), name

    assert server.operator.hgetall(other.key) == before


# What a publisher may


def test_a_publisher_publishes(server: Server, publisher: Publisher) -> None:
    """To one or more channels, new or not, with a key or not, also past the number of messages kept."""
    library = Library("default")
    server.operator.execute_command(*library.attach(0, "", 0, False, Retention(max_messages=2, window=0.05)))
    first = publisher.publish("a", SECRET)
    given = [publisher.publish(["a", "b"], number, key=f"k{number}") for number in range(5)]

    assert publisher.publish(["a", "b"], 4, key="k4") == given[-1] > first
    assert len(publisher.publish_many([{"channels": "a", "data": number} for number in range(600)])) == 600
    assert server.operator.zcard(f"{library.key}:m:a") == 2
    server.operator.execute_command(*library.close(0, "a"))
    assert publisher.publish("a", 1) > given[-1]
    with pytest.raises(ChannelNotFound):
        publisher.publish(17, 1)


def test_a_publisher_may_be_the_first(server: Server, publisher: Publisher) -> None:
    """In an empty Redis, and when Redis has lost the realm, a channel's messages, or memory of what was closed."""
    library = Library("default")
    given = []
    for lost in ("", "", ":m:a", ":s:a", ":names", ":due", ":stale", ":closed"):
        given.append(publisher.publish("a", 1))
        server.operator.execute_command(*library.store(0, Publication(("b",), b"1")))
        server.operator.execute_command(*library.close(0, "b"))
        assert server.operator.delete(f"{library.key}{lost}") == 1
        given.append(publisher.publish(["a", "b"], 1))

    assert given == sorted(given)


def test_a_publisher_meets_another_run(server: Server, publisher: Publisher) -> None:
    """It tells the server what the one before had given, which is a function of its own."""
    library = Library("default")
    first = publisher.publish("a", 1)
    words: Any = server.operator.hget(library.key, "realm")
    server.operator.delete(library.key)
    second = publisher.publish("a", 1)
    floor: Any = server.operator.hget(library.key, "realm")

    assert second > first
    assert int(floor.split()[4]) > int(words.split()[4])


def test_a_publisher_is_told_that_the_realm_is_full(server: Server, publisher: Publisher) -> None:
    """It may not look for room in other channels; a node does, within a second. In its own it does."""
    library = Library("default")
    server.operator.execute_command(*library.attach(0, "", 0, False, Retention(realm_bytes=4, window=0.0)))
    publisher.publish("a", 1234)
    with pytest.raises(RealmFull) as full:
        publisher.publish("b", 5678)
    publisher.publish("a", 5678)
    with server.client("node") as client:
        client.execute_command("FCALL", "pushup_tick", 1, library.key, 0, "me", "token", "{}")

    assert full.value.members["retry_after"] == 1
    assert publisher.publish("b", 5678) > 0


def test_a_back_end_calls_the_functions(server: Server, stolen: redis.Redis) -> None:
    """As the README says."""
    id = stolen.execute_command("FCALL", "pushup_publish", 1, "pushup:{default}", SECRET, "a", "b")
    once = [
        stolen.execute_command("FCALL", "pushup_publish_once", 1, "pushup:{default}", "k", SECRET, "a")
        for _ in range(2)
    ]

    assert id < once[0] == once[1]


def test_a_publisher_without_functions_says_what_it_lacks(server: Server, publisher: Publisher) -> None:
    """It may not load them: nodes do, or an operator."""
    server.operator.function_flush()

    with pytest.raises(BrokerRefused, match=r"function\|load"):
        publisher.publish("a", 1)


# What a publisher may not


def test_a_publisher_may_no_more(server: Server, stolen: redis.Redis) -> None:
    """Of all that Redis can do, exactly what the file grants."""
    mine = granted("publisher")
    assert not mine & {"flushall", "keys", "scan", "eval", "function|load", "function|list", "function|dump", "ping"}
    assert not mine & {"fcall", "fcall_ro", "ssubscribe", "subscribe", "psubscribe", "zrange", "hgetall", "monitor"}
    for name, words in commands(server.operator).items():
        if name not in mine | ALWAYS_ALLOWED:
            assert is_forbidden(stolen, *words), name


def test_a_publisher_calls_no_other_function(server: Server, stolen: redis.Redis) -> None:
    """Reading, listing, closing and what nodes say are not for it, however it calls them."""
    server.operator.execute_command(*Library("default").store(0, Publication(("a",), b"1")))

    assert FUNCTIONS_OF_PUBLISHERS < FUNCTIONS
    for function in FUNCTIONS - FUNCTIONS_OF_PUBLISHERS:
        for command in ("FCALL", "FCALL_RO", "EVAL"):
            words = (command, f"pushup_{function}", 1, "pushup:{default}", 0, "a", "token", "a", 0)
            assert is_forbidden(stolen, *words), words


def test_a_publisher_reads_no_message(server: Server, stolen: redis.Redis) -> None:
    """Nor the names of channels or nodes. It can read counts, ids and sizes of channels whose names it knows."""
    library = Library("default")
    server.operator.execute_command(*library.store(0, Publication(("hidden",), SECRET.encode(), "k")))
    server.operator.execute_command(*library.tick(0, "me", "token", Recorder().about(), []))
    kinds = ("", ":m:hidden", ":s:hidden", ":k:k", ":names", ":due", ":stale", ":closed", ":nodes")
    said: list[Any] = []
    for name in sorted(granted("publisher") - {"fcall", "set", "del", "hset"}):
        for kind in kinds:
            for rest in (
                (),
                ("0",),
                ("0", "-1"),
                ("0", "-1", "WITHSCORES"),
                ("hidden",),
                ("c:hidden",),
                ("INCR", "1", "x"),
            ):
                try:
                    said.append(stolen.execute_command(name.upper().partition("|")[0], f"{library.key}{kind}", *rest))
                except redis.ResponseError as error:
                    said.append(str(error))
                server.operator.zrem(f"{library.key}:m:hidden", "x")

    assert SECRET not in str(said)
    assert "hidden" not in str(said)
    assert is_forbidden(stolen, "ZRANGE", f"{library.key}:m:hidden", 0, -1)
    assert is_forbidden(stolen, "ZRANGE", f"{library.key}:names", 0, -1)
    assert is_forbidden(stolen, "LRANGE", f"{library.key}:m:hidden", 0, -1)


@pytest.mark.parametrize("realm", ["other", "default2", "defaul", "Default"])
def test_a_publisher_may_not_touch_another_realm(server: Server, stolen: redis.Redis, realm: str) -> None:
    """Neither by the functions, whatever key they are given, nor directly."""
    other = Library(realm)
    server.operator.execute_command(*other.store(0, Publication(("a",), SECRET.encode())))
    before = server.operator.hgetall(other.key)
    with (
        Publisher(server.url("publisher"), realm=realm, timeout=PATIENCE_S) as misled,
        pytest.raises(BrokerRefused, match="permission"),
    ):
        misled.publish("a", 1)

    for words in (
        ("FCALL", "pushup_publish", 2, "pushup:{default}", other.key, "1", "a"),
        ("FCALL", "pushup_publish", 2, other.key, "pushup:{default}", "1", "a"),
        ("HMGET", other.key, "realm"),
        ("HSET", other.key, "realm", "1"),
        ("ZADD", f"{other.key}:m:a", 1, "1"),
        ("DEL", f"{other.key}:m:a"),
        ("DEL", "pushup:{default}", other.key),
        ("SET", "mine", "1"),
        ("SPUBLISH", f"{other.key}:1:a:a", "1"),
    ):
        assert is_forbidden(stolen, *words), words
    assert server.operator.hgetall(other.key) == before


def test_a_publisher_does_not_speak_to_nodes(stolen: redis.Redis) -> None:
    """What nodes hear on their own pub/sub channels is only what a function says for them."""
    assert is_forbidden(stolen, "SPUBLISH", "pushup:{default}:1:n:me", "9 9 run:1 token")
    assert is_forbidden(stolen, "SPUBLISH", "pushup:{default}", "1")


# Names


def test_no_name_leaves_its_realm(server: Server) -> None:
    """A user of one realm alone calls every function with every odd name: none of it meets a permission it lacks.

    So no key, and no pub/sub channel, lies beyond the realm.
    """
    key = "pushup:{default}"
    before: set[Any] = set(server.operator.keys("*"))
    met: set[str] = set()
    server.allow("node", "-spublish")
    with server.client("node") as client:
        lacking = refusal(client, "FCALL", "pushup_publish", 1, key, "1", "a")
    assert lacking.startswith("The user executing the script")  # What the assertions below look for.
    server.allow("node")
    with server.client("node") as client:
        for name in (*NASTY_NAMES, *REFUSED_NAMES):
            for function, *words in (
                ("publish", "1", name),
                ("publish", name, "a"),
                ("publish_once", name, "2", "a"),
                ("store", 0, name, "3", name, "a"),
                ("store", name, "", "1", "a"),
                ("store_all", 0, name, "3", 1, name, "", "3", 2, "a", name),
                ("store_all", 0, "", name, 1, "a", "", "3", name, "a"),
                ("create", 0, name, "", "", ""),
                ("create", 0, "", name, name, name),
                ("renew", 0, name, ""),
                ("describe", 0, name),
                ("list", 0, name, 10),
                ("list", 0, "", name),
                ("read", 0, name, "token", name, 0),
                ("tick", 0, name, name, name, name),
                ("witness", 0, name, name),
                ("leave", name),
                ("close", 0, name),
            ):
                try:
                    reply = client.execute_command("FCALL", f"pushup_{function}", 1, key, *words)
                    assert "The user executing the script" not in repr(reply), (function, words)
                except redis.ResponseError as error:
                    met.add(str(error).partition(" ")[0])
                    assert "permission" not in str(error), (function, words)  # noqa: PT017
                    assert "The user executing the script" not in str(error), (function, words)  # noqa: PT017
            client.execute_command("HDEL", f"{key}:nodes", name)

    fresh: set[Any] = set(server.operator.keys("*")) - before
    assert all(one == key.encode() or one.startswith(f"{key}:".encode()) for one in fresh)
    assert {"INVALID", "KEYREUSED"} <= met <= {"INVALID", "NOCHANNEL", "KEYREUSED", "EXISTS", "value"}


ODD_REALMS: Final = [
    "",
    "a b",
    "a\nb",
    "default\n",
    "\0",
    "default\0",
    "}",
    "}{default",
    "default}:m:{a",
    "{default}",
    "*",
    "é",
]
ODD_REALMS_IN_BYTES: Final = [b"\xff", b"\xed\xa0\x80", b"\r\n*1\r\n$8\r\nFLUSHALL\r\n", b"%w+", b"x y" * 3333]


@pytest.mark.parametrize(
    "realm", [*(name.encode() for name in ODD_REALMS), *ODD_REALMS_IN_BYTES], ids=lambda name: repr(name[:20])
)
def test_no_realm_is_another(server: Server, realm: bytes) -> None:
    """A realm's name that is none is refused by every function, and leaves nothing behind."""
    key = b"pushup:{" + realm + b"}"
    before = server.operator.keys("*")

    for function in FUNCTIONS - {"version"}:
        words = ("FCALL", f"pushup_{function}", 1, key, "0", "a", "1", "a")
        assert refusal(server.operator, *words) == "INVALID the key is pushup:{REALM}"
    assert server.operator.keys("*") == before


def test_a_long_realm_is_that_realm(server: Server) -> None:
    """Settings allow 64 characters; a user who may use 10 kB as a key gets a realm of that name."""
    library = Library("x" * 10_000)
    server.operator.execute_command(*library.store(0, Publication(("a",), b"1")))
    keys: Any = server.operator.keys("*")

    assert {key[: len(library.key)] for key in keys} == {library.key.encode()}


async def test_odd_names_through_the_broker(server: Server) -> None:
    """As a channel, as a key and as the node: each is heard as exactly that channel, or refused with a sentence."""
    heard, refused = [], []
    for at, name in enumerate([*NASTY_NAMES, *(one for one in REFUSED_NAMES if isinstance(one, str))]):
        broker = RedisBroker(
            parse_servers(server.url("node")), "default", Retention(), node=f"me {name}", timeout=PATIENCE_S
        )
        recorder = Recorder()
        await broker.start(recorder)
        await broker.watch({name: 0, "beside": 0})
        (result,) = await broker.publish([Publication((name,), b"%d" % at, name[:255] or None)])
        await caught_up(broker, await publish(broker, "beside"))
        assert {channel for channel, _, _ in recorder.heard} <= {name, "beside"}
        if isinstance(result, Receipt):
            heard.append(name)
            assert [id for channel, id, _ in recorder.heard if channel == name] == [result.id]
            assert [(m.channels, m.data) for m in (await watch(broker, name)).messages] == [((name,), b"%d" % at)]
        else:
            refused.append(name)
            assert isinstance(result, InvalidRequest), result
        assert broker.sessions == 1
        await broker.stop()

    assert heard == list(NASTY_NAMES)
    assert set(refused) == {name for name in REFUSED_NAMES if isinstance(name, str)}


@pytest.mark.parametrize("name", ["\ud800", "a\udfff"], ids=ascii)
def test_a_lone_surrogate_is_no_name(publisher: Publisher, name: str) -> None:
    """It is refused before anything is sent, and the connection lives on."""
    for channel, key in ((name, None), ("a", name)):
        with pytest.raises(PushUpError):
            publisher.publish(channel, 1, key=key)

    assert publisher.publish("a", 1) > 0
