"""Metrics: the arithmetic of histograms, and the conventions of Prometheus."""

import math
import re

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pushup.errors import ChannelNotFound, InvalidParameter, PushUpError, SettingsError
from pushup.metrics import CONTENT_TYPE, LAG_BUCKETS_S, Histogram, Metrics
from tests.support import connected, parked, running

LABELS = {"reason", "code", "side", "outcome", "le", "realm", "type"}
"""Each with a small set of values that operators choose. Never a channel or anything else that users choose."""


def families(metrics: Metrics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample of the exposition, as it is written there."""
    lines = [line for line in metrics.exposition().decode().splitlines() if line.startswith("pushup_")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def buckets(histogram: Histogram) -> dict[str, float]:
    (family,) = [histogram.family("h", "A histogram.")]
    return {sample.labels.get("le", sample.name): sample.value for sample in family.samples}


class TestHistogram:
    def test_empty(self) -> None:
        """All buckets are there from the beginning, with 0."""
        assert buckets(Histogram((1.0, 2.0))) == {"1.0": 0, "2.0": 0, "+Inf": 0, "h_count": 0, "h_sum": 0}

    @pytest.mark.parametrize(
        ("value", "first"), [(0.0, 0), (0.99, 0), (1.0, 0), (1.01, 1), (2.0, 1), (2.01, 2), (1e9, 2)]
    )
    def test_a_bound_belongs_to_its_bucket(self, value: float, first: int) -> None:
        """Buckets count what is less than or equal to their bound, each including those before it."""
        histogram = Histogram((1.0, 2.0))

        histogram.observe(value)

        assert list(buckets(histogram).values())[:3] == [float(index >= first) for index in range(3)]

    def test_many_at_once(self) -> None:
        """A value that many had counts that many times, in buckets, count and sum."""
        histogram = Histogram((1.0, 2.0, 4.0))

        histogram.observe(0.5, 10_000)
        histogram.observe(3.0, 2)
        histogram.observe(3.0)
        histogram.observe(8.0)
        histogram.observe(9.0, 0)

        assert buckets(histogram) == {
            "1.0": 10_000,
            "2.0": 10_000,
            "4.0": 10_003,
            "+Inf": 10_004,
            "h_count": 10_004,
            "h_sum": 5_017,
        }

    def test_the_usual_bounds(self) -> None:
        """From a millisecond to ten seconds, in seconds, increasing."""
        assert list(LAG_BUCKETS_S) == sorted(set(LAG_BUCKETS_S))
        assert (LAG_BUCKETS_S[0], LAG_BUCKETS_S[-1]) == (0.001, 10.0)
        assert list(buckets(Histogram()))[: len(LAG_BUCKETS_S)] == [str(bound) for bound in LAG_BUCKETS_S]


def test_realms_are_counted_apart() -> None:
    """Each realm has samples of its own."""
    metrics = Metrics()
    metrics.realm("one").messages_delivered = 1
    metrics.realm("other").messages_delivered = 2

    shown = samples(metrics)

    assert shown['pushup_messages_delivered_total{realm="one"}'] == 1
    assert shown['pushup_messages_delivered_total{realm="other"}'] == 2
    assert metrics.realm("one") is metrics.realms["one"]


class TestConventions:
    def test_names(self) -> None:
        """Prefix, words in lower case, base units; only counters are totals, and all counters are."""
        for name, family in families(Metrics()).items():
            if name.startswith(("process_", "python_")):
                continue
            assert re.fullmatch(r"pushup_[a-z]+(_[a-z]+)*", name)
            assert not re.search(r"_(ms|milliseconds|microseconds|minutes|kb|kilobytes|percent|total|count|sum)$", name)
            for sample in family.samples:
                assert sample.name.endswith("_total") is (family.type == "counter"), sample.name
            assert (family.type == "histogram") is name.endswith("_seconds"), name

    def test_help(self) -> None:
        """Every metric says in a sentence of its own what it is."""
        documentations = [family.documentation for family in families(Metrics()).values()]

        assert all(documentations)
        assert len(set(documentations)) == len(documentations)
        own = [f.documentation for name, f in families(Metrics()).items() if name.startswith("pushup_")]
        assert all(re.fullmatch(r"[A-Z0-9].*\.", text) for text in own)

    def test_types(self) -> None:
        """Every metric has one."""
        assert {f.type for n, f in families(Metrics()).items() if n.startswith("pushup_")} == {
            "gauge",
            "counter",
            "histogram",
        }

    def test_labels(self) -> None:
        """None whose values grow with use."""
        for name, family in families(Metrics()).items():
            if name.startswith("pushup_"):
                assert {label for sample in family.samples for label in sample.labels} <= LABELS

    def test_the_exposition_is_well_formed(self) -> None:
        """No metric and no sample comes twice; every line is a sample or about the samples that follow it."""
        text = Metrics().exposition().decode()
        lines = [line.rpartition(" ")[0] for line in text.splitlines()]

        assert text.endswith("\n")
        assert len(lines) == len(set(lines))
        assert re.fullmatch(r"text/plain; version=0\.0\.4; charset=utf-8", CONTENT_TYPE)
        assert "# EOF" not in text

    def test_counters_are_there_before_they_count(self) -> None:
        """Every label value starts at 0, so that the first event is an increase."""
        metrics = Metrics()
        metrics.realm("default")
        shown = samples(metrics)

        for reason in ("message", "timeout", "gap", "closed", "drain", "gone", "error"):
            assert shown[f'pushup_polls_ended_total{{realm="default",reason="{reason}"}}'] == 0
        for code in ("invalid_request", "channel_not_found", "unavailable", "internal_error"):
            assert shown[f'pushup_requests_refused_total{{code="{code}"}}'] == 0
        assert f'pushup_requests_refused_total{{code="{SettingsError.code}"}}' not in shown
        assert all(value == 0 for name, value in shown.items() if not name.startswith('pushup_ready{realm="default"}'))

    def test_the_process_is_measured(self) -> None:
        """Memory, processor time and file descriptors, by the names everybody's dashboards know."""
        names = families(Metrics())

        assert {"process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds", "python_info"} <= set(names)

    def test_two_servers_in_one_process(self) -> None:
        """Nothing is registered for the whole process: tests and embedders may have many."""
        one, other = Metrics(), Metrics()

        one.realm("default").publications = 1
        other.realm("default")

        assert samples(one)['pushup_publications_total{outcome="stored",realm="default"}'] == 1
        assert samples(other)['pushup_publications_total{outcome="stored",realm="default"}'] == 0
        assert isinstance(one._registry, CollectorRegistry)


def test_what_is_counted_is_shown() -> None:
    """Every attribute has its sample."""
    metrics = Metrics()
    realm = metrics.realm("default")
    realm.answers["message"] = 1
    realm.messages_delivered = 2
    realm.publications, realm.publications_duplicate, realm.publications_refused = 3, 4, 5
    realm.broker_reads, realm.broker_read_errors = 6, 7
    metrics.connections_cut["slow"] = 16
    metrics.connections_opened, metrics.connections_closed = 8, 3
    metrics.requests_lane, metrics.requests_web = 9, 10
    realm.parked, realm.channels, realm.ready = 11, 12, True
    realm.lag.observe(0.5, 14)
    metrics.loop_lag.observe(0.25, 15)

    shown = samples(metrics)

    assert {name: value for name, value in shown.items() if value and "_bucket" not in name} == {
        'pushup_polls_ended_total{realm="default",reason="message"}': 1,
        'pushup_messages_delivered_total{realm="default"}': 2,
        'pushup_publications_total{outcome="stored",realm="default"}': 3,
        'pushup_publications_total{outcome="duplicate",realm="default"}': 4,
        'pushup_publications_total{outcome="refused",realm="default"}': 5,
        'pushup_broker_reads_total{realm="default"}': 6,
        'pushup_broker_read_errors_total{realm="default"}': 7,
        "pushup_connections_opened_total": 8,
        'pushup_connections_cut_total{reason="slow"}': 16,
        'pushup_requests_total{side="lane"}': 9,
        'pushup_requests_total{side="web"}': 10,
        'pushup_parked_polls{realm="default"}': 11,
        'pushup_watched_channels{realm="default"}': 12,
        "pushup_open_connections": 5,
        'pushup_ready{realm="default"}': 1,
        'pushup_delivery_lag_seconds_count{realm="default"}': 14,
        'pushup_delivery_lag_seconds_sum{realm="default"}': 7,
        "pushup_event_loop_lag_seconds_count": 15,
        "pushup_event_loop_lag_seconds_sum": 3.75,
    }
    assert shown['pushup_delivery_lag_seconds_bucket{le="0.25",realm="default"}'] == 0
    assert shown['pushup_delivery_lag_seconds_bucket{le="0.5",realm="default"}'] == 14
    assert shown['pushup_event_loop_lag_seconds_bucket{le="+Inf"}'] == 15


def test_refusals_are_counted_by_code() -> None:
    """One more for each error, also for a code that nobody thought of."""

    class Odd(PushUpError):
        code = "odd"

    metrics = Metrics()
    for error in (ChannelNotFound("a"), ChannelNotFound("b"), InvalidParameter("start", "no"), Odd("no")):
        metrics.count_refused(error)

    counted = {code: count for code, count in metrics.refused.items() if count}
    assert counted == {"channel_not_found": 2, "invalid_parameter": 1, "odd": 1}
    assert samples(metrics)['pushup_requests_refused_total{code="channel_not_found"}'] == 2


async def test_a_server_counts() -> None:
    """What a few requests do shows where it should."""
    async with running() as server, connected(server) as poller, connected(server) as publisher:
        await poller.get("/poll?channel=news&timeout=0")  # The node knows the channel from here on.
        poller.send("GET /poll?channel=news HTTP/1.1\r\nHost: test\r\n\r\n")
        await parked(server, 1)
        await publisher.publish("news", data=1, key="k")
        await publisher.publish("news", data=1, key="k")
        await poller.reply()
        await poller.get("/poll?channel=news&start=x")
        await publisher.get("/nowhere")

        shown = samples(server.metrics)

        assert shown['pushup_polls_ended_total{realm="default",reason="message"}'] == 1
        assert shown['pushup_messages_delivered_total{realm="default"}'] == 1
        assert shown['pushup_publications_total{outcome="stored",realm="default"}'] == 1
        assert shown['pushup_publications_total{outcome="duplicate",realm="default"}'] == 1
        assert shown['pushup_requests_refused_total{code="invalid_parameter"}'] == 1
        assert shown['pushup_requests_refused_total{code="not_found"}'] == 1
        assert shown['pushup_requests_total{side="lane"}'] == 5
        assert shown['pushup_requests_total{side="web"}'] == 1
        assert shown["pushup_connections_opened_total"] == 2
        assert shown['pushup_delivery_lag_seconds_count{realm="default"}'] == 1
        assert 0 <= shown['pushup_delivery_lag_seconds_sum{realm="default"}'] < 10
        assert math.isfinite(shown["pushup_event_loop_lag_seconds_sum"])
