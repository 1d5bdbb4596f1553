"""Access through a whole server: both sides of a node let in the same people, and tell the others the same."""

import asyncio
import itertools
import json
import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import time
from typing import Any

import pytest

from pushup.access import KEY_PREFIX, NOT_GOOD, hash_key, make_key
from pushup.server import Server
from tests import pipes
from tests.support import Client, Reply, connected, eventually, parked, running
from tests.test_tokens import SECRET, KeyServer, ed_jwk, ed_key, hs256, jwks, key_server, make_token, token_by

CHUNKED = "Transfer-Encoding: chunked\r\n"
SIDES = {
    "lane": "",
    "lent": "Content-Encoding: identity\r\n",
    "web": CHUNKED,
}
"""Header fields that have a request served by the lane, by the web side on the lane's connection, or by its own."""

ALL, PUBLISHER, MANAGER, READER = (f"{KEY_PREFIX}{letter * 43}" for letter in "apmr")
HOUR_S = 3600

NEEDS = "this needs credentials: a key or a token, as `Authorization: Bearer ...`"


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> str:
    """The header fields of one side."""
    return SIDES[request.param]


def key(name: str, secret: str, actions: Sequence[str], channels: Sequence[str | int] = ("*",)) -> str:
    """A key in the access file of the default realm."""
    return (
        f'[[realms.default.keys]]\nname = "{name}"\nhash = "{hash_key(secret)}"\n'
        f"actions = {json.dumps(actions)}\nchannels = {json.dumps(channels)}\n"
    )


SOME: Sequence[str | int] = ("news", "orders.*", 17)
KEYS = (
    key("all", ALL, ["publish", "manage", "subscribe"])
    + key("publisher", PUBLISHER, ["publish"], SOME)
    + key("manager", MANAGER, ["manage"], SOME)
    + key("reader", READER, ["subscribe"], SOME)
)


class AccessFile:
    """The access file of a server, and the secret of its tokens."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "access.toml"
        self._secret = folder / "secret"
        self._secret.write_bytes(SECRET)

    def write(self, keys: str = KEYS, *, subscribe: str = "token", tokens: str = "publish = true") -> str:
        """Have these rules, and return the file's name."""
        self.path.write_text(
            f'[realms.default]\nsubscribe = "{subscribe}"\n{keys}'
            f'[realms.default.tokens]\nsecret_file = "{self._secret}"\n{tokens}\n'
        )
        return str(self.path)


@pytest.fixture
def access(tmp_path: Path) -> AccessFile:
    return AccessFile(tmp_path)


def token(*channels: str | int, publish: Sequence[str] = (), life: float = HOUR_S, **claims: Any) -> str:
    return make_token({"exp": time() + life, "pushup": {"subscribe": channels, "publish": publish}, **claims}, hs256())


def bearer(secret: str) -> str:
    return f"Authorization: Bearer {secret}\r\n"


async def ask(server: Server, method: str, target: str, body: Any = None, headers: str = "") -> Reply:
    """One request on a connection of its own."""
    async with connected(server) as client:
        return await say(client, method, target, body, headers)


async def say(client: Client, method: str, target: str, body: Any = None, headers: str = "") -> Reply:
    """One request, and its response."""
    client.send(request_bytes(method, target, body, headers))
    return await client.reply(head=method == "HEAD")


