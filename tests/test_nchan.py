"""Nchan's subscriber protocol on the wire, byte by byte, and what PushUp's own rules make of it."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import jwt
import pytest

from pushup.errors import InvalidParameter, TooLarge
from pushup.messages import LATEST, SECOND, Answer, Message, Publication
from pushup.nchan import META, Events, find_id, parse_id, parse_wanted, show_answer, show_data, show_frame, takes_parts
from pushup.server import Server
from pushup.settings import Settings
from tests.support import PATIENCE_S, Client, Reply, connected, eventually, parked, running

C: Final = 1795434016123456
Socket = aiohttp.ClientWebSocketResponse


def mounted(**flags: Any) -> Any:
    return running(nchan="/sub", poll_jitter=0, **flags)


async def publish(server: Server, channel: str, *data: bytes) -> list[int]:
    """The ids of these publications."""
    return [(await server.node.publish(Publication((channel,), text))).id for text in data]


async def get(client: Client, target: str, **headers: str) -> Reply:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return await client.request("GET", target, headers=lines)


def parts(reply: Reply) -> list[tuple[str, str]]:
    """Type and text of each part, read by Nchan's client's own rules."""
    boundary = re.fullmatch(r"multipart/mixed;\s+boundary=(.*)", reply.headers["content-type"])
    assert boundary is not None
    first, *middle, last = reply.body.decode().split(f"--{boundary[1]}")
    assert (first, last) == ("", "--\n")
    found = []
    for part in middle:
        match = re.search(r"^(.*)\r?\n\r?\n([\s\S]*)\r?\n$", part, re.MULTILINE)
        assert match is not None
        found.append((match[1].removeprefix("Content-Type: "), match[2]))
    return found


# What a subscriber asks for


@pytest.mark.parametrize(
    ("segments", "query", "channels"),
    [
        (["a"], "", ("a",)),
        (["a", "b"], "", ("a", "b")),
        (["a,b"], "", ("a", "b")),
        (["a%2Cb%2Fc", "d%20e"], "", ("a,b/c", "d e")),
        ([], "id=a", ("a",)),
        ([], "id=a,b&id=c+d", ("a", "b", "c d")),
        (["a"], "id=b,a&token=t", ("a", "b")),
        (["1795434016123456"], "", ("1795434016123456",)),
    ],
)
def test_channels(segments: list[str], query: str, channels: tuple[str, ...]) -> None:
    """In the path, separated by slashes or commas, or as id; each once."""
    assert parse_wanted(segments, query, {}, Settings()) == (channels, 0)


@pytest.mark.parametrize(
    ("segments", "query", "sentence"),
    [
        ([], "", "a subscriber names at least one channel, in the path or as id"),
        ([""], "", "a channel's name is not empty, '.' or '..'"),
        (["a,"], "", "a channel's name is not empty, '.' or '..'"),
        (["%zz"], "", "%zz in the path is not a percent-encoded byte"),
        (["a"], "chanel=b", "'chanel' is not a parameter of a subscriber"),
        (["a"], "start=soon", "a message id is the 16 digits of a cursor"),
        (["a"], "last_event_id=17954340161234567", "a message id is the 16 digits of a cursor"),
    ],
)
def test_what_makes_no_sense(segments: list[str], query: str, sentence: str) -> None:
    """A sentence says so."""
    with pytest.raises(Exception, match=re.escape(sentence)):
        parse_wanted(segments, query, {}, Settings())


def test_as_many_channels_as_a_poll_may_have() -> None:
    """And not more."""
    settings = Settings(poll_channels_max=2)
    assert parse_wanted(["a,b"], "", {}, settings).channels == ("a", "b")
    with pytest.raises(TooLarge):
        parse_wanted(["a,b,c"], "", {}, settings)


@pytest.mark.parametrize(("text", "start"), [("", 0), ("start=latest", LATEST), ("start=0", 0), (f"start={C}", C)])
def test_who_has_no_message_id(text: str, start: int) -> None:
    """Gets what is cached, as with Nchan, unless the URL says otherwise."""
    assert parse_wanted(["a"], text, {}, Settings()).start == start


def test_an_id_in_the_url_is_decoded() -> None:
    """The client encodes it, and one of Nchan's own has a colon."""
    assert parse_wanted(["a"], "last_event_id=1795434016%3A0%2C%5B1%5D", {}, Settings()).start == 1795434016 * SECOND


