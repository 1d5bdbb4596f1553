"""Whole clusters of real processes, broken while clients publish and poll: the quick part of the chaos suite."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.chaos.client import NoAnswer, Server
from tests.chaos.cutter import cutting
from tests.chaos.faults import FAULTS, hosting
from tests.chaos.trial import Plan, Scene, Service, run

SEED = 20260301
PLAN = Plan(
    channels=10,
    pollers=60,
    nodes=3,
    rounds=1,
    rate=60,
    poll_timeout_s=1.5,
    before_s=1.0,
    after_s=2.0,
    patience_s=20,
)
QUICK = ("node-kill", "rolling-drain", "pubsub-reset", "commands-reset", "redis-restart", "redis-restart-empty")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Three nodes behind HAProxy, and Redis."""
    with hosting(FAULTS["none"], PLAN.nodes, tmp_path_factory.mktemp("cluster")) as service:
        yield service


@pytest.mark.parametrize("name", [*QUICK, "cut-connection"])
async def test_nothing_is_lost_silently(name: str, cluster: Service) -> None:
    """Every poller has every acknowledged publication once, in order, or was told of a gap where the store lost it."""
    fault = FAULTS[name]

    result = await run(name, lambda scene: fault.inject(scene, cluster), cluster, PLAN, SEED, cuts=fault.cuts)

    assert (result.failures, result.verdict.evidence) == ([], [])
    assert result.verdict.acknowledged > PLAN.rate
    assert result.verdict.deliveries > result.verdict.acknowledged
    assert bool(result.verdict.felt_gaps) == bool(result.verdict.true_gaps) == (name == "redis-restart-empty")
    assert bool(result.cuts) == fault.cuts


@dataclass
class Scripted:
    """A service without nodes, in this process: it acknowledges everything, and forgets each `forgets`-th message."""

    public: str
    forgets: int
    broker: str = "memory://"
    stored: list[tuple[int, list[str], int]] = field(default_factory=list)
    keys: dict[str, int] = field(default_factory=dict)
    served: list[asyncio.Task[None] | None] = field(default_factory=list)

    @property
    def tcp(self) -> str:
        return self.public

    @property
    def nodes(self) -> Sequence["Scripted"]:
        return [self]

    @property
    def address(self) -> str:
        return self.public

    def answer(self, target: str, body: bytes) -> tuple[int, object]:
        """Status and JSON of one request."""
        if target == "/publish":
            asked = json.loads(body)
            ids = [self.store(**one) for one in (asked if isinstance(asked, list) else [asked])]
            return (200, [{"id": id} for id in ids]) if isinstance(asked, list) else (201, {"id": ids[0]})
        query = parse_qs(urlsplit(target).query)
        start = int(query["start"][0].replace("latest", "0"))
        messages = []
        for at, (id, channels, data) in enumerate(self.stored, 1):
            shown = [name for name in channels if name in query["channel"]]
            if id >= start and shown and at % self.forgets:
                messages.append({"id": id, "channels": shown, "data": data})
        return 200, {"messages": messages, "next": max(start, self.last + 1), "gap": False}

    @property
    def last(self) -> int:
        return self.stored[-1][0] if self.stored else 0

    def store(self, channels: list[str], data: int, key: str = "") -> int:
        if key not in self.keys:
            id = max(time.time_ns() // 1000, self.last + 1)
            self.stored.append((id, channels, data))
            if not key:
                return id
            self.keys[key] = id
        return self.keys[key]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.served.append(asyncio.current_task())
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = head.lower().partition("content-length: ")[2].partition("\r")[0]
                status, said = self.answer(head.split()[1], await reader.readexactly(int(length or 0)))
                body = json.dumps(said).encode()
                await asyncio.sleep(0.02)
                writer.write(b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            writer.transport.abort()


@asynccontextmanager
async def scripted(forgets: int) -> AsyncIterator[Scripted]:
    service = Scripted("", forgets)
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0)
    service.public = "{}:{}".format(*server.sockets[0].getsockname())
    async with server:
        yield service
        await asyncio.gather(*[task for task in service.served if task])


async def nothing(scene: Scene) -> None:
    """No fault."""


@pytest.mark.parametrize(("forgets", "wrong"), [(10_000, False), (20, True)], ids=["honest", "forgetful"])
async def test_the_harness_sees_what_a_service_loses(forgets: int, wrong: bool) -> None:
    """Publishers, pollers and checker put together: a service that forgets one message in twenty does not pass."""
    plan = replace(PLAN, pollers=12, rate=100, before_s=0.5, after_s=0.5)
    async with scripted(forgets) as service:
        result = await run("scripted", nothing, service, plan, SEED)

    assert result.good is not wrong
    assert result.failures == []
    assert set(result.verdict.wrongs) == ({"losses"} if wrong else set())
    assert result.verdict.acknowledged == len(service.stored) > 50
    assert result.verdict.deliveries > 50


async def test_a_cutter_loses_answers_and_lets_requests_through() -> None:
    """The server has had the request; its answer is lost with the connection; without cuts it is a plain proxy."""
    heard = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                heard.append(head)
                writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok")
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    upstream = "{}:{}".format(*server.sockets[0].getsockname())
    async with server, cutting(upstream, Random(1)) as cutter:
        client = Server(cutter.address)

        assert await client.request(b"GET /1 HTTP/1.1\r\n\r\n", 5) == (201, b"ok")
        cutter.share = 1.0
        with pytest.raises(NoAnswer, match="the connection was "):
            await client.request(b"GET /2 HTTP/1.1\r\n\r\n", 5)
        cutter.share = 0.0
        assert await client.request(b"GET /3 HTTP/1.1\r\n\r\n", 5) == (201, b"ok")
        await client.close()

    assert [head.split()[1] for head in heard] == [b"/1", b"/2", b"/3"]
    assert cutter.cuts == 1