def request_bytes(method: str, target: str, body: Any = None, headers: str = "") -> bytes:
    """A request with a JSON body, in a chunk if the header fields say so."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    if CHUNKED in headers:
        data = (b"%x\r\n%b\r\n" % (len(data), data) if data else b"") + b"0\r\n\r\n"
    elif body is not None:
        headers += f"Content-Length: {len(data)}\r\n"
    return f"{method} {target} HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode() + data


def poll_target(*channels: str | int, start: int | str = 0, hold: float = 0, **more: str) -> str:
    names = "&".join(f"channel={channel}" for channel in channels)
    return f"/poll?{names}&start={start}&timeout={hold}" + "".join(f"&{name}={value}" for name, value in more.items())


async def publish(server: Server, *channels: str | int, data: Any = 1) -> int:
    reply = await ask(server, "POST", "/publish", {"channels": channels, "data": data}, bearer(ALL))
    assert reply.status == 201, reply
    return int(reply.json["id"])


def assert_unauthorized(reply: Reply, detail: str = NOT_GOOD, code: str = "unauthorized") -> None:
    """It is the whole answer, to the letter."""
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == 'Bearer realm="PushUp"'
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    assert reply.json == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "code": code,
        "detail": detail,
    }


# Scopes


OPERATIONS: dict[str, tuple[str, str, Any]] = {
    "publish": ("POST", "/publish", {"channels": ["news"], "data": 1}),
    "publish by prefix": ("POST", "/publish", {"channels": ["orders.1", "news"], "data": 1}),
    "publish elsewhere": ("POST", "/publish", {"channels": ["news", "other"], "data": 1}),
    "create": ("POST", "/channels", {"name": "orders.new"}),
    "create elsewhere": ("POST", "/channels", {"name": "new"}),
    "create an integer": ("POST", "/channels", {}),
    "describe": ("GET", "/channels/news", None),
    "describe elsewhere": ("GET", "/channels/other", None),
    "describe escaped": ("GET", "/channels/%6Eews", None),
    "describe elsewhere escaped": ("GET", "/channels/%6Fther", None),
    "renew": ("POST", "/channels/news/renew", {"ttl": 60}),
    "renew elsewhere": ("POST", "/channels/other/renew", {"ttl": 60}),
    "list": ("GET", "/channels", None),
    "poll": ("GET", poll_target("news", "orders.1"), None),
    "poll escaped": ("GET", poll_target("%6Eews"), None),
    "poll elsewhere": ("GET", poll_target("news", "other"), None),
    "poll by body": ("POST", "/poll", {"channels": ["news", "orders.1"], "timeout": 0}),
    "poll elsewhere by body": ("POST", "/poll", {"channels": ["other"], "timeout": 0}),
    "close": ("DELETE", "/channels/news", None),
    "close elsewhere": ("DELETE", "/channels/other", None),
}
HEAD_OF_A_POLL = ("HEAD", poll_target("news"), None)

MAY: dict[str, tuple[str, set[str]]] = {
    "all": (ALL, set(OPERATIONS)),
    "publisher": (PUBLISHER, {"publish", "publish by prefix"}),
    "manager": (MANAGER, {"create", "describe", "describe escaped", "renew", "close"}),
    "reader": (READER, {"poll", "poll escaped", "poll by body"}),
    "a token": (token("news", "orders.*"), {"poll", "poll escaped", "poll by body"}),
    "a token to publish": (token(publish=["news"]), {"publish"}),
    "a token for nothing": (token(), set()),
}


@pytest.mark.parametrize("who", MAY)
async def test_who_may_do_what(who: str, side: str, access: AccessFile) -> None:
    """Each key and token may exactly what its rules say; all else is forbidden, not unknown."""
    secret, may = MAY[who]
    async with running(access=access.write()) as server:
        await publish(server, "news", "other", "orders.1")
        for name, (method, target, body) in OPERATIONS.items():
            reply = await ask(server, method, target, body, bearer(secret) + side)
            if name in may:
                assert 200 <= reply.status < 300, (name, reply)
            else:
                assert (reply.status, reply.json["code"]) == (403, "forbidden"), (name, reply)
                assert "www-authenticate" not in reply.headers


@pytest.mark.parametrize(
    ("headers", "detail"),
    [("", NEEDS), (bearer("x"), NOT_GOOD), (bearer(hash_key(ALL)), NOT_GOOD), (bearer(token("news", life=0)), None)],
    ids=["nothing", "a word", "a hash", "an old token"],
)
async def test_who_is_not_known(headers: str, detail: str | None, side: str, access: AccessFile) -> None:
    """The same 401 for everything there is to do, before anything is looked at."""
    async with running(access=access.write()) as server:
        await publish(server, "news")
        for method, target, body in (
            *OPERATIONS.values(),
            ("POST", "/publish", b"{"),
            ("POST", "/publish", [{"channels": ["news"], "data": 1}]),
            ("POST", "/channels", b"\xff"),
            ("GET", "/channels?limit=x", None),
            ("GET", "/channels/%ff", None),
            ("GET", "/poll", None),
            ("GET", "/poll?chanel=a", None),
            ("GET", "/poll?channel=%zz", None),
            ("POST", "/poll", b"{"),
        ):
            reply = await ask(server, method, target, body, headers + side)
            if detail is None:
                assert_unauthorized(reply, "the token has expired", "token_expired")
            else:
                assert_unauthorized(reply, detail)
        reply = await ask(server, *HEAD_OF_A_POLL, headers + side)
        assert (reply.status, reply.body) == (401, b"")
        info = (await ask(server, "GET", "/channels/news", None, bearer(ALL))).json
        assert info["messages"] == 1, "nothing was done"


async def test_what_is_forbidden_tells_nothing_of_the_channel(side: str, access: AccessFile) -> None:
    """Whether it exists, is empty or was closed: the answer is the same to the letter."""
    async with running(access=access.write()) as server:
        await publish(server, "secret", "closed")
        await ask(server, "DELETE", "/channels/closed", None, bearer(ALL))
        for method, target, body in (
            ("GET", "/channels/CHANNEL", None),
            ("DELETE", "/channels/CHANNEL", None),
            ("POST", "/channels/CHANNEL/renew", {}),
            ("POST", "/channels", {"name": "CHANNEL"}),
            ("POST", "/publish", {"channels": ["CHANNEL"], "data": 1}),
            ("GET", poll_target("CHANNEL"), None),
        ):
            answers = []
            for channel in ("secret", "closed", "absent"):
                text = None if body is None else json.dumps(body).replace("CHANNEL", channel).encode()
                reply = await ask(
                    server, method, target.replace("CHANNEL", channel), text, bearer(token("news")) + side
                )
                answers.append((reply.status, reply.headers | {"date": ""}, reply.body.replace(channel.encode(), b"")))
            assert answers[0] == answers[1] == answers[2]
            assert answers[0][0] == 403


@pytest.mark.parametrize("channel", [17, "17"])
async def test_integer_channels(channel: str | int, side: str, access: AccessFile) -> None:
    """A token names them as numbers or as digits, and only these."""
    async with running(access=access.write()) as server:
        made = (await ask(server, "POST", "/channels", {}, bearer(ALL))).json["channel"]
        other = (await ask(server, "POST", "/channels", {}, bearer(ALL))).json["channel"]
        id = await publish(server, made)
        await publish(server, other)
        named = made if channel == 17 else str(made)
        secret = token(named)
        reply = await ask(server, "GET", poll_target(made), None, bearer(secret) + side)
        assert [message["id"] for message in reply.json["messages"]] == [id]
        for wrong in (other, made + 1, str(made)[:-1]):
            reply = await ask(server, "GET", poll_target(wrong), None, bearer(secret) + side)
            assert (reply.status, reply.json["channel"]) == (403, int(wrong))


async def test_one_forbidden_channel_of_several(side: str, access: AccessFile) -> None:
    """The poll is refused as a whole, and the channel is named; of a publication nothing is stored."""
    async with running(access=access.write()) as server:
        await publish(server, "news", "secret")
        secret = token("news", "orders.*", publish=["news"])
        for target in (poll_target("news", "secret"), poll_target("secret", "news", "secret")):
            reply = await ask(server, "GET", target, None, bearer(secret) + side)
            assert (reply.status, reply.json["channel"]) == (403, "secret")
        body = {"channels": ["news", "secret"], "data": "never"}
        reply = await ask(server, "POST", "/publish", body, bearer(secret) + side)
        assert (reply.status, reply.json["channel"]) == (403, "secret")
        reply = await ask(server, "GET", poll_target("news", "secret"), None, bearer(ALL))
        assert [message["data"] for message in reply.json["messages"]] == [1]


async def test_a_batch_with_forbidden_publications(side: str, access: AccessFile) -> None:
    """Each has its own result; what is allowed is stored, in its order."""
    async with running(access=access.write()) as server:
        items = [
            {"channels": ["news"], "data": 1},
            {"channels": ["secret"], "data": 2},
            {"channels": ["news", "secret"], "data": 3},
            {"channels": [], "data": 4},
            {"channels": ["orders.7"], "data": 5},
        ]
        reply = await ask(server, "POST", "/publish", items, bearer(PUBLISHER) + side)
        assert reply.status == 200
        results = [item.get("error", {}).get("code", "stored") for item in reply.json]
        assert results == ["stored", "forbidden", "forbidden", "invalid_parameter", "stored"]
        reply = await ask(server, "GET", poll_target("news", "secret", "orders.7"), None, bearer(ALL))
        assert [message["data"] for message in reply.json["messages"]] == [1, 5]


@pytest.mark.parametrize(("rule", "status"), [("publish = true", 201), ("publish = false", 403), ("", 403)])
async def test_browsers_publish_where_the_realm_says_so(rule: str, status: int, side: str, access: AccessFile) -> None:
    """A claim alone does not do."""
    async with running(access=access.write(tokens=rule)) as server:
        body = {"channels": ["chat.1"], "data": "hi"}
        reply = await ask(server, "POST", "/publish", body, bearer(token(publish=["chat.*"])) + side)
        assert reply.status == status


async def test_where_everybody_may_subscribe(side: str, access: AccessFile) -> None:
    """Polls need nothing, and take no offence at credentials; publications need a key."""
    async with running(access=access.write(subscribe="open")) as server:
        id = await publish(server, "news")
        for headers in ("", bearer(ALL), bearer("nonsense"), "Authorization: Basic eDp5\r\n", bearer(token("other"))):
            reply = await ask(server, "GET", poll_target("news", token="nonsense"), None, headers + side)
            assert [message["id"] for message in reply.json["messages"]] == [id]
        body = {"channels": ["news"], "data": 1}
        assert_unauthorized(await ask(server, "POST", "/publish", body, side), NEEDS)
        assert_unauthorized(await ask(server, "POST", "/publish", body, bearer("nonsense") + side))
        assert_unauthorized(await ask(server, "GET", "/channels", None, side), NEEDS)
        assert (await ask(server, "POST", "/publish", body, bearer(PUBLISHER) + side)).status == 201


# How credentials come


GOOD, OTHER = token("news"), token("other")


@pytest.mark.parametrize(
    ("headers", "url", "status"),
    [
        (bearer(GOOD), None, 200),
        (f"authorization: bearer {GOOD}\r\n", None, 200),
        (f"AUTHORIZATION: BEARER {GOOD}\r\n", None, 200),
        (f"Authorization:   Bearer   {GOOD}  \r\n", None, 200),
        ("", GOOD, 200),
        ("", GOOD.replace(".", "%2E"), 200),
        (f"Cookie: pushup_token={GOOD}\r\n", None, 200),
        (f"Cookie: a=b; pushup_token={GOOD}; c\r\n", None, 200),
        (f"Cookie: a=b\r\nCookie: pushup_token={GOOD}\r\n", None, 200),
        # Which one counts.
        (bearer(GOOD), OTHER, 200),
        (bearer(OTHER), GOOD, 403),
        (bearer(GOOD) + f"Cookie: pushup_token={OTHER}\r\n", None, 200),
        (bearer(OTHER) + f"Cookie: pushup_token={GOOD}\r\n", None, 403),
        (f"Cookie: pushup_token={GOOD}\r\n", OTHER, 403),
        (f"Cookie: pushup_token={OTHER}\r\n", GOOD, 200),
        # A wrong one is not made good by another.
        (bearer("x"), GOOD, 401),
        (bearer("x") + f"Cookie: pushup_token={GOOD}\r\n", None, 401),
        (f"Cookie: pushup_token={GOOD}\r\n", "x", 401),
        (f"Cookie: pushup_token={GOOD}\r\n", "", 401),
        # Something else in Authorization.
        ("Authorization: Basic eDp5\r\n", GOOD, 401),
        (f"Authorization: Basic {GOOD}\r\n", None, 401),
        (f"Authorization: {GOOD}\r\n", None, 401),
        (f"Authorization: Bearer{GOOD}\r\n", None, 401),
        (f"Authorization: Bearer\t{GOOD}\r\n", None, 401),
        ("Authorization: Bearer\r\n", GOOD, 401),
        ("Authorization:\r\n", GOOD, 401),
        (f"Authorization: Bearer {GOOD}, Bearer {GOOD}\r\n", None, 401),
        (f"Authorization: Bearer {GOOD} {GOOD}\r\n", None, 401),
        (bearer(GOOD) * 2, None, 401),
        (bearer(GOOD) + "Authorization: Basic eDp5\r\n", None, 401),
        (bearer(GOOD) + bearer("x"), None, 401),
        (bearer("x") + bearer(GOOD), None, 401),
        (f"Proxy-Authorization: Bearer {GOOD}\r\n", None, 401),
        (f"X-Authorization: Bearer {GOOD}\r\n", None, 401),
        # Not quite.
        (f"Cookie: PUSHUP_TOKEN={GOOD}\r\n", None, 401),
        (f"Cookie2: pushup_token={GOOD}\r\n", None, 401),
        ("", f"{GOOD}%00", 401),
        ("", f"%20{GOOD}", 401),
        ("", "%ff", 401),
        ("", "%zz", 401),
        ("", "%C3%BC", 401),
    ],
)
async def test_how_credentials_come(headers: str, url: str | None, status: int, side: str, access: AccessFile) -> None:
    """In the header, in the URL, or in the cookie, in this order; and two in a header are none."""
    async with running(access=access.write()) as server:
        await publish(server, "news")
        target = poll_target("news") if url is None else poll_target("news", token=url)
        reply = await ask(server, "GET", target, None, headers + side)
        assert reply.status == status, reply
        if status == 401:
            assert_unauthorized(reply, reply.json["detail"])


@pytest.mark.parametrize("value", [b"\xff", b"\xc3\xbc", b"\xed\xa0\x80", b"a\xffb.c.d"])
@pytest.mark.parametrize("where", ["header", "cookie", "url", "channel"])
async def test_credentials_that_are_no_text(where: str, value: bytes, side: str, access: AccessFile) -> None:
    """Bytes beyond ASCII are refused as any others are, and nothing breaks."""
    async with running(access=access.write()) as server, connected(server) as client:
        field = {"header": b"Authorization: Bearer %b\r\n", "cookie": b"Cookie: pushup_token=%b\r\n"}.get(where, b"")
        query = {"url": b"&token=%b", "channel": b"&channel=%b"}.get(where, b"")
        client.send(
            b"GET /poll?channel=news&timeout=0%b HTTP/1.1\r\nHost: test\r\n%b%b\r\n"
            % (query.replace(b"%b", value), field.replace(b"%b", value), side.encode())
            + b"0\r\n\r\n" * (side == CHUNKED)
        )
        reply = await client.reply()
        assert reply.status in (400, 401), reply
        assert "internal_error" not in reply.json["code"]


@pytest.mark.parametrize(
    ("origins", "origin", "status"),
    [
        ("", "https://evil.example", 401),
        ("", "null", 401),
        ("", "http://test.evil.example", 401),
        ("", "http://test:81", 401),
        ("", "", 401),
        ("", "http://test", 200),
        ("", "https://test", 200),
        ("https://app.example", "https://app.example", 200),
        ("https://app.example", "https://app.example.evil", 401),
        ("https://app.example", "http://app.example", 401),
        ("https://app.example", "https://app.example/", 401),
        ("*", "https://evil.example", 401),
    ],
)
async def test_whose_page_may_use_the_cookie(
    origins: str, origin: str, status: int, side: str, access: AccessFile
) -> None:
    """The service's own, and those that are named; a page that anybody could make sends no cookie that counts."""
    flags = {"cors_origins": origins} if origins else {}
    async with running(access=access.write(), **flags) as server:
        headers = f"Cookie: pushup_token={GOOD}\r\nOrigin: {origin}\r\n{side}"
        reply = await ask(server, "GET", poll_target("news"), None, headers)
        assert reply.status == status, reply
        assert (await ask(server, "GET", poll_target("news", token=GOOD), None, headers)).status == 200