def test_a_message_id_wins_over_where_to_begin() -> None:
    """The URL stays the same for ever."""
    assert parse_wanted(["a"], f"start=latest&last_event_id={C}", {}, Settings()).start == C


@pytest.mark.parametrize(
    ("headers", "query", "found"),
    [
        ({}, "", None),
        ({"If-None-Match": f"{C + 4}", "Etag": f"{C + 3}"}, f"{C + 1}", C + 4),
        ({"Etag": f"{C + 3}", "Last-Event-ID": f"{C + 2}"}, f"{C + 1}", C + 3),
        ({"Last-Event-ID": f"{C + 2}"}, f"{C + 1}", C + 2),
        ({"Last-Event-ID": ""}, f"{C + 1}", C + 1),
        ({"If-None-Match": f'"{C}"'}, "", C),
        ({"If-None-Match": f'W/"{C}"'}, "", C),
        ({"If-None-Match": f"{C}", "If-Modified-Since": "Mon, 23 Nov 2026 10:20:16 GMT"}, "", C),
        ({"If-None-Match": "0", "If-Modified-Since": "Mon, 23 Nov 2026 10:20:16 GMT"}, "", 1795429216 * SECOND),
        ({"If-None-Match": "0,[1]", "If-Modified-Since": "Mon, 23 Nov 2026 10:20:16 GMT"}, "", 1795429216 * SECOND),
        ({"Etag": "1795434016:0"}, "", 1795434016 * SECOND),
        ({}, "1795434016:0,[1],-", 1795434016 * SECOND),
    ],
)
def test_the_newest_of_several_message_ids_counts(headers: Mapping[str, str], query: str, found: int | None) -> None:
    """By where it stands; one that a page still has of Nchan itself is taken for its second."""
    assert find_id(headers, query) == found


@pytest.mark.parametrize("text", ["0", "null", "*", "-1", "9" * 16, "1" * 17, "1795434016", "12345678901:0", "٣" * 16])
def test_what_is_no_message_id(text: str) -> None:
    """A cursor has 16 digits."""
    with pytest.raises(InvalidParameter, match="16 digits"):
        parse_id(text)


@pytest.mark.parametrize(
    ("headers", "last"),
    [
        ({}, "9999999999:0"),
        ({"Etag": "9007199255:0"}, ""),
        ({"If-Modified-Since": "Fri, 31 Dec 9999 23:59:59 GMT"}, ""),
        ({"If-Modified-Since": "Thu, 01 Jan 2026 00:00:00 +99999999999999999"}, ""),
        ({"If-Modified-Since": "Thu, 01 Jan 20260000000000 00:00:00 GMT"}, ""),
    ],
)
def test_an_id_beyond_all_ids(headers: Mapping[str, str], last: str) -> None:
    """It is an error of whoever sends it, and never reaches the broker, where it would spoil the reads of others."""
    with pytest.raises(InvalidParameter):
        find_id(headers, last)


def test_a_date_that_is_none() -> None:
    """Is refused."""
    with pytest.raises(InvalidParameter, match="a date as HTTP writes it"):
        find_id({"If-Modified-Since": "yesterday"}, "")


@pytest.mark.parametrize(
    ("accept", "takes"),
    [
        ("", True),
        ("*/*", True),
        ("application/json, */*;q=0.1", True),
        ("Multipart/Mixed", True),
        ("multipart/*", True),
        ("application/json, text/plain", False),
        ("text/*", False),
    ],
)
def test_who_takes_several_messages_at_once(accept: str, takes: bool) -> None:
    """Nchan's client does, and says that it takes anything."""
    assert takes_parts(accept) is takes


# What a subscriber is shown


def message(id: int, data: bytes) -> tuple[Message, bytes]:
    made = Message(id, ("a",), data)
    return made, made.json(("a",))


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (b'"hello"', "text/plain", b"hello"),
        (b'""', "text/plain", b""),
        (rb'"line\nline\r \u20ac \ud83d\ude00"', "text/plain", "line\nline\r € 😀".encode()),
        (b'{"a": 1}', "application/json", b'{"a": 1}'),
        (b"null", "application/json", b"null"),
        (rb'"half \ud83d"', "application/json", rb'"half \ud83d"'),
    ],
)
def test_data(data: bytes, kind: str, text: bytes) -> None:
    """A JSON string is its characters, as Nchan's publishers send text; all else is JSON."""
    assert show_data(Message(C, ("a",), data)) == (kind, text)


