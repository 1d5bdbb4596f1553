"""Several realms on one node: nothing of one is seen, counted or used up in another, not even that it is there."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any
from uuid import uuid4

import pytest

from pushup.access import hash_key, make_key
from pushup.errors import SettingsError
from pushup.server import Server
from tests import pipes
from tests.redis_server import RedisServer
from tests.support import Client, Reply, connected, eventually, running
from tests.test_tokens import hs256, make_token

DATE = re.compile(rb"\r\nDate: [^\r]*", re.IGNORECASE)


@dataclass
class Tenant:
    """A realm, with what its people have."""

    name: str
    secret: bytes
    key: str = field(default_factory=make_key)
    prefix: str = ""

    @property
    def bearer(self) -> str:
        return f"Authorization: Bearer {self.key}\r\n"

    def token(self, *channels: str | int, **claims: Any) -> str:
        pushup = {"subscribe": channels}
        return make_token({"exp": time() + 3600, "pushup": pushup, **claims}, hs256(self.secret))

    def bearer_token(self, *channels: str | int, **claims: Any) -> str:
        return f"Authorization: Bearer {self.token(*channels, **claims)}\r\n"


class World:
    """Three realms, the first of them at the root, and what a node is started with to serve them."""

    def __init__(self, folder: Path, broker: str) -> None:
        suffix = uuid4().hex[:8]
        self.folder = folder
        self.tenants = tuple(
            Tenant(f"{name}-{suffix}", secret=f"{name}-".encode() * 10) for name in ("one", "two", "six")
        )
        self.one, self.two, self.six = self.tenants
        for tenant in self.tenants[1:]:
            tenant.prefix = f"/realms/{tenant.name}"
        self.absent = f"ten-{suffix}"
        """No realm, but a name like the others."""
        self._broker = broker
        self._file = folder / "access.toml"

    def flags(self, settings: Mapping[str, str] | None = None, tokens: str = "", **more: Any) -> dict[str, Any]:
        """The settings of a node; `settings` are lines for realms, by name."""
        parts = []
        for tenant in self.tenants:
            secret = self.folder / f"secret-{tenant.name}"
            secret.write_bytes(tenant.secret)
            parts.append(
                f'[realms.{tenant.name}]\n[[realms.{tenant.name}.keys]]\nname = "backend"\n'
                f'hash = "{hash_key(tenant.key)}"\nactions = ["publish", "manage", "subscribe"]\n'
                f'[realms.{tenant.name}.tokens]\nsecret_file = "{secret}"\n{tokens}\n'
                f"[realms.{tenant.name}.settings]\n{(settings or {}).get(tenant.name, '')}\n"
            )
        self._file.write_text("".join(parts))
        return {"realm": self.one.name, "access": self._file, "broker": self._broker, **more}

    def edit(self, change: Callable[[str], str]) -> None:
        """Write the access file anew."""
        self._file.write_text(change(self._file.read_text()))


@pytest.fixture(params=["memory", "redis"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """Realms by the built-in broker, and by a real Redis."""
    if request.param == "memory":
        return World(tmp_path, "memory://")
    redis: RedisServer = request.getfixturevalue("redis_server")
    return World(tmp_path, redis.url)


@pytest.fixture
def memory_world(tmp_path: Path) -> World:
    return World(tmp_path, "memory://")


async def ask(server: Server, tenant: Tenant, method: str, path: str, body: Any = None) -> Reply:
    """One request of the realm's own back end."""
    async with connected(server) as client:
        return await client.request(method, tenant.prefix + path, body, tenant.bearer)


async def publish(server: Server, tenant: Tenant, *channels: str | int, data: Any = None) -> int:
    reply = await ask(server, tenant, "POST", "/publish", {"channels": channels, "data": data})
    assert reply.status == 201, reply
    return int(reply.json["id"])


async def poll(server: Server, tenant: Tenant, *channels: str | int, start: int | str = 0, hold: float = 0) -> Any:
    reply = await ask(server, tenant, "GET", poll_path(*channels, start=start, hold=hold))
    assert reply.status == 200, reply
    return reply.json


def poll_path(*channels: str | int, start: int | str = 0, hold: float = 0) -> str:
    names = "".join(f"channel={channel}&" for channel in channels)
    return f"/poll?{names}start={start}&timeout={hold}"


