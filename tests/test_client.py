"""Both clients over HTTP, against real nodes and against servers that say odd things. What holds for both is here."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jwt
import pytest

from cluster import Cluster
from pushup import Client, HttpPublisher, Message, SyncClient, dialogue
from pushup.access import hash_key
from pushup.client import AsyncPerformer
from pushup.dialogue import parse_base
from pushup.errors import (
    ChannelExists,
    ChannelNotFound,
    Forbidden,
    InvalidParameter,
    NotFound,
    PushUpError,
    TokenExpired,
    Unauthorized,
    Unavailable,
)
from pushup.messages import MAX_ID
from tests.stub_server import CLIENTS, END, Answer, Either, answer, either, poll_answer, problem, stub
from tests.support import PATIENCE_S, connected, eventually, parked, running

KEY = "pushup_" + "k" * 43
SECRET = "s" * 32

both = pytest.mark.parametrize("make", CLIENTS)


def access(folder: Path) -> Path:
    """An access file: a key that may do everything, and tokens."""
    (folder / "secret").write_text(SECRET)
    file = folder / "access.toml"
    file.write_text(
        f'[realms.default]\n[[realms.default.keys]]\nname = "all"\nhash = "{hash_key(KEY)}"\n'
        'actions = ["publish", "manage", "subscribe"]\n'
        f'[realms.default.tokens]\nsecret_file = "{folder / "secret"}"\n[realms.shop]\nsubscribe = "open"\n'
        f'[[realms.shop.keys]]\nname = "all"\nhash = "{hash_key(KEY)}"\nactions = ["publish"]\n'
    )
    return file


def token(seconds: float = 60, channels: str = "a") -> str:
    return jwt.encode({"exp": time.time() + seconds, "pushup": {"subscribe": [channels]}}, SECRET, "HS256")


async def refusal(client: Either, name: str, *arguments: Any, **options: Any) -> PushUpError:
    with pytest.raises(PushUpError) as caught:
        await client.do(name, *arguments, **options)
    return caught.value


# Following


@both
async def test_messages_of_several_channels(make: Callable[..., Any]) -> None:
    """Each once, in the order of their ids, decoded, with those of its channels that were asked for."""
    async with running() as server, either(make, f"http://{server.address}") as client:
        channel = (await client.do("create")).channel
        ids = [
            await client.do("publish", ["a", channel], {"é": [1, None]}),
            await client.do("publish", "other", 2),
            await client.do("publish", ["other", "b c/d?&=+%"], "x"),
            await client.do("publish", channel, None),
        ]

        news = client.subscribe("a", "b c/d?&=+%", channel, "a", start=0)
        got = [await news.next() for _ in range(3)]

    assert got == [
        Message(ids[0], ("a", channel), {"é": [1, None]}),
        Message(ids[2], ("b c/d?&=+%",), "x"),
        Message(ids[3], (channel,), None),
    ]


@both
async def test_the_latest(make: Callable[..., Any]) -> None:
    """Messages from the first answer on; what is published before the next poll is among them."""
    seen: list[int] = []
    async with running() as server, either(make, f"http://{server.address}") as client:
        await client.do("publish", "a", 0)
        news = client.subscribe("a", on_cursor=seen.append)
        waiting = asyncio.create_task(news.next())
        await parked(server, 1)
        await client.do("publish", "a", 1)
        first = await waiting
        await client.do("publish", "a", 2)

        assert [first.data, *await news.data(1)] == [1, 2]
        assert seen[0] <= first.id < seen[1] == first.id + 1 < news.it.cursor


@both
async def test_a_poll_that_waits_has_a_cursor(make: Callable[..., Any]) -> None:
    """The latest is asked for without waiting, so that a poll that is lost passes nothing over."""
    async with (
        stub(poll_answer(next=5), Answer(b"", cut=True), poll_answer(6, next=7)) as server,
        either(make, server.url) as client,
    ):
        assert (await client.subscribe("a").next()).id == 6

    assert [asked.target for asked in server.asked] == [
        "/poll?channel=a&start=latest&timeout=0",
        "/poll?channel=a&start=5&timeout=25",
        "/poll?channel=a&start=5&timeout=25",
    ]


@both
async def test_the_order_in_which_things_are_told(make: Callable[..., Any]) -> None:
    """A gap before the messages that follow, a cursor when the consumer came back, a closing behind the messages."""
    said: list[Any] = []
    answers = [
        poll_answer(10, 11, next=15, gap=True),
        poll_answer(next=15, closed=["a", 17]),
        poll_answer(20, next=21),
    ]
    async with stub(*answers) as server, either(make, server.url) as client:
        news = client.subscribe(
            "a",
            17,
            start=3,
            on_gap=lambda next: said.append(("gap", next)),
            on_closed=lambda channels: said.append(("closed", channels)),
            on_cursor=lambda cursor: said.append(("cursor", cursor)),
        )
        for _ in range(3):
            said.append((await news.next()).id)
            assert news.it.cursor == said[-1] + 1

    assert said == [("gap", 15), 10, ("cursor", 11), 11, ("cursor", 15), ("closed", ("a", 17)), 20]
    assert server.starts == ["3", "15", "15"]
    assert "channel=a&channel=17&" in server.asked[1].target
    assert "channel=a&start" in server.asked[2].target, "an integer channel that was closed never comes back"


@both
async def test_going_on_behind_the_last_message(make: Callable[..., Any]) -> None:
    """Another subscription with the cursor of one that was left begins with the next message."""
    async with running() as server, either(make, f"http://{server.address}") as client:
        for number in range(5):
            await client.do("publish", "a", number)
        news = client.subscribe("a", start=0)
        assert await news.data(2) == [0, 1]
        await news.close()
        assert await news.next() == END

        assert await client.subscribe("a", start=news.it.cursor).data(3) == [2, 3, 4]


@both
async def test_after_a_crash_the_last_message_comes_again(make: Callable[..., Any]) -> None:
    """The cursor that was told is that of the message before, until the consumer has come back for more."""
    told: list[int] = []
    async with running() as server, either(make, f"http://{server.address}") as client:
        for number in range(3):
            await client.do("publish", "a", number)
        assert await client.subscribe("a", start=0, on_cursor=told.append).data(2) == [0, 1]

        assert await client.subscribe("a", start=told[-1]).data(2) == [1, 2]


@both
async def test_a_gap(make: Callable[..., Any]) -> None:
    """Whoever comes back for messages that are gone is told so, before the first that is there."""
    said: list[Any] = []
    async with running(channel_max_messages=2) as server, either(make, f"http://{server.address}") as client:
        start = await client.do("publish", "a", 0)
        for number in range(1, 5):
            await client.do("publish", "a", number)
        news = client.subscribe("a", start=start, on_gap=lambda _: said.append("gap"))
        said += await news.data(2)

    assert said == ["gap", 3, 4]


@both
async def test_an_integer_channel_that_closes_ends_the_iteration(make: Callable[..., Any]) -> None:
    """It never comes back; a named one stays subscribed, and may."""
    closed: list[Any] = []
    async with running() as server, either(make, f"http://{server.address}") as client:
        channel = (await client.do("create")).channel
        await client.do("publish", "a", 0)
        ending, staying = (client.subscribe(name, on_closed=closed.append) for name in (channel, "a"))
        waiting = [asyncio.create_task(news.next()) for news in (ending, staying)]
        await parked(server, 2)

        await client.do("close_channel", channel)
        assert await waiting[0] == END
        await client.do("close_channel", "a")
        await eventually(lambda: len(closed) == 2, "both were told")
        await parked(server, 1)
        await client.do("publish", "a", "anew")

        assert (await waiting[1]).data == "anew"
        assert closed == [(channel,), ("a",)]


@both
async def test_long_lists_go_into_a_body(make: Callable[..., Any]) -> None:
    """Where they would be too long for a URL on its way."""
    names = [f"channel-{number}-{'x' * 60}" for number in range(100)]
    async with running() as server, either(make, f"http://{server.address}") as client:
        await client.do("publish", names[99], 1)
        assert await client.subscribe(*names, start=0).data(1) == [1]
    async with stub(poll_answer(1, next=2)) as server_, either(make, server_.url) as client:
        await client.subscribe(*names, start=0).next()
    (asked,) = server_.asked
    assert (asked.method, asked.target) == ("POST", "/poll")
    assert asked.json == {"channels": names, "start": 0, "timeout": 25.0}


# Trouble

HTML = answer(b"<html><h1>502 Bad Gateway</h1></html>", "502 Bad Gateway", "text/html")
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ODD = {
    "nothing": Answer(b"", cut=True),
    "no HTTP": Answer(b"hello\r\n\r\n", cut=True),
    "half a head": Answer(b"HTTP/1.1 200 OK\r\nContent-", cut=True),
    "half a body": Answer(b'HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{"messages":[]', cut=True),
    "half a body without a length": Answer(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"messages":[]', cut=True),
    "half a chunk": Answer(CHUNKED + b"50\r\n{", cut=True),
    "no chunk": Answer(CHUNKED + b"zz\r\n{", cut=True),
    "a length that is none": Answer(b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n", cut=True),
    "a page of a proxy": HTML,
    "a gateway's time-out": answer(b"", "504 Gateway Timeout", "text/html"),
    "a fault": problem(500, "internal_error"),
    "a page with 200": answer(b"<html>Sign in to the Wi-Fi</html>", kind="text/html"),
    "another JSON": answer([1]),
    "no cursor": answer({"messages": [], "gap": False}),
    "a cursor that is no number": answer({"messages": [], "next": "5", "gap": False}),
    "nesting without an end": answer(b"[" * 200_000),
    "no UTF-8": answer(b'{"messages":[{"id":7,"channels":["a"],"data":"\xff"}],"next":8,"gap":false}'),
    "no content": Answer(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "messages that were here": poll_answer(3, 4, next=5),
    "messages out of order": poll_answer(9, 8, next=10),
    "a message twice": poll_answer(9, 9, next=10),
    "a cursor before its messages": poll_answer(9, next=9),
    "a cursor that goes back": poll_answer(next=4),
    "a cursor beyond all ids": poll_answer(next=MAX_ID + 2),
    "a problem without a code": answer({"detail": "x"}, "503 T", "application/problem+json"),
    "a problem that is no JSON": answer(b"{", "503 T", "application/problem+json"),
}


@both
@pytest.mark.parametrize("odd", ODD)
async def test_odd_answers(make: Callable[..., Any], odd: str) -> None:
    """They are asked again after a pause, from the same cursor."""
    async with (
        stub(poll_answer(4, next=5), ODD[odd], poll_answer(7, next=8)) as server,
        either(make, server.url) as client,
    ):
        assert await client.subscribe("a", start=1).data(2) == [4, 7]

        assert client.slept == [0.25]
    assert server.starts == ["1", "5", "5"]


@both
async def test_pauses_grow_and_begin_anew(make: Callable[..., Any]) -> None:
    """Half of 0.5, 1, 2, ... 30 s here, where chance always says a half; short again after an answer."""
    cut = Answer(b"", cut=True)
    async with (
        stub(*[cut] * 9, poll_answer(1, next=2), cut, poll_answer(2, next=3)) as server,
        either(make, server.url) as client,
    ):
        assert await client.subscribe("a", start=0).data(2) == [1, 2]
        assert client.slept == [0.25, 0.5, 1, 2, 4, 8, 15, 15, 15, 0.25]
    assert server.connections >= 11


@both
@pytest.mark.parametrize(
    ("refused", "pause"),
    [
        (problem(503, "unavailable", "Retry-After: 7\r\n", retry_after=7), 7.25),
        (problem(429, "too_many_polls", retry_after=3), 3.25),
        (answer(b"slow down", "429 Too Many Requests", "text/plain", "Retry-After: 2\r\n"), 2.25),
        (
            answer(
                b"",
                "503 Service Unavailable",
                headers="Date: Tue, 24 Nov 2026 10:00:00 GMT\r\nRetry-After: Tue, 24 Nov 2026 10:00:09 GMT\r\n",
            ),
            9.25,
        ),
        (answer(b"", "503 Service Unavailable", headers="Retry-After: Tue, 24 Nov 2026 10:00:09 GMT\r\n"), 0.25),
        (answer(b"", "503 Service Unavailable", headers="Retry-After: soon\r\n"), 0.25),
        (answer(b"", "503 Service Unavailable", headers="Retry-After: 999999999999\r\n"), 300.25),
    ],
)
async def test_retry_after(make: Callable[..., Any], refused: Answer, pause: float) -> None:
    """What a server asks for is waited, five minutes at most, and a bit more, so that clients come one by one."""
    async with stub(refused, poll_answer(1, next=2)) as server, either(make, server.url) as client:
        assert await client.subscribe("a", start=0).data(1) == [1]
        assert client.slept == [pause]


@both
async def test_a_server_that_is_not_there_yet(make: Callable[..., Any]) -> None:
    """Is tried until it is."""
    async with stub() as gone:
        url = gone.url
    async with either(make, url) as client:
        waiting = asyncio.create_task(client.subscribe("a", start=0).next())
        await eventually(lambda: len(client.slept) > 2, "it tried")
        async with running(listen=url.removeprefix("http://")) as server, connected(server) as publishing:
            id = await publishing.publish("a")
            assert (await waiting).id == id


@both
@pytest.mark.parametrize(
    ("refused", "kind", "detail"),
    [
        (problem(400, "invalid_parameter", parameter="start"), InvalidParameter, "it is invalid_parameter"),
        (problem(401, "unauthorized"), Unauthorized, "it is unauthorized"),
        (problem(403, "forbidden"), Forbidden, "it is forbidden"),
        (problem(404, "channel_not_found", channel=17), ChannelNotFound, "it is channel_not_found"),
        (problem(418, "teapot", pot="blue"), PushUpError, "it is teapot"),
        (
            answer(b"no", "404 Not Found", "text/html"),
            NotFound,
            "something that is not PushUp answered with the status 404",
        ),
        (answer(b"no", "410 Gone"), PushUpError, "something that is not PushUp answered with the status 410"),
    ],
)
async def test_what_is_wrong_with_the_request_is_raised(
    make: Callable[..., Any], refused: Answer, kind: type[PushUpError], detail: str
) -> None:
    """As the error that the problem document shows, with its members; afterwards the iteration is over."""
    async with stub(refused) as server, either(make, server.url) as client:
        news = client.subscribe("a", start=0)
        with pytest.raises(PushUpError) as caught:
            await news.next()
        assert await news.next() == END

    assert type(caught.value) is kind
    assert str(caught.value) == caught.value.detail == detail
    if b"teapot" in refused.data:
        assert {**caught.value.problem(), "title": ""} == {
            "type": "about:blank",
            "title": "",
            "status": 418,
            "code": "teapot",
            "detail": "it is teapot",
            "pot": "blue",
        }


@both
async def test_redirects_are_refused(make: Callable[..., Any]) -> None:
    """A token must not go where a redirect says."""
    there = "HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/poll\r\nContent-Length: 0\r\n\r\n"
    async with stub(Answer(there.encode())) as server, either(make, server.url, token="t") as client:
        with pytest.raises(PushUpError, match=r"redirects to http://elsewhere\.example/poll, which is not followed"):
            await client.subscribe("a", start=0).next()
    assert len(server.asked) == 1


@both
async def test_a_poll_that_stays_silent_is_given_up(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time-out and some patience; then it is sent again, on another connection."""
    monkeypatch.setattr(dialogue, "SILENCE_S", 0.1)
    async with stub() as server, either(make, server.url, poll_timeout=0.1) as client:
        waiting = asyncio.create_task(client.subscribe("a", start=5).next())
        await eventually(lambda: len(client.slept) == 1, "it was given up")
        server.answers.append(poll_answer(6, next=7))
        await waiting
    assert set(server.starts) == {"5"}
    assert server.connections >= 2


