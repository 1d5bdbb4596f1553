"""Trials against servers of a few lines: what they do wrong is found, and what they do right is not blamed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from loadtest import faults
from loadtest.charts import Chart
from loadtest.dialects import PushUpDialect
from loadtest.faults import Fault, Plan, Trial, report, scenarios, show
from loadtest.fleet import FleetError
from loadtest.machine import Cores
from loadtest.results import Measurement, Medians, Result, Values
from loadtest.scenario import Bench
from loadtest.servers import NchanRedis, ServerError

PLAN = Plan(pollers=4, channels=2, per_second=100, message_bytes=60, seconds=0.3)


class Store:
    """Messages by id, for two nodes. `forget`: the number whose message nobody is given."""

    def __init__(self, forget: str = "", deaf: bool = False) -> None:
        self.forget = forget
        self.deaf = deaf
        self.messages: list[tuple[str, str]] = []
        self.keys: dict[str, int] = {}
        self.stored = asyncio.Condition()
        self.writers: list[set[asyncio.StreamWriter]] = [set(), set()]
        self.serving: set[asyncio.Task[Any]] = set()
        self.refuse = 0
        self.over = False

    async def serve(self, node: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers[node].add(writer)
        task = asyncio.current_task()
        assert task
        self.serving.add(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                status, body = await self.answer(head.decode(), reader)
                if writer.is_closing():
                    return
                text = json.dumps(body).encode()
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, head: str, reader: asyncio.StreamReader) -> tuple[int, Any]:
        fields = dict(line.split(": ") for line in head.split("\r\n")[1:-2])
        if head.startswith("POST"):
            item = json.loads(await reader.readexactly(int(fields["Content-Length"])))
            if self.refuse:
                self.refuse -= 1
                return 503, {}
            return 201, {"id": await self.store(fields["Idempotency-Key"], item["channels"][0], item["data"])}
        query = dict(pair.split("=") for pair in head.split()[1].partition("?")[2].split("&"))
        start = len(self.messages) if query["start"] == "latest" else int(query["start"])
        async with self.stored:
            await self.stored.wait_for(lambda: self.over or self.heard(start, query["channel"]))
            messages = self.heard(start, query["channel"])
        return 200, {"messages": messages, "next": len(self.messages), "gap": False}

    def heard(self, start: int, channel: str) -> list[dict[str, str]]:
        return [
            {"data": data}
            for name, data in self.messages[start:]
            if name == channel and data.split(".")[1] != self.forget and not self.deaf
        ]

    async def store(self, key: str, channel: str, data: str) -> int:
        async with self.stored:
            if key not in self.keys:
                self.keys[key] = len(self.messages)
                self.messages.append((channel, data))
                self.stored.notify_all()
        return self.keys[key]

    def cut(self, node: int) -> None:
        for writer in self.writers[node]:
            writer.transport.abort()

    async def end(self) -> None:
        self.over = True
        self.cut(0)
        self.cut(1)
        async with self.stored:
            self.stored.notify_all()
        await asyncio.gather(*self.serving)


@asynccontextmanager
async def nodes(store: Store) -> AsyncIterator[list[tuple[str, int]]]:
    async def serve(node: int) -> asyncio.Server:
        return await asyncio.start_server(lambda reader, writer: store.serve(node, reader, writer), "127.0.0.1", 0)

    servers = [await serve(node) for node in range(2)]
    try:
        yield [server.sockets[0].getsockname() for server in servers]
    finally:
        for server in servers:
            server.close()
        await store.end()


async def tried(store: Store, plan: Plan = PLAN) -> Values:
    async with nodes(store) as addresses:
        trial = Trial(addresses, PushUpDialect(25), plan, lambda: None)
        await trial.run()
    return report(trial)[0]


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "DRAIN_S", 0.3)
    monkeypatch.setattr(faults, "PRIMER_S", 0.3)
    monkeypatch.setattr(faults, "PRIMER_STEP_S", 0.2)


async def test_a_good_server_loses_nothing() -> None:
    values = await tried(Store())

    assert values["publications_acknowledged"] == 30
    assert values["deliveries_expected"] == values["deliveries_received"] == 60
    for wrong in ("messages_lost", "messages_repeated", "messages_disordered", "answers_wrong", "pollers_starved"):
        assert values[wrong] == 0, wrong


async def test_a_message_that_is_forgotten_is_lost_to_each_poller_of_its_channel() -> None:
    values = await tried(Store(forget="7"))

    assert values["messages_lost"] == 2
    assert values["deliveries_received"] == 58
    assert values["pollers_starved"] == 0


async def test_pollers_and_publisher_go_on_after_a_cut_and_a_refusal() -> None:
    store = Store()

    loop = asyncio.get_running_loop()

    def cut() -> None:
        loop.call_soon_threadsafe(store.cut, 1)

    def refuse() -> None:
        store.refuse = 3

    values = await tried(store, replace(PLAN, faults=(Fault(0.1, cut), Fault(0.2, refuse))))

    assert values["polls_broken"] == 2
    assert values["publications_refused"] == 3
    assert values["publications_retried"] >= 3
    assert values["messages_lost"] == values["messages_repeated"] == 0
    assert values["deliveries_received"] == 60


async def test_who_hears_nothing_at_all_ends_the_trial() -> None:
    with pytest.raises(FleetError, match=r"4 pollers heard nothing in 0\.3 s"):
        await tried(Store(deaf=True))


def test_the_report_adds_up_the_rounds() -> None:
    (scenario,) = scenarios(quick=True)
    case = next(iter(scenario.parameters))
    names = [*faults._TOTALS, "silence_max_ms"]
    measurements = [
        Measurement(
            number, case, "PushUp over Redis", dict.fromkeys(names, 1000.0 * number), {"deliveries_by_100_ms": series}
        )
        for number, series in ((1, [1.0]), (2, [3.0, 4.0]))
    ]
    failed = Measurement(1, case, "Nchan over Redis", failure="it was not ready")
    result = Result("lost-messages", "?", "", "", 1, True, {}, {}, "", {}, [*measurements, failed], [])

    explanation, table, chart = show(result)
    assert isinstance(explanation, str)
    assert isinstance(table, str)
    assert isinstance(chart, Chart)
    assert table.splitlines()[2:] == [f"| {case} | PushUp over Redis | 2 |{' 3,000 |' * 10} 2,000 | 3,000 | 3,000 |"]
    assert table.splitlines()[0].count("|") == table.splitlines()[1].count("|") == table.splitlines()[2].count("|")
    assert chart.lines == {"PushUp over Redis": [(0.0, 20.0), (0.1, 20.0)]}


def test_the_target_is_about_the_worst_round() -> None:
    (scenario,) = scenarios(quick=False)
    case = next(iter(scenario.parameters))
    lost = [Measurement(number, case, "PushUp over Redis", {"messages_lost": number == 2}) for number in (1, 2, 3)]
    judged = scenario.targets[0].judge(Medians(lost))

    assert (judged["value"], judged["met"]) == (1, False)


def test_nchan_is_tried_too() -> None:
    try:
        NchanRedis.versions()
    except ServerError as error:
        pytest.skip(str(error))
    every = frozenset(range(64))
    parameters = {"polls": 8, "channels": 2, "publications_per_s": 50, "message_bytes": 60, "seconds": 1, "sweeps": 1}
    with NchanRedis(Cores(every, every), 1000) as server:
        bench = Bench(server, parameters, lambda: None, spin=False)
        values, samples = faults.measure_losses(lambda server, _: (Fault(0.3, lambda: server.kill_node(0)),), bench)

    assert values["publications_acknowledged"] == 50
    assert values["polls_broken"] >= 4
    assert sum(samples["deliveries_by_100_ms"]) >= values["deliveries_received"]