def heard(answer: Any) -> list[Any]:
    return [message["data"] for message in answer["messages"]]


def parked(server: Server) -> dict[str, int]:
    """How many polls wait, by the beginning of the realm's name."""
    return {name[:3]: realm.node.parked for name, realm in server.service.realms.items()}


@asynccontextmanager
async def waiting(server: Server, *tenants: Tenant, start: int | str = "latest") -> AsyncIterator[list[Client]]:
    """A poll for the channel `a` in each of the realms, parked."""
    before = sum(parked(server).values())
    async with AsyncExitStack() as stack:
        clients = []
        for tenant in tenants:
            client = await stack.enter_async_context(connected(server))
            path = poll_path("a", start=start, hold=60)
            client.send(f"GET {tenant.prefix}{path} HTTP/1.1\r\nHost: test\r\n{tenant.bearer}\r\n")
            clients.append(client)
        await eventually(lambda: sum(parked(server).values()) == before + len(tenants), "the polls are parked")
        yield clients


# Channels, ids, cursors


async def test_a_name_in_two_realms_is_two_channels(world: World) -> None:
    """What is said in one is heard in one, at once and later, and closed in one."""
    async with running(**world.flags()) as server:
        for tenant in world.tenants:
            await publish(server, tenant, "a", data=tenant.name)
        for tenant in world.tenants:
            assert heard(await poll(server, tenant, "a")) == [tenant.name]
        async with waiting(server, *world.tenants) as clients:
            await publish(server, world.two, "a", data="two again")
            assert heard((await clients[1].reply()).json) == ["two again"]
            assert parked(server) == {"one": 1, "two": 0, "six": 1}
        assert (await ask(server, world.two, "DELETE", "/channels/a")).status == 204
        assert (await ask(server, world.two, "GET", "/channels/a")).status == 404
        for tenant in (world.one, world.six):
            info = (await ask(server, tenant, "GET", "/channels/a")).json
            assert info["messages"] == 1
            assert heard(await poll(server, tenant, "a")) == [tenant.name]


async def test_the_own_realm_has_a_name_too(world: World) -> None:
    """The root is the realm that the settings name, under its name as well."""
    async with running(**world.flags()) as server, connected(server) as client:
        id = await publish(server, world.one, "a")
        for target in (poll_path("a"), f"/realms/{world.one.name}{poll_path('a')}"):
            reply = await client.request("GET", target, None, world.one.bearer)
            assert [message["id"] for message in reply.json["messages"]] == [id]


async def test_integer_channels_mean_nothing_elsewhere(world: World) -> None:
    """In another realm one is as unknown as a number that was never handed out, whatever is done with it."""
    async with running(**world.flags()) as server:
        made = (await ask(server, world.one, "POST", "/channels", {})).json["channel"]
        await publish(server, world.one, made)
        never = made - 1_000_000
        for method, path, body in (
            ("GET", "/channels/CHANNEL", None),
            ("DELETE", "/channels/CHANNEL", None),
            ("POST", "/channels/CHANNEL/renew", {}),
            ("POST", "/publish", {"channels": ["CHANNEL"], "data": 1}),
            ("GET", poll_path("CHANNEL"), None),
        ):
            answers = []
            for channel in (str(made), str(never)):
                data = None if body is None else json.dumps(body).replace("CHANNEL", channel).encode()
                reply = await ask(server, world.two, method, path.replace("CHANNEL", channel), data)
                answers.append((reply.status, reply.body.replace(channel.encode(), b"")))
            assert answers[0] == answers[1]
            assert answers[0][0] == 404
        assert len((await poll(server, world.one, made))["messages"]) == 1


async def test_a_cursor_means_nothing_elsewhere(world: World) -> None:
    """It is a number like any other: the answer is made of the realm's own messages."""
    async with running(**world.flags()) as server:
        before = [await publish(server, world.two, "a", data=number) for number in range(3)]
        await publish(server, world.one, "a", data="one")
        cursor = (await poll(server, world.one, "a"))["next"]
        later = await publish(server, world.two, "a", data="later")
        answer = await poll(server, world.two, "a", start=cursor)
        assert [message["id"] for message in answer["messages"]] == [id for id in (*before, later) if id >= cursor]
        assert answer["gap"] is False
        same = await poll(server, world.two, "a", start=before[0])
        assert heard(same) == [0, 1, 2, "later"]


