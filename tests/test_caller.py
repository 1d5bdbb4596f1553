"""Calls to whichever server owns the realm: what is asked again, what is not, and what is said about it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
import redis
from redis.asyncio.connection import AbstractConnection, Connection
from redis.exceptions import ResponseError

from pushup.caller import BYTES_AT_ONCE, PUBLICATIONS_AT_ONCE, UNKNOWN, Caller
from pushup.errors import BrokerRefused, ChannelNotFound, InvalidRequest, PushUpError, Unavailable
from pushup.library import CHANNELS_AT_ONCE, SOURCE, VERSION, Library, parse_histories
from pushup.messages import Message, Publication, Receipt
from pushup.redis_url import parse_servers
from pushup.servers import dial
from tests.redis_server import RedisServer
from tests.resp import Deed, Script, ScriptedServer, proxied, scripted
from tests.support import PATIENCE_S, eventually

IMPATIENCE_S = 0.2
READONLY = ResponseError("READONLY You can't write against a read only replica.")
NOREPLICAS = ResponseError("NOREPLICAS Not enough good replicas to write.")


@asynccontextmanager
async def calling(url: str, patience: float = PATIENCE_S) -> AsyncIterator[Caller]:
    """A caller in a realm of its own."""
    caller = Caller(parse_servers(url), Library(uuid4().hex), patience)
    try:
        yield caller
    finally:
        await caller.stop()


def with_functions(script: Script, version: object = VERSION) -> Script:
    """A server that has our functions, and answers calls by this script."""

    def answer(*words: str) -> object:
        match words:
            case ("FCALL", "pushup_version", "0"):
                return version
            case ("FUNCTION", "LOAD", *_):
                return "pushup"
        return script(*words)

    return answer


def in_turn(*replies: object) -> Script:
    """One reply after the other; the last one for ever."""
    waiting = list(replies)

    def answer(*words: str) -> object:
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return answer


def sentinel(*named: ScriptedServer | None) -> Script:
    """Names these as the master, one after the other; None: it knows of none."""
    return in_turn(*[server and [server.address.host, str(server.address.port)] for server in named])


def asked(server: ScriptedServer) -> list[tuple[str, ...]]:
    """The calls that came to a server, apart from those that every connection begins with."""
    return [words for words in server.commands if words[:2] not in (("FCALL", "pushup_version"), ("FUNCTION", "LOAD"))]


def publication(data: bytes = b"1", key: str | None = None) -> Publication:
    return Publication(("a",), data, key)


async def stored(caller: Caller) -> list[Message]:
    """What the channel holds."""
    histories, _, _ = parse_histories(await caller.call(caller.library.read(0, "me", "token", {"a": 0})), ["a"])
    history = histories["a"]
    assert history is not None
    return list(history.messages)


async def refusal(caller: Caller, *, repeatable: bool = True) -> PushUpError:
    with pytest.raises(PushUpError) as caught:
        await caller.call(("ECHO", "1"), repeatable=repeatable)
    return caught.value


# The functions


@pytest.mark.parametrize(
    ("version", "loads"),
    [(ResponseError("ERR Function not found"), 1), (VERSION - 1, 1), (VERSION, 0), (VERSION + 1, 0)],
    ids=["missing", "older", "ours", "newer"],
)
async def test_a_server_is_given_our_functions(version: object, loads: int) -> None:
    """If it has none, or older ones: once for a connection, before anything else."""
    async with scripted(with_functions(lambda *words: "done", version)) as server, calling(server.url) as caller:
        replies = [await caller.call(("ECHO", "1")) for _ in range(2)]

    assert replies == [b"done"] * 2
    assert [words for words in server.commands if words[0] == "FUNCTION"] == [
        ("FUNCTION", "LOAD", "REPLACE", SOURCE)
    ] * loads
    assert server.commands[0] == ("FCALL", "pushup_version", "0")
    assert len(server.commands) == 3 + loads


async def test_functions_that_were_forgotten_are_loaded_again(redis_server: RedisServer) -> None:
    """Before the first call and in the middle of the work; the publication is stored, without a key too."""
    async with calling(redis_server.url) as caller:
        with redis_server.client() as operator:
            operator.function_flush()
            (one,) = await caller.publish(0, [publication()])
            operator.function_flush()
            (two,) = await caller.publish(0, [publication()])
            operator.function_delete("pushup")
            messages = await stored(caller)

    assert not isinstance(one, PushUpError)
    assert not isinstance(two, PushUpError)
    assert [message.id for message in messages] == [one[0].id, two[0].id]


@pytest.mark.parametrize("at", ["pushup_version", "LOAD"])
async def test_a_server_that_lets_us_have_no_functions(at: str) -> None:
    """Says why, at once: asking again would not help."""

    def script(*words: str) -> object:
        if words[1] == at:
            return ResponseError("NOPERM this user has no permissions to run the 'function|load' command")
        return ResponseError("ERR Function not found")

    started = time.monotonic()
    async with scripted(script) as server, calling(server.url) as caller:
        error = await refusal(caller)

    assert isinstance(error, BrokerRefused)
    assert "has no permissions" in str(error)
    assert server.connections == 1
    assert time.monotonic() - started < PATIENCE_S / 2


# The connection


async def test_calls_share_a_connection() -> None:
    """Those that come at the same time wait for the same one, and each gets its own reply."""
    async with scripted(with_functions(lambda *words: words[1])) as server, calling(server.url) as caller:
        replies = await asyncio.gather(*[caller.call(("ECHO", str(number))) for number in range(50)])

    assert replies == [str(number).encode() for number in range(50)]
    assert server.connections == 1


async def test_a_broken_connection_is_replaced() -> None:
    """With the next call, be it repeatable or not."""
    async with scripted(with_functions(lambda *words: "done")) as server, calling(server.url) as caller:
        await caller.call(("ECHO", "1"))
        commands = await caller.connect()
        server.cut()
        await eventually(lambda: not commands.open, "the connection is gone")

        assert await caller.call(("ECHO", "2"), repeatable=False) == b"done"
        assert server.connections == 2


class Fleeting(Connection):
    """A connection that breaks with its first reply."""

    async def connect(self) -> None:
        self._reader = asyncio.StreamReader()
        self._reader.feed_data(b":%d\r\n" % VERSION)
        self._reader.feed_eof()

    async def send_packed_command(self, *arguments: Any, **options: Any) -> None:
        await asyncio.Event().wait()

    async def disconnect(self, *arguments: Any, **options: Any) -> None:
        pass


async def test_a_connection_that_breaks_before_anything_was_sent() -> None:
    """What has not been sent has not been done: it is sent on the next one, be it repeatable or not."""
    async with scripted(with_functions(lambda *words: "done")) as server:
        servers = parse_servers(server.url)
        fleeting: list[AbstractConnection] = [Fleeting()]
        caller = Caller(
            servers,
            Library("r"),
            PATIENCE_S,
            lambda address: fleeting.pop() if fleeting else dial(servers, address, PATIENCE_S),
        )

        assert await caller.call(("ECHO", "1"), repeatable=False) == b"done"
        assert (fleeting, server.connections) == ([], 1)
        await caller.stop()


async def test_who_gives_up_while_connecting_hinders_nobody() -> None:
    """The next call connects, and no connection is left behind."""
    held = in_turn(Deed.SILENCE, VERSION)

    def script(*words: str) -> object:
        return held(*words) if words[1] == "pushup_version" else "done"

    async with scripted(script) as server, calling(server.url) as caller:
        first = asyncio.create_task(caller.call(("ECHO", "1")))
        second = asyncio.create_task(caller.call(("ECHO", "2")))
        await eventually(lambda: server.commands != [], "it is connecting")
        first.cancel()

        assert await second == b"done"
        assert asked(server) == [("ECHO", "2")]
        assert server.connections == 2


async def test_who_gives_up_waiting_hinders_nobody() -> None:
    """Others on the connection get their own replies."""
    async with scripted(with_functions(lambda *words: Deed.SILENCE)) as server, calling(server.url) as caller:
        first, second = [asyncio.create_task(caller.call(("ECHO", word))) for word in ("1", "2")]
        await eventually(lambda: len(asked(server)) == 2, "both are asked")
        first.cancel()
        server.say("one")
        server.say("two")

        assert await second == b"two"
        assert server.connections == 1


async def test_a_server_that_cannot_be_reached() -> None:
    """Is tried until the time is up; then the reason is told, with the address."""
    async with scripted() as gone:
        pass
    async with calling(gone.url, IMPATIENCE_S) as caller:
        error = await refusal(caller, repeatable=False)

        assert isinstance(error, Unavailable)
        assert str(error).startswith(f"cannot reach Redis: {gone.address}: ")
        assert caller.trouble in str(error)


async def test_a_server_that_comes_in_time() -> None:
    """A call waits for it, though it must not be repeated: it has not been sent."""
    async with (
        scripted(with_functions(lambda *words: "done")) as master,
        scripted(sentinel(None, None, master)) as one,
        calling(f"redis+sentinel://{one.address}/main") as caller,
    ):
        assert await caller.call(("ECHO", "1"), repeatable=False) == b"done"
        assert caller.address == master.address
        assert len(one.commands) == 3


async def test_when_nobody_knows_the_server() -> None:
    """The reason says who was asked."""
    async with (
        scripted(sentinel(None)) as one,
        calling(f"redis+sentinel://{one.address}/main", IMPATIENCE_S) as caller,
    ):
        error = await refusal(caller)

    assert str(error) == f"cannot reach Redis: none of {one.address} knows which server to use"
    assert len(one.commands) > 1


# What was certainly not done


NOT_DONE = [
    "READONLY You can't write against a read only replica.",
    "MOVED 5718 192.0.2.1:1",
    "ASK 5718 192.0.2.1:1",
    "CLUSTERDOWN The cluster is down",
    "CLUSTERDOWN Hash slot not served",
    "TRYAGAIN Multiple keys request during rehashing of slot",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "LOADING Redis is loading the dataset in memory",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "NOREPLICAS Not enough good replicas to write.",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
]


@pytest.mark.parametrize("text", NOT_DONE, ids=lambda text: text.split(" ")[0])
async def test_what_a_server_did_not_do_is_asked_of_its_successor(text: str) -> None:
    """Whoever asks: the server is looked for anew, and the call made there, once."""
    async with (
        scripted(with_functions(lambda *words: ResponseError(text))) as old,
        scripted(with_functions(lambda *words: "done")) as new,
        scripted(sentinel(old, new)) as watcher,
        calling(f"redis+sentinel://{watcher.address}/main") as caller,
    ):
        assert await caller.call(("ECHO", "1"), repeatable=False) == b"done"
        assert caller.address == new.address
        assert asked(old) == asked(new) == [("ECHO", "1")]


async def test_a_slot_that_moved_is_followed() -> None:
    """A cluster is asked again who has it."""

    def slots(server: ScriptedServer) -> list[object]:
        return [[0, 16383, [server.address.host, server.address.port, "id"]]]

    async with (
        scripted(with_functions(lambda *words: ResponseError("MOVED 1 192.0.2.1:1"))) as old,
        scripted(with_functions(lambda *words: "done")) as new,
        scripted(in_turn(slots(old), slots(new))) as seed,
        calling(f"redis+cluster://{seed.address}") as caller,
    ):
        assert await caller.call(("ECHO", "1"), repeatable=False) == b"done"
        assert caller.address == new.address


async def test_a_server_that_goes_on_refusing() -> None:
    """Is asked until the time is up, with pauses; then the reason is told."""
    async with (
        scripted(
            with_functions(lambda *words: ResponseError("NOREPLICAS Not enough good replicas to write."))
        ) as server,
        calling(server.url, IMPATIENCE_S) as caller,
    ):
        error = await refusal(caller)

    assert isinstance(error, Unavailable)
    assert str(error) == "Redis cannot do this now: NOREPLICAS Not enough good replicas to write."
    assert 2 <= len(asked(server)) <= 4


async def test_only_what_was_not_done_is_asked_again() -> None:
    """Of several calls, those that were answered keep their answers."""
    first = with_functions(in_turn("one", READONLY, "three"))
    async with (
        scripted(first) as old,
        scripted(with_functions(lambda *words: "two")) as new,
        scripted(sentinel(old, new)) as watcher,
        calling(f"redis+sentinel://{watcher.address}/main") as caller,
    ):
        replies = await caller.call_all([("ECHO", word) for word in "123"], repeatable=lambda at: False)

        assert replies == [b"one", b"two", b"three"]
        assert asked(new) == [("ECHO", "2")]


async def test_a_server_that_refuses_for_good_takes_back_no_answer() -> None:
    """What an earlier server has done is done."""
    noperm = ResponseError("NOPERM this user has no permissions to run the 'function|load' command")
    async with (
        scripted(with_functions(in_turn("one", READONLY, "three"))) as old,
        scripted(lambda *words: noperm) as new,
        scripted(sentinel(old, new)) as watcher,
        calling(f"redis+sentinel://{watcher.address}/main") as caller,
    ):
        one, two, three = await caller.call_all([("ECHO", word) for word in "123"], repeatable=lambda at: False)

        assert (one, three) == (b"one", b"three")
        assert isinstance(two, BrokerRefused)


async def test_calls_under_way_keep_their_connection() -> None:
    """That one call has to look for another server does not fail those that wait for a reply of this one."""
    first = with_functions(in_turn(READONLY, Deed.SILENCE))
    async with (
        scripted(first) as old,
        scripted(with_functions(lambda *words: "new")) as new,
        scripted(sentinel(old, new)) as watcher,
        calling(f"redis+sentinel://{watcher.address}/main") as caller,
    ):
        moved = asyncio.create_task(caller.call(("ECHO", "1"), repeatable=False))
        await caller.connect()
        slow = asyncio.create_task(caller.call(("ECHO", "2"), repeatable=False))
        assert await moved == b"new"
        old.say("late")

        assert await slow == b"late"
        assert asked(old) == [("ECHO", "1"), ("ECHO", "2")]


# What may have been done


async def test_a_lost_reply_is_told() -> None:
    """A call that must not be repeated is not, and the caller hears the truth."""
    async with scripted(with_functions(in_turn(Deed.CUT, "twice"))) as server, calling(server.url) as caller:
        error = await refusal(caller, repeatable=False)

        assert isinstance(error, Unavailable)
        assert str(error) == UNKNOWN
        assert len(asked(server)) == 1


async def test_what_does_no_harm_is_repeated() -> None:
    """On another connection."""
    async with scripted(with_functions(in_turn(Deed.CUT, Deed.CUT, "done"))) as server, calling(server.url) as caller:
        assert await caller.call(("ECHO", "1")) == b"done"
        assert (len(asked(server)), server.connections) == (3, 3)


async def test_each_of_many_has_its_own_fate() -> None:
    """One was answered, one is repeated because of its key, of one nobody can say."""
    answers = in_turn([7, 0, "run:1"], Deed.CUT, [9, 0, "run:1"])
    async with scripted(with_functions(answers)) as server, calling(server.url) as caller:
        one, two, three = await caller.publish(0, [publication(b"1"), publication(b"2", "k"), publication(b"3")])

        assert one == (Receipt(7), "run:1")
        assert two == (Receipt(9), "run:1")
        assert isinstance(three, Unavailable)
        assert str(three) == UNKNOWN
        assert [words[5:7] for words in asked(server)] == [("", "1"), ("k", "2"), ("k", "2")]


def several(*words: str) -> object:
    """A receipt for each publication of a call, and its data as its id."""
    if words[1] == "pushup_store":
        return [int(words[6]), 0, "run:1"]
    ids, at = [], 5
    while at < len(words):
        ids.append(int(words[at + 1]))
        at += 3 + int(words[at + 2])
    return ["run:1", *ids]


async def test_publications_go_many_in_a_call() -> None:
    """Up to a number, a size and as many channels as Redis should be asked for at once; each gets its own receipt."""
    many = [publication(b"%d" % n) for n in range(2 * PUBLICATIONS_AT_ONCE + 1)]
    big = [publication(b"1" + b" " * (BYTES_AT_ONCE // 3)) for _ in range(5)]
    wide = [Publication(tuple(f"c{n}" for n in range(CHANNELS_AT_ONCE // 2)), b"1") for _ in range(3)]
    async with scripted(with_functions(several)) as server, calling(server.url) as caller:
        receipts = [await caller.publish(0, some) for some in (many, big, wide)]

        assert receipts[0] == [(Receipt(n), "run:1") for n in range(len(many))]
        assert [len(some) for some in receipts] == [len(many), 5, 3]
        assert [words[1] for words in asked(server)] == [
            *("pushup_store_all", "pushup_store_all", "pushup_store"),
            *("pushup_store_all", "pushup_store_all", "pushup_store"),
            *("pushup_store_all", "pushup_store"),
        ]


async def test_what_may_be_repeated_goes_by_itself() -> None:
    """Or a publication without a key in the same call would forbid to repeat it; the order is kept."""
    keys = [None, None, "k", "l", None]
    some = [publication(b"%d" % n, key) for n, key in enumerate(keys)]
    async with scripted(with_functions(in_turn(["run:1", 0, 1], Deed.CUT, ["run:1", 2, 3]))) as server:
        async with calling(server.url) as caller:
            receipts = await caller.publish(0, some)

        assert receipts[:4] == [(Receipt(n), "run:1") for n in range(4)]
        assert isinstance(receipts[4], Unavailable)


@pytest.mark.parametrize(
    "reply", ["OK", 7, None, [], ["run:1"], ["run:1", 7], ["run:1", 7, 8, 9], [1, 7, 8], ["run:1", 7, None]]
)
async def test_receipts_that_cannot_be_read(reply: Any) -> None:
    """Nobody can say what became of any of them."""
    async with scripted(with_functions(lambda *words: reply)) as server, calling(server.url) as caller:
        results = await caller.publish(0, [publication(b"1"), publication(b"2")])

    assert [type(result) for result in results] == [Unavailable] * 2
    assert all("does not understand" in str(result) for result in results)


@pytest.mark.parametrize("reply", ["OK", 7, None, [], [1, 2, 3]])
async def test_a_receipt_that_cannot_be_read_is_one_publications_trouble(reply: Any) -> None:
    """Whoever has changed the functions in Redis; the others are told theirs."""
    answers = iter([[7, 0, "run:1"], reply, [9, 0, "run:1"]])
    async with scripted(with_functions(lambda *words: next(answers))) as server, calling(server.url) as caller:
        one, two, three = await caller.publish(0, [publication(b"1"), publication(b"2", "k"), publication(b"3")])

    assert [one, three] == [(Receipt(7), "run:1"), (Receipt(9), "run:1")]
    assert isinstance(two, Unavailable)
    assert "does not understand" in str(two)


async def test_a_publication_without_a_key_is_stored_once_and_told(redis_server: RedisServer) -> None:
    """Its reply was lost on the way from a real Redis."""
    async with proxied(redis_server) as proxy, calling(proxy.url) as caller:
        await caller.connect()
        proxy.lose_reply_to(b"pushup_store")
        (result,) = await caller.publish(0, [publication()])
        messages = await stored(caller)

    assert isinstance(result, Unavailable)
    assert str(result) == UNKNOWN
    assert (proxy.lost, len(messages)) == (1, 1)


async def test_a_publication_with_a_key_is_repeated_and_stored_once(redis_server: RedisServer) -> None:
    """Its reply was lost on the way; the repetition gets the first one's id."""
    async with proxied(redis_server) as proxy, calling(proxy.url) as caller:
        await caller.connect()
        proxy.lose_reply_to(b"pushup_store")
        (result,) = await caller.publish(0, [publication(key="k")])
        messages = await stored(caller)

    assert not isinstance(result, PushUpError)
    assert result[0] == Receipt(messages[0].id, duplicate=True)
    assert (proxy.lost, len(messages)) == (1, 1)