@both
async def test_answers_that_come_at_once_for_ever(make: Callable[..., Any]) -> None:
    """One is what a node does that drains; more in a row are slowed down."""
    async with stub(*[poll_answer(next=5)] * 5, poll_answer(5, next=6)) as server, either(make, server.url) as client:
        assert await client.subscribe("a", start=5).data(1) == [5]
        assert client.slept == [0.25, 0.5, 1, 2]


@both
async def test_a_node_that_drains(make: Callable[..., Any]) -> None:
    """Its answer ends the connection, and the next poll goes out at once, on another."""
    ending = json.loads(poll_answer(next=5).data.partition(b"\r\n\r\n")[2])
    async with (
        stub(answer(ending, headers="Connection: close\r\n"), poll_answer(5, next=6)) as server,
        either(make, server.url) as client,
    ):
        assert await client.subscribe("a", start=5).data(1) == [5]
        assert client.slept == []
    assert server.connections == 2


@both
async def test_connections_are_kept(make: Callable[..., Any]) -> None:
    """Poll after poll goes over one, and calls in between as well."""
    async with running() as server, either(make, f"http://{server.address}") as client:
        news = client.subscribe("a", start=0)
        for number in range(5):
            await client.do("publish", "a", number)
            assert await news.data(1) == [number]
        assert server.metrics.connections_opened == 1


