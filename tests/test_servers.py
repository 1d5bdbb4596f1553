"""Which server owns a realm, as Sentinels and clusters tell it."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis

from pushup.address import Address
from pushup.redis_url import Servers, parse_servers
from pushup.servers import NoServer, dial, explain, locate
from tests.resp import Deed, ScriptedServer, scripted
from tests.support import PATIENCE_S

KEY = "pushup:{default}"
SLOT = 5718
"""What Redis answers to CLUSTER KEYSLOT with the key."""

IMPATIENCE_S = 0.1


def sentinels(*servers: ScriptedServer, service: str = "main") -> Servers:
    return parse_servers(f"redis+sentinel://{','.join(str(server.address) for server in servers)}/{service}")


def cluster(*servers: ScriptedServer) -> Servers:
    return parse_servers(f"redis+cluster://{','.join(str(server.address) for server in servers)}")


def says(host: str, port: int) -> Any:
    """A Sentinel's script."""
    return lambda *words: [host, str(port)]


def silent(*words: str) -> Deed:
    return Deed.SILENCE


@asynccontextmanager
async def nobody() -> AsyncIterator[ScriptedServer]:
    """An address where nobody listens."""
    async with scripted() as server:
        pass
    yield server


async def test_one_server_is_not_asked() -> None:
    """Its address is in the URL."""
    servers = parse_servers("redis://nowhere.invalid:7")

    assert await locate(servers, KEY, 5, 0) == Address("nowhere.invalid", 7)


async def test_sentinel_names_the_master() -> None:
    """It is asked for the service, and for nothing else."""
    async with scripted(says("192.0.2.1", 7)) as one:
        address = await locate(sentinels(one, service="ma in"), KEY, 0, PATIENCE_S)

    assert address == Address("192.0.2.1", 7)
    assert one.commands == [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "ma in")]


@pytest.mark.parametrize(
    "script",
    [
        silent,
        lambda *words: Deed.CUT,
        lambda *words: None,
        lambda *words: redis.ResponseError("ERR no such thing"),
        lambda *words: redis.ResponseError("LOADING"),
    ],
    ids=["silent", "cut", "unknown service", "error", "loading"],
)
async def test_a_sentinel_that_does_not_know_is_passed_over(script: Any) -> None:
    """The next one is asked, after no longer than the patience."""
    async with scripted(script) as one, scripted(says("192.0.2.1", 7)) as two:
        address = await locate(sentinels(one, two), KEY, 0, IMPATIENCE_S)

    assert address == Address("192.0.2.1", 7)
    assert len(one.commands) == len(two.commands) == 1


async def test_a_sentinel_that_is_gone_is_passed_over() -> None:
    """Nobody listens there."""
    async with nobody() as one, scripted(says("192.0.2.1", 7)) as two:
        assert await locate(sentinels(one, two), KEY, 0, PATIENCE_S) == Address("192.0.2.1", 7)


async def test_each_attempt_begins_with_another_address() -> None:
    """So a Sentinel that is wrong, or far, does not stand in the way for ever."""
    async with scripted(says("192.0.2.1", 1)) as one, scripted(says("192.0.2.1", 2)) as two:
        servers = sentinels(one, two)

        ports = [(await locate(servers, KEY, attempt, PATIENCE_S)).port for attempt in range(4)]

    assert ports == [1, 2, 1, 2]


async def test_a_cluster_says_who_has_the_slot() -> None:
    """The master of the range that the realm's key falls into, ends included."""
    slots: list[Any] = [
        [0, SLOT - 1, ["192.0.2.1", 1, "id"], ["192.0.2.9", 9, "id"]],
        [SLOT, SLOT, ["192.0.2.2", 2, "id", []], ["192.0.2.8", 8, "id", []]],
        [SLOT + 1, 16383, ["192.0.2.3", 3, "id"]],
    ]
    async with scripted(lambda *words: slots) as one:
        address = await locate(cluster(one), KEY, 0, PATIENCE_S)

    assert address == Address("192.0.2.2", 2)
    assert one.commands == [("CLUSTER", "SLOTS")]


async def test_a_realm_lies_in_one_slot() -> None:
    """Only the part in braces decides, so everything of the realm has the same owner."""
    async with scripted(lambda *words: [[SLOT, SLOT, ["192.0.2.2", 2, "id"]]]) as one:
        servers = cluster(one)

        assert await locate(servers, f"{KEY}:m:{{other}}", 0, PATIENCE_S) == Address("192.0.2.2", 2)
        with pytest.raises(NoServer):
            await locate(servers, "pushup:{other}", 0, PATIENCE_S)