# Time


@pytest.mark.parametrize("repeatable", [True, False])
async def test_a_server_that_does_not_answer(repeatable: bool) -> None:
    """Is waited for as long as a call may take; what is not to be repeated may have been done."""
    started = time.monotonic()
    async with (
        scripted(with_functions(lambda *words: Deed.SILENCE)) as server,
        calling(server.url, IMPATIENCE_S) as caller,
    ):
        error = await refusal(caller, repeatable=repeatable)
        server.script = with_functions(lambda *words: "done")
        after = await caller.call(("ECHO", "2"))

    assert isinstance(error, Unavailable)
    assert "it does not answer" in str(error) if repeatable else str(error) == UNKNOWN
    assert IMPATIENCE_S <= time.monotonic() - started < PATIENCE_S
    assert after == b"done"
    assert server.connections == 2


async def test_a_time_out_ends_the_silent_connection_only() -> None:
    """Not the one that has taken its place meanwhile, on which others wait."""
    patience = 0.5
    async with (
        scripted(with_functions(in_turn(READONLY, Deed.SILENCE))) as old,
        scripted(with_functions(in_turn("new", Deed.SILENCE))) as new,
        scripted(sentinel(old, new)) as watcher,
        calling(f"redis+sentinel://{watcher.address}/main", patience) as caller,
    ):
        moved = asyncio.create_task(caller.call(("ECHO", "1")))
        await caller.connect()
        slow = asyncio.create_task(refusal(caller, repeatable=False))
        assert await moved == b"new"
        await asyncio.sleep(patience / 2)
        later = asyncio.create_task(caller.call(("ECHO", "2"), repeatable=False))
        assert str(await slow) == UNKNOWN
        new.say("later")

        assert await later == b"later"