async def test_an_idempotency_key_means_nothing_elsewhere(world: World) -> None:
    """The same key of two tenants is two publications."""
    async with running(**world.flags()) as server:
        ids = set()
        for tenant in world.tenants:
            body = {"channels": ["a"], "data": tenant.name, "key": "order-1"}
            reply = await ask(server, tenant, "POST", "/publish", body)
            assert (reply.status, "duplicate" in reply.json) == (201, False)
            ids.add(reply.json["id"])
            assert (await ask(server, tenant, "POST", "/publish", body)).json["duplicate"] is True
            assert heard(await poll(server, tenant, "a")) == [tenant.name]


async def test_a_listing_is_of_one_realm(world: World) -> None:
    """Names of others' channels are in none."""
    async with running(**world.flags()) as server:
        for tenant in world.tenants:
            await publish(server, tenant, f"of-{tenant.name}")
        for tenant in world.tenants:
            reply = await ask(server, tenant, "GET", "/channels")
            assert [info["channel"] for info in reply.json["channels"]] == [f"of-{tenant.name}"]


async def test_two_nodes_share_each_realm(tmp_path: Path, redis_server: RedisServer) -> None:
    """Over Redis a message reaches its realm's polls on the other node, and no others."""
    world = World(tmp_path, redis_server.url)
    flags = world.flags()
    async with running(**flags) as here, running(**flags) as there, waiting(there, *world.tenants) as clients:
        await publish(here, world.six, "a", data="six")
        assert heard((await clients[2].reply()).json) == ["six"]
        assert parked(there) == {"one": 1, "two": 1, "six": 0}
    with redis_server.client() as client:
        names = {name.decode() for tenant in world.tenants for name in client.keys(f"*{tenant.name}*")}
    assert names
    assert [
        name for name in names if not name.startswith(tuple(f"pushup:{{{each.name}}}" for each in world.tenants))
    ] == []


# Credentials


async def test_credentials_of_one_realm_are_unknown_in_another(world: World) -> None:
    """401, and never 403: whose they are is not told. In every form, on both sides."""
    async with running(**world.flags()) as server:
        for tenant in world.tenants:
            await publish(server, tenant, "a")
        for tenant in world.tenants:
            for stranger in world.tenants:
                token = stranger.token("a")
                cases = [
                    ("GET", poll_path("a"), None, stranger.bearer),
                    ("GET", poll_path("a"), None, f"Authorization: Bearer {token}\r\n"),
                    ("GET", f"{poll_path('a')}&token={token}", None, ""),
                    ("GET", poll_path("a"), None, f"Cookie: pushup_token={token}\r\n"),
                    ("GET", poll_path("a"), None, f"{stranger.bearer}Content-Encoding: identity\r\n"),
                    ("POST", "/poll", {"channels": ["a"]}, stranger.bearer),
                    ("GET", "/channels/a", None, stranger.bearer),
                    ("POST", "/publish", {"channels": ["b"], "data": 1}, stranger.bearer),
                ]
                for method, path, body, headers in cases:
                    async with connected(server) as client:
                        reply = await client.request(method, tenant.prefix + path, body, headers)
                    if stranger is tenant:
                        assert reply.status in (200, 201), (path, headers)
                    else:
                        assert (reply.status, reply.json["code"]) == (401, "unauthorized"), (path, headers)


async def test_one_token_by_a_secret_of_two_realms(memory_world: World) -> None:
    """Who shares a secret between realms tells their tokens apart by the audience."""
    world = memory_world
    world.two.secret = world.one.secret
    flags = world.flags()

    def name_audiences(text: str) -> str:
        for tenant in (world.one, world.two):
            table = f"[realms.{tenant.name}.tokens]\n"
            text = text.replace(table, f'{table}audience = "{tenant.name}"\n')
        return text

    world.edit(name_audiences)
    async with running(**flags) as server, connected(server) as client:
        for tenant in (world.one, world.two):
            headers = world.one.bearer_token("a", aud=world.one.name)
            reply = await client.request("GET", tenant.prefix + poll_path("a"), None, headers)
            assert reply.status == (200 if tenant is world.one else 401)