def test_events_byte_by_byte() -> None:
    """A line of data for each line of text, whatever ends it to a browser; the last id moves without a message."""
    answer = Answer(
        [message(C, b'{"n":1}'), message(C + 5, rb'"a\nb\r\nc\rd\n"'), message(C + 7, b'""')], C + 9, "message"
    )

    assert Events().show(answer) == (
        b'id: %d\ndata: {"n":1}\n\n'
        b"id: %d\ndata: a\ndata: b\ndata: c\ndata: d\ndata: \n\n"
        b"id: %d\ndata: \n\n"
        b": \nid: %d\n\n" % (C + 1, C + 6, C + 8, C + 9)
    )


def test_events_of_what_nchan_does_not_tell() -> None:
    """Have names, so that Nchan's client passes them over; a gap comes before what follows it."""
    answer = Answer([message(C, b"1")], C + 9, "gap", gap=True, closed="a")

    assert Events().show(answer) == (
        b'event: gap\ndata: {"next":%d}\n\nid: %d\ndata: 1\n\n'
        b'event: closed\ndata: {"closed":["a"]}\n\n: \nid: %d\n\n' % (C + 9, C + 1, C + 9)
    )
    assert Events().fail(TooLarge("too much")) == b":413: 413 Request Entity Too Large\n\n"
    assert re.fullmatch(rb": hi\n\nretry: [12][0-9]{3}\n\n|: hi\n\nretry: 3000\n\n", Events().begin())


def test_frames_byte_by_byte() -> None:
    """Id and type before the data, or the data alone."""
    ((made, _),) = [message(C, b'"a\\nb"')]

    assert show_frame(made, meta=True) == f"id: {C + 1}\ncontent-type: text/plain\n\na\nb"
    assert show_frame(made, meta=False) == "a\nb"


def test_a_batch_byte_by_byte() -> None:
    """LF alone, a line's end after the last boundary, and the boundary is another one each time."""
    answer = Answer([message(C, b"[1]"), message(C + 1, b'"x"'), message(C + 2, b'""')], C + 3, "message")

    first, second = show_answer(answer, parts=True), show_answer(answer, parts=True)

    boundary = first.headers["Content-Type"].removeprefix("multipart/mixed; boundary=")
    assert re.fullmatch("[0-9a-f]{32}", boundary)
    assert (
        first.body
        == (
            f"--{boundary}\nContent-Type: application/json\n\n[1]\n"
            f"--{boundary}\nContent-Type: text/plain\n\nx\n"
            f"--{boundary}\nContent-Type: text/plain\n\n\n--{boundary}--\n"
        ).encode()
    )
    assert (first.status, first.headers["Etag"]) == (200, str(C + 3))
    assert first.headers["Content-Type"] != second.headers["Content-Type"]


@pytest.mark.parametrize("gap", [False, True])
def test_one_message_at_a_time(gap: bool) -> None:
    """For who takes no batches; the id is the one behind what was told, so nothing is passed over."""
    answer = Answer([message(C, b"1"), message(C + 4, b"2")], C + 9, "message", gap=gap)

    told = show_answer(answer, parts=False)

    assert (told.status, told.body, told.headers["Etag"]) == (200, b"1", str(C + 1))
    assert told.headers.get("X-PushUp-Gap") == ("true" if gap else None)


# Long polls, over a socket