async def test_a_server_that_does_not_even_begin_to_answer() -> None:
    """A call that was not sent was not done."""
    async with scripted(lambda *words: Deed.SILENCE) as server, calling(server.url, IMPATIENCE_S) as caller:
        error = await refusal(caller, repeatable=False)

    assert isinstance(error, Unavailable)
    assert str(error) == "Redis did not answer in time"
    assert asked(server) == []


@pytest.mark.parametrize("repeatable", [True, False])
async def test_stopping_ends_calls_at_once(repeatable: bool) -> None:
    """Whoever waits hears that there will be no answer, and does not wait for the time to be up."""
    async with scripted(with_functions(lambda *words: Deed.SILENCE)) as server, calling(server.url) as caller:
        call = asyncio.create_task(refusal(caller, repeatable=repeatable))
        await eventually(lambda: asked(server) != [], "it is asked")
        started = time.monotonic()
        await caller.stop()
        error = await call

    assert isinstance(error, Unavailable)
    assert time.monotonic() - started < PATIENCE_S / 2


async def test_after_stopping_nothing_is_asked() -> None:
    """And that is said at once."""
    async with scripted(with_functions(lambda *words: "done")) as server, calling(server.url) as caller:
        await caller.call(("ECHO", "1"))
        await caller.stop()
        started = time.monotonic()
        error = await refusal(caller)

    assert isinstance(error, Unavailable)
    assert len(asked(server)) == 1
    assert time.monotonic() - started < PATIENCE_S / 2