# A realm that is not there


CREDENTIALS: dict[str, str] = {
    "none": "",
    "a wrong key": "Authorization: Bearer pushup_wrong\r\n",
    "a wrong token": "Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.eyJleHAiOjE5MDAwMDAwMDB9.AAAA\r\n",
    "the root's key": "ROOT-KEY",
    "the root's token": "ROOT-TOKEN",
    "Basic": "Authorization: Basic eDp5\r\n",
    "two": "Authorization: Bearer a\r\nAuthorization: Bearer b\r\n",
    "nothing": "Authorization:\r\n",
    "a cookie": "Cookie: pushup_token=x\r\n",
    "another cookie": "Cookie: other=x\r\n",
    "a foreign page": "Origin: https://evil.example\r\nCookie: pushup_token=x\r\n",
    "our own page": "Origin: http://test\r\nCookie: pushup_token=x\r\n",
    "no text": "Authorization: Bearer \xff\r\n",
}

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")

QUERIES = (
    "", "?", "?channel=a", "?channel=a&timeout=0", "?channel=a&timeout=60", "?chanel=a", "?channel=%zz", "?channel=",
    "?channel=a&start=x", "?channel=a&token=x", "?token=x", "?token=", "?token=a&token=b", "?channel=a&%74oken=x",
    "?channel=17", "?" + "channel=a&" * 200, "?channel=a#b", "?channel=\xff", "?token=\xff",
)  # fmt: skip

BODIES = (
    "", "{}", "{", "[]", "null", '{"channels":["a"]}', '{"channels":["a"],"data":1,"timeout":0}', "[" * 200, "\xff",
    " " * 70_000,
)  # fmt: skip

PATHS = (
    "/channels", "/channels?limit=x", "/channels/a", "/channels/%ff", "/channels/17", "/channels/", "/channels/a/renew",
    "/channels/a/b", "/publish", "/", "", "/nothing", "/../channels", "/%2e%2e/channels", "//poll", "/poll/", "/POLL",
    "/metrics", "/openapi.json",
)  # fmt: skip

REQUESTS: list[tuple[str, str, str, str]] = [
    # Method, path below the realm, further header fields, body.
    *(("GET", f"/poll{query}", "", "") for query in QUERIES),
    *((method, "/poll?channel=a&timeout=0", "", "") for method in METHODS),
    *(("POST", path, "", body) for path in ("/poll", "/publish", "/channels", "/channels/a/renew") for body in BODIES),
    *((method, path, "", "") for path in PATHS for method in METHODS),
    ("GET", "/poll?channel=a", "Content-Encoding: gzip\r\n", ""),
    ("GET", "/poll?channel=a", "Expect: 100-continue\r\n", ""),
    ("POST", "/publish", "Expect: 100-continue\r\n", "{}"),
    ("POST", "/publish", "Expect: nonsense\r\n", "{}"),
    ("POST", "/publish", "Content-Encoding: gzip\r\n", "{}"),
    ("POST", "/publish", "Idempotency-Key: a\r\nIdempotency-Key: b\r\n", "{}"),
    ("POST", "/publish", "Transfer-Encoding: chunked\r\n", "2\r\n{}\r\n0\r\n\r\n"),
    ("POST", "/publish", "Transfer-Encoding: chunked\r\n", "x\r\n"),
    ("POST", "/poll", "Transfer-Encoding: chunked\r\n", "2\r\n{}\r\n0\r\n\r\n"),
    ("GET", "/poll?channel=a", "Upgrade: websocket\r\nConnection: upgrade\r\n", ""),
    ("GET", "/poll?channel=a", "Upgrade: h2c\r\nConnection: upgrade\r\n", ""),
    ("GET", "/poll?channel=a", "Connection: close\r\n", ""),
    ("OPTIONS", "/poll", "Origin: https://evil.example\r\nAccess-Control-Request-Method: GET\r\n", ""),
    ("OPTIONS", "/publish", "Origin: http://test\r\nAccess-Control-Request-Method: POST\r\n", ""),
    ("POST", "/publish", "Origin: https://evil.example\r\n", "{}"),
    ("GET", "/poll?channel=a", "Content-Length: 5\r\n", "hello"),
    ("GET", "/poll?channel=a", "Content-Length: x\r\n", ""),
    ("GET", "/poll?channel=a", "Bad Name: x\r\n", ""),
    ("GET", "/poll?channel=a", "Long: " + "x" * 20_000 + "\r\n", ""),
    ("G\xe4T", "/poll?channel=a", "", ""),
    ("BREW", "/poll", "", ""),
]


