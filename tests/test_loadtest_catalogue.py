"""All scenarios together; measuring itself is the load test."""

import pytest

from loadtest.catalogue import catalogue


@pytest.mark.parametrize("quick", [False, True])
def test_every_scenario_says_what_it_measures_and_fits_the_descriptors(quick: bool) -> None:
    for name, scenario in catalogue(quick=quick).items():
        assert scenario.name == name
        assert scenario.question.endswith((".", "?"))
        assert scenario.servers
        assert scenario.rounds >= 1
        assert scenario.seconds > 0
        assert all(scenario.parameters)


def test_all_quick_scenarios_together_take_five_minutes() -> None:
    assert sum(scenario.seconds for scenario in catalogue(quick=True).values()) <= 300