@both
async def test_a_connection_that_the_server_closed_meanwhile(make: Callable[..., Any]) -> None:
    """Is not used again, so a publication without a key meets no doubt."""
    async with running(keepalive_timeout=0.1) as server, either(make, f"http://{server.address}") as client:
        await client.do("publish", "a", 1)
        await eventually(lambda: server.metrics.connections_closed == 1, "the node closed it")
        await client.do("publish", "a", 2)
        assert server.metrics.connections_opened == 2


# Who may


@both
async def test_a_token_that_expires(tmp_path: Path, make: Callable[..., Any]) -> None:
    """Also while a poll waits: another one is asked for, and it goes on with the cursor that it has."""
    given = [token(1.2), token(60)]
    async with running(access=access(tmp_path)) as server:
        url = f"http://{server.address}"
        async with either(make, url, token=lambda: given.pop(0)) as client, either(Client, url, token=KEY) as backend:
            news = client.subscribe("a")
            waiting = asyncio.create_task(news.next())
            await parked(server, 1)
            assert len(given) == 1
            await eventually(lambda: not given, "the token was replaced")
            await backend.do("publish", "a", 1)
            assert (await waiting).data == 1
        assert client.slept == []


@both
async def test_a_token_is_asked_for_once(make: Callable[..., Any]) -> None:
    """And again when it has expired; all requests show it."""
    asked: list[str] = []

    def get() -> str:
        asked.append(f"t{len(asked)}")
        return asked[-1]

    expired = problem(401, "token_expired")
    answers = [poll_answer(next=1), expired, poll_answer(1, next=2), answer({"id": 5}, "201 Created")]
    async with stub(*answers) as server, either(make, server.url, token=get) as client:
        await client.subscribe("a").next()
        await client.do("publish", "a", 1)

    assert [one.headers["authorization"] for one in server.asked] == [
        "Bearer t0",
        "Bearer t0",
        "Bearer t1",
        "Bearer t1",
    ]
    assert [one.start for one in server.asked[:3]] == ["latest", "1", "1"]
    assert asked == ["t0", "t1"]


