"""One node for an hour: clients and channels come and go. Does its memory stay where it is, and is nothing lost?"""

import http.client
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Final, NamedTuple

from loadtest.charts import Chart
from loadtest.dialects import PushUpDialect, make_payload
from loadtest.farm import Farm, address_of
from loadtest.fleet import FleetError
from loadtest.herd import Address, Channel, Herd, Job, Tally
from loadtest.machine import memory, ran
from loadtest.markdown import markdown
from loadtest.nodes import latency_values, loss_values
from loadtest.results import METRICS, OURS, Measurement, Medians, Result, Target, percentile
from loadtest.scenario import Run, Samples, Scenario
from loadtest.servers import PushUp, ServerError
from pushup.memory import CLOSED_REMEMBERED

JEMALLOC: Final = "jemalloc"
C_LIBRARY: Final = "the C library's allocator"
ALLOCATORS: Final[Mapping[str, str]] = {JEMALLOC: "libjemalloc.so.2", C_LIBRARY: ""}
"""Cases: who gives the node its memory. The first is what the Docker image has, the other what is there by itself."""

SEED: Final = 2026
PUBLISHERS: Final = 4
BYTES_MIN: Final = 50
"""Of a message."""
TIMEOUT_S: Final = 60
QUIET_S: Final = 5.0
"""After the last publication; what has not come by then is lost."""
CONNECT_BURST: Final = 500
BATCH: Final = 1000
ASK_S: Final = 30.0
MIB: Final = 2**20

# All that a node remembers of what is over ends long before the time whose memory is judged begins.
LIVES_S: Final = {"channel_window": 60, "channel_ttl": 120, "linger": 30}