async def test_the_url_is_for_polls(side: str, access: AccessFile) -> None:
    """What changes something is not asked for by a link."""
    async with running(access=access.write()) as server:
        secret = token("news", publish=["news"])
        for method, target, body in (
            ("POST", f"/publish?token={secret}", {"channels": ["news"], "data": 1}),
            ("GET", f"/channels?token={ALL}", None),
            ("GET", f"/channels/news?token={ALL}", None),
            ("DELETE", f"/channels/news?token={ALL}", None),
        ):
            assert_unauthorized(await ask(server, method, target, body, side), NEEDS)


# Expiry


async def poll_until_refused(client: Client, secret: str, start: int) -> Reply:
    """Poll as a client does, until there is something or an error."""
    while True:
        reply = await say(client, "GET", poll_target("news", start=start, hold=60), None, bearer(secret))
        if reply.status != 200 or reply.json["messages"]:
            return reply
        start = reply.json["next"]


async def test_a_token_that_expires_while_its_poll_waits(side: str, access: AccessFile) -> None:
    """The poll ends with 401 then, and the cursor goes on with a new token: nothing is lost."""
    async with running(access=access.write()) as server:
        first = await publish(server, "news")
        secret = token("news", life=0.5)
        end = time() + 0.5
        reply = await ask(server, "GET", poll_target("news", hold=60), None, bearer(secret) + side)
        assert [message["id"] for message in reply.json["messages"]] == [first]
        cursor = reply.json["next"]
        reply = await ask(server, "GET", poll_target("news", start=cursor, hold=60), None, bearer(secret) + side)
        assert end <= time() < end + 1
        assert_unauthorized(reply, "the token expired while the poll waited", "token_expired")
        later = [await publish(server, "news") for _ in range(3)]
        again = await ask(server, "GET", poll_target("news", start=cursor, hold=60), None, bearer(secret) + side)
        assert_unauthorized(again, "the token has expired", "token_expired")
        new = bearer(token("news")) + side
        reply = await ask(server, "GET", poll_target("news", start=cursor, hold=60), None, new)
        assert [message["id"] for message in reply.json["messages"]] == later


