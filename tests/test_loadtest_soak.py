"""An hour with one node: the verdict, and what happens in it."""

import random
from itertools import islice

import pytest

from loadtest.charts import Chart
from loadtest.results import OURS, Measurement, Medians, Result
from loadtest.soak import C_LIBRARY, FULL, JEMALLOC, Town, scenarios, show, slope


def test_the_slope_is_that_of_the_line_nearest_to_the_points() -> None:
    assert slope([(0, 1), (10, 21), (20, 41)]) == pytest.approx(2)
    assert slope([(0, 0), (1, 1), (2, 0)]) == pytest.approx(0)


@pytest.mark.parametrize("points", [[], [(1.0, 5.0)], [(1.0, 5.0), (1.0, 7.0)]])
def test_too_few_points_have_no_slope(points: list[tuple[float, float]]) -> None:
    assert slope(points) == 0


def test_the_oldest_channel_gives_way_when_as_many_came_as_a_channel_has() -> None:
    town = Town(3, 6, random.Random(1))
    assert [town.next().name for _ in range(3)] == ["c1", "c2", "c0"]

    for _ in range(2):
        assert town.join().after == 0

    assert {town.next().name for _ in range(3)} == {"c1", "c2", "c3"}


def test_memory_over_time_is_drawn_in_minutes_and_mebibytes() -> None:
    samples = {"second": [60.0, 120.0], "memory_anonymous_bytes": [2.0**20, 2.0**21]}
    measured = [
        Measurement(1, C_LIBRARY, OURS, {"memory_slope_share": 0.05}, samples),
        Measurement(1, JEMALLOC, OURS, {"memory_slope_share": 0.005}),
    ]

    *texts, chart = show(Result("soak", "?", "", "", 1, False, {}, {}, "", {}, measured, []))

    assert isinstance(chart, Chart)
    assert chart.lines == {C_LIBRARY: [(1, 1), (2, 2)]}
    assert f"|  | {JEMALLOC} | {C_LIBRARY} |" in str(texts[-1])
    assert "| memory gained, of its mean (%/h) | 0.50 | 5.00 |" in str(texts[-1])


def test_a_loss_counts_with_whichever_allocator_it_was() -> None:
    lost = {JEMALLOC: 0.0, C_LIBRARY: 3.0}
    medians = Medians([Measurement(1, case, OURS, {"messages_lost": value}) for case, value in lost.items()])

    [target] = [target for target in scenarios(quick=False)[0].targets if target.text == "lost messages"]

    assert target.value(medians) == 3


def test_only_the_full_one_judges_memory_and_it_leaves_time_to_judge() -> None:
    full, quick = (scenarios(quick=quick)[0] for quick in (False, True))

    assert [len(list(islice(one.targets, 9))) for one in (full, quick)] == [4, 3]
    assert FULL.seconds - FULL.settle_s == 2700