async def test_a_message_and_the_next() -> None:
    """With Etag and type, without Last-Modified; what Etag said comes back as If-None-Match."""
    async with mounted() as server, connected(server) as client:
        client.send("GET /sub/news HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)
        (id,) = await publish(server, "news", b'"hello"')
        first = await client.reply()
        (other,) = await publish(server, "news", b'{"n":2}')
        second = await get(client, "/sub/news", If_None_Match=first.headers["etag"])

    assert (first.status, first.body, first.headers["content-type"]) == (200, b"hello", "text/plain")
    assert first.headers["etag"] == str(id + 1)
    assert (second.body, second.headers["content-type"]) == (b'{"n":2}', "application/json")
    assert second.headers["etag"] == str(other + 1)
    for reply in (first, second):
        assert reply.headers["cache-control"] == "no-store"
        assert "last-modified" not in reply.headers


async def test_several_messages_and_none() -> None:
    """A batch, then nothing in the form that Nchan's client takes for nothing: with the id, after a wait."""
    async with mounted(poll_timeout=0.2) as server, connected(server) as client:
        ids = await publish(server, "news", b'"a"', b"{}", b'"c\\n"')
        batch = await get(client, "/sub/news")
        begun = asyncio.get_running_loop().time()
        idle = await get(client, "/sub/news", Etag=batch.headers["etag"])
        waited = asyncio.get_running_loop().time() - begun

    assert parts(batch) == [("text/plain", "a"), ("application/json", "{}"), ("text/plain", "c\n")]
    assert batch.headers["etag"] == str(ids[-1] + 1)
    assert (idle.status, parts(idle)) == (200, [])
    assert int(idle.headers["etag"]) >= ids[-1] + 1
    assert waited > 0.15


async def test_who_takes_no_batches() -> None:
    """Is told one message at a time, and 408 when there is none, as by Nchan."""
    async with mounted(poll_timeout=0.1) as server, connected(server) as client:
        ids = await publish(server, "news", b'"a"', b'"b"')
        first = await get(client, "/sub/news", Accept="text/plain")
        second = await get(client, "/sub/news", Accept="text/plain", If_None_Match=first.headers["etag"])
        idle = await get(client, "/sub/news", Accept="text/plain", If_None_Match=second.headers["etag"])

    assert [first.body, second.body, idle.body] == [b"a", b"b", b""]
    assert [int(reply.headers["etag"]) for reply in (first, second)] == [id + 1 for id in ids]
    assert idle.status == 408
    assert int(idle.headers["etag"]) > ids[-1]


async def test_several_channels_have_one_id() -> None:
    """In the order of publication, and a message of both comes once."""
    async with mounted() as server, connected(server) as client:
        for channels, data in ((("a",), b"1"), (("b",), b"2"), (("a", "b"), b"3"), (("c",), b"4")):
            await server.node.publish(Publication(channels, data))
        by_path = await get(client, "/sub/a/b")
        by_comma = await get(client, "/sub/a,b")
        by_id = await get(client, "/sub?id=a,b")

    for reply in (by_path, by_comma, by_id):
        assert [text for _, text in parts(reply)] == ["1", "2", "3"]


async def test_from_now_on() -> None:
    """`start=latest` is told at once from where, so that what comes between two polls is not lost."""
    async with mounted() as server, connected(server) as client:
        await publish(server, "news", b'"old"')
        begun = await get(client, "/sub/news?start=latest")
        await publish(server, "news", b'"new"')
        new = await get(client, "/sub/news?start=latest", If_None_Match=begun.headers["etag"])

    assert (parts(begun), new.body) == ([], b"new")


async def test_a_gap_is_told_beside_the_message() -> None:
    """In a header field; the messages after it are there, and who has them is told no gap."""
    async with mounted(channel_max_messages=2) as server, connected(server) as client:
        ids = await publish(server, "news", b'"a"', b'"b"', b'"c"', b'"d"')
        late = await get(client, "/sub/news", If_None_Match=str(ids[0] + 1))
        good = await get(client, "/sub/news", If_None_Match=str(ids[1] + 1))

    assert parts(late) == parts(good) == [("text/plain", "c"), ("text/plain", "d")]
    assert late.headers["x-pushup-gap"] == "true"
    assert "x-pushup-gap" not in good.headers


async def test_a_closed_channel() -> None:
    """410 for who waits, as by Nchan; an integer channel is 404 afterwards, a named one can be waited for."""
    async with mounted() as server, connected(server) as client, connected(server) as other:
        created = await other.request("POST", "/channels", {})
        number = created.json["channel"]
        replies = []
        for channel in ("news", number):
            await publish(server, str(channel), b"1")
            first = await get(client, f"/sub/{channel}")
            tag = first.headers["etag"]
            client.send(f"GET /sub/{channel} HTTP/1.1\r\nHost: test\r\nIf-None-Match: {tag}\r\n\r\n")
            await parked(server, 1)
            await other.request("DELETE", f"/channels/{channel}")
            replies.append(await client.reply())
        gone = await get(client, f"/sub/{number}")
        client.send("GET /sub/news HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)

    assert [(reply.status, reply.body) for reply in replies] == [(410, b""), (410, b"")]
    assert all(int(reply.headers["etag"]) for reply in replies)
    assert (gone.status, gone.json["code"]) == (404, "channel_not_found")


async def test_a_draining_node_lets_go_with_an_id() -> None:
    """At once, and the connection ends: the client goes on elsewhere from there."""
    async with mounted() as server, connected(server) as client:
        (id,) = await publish(server, "news", b"1")
        client.send(f"GET /sub/news HTTP/1.1\r\nHost: test\r\nIf-None-Match: {id + 1}\r\n\r\n")
        await parked(server, 1)
        await server.stop(0)
        reply = await client.reply()

    assert (reply.status, parts(reply)) == (200, [])
    assert int(reply.headers["etag"]) >= id + 1
    assert reply.headers["connection"] == "close"


async def test_who_leaves_is_forgotten() -> None:
    """At once, not at the end of the wait."""
    async with mounted() as server:
        async with connected(server) as client:
            client.send("GET /sub/news HTTP/1.1\r\nHost: test\r\n\r\n")
            await parked(server, 1)
        await parked(server, 0)


async def test_there_is_nothing_unless_it_is_mounted() -> None:
    """And then only there."""
    async with running() as server, connected(server) as client:
        assert (await get(client, "/sub/news")).status == 404
    async with running(nchan="/nchan/v1") as server, connected(server) as client:
        await publish(server, "news", b"1")
        assert (await get(client, "/nchan/v1/news")).body == b"1"
        assert (await get(client, "/nchan/v1?id=news")).body == b"1"
        assert (await get(client, "/nchan/news")).status == 404
        assert (await get(client, "/nchan/v1")).json["detail"].startswith("a subscriber names at least one channel")
        assert (await client.request("POST", "/nchan/v1/news", b"1")).status == 405


# Access


ACCESS: Final = """\
[realms.default.tokens]
secret_file = "{secret}"
[realms.open]
subscribe = "open"
[[realms.open.keys]]
name = "k"
hash = "sha256:{zeros}"
"""
SECRET: Final = b"a secret of more than thirty-two bytes"


def token(*channels: str, **claims: Any) -> str:
    return jwt.encode({"sub": "ann", "exp": time.time() + 60, **claims, "pushup": {"subscribe": channels}}, SECRET)


@pytest.fixture
def access(tmp_path: Path) -> str:
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "access.toml").write_text(ACCESS.format(secret=tmp_path / "secret", zeros="0" * 64))
    return str(tmp_path / "access.toml")


async def test_a_token_is_needed_where_polls_need_one(access: str) -> None:
    """In the URL or the header field, for its channels; a stranger learns nothing, not even what makes no sense."""
    async with mounted(access=access) as server, connected(server) as client:
        await publish(server, "news", b"1")
        stranger = [await get(client, target) for target in ("/sub/news", "/sub/news?chanel=b", "/realms/none/sub/a")]
        by_query = await get(client, f"/sub/news?token={token('news')}")
        by_field = await get(client, "/sub/news", Authorization=f"Bearer {token('n*')}")
        other = await get(client, f"/sub/news,other?token={token('news')}")

    assert [reply.status for reply in stranger] == [401] * 3
    assert len({reply.body for reply in stranger}) == 1
    assert (by_query.body, by_field.body) == (b"1", b"1")
    assert (other.status, other.json["channel"]) == (403, "other")


async def test_another_realm(access: str) -> None:
    """By its prefix."""
    async with mounted(access=access) as server, connected(server) as client:
        node = server.service.realms["open"].node
        await node.publish(Publication(("realms", "open", "sub", "a", "b"), b"1"))
        await node.publish(Publication(("a/b", "c"), b"7"))
        for target in ("/realms/open/sub/c", "/realms/open/sub/a%2Fb", "/realms/open/sub?id=c"):
            assert (await get(client, target)).body == b"7"


async def test_a_token_that_expires_ends_the_wait(access: str) -> None:
    """With 401, not later."""
    async with mounted(access=access) as server, connected(server) as client:
        reply = await get(client, f"/sub/news?token={token('news', exp=time.time() + 1.2)}")

    assert (reply.status, reply.json["code"]) == (401, "token_expired")


async def test_no_more_subscribers_than_a_token_may_have(access: str) -> None:
    """429 for a poll; a browser's EventSource is told to come back, as any other status would end it for good."""
    target = f"/sub/news?token={token('news')}"
    async with mounted(access=access, polls_per_token_max=1) as server, connected(server) as one:
        one.send(f"GET {target} HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)
        async with connected(server) as two:
            poll = await get(two, target)
            events = await get(two, target, Accept="text/event-stream")

        assert server.metrics.refused["too_many_polls"] == 2
    assert (poll.status, poll.headers["retry-after"]) == (429, "1")
    assert (events.status, events.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert re.fullmatch(rb"retry: [2-4][0-9]{3}\n\n:429: 429 Too Many Requests\n\n", events.body)


async def test_a_token_has_its_place_again_when_a_poll_is_over(access: str) -> None:
    """However it ended."""
    target = f"/sub/news?token={token('news')}"
    async with mounted(access=access, polls_per_token_max=1, poll_timeout=0.1) as server, connected(server) as client:
        for _ in range(3):
            assert (await get(client, target)).status == 200


async def test_a_stream_ends_with_the_rights_to_it(access: str, tmp_path: Path) -> None:
    """Not only with the token's time: what it was signed with is no longer good."""
    async with mounted(access=access, heartbeat=0.1) as server, connected(server) as client:
        await events(client, f"/sub/news?token={token('news')}")
        (tmp_path / "secret").write_bytes(SECRET[::-1])
        server.reload()
        said = [await chunk(client)]
        while said[-1]:
            said.append(await chunk(client))

    assert said[-2] == ":401: 401 Unauthorized\n\n"


@pytest.mark.parametrize(("proxies", "status"), [("127.0.0.0/8", 429), ("192.0.2.1", 200)])
async def test_a_client_behind_a_proxy_has_its_own_limit(proxies: str, status: int) -> None:
    """Where the proxy is one that is believed."""
    flags = {"trusted_proxies": proxies, "connections_per_address_max": 3, "poll_timeout": 0.1}
    async with mounted(**flags) as server, connected(server) as client:
        for _ in range(3):
            server.service.peers.enter("198.51.100.7")
        reply = await get(client, "/sub/news", X_Forwarded_For="198.51.100.7")

    assert reply.status == status


async def test_pages_of_other_origins() -> None:
    """May send and read the fields of the protocol below the mount, and below nothing else."""
    page = "http://page.test"
    ask = {"Origin": page, "Access-Control-Request-Method": "GET"}
    async with mounted(cors_origins=page) as server, connected(server) as client:
        await publish(server, "news", b"1")
        told = await get(client, "/sub/news", Origin=page)
        lines = "".join(f"{name}: {value}\r\n" for name, value in ask.items())
        asked = await client.request("OPTIONS", "/sub/news", headers=lines)
        elsewhere = await client.request("OPTIONS", "/subscribe", headers=lines)

    expected = "Authorization, Content-Type, Idempotency-Key, If-None-Match, If-Modified-Since, Etag, Cache-Control"
    assert asked.headers["access-control-allow-headers"] == expected
    assert elsewhere.headers["access-control-allow-headers"] == "Authorization, Content-Type, Idempotency-Key"
    assert told.headers["access-control-allow-origin"] == page
    assert told.headers["access-control-expose-headers"] == "Retry-After, Etag, Content-Type, X-PushUp-Gap"


# Server-Sent Events, over a socket


async def events(client: Client, target: str, *fields: str) -> tuple[str, str]:
    """The head of the answer, and the first words of its body."""
    lines = "".join(f"{field}\r\n" for field in ("Accept: text/event-stream", *fields))
    client.send(f"GET {target} HTTP/1.1\r\nHost: test\r\n{lines}\r\n")
    async with asyncio.timeout(PATIENCE_S):
        head = (await client.reader.readuntil(b"\r\n\r\n")).decode().lower()
    return head, await chunk(client)


async def chunk(client: Client) -> str:
    """The next chunk of a chunked body; empty at its end."""
    async with asyncio.timeout(PATIENCE_S):
        size = int(await client.reader.readuntil(b"\r\n"), 16)
        return (await client.reader.readexactly(size + 2))[:-2].decode()


async def test_events() -> None:
    """What is cached at once, then what comes, and the id of who has nothing new moves."""
    async with mounted(heartbeat=0.2) as server, connected(server) as client:
        (one,) = await publish(server, "news", b'"one"')
        head, begun = await events(client, "/sub/news")
        await parked(server, 1)
        (two,) = await publish(server, "news", b"2")
        second = await chunk(client)
        beat = await chunk(client)

    assert head.startswith("http/1.1 200 ok\r\n")
    assert "\r\ncontent-type: text/event-stream; charset=utf-8\r\n" in head
    assert "\r\nx-accel-buffering: no\r\n" in head
    assert re.fullmatch(rf": hi\n\nretry: \d+\n\nid: {one + 1}\ndata: one\n\n: \nid: {one + 1}\n\n", begun)
    assert second == f"id: {two + 1}\ndata: 2\n\n: \nid: {two + 1}\n\n"
    assert re.fullmatch(r": \nid: \d{16}\n\n", beat)


async def test_a_browser_that_comes_back_is_believed_rather_than_its_url() -> None:
    """The URL still has the id that the page began with."""
    async with mounted() as server, connected(server) as client:
        ids = await publish(server, "news", b"1", b"2", b"3")
        _, begun = await events(client, f"/sub/news?last_event_id={ids[0] + 1}", f"Last-Event-ID: {ids[1] + 1}")

    assert f"id: {ids[2] + 1}\ndata: 3\n\n" in begun
    assert "data: 2" not in begun


async def test_events_end_when_the_node_drains() -> None:
    """In good order, with a last id."""
    async with mounted() as server, connected(server) as client:
        await events(client, "/sub/news")
        await parked(server, 1)
        await server.stop(0)

        assert re.fullmatch(r": \nid: \d{16}\n\n", await chunk(client))
        assert await chunk(client) == ""


async def test_events_that_are_refused_for_good() -> None:
    """Have the status, which a browser takes as the end."""
    async with mounted() as server, connected(server) as client:
        assert (await get(client, "/sub/123", Accept="text/event-stream")).status == 404


# WebSocket


@asynccontextmanager
async def socket(server: Server, path: str, *protocols: str, **options: Any) -> AsyncIterator[Socket]:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://{server.address}{path}", protocols=protocols, **options) as connection,
    ):
        yield connection


async def frame(connection: Socket) -> str:
    return await connection.receive_str(timeout=PATIENCE_S)


async def test_frames() -> None:
    """Each message with id and type; the id is where to go on."""
    async with mounted() as server:
        ids = await publish(server, "news", b'"one"', b'{"n":2}')
        async with socket(server, "/sub/news", META) as connection:
            assert connection.protocol == META
            frames = [await frame(connection), await frame(connection)]
            await parked(server, 1)
            ids += await publish(server, "news", b'"three"')
            frames.append(await frame(connection))
        async with socket(server, f"/sub/news?last_event_id={ids[1] + 1}", META) as connection:
            again = await frame(connection)
        await parked(server, 0)

    assert frames == [
        f"id: {ids[0] + 1}\ncontent-type: text/plain\n\none",
        f'id: {ids[1] + 1}\ncontent-type: application/json\n\n{{"n":2}}',
        f"id: {ids[2] + 1}\ncontent-type: text/plain\n\nthree",
    ]
    assert again == frames[2]


async def test_frames_without_the_protocol_are_bare() -> None:
    """For who only wants the data, as with Nchan."""
    async with mounted() as server:
        await publish(server, "news", b'"one"')
        async with socket(server, "/sub/news") as connection:
            assert (connection.protocol, await frame(connection)) == (None, "one")


async def test_what_a_subscriber_sends_has_no_meaning() -> None:
    """It is read, as are its pongs, and passed over."""
    async with mounted() as server, socket(server, "/sub/news", META) as connection:
        await connection.send_str("hello")
        await connection.send_bytes(b"hello")
        await parked(server, 1)
        await publish(server, "news", b"1")
        assert (await frame(connection)).endswith("\n\n1")


async def test_a_socket_ends_when_the_node_drains() -> None:
    """Going away; Nchan's client is back in a second."""
    async with mounted() as server, socket(server, "/sub/news", META) as connection:
        await parked(server, 1)
        await server.stop(0)
        message = await connection.receive(timeout=PATIENCE_S)

    assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1001)


async def test_a_socket_ends_with_the_last_channel_that_can_never_come_back() -> None:
    """In Nchan's words."""
    async with mounted() as server, connected(server) as client:
        number = (await client.request("POST", "/channels", {})).json["channel"]
        async with socket(server, f"/sub/{number}", META) as connection:
            await parked(server, 1)
            await client.request("DELETE", f"/channels/{number}")
            message = await connection.receive(timeout=PATIENCE_S)

    assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, 1001, "410 Gone")