async def test_messages_just_before_a_token_expires(side: str, access: AccessFile) -> None:
    """They are delivered, until the very end; what came too late for that is had with a new token."""
    async with running(access=access.write()) as server:
        secret = token("news", life=0.5)
        said: list[int] = []
        heard: list[int] = []
        cursor = 0

        async def publish_on() -> None:
            while True:
                said.append(await publish(server, "news"))
                await asyncio.sleep(0.005)

        publishing = asyncio.create_task(publish_on())
        while True:
            reply = await ask(server, "GET", poll_target("news", start=cursor, hold=60), None, bearer(secret) + side)
            if reply.status != 200:
                break
            heard += [message["id"] for message in reply.json["messages"]]
            cursor = reply.json["next"]
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        assert reply.json["code"] == "token_expired"
        assert heard == said[: len(heard)]
        assert len(heard) > 1
        reply = await ask(server, "GET", poll_target("news", start=cursor), None, bearer(token("news")) + side)
        heard += [message["id"] for message in reply.json["messages"]]
        assert heard[: len(said)] == said


async def test_a_poll_ends_before_its_token(side: str, access: AccessFile) -> None:
    """A time-out is a time-out."""
    async with running(access=access.write()) as server:
        reply = await ask(server, "GET", poll_target("news", hold=0.05), None, bearer(token("news")) + side)
        assert (reply.status, reply.json["messages"]) == (200, [])


