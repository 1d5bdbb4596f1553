"""What each further node adds: the model and its figures, from made-up measurements."""

import pytest

from loadtest.charts import Chart
from loadtest.herd import Tally
from loadtest.nodes import (
    Model,
    Observation,
    Trial,
    fit,
    latency_values,
    loss_values,
    observations,
    scenarios,
    show_figures,
)
from loadtest.results import OURS, Measurement, Result

TRUTH = Model(11.0, 300.0, 900.0)


def test_the_fit_finds_the_model_that_the_observations_were_made_with() -> None:
    found = fit(
        [Observation(n, d, TRUTH.cpu_us(n, d)) for n in (1, 2, 3, 4) for d in (100, 1000, 8000)],
    )

    assert found == pytest.approx(TRUTH)


def test_what_does_not_determine_a_model_has_none() -> None:
    assert fit([Observation(1, deliveries, 11.0 * deliveries) for deliveries in (100, 200, 300)]) is None
    assert fit([]) is None


def test_the_busiest_node_has_its_share_of_the_deliveries_and_the_whole_publication() -> None:
    assert TRUTH.busiest_us(4, 8000) == 11.0 * 2000 + 300 + 900


def test_latencies_and_losses_are_told_as_metrics() -> None:
    tally = Tally(lost=1, duplicates=2, gaps=3, wrong=4, broken=5, published=9, acknowledged=7)
    tally.latencies.extend([1_000_000, 2_000_000, 6_000_000])
    tally.lags.append(500_000)

    values = latency_values(tally)
    assert (values["latency_mean_ms"], values["latency_p50_ms"], values["latency_max_ms"]) == (3, 2, 6)
    assert values["client_lag_ms"] == 0.5
    assert list(loss_values(tally).values()) == [1, 3, 2, 4, 5, 2]


def result(trials: list[Trial]) -> Result:
    measurements = [
        Measurement(
            1,
            trial.case,
            OURS,
            {
                "node_cpu_publication_us": (cpu := TRUTH.cpu_us(trial.nodes, trial.polls)),
                "node_cpu_delivery_us": cpu / trial.polls,
                "received": 1.0,
                "latency_mean_ms": 5.0,
            },
        )
        for trial in trials
    ]
    parameters = {trial.case: trial.parameters for trial in trials}
    return Result("figures-12-13", "?", "", "", 1, False, {}, {}, "", parameters, measurements, [])


def test_the_figures_have_what_was_measured_and_the_model_dashed() -> None:
    trials = [Trial(nodes, polls, 10, 1) for nodes in (1, 2) for polls in (100, 8000)]

    shown = show_figures(result(trials))

    charts = {block.name: block for block in shown if isinstance(block, Chart)}
    assert charts["figure-12"].lines == {"mean, 8,000 polls": [(1, 5.0), (2, 5.0)]}
    assert charts["figure-13"].dashed == {"100 polls, model", "8,000 polls, model"}
    assert [y for _, y in charts["figure-13"].lines["100 polls, model"]] == pytest.approx([23.0, 26.0])
    text = "\n".join(block for block in shown if isinstance(block, str))
    assert "a = 11.00 µs" in text
    assert "prediction of the model, not a measurement" in text
    assert [one.nodes for one in observations(result(trials))] == [1, 1, 2, 2]


def test_the_full_trials_have_every_number_of_nodes_with_every_audience() -> None:
    figures, idle = scenarios(quick=False)

    assert len(figures.parameters) == 12
    assert figures.seconds <= 360
    assert idle.seconds <= 90