async def test_a_socket_ends_with_its_token(access: str) -> None:
    """With a code of its own."""
    path = f"/sub/news?token={token('news', exp=time.time() + 1.2)}"
    async with mounted(access=access) as server, socket(server, path, META) as connection:
        message = await connection.receive(timeout=PATIENCE_S)

    assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, 4401, "token_expired")


async def test_a_socket_of_a_page_that_may_not() -> None:
    """Is refused, as a browser would let it through."""
    async with mounted() as server, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await session.ws_connect(f"http://{server.address}/sub/news", headers={"Origin": "http://evil.test"})

        assert caught.value.status == 403


async def test_a_socket_that_is_wrong_from_the_start() -> None:
    """Is answered with a status."""
    async with mounted() as server, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await session.ws_connect(f"http://{server.address}/sub/123")

        assert caught.value.status == 404


@pytest.mark.parametrize("field", ["Sec-WebSocket-Key: short", "Sec-WebSocket-Key: ké", "Sec-WebSocket-Version: 1", ""])
async def test_a_handshake_that_is_none(field: str) -> None:
    """Is answered as a request that makes no sense, and nobody waits for it."""
    async with mounted() as server, connected(server) as client:
        lines = f"Upgrade: websocket\r\nConnection: Upgrade\r\n{field}\r\n" if field else "Upgrade: websocket\r\n"
        reply = await client.request("GET", "/sub/news", headers=lines)

        assert (reply.status, reply.json["detail"]) == (400, "the WebSocket handshake is not well-formed")
        assert server.node.parked == 0