async def test_an_empty_host_is_the_one_that_was_asked() -> None:
    """A server of a cluster that does not know its own address says so."""
    async with scripted(lambda *words: [[0, 16383, ["", 7, "id"]]]) as one:
        assert await locate(cluster(one), KEY, 0, PATIENCE_S) == Address("127.0.0.1", 7)


async def test_a_server_without_a_cluster_is_passed_over() -> None:
    """One that has lost its cluster knows nothing, or not this slot."""
    async with (
        scripted(lambda *words: redis.ResponseError("ERR This instance has cluster support disabled")) as one,
        scripted(lambda *words: []) as two,
        scripted(lambda *words: [[0, SLOT - 1, ["192.0.2.1", 1, "id"]]]) as three,
        scripted(lambda *words: [[0, 16383, ["192.0.2.2", 2, "id"]]]) as four,
    ):
        assert await locate(cluster(one, two, three, four), KEY, 0, PATIENCE_S) == Address("192.0.2.2", 2)


async def test_when_nobody_knows() -> None:
    """The sentence names those that were asked, in their order."""
    async with scripted(lambda *words: None) as one, nobody() as two:
        with pytest.raises(NoServer) as caught:
            await locate(sentinels(one, two), KEY, 1, PATIENCE_S)

    assert str(caught.value) == f"none of {two.address}, {one.address} knows which server to use"


async def test_silence_has_an_end() -> None:
    """Each address gets the patience, no more."""
    started = time.monotonic()
    async with scripted(silent) as one, scripted(silent) as two:
        with pytest.raises(NoServer):
            await locate(cluster(one, two), KEY, 0, IMPATIENCE_S)

    assert 2 * IMPATIENCE_S <= time.monotonic() - started < 2 * IMPATIENCE_S + PATIENCE_S


async def test_users_of_servers_and_sentinels() -> None:
    """Each is told its own, and the database is chosen on the servers only."""
    async with scripted(lambda *words: ["192.0.2.1", "7"] if words[0] == "SENTINEL" else "OK") as one:
        servers = parse_servers(
            f"redis+sentinel://me:secret@{one.address}/main/3?sentinel_username=watcher&sentinel_password=other"
        )
        await locate(servers, KEY, 0, PATIENCE_S)
        connection = dial(servers, one.address, PATIENCE_S)
        await connection.connect()
        await connection.disconnect()

    assert one.commands == [
        ("AUTH", "watcher", "other"),
        ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"),
        ("AUTH", "me", "secret"),
        ("SELECT", "3"),
    ]


async def test_a_connection_repeats_nothing() -> None:
    """redis-py would send a command again, or connect again, in secret."""
    async with scripted(lambda *words: Deed.CUT) as one:
        connection = dial(parse_servers(one.url), one.address, PATIENCE_S)
        await connection.connect()
        await connection.send_command("ECHO", "1")
        with pytest.raises(redis.ConnectionError):
            await connection.read_response()
        await connection.disconnect()

    assert (one.connections, one.commands) == (1, [("ECHO", "1")])


async def test_tls_is_spoken_where_it_is_asked_for() -> None:
    """A server that does not speak it is not talked to in clear."""
    heard = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.read(100))
        writer.write(b"-ERR unknown command\r\n")
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    address = Address(*server.sockets[0].getsockname()[:2])
    try:
        with pytest.raises(NoServer):
            await locate(parse_servers(f"rediss+cluster://me:secret@{address}"), KEY, 0, PATIENCE_S)
    finally:
        server.close()
        await server.wait_closed()

    assert heard[:1] == b"\x16"  # A handshake.
    assert b"secret" not in heard


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "it does not answer"),
        (redis.TimeoutError("Timeout reading from 127.0.0.1:1"), "it does not answer"),
        (redis.AuthenticationError("WRONGPASS"), "it refuses user or password: WRONGPASS"),
        (redis.ConnectionError("Connection closed by server."), "Connection closed by server."),
        (ConnectionResetError(), "ConnectionResetError"),
        (ssl.SSLCertVerificationError(1, "self-signed certificate"), "self-signed certificate"),
    ],
)
def test_reasons(error: Exception, words: str) -> None:
    """Few words, never none."""
    assert explain(error) == words
