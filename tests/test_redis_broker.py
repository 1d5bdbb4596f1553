"""Nodes over a real Redis, and all that can happen to it. Poll any node, publish to any node or past them."""

import asyncio
import itertools
import json
import math
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import hiredis
import pytest
from redis import ResponseError
from redis.asyncio.connection import AbstractConnection
from redis.client import Monitor

import pushup.redis_broker
from pushup.address import Address
from pushup.errors import Unavailable
from pushup.library import SOURCE, realm_key
from pushup.messages import Publication, Receipt, Retention
from pushup.redis_broker import RedisBroker
from pushup.redis_url import parse_servers
from pushup.server import Server
from pushup.servers import dial
from tests.redis_server import RedisServer
from tests.resp import encode_again
from tests.support import PATIENCE_S, Client, connected, eventually, parked, running
from tests.test_broker_contract import Recorder, caught_up, redis_broker


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test's own, to do things to."""
    with RedisServer(tmp_path) as server:
        yield server


@asynccontextmanager
async def node(redis: RedisServer, realm: str = "default", **settings: Any) -> AsyncIterator[tuple[Server, Client]]:
    """A node on that Redis, and a connection to it."""
    async with running(broker=redis.url, realm=realm, **settings) as server, connected(server) as client:
        yield server, client


def publish_directly(redis: RedisServer, *channels: str, data: Any = None, realm: str = "default") -> int:
    """Past the nodes, as any program may."""
    with redis.client() as client:
        return int(client.fcall("pushup_publish", 1, realm_key(realm), json.dumps(data), *channels))


def monitored(monitor: Monitor) -> Iterator[str]:
    """The commands that Redis is sent, as they come; not those of functions."""
    return (heard["command"] for heard in monitor.listen() if heard["client_type"] != "lua")


def send_poll(client: Client, *channels: str, start: int = 0, hold: float = 60) -> None:
    names = "".join(f"channel={channel}&" for channel in channels)
    client.send(f"GET /poll?{names}start={start}&timeout={hold} HTTP/1.1\r\nHost: test\r\n\r\n")


async def poll(client: Client, *channels: str, start: int = 0, hold: float = 60) -> Any:
    send_poll(client, *channels, start=start, hold=hold)
    reply = await client.reply()
    assert reply.status == 200, reply
    return reply.json


def ids(answer: Any) -> list[int]:
    return [message["id"] for message in answer["messages"]]


class DeafReader:
    """A stream without those announcements that are swallowed."""

    def __init__(self, stream: Any, swallows: Callable[[bytes], bool]) -> None:
        self._stream = stream
        self._swallows = swallows
        self._parser = hiredis.Reader()

    async def read(self, size: int) -> bytes:
        while data := await self._stream.read(size):
            self._parser.feed(data)
            replies = iter(self._parser.gets, False)
            heard = [
                reply
                for reply in replies
                if not (type(reply) is list and reply[0] == b"smessage" and self._swallows(reply[2]))
            ]
            if heard:
                return b"".join(map(encode_again, heard))
        return b""


class Deaf:
    """Makes connections on which some of what Redis announces is lost, while they look healthy."""

    def __init__(self, redis: RedisServer) -> None:
        self._servers = parse_servers(redis.url)
        self.swallow: set[bytes] = set()
        """Announcements that contain one of these are lost. An empty one is in all."""

    def __call__(self, address: Address) -> AbstractConnection:
        connection = dial(self._servers, address, PATIENCE_S)
        connect = connection.connect

        async def connect_deaf() -> None:
            await connect()  # type: ignore[no-untyped-call]
            connection._reader = cast(Any, DeafReader(connection._reader, self.swallows))

        connection.connect = connect_deaf  # type: ignore[method-assign]
        return connection

    def swallows(self, payload: bytes) -> bool:
        return any(part in payload for part in self.swallow)


@asynccontextmanager
async def deaf_broker(redis: RedisServer) -> AsyncIterator[tuple[RedisBroker, Recorder, Deaf]]:
    deaf, recorder = Deaf(redis), Recorder()
    broker = RedisBroker(parse_servers(redis.url), uuid4().hex, Retention(), node="me", timeout=PATIENCE_S, dialer=deaf)
    await broker.start(recorder)
    try:
        yield broker, recorder, deaf
    finally:
        deaf.swallow.clear()
        await broker.stop()