async def test_as_many_polls_as_a_token_may_have(side: str, access: AccessFile) -> None:
    """One more is refused with 429; when one has left, its place is free; other tokens have their own."""
    async with running(access=access.write(), polls_per_token_max=2) as server:
        async with connected(server) as one, connected(server) as two:
            secret = token("news", sub="42")
            target = poll_target("news", hold=60)
            for client in (one, two):
                client.send(request_bytes("GET", target, None, f"{bearer(secret)}{side}"))
            await parked(server, 2)
            same = token("news", sub="42", jti="2")
            for other in (secret, same):
                reply = await ask(server, "GET", target, None, bearer(other) + side)
                assert (reply.status, reply.json["code"]) == (429, "too_many_polls")
                assert reply.headers["retry-after"] == "1"
            reply = await ask(server, "GET", poll_target("news"), None, bearer(token("news", sub="43")) + side)
            assert reply.status == 200
        await parked(server, 0)
        assert (await ask(server, "GET", poll_target("news"), None, bearer(secret) + side)).status == 200


# Rotation


async def test_keys_are_changed_without_a_pause(side: str, access: AccessFile) -> None:
    """With a reload the new one works, then the old one does not; polls that wait go on."""
    old, new = make_key(), make_key()
    every = ["publish", "manage", "subscribe"]
    body = {"channels": ["news"], "data": 1}

    async def works(secret: str) -> bool:
        reply = await ask(server, "POST", "/publish", body, bearer(secret) + side)
        polled = await ask(server, "GET", poll_target("other"), None, bearer(secret) + side)
        assert (reply.status, polled.status) in ((201, 200), (401, 401))
        return reply.status == 201

    async with running(access=access.write(key("old", old, every))) as server, connected(server) as client:
        assert (await works(old), await works(new)) == (True, False)
        access.write(key("old", old, every) + key("new", new, every))
        assert (await works(old), await works(new)) == (True, False)
        server.reload()
        assert (await works(old), await works(new)) == (True, True)
        target = poll_target("news", start="latest", hold=60)
        client.send(request_bytes("GET", target, None, f"{bearer(old)}{side}"))
        await parked(server, 1)
        access.write(key("new", new, every))
        server.reload()
        assert server.node.parked == 1
        assert (await works(old), await works(new)) == (False, True)
        reply = await client.reply()
        assert reply.status == 200
        assert len(reply.json["messages"]) == 1
        assert_unauthorized(await ask(server, "GET", target, None, bearer(old) + side))