@both
@pytest.mark.parametrize(("tokens", "tries"), [("fixed", 1), (["same", "same"], 1), (["t0", "t1", "t2"], 2)])
async def test_a_new_token_that_has_expired_too(make: Callable[..., Any], tokens: Any, tries: int) -> None:
    """Is the end: there is none to be had."""
    get = tokens if isinstance(tokens, str) else iter(tokens).__next__
    async with stub(*[problem(401, "token_expired")] * 3) as server, either(make, server.url, token=get) as client:
        with pytest.raises(TokenExpired):
            await client.subscribe("a").next()
    assert len(server.asked) == tries


@both
async def test_a_function_that_fails_to_get_a_token(make: Callable[..., Any]) -> None:
    """Its exception comes out, and the iteration may go on."""
    given: list[Any] = [LookupError("no session"), "t"]

    def get() -> str:
        one = given.pop(0)
        if isinstance(one, Exception):
            raise one
        return str(one)

    async with stub(poll_answer(1, next=2)) as server, either(make, server.url, token=get) as client:
        news = client.subscribe("a", start=0)
        with pytest.raises(LookupError, match="no session"):
            await news.next()
        assert (await news.next()).id == 1


@both
async def test_a_token_for_other_channels(tmp_path: Path, make: Callable[..., Any]) -> None:
    """Forbidden, with the channel; without any it is Unauthorized."""
    async with running(access=access(tmp_path)) as server:
        url = f"http://{server.address}"
        async with either(make, url, token=token()) as client, either(make, url) as stranger:
            with pytest.raises(Forbidden) as caught:
                await client.subscribe("b").next()
            with pytest.raises(Unauthorized):
                await stranger.subscribe("a").next()
    assert caught.value.members["channel"] == "b"