def request_bytes(method: str, target: str, headers: str, body: str, version: str = "1.1") -> bytes:
    length = "" if not body or "Transfer-Encoding" in headers or "Content-Length" in headers else len(body)
    if length:
        headers += f"Content-Length: {length}\r\n"
    return f"{method} {target} HTTP/{version}\r\nHost: test\r\n{headers}\r\n{body}".encode("latin-1")


async def exchange(server: Server, way: str, request: bytes) -> tuple[bytes, bool, bool]:
    """What the server sends, without its `Date`; whether it closes, and whether it reads on."""
    pipe = pipes.lane(server) if way == "lane" else pipes.aiohttp(server)
    pipe.push(request)
    await pipe.settle()
    result = DATE.sub(b"", pipe.sent), pipe.closing, pipe.reading
    pipe.hang_up()
    await pipe.settle()
    return result


def escaped(name: str) -> str:
    return "".join(f"%{ord(char):02x}" for char in name)


@pytest.mark.parametrize("way", ["lane", "aiohttp"])
@pytest.mark.parametrize("credentials", CREDENTIALS)
async def test_a_realm_that_is_not_there(credentials: str, way: str, memory_world: World) -> None:
    """It answers byte for byte as one that refuses, whatever is asked, and whoever asks."""
    world = memory_world
    headers = CREDENTIALS[credentials].replace("ROOT-KEY", world.one.bearer)
    headers = headers.replace("ROOT-TOKEN", world.one.bearer_token("a"))
    async with running(**world.flags()) as server:
        for tenant in (world.two, world.six):
            await publish(server, tenant, "a")
        different, refused = [], 0
        for method, path, more, body in REQUESTS:
            for spell in (str, escaped):
                answers: list[tuple[bytes, bool, bool]] = []
                for name in (world.two.name, world.six.name, world.absent):
                    request = request_bytes(method, f"/realms/{spell(name)}{path}", headers + more, body)
                    sent, closing, reading = await exchange(server, way, request)
                    # Some answers repeat the path.
                    sent = sent.replace(name.encode(), b"").replace(escaped(name).encode(), b"")
                    answers.append((sent, closing, reading))
                refused += answers[2][0].startswith(b"HTTP/1.1 401")
                if not answers[0] == answers[1] == answers[2] or not answers[0][0]:
                    different.append((method, path, more, body, answers))
        assert different == []
        assert refused > 50


async def test_realms_that_are_not_there_leave_nothing(memory_world: World) -> None:
    """No metric, no memory, no channel: names that anybody makes up cost nothing."""
    async with running(**memory_world.flags()) as server, connected(server, admin=True) as admin:
        for number in range(50):
            for way in ("lane", "aiohttp"):
                target = f"/realms/made-up-{number}/poll?channel=a"
                await exchange(server, way, request_bytes("GET", target, "", ""))
                await exchange(server, way, request_bytes("GET", target, memory_world.one.bearer, ""))
        assert b"made-up" not in (await admin.get("/metrics")).body
        assert len(server.service.realms) == 3
        assert not server._lanes.memory._lines