BROKEN = {
    "no TOML": "[realms",
    "no rules": "",
    "another realm only": '[realms.two]\nsubscribe = "open"\n',
    "a hash that is none": '[realms.default]\nsubscribe = "open"\n[[realms.default.keys]]\nname = "a"\nhash = "x"\n',
    "a secret that is not there": '[realms.default.tokens]\nsecret_file = "/nowhere/secret"\n',
    "a setting that no realm has": '[realms.default]\nsubscribe = "open"\n[realms.default.settings]\nlisten = "x"\n',
    "a setting that is wrong": '[realms.default]\nsubscribe = "open"\n[realms.default.settings]\nlinger = -1\n',
    "a second realm that is wrong": '[realms.default]\nsubscribe = "open"\n[realms.two]\n',
    "a second realm's tokens": '[realms.default]\nsubscribe = "open"\n[realms.two.tokens]\nsecret_file = "/nowhere"\n',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
async def test_a_broken_file_changes_nothing(text: str, access: AccessFile, caplog: pytest.LogCaptureFixture) -> None:
    """It is said in the log, and everybody may what he might."""
    async with running(access=access.write()) as server:
        access.path.write_text(text)
        server.reload()
        assert [record.getMessage() for record in caplog.records] == ["cannot reload"]
        assert (await ask(server, "GET", poll_target("news"), None, bearer(READER))).status == 200
        assert (await ask(server, "GET", poll_target("news"), None, bearer(GOOD))).status == 200
        assert_unauthorized(await ask(server, "GET", poll_target("news")), NEEDS)


@pytest.mark.parametrize("trouble", ["gone", "no text", "a folder"])
async def test_a_file_that_cannot_be_read_changes_nothing(trouble: str, access: AccessFile) -> None:
    """The same for a file that is being replaced."""
    async with running(access=access.write()) as server:
        access.path.unlink()
        if trouble == "no text":
            access.path.write_bytes(b"\xff\xfe")
        elif trouble == "a folder":
            access.path.mkdir()
        server.reload()
        assert (await ask(server, "GET", poll_target("news"), None, bearer(READER))).status == 200
        assert_unauthorized(await ask(server, "GET", poll_target("news")), NEEDS)


async def test_a_reload_opens_and_closes_a_realm(side: str, access: AccessFile) -> None:
    """Also on a connection that has polled before, whose request the lane remembers."""
    async with running(access=access.write(subscribe="open")) as server, connected(server) as client:

        async def speak(method: str, target: str, body: Any, headers: str) -> Reply:
            # What is handed over for good ends its connection.
            if side == CHUNKED:
                return await ask(server, method, target, body, headers)
            return await say(client, method, target, body, headers)

        for _ in range(2):
            assert (await speak("GET", poll_target("news"), None, side)).status == 200
        access.write()
        server.reload()
        for _ in range(2):
            assert_unauthorized(await speak("GET", poll_target("news"), None, side), NEEDS)
        access.write(subscribe="open")
        server.reload()
        assert (await speak("GET", poll_target("news"), None, side)).status == 200


# The lane's memory of parsed requests


async def test_the_memory_gives_nobody_the_rights_of_another(access: AccessFile) -> None:
    """Every mix of a request line and header fields is judged by itself, remembered or not."""
    fields = {
        "good": bearer(GOOD),
        "other": bearer(OTHER),
        "nobody": "",
        "wrong": bearer("x"),
        "cookie": f"Cookie: pushup_token={GOOD}\r\n",
        "foreign": f"Cookie: pushup_token={GOOD}\r\nOrigin: https://evil.example\r\n",
    }
    lines = {
        "news": poll_target("news"),
        "other": poll_target("other"),
        "both": poll_target("news", "other"),
        "news by url": poll_target("news", token=GOOD),
        "other by url": poll_target("other", token=OTHER),
        "swapped": poll_target("news", token=OTHER),
        "wrong": poll_target("news", token="x"),
    }
    reads = {"good": {"news"}, "other": {"other"}, "nobody": None, "wrong": None, "cookie": {"news"}, "foreign": None}
    wanted = {"news": {"news"}, "other": {"other"}, "both": {"news", "other"}, "news by url": {"news"}}
    wanted |= {"other by url": {"other"}, "swapped": {"news"}, "wrong": {"news"}}
    in_url: dict[str, set[str] | None] = {"news by url": {"news"}, "other by url": {"other"}, "swapped": {"other"}}
    in_url["wrong"] = None

    def expected(line: str, field: str) -> int:
        may = reads[field] if field in ("good", "other", "wrong") or line not in in_url else in_url[line]
        return 401 if may is None else 200 if wanted[line] <= may else 403

    async with running(access=access.write()) as server, connected(server) as client:
        cases = [(line, field) for line in lines for field in fields]
        for line, field in cases + cases[::-1] + sorted(cases, key=lambda case: case[1]) + cases:
            reply = await say(client, "GET", lines[line], None, fields[field])
            assert reply.status == expected(line, field), (line, field)


async def test_the_memory_outlives_no_right(access: AccessFile) -> None:
    """A request that was let in is not let in after a reload, nor after its token has expired."""
    mine = make_key()
    short = token("news", life=0.3)
    async with running(access=access.write(key("mine", mine, ["subscribe"]))) as server, connected(server) as client:
        for secret in (mine, short, mine, short):
            assert (await say(client, "GET", poll_target("news"), None, bearer(secret))).status == 200
        access.write(key("mine", make_key(), ["subscribe"]))
        server.reload()
        assert_unauthorized(await say(client, "GET", poll_target("news"), None, bearer(mine)))
        access.write(key("mine", mine, ["subscribe"], ["other"]))
        server.reload()
        assert (await say(client, "GET", poll_target("news"), None, bearer(mine))).status == 403
        reply = await poll_until_refused(client, short, 0)
        assert reply.json["code"] == "token_expired"
        assert (await say(client, "GET", poll_target("news"), None, bearer(short))).json["code"] == "token_expired"


async def test_requests_ahead_of_an_answer_have_their_own_senders(access: AccessFile) -> None:
    """Of a proxy's connection: who asks next is not who asked before, in whatever segments they come."""
    async with running(access=access.write()) as server:
        requests = [
            f"GET {poll_target(channel)} HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode()
            for channel in ("news", "other")
            for headers in (bearer(GOOD), "", bearer(OTHER), "", f"Cookie: pushup_token={GOOD}\r\n")
        ]
        wanted = [200, 401, 403, 401, 200, 403, 401, 200, 401, 403]
        for size in (1, 7, 100, 10_000):
            data = b"".join(requests)
            pipe = pipes.lane(server)
            got = await pipe.receive(*(data[at : at + size] for at in range(0, len(data), size)))
            assert [response.status for response in got] == wanted
            pipe.hang_up()


# Idempotency keys


async def test_a_browser_takes_no_idempotency_key_from_a_back_end(side: str, access: AccessFile) -> None:
    """A visitor who guesses the next key does not have the back end's publication refused, nor learns of used ones."""
    async with running(access=access.write()) as server:
        browser, back_end = bearer(token(publish=["chat.*"])) + side, bearer(ALL) + side
        for key, first, second in (("order-1", browser, back_end), ("order-2", back_end, browser)):
            for who in (first, second):
                body = {"channels": ["chat.1"], "data": "of the visitor" if who is browser else "paid", "key": key}
                reply = await ask(server, "POST", "/publish", body, who)
                assert (reply.status, "duplicate" in reply.json) == (201, False)


# Secrets stay secret


async def test_nothing_of_credentials_gets_out(side: str, access: AccessFile, caplog: pytest.LogCaptureFixture) -> None:
    """Not into the log at any level, nor into an answer, over everything that can happen to them."""
    caplog.set_level(logging.DEBUG)
    wrong_key, wrong_token, expired = make_key(), GOOD[:-4] + "AAAA", token("news", life=0)
    secrets = [ALL, PUBLISHER, READER, GOOD, wrong_key, wrong_token, expired, SECRET.decode()]
    answers = []
    async with running(access=access.write()) as server:
        for secret in secrets:
            for method, target, body in (*OPERATIONS.values(), ("POST", "/publish", b"{"), ("GET", "/nowhere", None)):
                answers.append(await ask(server, method, target, body, bearer(secret) + side))
            for more in (f"&token={secret}", f"&token={secret}&token={secret}", f"&tokens={secret}&token={GOOD}"):
                answers.append(await ask(server, "GET", poll_target("news") + more, None, side))
            answers.append(
                await ask(server, "GET", poll_target("news"), None, f"Cookie: pushup_token={secret}\r\n{side}")
            )
        access.path.write_text(f'[realms.default]\nsubscribe = "open"\n{key("all", ALL, ["publish"])}hash = "{ALL}"\n')
        server.reload()
        access.path.write_text(f'[realms.default]\n[[realms.default.keys]]\nname = "all"\nhash = "{ALL}"\n')
        server.reload()
        async with connected(server, admin=True) as client:
            answers += [await client.get("/metrics"), await client.get("/nodes")]
    said = caplog.text + repr([vars(record) for record in caplog.records])
    shown = "".join(repr((answer.headers, answer.body)) for answer in answers)
    assert [secret for secret in secrets if secret in said or secret in shown] == []
    assert "cannot reload" in said


async def test_refusals_are_counted(side: str, access: AccessFile) -> None:
    """By their code."""
    async with running(access=access.write()) as server:
        await ask(server, "GET", poll_target("news"), None, side)
        await ask(server, "GET", poll_target("secret"), None, bearer(GOOD) + side)
        await ask(server, "GET", poll_target("news"), None, bearer(token("news", life=0)) + side)
        counted = server.metrics.refused
        assert (counted["unauthorized"], counted["forbidden"], counted["token_expired"]) == (1, 1, 1)


async def test_a_poll_of_a_stranger_parks_nothing(side: str, access: AccessFile) -> None:
    """Not even a watched channel is left of it."""
    async with running(access=access.write()) as server:
        for headers in ("", bearer("x"), bearer(GOOD)):
            reply = await ask(server, "GET", poll_target("secret", hold=60), None, headers + side)
            assert reply.status in (401, 403)
        assert (server.node.parked, server.node.watched) == (0, 0)


@asynccontextmanager
async def chunked(server: Server, target: str, headers: str) -> AsyncIterator[Client]:
    """A POST whose body comes in chunks, of which none has come yet."""
    async with connected(server) as client:
        client.send(f"POST {target} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n{headers}\r\n")
        yield client


@pytest.mark.parametrize("target", ["/publish", "/poll", "/channels", "/channels/news/renew"])
async def test_a_stranger_is_told_before_his_body_comes(target: str, access: AccessFile) -> None:
    """Nobody has a body read who is not let in."""
    async with running(access=access.write()) as server:
        for headers in ("", bearer("x")):
            async with chunked(server, target, headers) as client:
                assert_unauthorized(await client.reply(), NOT_GOOD if headers else NEEDS)


async def test_chunked_bodies_of_those_who_may(access: AccessFile) -> None:
    """The web side by itself lets in the same."""
    async with running(access=access.write()) as server:
        for target, secret, body, status in (
            ("/publish", PUBLISHER, {"channels": ["news"], "data": 1}, 201),
            ("/publish", READER, {"channels": ["news"], "data": 1}, 403),
            ("/poll", READER, {"channels": ["news"], "timeout": 0}, 200),
            ("/poll", PUBLISHER, {"channels": ["news"], "timeout": 0}, 403),
            ("/channels", MANAGER, {"name": "orders.2"}, 201),
            ("/channels", MANAGER, {}, 403),
        ):
            async with chunked(server, target, bearer(secret)) as client:
                data = json.dumps(body).encode()
                client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
                assert (await client.reply()).status == status


# The two sides say the same


SHOWN = {
    "none": "",
    "a key": bearer(ALL),
    "a key for something else": bearer(PUBLISHER),
    "a token": bearer(GOOD),
    "an expired token": bearer(token("news", life=-5)),
    "wrong": bearer("x"),
    "Basic": "Authorization: Basic eDp5\r\n",
    "nothing": "Authorization:\r\n",
    "no text": "Authorization: Bearer \xff\r\n",
    "two": bearer(GOOD) * 2,
    "a cookie": f"Cookie: pushup_token={GOOD}\r\n",
}
PAGES = {
    "none": "",
    "foreign": "Origin: https://evil.example\r\n",
    "ours": "Origin: http://test\r\n",
    "allowed": "Origin: https://app.example\r\n",
    "null": "Origin: null\r\n",
    "two": "Origin: http://test\r\nOrigin: https://evil.example\r\n",
    "nothing": "Origin:\r\n",
    "no text": "Origin: \xff\r\n",
}
ASKED: list[tuple[str, str, str]] = [
    ("GET", poll_target("news"), ""),
    ("HEAD", poll_target("news"), ""),
    ("POST", "/poll", '{"channels":["news"],"timeout":0}'),
    ("POST", "/poll", "{"),
    ("POST", "/poll?a=b", '{"channels":["news"]}'),
    ("GET", poll_target("other"), ""),
    ("GET", poll_target("news", token=GOOD), ""),
    ("GET", poll_target("news", token="\xff"), ""),
    ("GET", poll_target("%41\xff"), ""),
    ("GET", "/poll?x=1", ""),
    ("GET", "/realms/default" + poll_target("news"), ""),
    ("GET", "/realms/%64efault" + poll_target("news"), ""),
    ("GET", "/realms/nowhere" + poll_target("news"), ""),
]


async def answer_of(pipe: pipes.Pipe, request: bytes) -> tuple[int, dict[str, str], Any]:
    """Status, header fields and body, without what depends on the moment."""
    (response,) = await pipe.receive(request)
    pipe.hang_up()
    await pipe.settle()
    headers = {name: value for name, value in response.headers.items() if name != "date"}
    return response.status, headers, re.sub(rb'"next":\d+', b"", response.body)


@pytest.mark.parametrize("origins", ["", "https://app.example", "*"])
@pytest.mark.parametrize("subscribe", ["open", "token"])
async def test_both_sides_say_the_same(subscribe: str, origins: str, access: AccessFile) -> None:
    """Of every mix of credentials, page and poll: status, header fields and body."""
    flags = {"cors_origins": origins} if origins else {}
    different = []
    statuses = set()
    async with running(access=access.write(subscribe=subscribe), **flags) as server:
        for shown, page, (method, target, body) in itertools.product(SHOWN, PAGES, ASKED):
            headers = SHOWN[shown] + PAGES[page] + (f"Content-Length: {len(body)}\r\n" if body else "")
            request = f"{method} {target} HTTP/1.1\r\nHost: test\r\n{headers}\r\n{body}".encode("latin-1")
            one = await answer_of(pipes.lane(server), request)
            other = await answer_of(pipes.aiohttp(server), request)
            statuses.add(one[0])
            if one != other:
                different.append((shown, page, method, target, one, other))
    assert different == []
    assert statuses >= {200, 400, 401}


# Key sets


@asynccontextmanager
async def by_key_set(access: AccessFile, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Server, KeyServer]]:
    """A server whose tokens are by a key set behind a URL, which may be asked ten times a second."""
    monkeypatch.setattr("pushup.tokens.JWKS_PAUSE_S", 0.1)
    monkeypatch.setattr("pushup.tokens.JWKS_TIMEOUT_S", 2.0)
    async with key_server() as keys:
        keys.publish(ed_jwk(ed_key(), "a"))
        access.path.write_text(
            f'[realms.default]\n{KEYS}[realms.default.tokens]\njwks_url = "{keys.url}"\naudience = "push"\n'
        )
        async with running(access=access.path) as server:
            yield server, keys


