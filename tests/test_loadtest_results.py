"""Medians, ratios and targets, and the files they are made from."""

import json
from pathlib import Path

import pytest

from loadtest.results import Measurement, Medians, Result, Target, dump, is_ours, newest, ours, percentile, save


def make_result(*measurements: Measurement, quick: bool = False, started: str = "20260102T030405Z") -> Result:
    target = Target("CPU ≤ Nchan's", lambda medians: medians.ratio("all", "cpu_park_us", "Nchan"), 1)
    return Result(
        scenario="fanout",
        question="What does it cost?",
        command="python -m loadtest run fanout --rounds 3",
        started=started,
        seconds=1.5,
        quick=quick,
        machine={"processor": "abacus", "cores": 2},
        versions={"PushUp": {"pushup": "0.1.0"}, "Nchan": {"nchan": "1.3.6"}},
        pinning="server pinned to core 0, client to core 1",
        parameters={"all": {"polls": 10_000}},
        measurements=list(measurements),
        targets=[target.judge(Medians(measurements))],
    )


def measured(server: str, *values: float) -> list[Measurement]:
    return [
        Measurement(number, "all", server, {"cpu_park_us": value}, {"wall_s": [0.1, 0.2]})
        for number, value in enumerate(values, 1)
    ]


RESULT = make_result(*measured("PushUp", 3, 1, 2), *measured("Nchan", 4, 9, 1))


def test_medians_and_ratios_are_over_rounds() -> None:
    medians = Medians(RESULT.measurements)

    assert medians.of("all", "cpu_park_us", "PushUp") == 2
    assert medians.ranges["all", "cpu_park_us", "Nchan"] == (1, 9)
    assert medians.ratio("all", "cpu_park_us", "Nchan") == 0.5
    assert medians.ratio("all", "latency_p99_ms", "Nchan") is None
    assert (medians.cases(), medians.servers("all"), medians.metrics("all")) == (
        ["all"],
        ["PushUp", "Nchan"],
        ["cpu_park_us"],
    )


def test_a_failed_measurement_does_not_count() -> None:
    failed = Measurement(4, "all", "PushUp", {"cpu_park_us": 1000}, failure="the server closed a connection")

    assert Medians([*RESULT.measurements, failed]).of("all", "cpu_park_us", "PushUp") == 2


@pytest.mark.parametrize(
    ("at_most", "value", "met"), [(True, 1.0, True), (True, 1.1, False), (False, 1.1, True), (True, None, None)]
)
def test_a_target_is_met_missed_or_not_measured(at_most: bool, value: float | None, met: bool | None) -> None:
    assert Target("a", lambda medians: value, 1.0, at_most).judge(Medians([]))["met"] is met


@pytest.mark.parametrize(("client", "server", "bound"), [(0.95, 0.6, True), (0.95, 0.99, False), (0.5, 0.6, False)])
def test_a_measurement_is_the_clients_if_only_the_client_was_busy(client: float, server: float, bound: bool) -> None:
    measurement = Measurement(1, "all", "PushUp", {"client_busy": client, "server_busy": server})

    assert measurement.client_bound is bound


@pytest.mark.parametrize(("lag", "latency", "bound"), [(6, 10, True), (5, 10, False), (50, None, False)])
def test_a_measurement_is_the_clients_if_it_was_late_itself(lag: float, latency: float | None, bound: bool) -> None:
    """Measured against the latency that it says it found."""
    values = {"client_lag_ms": lag} if latency is None else {"client_lag_ms": lag, "latency_p99_ms": latency}

    assert Measurement(1, "all", "PushUp", values).client_bound is bound


def test_a_measurement_is_disturbed_if_others_took_the_cores() -> None:
    assert Measurement(1, "all", "PushUp", {"waited": 0.2}).disturbed
    assert not Measurement(1, "all", "PushUp", {"waited": 0.01}).disturbed


def test_a_file_gives_back_the_result_and_holds_what_was_computed(tmp_path: Path) -> None:
    path = save(RESULT, tmp_path / "result.json")
    data = json.loads(path.read_text())

    assert Result.from_json(data) == RESULT
    assert data["medians"]["all"]["cpu_park_us"] == {"PushUp": 2, "Nchan": 4, "PushUp/Nchan": 0.5}
    assert data["targets"][0]["met"] is True


def test_lists_of_numbers_take_one_line_each() -> None:
    text = dump({"a": [1, -2.5, 1e-07], "b": ["1", "2"], "c": []})

    assert '"a": [1, -2.5, 1e-07]' in text
    assert json.loads(text) == {"a": [1, -2.5, 1e-07], "b": ["1", "2"], "c": []}


def test_the_newest_result_wins_but_a_quick_one_never_over_a_full_one(tmp_path: Path) -> None:
    for name, quick, started in (("a", False, "2026"), ("b", False, "2027"), ("c", True, "2028")):
        save(make_result(quick=quick, started=started), tmp_path / f"{name}.json")

    assert newest(tmp_path)["fanout"][0].name == "b.json"


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2), (75, 3), (99, 4), (100, 4)])
def test_percentiles_are_values_that_occurred(percent: float, value: float) -> None:
    assert percentile([1, 2, 3, 4], percent) == value


def test_what_is_over_redis_is_compared_with_pushup_over_redis() -> None:
    measurements = [
        Measurement(1, "a", "PushUp over Redis", {"deliveries_per_s": 10.0}),
        Measurement(1, "a", "Nchan over Redis", {"deliveries_per_s": 4.0}),
    ]

    assert Medians(measurements).ratio("a", "deliveries_per_s", "Nchan over Redis") == 2.5
    assert ours("Nchan over Redis") == ours("PushUp over Redis") == "PushUp over Redis"
    assert ours("Nchan") == "PushUp"


def test_no_target_is_met_where_a_measurement_of_ours_failed() -> None:
    target = Target("CPU", lambda medians: 0.5, 1.0)

    assert target.judge(Medians([]))["met"] is True
    assert target.judge(Medians([]), failed=True)["met"] is False
    assert [is_ours(name) for name in ("PushUp", "PushUp over Redis", "ELP", "Nchan over Redis", "MLP")] == [
        True,
        True,
        True,
        False,
        False,
    ]