ODD_NAMES = [
    "", ".", "..", "%2e", "%2e%2e", "%00", "%0a", "%ff", "\xff", "{}", "%7b%7d", "*", "a" * 64, "a" * 65, "-a",
    "_a", "a%20b", "a+b", "a;b", "a,b", "a:b", "a@b", "a=b", "a&b", "%2f", "a%2fb", "%5c", "\\", "a%252fb", "%zz", "%",
    "'", '"', "<a>", "%E2%98%83", "null", "None", "0", "default", "__class__",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_odd_names_of_realms(name: str, memory_world: World) -> None:
    """No path of that form is served, and none breaks anything."""
    world = memory_world
    async with running(**world.flags()) as server:
        await publish(server, world.one, "a", data="of one")
        for way in ("lane", "aiohttp"):
            for method, path, body in (
                ("GET", "/poll?channel=a&timeout=0", ""),
                ("GET", "/channels/a", ""),
                ("POST", "/publish", '{"channels":["a"],"data":1}'),
            ):
                sent, _, _ = await exchange(
                    server, way, request_bytes(method, f"/realms/{name}{path}", world.one.bearer, body)
                )
                status = int(sent[9:12])
                assert status in (400, 401, 404, 405), (way, path, sent)
                assert b"of one" not in sent


# Ways in


def spellings(own: str, other: str) -> list[str]:
    """Targets of a poll that try to be in the realm `other`, or that might be taken for it."""
    poll = "/poll?channel=a&start=0&timeout=0"
    ways = [
        poll,
        f"/realms/{other}{poll}",
        f"/realms/{own}/../{other}{poll}",
        f"/realms/{own}/%2e%2e/{other}{poll}",
        f"/realms/{own}/..%2f{other}{poll}",
        f"/realms/{own}%2f..%2f{other}{poll}",
        f"/realms/{own}/../../poll?channel=a&start=0&timeout=0",
        f"/realms/{own}/../..{poll}",
        f"/realms/{own}/realms/{other}{poll}",
        f"/realms/{other}/realms/{own}{poll}",
        f"/realms//{other}{poll}",
        f"//realms/{other}{poll}",
        f"/./realms/{other}{poll}",
        f"/realms/./{other}{poll}",
        f"/realms/{other}//poll?channel=a&start=0&timeout=0",
        f"/realms/{other}/./poll?channel=a&start=0&timeout=0",
        f"/realms/{other.upper()}{poll}",
        f"/REALMS/{other}{poll}",
        f"/realms/{escaped(other)}{poll}",
        f"/%72ealms/{other}{poll}",
        f"/realms%2f{other}{poll}",
        f"/realms/{other}%2fpoll?channel=a&start=0&timeout=0",
        f"/realms/{other};{own}{poll}",
        f"/realms/{other}%00{poll}",
        f"/realms/{own}%00{other}{poll}",
        f"/realms/{other}%20{poll}",
        f"/realms/{own},{other}{poll}",
        f"http://test/realms/{other}{poll}",
        f"http://{other}{poll}",
        f"http://test//realms/{other}{poll}",
        f"http://test/realms/{own}/../{other}{poll}",
        f"HTTP://TEST/realms/{other}{poll}",
        f"http://user@{other}/realms/{other}{poll}",
        f"{poll}&realm={other}",
        f"/poll?realm={other}&channel=a&start=0&timeout=0",
        f"{poll}#/realms/{other}/poll",
        f"\\realms\\{other}{poll}",
        f"/realms\\{other}{poll}",
    ]
    channels = [f"../../realms/{other}/channels/a", f"a%2f..%2f..%2frealms%2f{other}%2fchannels%2fa", f"{other}:a"]
    return ways + [f"/poll?channel={channel}&start=0&timeout=0" for channel in channels]


@pytest.mark.parametrize("way", ["lane", "aiohttp"])
async def test_no_spelling_leads_into_another_realm(way: str, memory_world: World) -> None:
    """With a key one hears one's own realm or nothing, whatever path, host or header field is sent."""
    world = memory_world
    reached = 0
    async with running(**world.flags()) as server:
        for tenant in world.tenants:
            await publish(server, tenant, "a", data=f"words of {tenant.name}")
        for tenant in world.tenants:
            for other in world.tenants:
                if other is tenant:
                    continue
                for target in spellings(tenant.name, other.name):
                    for more in ("", f"X-Realm: {other.name}\r\nX-Original-URL: /realms/{other.name}/poll\r\n"):
                        for host in ("test", other.name):
                            request = request_bytes("GET", target, tenant.bearer + more, "")
                            request = request.replace(b"Host: test", b"Host: " + host.encode())
                            sent, _, _ = await exchange(server, way, request)
                            said = [each.name for each in world.tenants if f"words of {each.name}".encode() in sent]
                            assert said in ([], [tenant.name]), target
                            assert int(sent[9:12]) < 500, target
                            reached += bool(said)
    assert reached > 0


async def test_nothing_is_published_into_another_realm(memory_world: World) -> None:
    """The same for what changes something."""
    world = memory_world
    async with running(**world.flags()) as server:
        for target in spellings(world.two.name, world.six.name):
            for path in ("/publish", "/channels"):
                body = '{"channels":["a"],"data":"intruder"}' if path == "/publish" else '{"name":"intruder"}'
                request = request_bytes("POST", re.sub(r"/?poll\?.*", path, target), world.two.bearer, body)
                for way in ("lane", "aiohttp"):
                    sent, _, _ = await exchange(server, way, request)
                    assert int(sent[9:12]) < 500, sent
        await publish(server, world.two, "b")
        for tenant in (world.one, world.six):
            assert (await ask(server, tenant, "GET", "/channels")).json["channels"] == []


# Limits and settings


async def test_one_realm_is_full(world: World) -> None:
    """Nobody else is told so."""
    async with running(**world.flags({world.two.name: "realm_bytes_max = 20000"})) as server:
        text = "x" * 8000
        publication = {"channels": ["a"], "data": text}
        replies = [await ask(server, world.two, "POST", "/publish", publication) for _ in range(5)]
        assert replies[0].status == 201
        reply = replies[-1]
        assert (reply.status, reply.json["code"]) == (503, "realm_full")
        assert "retry-after" in reply.headers
        for tenant in (world.one, world.six):
            for _ in range(5):
                await publish(server, tenant, "a", data=text)


async def test_the_keys_of_one_realm_are_exhausted(world: World) -> None:
    """The same name of a key in another realm is another key, and publishes on; so do polls go on."""
    async with running(**world.flags({world.two.name: "publish_rate_max = 1"})) as server:
        batch = [{"channels": ["a"], "data": number} for number in range(500)]
        assert (await ask(server, world.two, "POST", "/publish", batch)).status == 200
        reply = await ask(server, world.two, "POST", "/publish", batch[0])
        assert (reply.status, reply.json["code"]) == (429, "too_many_publications")
        assert int(reply.headers["retry-after"]) > 400
        for tenant in (world.one, world.six):
            assert (await ask(server, tenant, "POST", "/publish", batch)).status == 200
            await publish(server, tenant, "a")
        assert len((await poll(server, world.two, "a"))["messages"]) == 500


async def test_settings_of_one_realm(world: World) -> None:
    """Its own limits, and the node's for all others."""
    lines = (
        "message_bytes_max = 100\npoll_channels_max = 2\npublish_batch_max = 2\nchannel_window = 7\npoll_timeout = 0"
    )
    async with running(**world.flags({world.two.name: lines})) as server:
        for tenant in world.tenants:
            own = tenant is world.two
            item = {"channels": ["a"], "data": "x"}
            reply = await ask(server, tenant, "POST", "/publish", {"channels": ["a"], "data": "x" * 200})
            assert reply.status == (413 if own else 201)
            assert (await ask(server, tenant, "POST", "/publish", [item] * 3)).status == (413 if own else 200)
            reply = await ask(server, tenant, "GET", poll_path("a", "b", "c"))
            assert reply.status == (413 if own else 200)
            await publish(server, tenant, "b")
            assert (await ask(server, tenant, "GET", "/channels/b")).json["window"] == (7 if own else 300)
        reply = await ask(server, world.two, "GET", "/poll?channel=nothing")
        assert reply.json["messages"] == [], "it does not wait"


async def test_polls_of_the_same_subject_in_two_realms(memory_world: World) -> None:
    """The same person at two tenants is two."""
    world = memory_world
    async with running(**world.flags(polls_per_token_max=1)) as server:
        for tenant in world.tenants:
            async with connected(server) as client, connected(server) as second:
                path = tenant.prefix + poll_path("a", hold=60)
                headers = tenant.bearer_token("a", sub="42")
                client.send(f"GET {path} HTTP/1.1\r\nHost: test\r\n{headers}\r\n")
                await eventually(lambda: sum(parked(server).values()) == 1, "the poll is parked")
                reply = await second.request("GET", path, None, headers)
                assert reply.json["code"] == "too_many_polls"
                others = [each for each in world.tenants if each is not tenant]
                for other in others:
                    path = other.prefix + poll_path("a")
                    assert (await second.request("GET", path, None, other.bearer_token("a", sub="42"))).status == 200
            await eventually(lambda: sum(parked(server).values()) == 0, "the poll is gone")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("listen = '127.0.0.1:1'", "listen"),
        ("head_bytes_max = 1", "head_bytes_max"),
        ("realm = 'x'", "realm"),
        ("poll_timeout = -1", "poll_timeout"),
        ("no_such_thing = 1", "no_such_thing"),
        ("message_bytes_max = '1'", "message_bytes_max"),
    ],
)
async def test_settings_that_a_realm_cannot_have(line: str, said: str, memory_world: World) -> None:
    """The server does not start, and says which."""
    flags = memory_world.flags({memory_world.two.name: line})
    with pytest.raises(SettingsError) as caught:
        async with running(**flags):
            pass
    assert said in caught.value.detail
    assert str(flags["access"]) in caught.value.detail


