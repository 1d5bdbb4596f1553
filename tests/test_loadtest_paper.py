"""The paper's evaluation: its plans, the paper's numbers, and what the report shows."""

from itertools import pairwise

import pytest

from loadtest.charts import Chart
from loadtest.methods import EventDriven, Multithreaded
from loadtest.paper import (
    GROWTH,
    PAPER,
    TABLES,
    growth_case,
    read_paper,
    resident_bytes,
    scenarios,
    show_growth,
    show_tables,
    why_failed,
)
from loadtest.pollers import Tally
from loadtest.results import Measurement, Result, Values

VALUES: Values = {
    "wire_bytes_per_s": 2000,
    "latency_mean_ms": 3,
    "latency_p99_ms": 5,
    "received_in_time": 0.5,
    "received_late": 0.25,
    "server_memory_bytes": 4e6,
}


def make_result(number: int, measurements: list[Measurement]) -> Result:
    scenario = scenarios(quick=False)[number]
    return Result(
        scenario=scenario.name,
        question=scenario.question,
        command="",
        started="",
        seconds=1,
        quick=False,
        machine={},
        versions={},
        pinning="",
        parameters={case: dict(parameters) for case, parameters in scenario.parameters.items()},
        measurements=measurements,
        targets=[],
    )


def test_no_two_cells_publish_at_once_and_all_within_the_trial() -> None:
    times = sorted(time for number in range(len(TABLES.cells)) for time in TABLES.due(number))

    assert all(second - first > 0.5 for first, second in pairwise(times))
    assert times[-1] < TABLES.span_s
    assert [len(TABLES.due(number)) for number in range(5)] == [15, 7, 5, 3, 3]


def test_the_papers_numbers_are_none_until_somebody_types_them_in() -> None:
    assert read_paper(PAPER.read_text()) == {}
    assert read_paper("[table-1.CP.10]\n20 = 3\n[figure-9.ELP]\n500 = 1.5") == {
        ("table-1", "CP", "10", "20"): 3,
        ("figure-9", "ELP", "500"): 1.5,
    }


@pytest.mark.parametrize(
    "text", ["[table-3.CP.10]\n20 = 3", "[table-1.XYZ.10]\n20 = 3", "[table-1.CP]\n20 = 3", "[figure-9.ELP]\n500 = 'a'"]
)
def test_a_number_of_no_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of a table or figure"):
        read_paper(text)


def test_a_method_fails_by_its_connections_or_by_being_late() -> None:
    broken = Tally()
    broken.faults["a poll was answered 503: no thread"] += 1200

    assert why_failed(broken, VALUES) == "1,200 × a poll was answered 503: no thread"
    assert "50.0% of the messages received in time, 25.0% up to" in why_failed(Tally(), VALUES)
    assert why_failed(Tally(), {**VALUES, "received_in_time": 0.95}) == ""


def test_processes_that_are_gone_have_no_memory() -> None:
    assert resident_bytes([2**22 + 1]) == 0


def test_tables_show_dashes_for_the_paper_and_ours_in_the_tables_unit() -> None:
    cell = TABLES.cells[-1]
    blocks = show_tables(make_result(0, [Measurement(1, cell.case, "CP", VALUES)]))
    text = "\n".join(block for block in blocks if isinstance(block, str))
    seven, eight = (block for block in blocks if isinstance(block, Chart))

    assert f"| {cell.case} | – | 2.00 | – |" in text
    assert "none are made up" in text
    assert (seven.lines, eight.lines) == ({"CP": [(50, 2)]}, {"CP": [(50, 3)]})


def test_figures_show_a_trial_in_which_a_method_failed_and_say_how() -> None:
    failed = Measurement(1, growth_case(8000), Multithreaded.name, VALUES, failure="answers too late")
    blocks = show_growth(make_result(1, [Measurement(1, growth_case(8000), EventDriven.name, VALUES), failed]))
    charts = [block for block in blocks if isinstance(block, Chart)]

    assert "- MLP, 8,000 connections: answers too late" in str(blocks)
    assert [chart.name for chart in charts] == ["figure-9", "figure-10", "figure-11"]
    assert charts[1].lines == {"ELP": [(8000, 50)], "MLP": [(8000, 50)]}


def test_the_largest_trial_fits_the_descriptors() -> None:
    assert max(GROWTH.sizes) < 19_000
    assert sum(cell.clients for cell in TABLES.cells) < 19_000