async def pause() -> None:
    """Until the key set may be asked for again, by the clock that the server has."""
    end = time() + 0.15
    while time() < end:
        await asyncio.sleep(0.01)


async def test_a_key_set_is_had_before_the_first_poll(
    side: str, access: AccessFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tokens at once are judged by it, and it is not asked for again."""
    async with by_key_set(access, monkeypatch) as (server, keys):
        tokens = [token_by(ed_key(), "a", sub=str(number)) for number in range(20)]
        polls = [ask(server, "GET", poll_target("news"), None, bearer(each) + side) for each in tokens]
        assert {reply.status for reply in await asyncio.gather(*polls)} == {200}
        assert keys.requests == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_a_new_key_of_a_set(method: str, side: str, access: AccessFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first token waits for the set to be fetched, also on a connection that the lane serves."""
    target = poll_target("news") if method != "POST" else "/poll"
    body = None if method != "POST" else {"channels": ["news"], "timeout": 0}
    async with by_key_set(access, monkeypatch) as (server, keys), connected(server) as client:
        assert (await ask(server, method, target, body, bearer(token_by(ed_key(), "a")) + side)).status == 200
        keys.publish(ed_jwk(ed_key("b"), "b"))
        await pause()
        new, old = bearer(token_by(ed_key("b"), "b")) + side, bearer(token_by(ed_key(), "a")) + side
        assert (await say(client, method, target, body, new)).status == 200
        assert keys.requests == 2
        assert (await ask(server, method, target, body, old)).status == 401
        assert (await ask(server, method, target, body, new)).status == 200


async def test_many_tokens_of_a_new_key_at_once(side: str, access: AccessFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them wait for the one fetch, and back ends do not."""
    async with by_key_set(access, monkeypatch) as (server, keys):
        keys.stall()
        await pause()
        polls = [
            asyncio.create_task(
                ask(
                    server, "GET", poll_target("news"), None, bearer(token_by(ed_key("b"), "b", sub=str(number))) + side
                )
            )
            for number in range(10)
        ]
        await eventually(lambda: keys.requests == 2, "the key set is asked for")
        assert (await ask(server, "GET", poll_target("news"), None, bearer(READER) + side)).status == 200
        assert (
            await ask(server, "GET", poll_target("news"), None, bearer(token_by(ed_key(), "a")) + side)
        ).status == 200
        keys.release(jwks(ed_jwk(ed_key(), "a"), ed_jwk(ed_key("b"), "b")))
        assert {reply.status for reply in await asyncio.gather(*polls)} == {200}
        assert keys.requests == 2


async def test_a_server_starts_without_its_key_set(
    side: str, access: AccessFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens have to wait, with a 503 that says for how long; keys work, and the set is had as soon as it can be."""
    monkeypatch.setattr("pushup.tokens.JWKS_PAUSE_S", 0.1)
    async with key_server() as keys:
        keys.serve(b"", status=500)
        access.path.write_text(
            f'[realms.default]\n{KEYS}[realms.default.tokens]\njwks_url = "{keys.url}"\naudience = "push"\n'
        )
        async with running(access=access.path) as server:
            mine = bearer(token_by(ed_key(), "a")) + side
            reply = await ask(server, "GET", poll_target("news"), None, mine)
            assert (reply.status, reply.json["code"]) == (503, "unavailable")
            assert "retry-after" in reply.headers
            assert (await ask(server, "GET", poll_target("news"), None, bearer(READER) + side)).status == 200
            assert_unauthorized(await ask(server, "GET", poll_target("news"), None, side), NEEDS)
            keys.publish(ed_jwk(ed_key(), "a"))
            await pause()
            assert (await ask(server, "GET", poll_target("news"), None, mine)).status == 200


async def test_who_waits_for_a_key_set_when_the_server_stops(
    access: AccessFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is answered, as soon as it is known that it cannot be had; and nothing is left."""
    async with AsyncExitStack() as outside:
        keys = await outside.enter_async_context(key_server())
        keys.publish(ed_jwk(ed_key(), "a"))
        monkeypatch.setattr("pushup.tokens.JWKS_PAUSE_S", 0.1)
        monkeypatch.setattr("pushup.tokens.JWKS_TIMEOUT_S", 0.3)
        access.path.write_text(
            f'[realms.default]\n{KEYS}[realms.default.tokens]\njwks_url = "{keys.url}"\naudience = "push"\n'
        )
        async with running(access=access.path) as server:
            client = await outside.enter_async_context(connected(server))
            keys.stall()
            await pause()
            client.send(request_bytes("GET", poll_target("news"), None, bearer(token_by(ed_key("b"), "b"))))
            await eventually(lambda: keys.requests == 2, "the key set is asked for")
        assert (await client.reply()).status == 401