async def test_looking_for_the_server_anew() -> None:
    """A reset fails what waits for a reply; what may be repeated goes to the server that is found."""
    async with (
        scripted(with_functions(lambda *words: Deed.SILENCE)) as old,
        scripted(with_functions(lambda *words: "new")) as new,
        scripted(sentinel(old, new)) as watcher,
        calling(f"redis+sentinel://{watcher.address}/main") as caller,
    ):
        again = asyncio.create_task(caller.call(("ECHO", "1")))
        lost = asyncio.create_task(refusal(caller, repeatable=False))
        await eventually(lambda: len(asked(old)) == 2, "both are asked")
        caller.reset("another server has taken over")

        assert await again == b"new"
        assert str(await lost) == UNKNOWN
        assert caller.address == new.address


# Refusals


async def test_a_refusal_is_final(redis_server: RedisServer) -> None:
    """It is raised by a call of its own, and is one of the results of several."""
    async with calling(redis_server.url) as caller:
        with pytest.raises(ChannelNotFound, match="channel 17 does not exist"):
            await caller.call(caller.library.describe(0, "17"))
        missing, bad, good = await caller.publish(
            0, [Publication(("17",), b"1"), Publication(("a",), b"no JSON"), publication()]
        )

    assert isinstance(missing, ChannelNotFound)
    assert isinstance(bad, InvalidRequest)
    assert not isinstance(good, PushUpError)


async def test_another_databases_functions_are_ours_too(redis_server: RedisServer) -> None:
    """Functions are the server's, data is the database's."""
    async with calling(f"{redis_server.url}/1") as caller:
        (result,) = await caller.publish(0, [publication()])
        with redis.Redis(port=redis_server.port, db=1) as one, redis_server.client() as zero:
            where = [one.exists(caller.library.key), zero.exists(caller.library.key)]

    assert not isinstance(result, PushUpError)
    assert where == [1, 0]