# Operators


async def test_metrics_by_realm(world: World) -> None:
    """Each realm's publications, polls and messages are its own."""
    async with running(**world.flags()) as server, connected(server, admin=True) as admin:
        await publish(server, world.one, "a")
        for _ in range(2):
            await publish(server, world.two, "a")
        await poll(server, world.two, "a")
        async with waiting(server, world.six):
            text = (await admin.get("/metrics")).body.decode()
        counted = {
            (name, realm[:3]): float(value)
            for name, realm, value in re.findall(
                r'^(pushup_\w+)\{(?:outcome="stored",)?realm="([^"]*)"(?:,outcome="stored")?\} (\S+)$', text, re.M
            )
        }
        realms = ("one", "two", "six")
        assert [counted["pushup_publications_total", realm] for realm in realms] == [1, 2, 0]
        assert [counted["pushup_messages_delivered_total", realm] for realm in realms] == [0, 2, 0]
        assert [counted["pushup_parked_polls", realm] for realm in realms] == [0, 0, 1]
        assert [counted["pushup_ready", realm] for realm in realms] == [1, 1, 1]


async def test_the_nodes_of_a_realm(world: World) -> None:
    """The list is of one realm, by default the root's, and counts its polls."""
    async with running(**world.flags(name="me")) as server, connected(server, admin=True) as admin:
        async with waiting(server, world.two):
            for target, polls in (
                ("/nodes", 0),
                (f"/nodes?realm={world.one.name}", 0),
                (f"/nodes?realm={world.two.name}", 1),
            ):
                nodes: list[Any] = []
                async with asyncio.timeout(10):
                    while [node["parked"] for node in nodes] != [polls]:
                        nodes = (await admin.get(target)).json["nodes"]
                assert [node["name"] for node in nodes] == ["me"]
        reply = await admin.get("/nodes?realm=nowhere")
        assert (reply.status, reply.json["code"]) == (404, "not_found")


