"""The load test: what it measures, what it notices, and what it refuses to do."""

import asyncio
import io
import json
import resource
from bisect import bisect_left
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from math import ceil
from typing import Any

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pushup.bench import (
    CHANNEL_PREFIX,
    Latencies,
    Load,
    ProgressBar,
    Report,
    check,
    measure,
    read_refusal,
    show_report,
    to_json,
)
from pushup.errors import Forbidden, PushUpError, SettingsError, TooManyConnections, Unauthorized, Unavailable
from tests.support import connected, running

SHORT = Load(url="http://127.0.0.1:1", pollers=6, channels=2, rate=200.0, seconds=0.2, size=100)


def quiet(what: str, done: float, total: float) -> None:
    """Progress that nobody watches."""


# Latencies


@given(st.lists(st.integers(0, 10**8), min_size=1), st.sampled_from([1, 50, 90, 99, 99.9, 100]))
def test_percentiles(values: list[int], percent: float) -> None:
    """As of the sorted values, at most 0.8 % too low."""
    latencies = Latencies()
    for value in values:
        latencies.record(value)

    exact = sorted(values)[ceil(len(values) * percent / 100) - 1]
    assert exact * 0.992 - 1 < latencies.percentile(percent) <= exact
    assert latencies.max == max(values)


@given(st.lists(st.integers(0, 10**8)))
def test_the_histogram(values: list[int]) -> None:
    """Its steps are 1, 2, 5, 10, … without a hole, and every value is in one."""
    latencies = Latencies()
    for value in values:
        latencies.record(value)

    rows = latencies.rows()

    assert sum(count for _, _, count in rows) == len(values)
    assert all(one[1] == two[0] for one, two in pairwise(rows))
    assert {str(low)[0] for low, _, _ in rows} <= set("0125")
    for low, high, count in rows:
        ordered = sorted(values)
        # A value is counted at the lower end of its bucket, which may belong to the row before.
        assert count <= bisect_left(ordered, high * 1.008 + 1) - bisect_left(ordered, low)


def test_nothing_measured() -> None:
    """Zeros, and no histogram."""
    assert (Latencies().percentile(99), Latencies().rows()) == (0, [])


def test_clocks_that_disagree() -> None:
    """A negative latency is none."""
    latencies = Latencies()
    latencies.record(-5)

    assert (latencies.count, latencies.max, latencies.rows()) == (1, 0, [(0, 1, 1)])


# What is refused


@pytest.mark.parametrize(
    ("url", "confirmed", "refused"),
    [
        ("http://127.0.0.1:8080", None, False),
        ("http://localhost", None, False),
        ("http://[::1]:8080", None, False),
        ("https://push.example.com", None, True),
        ("https://push.example.com", "example.com", True),
        ("https://push.example.com/prefix", "push.example.com", False),
        ("http://192.0.2.1:8080", None, True),
    ],
)
def test_other_machines_want_a_word(url: str, confirmed: str | None, refused: bool) -> None:
    """A host that is not this machine has to be named twice, so that no slip of the hand loads it."""
    load = Load(url=url)
    if not refused:
        return check(load, confirmed)
    with pytest.raises(SettingsError, match="a load test takes from others what they use"):
        check(load, confirmed)
    return None


def test_more_channels_than_pollers() -> None:
    """Nobody would see what is published there."""
    with pytest.raises(SettingsError, match="10 channels are more than 5 pollers"):
        check(Load(url="http://127.0.0.1", pollers=5, channels=10), None)


