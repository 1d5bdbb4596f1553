"""What a node counts, and its exposition in the Prometheus text format.

The hot path adds plain integers; metric families are made when somebody scrapes. A channel is never a label.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pushup.errors import PushUpError, SettingsError

LAG_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def _codes(error: type[PushUpError]) -> Iterator[str]:
    if error is not SettingsError:
        yield error.code
    for child in error.__subclasses__():
        yield from _codes(child)


_CODES: Final = tuple(_codes(PushUpError))
"""Counted from 0 on: a counter that comes into being with its first event hides that event from Prometheus."""


class Histogram:
    """Counts of values by upper bound. `observe` takes how many had the value, since a fan-out answers many at once."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...] = LAG_BUCKETS_S) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """O(log buckets)."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, documentation: str) -> Metric:
        """The histogram as Prometheus has it: cumulative, with +Inf."""
        family = HistogramMetricFamily(name, documentation)
        family.add_metric([], self.buckets(), self._sum)
        return family

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, with +Inf."""
        total = 0
        buckets = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        return buckets

    @property
    def sum(self) -> float:
        return self._sum


class RealmMetrics:
    """The counters of one realm."""

    def __init__(self) -> None:
        self.answers = dict.fromkeys(("message", "timeout", "gap", "closed", "drain", "gone", "error"), 0)
        self.messages_delivered = 0
        self.publications = 0
        self.publications_duplicate = 0
        self.publications_refused = 0
        self.broker_reads = 0
        self.broker_read_errors = 0
        self.broker_doubts = 0
        self.lag = Histogram()
        self.parked = 0
        self.channels = 0
        self.ready = False


class Metrics(Collector):
    """The counters of one process, and those of its realms."""

    def __init__(self) -> None:
        self.realms: dict[str, RealmMetrics] = {}
        self.refused = dict.fromkeys(_CODES, 0)
        self.connections_opened = 0
        self.connections_closed = 0
        self.connections_cut = dict.fromkeys(("slow", "idle", "unread", "flood"), 0)
        self.streams = {"text/event-stream": 0, "application/x-ndjson": 0, "websocket": 0}
        self.requests_lane = 0
        self.requests_web = 0
        self.loop_lag = Histogram()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def realm(self, name: str) -> RealmMetrics:
        """Those of a realm."""
        return self.realms.setdefault(name, RealmMetrics())

    def count_refused(self, error: PushUpError) -> None:
        """A request was answered with an error."""
        self.refused[error.code] = self.refused.get(error.code, 0) + 1

    def exposition(self) -> bytes:
        """Everything, in the text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        realms = self.realms
        yield _gauge(
            "pushup_parked_polls",
            "Polls that wait on this node now.",
            {name: realm.parked for name, realm in realms.items()},
        )
        yield _gauge(
            "pushup_watched_channels",
            "Channels this node keeps a backlog of.",
            {name: realm.channels for name, realm in realms.items()},
        )
        yield _gauge(
            "pushup_ready",
            "1 while the node is ready for the realm's polls, else 0.",
            {name: realm.ready for name, realm in realms.items()},
        )
        yield GaugeMetricFamily(
            "pushup_open_connections", "Client connections open now.", self.connections_opened - self.connections_closed
        )
        yield _counter(
            "pushup_polls_ended",
            "Polls ended, by what ended them.",
            {(name, reason): count for name, realm in realms.items() for reason, count in realm.answers.items()},
            "reason",
        )
        yield _counter(
            "pushup_messages_delivered",
            "Messages in answers.",
            {(name,): realm.messages_delivered for name, realm in realms.items()},
        )
        yield _counter(
            "pushup_publications",
            "Publications made through this node, by outcome.",
            {
                (name, outcome): count
                for name, realm in realms.items()
                for outcome, count in (
                    ("stored", realm.publications),
                    ("duplicate", realm.publications_duplicate),
                    ("refused", realm.publications_refused),
                )
            },
            "outcome",
        )
        for name, documentation, attribute in (
            ("pushup_broker_reads", "Channels read from the broker.", "broker_reads"),
            ("pushup_broker_read_errors", "Channels whose read from the broker failed.", "broker_read_errors"),
            ("pushup_broker_doubts", "Times that events of the broker may have been missed.", "broker_doubts"),
        ):
            yield _counter(name, documentation, {(key,): getattr(realm, attribute) for key, realm in realms.items()})
        yield _by_label("pushup_requests_refused", "Requests answered with an error, by code.", "code", self.refused)
        yield _by_label(
            "pushup_requests",
            "Requests, by the side that served them.",
            "side",
            {"lane": self.requests_lane, "web": self.requests_web},
        )
        streams = GaugeMetricFamily("pushup_open_streams", "Streams open now, by what they are.", labels=["type"])
        for kind, count in self.streams.items():
            streams.add_metric([kind], count)
        yield streams
        yield CounterMetricFamily("pushup_connections_opened", "Client connections accepted.", self.connections_opened)
        yield _by_label(
            "pushup_connections_cut",
            "Connections closed on clients that were slow to ask or idle, did not read, or came in too many.",
            "reason",
            self.connections_cut,
        )
        lag = HistogramMetricFamily(
            "pushup_delivery_lag_seconds", "From a message's id to its answer being written.", labels=["realm"]
        )
        for name, realm in realms.items():
            lag.add_metric([name], realm.lag.buckets(), realm.lag.sum)
        yield lag
        yield self.loop_lag.family("pushup_event_loop_lag_seconds", "How late the event loop runs its timers.")


def _gauge(name: str, documentation: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=["realm"])
    for realm, value in values.items():
        family.add_metric([realm], float(value))
    return family


def _counter(name: str, documentation: str, values: Mapping[tuple[str, ...], int], *labels: str) -> Metric:
    """By realm, and by further labels."""
    family = CounterMetricFamily(name, documentation, labels=["realm", *labels])
    for key, count in values.items():
        family.add_metric(list(key), count)
    return family


def _by_label(name: str, documentation: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