async def test_to_stop_answers_the_polls_of_all_realms(world: World) -> None:
    """Each with its cursor, and no connection is left."""
    async with AsyncExitStack() as clients:
        async with running(**world.flags()) as server:
            waits = await clients.enter_async_context(waiting(server, *world.tenants))
        replies = [await client.reply() for client in waits]
        assert [reply.status for reply in replies] == [200, 200, 200]
        assert all(reply.json["messages"] == [] and reply.json["next"] > 0 for reply in replies)
        assert [await client.rest() for client in waits] == [b"", b"", b""]


async def test_a_reload_changes_one_realm(world: World) -> None:
    """The others' keys and polls go on."""
    async with running(**world.flags()) as server, waiting(server, *world.tenants) as clients:
        old = Tenant(world.two.name, world.two.secret, world.two.key, world.two.prefix)
        world.two.key = make_key()
        world.flags()
        server.reload()
        assert (await ask(server, old, "GET", poll_path("b"))).status == 401
        for tenant, client in zip(world.tenants, clients, strict=True):
            await publish(server, tenant, "a", data=tenant.name)
            assert heard((await client.reply()).json) == [tenant.name]


async def test_a_realm_that_is_taken_out_of_the_file(memory_world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It stays as it was until a restart, which is said."""
    world = memory_world
    flags = world.flags()
    async with running(**flags) as server:
        world.edit(lambda text: text[: text.index(f"[realms.{world.six.name}]")])
        server.reload()
        assert (await ask(server, world.six, "GET", poll_path("a"))).status == 200
        (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
        assert vars(warning)["realms"] == [world.six.name]
