"""What a run leaves behind: raw rounds, the medians and ratios made from them, and which targets were met."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

from loadtest.machine import Facts

RESULTS: Final = Path(__file__).parent / "results"

_NUMBERS: Final = re.compile(r"\[\s+([-+.\deE,\s]+?)\s+\]")

OURS: Final = "PushUp"

Values = dict[str, float]
"""Measured values by metric; `METRICS` says what they are."""


@dataclass(frozen=True)
class Metric:
    """A measured quantity as the report shows it. `scale`: what the value is divided by to be shown in `unit`."""

    title: str
    unit: str
    digits: int = 1
    scale: float = 1.0


METRICS: Final[Mapping[str, Metric]] = {
    "memory_per_poll_bytes": Metric("memory per parked poll", "B", 0),
    "memory_per_poll_after_bytes": Metric("the same, parked again after the publications", "B", 0),
    "memory_per_connection_bytes": Metric("memory per connection that has not asked yet", "B", 0),
    "kernel_per_connection_bytes": Metric("kernel memory per connection, both ends, whole machine", "B", 0),
    "cpu_delivery_us": Metric("server CPU per delivery", "µs", 2),
    "cpu_park_us": Metric("server CPU to park again", "µs", 2),
    "cpu_delivery_and_park_us": Metric("server CPU per delivery and to park again", "µs", 2),
    "cpu_publication_us": Metric("server CPU per publication", "µs", 2),
    "redis_cpu_delivery_us": Metric("Redis' CPU per delivery and next poll", "µs", 2),
    "origin_cpu_delivery_us": Metric("CPU of Pushpin's origin per delivery and next poll", "µs", 2),
    "origin_cpu_publication_us": Metric("CPU of Pushpin's origin per publication", "µs", 2),
    "deliveries_per_s": Metric("deliveries", "/s", 0),
    "publications_per_s": Metric("publications", "/s", 0),
    "latency_mean_ms": Metric("publish → answer, mean", "ms", 2),
    "latency_p50_ms": Metric("publish → answer, p50", "ms", 2),
    "latency_p99_ms": Metric("publish → answer, p99", "ms", 2),
    "latency_p999_ms": Metric("publish → answer, p99.9", "ms", 2),
    "latency_max_ms": Metric("publish → answer, max", "ms", 2),
    "acknowledged_p50_ms": Metric("publish → acknowledged, p50", "ms", 2),
    "acknowledged_p99_ms": Metric("publish → acknowledged, p99", "ms", 2),
    "publications_acknowledged": Metric("publications acknowledged", "", 0),
    "publications_unacknowledged": Metric("publications never acknowledged", "", 0),
    "publications_retried": Metric("publications that had to be sent again", "", 0),
    "publications_refused": Metric("attempts to publish that were refused", "", 0),
    "publications_unanswered": Metric("attempts to publish without an answer", "", 0),
    "deliveries_expected": Metric("deliveries expected", "", 0),
    "deliveries_received": Metric("deliveries received", "", 0),
    "messages_lost": Metric("messages lost silently, by poller", "", 0),
    "messages_gap": Metric("messages said to be a gap, by poller", "", 0),
    "messages_repeated": Metric("messages heard again, by poller", "", 0),
    "messages_repeated_resent": Metric("those of them that were sent again", "", 0),
    "messages_disordered": Metric("messages out of order, by poller", "", 0),
    "answers_wrong": Metric("wrong answers", "", 0),
    "polls_refused": Metric("polls refused", "", 0),
    "polls_broken": Metric("polls without an answer", "", 0),
    "pollers_starved": Metric("pollers that did not hear the last message", "", 0),
    "silence_p50_ms": Metric("longest silence of a poller, p50", "ms", 0),
    "silence_p99_ms": Metric("longest silence of a poller, p99", "ms", 0),
    "silence_p999_ms": Metric("longest silence of a poller, p99.9", "ms", 0),
    "silence_max_ms": Metric("longest silence of a poller, max", "ms", 0),
    "catch_up_ms": Metric("first poll sent → last message received", "ms", 0),
    "catch_up_cpu_ms": Metric("the node's CPU meanwhile", "ms", 0),
    "catch_up_redis_cpu_ms": Metric("Redis' CPU meanwhile", "ms", 1),
    "catch_up_polls_per_client": Metric("polls that a client needed", "", 1),
    "caught_up_mean_ms": Metric("a client's first poll sent → its last message, mean", "ms", 0),
    "caught_up_p50_ms": Metric("a client's first poll sent → its last message, p50", "ms", 0),
    "caught_up_p99_ms": Metric("a client's first poll sent → its last message, p99", "ms", 0),
    "caught_up_p999_ms": Metric("a client's first poll sent → its last message, p99.9", "ms", 0),
    "caught_up_max_ms": Metric("a client's first poll sent → its last message, max", "ms", 0),
    "redis_calls": Metric("calls to Redis meanwhile (scripts, functions, subscriptions)", "", 0),
    "redis_calls_per_channel": Metric("the same per channel", "", 2),
    "redis_calls_per_client": Metric("the same per client", "", 4),
    "redis_commands_per_channel": Metric("commands in Redis per channel, those inside scripts too", "", 1),
    "start_mean_ms": Metric("process started → first poll served, mean", "ms", 0),
    "start_p50_ms": Metric("process started → first poll served, p50", "ms", 0),
    "start_cpu_ms": Metric("CPU until it says it is ready, p50", "ms", 0),
    "start_max_ms": Metric("process started → first poll served, max", "ms", 0),
    "polls": Metric("parked polls", "", 0),
    "nodes": Metric("nodes", "", 0),
    "received": Metric("received", "%", 2, 0.01),
    "park_s": Metric("to connect and park", "s", 1),
    "park_again_s": Metric("to park all again", "s", 2),
    "fan_out_s": Metric("publication due → last answer", "s", 2),
    "memory_left_gib": Metric("memory of the machine left then", "GiB", 1),
    "node_cpu_delivery_us": Metric("CPU of all nodes per delivery and to park again", "µs", 2),
    "one_node_cpu_delivery_us": Metric("CPU of one node, the mean, per delivery of all nodes", "µs", 2),
    "proxy_cpu_delivery_us": Metric("HAProxy's CPU per delivery and next poll", "µs", 2),
    "node_cpu_publication_us": Metric("CPU of all nodes per publication", "µs", 0),
    "redis_cpu_publication_us": Metric("Redis' CPU per publication", "µs", 0),
    "publishing_cpu_us": Metric("CPU of the publishing node per publication", "µs", 1),
    "idle_cpu_us": Metric("CPU of an idle node per publication", "µs", 2),
    "idle_share": Metric("an idle node's CPU of the publishing node's", "%", 2, 0.01),
    "memory_start_mib": Metric("memory of the node when all had been parked", "MiB", 1),
    "memory_end_mib": Metric("memory of the node in the end", "MiB", 1),
    "memory_slope_bytes_per_h": Metric("memory gained, least squares", "B/h", 0),
    "memory_slope_share": Metric("memory gained, of its mean", "%/h", 2, 0.01),
    "wire_bytes_per_s": Metric("network traffic on the wire", "kB/s", 2, 1000),
    "application_bytes_per_s": Metric("network traffic in application bytes", "kB/s", 2, 1000),
    "segments_per_s": Metric("segments, both directions", "/s", 1),
    "received_in_time": Metric("received in time", "%", 2, 0.01),
    "received_late": Metric("received late", "%", 2, 0.01),
    "answers_gap": Metric("answers that say gap", "", 0),
    "connections_failed": Metric("connections that broke, wrong answers", "", 0),
    "pulls_skipped": Metric("pulls that were due before the last was answered", "", 0),
    "server_memory_bytes": Metric("memory of the server", "MB", 1, 1e6),
    "server_memory_per_connection_bytes": Metric("memory that each connection adds", "kB", 2, 1000),
    "server_stacks_bytes": Metric("threads' stacks, as far as resident", "MB", 1, 1e6),
    "server_cpu_share": Metric("the node's CPU", "% of a core", 1, 0.01),
    "server_busy": Metric("server's core busy while answering", "%", 0, 0.01),
    "client_busy": Metric("client's core busy meanwhile", "%", 0, 0.01),
    "client_lag_ms": Metric("how late the client was to look, p99", "ms", 2),
    "waited": Metric("time that other processes kept server or client from a core", "%", 1, 0.01),
}

CLIENT_BOUND_BUSY: Final = 0.9
"""A measurement says more about the client than the server if the client was busier than this and the server less."""

CLIENT_BOUND_LAG: Final = 0.5
"""The same if the client was late (p99) by more than this part of the latency (p99) that it measured."""

DISTURBED: Final = 0.05
"""A measurement is disturbed if other processes kept server and client from running for more of its time."""


@dataclass(frozen=True)
class Measurement:
    """What one round measured of one server in one case. `samples`: the single publications, in order."""

    round: int
    case: str
    server: str
    values: Values = field(default_factory=dict)
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    failure: str = ""

    @property
    def client_bound(self) -> bool:
        """Whether the client, not the server, set the pace: it was busy, or looked late at what it had to time."""
        busy = (
            self.values.get("client_busy", 0) >= CLIENT_BOUND_BUSY
            and self.values.get("server_busy", 0) < CLIENT_BOUND_BUSY
        )
        lag, latency = self.values.get("client_lag_ms", 0), self.values.get("latency_p99_ms", math.inf)
        return busy or lag > CLIENT_BOUND_LAG * latency

    @property
    def disturbed(self) -> bool:
        """Whether other processes took too much of the machine."""
        return self.values.get("waited", 0) > DISTURBED


def is_ours(server: str) -> bool:
    """Whether it is PushUp under any of its names."""
    return server.startswith(OURS) or server == "ELP"


class Medians:
    """The medians over a run's rounds, by case, metric and server. Failed measurements do not count."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        collected: dict[tuple[str, str, str], list[float]] = {}
        for measurement in measurements:
            if not measurement.failure:
                for metric, value in measurement.values.items():
                    collected.setdefault((measurement.case, metric, measurement.server), []).append(value)
        self.values = {key: median(values) for key, values in collected.items()}
        self.ranges = {key: (min(values), max(values)) for key, values in collected.items()}

    def of(self, case: str, metric: str, server: str) -> float | None:
        """The median; None if nothing was measured."""
        return self.values.get((case, metric, server))

    def ratio(self, case: str, metric: str, peer: str) -> float | None:
        """PushUp's median divided by the peer's, over Redis if that is; None where either is missing."""
        return self.quotient(case, metric, ours(peer), peer)

    def quotient(self, case: str, metric: str, server: str, peer: str) -> float | None:
        """One server's median divided by another's; None where either is missing."""
        found, theirs = self.of(case, metric, server), self.of(case, metric, peer)
        return None if found is None or not theirs else found / theirs

    def cases(self) -> list[str]:
        """In the order of measuring."""
        return list(dict.fromkeys(case for case, _, _ in self.values))

    def servers(self, case: str) -> list[str]:
        """In the order of measuring."""
        return list(dict.fromkeys(server for other, _, server in self.values if other == case))

    def metrics(self, case: str) -> list[str]:
        """In the order of `METRICS`."""
        found = {metric for other, metric, _ in self.values if other == case}
        return [metric for metric in METRICS if metric in found]