@both
async def test_another_realm(tmp_path: Path, make: Callable[..., Any]) -> None:
    """Its paths have a prefix; the URL may have one, too."""
    async with (
        running(access=access(tmp_path)) as server,
        either(make, f"http://{server.address}/", realm="shop", token=KEY) as client,
    ):
        id = await client.do("publish", "a", 1)
        assert (await client.subscribe("a", start=0).next()).id == id
    assert parse_base("https://push.example.com/here/", "sh/op").url == "https://push.example.com/here/realms/sh%2Fop"


@both
@pytest.mark.parametrize("wrong", ["", "a b", "a\r\nX-Evil: 1", "é"])
async def test_a_token_that_cannot_be_sent(make: Callable[..., Any], wrong: str) -> None:
    """Is refused here, and never becomes a header field."""
    async with stub() as server, either(make, server.url, token=wrong) as client:
        with pytest.raises(InvalidParameter, match="printable ASCII"):
            await client.subscribe("a").next()
    assert server.asked == []


# What is wrong is said at once


@pytest.mark.parametrize("make", CLIENTS)
@pytest.mark.parametrize(
    "url",
    ["", "localhost:8080", "redis://localhost", "http://", "http://a:b@c", "http://a?b", "http://a#b", "http://a:x"],
)
def test_wrong_urls(make: Callable[..., Any], url: str) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidParameter, match="the URL"):
        make(url)


