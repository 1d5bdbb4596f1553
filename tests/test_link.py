"""One connection: replies in order, nothing repeated, and every way in which it ends."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import ResponseError

from pushup.link import REPLIES_PER_TURN, Batch, Commands, ErrorReply, Link, Lost, cancel
from pushup.redis_url import parse_servers
from pushup.servers import dial
from tests.resp import Deed, ScriptedServer, scripted
from tests.support import PATIENCE_S, eventually


def echo(*words: str) -> object:
    """A script: ECHO gives back its word, WRONG is an error, anything else is a deed by that name."""
    match words:
        case ("ECHO", word):
            return word
        case ("WRONG", *rest):
            return ResponseError(" ".join(rest))
    return Deed[words[0]]


def connection(server: ScriptedServer, timeout: float = PATIENCE_S) -> Any:
    return dial(parse_servers(server.url), server.address, timeout)


@asynccontextmanager
async def commands(server: ScriptedServer, patience: float = PATIENCE_S) -> AsyncIterator[Commands]:
    """Connected, and closed at the end."""
    open_one = Commands(connection(server, patience))
    await open_one.connect()
    try:
        yield open_one
    finally:
        await open_one.close()


class Recorder:
    """What a link brought, and why it ended."""

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.ends: list[str] = []


@asynccontextmanager
async def recorded(server: ScriptedServer, patience: float = PATIENCE_S) -> AsyncIterator[tuple[Link, Recorder]]:
    recorder = Recorder()
    link = Link(connection(server, patience), recorder.replies.append, recorder.ends.append)
    await link.connect()
    try:
        yield link, recorder
    finally:
        await link.close()


async def fate(batch: Batch) -> object:
    """The reply to the one command, or the error."""
    async with asyncio.timeout(PATIENCE_S):
        await batch.done
    (reply,) = batch.replies
    return reply


async def test_replies_come_to_their_commands() -> None:
    """Many commands are sent before the first reply, and each gets its own."""
    async with scripted(echo) as server, commands(server) as link:
        batches = [link.send([("ECHO", str(number))]) for number in range(1000)]
        assert server.commands == []
        replies = [await fate(batch) for batch in batches]

        assert replies == [str(number).encode() for number in range(1000)]
        assert server.connections == 1


async def test_words_of_any_kind() -> None:
    """Text, bytes and integers arrive as they are."""
    async with scripted(echo) as server, commands(server) as link:
        replies = [await fate(link.send([("ECHO", word)])) for word in ("é\0\r\n", b"\xff\r\n$5", 2**53 - 1, "")]

        assert replies[0] == "é\0\r\n".encode()
        assert replies[2:] == [b"9007199254740991", b""]
        assert server.commands[1] == ("ECHO", b"\xff\r\n$5".decode(errors="surrogateescape"))


async def test_an_error_is_one_commands_own() -> None:
    """The commands before and after it get their replies."""
    async with scripted(echo) as server, commands(server) as link:
        one, bad, two = [link.send([call]) for call in (("ECHO", "1"), ("WRONG", "NOCHANNEL", "a b"), ("ECHO", "2"))]

        error = await fate(bad)

        assert isinstance(error, ErrorReply)
        assert str(error) == "NOCHANNEL a b"
        assert (await fate(one), await fate(two)) == (b"1", b"2")
        assert link.open


@pytest.mark.parametrize(
    "text",
    [
        "ERR Function not found",
        "MOVED 5718 192.0.2.1:1",
        "READONLY You can't write against a read only replica.",
        "LOADING Redis is loading the dataset in memory",
        "NOAUTH Authentication required.",
        "OOM command not allowed when used memory > 'maxmemory'.",
        "NOREPLICAS Not enough good replicas to write.",
    ],
)
async def test_an_error_is_told_in_the_servers_words(text: str) -> None:
    """With the code, which redis-py takes out of some; none of them ends the connection."""
    async with scripted(echo) as server, commands(server) as link:
        error = await fate(link.send([("WRONG", *text.split(" "))]))

        assert isinstance(error, ErrorReply)
        assert str(error) == text
        assert await fate(link.send([("ECHO", "1")])) == b"1"


async def test_a_command_that_cannot_be_sent_ends_the_link() -> None:
    """Whoever waits hears of it at once, and does not wait for a reply that cannot come."""
    async with scripted(echo) as server, commands(server) as link:
        good, bad = link.send([("SILENCE",)]), link.send([("ECHO", "\ud800")])

        errors = [await fate(good), await fate(bad)]

        assert [type(error) for error in errors] == [Lost, Lost]
        assert not link.open


async def test_a_cut_connection_fails_what_waits() -> None:
    """What has no reply may have been executed; what has one keeps it."""
    async with scripted(echo) as server, commands(server) as link:
        done, *lost = [link.send([call]) for call in (("ECHO", "1"), ("CUT",), ("ECHO", "2"))]

        errors = [await fate(batch) for batch in lost]

        assert await fate(done) == b"1"
        assert [(type(error), getattr(error, "sent", None)) for error in errors] == [(Lost, True), (Lost, True)]
        assert not link.open


async def test_after_the_end_nothing_is_sent() -> None:
    """A call that comes too late has certainly not been executed."""
    async with scripted(echo) as server, commands(server) as link:
        await fate(link.send([("CUT",)]))

        error = await fate(link.send([("ECHO", "late")]))

        assert isinstance(error, Lost)
        assert (str(error), error.sent) == ("the connection is closed", False)
        assert ("ECHO", "late") not in server.commands


async def test_where_nobody_listens() -> None:
    """Nothing was sent."""
    async with scripted() as server:
        pass
    link = Commands(connection(server))

    with pytest.raises(Lost) as caught:
        await link.connect()

    assert not caught.value.sent
    assert str(server.address.port) in str(caught.value)
    assert not link.open


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (lambda *words: ResponseError("WRONGPASS invalid username-password pair"), "it refuses user or password: "),
        (lambda *words: Deed.SILENCE, "it does not answer"),
        (lambda *words: Deed.CUT, "Connection closed by server"),
    ],
    ids=["refused", "silent", "cut"],
)
async def test_a_server_that_does_not_let_us_in(script: Any, reason: str) -> None:
    """The reason is told in a few words, and no connection is left open."""
    async with scripted(script) as server:
        link = Commands(dial(parse_servers(f"redis://me:secret@{server.address}"), server.address, 0.1))

        with pytest.raises(Lost) as caught:
            await link.connect()

    assert not caught.value.sent
    assert str(caught.value).startswith(reason)
    assert "secret" not in str(caught.value)


async def test_a_batch_keeps_the_replies_that_came_before_the_end() -> None:
    """What comes after the cut is lost, each command for itself."""
    async with scripted(echo) as server, commands(server) as link:
        batch = link.send([("ECHO", "1"), ("WRONG", "NOCHANNEL"), ("CUT",), ("ECHO", "2")])
        async with asyncio.timeout(PATIENCE_S):
            await batch.done

        assert batch.replies[0] == b"1"
        assert [type(reply) for reply in batch.replies[1:]] == [ErrorReply, Lost, Lost]


async def test_one_call_gives_its_reply_or_raises() -> None:
    async with scripted(echo) as server, commands(server) as link:
        assert await link.call(("ECHO", "1")) == b"1"
        with pytest.raises(ErrorReply, match="NOCHANNEL"):
            await link.call(("WRONG", "NOCHANNEL"))
        with pytest.raises(Lost):
            await link.call(("CUT",))


async def test_who_gave_up_waiting_disturbs_nobody() -> None:
    """The reply to a cancelled call is not given to the next one."""
    async with scripted(echo) as server, commands(server) as link:
        one, two = link.send([("ECHO", "1")]), link.send([("ECHO", "2")])
        one.done.cancel()

        assert await fate(two) == b"2"


async def test_who_gave_up_waiting_does_not_hinder_the_end() -> None:
    """A cut fails only those who still wait."""
    async with scripted(echo) as server, commands(server) as link:
        one, two = link.send([("SILENCE",)]), link.send([("SILENCE",)])
        one.done.cancel()
        await eventually(lambda: len(server.commands) == 2, "both are sent")
        server.cut()

        assert isinstance(await fate(two), Lost)


async def test_the_end_is_told_once() -> None:
    """Whatever ends a link first says why; the rest changes nothing."""
    async with scripted(echo) as server, recorded(server) as (link, recorder):
        link.end("enough")
        link.end("more than enough")
        server.cut()
        await link.close()
        await link.close()

        assert recorder.ends == ["enough"]
        assert not link.open


async def test_nothing_is_received_after_the_end() -> None:
    """Replies that were under way are not given to anybody."""
    async with scripted(echo) as server, recorded(server) as (link, recorder):
        link.send(("ECHO", "1"))
        await eventually(lambda: recorder.replies == [b"1"], "the first is there")
        link.end("enough")
        server.say("2")
        await asyncio.sleep(0.01)
        await link.close()

        assert recorder.replies == [b"1"]


async def test_a_reply_nobody_can_deal_with_ends_the_link() -> None:
    """Otherwise replies would go on being given to the wrong commands."""
    ends: list[str] = []

    def receive(reply: object) -> None:
        raise ValueError("strange")

    async with scripted(echo) as server:
        link = Link(connection(server), receive, ends.append)
        await link.connect()
        link.send(("ECHO", "1"))
        await eventually(lambda: ends != [], "it ends")
        await link.close()

    assert ends == ["a reply could not be dealt with"]


async def test_a_reply_nobody_asked_for_ends_the_link() -> None:
    """A server that says more than it was asked for cannot be followed any more."""
    async with scripted(echo) as server, commands(server) as link:
        assert await fate(link.send([("ECHO", "1")])) == b"1"
        server.say("2")
        await eventually(lambda: not link.open, "it ends")


async def test_what_is_not_redis_ends_the_link() -> None:
    """A server that speaks another protocol fails the call, which may have been executed."""
    async with scripted(lambda *words: b"HTTP/1.1 400 Bad Request\r\n\r\n") as server, commands(server) as link:
        error = await fate(link.send([("ECHO", "1")]))

        assert isinstance(error, Lost)
        assert error.sent


async def test_a_server_that_does_not_read_blocks_nobody_for_ever() -> None:
    """The link ends after the time-out of its connection, and says why."""
    async with scripted(echo) as server, recorded(server, patience=0.2) as (link, recorder):
        link.send(("STUPOR",))
        for _ in range(16):
            link.send(("ECHO", b"x" * 1_000_000))
        await eventually(lambda: recorder.ends != [], "it ends")

    assert recorder.ends == ["it does not answer"]


async def test_closing_does_not_wait_for_a_server_that_does_not_read() -> None:
    """Not even for the time-out."""
    async with scripted(echo) as server, recorded(server) as (link, recorder):
        link.send(("STUPOR",))
        for _ in range(16):
            link.send(("ECHO", b"x" * 1_000_000))
        await eventually(lambda: server.commands != [], "it is stuck")
        started = time.monotonic()
        await link.close()

        assert time.monotonic() - started < PATIENCE_S / 2
        assert recorder.ends == ["closed"]


class Torrent(Connection):
    """A connection that has more replies than anybody wants."""

    async def connect(self) -> None:
        self._reader = asyncio.StreamReader()
        self._reader.feed_data(b"+more\r\n" * 10_000)

    async def disconnect(self, *arguments: Any, **options: Any) -> None:
        pass


async def test_a_torrent_of_replies_lets_others_have_their_turn() -> None:
    """After some replies the event loop goes on with other work, be there more replies or not."""
    recorder = Recorder()
    link = Link(Torrent(), recorder.replies.append, recorder.ends.append)
    await link.connect()
    counts = []
    for _ in range(5):
        await asyncio.sleep(0)
        counts.append(len(recorder.replies))
    await link.close()

    assert counts == [REPLIES_PER_TURN * turn for turn in range(1, 6)]


async def test_retiring_waits_for_the_replies() -> None:
    """A connection that is replaced still brings what was asked on it."""
    async with scripted(echo) as server, commands(server) as link:
        calls = [link.send([("ECHO", str(number))]) for number in range(10)]

        await link.retire(PATIENCE_S)

        assert [call.replies[0] for call in calls] == [str(number).encode() for number in range(10)]
        assert not link.open


async def test_retiring_has_an_end() -> None:
    """A server that does not answer is waited for no longer than asked; its calls fail."""
    async with scripted(echo) as server, commands(server) as link:
        call = link.send([("SILENCE",)])

        await link.retire(0.05)

        error = await fate(call)
        assert isinstance(error, Lost)
        assert error.sent


async def test_retiring_an_idle_connection_is_closing_it() -> None:
    """There is nothing to wait for."""
    async with scripted(echo) as server, commands(server) as link:
        async with asyncio.timeout(PATIENCE_S / 2):
            await link.retire(PATIENCE_S)

        assert not link.open


async def test_cancelling_is_sure() -> None:
    """A task that swallows the first cancellation, as asyncio.wait_for may, is asked again."""
    cancelled = 0

    async def stubborn() -> None:
        nonlocal cancelled
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled += 1
                if cancelled == 2:
                    raise

    async def obedient() -> None:
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(obedient())]
    await asyncio.sleep(0)
    await cancel(*tasks)

    assert all(task.cancelled() for task in tasks)
    assert cancelled == 2


async def test_cancelling_what_is_done() -> None:
    """Nothing happens to what has ended already, well or badly."""

    async def bad() -> None:
        raise ValueError

    async def good() -> int:
        return 1

    one, two = asyncio.create_task(bad()), asyncio.create_task(good())
    await asyncio.wait([one, two])
    await cancel(one, two)
    await cancel()

    assert isinstance(one.exception(), ValueError)
    assert two.result() == 1


class Reset(Torrent):
    """A connection that is reset while it is made, as uvloop tells it."""

    async def connect(self) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


async def test_a_connection_that_is_reset_while_it_is_made() -> None:
    """Nothing was sent, whatever the event loop calls it."""
    with pytest.raises(Lost) as caught:
        await Commands(Reset()).connect()

    assert not caught.value.sent