async def test_poll_any_node_publish_to_any_node(redis_server: RedisServer) -> None:
    """A message published to one node answers the polls of another, and is cached for a third."""
    realm = uuid4().hex
    async with node(redis_server, realm) as (one, polling), node(redis_server, realm) as (_, publishing):
        send_poll(polling, "a", "b")
        await parked(one, 1)
        id = await publishing.publish("b", "a", data={"x": 1})
        answer = (await polling.reply()).json

    async with node(redis_server, realm) as (_, late):
        again = await poll(late, "a")

    assert answer == {
        "messages": [{"id": id, "channels": ["a", "b"], "data": {"x": 1}}],
        "next": id + 1,
        "gap": False,
    }
    assert ids(again) == [id]


async def test_clients_that_come_back_at_once_cost_one_read_a_channel(own_redis: RedisServer) -> None:
    """Their node was killed. Each has what it missed; Redis is asked for each channel once, not once per client."""
    async with node(own_redis):
        pass  # It loads the functions.
    names = ["a", "b", "c"]
    published = {name: [publish_directly(own_redis, name, data=number) for number in range(4)] for name in names}
    async with node(own_redis) as (server, _), AsyncExitStack() as stack:
        watcher, marker = stack.enter_context(own_redis.client()), stack.enter_context(own_redis.client())
        monitor = stack.enter_context(watcher.monitor())
        clients = [await stack.enter_async_context(connected(server)) for _ in range(48)]
        wanted = [(names[number % 3], published[names[number % 3]][3 - number // 3 % 4]) for number in range(48)]
        for number, (client, (name, start)) in enumerate(zip(clients, wanted, strict=True)):
            send_poll(client, name, start=start)
            if number % 4 == 3:
                await asyncio.sleep(0)
        answers = [(await client.reply()).json for client in clients]
        marker.echo("done")
        commands = list(itertools.takewhile(lambda command: command != "ECHO done", monitored(monitor)))

    for (name, start), answer in zip(wanted, answers, strict=True):
        assert ids(answer) == [id for id in published[name] if id >= start]
        assert (answer["gap"], answer["next"]) == (False, published[name][-1] + 1)
    subscribed = [word for command in commands if command.startswith("SSUBSCRIBE") for word in command.split()[1:]]
    read = [word for command in commands if command.startswith("FCALL pushup_read") for word in command.split()[7::2]]
    assert sorted(word.rpartition(":")[2] for word in subscribed) == names
    assert sorted(read) == names


async def test_one_who_cannot_be_told_is_his_own_trouble(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Those whose publications went in the same turn of the event loop are told theirs, and so are later ones."""

    def fail(results: Sequence[object]) -> None:
        raise LookupError("nobody to tell")

    async with redis_broker(parse_servers(redis_server.url), Retention()) as (broker, _):
        told: list[Any] = []
        for tell in (told.extend, fail, told.extend):
            broker.submit([Publication(("news",), b"1")], tell)
        await eventually(lambda: len(told) == 2, "the two others are told")
        told += await broker.publish([Publication(("news",), b"2")])

    ids = [receipt.id for receipt in told]
    assert ids == sorted(set(ids))
    assert "nobody to tell" in caplog.text


async def test_a_direct_publication_is_like_any_other(redis_server: RedisServer) -> None:
    """Published with one Redis call, it answers parked polls with the same bytes."""
    realm = uuid4().hex
    async with node(redis_server, realm) as (server, client), connected(server) as other:
        send_poll(client, "a")
        await parked(server, 1)
        first = publish_directly(redis_server, "a", data={"x": [1, "é"]}, realm=realm)
        direct = await client.reply()
        second = await other.publish("a", data={"x": [1, "é"]})
        over_http = await client.request("GET", f"/poll?channel=a&start={first + 1}")

    assert direct.body.replace(str(first).encode(), b"ID").replace(str(first + 1).encode(), b"NEXT") == (
        over_http.body.replace(str(second).encode(), b"ID").replace(str(second + 1).encode(), b"NEXT")
    )


async def test_realms_do_not_hear_each_other(redis_server: RedisServer) -> None:
    """The same channel name in two realms of one Redis is two channels."""
    one, two = uuid4().hex, uuid4().hex
    async with node(redis_server, one) as (_, here), node(redis_server, two) as (_, there):
        await here.publish("a")

        assert ids(await poll(there, "a", hold=0)) == []
        assert (await there.get("/channels")).json["channels"] == []


async def test_latest_means_from_now_on(redis_server: RedisServer) -> None:
    """What was published before, by the node's reckoning of now, is not news; what comes after is."""
    realm = uuid4().hex
    async with node(redis_server, realm) as (server, client), node(redis_server, realm) as (_, other):
        for _ in range(3):
            before = await other.publish("a")
            broker = server.node.broker
            await eventually(lambda: min(broker.latest(), broker.position()) > before, "now comes after then")  # noqa: B023
            client.send("GET /poll?channel=a&start=latest HTTP/1.1\r\nHost: test\r\n\r\n")
            await parked(server, 1)
            after = await other.publish("a")

            assert before < after
            assert ids((await client.reply()).json) == [after]


@pytest.mark.parametrize("kind", ["pubsub", "normal", "both"])
async def test_a_connection_that_is_cut_loses_nothing(own_redis: RedisServer, kind: str) -> None:
    """What is published while the node has no connection is caught up, in order, once, without a gap."""
    async with node(own_redis) as (server, client):
        send_poll(client, "a")
        await parked(server, 1)
        with own_redis.client() as operator, operator.pipeline() as together:
            for one in ("pubsub", "normal") if kind == "both" else (kind,):
                together.execute_command("CLIENT", "KILL", "TYPE", one, "SKIPME", "yes")
            for number in range(3):
                together.fcall("pushup_publish", 1, realm_key("default"), str(number), "a")
            published = together.execute()[-3:]
        got: list[int] = []
        answer = (await client.reply()).json
        while True:
            got += ids(answer)
            assert answer["gap"] is False
            if len(got) >= 3:
                break
            answer = await poll(client, "a", start=answer["next"])

    assert got == published


async def test_an_announcement_that_is_lost_shows_with_the_next(redis_server: RedisServer) -> None:
    """`prev` tells that something is missing; both come, in order."""
    async with deaf_broker(redis_server) as (broker, recorder, deaf):
        await broker.watch({"a": 0})
        deaf.swallow.add(b'"lost"')
        lost = await _publish(broker, b'"lost"')
        last = await _publish(broker, b'"found"')
        await caught_up(broker, last)

    assert recorder.heard == [("a", last, lost)]


async def test_an_announcement_that_is_lost_is_found_without_the_next(redis_server: RedisServer) -> None:
    """The tails of watched channels are compared behind all that was announced; one that differs is in doubt."""
    async with deaf_broker(redis_server) as (broker, recorder, deaf):
        await broker.watch({"a": 0, "b": 0})
        deaf.swallow.add(b'"lost"')
        lost = await _publish(broker, b'"lost"')
        await eventually(lambda: recorder.doubted != [], "the channel comes into doubt")
        history = (await broker.watch({"a": lost}))["a"]

    assert recorder.doubted == ["a"]
    assert history is not None
    assert [message.id for message in history.messages] == [lost]


async def test_a_silent_connection_is_found_out(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that looks healthy and delivers nothing fails its proof: not ready, and then a better one."""
    monkeypatch.setattr(pushup.redis_broker, "TICK_S", 0.05)
    monkeypatch.setattr(pushup.redis_broker, "ECHO_S", 0.1)
    async with deaf_broker(redis_server) as (broker, recorder, deaf):
        await broker.watch({"a": 0})
        deaf.swallow.add(b"")
        await _publish(broker, b"1")
        await eventually(lambda: not broker.ready, "it is not ready")
        assert recorder.doubted == []
        deaf.swallow.clear()
        await eventually(lambda: broker.ready and recorder.doubted != [], "there is another session, and doubt")

        assert broker.sessions == 2
        assert recorder.doubted == ["everything"]


async def test_without_the_proof_it_would_starve(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: who only trusts the connection never learns that it is deaf."""
    monkeypatch.setattr(pushup.redis_broker, "TICK_S", 0.05)
    monkeypatch.setattr(pushup.redis_broker, "ECHO_S", math.inf)
    async with deaf_broker(redis_server) as (broker, recorder, deaf):
        await broker.watch({"a": 0})
        deaf.swallow.add(b"")
        await _publish(broker, b"1")
        await asyncio.sleep(0.5)

        assert (broker.sessions, recorder.heard, recorder.doubted) == (1, [], [])


async def test_a_restart_that_keeps_everything_is_no_gap(own_redis: RedisServer) -> None:
    """Redis that writes before it acknowledges comes back with all of it: polls go on as if nothing had been."""
    async with node(own_redis) as (server, client):
        first = await client.publish("a")
        send_poll(client, "a", start=first + 1)
        await parked(server, 1)
        own_redis.restart()
        second = publish_directly(own_redis, "a")
        answer = (await client.reply()).json

    assert (ids(answer), answer["gap"]) == ([second], False)
    assert second > first


async def test_a_restart_that_may_have_lost_something_is_a_gap(tmp_path: Path) -> None:
    """Redis that writes once a second cannot say what it lost. Who was there before is told so, once."""
    with RedisServer(tmp_path, "appendfsync everysec") as redis:
        async with node(redis) as (server, client):
            first = await client.publish("a")
            send_poll(client, "a", start=first + 1)
            await parked(server, 1)
            redis.restart()
            answer = (await client.reply()).json
            second = publish_directly(redis, "a")
            after = await poll(client, "a", start=answer["next"])

    assert (ids(answer), answer["gap"]) == ([], True)
    assert (ids(after), after["gap"]) == ([second], False)


async def test_a_restart_without_anything_is_a_gap(own_redis: RedisServer) -> None:
    """Also for a channel that nobody publishes to any more; ids go on where they were."""
    async with node(own_redis) as (server, client), connected(server) as quiet:
        first = await client.publish("a")
        send_poll(client, "a", start=first + 1)
        send_poll(quiet, "never", start=first)
        await parked(server, 2)
        own_redis.restart(empty=True)
        answers = [(await client.reply()).json, (await quiet.reply()).json]
        second = await client.publish("a")

    assert [(ids(answer), answer["gap"]) for answer in answers] == [([], True), ([], True)]
    assert all(first < answer["next"] <= second for answer in answers)


async def test_a_flushed_server_is_a_gap(own_redis: RedisServer) -> None:
    """The same server, without its data: nodes that were connected all the time notice."""
    async with node(own_redis) as (server, client):
        first = await client.publish("a")
        send_poll(client, "b", start=first)
        await parked(server, 1)
        with own_redis.client() as operator:
            operator.flushall()
        answer = (await client.reply()).json

        assert (ids(answer), answer["gap"]) == ([], True)


async def test_evicted_messages_are_a_gap(redis_server: RedisServer) -> None:
    """A server that is short of memory may drop a channel's messages; who asks for them is told."""
    realm = uuid4().hex
    async with node(redis_server, realm) as (_, client):
        first = await client.publish("a")
    with redis_server.client() as operator:
        assert operator.delete(f"{realm_key(realm)}:m:a") == 1
    async with node(redis_server, realm) as (_, client):
        answer = await poll(client, "a", start=first)
        fresh = await poll(client, "a", hold=0)

    assert (ids(answer), answer["gap"]) == ([], True)
    assert (ids(fresh), fresh["gap"]) == ([], False)


async def test_readiness_goes_off_while_redis_does_not_answer(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parked polls stay; they are answered when it is back."""
    monkeypatch.setattr(pushup.redis_broker, "TICK_S", 0.05)
    monkeypatch.setattr(pushup.redis_broker, "ECHO_S", 0.1)
    async with node(own_redis) as (server, client):
        send_poll(client, "a")
        await parked(server, 1)
        own_redis.pause()
        await eventually(lambda: not server.node.ready, "it is not ready")
        own_redis.resume()
        await eventually(lambda: server.node.ready, "it is ready again")
        id = publish_directly(own_redis, "a")

        assert ids((await client.reply()).json) == [id]


async def test_a_broker_that_cannot_be_reached_is_named(own_redis: RedisServer) -> None:
    """A node that never had its broker does not start, and says why, without the password."""
    own_redis.kill()
    url = own_redis.url.replace("redis://", "redis://me:secret@")

    with pytest.raises(Unavailable, match=rf"cannot reach the broker {own_redis.url}.*onnect") as raised:
        async with running(broker=url, broker_timeout=2):
            pass

    assert "secret" not in str(raised.value)


async def test_a_wrong_password_is_said(own_redis: RedisServer) -> None:
    """The sentence names what Redis has against it."""
    with own_redis.client() as operator:
        operator.config_set("requirepass", "right")
    url = own_redis.url.replace("redis://", "redis://:wrong@")

    with pytest.raises(Unavailable, match="refuses user or password"):
        async with running(broker=url, broker_timeout=2):
            pass


async def test_many_channels_are_read_many_at_once(own_redis: RedisServer) -> None:
    """After a cut, the channels of a node cost few calls, however many they are."""
    names = [f"c{number}" for number in range(1000)]
    recorder = Recorder()
    broker = RedisBroker(parse_servers(own_redis.url), "default", Retention(), node="me", timeout=PATIENCE_S)
    await broker.start(recorder)
    try:
        await broker.watch(dict.fromkeys(names, 0))
        with own_redis.client() as operator:
            operator.config_resetstat()
            operator.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await eventually(lambda: recorder.doubted == ["everything"], "all are in doubt")
            histories = await broker.watch(dict.fromkeys(names, 1))
            calls = operator.info("commandstats")["cmdstat_fcall"]["calls"]

        assert len(histories) == 1000
        assert calls < 30
    finally:
        await broker.stop()


async def test_unwatching_while_it_is_being_watched_hangs_nobody(redis_server: RedisServer) -> None:
    """Whoever waits for the server's confirmation goes on."""
    async with deaf_broker(redis_server) as (broker, _, _):
        watching = asyncio.ensure_future(broker.watch({"a": 0, "b": 0}))
        await asyncio.sleep(0)
        broker.unwatch(["a"])
        histories = await watching
        again = await broker.watch({"a": 0})

        assert set(histories) == {"a", "b"}
        assert again["a"] is not None


async def test_a_read_is_not_done_before_its_channels_are_heard(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another read, from before the channel was made, may have unsubscribed it meanwhile."""
    async with node(redis_server) as (server, client):
        broker = server.node.broker
        assert isinstance(broker, RedisBroker)
        first = publish_directly(redis_server, "late", data=1)
        call, calls = broker._caller.call, 0

        async def call_and_unwatch(command: Any) -> Any:
            nonlocal calls
            reply = await call(command)
            calls += 1
            if calls == 1:
                broker.unwatch(["late"])
            return reply

        monkeypatch.setattr(broker._caller, "call", call_and_unwatch)
        assert ids(await poll(client, "late")) == [first]
        send_poll(client, "late", start=first + 1)
        second = publish_directly(redis_server, "late", data=2)
        assert ids((await client.reply()).json) == [second]


async def test_garbage_on_a_channel_harms_nobody(redis_server: RedisServer) -> None:
    """Whoever has Redis may announce anything; what is not ours is ignored, and the rest is heard."""
    async with deaf_broker(redis_server) as (broker, recorder, _):
        await broker.watch({"a": 0})
        assert broker._session is not None
        pubsub = broker._session.pubsub
        with redis_server.client() as stranger:
            for payload in (b"", b"nonsense", b"1 [", b"12 {}", b"closed never", b"\xff\xfe"):
                stranger.execute_command("SPUBLISH", pubsub.announcements("a"), payload)
                stranger.execute_command("SPUBLISH", pubsub.echoes("me"), payload)
        id = await _publish(broker, b"1")
        await caught_up(broker, id)

        assert [(channel, heard) for channel, heard, _ in recorder.heard] == [("a", id)]
        assert broker.sessions == 1


async def test_nodes_are_listed_until_they_leave(redis_server: RedisServer) -> None:
    """Each node's heartbeat says where it is and what it does; one that stops in good order is gone at once."""
    realm = uuid4().hex
    async with node(redis_server, realm, name="one") as (server, _), connected(server, admin=True) as admin:
        async with node(redis_server, realm, name="two"):
            both = (await admin.get("/nodes")).json["nodes"]
        alone = (await admin.get("/nodes")).json["nodes"]

    assert [about["name"] for about in both] == ["one", "two"]
    assert both[0]["address"] == server.address
    assert both[0]["admin_address"] == server.admin_address
    assert both[0]["started"] <= both[0]["seen"]
    assert [about["name"] for about in alone] == ["one"]


async def _publish(broker: RedisBroker, data: bytes) -> int:
    (receipt,) = await broker.publish([Publication(("a",), data)])
    assert isinstance(receipt, Receipt)
    return receipt.id


async def test_databases_of_one_server_do_not_hear_each_other(redis_server: RedisServer) -> None:
    """Redis' pub/sub knows nothing of databases; realms of the same name in two of them are apart all the same."""
    realm = uuid4().hex
    async with (
        running(broker=f"{redis_server.url}/1", realm=realm) as one,
        running(broker=f"{redis_server.url}/2", realm=realm) as two,
        connected(one) as here,
        connected(two) as there,
    ):
        await poll(there, "a", hold=0)
        await here.publish("a", data=1)
        id = await there.publish("a", data=2)

        assert ids(await poll(there, "a")) == [id]


async def test_user_and_password_come_from_the_url(own_redis: RedisServer) -> None:
    """Percent-encoded, as URLs have them."""
    with own_redis.client() as operator:
        operator.execute_command("ACL", "SETUSER", "node", "on", ">p@ss/word", "~pushup:*", "&pushup:*", "+@all")
    url = own_redis.url.replace("redis://", "redis://node:p%40ss%2Fword@")
    async with running(broker=url) as server, connected(server) as client:
        id = await client.publish("a")

        assert ids(await poll(client, "a")) == [id]
        assert "p@ss" not in server.node.broker.name


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody but this test trusts; its key beside it."""
    path = tmp_path / "redis.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=redis -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*command.split(), "-keyout", path.with_suffix(".key"), "-out", path], check=True, capture_output=True
    )
    return path


async def test_redis_over_tls(tmp_path: Path, certificate: Path) -> None:
    """`rediss://` with the certificate to trust, and not without it."""
    key = certificate.with_suffix(".key")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lines = (f"tls-port {port}", f"tls-cert-file {certificate}", f"tls-key-file {key}", "tls-auth-clients no")
    with RedisServer(tmp_path, *lines):
        async with (
            running(broker=f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}") as server,
            connected(server) as client,
        ):
            id = await client.publish("a")

            assert ids(await poll(client, "a")) == [id]

        with pytest.raises(Unavailable, match="certificate"):
            async with running(broker=f"rediss://127.0.0.1:{port}", broker_timeout=2):
                pass


async def test_a_poll_of_cold_channels_does_not_wait_for_a_tick(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels that were read at different times are in step as soon as the read's own echo is heard."""
    monkeypatch.setattr(pushup.redis_broker, "TICK_S", 3600.0)
    realm = uuid4().hex
    async with node(redis_server, realm) as (_, client):
        first = publish_directly(redis_server, "a", realm=realm)
        assert ids(await poll(client, "a")) == [first]
        second = publish_directly(redis_server, "b", realm=realm)

        assert ids(await poll(client, "a", "b", start=first + 1)) == [second]


async def test_a_receipt_of_a_server_that_was_replaced_is_not_believed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have given it before it knew. Whether the message is stored is unknown, and the publisher is told so."""
    async with deaf_broker(redis_server) as (broker, _, _):
        monkeypatch.setattr(broker, "_timeout", 0.05)
        honest = broker._caller.publish

        async def publish(seen: int, publications: Sequence[Publication]) -> Any:
            return [(receipt, "another:1") for receipt, _ in await honest(seen, publications)]  # type: ignore[misc]

        monkeypatch.setattr(broker._caller, "publish", publish)
        (result,) = await broker.publish([Publication(("a",), b"1")])

        assert isinstance(result, Unavailable)
        assert "may have been done or not" in result.detail


async def test_a_master_that_was_frozen_takes_no_writes_at_first(own_redis: RedisServer, tmp_path: Path) -> None:
    """It may have been replaced meanwhile: nothing is acknowledged until it has had time to hear of that."""
    (tmp_path / "replica").mkdir()
    with RedisServer(tmp_path / "replica", f"replicaof 127.0.0.1 {own_redis.port}") as replica:
        with replica.client() as follower:
            await eventually(lambda: follower.info("replication")["master_link_status"] == "up", "the replica follows")
        with own_redis.client() as operator:
            operator.function_load(SOURCE)
            publish_directly(own_redis, "a")
            # As if the last thing that happened there was long ago.
            operator.hincrby(realm_key("default"), "last", -10_000_000)
            with pytest.raises(ResponseError, match="another server may have taken over"):
                publish_directly(own_redis, "a")
            with pytest.raises(ResponseError, match="another server may have taken over"):
                publish_directly(own_redis, "a")
            await asyncio.sleep(2.1)

        assert publish_directly(own_redis, "a") > 0


async def test_a_server_without_replicas_is_not_suspected(own_redis: RedisServer) -> None:
    """Nobody could have taken its place."""
    with own_redis.client() as operator:
        operator.function_load(SOURCE)
        publish_directly(own_redis, "a")
        operator.hincrby(realm_key("default"), "last", -10_000_000)

    assert publish_directly(own_redis, "a") > 0