@both
@pytest.mark.parametrize(
    ("channels", "start"),
    [((), 0), (("",), 0), ((True,), 0), ((None,), 0), ((-1,), 0), (("a",), -1), (("a",), "now"), (("a",), True)],
)
async def test_wrong_subscriptions(make: Callable[..., Any], channels: Any, start: Any) -> None:
    """Where it is made, not where it is waited for."""
    async with either(make, "http://127.0.0.1:1") as client:
        with pytest.raises(InvalidParameter):
            client.subscribe(*channels, start=start)


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("http://LOCALHOST", "http://localhost"),
        ("http://localhost:80/", "http://localhost"),
        ("https://localhost:80/", "https://localhost:80"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("https://[::1]:443/a b/", "https://[::1]/a%20b"),
    ],
)
def test_urls(url: str, whole: str) -> None:
    """Whatever stands before a request's target."""
    assert parse_base(url, None).url == whole


# Calls


@both
async def test_channels(make: Callable[..., Any]) -> None:
    """Created, described, renewed, listed and closed."""
    async with running() as server, either(make, f"http://{server.address}") as client:
        made = await client.do("create", "a/b ?", ttl=60, window=10, max_messages=5)
        integer = await client.do("create")
        taken = await refusal(client, "create", "a/b ?")
        id = await client.do("publish", "a/b ?", 1)

        described = await client.do("describe", "a/b ?")
        renewed = await client.do("renew", integer.channel, ttl=7)
        listed = await client.channels()
        await client.do("close_channel", "a/b ?")
        gone = [await refusal(client, name, "a/b ?") for name in ("describe", "renew", "close_channel")]

    assert (made.channel, made.ttl, made.window, made.max_messages) == ("a/b ?", 60, 10, 5)
    assert isinstance(integer.channel, int)
    assert isinstance(taken, ChannelExists)
    assert (described.messages, described.first, described.last) == (1, id, id)
    assert (renewed.ttl, renewed.expires > integer.created) == (7, True)
    assert {channel.channel for channel in listed} == {"a/b ?", integer.channel}
    assert [type(error) for error in gone] == [ChannelNotFound] * 3


@both
async def test_more_channels_than_one_page(make: Callable[..., Any]) -> None:
    """All of them, one page after the other."""
    facts = {"created": 1, "expires": 2, "ttl": 1, "window": 1, "max_messages": 1, "messages": 0, "first": None}
    pages = [
        answer({"channels": [{"channel": name, "last": None, **facts}], "next": next})
        for name, next in (("a", "a&b"), ("c", None))
    ]
    async with stub(*pages) as server, either(make, server.url) as client:
        assert [channel.channel for channel in await client.channels()] == ["a", "c"]
    assert [asked.target for asked in server.asked] == [
        "/channels?after=&limit=1000",
        "/channels?after=a%26b&limit=1000",
    ]