@dataclass(frozen=True)
class Target:
    """A promise about medians: `value` at most, or at least, `bound`."""

    text: str
    value: Callable[[Medians], float | None]
    bound: float
    at_most: bool = True

    def judge(self, medians: Medians, *, failed: bool = False) -> dict[str, Any]:
        """The target with the value found; `met` is None if there is none.

        `failed`: a measurement of ours did, and is not in the medians; then nothing is met.
        """
        value = self.value(medians)
        met = None if value is None else value <= self.bound if self.at_most else value >= self.bound
        if failed and met:
            met = False
        return {"text": self.text, "value": value, "bound": self.bound, "at_most": self.at_most, "met": met}


@dataclass(frozen=True)
class Result:
    """One scenario, run: what a result file holds. `command` makes it again."""

    scenario: str
    question: str
    command: str
    started: str
    seconds: float
    quick: bool
    machine: Facts
    versions: Mapping[str, Mapping[str, str]]
    pinning: str
    parameters: Mapping[str, Mapping[str, int]]
    measurements: Sequence[Measurement]
    targets: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Everything, with the medians and ratios computed."""
        medians = Medians(self.measurements)
        computed: dict[str, dict[str, dict[str, float]]] = {}
        for (case, metric, server), value in medians.values.items():
            computed.setdefault(case, {}).setdefault(metric, {})[server] = value
            ratio = medians.ratio(case, metric, server)
            if server != ours(server) and ratio is not None:
                computed[case][metric][f"{ours(server)}/{server}"] = ratio
        return {**asdict(self), "medians": computed}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Result":
        """The result that a file holds; the medians are computed anew."""
        fields = {name: value for name, value in data.items() if name != "medians"}
        fields["measurements"] = [Measurement(**measurement) for measurement in data["measurements"]]
        return Result(**fields)


def ours(peer: str) -> str:
    """What PushUp is called where it is compared with a server of that name: "PushUp over Redis" if that is, too."""
    return OURS + "".join(peer.partition(" over ")[1:])


def save(result: Result, path: Path | None = None) -> Path:
    """Write the result to `path`, else to a file of its own among the results."""
    if path is None:
        path = RESULTS / f"{result.scenario}-{result.started}.json"
        path.parent.mkdir(exist_ok=True)
    path.write_text(dump(result.to_json()))
    return path


def dump(data: Any) -> str:
    """JSON that can be read and compared: a line per field, but a list of numbers on one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    return _NUMBERS.sub(lambda found: "[" + ", ".join(found[1].replace(",", " ").split()) + "]", text) + "\n"


def newest(directory: Path = RESULTS) -> dict[str, tuple[Path, Result]]:
    """The newest result of each scenario; a quick one only where there is no other."""
    found: dict[str, tuple[Path, Result]] = {}
    for path in directory.glob("*.json"):
        result = Result.from_json(json.loads(path.read_text()))
        best = found.get(result.scenario)
        if best is None or _rank(result) > _rank(best[1]):
            found[result.scenario] = (path, result)
    return found


def _rank(result: Result) -> tuple[bool, str]:
    return (not result.quick, result.started)


def utc_now() -> str:
    """The date and time in UTC, as file names have it: 20260102T030405Z."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def percentiles_ms(name: str, ordered: Sequence[float], units: float = 1e6) -> Values:
    """p50, p99, p99.9 and the greatest of the ordered values, by metric; `units` of theirs are a millisecond."""
    return {
        f"{name}_p50_ms": percentile(ordered, 50) / units,
        f"{name}_p99_ms": percentile(ordered, 99) / units,
        f"{name}_p999_ms": percentile(ordered, 99.9) / units,
        f"{name}_max_ms": ordered[-1] / units,
    }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest of the ordered values that `percent` of them do not exceed (nearest rank)."""
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]