async def test_streams_are_counted_while_they_last() -> None:
    """Beside those of PushUp's own paths."""
    async with mounted() as server, connected(server) as client:
        await events(client, "/sub/news")
        async with socket(server, "/sub/news", META):
            await parked(server, 2)
            assert server.metrics.streams == {"text/event-stream": 1, "application/x-ndjson": 0, "websocket": 1}
        await client.close()
        await eventually(lambda: not any(server.metrics.streams.values()), "both were forgotten")


async def test_nobody_holds_a_node_up_that_stops() -> None:
    """Neither a WebSocket client that does not say goodbye nor a browser that reads nothing."""
    async with mounted() as server, connected(server) as silent, connected(server) as unread:
        silent.send(
            "GET /sub/news HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        unread.send("GET /sub/news HTTP/1.1\r\nHost: test\r\nAccept: text/event-stream\r\n\r\n")
        await parked(server, 2)
        async with asyncio.timeout(PATIENCE_S):
            await server.stop(0)


async def test_a_socket_is_pinged_and_costs_no_compressor() -> None:
    """A client that is gone without a word is noticed; and no client gets a quarter of a megabyte."""
    async with mounted(heartbeat=0.1) as server:
        async with socket(server, "/sub/news", META, autoping=False, compress=15) as connection:
            message = await connection.receive(timeout=PATIENCE_S)
            assert (message.type, connection.compress) == (aiohttp.WSMsgType.PING, 0)
            message = await connection.receive(timeout=PATIENCE_S)
            assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
        await parked(server, 0)


async def test_a_subscriber_sends_little() -> None:
    """A frame that is too long ends the connection."""
    async with mounted() as server, socket(server, "/sub/news", META) as connection:
        await connection.send_str("x" * 5000)
        message = await connection.receive(timeout=PATIENCE_S)

    assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1009)


async def test_a_socket_that_fails_is_closed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Its client comes back; one that was left open would hear nothing any more, and nobody would know."""

    def fail(message: Message, *, meta: bool) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("pushup.nchan.show_frame", fail)
    async with mounted() as server, socket(server, "/sub/news", META) as connection:
        await publish(server, "news", b"1")
        message = await connection.receive(timeout=PATIENCE_S)

    assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1011)
    assert "a subscriber's WebSocket failed" in caplog.text