class Plan(NamedTuple):
    """How long with each allocator, and how much of what a second. The memory of the first `settle_s` is not judged.

    `closed`: so many channels were there and were closed before it begins. `pace`: channels live so many times shorter.
    """

    allocators: Sequence[str]
    polls: int
    channels: int
    seconds: float
    settle_s: float
    sample_s: float
    publications_per_s: float
    churn_per_s: float
    bytes_max: int
    closed: int
    pace: int = 1

    @property
    def settings(self) -> Mapping[str, str]:
        """Of the node."""
        lives = {name: str(seconds // self.pace) for name, seconds in LIVES_S.items()}
        return {**lives, "log_level": "error"}

    @property
    def parameters(self) -> Mapping[str, int]:
        """As results have them."""
        return {
            "polls": self.polls,
            "channels_at_a_time": self.channels,
            "seconds": round(self.seconds),
            "left_out_seconds": round(self.settle_s),
            "publications_per_s": round(self.publications_per_s),
            "clients_that_leave_and_come_per_s": round(self.churn_per_s),
            "message_bytes_max": self.bytes_max,
            "channels_closed_before": self.closed,
            "pace": self.pace,
        }


FULL: Final = Plan((JEMALLOC,), 16_000, 1000, 3600, 900, 10, 50, 50, 4000, CLOSED_REMEMBERED)
FAST: Final = Plan((JEMALLOC, C_LIBRARY), 16_000, 1000, 360, 90, 1, 500, 500, 4000, CLOSED_REMEMBERED, pace=10)
QUICK: Final = Plan((JEMALLOC,), 1000, 100, 12, 4, 0.5, 50, 50, 4000, 100)


def close_channels(address: Address, channels: int) -> None:
    """Publish to so many channels and close them. Raises FleetError.

    A node remembers the latest ones that were closed: that memory is full then, and does not grow for an hour.
    """
    dialect = PushUpDialect(TIMEOUT_S)
    connection = http.client.HTTPConnection(*address, timeout=ASK_S)
    try:
        for first in range(0, channels, BATCH):
            names = [f"old{number}" for number in range(first, min(first + BATCH, channels))]
            body = dialect.publish_batch([(name, make_payload(name, 0, 50)) for name in names]).partition(b"\r\n\r\n")[
                2
            ]
            connection.request("POST", "/publish", body, {"Content-Type": "application/json"})
            statuses = {_status(connection)}
            for name in names:
                connection.request("DELETE", f"/channels/{name}")
                statuses.add(_status(connection))
            if bad := [status for status in statuses if status >= 300]:
                raise FleetError(f"channels could not be published to and closed: status {bad[0]}")
    except (OSError, http.client.HTTPException) as error:
        raise FleetError(f"channels could not be closed: {error}") from None
    finally:
        connection.close()


def _status(connection: http.client.HTTPConnection) -> int:
    response = connection.getresponse()
    response.read()
    return response.status


class Town:
    """The channels that are in use: a window that moves on as clients come, so that channels live as long as they."""

    def __init__(self, channels: int, polls: int, chaos: random.Random) -> None:
        self._chaos = chaos
        self._numbers = count()
        self._per_channel = max(polls // channels, 1)
        self._open: deque[Channel] = deque()
        self._newcomers = 0
        self._turn = 0
        for _ in range(channels):
            self._begin()

    def _begin(self) -> None:
        # All that there ever was in it, for who comes first.
        self._open.append(Channel(f"c{next(self._numbers)}", after=0))

    def join(self) -> Channel:
        """Where the next client goes; with as many as a channel has, the oldest channel gives way to a new one."""
        self._newcomers += 1
        if self._newcomers % self._per_channel == 0:
            self._open.popleft()
            self._begin()
        return self._chaos.choice(self._open)

    def next(self) -> Channel:
        """The channel to publish to: each in turn."""
        self._turn += 1
        return self._open[self._turn % len(self._open)]


class _Life:
    """What happens in the hour."""

    def __init__(self, plan: Plan, herd: Herd, address: Address, pid: int) -> None:
        self.samples: dict[str, list[float]] = {
            "second": [],
            "memory_anonymous_bytes": [],
            "cpu_s": [],
            "client_cpu_s": [],
        }
        self._plan = plan
        self._herd = herd
        self._address = address
        self._pid = pid
        self._chaos = random.Random(SEED)
        self._town = Town(plan.channels, plan.polls, self._chaos)

    def park(self, tick: Callable[[], None]) -> None:
        """All clients connect."""
        while len(self._herd) < self._plan.polls:
            for _ in range(min(CONNECT_BURST, self._plan.polls - len(self._herd))):
                self._herd.add(self._address, self._town.join())
            self._herd.run(time.monotonic_ns() + 20_000_000)
            tick()

    def publish_each_size(self) -> None:
        """One message of each size that will come. Raises FleetError.

        A node remembers how publications of each length begin: that memory is full then, and does not grow for an hour.
        """
        tally, now = self._herd.tally, time.monotonic_ns()
        for size in range(BYTES_MIN, self._plan.bytes_max + 1):
            self._herd.publish(self._town.next(), now, size)
        self._herd.run(now + int(ASK_S * 1e9), enough=lambda: tally.acknowledged == tally.published)
        if tally.acknowledged < tally.published:
            raise FleetError(tally.complaint or f"not all was acknowledged within {ASK_S:g} s")

    def jobs(self, begin: int) -> Iterator[Job]:
        """From then (ns) on, in order."""
        plan = self._plan
        kinds: list[tuple[float, Callable[[int], None]]] = [
            (1 / plan.publications_per_s, self._publish),
            (1 / plan.churn_per_s, self._change),
            (plan.sample_s, partial(self._sample, begin)),
        ]
        turns = [1] * len(kinds)
        while True:
            at, kind = min(
                (turn * every, index) for index, (turn, (every, _)) in enumerate(zip(turns, kinds, strict=True))
            )
            if at > plan.seconds:
                return
            turns[kind] += 1
            due = begin + int(at * 1e9)
            yield due, partial(kinds[kind][1], due)

    def _publish(self, due: int) -> None:
        # As many short ones as long ones by order of magnitude.
        size = int(BYTES_MIN * (self._plan.bytes_max / BYTES_MIN) ** self._chaos.random())
        self._herd.publish(self._town.next(), due, size)

    def _change(self, due: int) -> None:
        self._herd.leave(1)
        self._herd.add(self._address, self._town.join())

    def _sample(self, begin: int, due: int) -> None:
        row = {
            "second": (due - begin) / 1e9,
            "memory_anonymous_bytes": float(memory((self._pid,)).anonymous),
            "cpu_s": ran((self._pid,)).cpu / 1e9,
            "client_cpu_s": ran((os.getpid(),)).cpu / 1e9,
        }
        for name, value in row.items():
            self.samples[name].append(value)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """How much y grows with each x, by least squares; 0 for less than two different x."""
    if not points:
        return 0.0
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    square = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / square if square else 0.0


def measure_soak(run: Run, plan: Plan) -> Iterator[Measurement]:
    """One measurement with each allocator in each round."""
    turns = [(number, allocator) for number in range(1, run.rounds + 1) for allocator in plan.allocators]
    for turn, (number, allocator) in enumerate(turns):

        def share(part: float, turn: int = turn) -> None:
            run.share((turn + min(part, 1)) / len(turns))

        try:
            yield _measure(number, allocator, plan, share)
        except (FleetError, ServerError) as error:
            yield Measurement(number, allocator, OURS, failure=str(error))


def _measure(number: int, allocator: str, plan: Plan, share: Callable[[float], None]) -> Measurement:
    with (
        Farm(redis=False, settings=plan.settings, allocator=ALLOCATORS[allocator]) as farm,
        Herd(TIMEOUT_S, reset=False) as herd,
    ):
        [node] = farm.grow(1)
        close_channels(address_of(node), plan.closed)
        for _ in range(PUBLISHERS):
            herd.add_publisher(address_of(node))
        life = _Life(plan, herd, address_of(node), node.pid)
        life.publish_each_size()
        life.park(lambda: share(0))
        herd.tally = Tally()
        begin = time.monotonic_ns()
        herd.plan(life.jobs(begin))
        end = begin + int(plan.seconds * 1e9)
        while (now := time.monotonic_ns()) < end:
            if not node.alive:
                raise ServerError(f"the node has died. {node.last_words()}")
            herd.run(min(now + 1_000_000_000, end))
            share((now - begin) / (end - begin))
        herd.run(time.monotonic_ns() + int(QUIET_S * 1e9), enough=lambda: herd.unanswered <= 0)
        herd.settle()
        return _judge(number, allocator, plan, herd.tally, life.samples)


def _judge(number: int, allocator: str, plan: Plan, tally: Tally, samples: Samples) -> Measurement:
    rows = list(zip(samples["second"], samples["memory_anonymous_bytes"], strict=True))
    judged = [(second, size) for second, size in rows if second >= plan.settle_s]
    if not judged:
        raise FleetError("too short: there is no time left to judge")
    gained = 3600 / plan.pace * slope(judged)
    passed = samples["second"][-1] - samples["second"][0] or 1.0
    values = {
        **latency_values(tally),
        **loss_values(tally),
        "polls": plan.polls,
        "deliveries_received": len(tally.latencies),
        "memory_start_mib": rows[0][1] / MIB,
        "memory_end_mib": rows[-1][1] / MIB,
        "memory_slope_bytes_per_h": gained,
        "memory_slope_share": gained / (sum(size for _, size in judged) / len(judged)),
        "server_cpu_share": (samples["cpu_s"][-1] - samples["cpu_s"][0]) / passed,
        "client_busy": (samples["client_cpu_s"][-1] - samples["client_cpu_s"][0]) / passed,
    }
    ordered = sorted(tally.latencies)
    samples = {
        **{name: [round(value, 3) for value in column] for name, column in samples.items()},
        "latency_percentiles_ms": [round(percentile(ordered, percent) / 1e6, 3) for percent in range(101)],
    }
    failure = tally.complaint if tally.wrong or tally.broken else ""
    return Measurement(number, allocator, OURS, values, samples, failure=failure)


def show(result: Result) -> Sequence[str | Chart]:
    """The verdict, and memory over time."""
    medians = Medians(result.measurements)
    cases = [allocator for allocator in ALLOCATORS if medians.metrics(allocator)]
    rows = [["", *cases]]
    for name in medians.metrics(cases[0]) if cases else ():
        values, metric = [medians.of(case, name, OURS) for case in cases], METRICS[name]
        shown = ["–" if value is None else f"{value / metric.scale:,.{metric.digits}f}" for value in values]
        rows.append([f"{metric.title} ({metric.unit})" if metric.unit else metric.title, *shown])
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in result.measurements:
        if one.samples:
            seconds, sizes = one.samples["second"], one.samples["memory_anonymous_bytes"]
            label = f"{one.case}, round {one.round}" if one.round > 1 else one.case
            lines[label] = [(x / 60, y / MIB) for x, y in zip(seconds, sizes, strict=True)]
    blocks: list[str | Chart] = [
        "Memory is the node's anonymous memory (`Pss_Anon`). Clients stay for a while and go without a word, the "
        "oldest first; as many come, to channels of which the oldest give way to new ones. Polls end after "
        f"{TIMEOUT_S} s at the latest and are sent again. Latencies count from when a publication was due. What is "
        "gained is the slope of the memory after the time left out, for an hour at the pace of one. As many channels "
        "as a node remembers of closed ones were closed before, and a message of each size was published. The Docker "
        "image has jemalloc for its allocator; a node has the C library's unless `LD_PRELOAD` says otherwise, and that "
        "one leaves gaps between messages of over 512 bytes.",
        markdown(rows) if cases else "Nothing could be measured.",
    ]
    if lines:
        blocks.append(
            Chart(
                result.scenario,
                "Memory of a node over time, while clients and channels come and go",
                "minutes",
                "MiB",
                lines,
            )
        )
    return blocks


def _worst(metric: str) -> Callable[[Medians], float | None]:
    """Of all cases that were measured."""

    def worst(medians: Medians) -> float | None:
        values = [medians.of(case, metric, OURS) for case in ALLOCATORS]
        return max((value for value in values if value is not None), default=None)

    return worst


def scenarios(*, quick: bool) -> tuple[Scenario, ...]:
    """The hour, and its churn in a tenth of the time. A few seconds say nothing: `quick` has no target for memory."""
    if quick:
        return (_scenario("soak", QUICK),)
    flat = Target(
        "with jemalloc: memory gained with the churn of an hour < 1 %",
        lambda medians: medians.of(JEMALLOC, "memory_slope_share", OURS),
        0.01,
    )
    return _scenario("soak-fast", FAST, flat), _scenario("soak", FULL, flat)


def _scenario(name: str, plan: Plan, *targets: Target) -> Scenario:
    faster = f", at {plan.pace} times the pace of an hour" if plan.pace > 1 else ""
    return Scenario(
        name,
        f"{plan.polls:,} polls while clients and channels come and go{faster}: is memory flat, is anything lost?",
        (PushUp,),
        dict.fromkeys(plan.allocators, plan.parameters),
        lambda run: measure_soak(run, plan),
        rounds=1,
        seconds=len(plan.allocators) * (plan.seconds + plan.polls / 4000 + 2),
        targets=(
            *targets,
            Target("lost messages", _worst("messages_lost"), 0),
            Target("duplicates", _worst("messages_repeated"), 0),
            Target("gaps", _worst("messages_gap"), 0),
        ),
        show=show,
        by_case=False,
        pinned=False,
    )