def test_file_descriptors() -> None:
    """The soft limit is raised as far as it has to be; more than the hard limit is said at the beginning."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        check(Load(url="http://127.0.0.1", pollers=300), None)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 464
        with pytest.raises(SettingsError, match=rf"and this process may have {hard} \(ulimit -n\)"):
            check(Load(url="http://127.0.0.1", pollers=hard), None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_refusals() -> None:
    """A problem document says which; of something else, the status says whether it passes."""
    problem = TooManyConnections("too many").body()

    assert type(read_refusal(429, problem)) is TooManyConnections
    assert type(read_refusal(403, Forbidden("no").body())) is Forbidden
    assert type(read_refusal(502, b"<html>")) is Unavailable
    assert type(read_refusal(404, b"<html>")) is PushUpError
    assert str(read_refusal(404, b"[]")) == "something that is not PushUp answered with the status 404"


# Runs


def at(address: str, **changes: Any) -> Load:
    return msgspec.structs.replace(SHORT, url=f"http://{address}", **changes)


async def test_a_run() -> None:
    """Every publication is acknowledged and reaches all pollers of its channel, and nothing is left behind."""
    heard: list[str] = []
    async with running() as server, connected(server) as client:
        report = await measure(at(server.address), lambda what, done, total: heard.append(what))
        listed = (await client.get("/channels")).json["channels"]

    assert (report.acknowledged, report.failed) == (40, 0)
    assert (report.deliveries, report.expected) == (120, 120)
    assert (report.lost, report.repeated, report.gaps, report.reconnects, report.refusals) == (0, 0, 0, 0, {})
    assert report.kept
    assert 0 < report.delivery["p50"] <= report.delivery["p99"] <= report.delivery["max"]
    assert sum(count for _, _, count in report.histogram) == 120
    assert set(heard) <= {"connecting", "publishing"}
    assert listed == []


async def test_a_restart_in_the_middle() -> None:
    """Connections that end are made again; what could not be published is a failure, not a loss."""
    async with running() as first:
        address = first.address
        run = asyncio.create_task(measure(at(address, seconds=2.0, rate=20.0), quiet))
        await asyncio.sleep(0.8)
    async with running(listen=address):
        report = await run

    assert report.reconnects >= 6
    assert report.lost == report.repeated == 0
    assert report.acknowledged + report.failed == 40
    assert report.acknowledged > 10


async def test_nobody_there() -> None:
    """The sentence names the address."""
    with pytest.raises(Unavailable, match=r"cannot reach http://127\.0\.0\.1:1: "):
        await measure(at("127.0.0.1:1"), quiet)


async def test_too_large_a_publication() -> None:
    """A refusal that will not pass ends the run at once."""
    async with running(message_bytes_max=50) as server:
        with pytest.raises(PushUpError, match="the limit is 50"):
            await measure(at(server.address, seconds=60.0), quiet)


class Imitation:
    """Something that answers as PushUp does, but for what `wrong` does to the messages of an answer."""

    def __init__(self, wrong: str) -> None:
        self._wrong = wrong
        self._messages: dict[str, list[dict[str, Any]]] = {}
        self._id = 0
        self._polls = 0
        self._news = asyncio.Condition()

    async def publish(self, request: web.Request) -> web.Response:
        body = await request.json()
        async with self._news:
            self._id += 1
            for channel in body["channels"]:
                self._messages.setdefault(channel, []).append(
                    {"id": self._id, "channels": [channel], "data": body["data"]}
                )
            self._news.notify_all()
        return web.json_response({"id": self._id}, status=201)

    async def poll(self, request: web.Request) -> web.Response:
        if request.query["start"] == "latest":
            return web.json_response({"messages": [], "next": self._id + 1, "gap": False})
        start, channel = int(request.query["start"]), request.query["channel"]
        async with self._news:
            await self._news.wait_for(lambda: any(one["id"] >= start for one in self._messages.get(channel, [])))
        found = [one for one in self._messages[channel] if one["id"] >= start]
        following, gap = self._id + 1, False
        self._polls += 1
        if self._polls == 10:
            if self._wrong == "repeats":
                following = start
            else:
                found, gap = found[1:], self._wrong == "tells"
        return web.json_response({"messages": found, "next": following, "gap": gap})

    async def refuse(self, request: web.Request) -> web.Response:
        return web.json_response(Forbidden("not for you").problem(), status=403)


@asynccontextmanager
async def serving(*routes: web.RouteDef) -> AsyncIterator[str]:
    """The address of a server that has only these."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield "{}:{}".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("wrong", "found"),
    [("loses", (1, 0, 0, 0)), ("tells", (0, 1, 0, 1)), ("repeats", (0, 0, 1, 0))],
)
async def test_a_service_that_is_wrong(
    wrong: str, found: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One delivery too few, told or not, or one too many is found among all."""
    monkeypatch.setattr("pushup.bench.GRACE_S", 0.3)
    imitation = Imitation(wrong)
    async with serving(
        web.get("/poll", imitation.poll),
        web.post("/publish", imitation.publish),
        web.post("/channels", imitation.refuse),
    ) as address:
        report = await measure(at(address, rate=50.0, seconds=0.4), quiet)

    assert (report.lost, report.lost_with_gap, report.repeated, report.gaps) == found
    assert report.kept is (wrong == "tells")


async def test_something_else() -> None:
    """A server that is no PushUp is said to be none."""
    async with serving() as address:
        with pytest.raises(PushUpError, match="something that is not PushUp answered with the status 404"):
            await measure(at(address), quiet)


async def test_a_cancelled_run_leaves_nothing() -> None:
    """Ctrl-C ends it at once, and its channels are closed all the same."""
    async with running() as server, connected(server) as client:
        run = asyncio.create_task(measure(at(server.address, seconds=60.0), quiet))
        while not (await client.get("/channels")).json["channels"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

        assert (await client.get("/channels")).json["channels"] == []


async def test_a_wrong_token() -> None:
    """Is refused before anything is done."""

    async def refuse(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        return web.json_response(Unauthorized("who are you").problem(), status=401)

    async with serving(web.post("/channels", refuse)) as address:
        with pytest.raises(Unauthorized, match="who are you"):
            await measure(at(address, token="secret"), quiet)


# What it shows


def report(**changes: Any) -> Report:
    latencies = {"p50": 1.5, "p90": 2.0, "p99": 150.0, "p99.9": 1500.0, "max": 12_000.0}
    facts: dict[str, Any] = {
        "load": Load(url="http://127.0.0.1:8080"),
        "acknowledged": 500,
        "failed": 0,
        "deliveries": 5000,
        "expected": 5000,
        "lost": 0,
        "lost_with_gap": 0,
        "repeated": 0,
        "gaps": 0,
        "reconnects": 0,
        "refusals": {},
        "seconds": 10.0,
        "delivery": latencies,
        "acknowledgement": latencies,
        "histogram": [(1000, 2000, 4000), (2000, 5000, 1000)],
        "cpu": 0.12,
        "lag": {"p50": 0.1, "p90": 0.1, "p99": 0.3, "p99.9": 0.5, "max": 2.0},
    }
    return Report(**{**facts, **changes})


def test_the_text() -> None:
    """What was done, what came of it, how long it took, and how this client fared."""
    assert show_report(report(), fancy=False).splitlines() == [
        "100 pollers on 10 channels, 50 publications/s of 100 bytes for 10 s, http://127.0.0.1:8080",
        "",
        "publications   500 acknowledged, 0 failed (50.0/s)",
        "deliveries     5,000 of 5,000 (500.0/s)",
        "wrong          0 lost, 0 repeated or out of order",
        "",
        "                      p50       p90       p99     p99.9       max",
        "delivered in       1.5 ms      2 ms    150 ms  1,500 ms    12.0 s",
        "acknowledged in    1.5 ms      2 ms    150 ms  1,500 ms    12.0 s",
        "",
        "     1 ms -    2 ms  ########################################       4,000",
        "     2 ms -    5 ms  ##########                                     1,000",
        "",
        "this client    CPU 12%, loop lag p99 0.3 ms, max 2 ms",
    ]


def test_the_text_of_trouble() -> None:
    """Lines that are only there if there was some."""
    text = show_report(report(gaps=2, lost_with_gap=7, reconnects=3, refusals={"unavailable": 4}))

    assert "gaps           2 told, 7 deliveries lost to those told" in text
    assert "connections    3 lost and made again" in text
    assert "refused        4 unavailable" in text
    assert "█" * 40 in text


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, True), ({"lost": 1}, False), ({"repeated": 1}, False), ({"failed": 1}, False), ({"acknowledged": 0}, False)],
)
def test_the_verdict(changes: dict[str, int], kept: bool) -> None:
    """The promise was kept, and every publication taken."""
    assert report(**changes).kept is kept


@pytest.mark.parametrize(("changes", "worries"), [({}, False), ({"cpu": 0.9}, True), ({"lag": {"p99": 30.0}}, True)])
def test_a_busy_client(changes: dict[str, Any], worries: bool) -> None:
    """It is said when the numbers are rather the client's than the service's."""
    warning = report(**changes).warning

    assert (warning is not None) is worries
    if warning is not None:
        assert "held up itself" in warning


def test_the_json() -> None:
    """Everything for programs, with the verdict and without the token."""
    told = json.loads(to_json(report()))

    assert (told["kept"], told["warning"], told["load"]["token"]) == (True, None, None)
    assert told["delivery"]["p99.9"] == 1500.0
    assert told["histogram"][0] == [1000, 2000, 4000]


def test_the_progress_bar() -> None:
    """One line drawn anew: what is done, a bar, the share, the time that is left; empty in the end."""
    stream = io.StringIO()
    bar = ProgressBar(stream)

    bar("connecting", 30, 100)
    bar("publishing", 4, 10)
    bar.wipe()

    assert [line.removesuffix("\x1b[K") for line in stream.getvalue().split("\r")] == [
        "",
        f"connecting [{'#' * 9:30}]  30%  30 of 100",
        f"publishing [{'#' * 12:30}]  40%  6 s left",
        "",
    ]


def test_channels_are_its_own() -> None:
    """Their prefix is what the help promises."""
    assert CHANNEL_PREFIX == "bench."