@both
async def test_closing_is_repeated(make: Callable[..., Any]) -> None:
    """If its answer was lost; that the channel is gone then is as it should be."""
    async with stub(HTML, problem(404, "channel_not_found", channel="a")) as server, either(make, server.url) as client:
        await client.do("close_channel", "a")
    assert len(server.asked) == 2


@both
async def test_creating_is_not_repeated(make: Callable[..., Any]) -> None:
    """Once the server may have done it, as there would be another channel; before that it is."""
    async with (
        stub(problem(429, "too_many", retry_after=0), Answer(b"", cut=True)) as server,
        either(make, server.url) as client,
    ):
        error = await refusal(client, "create")
    assert isinstance(error, Unavailable)
    assert error.detail.endswith(", so this may have been done or not")
    assert len(server.asked) == 2


@both
async def test_time_is_up(make: Callable[..., Any]) -> None:
    """A call ends when its time does, with what was wrong the last time."""
    now = [0.0]
    async with stub() as gone:
        url = gone.url

    def clock() -> float:
        now[0] += 0.5
        return now[0]

    async with either(make, url, timeout=5, clock=clock) as client:
        error = await refusal(client, "describe", "a")
    assert isinstance(error, Unavailable)
    assert error.detail.startswith(f"cannot reach {url}: ")
    assert 2 <= len(client.slept) < 10


# The asynchronous client alone


async def test_waiting_may_be_cancelled() -> None:
    """By a time-out, say: the iteration goes on later, and nothing is lost."""
    async with running() as server, Client(f"http://{server.address}") as client:
        news = client.subscribe("a")
        for number in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await anext(news)
            await client.publish("a", number)
            assert (await anext(news)).data == number


@pytest.mark.parametrize("close", ["subscription", "client"])
async def test_closing_ends_a_task_that_waits(close: str) -> None:
    """At once, like the end of any iteration; no task and no poll are left."""
    async with running() as server, Client(f"http://{server.address}") as client:
        news = client.subscribe("a")

        async def follow() -> str:
            async for _ in news:
                ...
            return END

        following = asyncio.create_task(follow())
        await parked(server, 1)
        await (news.aclose() if close == "subscription" else client.close())
        async with asyncio.timeout(1):
            assert await following == END
        await parked(server, 0)


async def test_closing_after_a_wait_that_was_cancelled() -> None:
    """Nothing of it is sent again."""
    async with stub() as server, Client(server.url) as client:
        news = client.subscribe("a", start=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await anext(news)
        await news.aclose()
        assert await anext(news, END) == END
    assert server.starts == ["1"]


async def test_one_task_waits_at_a_time() -> None:
    """A second one is told."""
    async with running() as server, Client(f"http://{server.address}") as client:
        news = client.subscribe("a")
        first = asyncio.create_task(anext(news))
        await parked(server, 1)
        with pytest.raises(RuntimeError, match="another task waits"):
            await anext(news)
        await news.aclose()
        with pytest.raises(StopAsyncIteration):
            await first


async def test_a_subscription_that_is_dropped() -> None:
    """Needs no goodbye: it does nothing between two messages."""
    async with running() as server, Client(f"http://{server.address}") as client:
        await client.publish("a", 1)
        async for message in client.subscribe("a", start=0):
            assert message.data == 1
            break
        assert server.node.parked == 0


async def test_two_hundred_subscriptions_wait_at_once() -> None:
    """They share a client, and each has a connection."""
    async with running() as server, Client(f"http://{server.address}") as client:
        tasks = [asyncio.create_task(anext(client.subscribe("a"))) for _ in range(200)]
        await parked(server, 200)
        await client.publish("a", "hello")
        assert {message.data for message in await asyncio.gather(*tasks)} == {"hello"}


async def test_callbacks_and_tokens_may_be_asynchronous() -> None:
    """They are awaited."""
    said: list[Any] = []

    async def get() -> str:
        await asyncio.sleep(0)
        return "t"

    async def tell(cursor: int) -> None:
        await asyncio.sleep(0)
        said.append(cursor)

    async with (
        stub(poll_answer(3, next=4, gap=True), poll_answer(5, next=6)) as server,
        Client(server.url, token=get) as client,
    ):
        news = client.subscribe("a", start=0, on_gap=tell, on_cursor=tell)
        assert [(await anext(news)).id for _ in range(2)] == [3, 5]
    assert said == [4, 4]
    assert server.asked[0].headers["authorization"] == "Bearer t"


async def test_tasks_share_a_new_token() -> None:
    """Of several that were refused one asks, and the others take what it got."""
    asked: list[str] = []

    async def get() -> str:
        asked.append(f"t{len(asked)}")
        await asyncio.sleep(0.01)
        return asked[-1]

    performer = AsyncPerformer(parse_base("http://x", None), get, None)
    ask = dialogue.AskToken
    first = await asyncio.gather(*(performer.perform(ask(None)) for _ in range(3)))
    second = await asyncio.gather(*(performer.perform(ask("t0")) for _ in range(3)))

    assert (first, second) == (["t0"] * 3, ["t1"] * 3)


async def test_a_closed_client() -> None:
    """Says so."""
    client = Client("http://127.0.0.1:1")
    await client.close()
    with pytest.raises(PushUpError, match="the client is closed"):
        await client.publish("a", 1)


# Through HAProxy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes."""
    cluster = Cluster.up(tmp_path_factory.mktemp("cluster") / "state", nodes=2, settings={"drain_window": "0.5"})
    yield cluster
    cluster.down()


class Reader:
    """Follows a channel with a client of its own, and writes down what it is told."""

    def __init__(self, make: Callable[..., Any], address: str, channel: str) -> None:
        self.client: Any = None
        self.got: list[Any] = []
        self._make = make
        self._address = address
        self._channel = channel

    async def run(self) -> None:
        """Until the message that says so."""
        self.client = client = self._make(f"http://{self._address}", poll_timeout=5)
        news = client.subscribe(self._channel, start=0, on_gap=lambda _: self.got.append("gap"))
        if self._make is Client:
            async with client:
                await self._follow(aiter(news))
        else:
            with client:
                await asyncio.to_thread(self._block, news)

    async def _follow(self, news: Any) -> None:
        async for message in news:
            self.got.append(message.data)
            if message.data == "end":
                break

    def _block(self, news: Any) -> None:
        for message in news:
            self.got.append(message.data)
            if message.data == "end":
                break


def holding(cluster: Cluster, names: Sequence[str]) -> dict[str, int]:
    """How many polls each of these nodes holds."""
    rows = {row["name"]: row for row in cluster.status()["processes"]}
    return {name: rows[name]["parked"] or 0 for name in names}


async def test_a_killed_node_goes_unnoticed(cluster: Cluster) -> None:
    """The one that holds the poll, with a publisher that goes on: nothing is missed, doubled or out of order."""
    readers = [
        Reader(make, address, "a") for make in CLIENTS for address in (cluster.public, cluster.tcp) for _ in range(2)
    ]
    tasks = [asyncio.create_task(reader.run()) for reader in readers]
    sent = 0
    publisher = HttpPublisher(f"http://{cluster.tcp}", retry=True, timeout=PATIENCE_S)

    async def publish(count: int) -> None:
        nonlocal sent
        for _ in range(count):
            await asyncio.to_thread(publisher.publish, "a", sent)
            sent += 1

    async def read() -> None:
        await eventually(lambda: all(len(reader.got) == sent for reader in readers), "everybody has everything")

    try:
        for _ in range(2):
            await publish(5)
            await read()
            names = [node.name for node in cluster.nodes]
            async with asyncio.timeout(PATIENCE_S):
                while sum((held := await asyncio.to_thread(holding, cluster, names)).values()) < len(readers):
                    await asyncio.sleep(0.1)
            victim = max(names, key=lambda name: held[name])
            assert held[victim] > 0
            cluster.kill(victim)
            await publish(20)
            await read()
            await asyncio.to_thread(cluster.scale, 2)
        await asyncio.to_thread(publisher.publish, "a", "end")
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*tasks)
    finally:
        publisher.close()
        for reader, task in zip(readers, tasks, strict=True):
            if isinstance(reader.client, SyncClient):
                reader.client.close()  # A thread cannot be cancelled, but ends with its poll.
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert [reader.got for reader in readers] == [[*range(sent), "end"]] * len(readers)
